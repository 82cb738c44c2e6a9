//! What all processes of a job hold together, counted from time to time: for what no control group counts.

use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::time::Instant;

use crate::sandbox::cgroup::Cgroup;

/// Record locks of files that a job may hold. The kernel keeps them in memory that is on nobody's account, and in
/// lists that each who closes the file has to walk. Programs hold a few.
pub(in crate::sandbox) const LOCKS: u64 = 128;

/// Counting takes no more than one part in so many of the time; of record locks alone, which few programs have.
const SHARE: u32 = 10;
const SHARE_OF_LOCKS: u32 = 50;

/// What a job was found to hold too much of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::sandbox) enum Excess {
    Locks,
    Memory,
}

/// Memory that is counted because no control group does.
#[derive(Clone, Copy, Debug)]
pub(in crate::sandbox) struct Counted {
    /// Bytes that the job keeps in files.
    pub(in crate::sandbox) files: u64,
    pub(in crate::sandbox) limit: u64,
}

/// What one job was found to hold so far.
#[derive(Debug)]
pub(in crate::sandbox) struct Census {
    /// Not before this.
    again: Instant,
    /// Bytes when they were last counted.
    last: u64,
    comes_near: bool,
    peak: u64,
    /// The most bytes of mapped files that one of its processes had.
    mapped: u64,
}

impl Census {
    pub(in crate::sandbox) fn new() -> Self {
        Self { again: Instant::now(), last: 0, comes_near: false, peak: 0, mapped: 0 }
    }

    /// Counts once more, where it is time to. On a thread for such things: the kernel may have to walk all pages.
    /// `roots` are the first process of the job's pid namespace and its main one.
    pub(in crate::sandbox) async fn take(
        &mut self,
        roots: [i32; 2],
        memory: Option<Counted>,
    ) -> Option<Excess> {
        if Instant::now() < self.again {
            return None;
        }
        let count = move || {
            // How long it takes, and not how long it waits for a thread.
            let begun = Instant::now();
            let processes = processes(roots);
            let bytes = memory.map(|counted| (bytes(&processes, counted), mapped_files(&processes)));
            (has_too_many_locks(&processes), bytes.unwrap_or_default(), begun.elapsed())
        };
        let (locks, (bytes, mapped), took) = tokio::task::spawn_blocking(count).await.ok()?;
        self.again = Instant::now() + took * if memory.is_some() { SHARE } else { SHARE_OF_LOCKS };
        let grown = bytes.saturating_sub(std::mem::replace(&mut self.last, bytes));
        self.peak = self.peak.max(bytes);
        self.mapped = self.mapped.max(mapped);
        let limit = memory.map_or(u64::MAX, |counted| counted.limit);
        self.comes_near = bytes > limit / 2 || grown > limit / 8;
        if locks { Some(Excess::Locks) } else { (bytes > limit).then_some(Excess::Memory) }
    }

    /// It had more than half of its memory when it was last counted, or grows fast.
    pub(in crate::sandbox) fn comes_near(&self) -> bool {
        self.comes_near
    }

    /// Notes what a control group tells between two counts.
    pub(in crate::sandbox) fn sample(&mut self, group: &Cgroup, main: i32) {
        self.peak = self.peak.max(group.memory());
        self.mapped = self.mapped.max(mapped_files(&[main]));
    }

    /// The most bytes at one time, without files of others: by samples, by the group if there is one, and by `resident`,
    /// what the kernel kept as the peak of the main process with the files that it had mapped.
    pub(in crate::sandbox) fn peak(&self, resident: u64, group: Option<&Cgroup>) -> u64 {
        let resident = resident.saturating_sub(self.mapped);
        self.peak.max(group.map_or(resident, |group| group.memory_peak(resident)))
    }
}

/// A job's processes: its main one, what that started, and what came to the first process of their pid namespace when
/// its parents had ended, but not that one itself, which is ours.
fn processes([init, job]: [i32; 2]) -> Vec<i32> {
    let (mut found, mut next) = (vec![init, job], 0);
    while let Some(&pid) = found.get(next) {
        next += 1;
        // Children are kept by the thread that made them.
        for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            found.extend(children.split_ascii_whitespace().filter_map(|child| child.parse::<i32>().ok()));
        }
    }
    found.split_off(1)
}

/// Bytes that processes have to themselves, with their page tables, without what they share with a zygote or with other
/// jobs. What they keep in files they may have mapped as well.
///
/// Exact figures make the kernel walk all pages. They are asked for only where the coarse ones, which count a page for
/// each process that has it, are above the limit.
fn bytes(processes: &[i32], Counted { files, limit }: Counted) -> u64 {
    let [private, shared, tables] = sums(processes, "status", ["RssAnon:", "RssShmem:", "VmPTE:"]);
    let coarse = private + shared.max(files) + tables;
    if coarse <= limit {
        return coarse;
    }
    let [private, shared] = sums(processes, "smaps_rollup", ["Pss_Anon:", "Pss_Shmem:"]);
    private + shared.max(files) + tables
}

