//! Against this machine's own control groups, where it gives any.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]
#![allow(clippy::print_stderr, reason = "a skip is said aloud")]

use std::process::{Command, ExitStatus};

use super::*;
use crate::job::Bounds;

const MIB: u64 = 1 << 20;

fn limits(memory_bytes: u64) -> Limits {
    Limits { memory_bytes, ..Bounds::default().default }
}

fn skip(why: &dyn std::fmt::Display) {
    assert!(std::env::var("CI").as_deref() != Ok("true"), "SKIPPED: {why}");
    eprintln!("SKIPPED: {why}");
}

/// Groups as the sandbox makes them; without the trial of a child, for a test has more than one thread.
fn groups(count: usize, limits: &Limits) -> Option<Vec<Cgroup>> {
    let (mounts, own) = (place::mounts().unwrap(), place::own().unwrap());
    let made = v2::start(&mounts, &own, count)
        .and_then(|homes| make(homes, count, limits))
        .or_else(|_| make(v1::start(&mounts, &own, count)?, count, limits));
    made.inspect_err(|error| skip(error)).ok()
}

fn group(limits: &Limits) -> Option<Cgroup> {
    groups(1, limits)?.pop()
}

fn directories(group: &Cgroup) -> Vec<PathBuf> {
    group.homes.list.iter().map(|home| home.path().join(&group.name)).collect()
}

/// Runs a line of shell inside of the group.
fn inside(group: &Cgroup, line: &str) -> ExitStatus {
    let enter = "for group; do echo 0 > \"$group/cgroup.procs\" || exit 9; done; ";
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("{enter}{line}"), "sh"]).args(directories(group));
    shell.status().unwrap()
}

/// Keeps so many MiB in one process.
fn hoard(mib: u64) -> String {
    format!("head -c {mib}M /dev/zero | tail -c {mib}M | wc -c >/dev/null")
}

#[tokio::test]
async fn a_kill_for_memory_is_seen_and_forgotten() {
    let Some(mut group) = group(&limits(32 * MIB)) else { return };
    assert!(inside(&group, "true").success());
    assert!(!group.killed_for_memory());
    // Another signal is no kill for memory.
    assert!(!inside(&group, "kill -KILL $$").success());
    assert!(!group.killed_for_memory());

    inside(&group, &hoard(100));
    assert!(group.killed_for_memory());
    let peak = group.memory_peak(0);
    assert!(peak > 16 * MIB && peak <= 32 * MIB, "{peak}");

    group.begin(&limits(256 * MIB)).await.unwrap();
    assert!(!group.killed_for_memory());
    assert!(inside(&group, &hoard(100)).success());
    assert!(!group.killed_for_memory());
    assert!(group.memory_peak(0) > 64 * MIB, "{:?}", group.used());

    group.begin(&limits(256 * MIB)).await.unwrap();
    assert!(inside(&group, "true").success());
    assert!(group.memory_peak(0) < 64 * MIB, "{:?}", group.used());

    // Files of a disk are cached for everybody, whoever read or wrote them first.
    let disk = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
    group.begin(&limits(256 * MIB)).await.unwrap();
    assert!(inside(&group, &format!("head -c 100M /dev/zero >{}", disk.path().display())).success());
    assert!(group.counters.peak().unwrap() > 64 * MIB);
    assert!(group.memory_peak(0) < 32 * MIB && group.memory() < 32 * MIB, "{:?}", group.memory_peak(0));
}

