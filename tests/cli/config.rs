//! Configuration that is wrong says which key, in every verb.

use crate::support::{command, run};

#[test]
fn an_unknown_key_is_named() {
    for verb in ["serve", "doctor"] {
        let ran = run([verb, "--set", "worker.slotz=3"]);
        assert_eq!(ran.code, 1, "{ran:?}");
        assert!(ran.complaint().contains("slotz"), "{ran:?}");
    }
    let exec = run(["exec", "-", "--set", "worker.slotz=3"]);
    assert_eq!(exec.code, 125, "{exec:?}");
    assert!(exec.complaint().contains("slotz"), "{exec:?}");
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let ran = run(["doctor", "--config", "/no/such/config.toml"]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.complaint().contains("/no/such/config.toml"), "{ran:?}");
}

#[test]
fn a_wrong_log_level_is_named() {
    let ran = run(["serve", "--set", "log.level=loud,,="]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.complaint().contains("log.level"), "{ran:?}");
}

#[test]
fn the_environment_sets_keys_too() {
    let out = command(["doctor"]).env("SANDPIPER_WORKER__SLOTS", "none").output().unwrap();
    assert_eq!(out.status.code(), Some(1));
    let stderr = String::from_utf8(out.stderr).unwrap();
    assert!(stderr.to_lowercase().contains("slots"), "{stderr}");
}

#[test]
fn a_secret_in_a_wrong_value_is_not_shown() {
    let ran = run(["serve", "--url", "http://user:hunter2@broker"]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.complaint().contains("amqp.url"), "{ran:?}");
    assert!(!ran.stderr.contains("hunter2"), "{ran:?}");
}
