//! What became of a job, as the supervisor saw it; never what the process said of itself.

use std::time::{Duration, SystemTime};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The verdict on a job. The user's failure, a limit, the forbidden and our own fault stay apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Exit code 0.
    Succeeded,
    /// Any other exit code; an uncaught exception exits 1.
    Failed,
    /// Died of a signal that nobody but itself sent.
    Signaled,
    /// Wall time over.
    Timeout,
    /// CPU time over.
    CpuLimit,
    /// Memory limit reached, enforced by the sandbox.
    MemoryLimit,
    /// Wrote more than it may.
    OutputLimit,
    /// Made a forbidden system call.
    SyscallKilled,
    /// Not acceptable; never run.
    Rejected,
    /// Stopped on request, before or while it ran.
    Cancelled,
    /// Past its deadline; never run.
    Expired,
    /// Our fault, never the user's.
    WorkerError,
}

impl Status {
    /// Every status, for metrics that must show each one from the start.
    pub const ALL: [Self; 12] = [
        Self::Succeeded,
        Self::Failed,
        Self::Signaled,
        Self::Timeout,
        Self::CpuLimit,
        Self::MemoryLimit,
        Self::OutputLimit,
        Self::SyscallKilled,
        Self::Rejected,
        Self::Cancelled,
        Self::Expired,
        Self::WorkerError,
    ];

    /// The name on the wire and in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Signaled => "signaled",
            Self::Timeout => "timeout",
            Self::CpuLimit => "cpu_limit",
            Self::MemoryLimit => "memory_limit",
            Self::OutputLimit => "output_limit",
            Self::SyscallKilled => "syscall_killed",
            Self::Rejected => "rejected",
            Self::Cancelled => "cancelled",
            Self::Expired => "expired",
            Self::WorkerError => "worker_error",
        }
    }
}

/// What one stream carried, up to the limit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Captured {
    /// The bytes, at most the limit.
    pub bytes: Vec<u8>,
    /// There was more than the limit allows.
    pub truncated: bool,
}

/// A file that the job left and asked to have returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Artifact {
    /// Relative to the working directory.
    pub path: String,
    /// Its content.
    pub content: Vec<u8>,
}

/// A system call that was refused with an errno, and how often.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct BlockedSyscall {
    /// The call's name.
    pub syscall: String,
    /// Times it was refused.
    pub count: u64,
}

/// What the job used, over all of its processes where the kernel tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Usage {
    /// Wall time from the hand-over of the code to its end.
    pub wall_ms: u64,
    /// CPU time in user mode.
    pub cpu_user_ms: u64,
    /// CPU time in the kernel.
    pub cpu_system_ms: u64,
    /// The most memory in use at one time, without page cache. From the job's control group if it has one, else from
    /// samples.
    pub memory_peak_bytes: u64,
}

/// All that is known about a job that ended, or that never ran.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// The verdict.
    pub status: Status,
    /// The main process's exit code, where it exited.
    pub exit_code: Option<i32>,
    /// The signal it died of (`SIGSEGV`), where it did and nobody else sent it.
    pub signal: Option<String>,
    /// The forbidden call's name.
    pub syscall: Option<String>,
    /// One sentence for a person; none where it succeeded.
    pub error: Option<String>,
    /// Standard output.
    pub stdout: Captured,
    /// Standard error.
    pub stderr: Captured,
    /// The files asked for.
    pub artifacts: Vec<Artifact>,
    /// Calls refused with an errno.
    pub blocked_syscalls: Vec<BlockedSyscall>,
    /// Present when the job ran.
    pub usage: Option<Usage>,
    /// Its process was a fork of a warm interpreter.
    pub warm: bool,
    /// From taking the job on to handing over its code; none where it never started.
    pub start: Option<Duration>,
    /// From handing over its code to everything of it being dead.
    pub run: Option<Duration>,
    /// When the code was handed over.
    pub started_at: Option<SystemTime>,
    /// When everything of it was dead, or the verdict fell.
    pub finished_at: SystemTime,
}

impl Outcome {
    /// How many bytes of the job's own there are to be written down.
    pub fn bytes(&self) -> usize {
        let artifacts = self.artifacts.iter().map(|artifact| artifact.content.len());
        self.stdout.bytes.len() + self.stderr.bytes.len() + artifacts.sum::<usize>()
    }

    /// The outcome of a job that was never run.
    pub fn not_run(status: Status, error: impl Into<String>) -> Self {
        Self {
            status,
            exit_code: None,
            signal: None,
            syscall: None,
            error: Some(error.into()),
            stdout: Captured::default(),
            stderr: Captured::default(),
            artifacts: Vec::new(),
            blocked_syscalls: Vec::new(),
            usage: None,
            warm: false,
            start: None,
            run: None,
            started_at: None,
            finished_at: SystemTime::now(),
        }
    }
}
