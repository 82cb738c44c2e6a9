//! What this machine lets the sandbox do: tried once, at its start, and decided by ever after.
//!
//! Some of it is tried in children that are waited for, so no value of this is made while jobs run.

use std::sync::LazyLock;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::identity::Privilege;
use super::{landlock, plan};
use crate::sys::{launch, probe};

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
    pub(super) landlock: landlock::Support,
    /// A process can be marked for the OOM killer: not where `/proc` is read-only.
    pub(super) oom_score: bool,
    /// The watches of an ordinary user's namespaces can be limited: not where `/proc/sys` is read-only.
    pub(super) watches: bool,
    /// A whole tree of mounts can be made read-only with one call: not before Linux 5.12.
    pub(super) mount_setattr: bool,
    /// The core size that jobs are limited to.
    pub(super) core: u64,
}

impl Host {
    /// To be called while the process has one thread.
    pub(super) fn examine() -> Self {
        let privilege = Privilege::of_this_process();
        let user = privilege == Privilege::None;
        let oom_score = launch::can(0, plan::oom_trial().bytes());
        if !oom_score {
            tracing::warn!(
                "where memory is over the kernel may end the worker: /proc/self/oom_score_adj is closed"
            );
        }
        Self {
            privilege,
            proc: probe::proc(user).is_ok(),
            landlock: landlock::Support(probe::landlock_abi()),
            oom_score,
            watches: user && launch::can(libc::CLONE_NEWUSER, plan::watches_trial().bytes()),
            mount_setattr: probe::mount_setattr(),
            core: core(),
        }
    }
}

/// No core dump: one byte, for what would be written to a file is then too large, and this one value also holds
/// where the host pipes dumps to a program of its own (`|` in `kernel.core_pattern`), which runs as root of the host
/// and for which every other limit, 0 among them, counts for nothing. 0 where the worker itself has no more.
fn core() -> u64 {
    let hard = getrlimit(Resource::RLIMIT_CORE).map_or(0, |(_, hard)| hard);
    let raised = hard > 0 || setrlimit(Resource::RLIMIT_CORE, 1, 1).is_ok();
    if !raised {
        tracing::warn!("crashes of jobs may be dumped by the host: start the worker with LimitCORE=1");
    }
    raised.into()
}
