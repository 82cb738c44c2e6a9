//! The kernel's counters of one group, read through descriptors that stay open.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{CgroupError, Homes, Version};

/// More than any of the files holds of what is read here.
const BUFFER: usize = 1024;
/// Memory that is not worth asking for its kinds, which costs more than all other counters together.
const SMALL: u64 = 4 << 20;
/// `cpuacct.stat` counts in these: USER_HZ is 100 wherever this runs.
const TICK_MS: u64 = 10;

/// All counters at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Reading {
    pub(super) kills: u64,
    /// Processes and threads that were refused.
    pub(super) forks: u64,
    pub(super) cpu: Duration,
    /// In user mode, and in the kernel.
    pub(super) times: [Duration; 2],
    /// Bytes without page cache.
    pub(super) memory: u64,
}

#[derive(Debug)]
pub(super) struct Counters {
    version: Version,
    /// `memory.oom_control` or `memory.events`
    kills: File,
    /// `pids.events`; not on the oldest kernels.
    forks: Option<File>,
    /// `cpuacct.usage` or `cpu.stat`
    cpu: File,
    /// `cpuacct.stat` or `cpu.stat`
    times: File,
    memory: File,
    /// `memory.stat`: memory by kinds.
    kinds: File,
    peak: Peak,
}

#[derive(Debug)]
enum Peak {
    /// Forgets when it is written to.
    Resettable(File),
    /// Cannot be made to forget, and has it ever been used?
    Lasting(File, bool),
    /// The kernel keeps none.
    Missing,
}

impl Counters {
    pub(super) fn open(homes: &Homes, name: &str) -> Result<Self, CgroupError> {
        let path = |controller, file: &str| -> Result<PathBuf, CgroupError> {
            Ok(homes.of(controller)?.join(name).join(file))
        };
        let open = |controller, file| {
            let path = path(controller, file)?;
            File::open(&path).map_err(CgroupError::file("open", path))
        };
        let version = homes.version;
        let forks = open("pids", "pids.events").ok();
        Ok(match version {
            Version::One => Self {
                version,
                kills: open("memory", "memory.oom_control")?,
                forks,
                cpu: open("cpuacct", "cpuacct.usage")?,
                times: open("cpuacct", "cpuacct.stat")?,
                memory: open("memory", "memory.usage_in_bytes")?,
                kinds: open("memory", "memory.stat")?,
                peak: Peak::open(&path("memory", "memory.max_usage_in_bytes")?),
            },
            Version::Two => Self {
                version,
                kills: open("memory", "memory.events")?,
                forks,
                cpu: open("memory", "cpu.stat")?,
                times: open("memory", "cpu.stat")?,
                memory: open("memory", "memory.current")?,
                kinds: open("memory", "memory.stat")?,
                peak: Peak::open(&path("memory", "memory.peak")?),
            },
        })
    }

    pub(super) fn kills(&self) -> Option<u64> {
        with_text(&self.kills, |text| field(text, "oom_kill"))
    }

    /// Processes and threads that were refused because there were as many as may be.
    pub(super) fn forks(&self) -> u64 {
        self.forks.as_ref().and_then(|file| with_text(file, |text| field(text, "max"))).unwrap_or_default()
    }

    pub(super) fn cpu_time(&self) -> Option<Duration> {
        with_text(&self.cpu, |text| match self.version {
            Version::One => number(text).map(Duration::from_nanos),
            Version::Two => field(text, "usage_usec").map(Duration::from_micros),
        })
    }

    /// In user mode, and in the kernel.
    pub(super) fn times(&self) -> [Duration; 2] {
        with_text(&self.times, |text| times(self.version, text)).unwrap_or_default()
    }

    /// What a counter does not tell is 0.
    pub(super) fn read(&self) -> Reading {
        Reading {
            kills: self.kills().unwrap_or_default(),
            forks: self.forks(),
            cpu: self.cpu_time().unwrap_or_default(),
            times: self.times(),
            memory: self.without_page_cache(self.memory()),
        }
    }

    /// Bytes that are charged to the group.
    pub(super) fn memory(&self) -> u64 {
        with_text(&self.memory, number).unwrap_or_default()
    }

    /// What is left of `bytes` of the group without its page cache: files of disks, which the kernel drops when memory
    /// is short. A few MiB are left as they are.
    pub(super) fn without_page_cache(&self, bytes: u64) -> u64 {
        if bytes <= SMALL {
            return bytes;
        }
        let page_cache = with_text(&self.kinds, |text| page_cache(self.version, text));
        bytes.saturating_sub(page_cache.unwrap_or_default())
    }

    pub(super) fn peak(&self) -> Option<u64> {
        match &self.peak {
            Peak::Resettable(file) | Peak::Lasting(file, _) => with_text(file, number),
            Peak::Missing => None,
        }
    }

    /// The peak is an earlier job's, and will be for ever.
    pub(super) fn is_stale(&self) -> bool {
        matches!(self.peak, Peak::Lasting(_, true))
    }

    /// As on a kernel that cannot forget a peak, once it was used.
    #[cfg(test)]
    pub(super) fn make_stale(&mut self) {
        if let Peak::Resettable(file) = std::mem::replace(&mut self.peak, Peak::Missing) {
            self.peak = Peak::Lasting(file, true);
        }
    }

