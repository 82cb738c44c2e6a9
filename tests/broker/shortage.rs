//! What may run out in the worker itself. Its jobs are given back, or end as `worker_error` with a sentence that
//! names the remedy; it stays alive, and goes on by itself when there is enough again.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use lapin::{BasicProperties, Consumer};
use serde_json::{Value, json};

use crate::broker::Node;
use crate::proxy::Proxy;
use crate::requester::{Requester, next};
use crate::worker::{Surroundings, Worker};
use crate::{PATIENCE, Queues, eventually, skip};

const RECONNECTS: &str = "sandpiper_connection_reconnects_total{role=\"consume\"}";

/// Enough of them that not all can be had by what stood ready before.
const JOBS: usize = 6;

/// Jobs that take all that the sandbox has: descriptors, processes, threads of the worker's for files.
async fn publish(requester: &Requester, queues: &Queues, name: &str, code: &str, count: usize) {
    for at in 0..count {
        let job = json!({
            "id": format!("{name}-{at}"), "code": code, "timeout_ms": 30_000,
            "files": [{"path": "in", "content": "x"}], "artifacts": ["in"],
        });
        let properties = BasicProperties::default().with_reply_to(queues.replies.as_str().into());
        requester.publish(&queues.jobs, job.to_string().as_bytes(), properties).await;
    }
}

async fn results(replies: &mut Consumer, count: usize) -> Vec<Value> {
    let mut results = Vec::new();
    for _ in 0..count {
        results.push(next(replies).await.1);
    }
    results
}

/// Each has succeeded or is our own failure, some are, and those say what can be done.
fn assert_ours(results: &[Value], remedy: &str) {
    let mut ours = 0;
    for result in results {
        match result["status"].as_str().unwrap() {
            "succeeded" => {}
            "worker_error" => {
                ours += 1;
                assert!(
                    result["error"].as_str().unwrap().contains(remedy),
                    "no remedy in {}",
                    result["error"]
                );
                assert_eq!(result["started_at"], Value::Null, "{result}");
                assert_eq!(result["attempt"], 3, "not tried again: {result}");
            }
            _ => panic!("{result}"),
        }
    }
    assert!(ours > 0, "there was enough of everything");
}

/// There is enough again.
async fn recovers(worker: &mut Worker, requester: &Requester, queues: &Queues, replies: &mut Consumer) {
    publish(requester, queues, "after", "print(1)", JOBS).await;
    let mut answered = 0;
    while answered < JOBS {
        let (_, result) = next(replies).await;
        // One of before may come again, whose ack was lost with its connection.
        answered += usize::from(result["id"].as_str().unwrap().starts_with("after"));
        assert_eq!(result["status"], "succeeded", "{result}");
        assert_eq!(result["artifacts"].as_array().unwrap().len(), 1, "{result}");
    }
    worker.until_warm().await;
    worker.until_ready().await;
    worker.assert_alive();
    assert!(!worker.log().contains("panicked"), "{}", worker.log());
    worker.terminate();
    assert_eq!(worker.ended().await.code(), Some(0), "{}", worker.log());
}

/// Only the limit that counts: the worker may raise it again up to the other one, and does at its start.
fn allow_descriptors(worker: &Worker, most: u32) {
    let limit = format!("--nofile={most}:");
    let status = Command::new("prlimit").args(["--pid", &worker.pid().to_string(), &limit]).status();
    assert!(status.unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_descriptors_are_left() {
    let node = &Node::shared();
    let queues = Queues::of("descriptors");
    let proxy = Proxy::start(node.url()).await;
    let mut worker = Worker::ready(&proxy.url(), &queues.settings(&["worker.slots=2"])).await;
    worker.until_warm().await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    let reconnects = worker.metric(RECONNECTS);
    // All numbers below that are taken: not one can be had.
    allow_descriptors(&worker, 10);
    publish(&requester, &queues, "job", "print(1)", JOBS).await;
    assert_ours(&results(&mut replies, JOBS).await, "LimitNOFILE");
    // Nor is there one for a connection.
    let said = worker.log().len();
    proxy.reset();
    eventually("it has tried to connect", async || {
        worker.log()[said..]
            .lines()
            .any(|line| line.contains("trying again") && line.contains("os error 24"))
            .then_some(())
    })
    .await;
    allow_descriptors(&worker, 4_096);
    worker.until_ready().await;
    assert!(worker.metric(RECONNECTS) > reconnects);
    recovers(&mut worker, &requester, &queues, &mut replies).await;
}

/// A control group around a worker and all that it starts.
struct Group {
    directory: PathBuf,
    version: u8,
}

impl Group {
    /// None where this machine gives us none.
    fn make(controller: &str) -> Option<Self> {
        let own = std::fs::read_to_string("/proc/self/cgroup").unwrap();
        let one = own.lines().find_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            controllers.split(',').any(|name| name == controller).then(|| path.trim_start_matches('/'))
        });
        let (base, version) = match one {
            Some(path) => (Path::new("/sys/fs/cgroup").join(controller).join(path), 1),
            // Where processes are no group can be divided, but for the first one.
            None => (PathBuf::from("/sys/fs/cgroup"), 2),
        };
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let directory = base.join(format!("sp-test-{}-{number}", std::process::id()));
        std::fs::create_dir(&directory).ok()?;
        let group = Self { directory, version };
        group.directory.join("cgroup.procs").exists().then_some(group)
    }

    fn surroundings(&self) -> Surroundings {
        let enter = format!("echo $$ >{}/cgroup.procs && exec \"$@\"", self.directory.display());
        let through = ["sh", "-c", &enter, "sh"].map(str::to_owned).to_vec();
        Surroundings { through, ..Surroundings::default() }
    }

    fn has(&self, file: &str) -> u64 {
        std::fs::read_to_string(self.directory.join(file)).unwrap().trim().parse().unwrap()
    }

    fn set(&self, file: &str, value: impl ToString) {
        std::fs::write(self.directory.join(file), value.to_string()).unwrap();
    }
}

