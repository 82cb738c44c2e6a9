//! Control groups come and go with the worker that made them. Skipped where it can make none.
//!
//! A worker needs a group of version 2 to itself, and a test is not alone in its session's: as root each worker is
//! started in a new group below the root of the hierarchy.
#![expect(clippy::print_stderr, reason = "a skip is said aloud")]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::{Ran, command, eventually, finish};

#[test]
fn jobs_in_parallel_leave_none() {
    if skipped() {
        return;
    }
    let place = Place::new();
    let bench = place.command(["bench", "--local", "-n", "40", "--concurrency", "20"]).spawn().unwrap();
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
    let place = Place::new();
    let exec = sleeper(&place);
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
    let place = Place::new();
    let mut exec = sleeper(&place);
    let pid = exec.id();
    exec.kill().unwrap();
    exec.wait().unwrap();
    eventually("its job is dead too", || slots(pid).iter().all(|slot| processes(slot).is_empty()));
    let next = place.renewed().run(["exec", "--job", r#"{"code": "print(1)"}"#]);
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
    let place = Place::new();
    let exec = place.command(["exec", "--json", "--job", &job]).spawn().unwrap();
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

/// Where a worker is started.
struct Place(Option<PathBuf>);

impl Place {
    fn new() -> Self {
        let root = Path::new("/sys/fs/cgroup");
        let offered = std::fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
        if !nix::unistd::geteuid().is_root() || !offered.split_whitespace().any(|name| name == "memory") {
            return Self(None);
        }
        let group = root.join(format!("test-sandpiper-{}", std::process::id()));
        // Tests of one process may share it where they run one after the other, as with nextest.
        drop(std::fs::create_dir(&group));
        Self(Some(group))
    }

    /// As systemd does it before it starts a service again: what is left there is empty, and removed.
    fn renewed(self) -> Self {
        if let Some(group) = &self.0 {
            remove(group);
        }
        drop(self);
        Self::new()
    }

    fn command<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Command {
        let worker = command(args);
        let Some(group) = &self.0 else { return worker };
        let mut shell = Command::new("sh");
        shell.args(["-c", "echo 0 > \"$0/cgroup.procs\" && exec \"$@\""]).arg(group);
        shell.arg(worker.get_program()).args(worker.get_args());
        shell.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        shell
    }

    fn run<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Ran {
        finish(self.command(args), b"")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(group) = &self.0 {
            drop(std::fs::remove_dir(group));
        }
    }
}

fn remove(group: &Path) {
    directories(group).iter().for_each(|below| remove(below));
    std::fs::remove_dir(group).unwrap();
}

/// A worker whose job is running and will not end by itself.
fn sleeper(place: &Place) -> std::process::Child {
    let job = r#"{"code": "import time; time.sleep(60)", "timeout_ms": 60000}"#;
    let exec = place.command(["exec", "--job", job]).spawn().unwrap();
    let pid = exec.id();
    eventually("a process is in its group", || slots(pid).iter().any(|slot| !processes(slot).is_empty()));
    exec
}

fn skipped() -> bool {
    let findings = Place::new().run(["doctor", "--json"]).json();
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