    pub(super) fn forget_peak(&mut self) {
        match &mut self.peak {
            // Version 1 wants a number, and version 2 takes anything.
            Peak::Resettable(file) => drop(file.write_at(b"0", 0)),
            Peak::Lasting(_, used) => *used = true,
            Peak::Missing => {}
        }
    }
}

impl Peak {
    /// Kernels before 6.12 let nobody write to `memory.peak`; but root may open for writing what cannot be written
    /// to, so that only a write tells.
    fn open(path: &Path) -> Self {
        match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) if file.write_at(b"0", 0).is_ok() => Self::Resettable(file),
            _ => File::open(path).map_or(Self::Missing, |file| Self::Lasting(file, false)),
        }
    }
}

/// Reads a file from its beginning, as it is now.
fn with_text<T>(file: &File, understand: impl FnOnce(&str) -> Option<T>) -> Option<T> {
    let mut buffer = [0; BUFFER];
    let length = loop {
        match file.read_at(&mut buffer, 0) {
            Ok(length) => break length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return None,
        }
    };
    understand(std::str::from_utf8(&buffer[..length]).ok()?)
}

fn number(text: &str) -> Option<u64> {
    text.trim_end().parse().ok()
}

/// The value of `key` in lines of a key and a number each.
fn field(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| number(line.strip_prefix(key)?.strip_prefix(' ')?))
}

fn times(version: Version, text: &str) -> Option<[Duration; 2]> {
    Some(match version {
        Version::One => [field(text, "user")?, field(text, "system")?]
            .map(|ticks| Duration::from_millis(ticks.saturating_mul(TICK_MS))),
        Version::Two => [field(text, "user_usec")?, field(text, "system_usec")?].map(Duration::from_micros),
    })
}

/// Both versions count a job's own files in memory as cache, too.
fn page_cache(version: Version, text: &str) -> Option<u64> {
    let cache = match version {
        Version::One => "cache",
        Version::Two => "file",
    };
    Some(field(text, cache)?.saturating_sub(field(text, "shmem")?))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

    use super::*;

    // As Linux 6.18 and 6.1 wrote them.
    const OOM_CONTROL: &str = "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n";
    const EVENTS: &str = "low 0\nhigh 0\nmax 2189\noom 12\noom_kill 2\noom_group_kill 1\nsock_throttled 0\n";
    const CPU_STAT: &str = "\
usage_usec 4029155
user_usec 3912018
system_usec 117136
nice_usec 0
core_sched.force_idle_usec 0
nr_periods 0
nr_throttled 0
throttled_usec 0
";
    const CPUACCT_STAT: &str = "user 108\nsystem 7\n";

    #[test]
    fn kills_are_not_taken_for_other_events() {
        assert_eq!(field(OOM_CONTROL, "oom_kill"), Some(3));
        assert_eq!(field(EVENTS, "oom_kill"), Some(2));
        assert_eq!(field("oom 12\noom_group_kill 1\n", "oom_kill"), None);
        assert_eq!(field("oom_kill many\n", "oom_kill"), None);
        assert_eq!(field("", "oom_kill"), None);
    }

    #[test]
    fn times_have_the_unit_of_their_version() {
        let micros = Duration::from_micros;
        assert_eq!(field(CPU_STAT, "usage_usec").map(micros), Some(micros(4_029_155)));
        assert_eq!(times(Version::Two, CPU_STAT), Some([micros(3_912_018), micros(117_136)]));
        assert_eq!(times(Version::One, CPUACCT_STAT), Some([micros(1_080_000), micros(70_000)]));
        assert_eq!(times(Version::Two, CPUACCT_STAT), None);
    }

    #[test]
    fn files_in_memory_are_no_page_cache() {
        let one = "cache 9000\nrss 10\nrss_huge 0\nshmem 4000\nmapped_file 70\ntotal_cache 1\n";
        let two = "anon 10\nfile 9000\nkernel 5\nshmem 4000\nfile_mapped 70\nshmem_thp 1\n";
        assert_eq!(page_cache(Version::One, one), Some(5000));
        assert_eq!(page_cache(Version::Two, two), Some(5000));
        assert_eq!(page_cache(Version::One, two), None);
    }

    #[test]
    fn numbers_are_whole_lines() {
        assert_eq!(number("67108864\n"), Some(67_108_864));
        assert_eq!(number("max\n"), None);
        assert_eq!(number(""), None);
    }

    #[test]
    fn a_file_is_read_anew_each_time() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("cpuacct.usage");
        std::fs::write(&path, "17\n").unwrap();
        let file = File::open(&path).unwrap();
        assert_eq!(with_text(&file, number), Some(17));
        std::fs::write(&path, "4\n").unwrap();
        assert_eq!(with_text(&file, number), Some(4));
    }

    #[test]
    fn a_peak_that_cannot_be_forgotten_makes_a_group_stale_once_it_was_used() {
        let place = tempfile::tempdir().unwrap();
        assert!(matches!(Peak::open(&place.path().join("memory.peak")), Peak::Missing));
        let path = place.path().join("peak");
        std::fs::write(&path, "9\n").unwrap();
        assert!(matches!(Peak::open(&path), Peak::Resettable(_)));
    }
}
