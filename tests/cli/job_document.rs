//! `exec --job`: whole jobs, good and bad, go through the same checks as those from the queue.

use crate::support::{run, run_with_stdin};

#[test]
fn a_document_comes_inline_from_a_file_or_from_standard_input() {
    let job = r#"{"code": "print('hi')", "id": "a"}"#;
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), job).unwrap();
    for ran in [
        run(["exec", "--job", job]),
        run(["exec", "--job", file.path().to_str().unwrap()]),
        run_with_stdin(["exec", "--job", "-"], job.as_bytes()),
    ] {
        assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr.as_str()), (0, "hi\n", ""));
    }
}

#[test]
fn what_is_not_acceptable_is_a_rejected_result() {
    for (job, names) in [
        ("{}", "code"),
        (r#"{"code": 1}"#, "code"),
        (r#"{"code": "print(1)", "tiemout_ms": 5}"#, "timeout_ms"),
        (r#"{"code": "print(1)", "preload": "import os"}"#, "preload"),
        (r#"{"code": "print(1)", "id": "no spaces"}"#, "id"),
        (r#"{"code": "print(1)", "limits": {"memory_bytes": 99999999999999}}"#, "memory_bytes"),
        (r#"{"code": "print(1)""#, ""),
        ("[]", ""),
        ("", ""),
        ("not json", ""),
    ] {
        let ran = run_with_stdin(["exec", "--job", "-", "--json"], job.as_bytes());
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{job}: {ran:?}");
        let result = ran.json();
        assert_eq!(result["status"], "rejected", "{job}: {result}");
        let error = result["error"].as_str().unwrap();
        assert!(error.contains(names), "{job}: {error}");
        let plain = run_with_stdin(["exec", "--job", "-"], job.as_bytes());
        assert_eq!((plain.code, plain.complaint()), (126, format!("rejected: {error}").as_str()), "{job}");
    }
}

#[test]
fn bytes_that_are_no_text_are_rejected() {
    let ran = run_with_stdin(["exec", "--job", "-", "--json"], b"{\"code\": \"\xff\"}");
    assert_eq!(ran.code, 0, "{ran:?}");
    assert_eq!(ran.json()["status"], "rejected");
    let ran = run_with_stdin(["exec", "-", "--json"], b"print('\xff')");
    assert_eq!(ran.code, 0, "{ran:?}");
    assert_eq!(ran.json()["status"], "rejected");
    assert!(ran.json()["error"].as_str().unwrap().contains("UTF-8"), "{ran:?}");
}

#[test]
fn the_operators_configuration_decides_what_is_acceptable() {
    let job = r#"{"code": "print(1)", "timeout_ms": 2000}"#;
    let ran = run([
        "exec",
        "--job",
        job,
        "--set",
        "limits.timeout_ms.maximum=1000",
        "--set",
        "limits.timeout_ms.default=500",
    ]);
    assert_eq!(ran.code, 126, "{ran:?}");
    assert!(ran.complaint().contains("1000"), "{ran:?}");
}

#[test]
fn a_job_that_cannot_be_read_is_our_failure_and_names_the_file() {
    let ran = run(["exec", "--job", "/no/such/job.json", "--json"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (125, ""), "{ran:?}");
    assert!(ran.complaint().contains("/no/such/job.json"), "{ran:?}");
    let ran = run(["exec", "/no/such/program.py"]);
    assert_eq!(ran.code, 125, "{ran:?}");
    assert!(ran.complaint().contains("/no/such/program.py"), "{ran:?}");
}

#[test]
fn a_document_and_flags_for_the_job_do_not_mix() {
    for flags in [&["job.py"][..], &["--timeout-ms", "5"], &["--env", "A=b"]] {
        let ran = run(["exec", "--job", "{}"].iter().chain(flags));
        assert_eq!(ran.code, 125, "{ran:?}");
        assert!(ran.stderr.contains("cannot be used with"), "{ran:?}");
    }
}

/// A job that asks for little is never our own failure: it runs with that, or is refused.
#[test]
fn the_least_of_each_limit_runs_and_less_is_rejected() {
    for (limit, least) in [
        ("cpu_ms", 1),
        ("memory_bytes", 16 << 20),
        ("output_bytes", 1),
        ("processes", 1),
        ("open_files", 16),
        ("disk_bytes", 1),
    ] {
        let job = |value: u64| format!(r#"{{"code": "print(1)", "limits": {{"{limit}": {value}}}}}"#);
        for warm in [&[][..], &["--warm"]] {
            let ran = run([&["exec", "--json", "--job", &job(least)][..], warm].concat());
            let result = ran.json();
            let status = result["status"].as_str().unwrap();
            assert!(!["worker_error", "rejected"].contains(&status), "{limit} {warm:?}: {result}");
        }
        let result = run(["exec", "--json", "--job", &job(least - 1)]).json();
        assert_eq!(result["status"], "rejected", "{limit}: {result}");
        let told = format!("`limits.{limit}` is {}; it must be from {least} to ", least - 1);
        assert!(result["error"].as_str().unwrap().starts_with(&told), "{result}");
    }
}

#[test]
fn metadata_comes_back_as_it_is_written() {
    let metadata = r#"{ "z": 340282366920938463463374607431768211456, "a": [-0, 1.50, "\u00e9"], "a": {} }"#;
    for code in ["print(1)", "1/0"] {
        let job = format!("{{\"code\": \"{code}\", \"metadata\":\n{metadata}}}");
        let ran = run(["exec", "--json", "--job", &job]);
        assert!(ran.stdout.ends_with(&format!("\"metadata\":{metadata}}}\n")), "{ran:?}");
    }
    let lines = run(["exec", "--json", "--job", "{\"code\": \"\", \"metadata\": {\n\"a\":\r\n1}}"]);
    assert!(lines.stdout.ends_with("\"metadata\":{ \"a\":  1}}\n"), "{lines:?}");
}
