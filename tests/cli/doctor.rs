//! What the machine has, in words and as data.

use std::os::unix::fs::PermissionsExt;

use crate::serve::Worker;
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

/// What only a start shows: each of these ends `serve`.
#[test]
fn what_would_stop_a_worker_is_found() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = format!("http.listen={}", taken.local_addr().unwrap());
    for (setting, name, detail) in [
        ("sandbox.allow_syscalls=[\"bpff\"]", "sandbox", "`bpff` is not a system call"),
        ("sandbox.require=[\"landlok\"]", "sandbox", "there is no layer landlok"),
        ("environments.default.mounts=[\"/nope\"]", "sandbox", "/nope"),
        ("environments.default.allow_exec=[\"/usr/bin/nope\"]", "sandbox", "/usr/bin/nope"),
        (&listen, "http.listen", "Address already in use"),
    ] {
        let doctor = run(["doctor", "--json", "--set", setting]);
        assert_eq!(doctor.code, 1, "{setting}: {doctor:?}");
        let findings = doctor.json();
        let mut checks = findings["checks"].as_array().unwrap().iter();
        let check = checks.find(|check| check["name"] == name && check["ok"] == false);
        let check = check.unwrap_or_else(|| panic!("{setting}: {doctor:?}"));
        assert!(check["required"] == true && check["detail"].as_str().unwrap().contains(detail), "{check}");
        let served = run(["serve", "--once", "1", "--url", "amqp://127.0.0.1:1", "--set", setting]);
        assert_eq!(served.code, 1, "{setting}: {served:?}");
    }
}

#[test]
fn a_job_is_run_in_each_environment() {
    let set = "environments.other.imports=[\"no_such_module\"]";
    let doctor = run(["doctor", "--json", "--set", set, "--set", "http.listen=off"]);
    let findings = doctor.json();
    let check = |name: &str| {
        let mut checks = findings["checks"].as_array().unwrap().iter();
        checks.find(|check| check["name"] == name).unwrap_or_else(|| panic!("{name}: {doctor:?}")).clone()
    };
    assert_eq!((doctor.code, &findings["ready"]), (0, &true.into()), "{doctor:?}");
    assert_eq!(check("environments.default.job")["ok"], true);
    assert_eq!(check("environments.other.job")["ok"], true);
    let warm = check("environments.other.warm");
    assert!(warm["ok"] == false && warm["detail"].as_str().unwrap().contains("no_such_module"), "{warm}");
}

#[test]
fn what_the_operator_requires_is_required() {
    let doctor = run(["doctor", "--json", "--set", "sandbox.require=[\"cgroups\"]"]);
    let findings = doctor.json();
    let cgroups =
        findings["checks"].as_array().unwrap().iter().find(|check| check["name"] == "cgroups").unwrap();
    assert_eq!(cgroups["required"], true);
}

#[test]
fn no_job_runs_without_what_the_operator_requires() {
    for verb in [&["exec", "-"][..], &["serve", "--url", "amqp://127.0.0.1:1"]] {
        let ran = run(verb.iter().chain(&["--set", "sandbox.require=[\"moat\"]"]));
        let expected = "sandbox.require: there is no layer moat; the layers are user_namespaces, ";
        assert!(ran.code != 0 && ran.complaint().contains(expected), "{ran:?}");
    }
}

#[test]
fn a_worker_examines_the_machine_once() {
    // A python that writes down what it is asked: each examination asks it for its version.
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let (python, asked) = (dir.path().join("python"), dir.path().join("asked"));
    let program = format!("#!/bin/sh\necho \"$*\" >> {}\nexec /usr/bin/python3 \"$@\"\n", asked.display());
    std::fs::write(&python, program).unwrap();
    std::fs::set_permissions(&python, std::fs::Permissions::from_mode(0o755)).unwrap();
    let _worker = Worker::start_with(&[
        ("SANDPIPER_ENVIRONMENTS__DEFAULT__PYTHON", python.to_str().unwrap()),
        ("SANDPIPER_SANDBOX__REQUIRE", "[\"seccomp\"]"),
    ]);
    let asked = std::fs::read_to_string(asked).unwrap();
    let examined = asked.lines().filter(|line| line.contains("sys.version_info[:3]")).count();
    assert_eq!(examined, 1, "{asked}");
}
