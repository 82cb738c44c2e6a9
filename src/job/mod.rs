//! The contract: what a job is, what may be asked of it, what became of it, and how that is written down.
//!
//! Pure values. Nothing here does I/O or knows a broker, a process or a configuration file.

mod check;
pub(crate) mod explain;
mod limits;
mod outcome;
mod raw;
mod request;
mod strict;

pub use limits::{Bounds, Limits};
pub use outcome::{Artifact, BlockedSyscall, Captured, Outcome, Status, Usage};
pub use request::{Admission, InputFile, Job, Refusal, RefusalKind, Supports, parse};
