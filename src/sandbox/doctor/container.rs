//! Inside a container: which option its engine was started without, instead of the errno alone.
//!
//! Looked at are the filter, the AppArmor profile, the masked parts of /proc and the capabilities that an engine
//! puts around a container. Where none of them explains what is missing, the remedy stays the general one.

use std::path::Path;

use super::Check;
use crate::sys::probe;

/// Capabilities that a worker needs as root, beside those of an ordinary user, which are none.
const FOR_ROOT: [(&str, u32); 5] =
    [("CHOWN", 0), ("SETGID", 6), ("SETUID", 7), ("SYS_ADMIN", 21), ("SETFCAP", 31)];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Engine {
    Docker,
    Podman,
    Kubernetes,
}

/// What the engine put around this process.
#[derive(Debug)]
struct Surroundings {
    engine: Engine,
    /// A seccomp filter refuses what the walls are built with.
    filtered: bool,
    /// A seccomp filter answers `clone3` with EPERM, after which the C library does not fall back.
    clone3_refused: bool,
    /// The AppArmor profile that confines us.
    apparmor: Option<String>,
    /// Parts of /proc are covered, so that no whole one may be mounted.
    masked: bool,
    /// The user namespace is not the host's.
    own_users: bool,
    /// Those of [`FOR_ROOT`] that root lacks here; empty for an ordinary user.
    lacking: Vec<&'static str>,
}

/// Names the engine's options in the remedies of what is missing, if this is a container.
pub(super) fn name_options(checks: &mut [Check]) {
    let Some(engine) = engine() else { return };
    let around = look(engine);
    for check in checks.iter_mut().filter(|check| !check.ok) {
        let options = options(&check.name, &around);
        if !options.is_empty() {
            check.remedy = format!("start the container with {}", options.join("; and with "));
        }
    }
}

fn engine() -> Option<Engine> {
    if std::env::var_os("KUBERNETES_SERVICE_HOST").is_some() {
        Some(Engine::Kubernetes)
    } else if std::env::var_os("container").is_some_and(|name| name == "podman")
        || Path::new("/run/.containerenv").exists()
    {
        Some(Engine::Podman)
    } else if Path::new("/.dockerenv").exists() {
        Some(Engine::Docker)
    } else {
        None
    }
}

fn look(engine: Engine) -> Surroundings {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    Surroundings {
        engine,
        filtered: probe::unshare_is_filtered() || probe::mount_is_filtered(),
        clone3_refused: probe::clone3_is_refused(),
        apparmor: confined_by(&read("/proc/self/attr/current")),
        masked: covers_proc(&read("/proc/self/mountinfo")),
        own_users: !read("/proc/self/uid_map").split_ascii_whitespace().eq(["0", "0", "4294967295"]),
        lacking: lacking(&read("/proc/self/status")),
    }
}

/// The profile in a line such as `docker-default (enforce)`. SELinux's labels are in the same file.
fn confined_by(attribute: &str) -> Option<String> {
    attribute.trim_end_matches(['\n', '\0']).strip_suffix(" (enforce)").map(str::to_owned)
}

/// Something is mounted below /proc.
fn covers_proc(mountinfo: &str) -> bool {
    mountinfo.lines().any(|line| line.split(' ').nth(4).is_some_and(|point| point.starts_with("/proc/")))
}

fn lacking(status: &str) -> Vec<&'static str> {
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
    let uid = field("Uid:").split_ascii_whitespace().nth(1);
    let held = u64::from_str_radix(field("CapEff:").trim(), 16).unwrap_or(0);
    let lacks = |bit: u32| uid == Some("0") && held & (1 << bit) == 0;
    FOR_ROOT.iter().filter(|(_, bit)| lacks(*bit)).map(|(name, _)| *name).collect()
}

/// What would give this layer to the container, each with what stands in the way now.
fn options(layer: &str, around: &Surroundings) -> Vec<String> {
    let built_in_namespaces =
        layer.ends_with("_namespace") || matches!(layer, "tmpfs" | "pivot_root" | "proc");
    let mut options = Vec::new();
    let filter_matters = built_in_namespaces
        || matches!(
            layer,
            "user_namespaces"
                | "seccomp"
                | "seccomp_notify"
                | "landlock"
                | "landlock_scopes"
                | "pidfd"
                | "close_range"
                | "openat2"
        );
    if around.filtered && filter_matters {
        options.push(profile(around.engine, "refuses calls that the walls are built with"));
    }
    if around.clone3_refused && layer.starts_with("environments.") {
        options.push(profile(
            around.engine,
            "answers clone3 with EPERM, and only after ENOSYS a C library falls back",
        ));
    }
    if let Some(name) = around.apparmor.as_ref().filter(|_| built_in_namespaces) {
        options.push(format!("{} (now the AppArmor profile {name} is on)", unconfined(around.engine)));
    }
    if around.masked && layer == "proc" {
        options.push(format!("{} (now parts of /proc are masked)", unmasked(around.engine)));
    }
    // As root of the host's user namespace a container gets no more capabilities than it must have.
    let wanted: Vec<&str> = match layer {
        "several_uids" if around.own_users => around.lacking.clone(),
        _ if built_in_namespaces || layer == "user_namespaces" => {
            around.lacking.iter().copied().filter(|name| *name == "SETFCAP").collect()
        }
        _ => Vec::new(),
    };
    if !wanted.is_empty() {
        let ordinary = if layer == "several_uids" { "" } else { ", or as an ordinary user" };
        options.push(format!("{}{ordinary} (root lacks it now)", capabilities(around.engine, &wanted)));
    }
    options
}

