//! What this machine lets the sandbox do: tried once, at its start, and decided by ever after.
//!
//! This is the value alone, so that a plan is made from data; `setup` fills it.

use std::sync::LazyLock;

/// Asked once: the answer is put together from files of the kernel's.
pub(super) static PROCESSORS: LazyLock<u32> = LazyLock::new(|| {
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    u32::try_from(processors).unwrap_or(u32::MAX)
});

/// What every plan depends on, whichever job it is for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Host {
    pub(super) privilege: Privilege,
    /// A `/proc` of a job's own can be mounted.
    pub(super) proc: bool,
    /// The version of Landlock, 0 for none.
    pub(super) landlock: u32,
    /// A process can be marked for the OOM killer: not where `/proc` is read-only.
    pub(super) oom_score: bool,
    /// The watches of an ordinary user's namespaces can be limited: not where `/proc/sys` is read-only.
    pub(super) watches: bool,
    /// A whole tree of mounts can be made read-only with one call: not before Linux 5.12.
    pub(super) mount_setattr: bool,
    /// Address space is promised only as far as there is memory (`vm.overcommit_memory` of 2).
    pub(super) keeps_promises: bool,
    /// The core size that jobs are limited to.
    pub(super) core: u64,
}

/// What the worker itself may do; decides how jobs get their identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Privilege {
    /// It may mount, and be any user.
    Full,
    /// It may do neither outside a user namespace of its own.
    None,
}

impl Privilege {
    /// Reads this process's own capabilities.
    pub(super) fn of_this_process() -> Self {
        const CAP_CHOWN: u64 = 1 << 0;
        const CAP_SETGID: u64 = 1 << 6;
        const CAP_SETUID: u64 = 1 << 7;
        const CAP_SYS_ADMIN: u64 = 1 << 21;
        const NEEDED: u64 = CAP_CHOWN | CAP_SETGID | CAP_SETUID | CAP_SYS_ADMIN;
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let effective = status
            .lines()
            .find_map(|line| line.strip_prefix("CapEff:"))
            .and_then(|set| u64::from_str_radix(set.trim(), 16).ok());
        if effective.is_some_and(|set| set & NEEDED == NEEDED) { Self::Full } else { Self::None }
    }
}
