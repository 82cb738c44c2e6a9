//! What must be true after every fault, whatever it was:
//!
//! - every job has a result (I1),
//! - a second one only where the fault may have cost an ack (I2), with the same message id (I3);
//! - nothing of a job is left on the machine (I4);
//! - nothing waits, nothing is unsettled, and the workers consume (I5);
//! - what workers say of themselves is true (I6).

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use lapin::Consumer;

use crate::broker::Node;
use crate::requester::{collect, rest};
use crate::worker::Worker;
use crate::{Queues, eventually};

/// A process, told apart from a later one of the same number.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    started: String,
}

/// Waits until all of it holds but I4, which is asked where a worker ended. `doubled` may have come more than once.
pub(crate) async fn holds(
    node: &Node,
    workers: &mut [&mut Worker],
    queues: &Queues,
    replies: &mut Consumer,
    ids: &[String],
    doubled: &HashSet<String>,
) {
    let mut seen = collect(replies, ids).await;
    for worker in workers.iter_mut() {
        worker.until_ready().await;
        worker.assert_alive();
        // Not only once: a connection that a fault has marked may still fall after the fault is over.
        eventually("it is connected, and says so", async || {
            let says = |what, role| worker.metric(&format!("sandpiper_connection_{what}{{role=\"{role}\"}}"));
            let well = |role| says("up", role) == 1.0 && says("blocked", role) == 0.0;
            (worker.get("/readyz").0 && well("consume") && well("publish")).then_some(())
        })
        .await;
    }
    // The broker's own word for it. Results may still come while this is waited for.
    let expected = format!("{} 0 0 {}", queues.jobs, workers.len());
    eventually(&format!("the broker says {expected:?}"), async || {
        let columns = ["name", "messages_ready", "messages_unacknowledged", "consumers"];
        let table = node.list_queues(&columns);
        let mut lines = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
        lines.any(|line| line == expected).then_some(())
    })
    .await;
    // A job whose delivery was lost with its channel is not cut off for that.
    for worker in workers.iter() {
        eventually("nothing runs", async || (worker.metric("sandpiper_jobs_running") == 0.0).then_some(()))
            .await;
    }
    for (id, count) in rest(replies).await {
        *seen.get_mut(&id).unwrap_or_else(|| panic!("{id} was never asked for")) += count;
    }
    let unexpected: Vec<_> =
        seen.iter().filter(|(id, count)| **count > 1 && !doubled.contains(*id)).collect();
    assert!(unexpected.is_empty(), "these came twice though no ack of theirs was lost: {unexpected:?}");
}

/// Every process below `pid`.
pub(crate) fn descendants(pid: u32) -> Vec<Process> {
    let mut all: Vec<(Process, u32)> = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap() {
        let Some(pid) = entry.unwrap().file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        if let Some((started, parent)) = stat(pid) {
            all.push((Process { pid, started }, parent));
        }
    }
    let mut family = HashSet::from([pid]);
    loop {
        let before = family.len();
        family.extend(
            all.iter().filter(|(_, parent)| family.contains(parent)).map(|(p, _)| p.pid).collect::<Vec<_>>(),
        );
        if family.len() == before {
            break;
        }
    }
    family.remove(&pid);
    all.into_iter().map(|(process, _)| process).filter(|process| family.contains(&process.pid)).collect()
}

/// When a process started, in the kernel's ticks, and its parent.
fn stat(pid: u32) -> Option<(String, u32)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name stands in parentheses and may hold anything.
    let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
    Some((fields.get(19)?.to_string(), fields.get(1)?.parse().ok()?))
}

/// Waits until none of them is left, not even as a zombie.
pub(crate) async fn are_gone(processes: &[Process]) {
    eventually("every process of the dead worker's jobs is gone", async || {
        let left =
            |process: &&Process| stat(process.pid).is_some_and(|(started, _)| started == process.started);
        processes.iter().find(left).is_none().then_some(())
    })
    .await;
}

/// Control groups that a worker made, by its process id in their names.
pub(crate) fn cgroups_of(pid: u32) -> Vec<PathBuf> {
    fn walk(directory: &Path, prefix: &str, found: &mut Vec<PathBuf>, depth: usize) {
        for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            if name.starts_with(prefix) {
                found.push(entry.path());
            }
            if depth > 0 {
                walk(&entry.path(), prefix, found, depth - 1);
            }
        }
    }
    let mut found = Vec::new();
    walk(Path::new("/sys/fs/cgroup"), &format!("sandpiper-{pid}-"), &mut found, 8);
    found
}

/// Mounts that this machine, as opposed to a job's namespace, knows of; but for those of other tests, which say so.
pub(crate) fn mounts() -> HashSet<String> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    // Without numbers, which say nothing of what is mounted where.
    mounts
        .lines()
        .filter(|line| !line.contains(" sp-test "))
        .filter_map(|line| line.split(' ').nth(4))
        .map(str::to_owned)
        .collect()
}
