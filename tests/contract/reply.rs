//! The result as it goes out: each field, both encodings, and a size that always holds.

use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use proptest::prelude::*;
use sandpiper::job::{
    Admission, Artifact, BlockedSyscall, Captured, Context, Encoding, Outcome, Reply, Status, Usage,
    message_id, parse, schema,
};
use serde_json::{Value, json};

use crate::support::fixtures;

fn at(millis: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_millis(millis)
}

fn context() -> Context {
    Context {
        id: "j".into(),
        limits: None,
        attempt: 1,
        redelivered: false,
        worker: "w".into(),
        queued: None,
        metadata: None,
    }
}

fn outcome(stdout: &[u8], truncated: bool) -> Outcome {
    Outcome {
        status: Status::Succeeded,
        exit_code: Some(0),
        error: None,
        stdout: Captured { bytes: stdout.into(), truncated },
        ..Outcome::not_run(Status::Succeeded, "")
    }
}

fn reply(stdout: &[u8], truncated: bool) -> Reply {
    Reply::new(context(), outcome(stdout, truncated))
}

fn decoded(json: &[u8]) -> Reply {
    serde_json::from_slice(json).unwrap()
}

/// The example of the README: the job's result, field for field and in this order.
#[test]
fn the_example_is_what_the_worker_writes() {
    let job =
        parse(&std::fs::read(fixtures().join("example_job.json")).unwrap(), None, &Admission::default())
            .unwrap();
    let context = Context {
        id: job.id,
        limits: Some(job.limits),
        attempt: 1,
        redelivered: false,
        worker: "worker-1".into(),
        queued: Some(Duration::from_micros(3_900)),
        metadata: job.metadata,
    };
    let outcome = Outcome {
        status: Status::Succeeded,
        exit_code: Some(0),
        stdout: Captured { bytes: b"42\n".into(), truncated: false },
        usage: Some(Usage { wall_ms: 12, cpu_user_ms: 8, cpu_system_ms: 3, memory_peak_bytes: 9_437_184 }),
        error: None,
        start: Some(Duration::from_millis(18)),
        run: Some(Duration::from_millis(13)),
        started_at: Some(at(1_893_456_000_007)),
        finished_at: at(1_893_456_000_020),
        ..Outcome::not_run(Status::Succeeded, "")
    };
    let json = Reply::new(context, outcome).encode(16 << 20);
    let pretty = serde_json::to_string_pretty(&decoded(&json)).unwrap() + "\n";
    let golden = fixtures().join("example_result.json");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&golden, &pretty).unwrap();
    }
    assert_eq!(pretty, std::fs::read_to_string(&golden).unwrap());
}

#[test]
fn what_does_not_apply_is_null() {
    let json = Reply::new(context(), Outcome::not_run(Status::Rejected, "`id` is bad")).encode(16 << 20);
    let value: Value = serde_json::from_slice(&json).unwrap();
    for field in ["exit_code", "signal", "syscall", "limits", "usage", "started_at", "metadata"] {
        assert_eq!(value.get(field), Some(&Value::Null), "{field}");
    }
    assert_eq!(value["timing"], json!({"queued_ms": null, "start_ms": null, "run_ms": null}));
    assert_eq!((&value["status"], &value["error"]), (&json!("rejected"), &json!("`id` is bad")));
    assert_eq!(
        (&value["stdout"], &value["artifacts"], &value["version"]),
        (&json!(""), &json!([]), &json!(1))
    );
    jsonschema::draft202012::validate(&schema::result(), &value).unwrap();
}

#[test]
fn everything_that_is_known_is_written() {
    let outcome = Outcome {
        status: Status::SyscallKilled,
        exit_code: None,
        signal: Some("SIGSYS".into()),
        syscall: Some("ptrace".into()),
        artifacts: vec![Artifact { path: "a.bin".into(), content: vec![0, 255] }],
        blocked_syscalls: vec![BlockedSyscall { syscall: "socket".into(), count: 3 }],
        finished_at: at(1_500),
        ..outcome(b"", false)
    };
    let value: Value = serde_json::from_slice(
        &Reply::new(Context { attempt: 3, redelivered: true, ..context() }, outcome).encode(1 << 20),
    )
    .unwrap();
    assert_eq!(value["artifacts"], json!([{"path": "a.bin", "base64": "AP8=", "bytes": 2}]));
    assert_eq!(value["blocked_syscalls"], json!([{"syscall": "socket", "count": 3}]));
    assert_eq!((&value["signal"], &value["syscall"]), (&json!("SIGSYS"), &json!("ptrace")));
    assert_eq!((&value["attempt"], &value["redelivered"]), (&json!(3), &json!(true)));
    assert_eq!(value["finished_at"], json!("1970-01-01T00:00:01.500Z"));
    jsonschema::draft202012::validate(&schema::result(), &value).unwrap();
}

