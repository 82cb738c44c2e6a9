//! The contract: what a job is, what may be asked of it, what became of it, and how that is written down.
//!
//! Pure values. Nothing here does I/O or knows a broker, a process or a configuration file.

pub mod asyncapi;
mod check;
mod encode;
pub(crate) mod explain;
mod json;
mod limits;
mod metadata;
mod model;
mod outcome;
mod output;
mod parse;
mod python_variables;
mod raw;
mod reply;
pub mod schema;
mod whole;

pub use check::is_id;
pub(crate) use json::Members;
pub use limits::{Bounds, Cpus, Limits};
pub use metadata::Metadata;
pub use model::{Admission, InputFile, Job, Refusal, RefusalKind};
pub use outcome::{Artifact, BlockedSyscall, Captured, Outcome, Status, Usage};
pub use output::{Chunk, Stream, incomplete_end};
pub use parse::{named, parse};
pub(crate) use raw::no_object;
pub use reply::{Context, Encoding, Reply, ReplyArtifact, Timing, VERSION, message_id};
