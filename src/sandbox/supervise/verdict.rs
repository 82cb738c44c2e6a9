//! From what was seen to what is reported.

use std::time::Duration;

use sandpiper_shim::abi::{Report, Stage};
use sandpiper_shim::lockdown;
use sandpiper_shim::plan::Steps;
use tokio::time::Instant;

use crate::job::{BlockedSyscall, Limits, Outcome, Status, Usage};
use crate::sandbox::error::explained;
use crate::sandbox::outer_wall::plan::Plan;
use crate::sandbox::supervise::census;
use crate::sandbox::supervise::{EndReason, Observation};
use crate::sandbox::workdir::inputs::InputsNotWritten;
use crate::sys::process::Exit;
use crate::sys::signal;

/// The verdict on a job that was watched to its end. `taken` is when the job was taken on.
pub(in crate::sandbox) fn judge(
    seen: Observation,
    limits: &Limits,
    has_preload: bool,
    taken: Instant,
) -> Outcome {
    let preload_ended = has_preload && seen.handed_over.is_none();
    let (status, error) = match &seen.cause {
        EndReason::Ended if seen.handed_over.is_none() && !has_preload => {
            (Status::WorkerError, format!("python ended before it was locked down: {}", describe(seen.exit)))
        }
        EndReason::Ended => ended(&seen, limits),
        EndReason::Timeout => (Status::Timeout, format!("the job ran longer than {} ms", limits.timeout_ms)),
        EndReason::StartTimeout if preload_ended => {
            (Status::Timeout, "the preload did not end in the time that a start may take".into())
        }
        EndReason::StartTimeout => {
            (Status::WorkerError, "python was not ready in the time that a start may take".into())
        }
        EndReason::CpuLimit => cpu_limit(limits),
        EndReason::MemoryLimit if seen.handed_over.is_none() && !has_preload => (
            Status::MemoryLimit,
            format!("{} bytes of memory are too few for python to start", limits.memory_bytes),
        ),
        EndReason::MemoryLimit => {
            (Status::MemoryLimit, format!("the job used more than {} bytes of memory", limits.memory_bytes))
        }
        EndReason::MemoryElsewhere => (
            Status::WorkerError,
            format!(
                "the kernel killed the job because the machine, or the container around the worker, was out of \
                 memory; the job was within its own {} bytes: run fewer at one time, or give the worker more",
                limits.memory_bytes
            ),
        ),
        EndReason::TooManyLocks => (
            Status::MemoryLimit,
            format!(
                "the job held more than {} record locks of files, which are memory of the kernel's",
                census::LOCKS
            ),
        ),
        EndReason::OutputLimit => (
            Status::OutputLimit,
            format!("the job wrote more than {} bytes to one stream", limits.output_bytes),
        ),
        EndReason::Forbidden(name) => {
            (Status::SyscallKilled, format!("the job made the forbidden system call {name}"))
        }
        EndReason::Cancelled => (Status::Cancelled, "the job was cancelled while it ran".into()),
        // The caller, who has the plan, says which step it was.
        EndReason::StartFailed(_) => (Status::WorkerError, "the sandbox could not be set up".into()),
        EndReason::InputsNotWritten(InputsNotWritten::Refused(why)) => (Status::Rejected, why.clone()),
        EndReason::InputsNotWritten(InputsNotWritten::Failed(why)) => (Status::WorkerError, why.clone()),
        EndReason::ProtocolViolation => {
            (Status::WorkerError, "python sent something that is no report".into())
        }
    };
    let by_itself = matches!(seen.cause, EndReason::Ended) && status != Status::WorkerError;
    let (exit_code, signal) = match seen.exit {
        Exit::Code(code) if by_itself => (Some(code), None),
        Exit::Signal(number) if by_itself && status == Status::Signaled => (None, Some(signal::name(number))),
        _ => (None, None),
    };
    let syscall = match &seen.cause {
        EndReason::Forbidden(name) => Some(name.clone()),
        _ => None,
    };
    let milliseconds = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let handed_over = seen.handed_over.map(|(at, _)| at);
    let run = handed_over.map(|at| seen.finished - at);
    Outcome {
        status,
        exit_code,
        signal,
        syscall,
        error: (status != Status::Succeeded).then_some(error),
        stdout: seen.stdout,
        stderr: seen.stderr,
        artifacts: Vec::new(),
        blocked_syscalls: seen
            .refused
            .into_iter()
            .map(|(syscall, count)| BlockedSyscall { syscall, count })
            .collect(),
        usage: run.map(|run| Usage {
            wall_ms: milliseconds(run),
            cpu_user_ms: milliseconds(seen.resources.user),
            cpu_system_ms: milliseconds(seen.resources.system),
            memory_peak_bytes: seen.resources.peak_resident,
        }),
        // The caller knows.
        warm: false,
        start: handed_over.map(|at| at - taken),
        run,
        started_at: seen.handed_over.map(|(_, at)| at),
        finished_at: seen.finished_at,
    }
}

