//! What the machine has, in words and as data.

use crate::support::run;

#[test]
fn each_layer_is_named_and_what_is_missing_comes_with_a_remedy() {
    let doctor = run(["doctor", "--json"]);
    let findings = doctor.json();
    let checks = findings["checks"].as_array().unwrap();
    let names: Vec<&str> = checks.iter().map(|check| check["name"].as_str().unwrap()).collect();
    for name in ["user_namespaces", "pid_namespace", "seccomp", "landlock", "cgroups", "environments.default"]
    {
        assert!(names.contains(&name), "{name} is missing in {names:?}");
    }
    for check in checks {
        let missing = check["ok"] == false;
        assert_eq!(check["remedy"] != "", missing, "{check}");
        assert_ne!(check["without"], "", "{check}");
    }
    let blocked = checks.iter().any(|check| check["required"] == true && check["ok"] == false);
    assert_eq!(findings["ready"], !blocked);
    assert_eq!(doctor.code, i32::from(blocked), "{doctor:?}");
}

#[test]
fn a_python_that_is_not_there_is_found_missing() {
    let doctor = run(["doctor", "--set", "environments.default.python=/no/such/python"]);
    assert_eq!(doctor.code, 1, "{doctor:?}");
    let line = doctor.stdout.lines().find(|line| line.contains("environments.default")).unwrap();
    assert!(line.starts_with("MISSING") && line.contains("/no/such/python"), "{line}");
    assert!(doctor.stdout.contains("environments.default.python"), "no remedy in {}", doctor.stdout);
    assert!(doctor.stdout.contains("serve would not start"), "{}", doctor.stdout);
}

#[test]
fn a_shim_that_is_not_there_is_found_missing() {
    let doctor = run(["doctor", "--json", "--set", "sandbox.shim=/no/such/shim.so"]);
    assert_eq!(doctor.code, 1, "{doctor:?}");
    let findings = doctor.json();
    let shim = findings["checks"].as_array().unwrap().iter().find(|check| check["name"] == "shim").unwrap();
    assert_eq!(shim["ok"], false);
    assert!(shim["detail"].as_str().unwrap().contains("/no/such/shim.so"), "{shim}");
}

#[test]
fn what_the_operator_requires_is_required() {
    let doctor = run(["doctor", "--json", "--set", "sandbox.require=[\"cgroups\"]"]);
    let findings = doctor.json();
    let cgroups =
        findings["checks"].as_array().unwrap().iter().find(|check| check["name"] == "cgroups").unwrap();
    assert_eq!(cgroups["required"], true);
}
