//! What one job may use, and what the operator lets it ask for.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The limits in force for one job. Every one is enforced from outside the job's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Limits {
    /// Wall time in milliseconds, from the hand-over of the code.
    pub timeout_ms: u64,
    /// CPU time in milliseconds, user and system, over all processes of the job.
    pub cpu_ms: u64,
    /// Memory in bytes over all processes; files in the working directory count.
    pub memory_bytes: u64,
    /// Bytes of standard output, and as many of standard error.
    pub output_bytes: u64,
    /// Processes at one time, threads included.
    pub processes: u64,
    /// Open descriptors of one process.
    pub open_files: u64,
    /// Bytes in the working directory and `/tmp` together.
    pub disk_bytes: u64,
}

impl Limits {
    /// The least that a job can have. With less memory or fewer descriptors python does not start, which is then the
    /// request's fault and not the worker's: on Debian 12 it takes 10 descriptors, and 13 MiB where address space is what
    /// is limited.
    pub const MINIMUM: Self = Self {
        timeout_ms: 1,
        cpu_ms: 1,
        memory_bytes: 16 << 20,
        output_bytes: 1,
        processes: 1,
        open_files: 16,
        disk_bytes: 1,
    };
}

/// The operator's defaults, and the most that a job may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// In force where the job names no limit.
    pub default: Limits,
    /// A job that asks for more is rejected.
    pub maximum: Limits,
}

impl Default for Bounds {
    fn default() -> Self {
        const MIB: u64 = 1 << 20;
        Self {
            default: Limits {
                timeout_ms: 5_000,
                cpu_ms: 10_000,
                memory_bytes: 256 * MIB,
                output_bytes: MIB,
                processes: 32,
                open_files: 256,
                disk_bytes: 64 * MIB,
            },
            maximum: Limits {
                timeout_ms: 300_000,
                cpu_ms: 600_000,
                memory_bytes: 1024 * MIB,
                output_bytes: 8 * MIB,
                processes: 128,
                open_files: 1_024,
                disk_bytes: 512 * MIB,
            },
        }
    }
}