fn profile(engine: Engine, now: &str) -> String {
    let option = match engine {
        Engine::Docker | Engine::Podman => "--security-opt seccomp=deploy/seccomp.json",
        Engine::Kubernetes => {
            "seccompProfile: {type: Localhost, localhostProfile: sandpiper.json}, deploy/seccomp.json on each node"
        }
    };
    format!("{option} (the seccomp profile that is on now {now})")
}

fn unconfined(engine: Engine) -> &'static str {
    match engine {
        Engine::Docker | Engine::Podman => "--security-opt apparmor=unconfined",
        Engine::Kubernetes => "appArmorProfile: {type: Unconfined}",
    }
}

fn unmasked(engine: Engine) -> &'static str {
    match engine {
        Engine::Docker => "--security-opt systempaths=unconfined",
        Engine::Podman => "--security-opt unmask=ALL",
        Engine::Kubernetes => "procMount: Unmasked in a pod with hostUsers: false",
    }
}

fn capabilities(engine: Engine, names: &[&str]) -> String {
    match engine {
        Engine::Docker | Engine::Podman => {
            names.iter().map(|name| format!("--cap-add {name}")).collect::<Vec<_>>().join(" ")
        }
        Engine::Kubernetes => format!("capabilities: {{add: [{}]}}", names.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn around() -> Surroundings {
        Surroundings {
            engine: Engine::Docker,
            filtered: false,
            clone3_refused: false,
            apparmor: None,
            masked: false,
            own_users: false,
            lacking: Vec::new(),
        }
    }

    #[test]
    fn a_missing_option_is_named_and_no_other() {
        let filtered = Surroundings { filtered: true, ..around() };
        assert!(options("user_namespaces", &filtered)[0].starts_with("--security-opt seccomp="));
        assert!(options("several_uids", &filtered).is_empty());
        assert!(options("environments.default", &filtered).is_empty());
        let confined = Surroundings { apparmor: Some("docker-default".into()), ..around() };
        assert!(options("tmpfs", &confined)[0].starts_with("--security-opt apparmor=unconfined"));
        let masked = Surroundings { masked: true, ..around() };
        assert!(options("proc", &masked)[0].starts_with("--security-opt systempaths=unconfined"));
        assert!(options("tmpfs", &masked).is_empty());
        let old = Surroundings { clone3_refused: true, ..around() };
        assert!(options("environments.default", &old)[0].starts_with("--security-opt seccomp="));
        assert!(options("cgroups", &around()).is_empty());
    }

    #[test]
    fn root_is_told_which_capabilities_it_lacks() {
        let status = "Name:\tsandpiper\nUid:\t0\t0\t0\t0\nCapEff:\t00000000a80425fb\n";
        assert_eq!(lacking(status), ["SYS_ADMIN"]);
        assert!(lacking(&status.replace("\t0\t0\t0\t0", "\t5\t5\t5\t5")).is_empty());
        let root = Surroundings { lacking: vec!["SYS_ADMIN", "SETFCAP"], ..around() };
        assert!(
            options("user_namespaces", &root)[0].starts_with("--cap-add SETFCAP, or as an ordinary user")
        );
        assert!(options("several_uids", &root).is_empty());
        let mapped = Surroundings { own_users: true, engine: Engine::Kubernetes, ..root };
        assert!(options("several_uids", &mapped)[0].starts_with("capabilities: {add: [SYS_ADMIN, SETFCAP]}"));
    }

    #[test]
    fn what_the_kernel_tells_is_understood() {
        assert_eq!(confined_by("docker-default (enforce)\n").as_deref(), Some("docker-default"));
        assert_eq!(confined_by("unconfined\n"), None);
        assert_eq!(confined_by("system_u:system_r:container_t:s0:c1,c2\0"), None);
        assert!(covers_proc("31 28 0:5 /null /proc/kcore rw,nosuid - tmpfs tmpfs rw\n"));
        assert!(!covers_proc(
            "28 27 0:25 / /proc rw,nosuid - proc proc rw\n29 27 0:26 / /process rw - tmpfs x rw\n"
        ));
    }
}
