//! One job from the command line: what it prints, and how its end becomes an exit code.

use std::io::Write;
use std::path::Path;
use std::process::Stdio;

use crate::support::{Ran, command, eventually, run_with_stdin};

fn exec(code: &str, flags: &[&str]) -> Ran {
    run_with_stdin(["exec", "-"].iter().chain(flags), code.as_bytes())
}

/// A program in a file, for those that want standard input for themselves.
fn file(code: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::Builder::new().suffix(".py").tempfile().unwrap();
    file.write_all(code.as_bytes()).unwrap();
    file
}

fn path(file: &tempfile::NamedTempFile) -> &str {
    file.path().to_str().unwrap()
}

#[test]
fn a_program_prints_and_succeeds() {
    let ran = exec("import sys; print('out'); print('err', file=sys.stderr)", &[]);
    assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr.as_str()), (0, "out\n", "err\n"));
}

#[test]
fn the_exit_code_is_the_jobs_own_and_nothing_is_added() {
    let ran = exec("raise SystemExit(42)", &[]);
    assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr.as_str()), (42, "", ""));
    // Chosen by the job, so they mean nothing.
    for code in [124, 125, 126, 137] {
        let ran = exec(&format!("raise SystemExit({code})"), &[]);
        assert_eq!((ran.code, ran.stderr.as_str()), (code, ""));
    }
}

#[test]
fn an_exception_names_the_programs_own_line() {
    let ran = exec("x = 1\nx / 0\n", &[]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.stderr.contains("line 2") && ran.stderr.contains("ZeroDivisionError"), "{ran:?}");
    assert!(!ran.stderr.contains("sandpiper:"), "{ran:?}");
}

#[test]
fn a_signal_is_128_and_its_number() {
    let ran = exec("import os, signal; os.kill(os.getpid(), signal.SIGABRT)", &[]);
    assert_eq!(ran.code, 128 + 6, "{ran:?}");
    assert!(ran.complaint().starts_with("signaled: ") && ran.stderr.contains("SIGABRT"), "{ran:?}");
}

#[test]
fn time_over_is_124() {
    let ran = exec("print('began', flush=True)\nwhile True: pass", &["--timeout-ms", "300"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (124, "began\n"), "{ran:?}");
    assert!(ran.complaint().starts_with("timeout: ") && ran.stderr.contains("300"), "{ran:?}");
}

#[test]
fn output_over_is_137() {
    let ran = exec("print('x' * 100)", &["--output-bytes", "10"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (137, "xxxxxxxxxx"), "{ran:?}");
    assert!(ran.complaint().starts_with("output_limit: "), "{ran:?}");
}

#[test]
fn a_forbidden_system_call_is_126() {
    let ran = exec("import ctypes; ctypes.CDLL(None).reboot(0)", &[]);
    assert_eq!(ran.code, 126, "{ran:?}");
    assert!(ran.complaint().starts_with("syscall_killed: "), "{ran:?}");
}

#[test]
fn a_refused_job_is_126_and_says_what_to_change() {
    let ran = exec("print(1)", &["--timeout-ms", "999999999"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (126, ""), "{ran:?}");
    assert!(ran.complaint().starts_with("rejected: ") && ran.stderr.contains("timeout_ms"), "{ran:?}");
    let ran = exec("print(1)", &["--enable-network"]);
    assert_eq!(ran.code, 126, "{ran:?}");
    assert!(ran.complaint().contains("enable_network"), "{ran:?}");
}

#[test]
fn the_result_is_one_document_and_the_exit_code_says_that_there_is_one() {
    let ran = exec("print(1)\nraise SystemExit(7)", &["--json", "--id", "job-7"]);
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{ran:?}");
    let result = ran.json();
    assert_eq!(result["status"], "failed");
    assert_eq!(result["exit_code"], 7);
    assert_eq!(result["stdout"], "1\n");
    assert_eq!(result["id"], "job-7");
    assert_eq!(result["version"], 1);
}

#[test]
fn arguments_environment_and_input_reach_the_job() {
    let code = "import os, sys; print(sys.argv[1:], os.environ['COLOUR'], sys.stdin.read())";
    let program = file(code);
    let args = ["exec", path(&program), "--env", "COLOUR=blue=ish", "one", "--", "--two"];
    let ran = run_with_stdin(args, b"typed");
    assert_eq!((ran.code, ran.stdout.as_str()), (0, "['one', '--two'] blue=ish typed\n"), "{ran:?}");
    let input = file("from a file");
    let ran = exec("import sys; print(sys.stdin.read())", &["--stdin", path(&input)]);
    assert_eq!((ran.code, ran.stdout.as_str()), (0, "from a file\n"), "{ran:?}");
}

#[test]
fn an_open_but_silent_pipe_does_not_hang_a_job() {
    let program = file("import sys; print(repr(sys.stdin.read()))");
    let mut child = command(["exec", path(&program)]).stdin(Stdio::piped()).spawn().unwrap();
    let silent = child.stdin.take();
    let out = child.wait_with_output().unwrap();
    drop(silent);
    assert_eq!(out.status.code(), Some(0));
    assert_eq!(String::from_utf8(out.stdout).unwrap(), "''\n");
    let stderr = String::from_utf8(out.stderr).unwrap();
    assert!(stderr.contains("--stdin -"), "says so: {stderr}");
}

#[test]
fn sigterm_ends_the_job_and_leaves_nothing() {
    let program = file("import time; time.sleep(60)");
    let mut child = command(["exec", path(&program), "--timeout-ms", "60000"]).spawn().unwrap();
    // Both signal handlers and the job are there once python is.
    eventually("the job's python runs", || {
        assert!(child.try_wait().unwrap().is_none(), "exec ended before its job ran");
        below(child.id()).iter().any(|process| is_python(*process))
    });
    let processes = below(child.id());
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    let out = child.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(124), "{out:?}");
    let stderr = String::from_utf8(out.stderr).unwrap();
    assert!(stderr.lines().last().is_some_and(|line| line.starts_with("sandpiper: cancelled: ")), "{stderr}");
    for process in processes {
        assert!(!Path::new(&format!("/proc/{process}")).exists(), "process {process} is left");
    }
}

fn is_python(process: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{process}/comm")).is_ok_and(|name| name.starts_with("python"))
}

/// All processes that `process` started, and theirs.
fn below(process: u32) -> Vec<u32> {
    let mut found = Vec::new();
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{process}/task")) else { return found };
    for task in tasks.flatten() {
        let children = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
        for child in children.split_whitespace().filter_map(|child| child.parse().ok()) {
            found.push(child);
            found.extend(below(child));
        }
    }
    found
}
