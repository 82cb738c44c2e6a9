//! The result as its requester reads it: every field of the contract, in its order, none ever missing.

use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::job::{BlockedSyscall, Captured, Limits, Metadata, Outcome, Status, Usage};

/// The version of the result's form.
pub const VERSION: u32 = 1;
/// Characters of `error`: enough for a sentence, whatever it quotes.
const ERROR_MAX: usize = 2_000;
/// Namespace of the message ids of results: a random UUID, chosen once.
const RESULTS: Uuid = Uuid::from_u128(0x6a3d_4f0e_91c2_4b7b_8d57_2f1f_60c9_e8a4);

/// What the result says of its delivery, beside what became of the job.
#[derive(Clone, Debug, PartialEq)]
pub struct Context {
    /// The job's id.
    pub id: String,
    /// In force for the job; none where it was refused before it had any.
    pub limits: Option<Limits>,
    /// Deliveries of this job so far, this one included.
    pub attempt: u32,
    /// The broker says that it was delivered before.
    pub redelivered: bool,
    /// The worker's name.
    pub worker: String,
    /// From publishing to taking the job on, where the publisher gave a time.
    pub queued: Option<Duration>,
    /// The job's metadata.
    pub metadata: Option<Metadata>,
}

/// What became of one job. A field that does not apply is null, never missing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "Result", title = "Sandpiper result", deny_unknown_fields)]
pub struct Reply {
    /// The version of this form.
    #[schemars(extend("const" = 1))]
    pub version: u32,
    /// The job's id.
    #[schemars(length(min = 1, max = 128), regex(pattern = r"^[A-Za-z0-9._:-]+$"))]
    pub id: String,
    /// The verdict.
    pub status: Status,
    /// The main process's exit code, where it exited.
    pub exit_code: Option<i32>,
    /// The signal it died of, such as `SIGSEGV`.
    pub signal: Option<String>,
    /// The forbidden system call that ended it.
    pub syscall: Option<String>,
    /// One sentence for a person: why it did not succeed, or what of its result had to be left out.
    pub error: Option<String>,
    /// Standard output, up to its limit.
    pub stdout: String,
    /// Standard error, up to its limit.
    pub stderr: String,
    /// How `stdout` is written.
    pub stdout_encoding: Encoding,
    /// How `stderr` is written.
    pub stderr_encoding: Encoding,
    /// There was more standard output than is shown.
    pub stdout_truncated: bool,
    /// There was more standard error than is shown.
    pub stderr_truncated: bool,
    /// The files that the job asked to have returned.
    pub artifacts: Vec<ReplyArtifact>,
    /// System calls that were refused with an errno.
    pub blocked_syscalls: Vec<BlockedSyscall>,
    /// The limits in force; null where the job was rejected.
    pub limits: Option<Limits>,
    /// What the job used; null where it did not run.
    pub usage: Option<Usage>,
    /// Where the time went.
    pub timing: Timing,
    /// Deliveries of this job so far, this one included.
    pub attempt: u32,
    /// The broker delivered this job before.
    pub redelivered: bool,
    /// The worker's name.
    pub worker: String,
    /// RFC 3339 in UTC: when the code was handed over; null where it did not run.
    #[schemars(extend("format" = "date-time"))]
    pub started_at: Option<String>,
    /// RFC 3339 in UTC: when all of it was dead, or the verdict fell.
    #[schemars(extend("format" = "date-time"))]
    pub finished_at: String,
    /// The job's metadata.
    #[schemars(with = "Option<serde_json::Map<String, serde_json::Value>>")]
    pub metadata: Option<Metadata>,
}

/// How the bytes of a stream are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Encoding {
    /// As they are.
    #[serde(rename = "utf-8")]
    Utf8,
    /// As base64, because they are not UTF-8.
    #[serde(rename = "base64")]
    Base64,
}

