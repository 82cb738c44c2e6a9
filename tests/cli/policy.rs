//! The policy as it is printed: complete, with reasons, and following the flags.

use crate::support::run;

fn class_of(flags: &[&str], call: &str) -> String {
    let policy = run(["policy", "--json"].iter().chain(flags)).json();
    let calls = policy["syscalls"].as_array().unwrap();
    let entry =
        calls.iter().find(|entry| entry["name"] == call).unwrap_or_else(|| panic!("{call} is missing"));
    assert_ne!(entry["reason"], "", "{entry}");
    entry["class"].as_str().unwrap().to_owned()
}

#[test]
fn flags_change_what_they_say() {
    assert_eq!(class_of(&[], "read"), "allow");
    assert_eq!(class_of(&[], "reboot"), "kill");
    assert_eq!(class_of(&[], "socket"), "refuse");
    assert_ne!(class_of(&["--network"], "socket"), "refuse");
    assert_eq!(class_of(&[], "execve"), "refuse");
    assert_eq!(class_of(&["--exec"], "execve"), "allow");
}

#[test]
fn a_class_is_picked_out_and_the_page_gives_reasons() {
    let page = run(["policy", "--class", "kill", "--arch", "aarch64"]);
    assert_eq!(page.code, 0, "{page:?}");
    assert!(page.stdout.starts_with("# "), "a reason stands first: {page:?}");
    let calls: Vec<&str> =
        page.stdout.lines().filter(|line| !line.is_empty() && !line.starts_with("# ")).collect();
    assert!(calls.len() > 5 && calls.iter().all(|line| line.starts_with("kill ")), "{calls:?}");
}

#[test]
fn a_call_that_the_operator_adds_is_shown_and_a_wrong_name_is_told() {
    let add = |name: &str| format!("sandbox.allow_syscalls=[\"{name}\"]");
    assert_eq!(class_of(&["--set", &add("userfaultfd")], "userfaultfd"), "allow");
    let ran = run(["policy", "--set", &add("userfaltfd")]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.complaint().contains("userfaultfd"), "{ran:?}");
}