impl Drop for Group {
    #[expect(clippy::disallowed_methods, reason = "a drop cannot wait in any other way")]
    fn drop(&mut self) {
        // Of a worker that was killed its own groups are left in it; processes of theirs may still be dying.
        let begin = std::time::Instant::now();
        while std::fs::remove_dir(&self.directory).is_err() && begin.elapsed() < PATIENCE {
            remove_below(&self.directory);
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn remove_below(directory: &Path) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_below(&entry.path());
            drop(std::fs::remove_dir(entry.path()));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_processes_are_left() {
    let node = &Node::shared();
    let Some(group) = Group::make("pids") else { return skip("no control group of pids can be made here") };
    let queues = Queues::of("processes");
    let proxy = Proxy::start(node.url()).await;
    let settings = queues.settings(&["worker.slots=2"]);
    let mut worker = Worker::ready_in(&proxy.url(), &settings, &group.surroundings()).await;
    worker.until_warm().await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    // Neither a process nor a thread more than there are; and none of those that end is replaced.
    group.set("pids.max", 1);
    publish(&requester, &queues, "job", "print(1)", JOBS).await;
    assert_ours(&results(&mut replies, JOBS).await, "TasksMax");
    // A connection takes a thread.
    let reconnects = worker.metric(RECONNECTS);
    proxy.reset();
    eventually("it has tried to connect", async || {
        (worker.metric(RECONNECTS) > reconnects + 1.0).then_some(())
    })
    .await;
    worker.assert_alive();
    group.set("pids.max", "max");
    worker.until_ready().await;
    recovers(&mut worker, &requester, &queues, &mut replies).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_memory_is_left() {
    let node = &Node::shared();
    const ROOM: u64 = 48 << 20;
    let Some(group) = Group::make("memory") else {
        return skip("no control group of memory can be made here");
    };
    let (has, most) = match group.version {
        1 => ("memory.usage_in_bytes", "memory.limit_in_bytes"),
        _ => ("memory.current", "memory.max"),
    };
    let queues = Queues::of("memory-of-the-worker");
    let settings = queues.settings(&["worker.slots=2"]);
    let mut worker = Worker::ready_in(node.url(), &settings, &group.surroundings()).await;
    worker.until_warm().await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    group.set(most, group.has(has) + ROOM);
    // Less than a job may have, and more than is left for all of them.
    publish(&requester, &queues, "job", "x = bytearray(150 << 20); print(1)", 2).await;
    for result in results(&mut replies, 2).await {
        // It was the job that had to go, and not the worker; and it is not told of a limit that it kept.
        assert_eq!(result["status"], "worker_error", "{result}");
        assert!(result["error"].as_str().unwrap().contains("within its own"), "{result}");
    }
    worker.assert_alive();
    group.set(most, 1_u64 << 40);
    recovers(&mut worker, &requester, &queues, &mut replies).await;
}

/// A small file system of its own.
struct Disk(tempfile::TempDir);

impl Disk {
    fn mount() -> Option<Self> {
        let place = tempfile::tempdir().unwrap();
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=256k", "sp-test"])
            .arg(place.path())
            .status();
        mount.is_ok_and(|status| status.success()).then_some(Self(place))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("--lazy").arg(self.0.path()).status());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_disk_of_the_log_is_full() {
    let node = &Node::shared();
    let Some(disk) = Disk::mount() else { return skip("no file system can be mounted here") };
    let queues = Queues::of("disk");
    let surroundings = Surroundings { disk: Some(disk.0.path().into()), ..Surroundings::default() };
    let mut worker = Worker::ready_in(node.url(), &queues.settings(&["worker.slots=2"]), &surroundings).await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    let filler = disk.0.path().join("filler");
    assert!(std::fs::write(&filler, vec![0; 1 << 20]).is_err(), "it is not full");
    let said = worker.log().len();
    // Nothing of a job goes there, and an event that cannot be written down ends nobody.
    publish(&requester, &queues, "job", "print(1)", JOBS).await;
    for result in results(&mut replies, JOBS).await {
        assert_eq!(result["status"], "succeeded", "{result}");
    }
    assert!(worker.log().len() - said < 8 << 10, "there was room for the log");
    std::fs::remove_file(filler).unwrap();
    recovers(&mut worker, &requester, &queues, &mut replies).await;
    assert!(worker.log().contains("after-0"), "it does not log any more");
}
