//! What becomes of a delivery, and of one whose job does not run.

use crate::job::{Outcome, Status};
use crate::ops::metrics::DeadReason;

/// How a delivery was settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Settlement {
    /// The requester has a result.
    Answered,
    /// It has none: the broker delivers the job again, here or to another worker.
    Redelivered,
}

/// Why a job has no outcome of its own.
#[derive(Debug)]
pub(super) enum NotRun {
    /// Its outcome is decided without running it.
    Answer(Box<Outcome>),
    /// It cannot be handled: a copy goes to the dead-letter queue, and this result to the requester.
    DeadLetter(DeadReason, Box<Outcome>),
    /// The broker delivers it again, here or to another worker.
    Requeue,
    /// Its channel is closed: the broker delivers it again by itself.
    ChannelClosed,
}

/// The outcome of a job that does not run.
pub(super) fn not_run(status: Status, error: impl Into<String>) -> NotRun {
    NotRun::Answer(Box::new(Outcome::not_run(status, error)))
}
