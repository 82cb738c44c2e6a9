//! Control groups come and go with the worker that made them. Skipped where it can make none.
#![expect(clippy::print_stderr, reason = "a skip is said aloud")]

use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::{command, eventually, run};

#[test]
fn jobs_in_parallel_leave_none() {
    if skipped() {
        return;
    }
    let bench = command(["bench", "--local", "-n", "40", "--concurrency", "20"]).spawn().unwrap();
    let pid = bench.id();
    eventually("there is one for each job", || slots(pid).len() >= 20);
    let ended = bench.wait_with_output().unwrap();
    assert!(ended.status.success(), "{ended:?}");
    assert_eq!(homes(pid), Vec::<PathBuf>::new());
}

#[test]
fn a_worker_that_is_told_to_stop_leaves_none() {
    if skipped() {
        return;
    }
    let exec = sleeper();
    kill(pid_of(&exec), Signal::SIGTERM).unwrap();
    let pid = exec.id();
    let ended = exec.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(124), "{ended:?}");
    assert_eq!(homes(pid), Vec::<PathBuf>::new());
}

#[test]
fn the_next_worker_removes_what_a_killed_one_left() {
    if skipped() {
        return;
    }
    let mut exec = sleeper();
    let pid = exec.id();
    exec.kill().unwrap();
    exec.wait().unwrap();
    eventually("its job is dead too", || slots(pid).iter().all(|slot| processes(slot).is_empty()));
    let next = run(["exec", "--job", r#"{"code": "print(1)"}"#]);
    assert_eq!(next.code, 0, "{next:?}");
    assert_eq!(homes(pid), Vec::<PathBuf>::new());
}

#[test]
fn a_job_that_dies_for_others_is_not_blamed() {
    if skipped() {
        return;
    }
    let grow = "import time\nprint('waits', flush=True)\ntime.sleep(3)\nheld = bytearray(150 << 20)\nprint('has it')";
    let job = serde_json::json!({ "code": grow, "limits": { "memory_bytes": 256_u32 << 20 } }).to_string();
    let exec =
        command(["exec", "--json", "--job", &job]).stdout(std::process::Stdio::piped()).spawn().unwrap();
    let pid = exec.id();
    eventually("a process is in its group", || slots(pid).iter().any(|slot| !processes(slot).is_empty()));
    // What all of the worker's jobs may have together, as where a container is full.
    let (file, home) = ["memory.limit_in_bytes", "memory.max"]
        .into_iter()
        .find_map(|file| Some((file, homes(pid).into_iter().find(|home| home.join(file).exists())?)))
        .unwrap();
    std::fs::write(home.join(file), (80 << 20).to_string()).unwrap();
    let ended = exec.wait_with_output().unwrap();
    let result: serde_json::Value = serde_json::from_slice(&ended.stdout).unwrap();
    assert_eq!(result["status"], "worker_error", "{result}");
    assert!(result["error"].as_str().unwrap().contains("within its own 268435456 bytes"), "{result}");
}

/// A worker whose job is running and will not end by itself.
fn sleeper() -> std::process::Child {
    let job = r#"{"code": "import time; time.sleep(60)", "timeout_ms": 60000}"#;
    let exec = command(["exec", "--job", job]).spawn().unwrap();
    let pid = exec.id();
    eventually("a process is in its group", || slots(pid).iter().any(|slot| !processes(slot).is_empty()));
    exec
}

fn skipped() -> bool {
    let findings = run(["doctor", "--json"]).json();
    let cgroups = findings["checks"].as_array().unwrap().iter().find(|check| check["name"] == "cgroups");
    let there = cgroups.unwrap()["ok"] == true;
    if !there {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "SKIPPED: there are no cgroups here");
        eprintln!("SKIPPED: there are no cgroups here");
    }
    !there
}

fn pid_of(child: &std::process::Child) -> Pid {
    Pid::from_raw(child.id().try_into().unwrap())
}

/// What a worker has made, in every hierarchy.
fn homes(worker: u32) -> Vec<PathBuf> {
    let mut found = Vec::new();
    find(Path::new("/sys/fs/cgroup"), &format!("sandpiper-{worker}-"), &mut found);
    found
}

fn slots(worker: u32) -> Vec<PathBuf> {
    homes(worker).iter().flat_map(|home| directories(home)).collect()
}

fn processes(group: &Path) -> String {
    // It may be gone by now.
    std::fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default()
}

fn find(directory: &Path, prefix: &str, found: &mut Vec<PathBuf>) {
    for path in directories(directory) {
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)) {
            found.push(path);
        } else {
            find(&path, prefix, found);
        }
    }
}

fn directories(path: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|e| e.path()).collect()
}