#[test]
fn a_cut_through_a_character_is_not_binary() {
    let cut = reply("ab😀".as_bytes().split_last().unwrap().1, true);
    assert_eq!(
        (cut.stdout.as_str(), cut.stdout_encoding, cut.stdout_truncated),
        ("ab", Encoding::Utf8, true)
    );
    // The same bytes in full were written so by the job.
    let whole = reply("ab😀".as_bytes().split_last().unwrap().1, false);
    assert_eq!((whole.stdout_encoding, whole.stdout_truncated), (Encoding::Base64, false));
    let invalid = reply(b"a\xffb\xf0\x9f", true);
    assert_eq!(invalid.stdout_encoding, Encoding::Base64);
    assert!(b"a\xffb\xf0\x9f".starts_with(&STANDARD.decode(&invalid.stdout).unwrap()));
}

#[test]
fn control_characters_count_as_they_are_encoded() {
    let mut outcome = outcome(&vec![0; 8 << 20], false);
    outcome.stderr = Captured { bytes: b"short".into(), truncated: false };
    let json = Reply::new(context(), outcome).encode(16 << 20);
    assert!(json.len() <= 16 << 20 && json.len() > (16 << 20) - 16, "{}", json.len());
    let reply = decoded(&json);
    assert!(reply.stdout_truncated && !reply.stderr_truncated);
    assert_eq!(reply.stderr, "short");
}

#[test]
fn the_largest_artifacts_give_way_first_and_it_is_said() {
    let file = |path: &str, bytes: usize| Artifact { path: path.into(), content: vec![b'x'; bytes] };
    let mut outcome = outcome(b"kept", false);
    outcome.artifacts = vec![file("small", 100), file("large", 60_000), file("middle", 9_000)];
    let json = Reply::new(context(), outcome).encode(20_000);
    assert!(json.len() <= 20_000);
    let reply = decoded(&json);
    let paths: Vec<&str> = reply.artifacts.iter().map(|artifact| artifact.path.as_str()).collect();
    assert_eq!((paths, reply.stdout.as_str()), (vec!["small", "middle"], "kept"));
    let note = "1 of 3 artifacts were left out, as the result may have at most 20000 bytes";
    assert_eq!(reply.error.as_deref(), Some(note));
}

#[test]
fn a_duplicate_has_the_same_message_id() {
    // Held, because results of another version of the worker must be recognised as duplicates too.
    let asked = [Some("c-1"), Some("replies"), None];
    assert_eq!(message_id("job-1", asked).to_string(), "38e1d579-380d-51a0-8506-9944c5aa3267");
    for other in [
        message_id("job-2", asked),
        message_id("job-1", [None; 3]),
        message_id("job-1", [Some("c-2"), Some("replies"), None]),
        message_id("job-1", [Some("c-1"), Some("other"), None]),
        message_id("job-1", [Some("c-1"), Some("replies"), Some("mallory")]),
        message_id("job-1", [Some("c-1replies"), Some(""), None]),
        message_id("job-1", [Some("c-1"), Some("replies"), Some("")]),
    ] {
        assert_ne!(message_id("job-1", asked), other);
    }
}

proptest! {
    #[test]
    fn a_result_fits_and_keeps_fronts(
        stdout in prop::collection::vec(any::<u8>(), 0..6_000),
        stderr in "\\PC{0,900}[\\x00-\\x1f\"\\\\]{0,900}",
        sizes in prop::collection::vec(0usize..4_000, 0..4),
        max in 1_800usize..12_000,
    ) {
        let mut outcome = outcome(&stdout, false);
        outcome.stderr.bytes = stderr.clone().into_bytes();
        outcome.artifacts = sizes.iter().map(|&size| Artifact { path: format!("f{size}"), content: vec![1; size] }).collect();
        let full = Reply::new(context(), outcome);
        let json = full.clone().encode(max);
        prop_assert!(json.len() <= max, "{} > {}", json.len(), max);
        let reply = decoded(&json);
        prop_assert!(stderr.starts_with(&reply.stderr));
        prop_assert_eq!(reply.stderr_truncated, reply.stderr != stderr);
        let bytes = match reply.stdout_encoding {
            Encoding::Utf8 => reply.stdout.clone().into_bytes(),
            Encoding::Base64 => STANDARD.decode(&reply.stdout).unwrap(),
        };
        prop_assert!(stdout.starts_with(&bytes));
        prop_assert_eq!(reply.stdout_truncated, bytes != stdout);
        prop_assert_eq!(reply.error.is_some(), reply.artifacts.len() < sizes.len());
        if full.clone().encode(usize::MAX).len() <= max {
            prop_assert_eq!(reply, full);
        }
    }
}
