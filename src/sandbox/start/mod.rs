//! From nothing to a process behind both walls that waits for its assignment: a new python, or a fork of a warm one.

pub(super) mod cold;
pub(super) mod launcher;
pub(super) mod pid1;
pub(super) mod warm_pool;
pub(super) mod zygote;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use super::host::Host;
use super::identity::{IdentityLease, IdentityPool};
use super::supervise::JobSupervisor;
use crate::job::{Limits, Outcome};
use launcher::Launcher;
use zygote::ZygoteNamespace;

/// What every start needs, cold or warm.
#[derive(Debug)]
pub(super) struct StartContext {
    pub(super) host: Host,
    pub(super) launcher: Launcher,
    pub(super) seats: Arc<IdentityPool>,
    /// A start may take so long.
    pub(super) timeout: Duration,
    pub(super) default_limits: Limits,
    /// The user namespace in which zygotes run if the worker may choose uids.
    pub(super) zygote_namespace: Option<OwnedFd>,
}

/// A job's process behind both walls, waiting for its assignment.
#[derive(Debug)]
pub(super) struct StartedJob {
    pub(super) supervisor: JobSupervisor,
    pub(super) lease: IdentityLease,
    /// The zygote's namespace, which must outlive the job.
    pub(super) _generation: Option<Arc<ZygoteNamespace>>,
}

/// Why a job was not started.
#[derive(Debug)]
pub(super) enum StartFailure {
    /// This is what its publisher is told.
    Job(Box<Outcome>),
    /// The worker's own fault.
    Ours(io::Error),
}

impl From<io::Error> for StartFailure {
    fn from(error: io::Error) -> Self {
        Self::Ours(error)
    }
}
