//! One job from the command line: what it prints, and how its end becomes an exit code.

use std::io::Write;
use std::path::Path;
use std::process::Stdio;

use crate::support::{Ran, command, eventually, run, run_with_stdin};

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
fn a_traced_program_is_let_through_and_what_it_needs_is_told() {
    let code = "import ctypes, subprocess, sys
print(ctypes.CDLL(None).reboot(0))
print(subprocess.run([sys.executable, '-c', 'print(7)'], capture_output=True, text=True).stdout)";
    let ran = exec(code, &["--trace-syscalls"]);
    // The kernel refuses what the filter did not.
    assert_eq!((ran.code, ran.stdout.as_str()), (0, "-1\n7\n\n"), "{ran:?}");
    assert!(ran.stderr.starts_with("sandpiper: --trace-syscalls: THE INNER WALL IS OFF"), "{ran:?}");
    let line = |call: &str| ran.stderr.lines().find(|line| line.trim_start().starts_with(call)).unwrap();
    assert!(line("reboot").contains("kill") && line("reboot").contains("it stops the host"), "{ran:?}");
    assert!(line("execve").contains("environments.default.allow_exec = true"), "{ran:?}");

    let ran = exec(code, &["--trace-syscalls", "--json"]);
    let document = ran.json();
    assert_eq!(document["result"]["status"], "succeeded", "{ran:?}");
    assert_eq!(document["result"]["blocked_syscalls"], serde_json::json!([]), "{ran:?}");
    let calls = document["outside_policy"].as_array().unwrap();
    let reboot = calls.iter().find(|call| call["syscall"] == "reboot").unwrap();
    assert_eq!(reboot["class"], "kill");
    assert_eq!((&reboot["count"], &reboot["allow"]), (&1.into(), &serde_json::Value::Null), "{reboot}");
}

#[test]
fn the_line_that_a_trace_names_allows_the_call() {
    let code = "import ctypes; print(ctypes.CDLL(None).adjtimex(bytes(400)) >= 0)";
    let ran = exec(code, &["--trace-syscalls", "--json"]);
    let allow = ran.json()["outside_policy"][0]["allow"].as_str().unwrap().replace(" = ", "=");
    assert_eq!(exec(code, &[]).stdout, "False\n");
    let ran = exec(code, &["--set", &allow]);
    assert_eq!((ran.code, ran.stdout.as_str()), (0, "True\n"), "{ran:?}");
}

#[test]
fn nothing_but_a_flag_of_exec_traces() {
    let ran = run(["serve", "--trace-syscalls"]);
    assert_eq!(ran.code, 2, "{ran:?}");
    let ran = run(["bench", "--local", "--trace-syscalls"]);
    assert_eq!(ran.code, 2, "{ran:?}");
    let ran = exec("print(1)", &["--trace-syscalls", "--warm"]);
    assert_eq!(ran.code, 125, "{ran:?}");
    for key in ["sandbox.trace_syscalls=true", "sandbox.trace=true"] {
        let ran = exec("print(1)", &["--set", key]);
        assert!(ran.code == 125 && ran.complaint().contains("unknown"), "{ran:?}");
    }
    let ran = run(["exec", "--job", r#"{"code": "print(1)", "trace_syscalls": true}"#]);
    assert!(ran.code == 126 && ran.complaint().contains("trace_syscalls"), "{ran:?}");
}

#[test]
#[expect(clippy::print_stderr, reason = "a skip is said aloud")]
fn a_worker_that_shares_its_uids_with_another_is_told() {
    use std::os::linux::net::SocketAddrExt as _;
    if !nix::unistd::geteuid().is_root() {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "SKIPPED: not root: jobs have our own uid");
        eprintln!("SKIPPED: not root: jobs have our own uid");
        return;
    }
    let flags = ["--verbose", "--set", "sandbox.uid_base=2400000"];
    let ran = exec("print(1)", &flags);
    assert!(ran.code == 0 && !ran.stderr.contains("same uids"), "{ran:?}");
    let name = std::os::unix::net::SocketAddr::from_abstract_name("sandpiper-uid-2400001").unwrap();
    let _other = std::os::unix::net::UnixDatagram::bind_addr(&name).unwrap();
    let ran = exec("print(1)", &flags);
    assert!(ran.code == 0 && ran.stderr.contains("same uids"), "{ran:?}");
}

#[test]
fn an_interpreter_that_jobs_would_not_see_is_refused() {
    let place = tempfile::tempdir_in("/tmp").unwrap();
    let python = place.path().join("python3");
    std::os::unix::fs::symlink("/usr/bin/python3", &python).unwrap();
    let ran = exec("print(1)", &["--set", &format!("environments.default.python={}", python.display())]);
    assert_eq!(ran.code, 125, "{ran:?}");
    let complaint = ran.complaint();
    assert!(complaint.contains("environment default") && complaint.contains("/tmp"), "{ran:?}");
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
fn what_is_logged_of_a_job_that_did_not_start_names_it() {
    let ran = exec("print(1)", &["--id", "job-8", "--set", "sandbox.start_timeout_ms=1"]);
    assert_eq!(ran.code, 125, "{ran:?}");
    let mut events = ran.stderr.lines().filter(|line| line.contains("a job could not be started"));
    assert!(events.next().is_some_and(|event| event.contains("id=\"job-8\"")), "{ran:?}");
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