/// A file that the job left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "ResultArtifact", deny_unknown_fields)]
pub struct ReplyArtifact {
    /// Relative to the working directory.
    pub path: String,
    /// Its content.
    #[schemars(extend("contentEncoding" = "base64"))]
    pub base64: String,
    /// Its size before encoding.
    pub bytes: u64,
}

/// Where the time went, in milliseconds; null where that part did not happen or is not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Timing {
    /// From publishing to taking the job on.
    pub queued_ms: Option<u64>,
    /// From taking the job on to handing over its code.
    pub start_ms: Option<u64>,
    /// From handing over its code to all of it being dead.
    pub run_ms: Option<u64>,
}

impl Reply {
    /// Writes down what became of a job.
    pub fn new(context: Context, outcome: Outcome) -> Self {
        let stdout = Stream::from(outcome.stdout);
        let stderr = Stream::from(outcome.stderr);
        let artifacts = outcome.artifacts.into_iter().map(|artifact| ReplyArtifact {
            bytes: whole(artifact.content.len()),
            base64: STANDARD.encode(&artifact.content),
            path: artifact.path,
        });
        Self {
            version: VERSION,
            id: context.id,
            status: outcome.status,
            exit_code: outcome.exit_code,
            signal: outcome.signal,
            syscall: outcome.syscall,
            error: outcome.error.map(|error| error.chars().take(ERROR_MAX).collect()),
            stdout: stdout.text,
            stderr: stderr.text,
            stdout_encoding: stdout.encoding,
            stderr_encoding: stderr.encoding,
            stdout_truncated: stdout.truncated,
            stderr_truncated: stderr.truncated,
            artifacts: artifacts.collect(),
            blocked_syscalls: outcome.blocked_syscalls,
            limits: context.limits,
            usage: outcome.usage,
            timing: Timing {
                queued_ms: context.queued.map(millis),
                start_ms: outcome.start.map(millis),
                run_ms: outcome.run.map(millis),
            },
            attempt: context.attempt,
            redelivered: context.redelivered,
            worker: context.worker,
            started_at: outcome.started_at.map(rfc3339),
            finished_at: rfc3339(outcome.finished_at),
            metadata: context.metadata,
        }
    }
}

/// The `message_id` of a job's result: the same for every duplicate, so that readers can drop them. And no other
/// requester's: `asked` is the message's `correlation_id`, `reply_to` and `user_id`, which the broker vouches for.
pub fn message_id(job_id: &str, asked: [Option<&str>; 3]) -> Uuid {
    // Each with its length before it, so that nothing can move from one into the next.
    let mut all = Vec::with_capacity(512);
    for part in [Some(job_id)].into_iter().chain(asked) {
        all.extend(part.map_or(u64::MAX, |part| u64::try_from(part.len()).unwrap_or(u64::MAX)).to_be_bytes());
        all.extend(part.unwrap_or_default().as_bytes());
    }
    Uuid::new_v5(&RESULTS, &all)
}

/// A stream in the form in which JSON can carry it.
struct Stream {
    text: String,
    encoding: Encoding,
    truncated: bool,
}

impl From<Captured> for Stream {
    fn from(Captured { mut bytes, truncated }: Captured) -> Self {
        if truncated
            && let Err(error) = std::str::from_utf8(&bytes)
            && error.error_len().is_none()
        {
            // The cut went through a character, which is no fault of the job's.
            bytes.truncate(error.valid_up_to());
        }
        match String::from_utf8(bytes) {
            Ok(text) => Self { text, encoding: Encoding::Utf8, truncated },
            Err(error) => {
                Self { text: STANDARD.encode(error.as_bytes()), encoding: Encoding::Base64, truncated }
            }
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn whole(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}

/// RFC 3339 in UTC with milliseconds. A clock that is set beyond the years 0 to 9999 shows the epoch.
fn rfc3339(time: SystemTime) -> String {
    let time = jiff::Timestamp::try_from(time).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    format!("{time:.3}")
}
