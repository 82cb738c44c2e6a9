//! On a machine where AppArmor denies user namespaces, or what is done in them: says so, instead of the errno alone.
//!
//! It does in two ways. A profile of the worker's own program may have no rule `userns,`; and Ubuntu restricts the
//! namespaces of ordinary users' programs that have no profile at all (`apparmor_restrict_unprivileged_userns`).

use std::fs;

use super::Check;

/// What is denied where user namespaces are restricted: themselves, or what takes the capabilities that they give.
const RESTRICTED: [&str; 5] = ["user_namespaces", "tmpfs", "pivot_root", "proc", "several_uids"];

const PROFILE: &str = "deploy/README.md, \"On the host\", has one";

/// Puts what AppArmor has to do with it into the remedies of what is missing.
pub(super) fn name_profile(checks: &mut [Check]) {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    // The first where several security modules share the second.
    let label = fs::read_to_string("/proc/self/attr/apparmor/current")
        .unwrap_or_else(|_| read("/proc/self/attr/current"));
    let Some(remedy) = remedy(&label, &read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")) else {
        return;
    };
    let denied = |check: &&mut Check| {
        !check.ok && (check.name.ends_with("_namespace") || RESTRICTED.contains(&check.name.as_str()))
    };
    checks.iter_mut().filter(denied).for_each(|check| check.remedy.clone_from(&remedy));
}

fn remedy(label: &str, restricted: &str) -> Option<String> {
    let label = label.trim_end_matches(['\n', '\0']);
    // As `/opt/sandpiper/sandpiper (enforce)`; SELinux's labels look otherwise.
    if let Some(profile) = label.strip_suffix(" (enforce)") {
        return Some(format!(
            "AppArmor confines the worker by the profile {profile}: add `userns,` and what the walls mount to it, or \
             replace it by one with flags=(unconfined) and `userns,` ({PROFILE})"
        ));
    }
    (restricted.trim() == "1" && (label.is_empty() || label.starts_with("unconfined"))).then(|| {
        format!(
            "AppArmor restricts the user namespaces of programs without a profile: load a profile with `userns,` for \
             this program ({PROFILE}), or for all programs sysctl kernel.apparmor_restrict_unprivileged_userns=0"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::remedy;

    #[test]
    fn it_is_named_only_where_it_is_in_the_way() {
        let named = |label, restricted| remedy(label, restricted).unwrap_or_default();
        assert!(
            named("/opt/sandpiper/sandpiper (enforce)\n", "")
                .contains("the profile /opt/sandpiper/sandpiper:")
        );
        assert!(named("unconfined\n", "1\n").contains("apparmor_restrict_unprivileged_userns=0"));
        assert_eq!(remedy("unconfined\n", "0\n"), None);
        assert_eq!(remedy("sandpiper (unconfined)\n", ""), None);
        assert_eq!(remedy("", ""), None);
        assert_eq!(remedy("system_u:system_r:unconfined_t:s0\0", ""), None);
    }
}
