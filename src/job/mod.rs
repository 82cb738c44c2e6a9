//! The contract: what a job is, what may be asked of it, what became of it, and how that is written down.
//!
//! Pure values. Nothing here does I/O or knows a broker, a process or a configuration file.

mod limits;
mod outcome;
mod request;

pub use limits::{Bounds, Limits};
pub use outcome::{Artifact, BlockedSyscall, Captured, Outcome, Status, Usage};
pub use request::{InputFile, Job};