#[tokio::test]
async fn a_cap_on_processors_is_set_and_taken_away() {
    let Some(mut group) = group(&limits(64 * MIB)) else { return };
    if !group.shares_the_processor() {
        return skip(&"the controller cpu is not to be had");
    }
    let directory = group.homes.of(CPU).unwrap().join(&group.name);
    let quota = |name: &str| fs::read_to_string(directory.join(name)).map(|text| text.trim().to_owned());
    let quota = || quota("cpu.cfs_quota_us").or_else(|_| quota("cpu.max")).unwrap();
    let free = quota();
    assert!(["-1", "max 100000"].contains(&free.as_str()), "{free}");
    let capped = Limits { cpus: crate::job::Cpus::new(1.5), ..limits(64 * MIB) };
    group.begin(&capped).await.unwrap();
    assert!(["150000", "150000 100000"].contains(&quota().as_str()), "{}", quota());
    group.begin(&limits(64 * MIB)).await.unwrap();
    assert_eq!(quota(), free);
}

#[test]
fn processes_are_counted_together() {
    let limits = Limits { processes: 3, ..limits(64 * MIB) };
    let Some(group) = group(&limits) else { return };
    // The shell is one, and those that have ended count until it waits for them.
    assert!(inside(&group, "true | true").success());
    assert!(!inside(&group, "true | true | true").success());
}

#[tokio::test]
async fn cpu_time_is_that_of_every_process_since_the_job_began() {
    let Some(mut group) = group(&limits(64 * MIB)) else { return };
    let burn = "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done";
    assert!(inside(&group, &format!("({burn}) & ({burn}) & wait")).success());
    let spent = group.cpu_time().unwrap();
    assert!(spent > Duration::from_millis(20), "{spent:?}");
    let Used { user, system, .. } = group.used();
    assert!(user + system > Duration::from_millis(10), "{user:?} {system:?}");

    group.begin(&limits(64 * MIB)).await.unwrap();
    assert!(group.cpu_time().unwrap() < spent);
}

#[tokio::test]
async fn a_group_that_lost_its_directories_is_made_again() {
    let Some(mut group) = group(&limits(64 * MIB)) else { return };
    for directory in directories(&group) {
        fs::remove_dir(directory).unwrap();
    }
    group.begin(&limits(64 * MIB)).await.unwrap();
    assert!(inside(&group, "true").success());
}

#[test]
fn everything_is_removed_with_the_last_group() {
    let Some(group) = group(&limits(64 * MIB)) else { return };
    let homes: Vec<PathBuf> = group.homes.list.iter().map(|home| home.path().to_owned()).collect();
    assert!(!homes.is_empty() && homes.iter().all(|home| home.exists()));
    drop(group);
    assert!(homes.iter().all(|home| !home.exists()));
}

#[tokio::test]
async fn limits_are_written_in_an_order_that_the_kernel_takes() {
    let Some(mut group) = group(&limits(64 * MIB)) else { return };
    for memory in [512 * MIB, 16 * MIB, 128 * MIB] {
        group.begin(&limits(memory)).await.unwrap();
        assert_eq!(group.set, Some([memory, 32, u64::MAX]));
    }
}

/// Each renewal may make a child, and waits for it. Once such children kept each other alive, for each had the ends
/// of the others' pipes; two threads that waited for them at one time waited for ever.
#[test]
fn many_groups_are_renewed_at_one_time() {
    const GROUPS: usize = 8;
    const RENEWALS: usize = 50;
    let limits = limits(64 * MIB);
    let Some(groups) = groups(GROUPS, &limits) else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(GROUPS).build().unwrap();
    let (renewed, all) = std::sync::mpsc::channel();
    for mut group in groups {
        let renewed = renewed.clone();
        runtime.spawn(async move {
            for _ in 0..RENEWALS {
                group.counters.make_stale();
                group.begin(&limits).await.unwrap();
            }
            renewed.send(group).unwrap();
        });
    }
    drop(renewed);
    // Far more than it takes; not the runtime's own clock, whose threads may be those that wait.
    let done = std::iter::from_fn(|| all.recv_timeout(Duration::from_secs(60)).ok());
    let done: Vec<Cgroup> = done.take(GROUPS).collect();
    runtime.shutdown_background();
    assert_eq!(done.len(), GROUPS, "renewals wait for each other, or one failed");
    assert!(done.iter().all(|group| inside(group, "true").success()));
}
