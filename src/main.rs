//! Picks the verb and turns its end into an exit code. No other file knows exit codes.

use std::process::ExitCode;

use sandpiper::cli::{self, End};
use sandpiper::job::Status;

/// Wrong usage of a verb that does not run a job; what clap itself uses.
const USAGE: u8 = 2;
/// The verb could not do its work, or the answer is no.
const FAILED: u8 = 1;
/// `serve`: a second signal cut jobs off; the broker delivers them again.
const ABANDONED: u8 = 3;
/// `exec` and `submit`: a limit of time was reached, as `timeout(1)` says it.
const OUT_OF_TIME: u8 = 124;
/// `exec` and `submit`: our own failure, never the job's.
const OURS: u8 = 125;
/// `exec` and `submit`: not acceptable, or a forbidden system call.
const FORBIDDEN: u8 = 126;
/// `exec` and `submit`: memory or output past its limit, as after an out-of-memory kill.
const OUT_OF_SPACE: u8 = 137;
/// Added to the number of the signal that a job died of, as shells do.
const SIGNALED: i32 = 128;

fn main() -> ExitCode {
    ExitCode::from(match cli::run(std::env::args_os()) {
        Ok(end) => code(&end),
        Err(failure) => {
            failure.report();
            match failure {
                cli::Failure::Usage { runs_a_job: false, .. } => USAGE,
                cli::Failure::Verb { runs_a_job: false, .. } => FAILED,
                cli::Failure::Usage { .. } | cli::Failure::Verb { .. } => OURS,
            }
        }
    })
}

fn code(end: &End) -> u8 {
    match end {
        End::Done => 0,
        End::Unsatisfied => FAILED,
        End::Abandoned => ABANDONED,
        End::Printed(Status::WorkerError) => OURS,
        End::Printed(_) => 0,
        End::Job { status, exit_code, signal } => match status {
            Status::Succeeded | Status::Failed => low_byte(exit_code.unwrap_or(1)),
            Status::Signaled => low_byte(SIGNALED + signal.unwrap_or(0)),
            Status::Timeout | Status::CpuLimit | Status::Cancelled | Status::Expired => OUT_OF_TIME,
            Status::MemoryLimit | Status::OutputLimit => OUT_OF_SPACE,
            Status::SyscallKilled | Status::Rejected => FORBIDDEN,
            Status::WorkerError => OURS,
        },
    }
}

/// What the kernel keeps of an exit code.
fn low_byte(code: i32) -> u8 {
    code.to_le_bytes()[0]
}
