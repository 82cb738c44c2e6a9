//! What one job may use, and what the operator lets it ask for.

use std::sync::LazyLock;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Processors that a job may use together: 1.5 is one and a half of them all the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cpus {
    thousandths: u32,
}

impl Cpus {
    /// The kernel's least: 1 ms of each 100.
    pub const MINIMUM: Self = Self { thousandths: 10 };

    /// None where it is no number of processors.
    pub fn new(processors: f64) -> Option<Self> {
        let thousandths = (processors * 1000.0).round();
        // A cast of what is in range is exact.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked right here")]
        (0.0..=f64::from(u32::MAX)).contains(&thousandths).then_some(Self { thousandths: thousandths as u32 })
    }

    /// All that there are here, if the system tells. Asked once: the answer comes out of a dozen files of control groups.
    pub fn of_this_machine() -> Option<Self> {
        static ALL: LazyLock<Option<Cpus>> = LazyLock::new(|| {
            let number = std::thread::available_parallelism().ok()?.get();
            Cpus::new(f64::from(u32::try_from(number).ok()?))
        });
        *ALL
    }

    /// The lower of two caps, of which each may be none.
    pub fn less(one: Option<Self>, other: Option<Self>) -> Option<Self> {
        one.into_iter().chain(other).min()
    }

    /// In thousandths of one.
    pub fn thousandths(self) -> u32 {
        self.thousandths
    }

    /// As it is written in JSON.
    pub fn processors(self) -> f64 {
        f64::from(self.thousandths) / 1000.0
    }
}

impl std::fmt::Display for Cpus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.processors().fmt(f)
    }
}

impl Serialize for Cpus {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.processors().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Cpus {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let processors = f64::deserialize(deserializer)?;
        Self::new(processors).ok_or_else(|| {
            serde::de::Error::invalid_value(
                serde::de::Unexpected::Float(processors),
                &"a number of processors",
            )
        })
    }
}

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
    /// Processors that all processes of the job may use together; absent where nothing caps them, or where the worker
    /// has no control group that could.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<f64>")]
    pub cpus: Option<Cpus>,
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
        cpus: None,
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
                cpus: None,
            },
            maximum: Limits {
                timeout_ms: 300_000,
                cpu_ms: 600_000,
                memory_bytes: 1024 * MIB,
                output_bytes: 8 * MIB,
                processes: 128,
                open_files: 1_024,
                disk_bytes: 512 * MIB,
                cpus: None,
            },
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;

    #[test]
    fn processors_come_back_as_they_were_written() {
        for text in ["0.01", "1.0", "1.5", "0.333", "64.0"] {
            let cpus: Cpus = serde_json::from_str(text).unwrap();
            assert_eq!(serde_json::to_string(&cpus).unwrap(), text);
        }
        assert_eq!(serde_json::from_str::<Cpus>("2").unwrap().thousandths(), 2000);
        for text in ["-1", "1e10", "\"1\"", "null"] {
            assert!(serde_json::from_str::<Cpus>(text).is_err(), "{text}");
        }
    }
}