/// Whether it was refused a process or a thread. Without a control group what python says then is all there is to go by.
pub(in crate::sandbox) fn ran_out_of_processes(seen: &Observation) -> bool {
    let said = |words: &str| seen.stderr.bytes.windows(words.len()).any(|part| part == words.as_bytes());
    seen.ran_out_of_processes.unwrap_or_else(|| {
        said("can't start new thread") || said("[Errno 11] Resource temporarily unavailable")
    })
}

/// Names the limit in the error of a job that ran out of processes, and how much a job may ask for.
pub(in crate::sandbox) fn name_the_processes(outcome: &mut Outcome, limits: &Limits, maximum: u64) {
    let Some(error) = &mut outcome.error else { return };
    if !matches!(outcome.status, Status::Failed | Status::Signaled | Status::Timeout) {
        return;
    }
    let most = if limits.processes < maximum {
        format!("a job may ask for up to {maximum}")
    } else {
        "no job has more here".to_owned()
    };
    error.push_str(&format!(
        "; it was refused a process or a thread: `limits.processes` is {}, threads included, and {most}",
        limits.processes
    ));
}

/// The main process ended and nobody here had a hand in it.
fn ended(seen: &Observation, limits: &Limits) -> (Status, String) {
    let used = seen.resources.user + seen.resources.system;
    let cpu_is_over = used >= Duration::from_millis(limits.cpu_ms);
    match seen.exit {
        Exit::Code(0) => (Status::Succeeded, String::new()),
        Exit::Code(code) => (Status::Failed, format!("the job exited with code {code}")),
        // The kernel's own backstop, whose signals come without a sender.
        Exit::Signal(libc::SIGXCPU | libc::SIGKILL) if cpu_is_over => cpu_limit(limits),
        // The filter kills by itself only where there is no listener. Then this cannot be told from a SIGSYS
        // that the job sent itself.
        Exit::Signal(libc::SIGSYS) if seen.unnamed_kills => (
            Status::SyscallKilled,
            "the job made a forbidden system call; this system does not tell which".into(),
        ),
        Exit::Signal(number) => (Status::Signaled, format!("the job died of {}", signal::name(number))),
    }
}

fn cpu_limit(limits: &Limits) -> (Status, String) {
    (Status::CpuLimit, format!("the job used more than {} ms of CPU time", limits.cpu_ms))
}

fn describe(exit: Exit) -> String {
    match exit {
        Exit::Code(code) => format!("exit code {code}"),
        Exit::Signal(number) => format!("signal {}", signal::name(number)),
    }
}

/// Which step it was that failed, for a person.
/// The plans are those of the origin, of init and of the job.
pub(in crate::sandbox) fn failed_step(report: Report, [origin, init, wall]: &[Plan; 3]) -> String {
    let Report::Failed { stage, step, errno } = report else { return "no step failed".into() };
    let why = explained(&std::io::Error::from_raw_os_error(errno));
    let of = |plan: &Plan| {
        let found = usize::try_from(step).ok().and_then(|at| Steps::new(plan.bytes()).nth(at)?.ok());
        found.map_or_else(
            || "start a process".to_owned(),
            |step| match step.path() {
                Some(path) => format!("{} {}", step.name(), path.to_string_lossy()),
                None => step.name().to_owned(),
            },
        )
    };
    let (who, what) = match stage {
        Stage::Origin => ("make namespaces", of(origin)),
        Stage::Init => ("start init", of(init)),
        Stage::Wall => ("raise the outer wall", of(wall)),
        Stage::Exec => ("start python", "execve".to_owned()),
        Stage::Lockdown => ("lock down", lockdown::LockdownStep::name(step).to_owned()),
        Stage::Zygote if step == 0 => {
            ("make a zygote of python", "find where libc keeps the thread's id".to_owned())
        }
        Stage::Zygote => ("make a process from a warm one", "clone".to_owned()),
    };
    format!("failed to {who}: {what}: {why}")
}

#[cfg(test)]
mod tests;