/// What processes have together of each field of one of their files.
fn sums<const N: usize>(processes: &[i32], file: &str, fields: [&str; N]) -> [u64; N] {
    let read = |pid: &i32| fs::read_to_string(format!("/proc/{pid}/{file}")).ok();
    let texts: Vec<String> = processes.iter().filter_map(read).collect();
    fields.map(|field| texts.iter().filter_map(|text| kibibytes(text, field)).sum())
}

/// The most bytes of files that one of the processes has mapped and touched.
fn mapped_files(processes: &[i32]) -> u64 {
    let of = |pid: &i32| kibibytes(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?, "RssFile:");
    processes.iter().filter_map(of).max().unwrap_or_default()
}

fn kibibytes(text: &str, field: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(field))?;
    rest.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

/// Whether processes hold more record locks than a job may.
///
/// From what the kernel tells of each descriptor: for `/proc/locks` it would hold up whoever takes a lock anywhere on
/// the machine.
fn has_too_many_locks(processes: &[i32]) -> bool {
    let mut left = LOCKS;
    for pid in processes {
        for entry in fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten() {
            let Ok(file) = fs::File::open(entry.path()) else { continue };
            // One that is over the limit by itself need not be read to its end.
            let mut text = String::new();
            let _ = file.take((LOCKS + 1) * LINE).read_to_string(&mut text);
            let locks = count_locks(&text);
            match left.checked_sub(locks) {
                Some(rest) => left = rest,
                None => return true,
            }
        }
    }
    false
}

/// More than a line about a lock has.
const LINE: u64 = 128;

/// Lines such as `lock: 1: POSIX  ADVISORY  READ 3568 fd:00:2531452 4 4`.
fn count_locks(text: &str) -> u64 {
    let is_lock = |line: &&str| line.starts_with("lock:") && line.contains(" POSIX ");
    text.lines().filter(is_lock).count() as u64
}

/// Kills by the OOM killer that may have met a job without a control group of its own.
#[derive(Clone, Debug)]
pub(in crate::sandbox) struct OomKills(PathBuf);

impl OomKills {
    /// The counter of the worker's own control group, else that of the machine; none where neither can be read.
    pub(in crate::sandbox) fn find() -> Option<Self> {
        let own = crate::sandbox::cgroup::own_oom_counters().into_iter();
        let counters = own.chain([PathBuf::from("/proc/vmstat")]).map(Self);
        counters.into_iter().find(|counter| counter.count().is_some())
    }

    pub(in crate::sandbox) fn count(&self) -> Option<u64> {
        let text = fs::read_to_string(&self.0).ok()?;
        text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

    use std::io::BufRead;

    use super::*;

    #[test]
    fn record_locks_of_a_descriptor_are_counted() {
        let text = "pos:\t0\nflags:\t0100002\nlock:\t1: POSIX  ADVISORY  READ 12 fd:00:99 8 8\n\
                    lock:\t2: FLOCK  ADVISORY  WRITE 12 fd:00:99 0 EOF\nlock:\t3: POSIX  ADVISORY  WRITE 12 fd:00:99 9 9\n";
        assert_eq!(count_locks(text), 2);
        let longest = "lock:\t1024: POSIX  ADVISORY  WRITE 4194304 fffff:ff:18446744073709551615 9223372036854775807 \
                       9223372036854775807\n";
        assert!((longest.len() as u64) < LINE);
    }

    #[test]
    fn fields_are_found_by_their_whole_names() {
        let text = "Rss:  900 kB\nPss_Anon:       12 kB\nPss_Shmem:  3 kB\n";
        assert_eq!(kibibytes(text, "Pss_Anon:"), Some(12 << 10));
        assert_eq!(kibibytes(text, "Pss_File:"), None);
    }

    #[test]
    fn children_of_every_thread_are_found() {
        let mut shell = std::thread::spawn(|| {
            let mut shell = std::process::Command::new("sh");
            shell
                .args(["-c", "sleep 60 & echo $!; wait"])
                .stdout(std::process::Stdio::piped())
                .spawn()
                .unwrap()
        })
        .join()
        .unwrap();
        let mut line = String::new();
        std::io::BufReader::new(shell.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let sleeper: i32 = line.trim().parse().unwrap();
        let [own, pid] = [std::process::id(), shell.id()].map(|id| i32::try_from(id).unwrap());
        for root in [own, pid] {
            assert!(processes([root, root]).contains(&sleeper));
        }
        let counted = Counted { files: 0, limit: u64::MAX };
        assert!(bytes(&[pid, sleeper], counted) > 0 && !has_too_many_locks(&[pid, sleeper]));
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(sleeper), nix::sys::signal::Signal::SIGKILL)
            .unwrap();
        shell.wait().unwrap();
    }
}
