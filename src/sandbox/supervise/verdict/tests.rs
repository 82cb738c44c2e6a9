//! The table of verdicts: what ended a job, how its process ended and how far it was, and the status that comes of it.
//! The README's table of statuses is held equal to it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use super::*;
use crate::job::{Bounds, Captured};
use crate::sys::process::Resources;

/// How far a job was when it ended.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    /// Before the lockdown, with nothing of the publisher's in the process.
    Starting,
    /// Before the lockdown, and a preload runs.
    Preload,
    /// The code was handed over.
    Running,
}

use Phase::{Preload, Running, Starting};

/// The process was killed by the worker.
const KILLED: Exit = Exit::Signal(libc::SIGKILL);
const FAILED_STEP: Report = Report::Failed { stage: Stage::Wall, step: 0, errno: libc::EPERM };

fn seen(cause: EndReason, exit: Exit, phase: Phase) -> Observation {
    let (now, wall) = (Instant::now(), SystemTime::now());
    let nothing = || Captured { bytes: Vec::new(), truncated: false };
    Observation {
        cause,
        exit,
        resources: Resources::default(),
        unnamed_kills: false,
        stdout: nothing(),
        stderr: nothing(),
        refused: BTreeMap::new(),
        ran_out_of_processes: Some(false),
        job_dir: None,
        handed_over: (phase == Running).then_some((now, wall)),
        finished: now,
        finished_at: wall,
    }
}

fn status_of(seen: Observation, phase: Phase) -> Outcome {
    judge(seen, &Bounds::default().default, phase == Preload, Instant::now())
}

/// Each with what the README says of it.
fn table() -> Vec<(EndReason, Exit, Phase, Status, &'static str)> {
    let refused = || EndReason::InputsNotWritten(InputsNotWritten::Refused("two files of one name".into()));
    let failed = || EndReason::InputsNotWritten(InputsNotWritten::Failed("no space on the device".into()));
    vec![
        (EndReason::Ended, Exit::Code(0), Running, Status::Succeeded, "exit code 0"),
        (EndReason::Ended, Exit::Code(3), Running, Status::Failed, "any other exit code"),
        // What a program claims is not believed.
        (EndReason::Ended, Exit::Code(137), Running, Status::Failed, "any other exit code"),
        (EndReason::Ended, Exit::Code(0), Preload, Status::Succeeded, "exit code 0"),
        (EndReason::Ended, Exit::Code(3), Preload, Status::Failed, "any other exit code"),
        (EndReason::Ended, Exit::Code(0), Starting, Status::WorkerError, "our fault"),
        (EndReason::Ended, Exit::Signal(libc::SIGSEGV), Starting, Status::WorkerError, "our fault"),
        (EndReason::Ended, Exit::Signal(libc::SIGSEGV), Running, Status::Signaled, "died of a signal"),
        (EndReason::Ended, Exit::Signal(libc::SIGSYS), Running, Status::Signaled, "died of a signal"),
        (EndReason::Ended, KILLED, Running, Status::Signaled, "died of a signal"),
        (EndReason::Timeout, KILLED, Running, Status::Timeout, "wall time over"),
        (EndReason::StartTimeout, KILLED, Preload, Status::Timeout, "wall time over"),
        (EndReason::StartTimeout, KILLED, Starting, Status::WorkerError, "our fault"),
        (EndReason::CpuLimit, KILLED, Running, Status::CpuLimit, "that limit was reached"),
        (EndReason::MemoryLimit, KILLED, Starting, Status::MemoryLimit, "that limit was reached"),
        (EndReason::MemoryLimit, KILLED, Preload, Status::MemoryLimit, "that limit was reached"),
        (EndReason::MemoryLimit, KILLED, Running, Status::MemoryLimit, "that limit was reached"),
        (EndReason::TooManyLocks, KILLED, Running, Status::MemoryLimit, "that limit was reached"),
        (EndReason::MemoryElsewhere, KILLED, Running, Status::WorkerError, "our fault"),
        (EndReason::OutputLimit, KILLED, Preload, Status::OutputLimit, "that limit was reached"),
        (EndReason::OutputLimit, KILLED, Running, Status::OutputLimit, "that limit was reached"),
        // It may have ended before it could be killed.
        (EndReason::OutputLimit, Exit::Code(0), Running, Status::OutputLimit, "that limit was reached"),
        (
            EndReason::Forbidden("mount".into()),
            KILLED,
            Running,
            Status::SyscallKilled,
            "a forbidden system call",
        ),
        (EndReason::Cancelled, KILLED, Starting, Status::Cancelled, "stopped on request"),
        (EndReason::Cancelled, KILLED, Running, Status::Cancelled, "stopped on request"),
        (EndReason::StartFailed(FAILED_STEP), Exit::Code(125), Starting, Status::WorkerError, "our fault"),
        (EndReason::ProtocolViolation, KILLED, Preload, Status::WorkerError, "our fault"),
        (refused(), KILLED, Starting, Status::Rejected, "not acceptable, never run"),
        (failed(), KILLED, Starting, Status::WorkerError, "our fault"),
    ]
}

/// What a job gets that never came to the sandbox.
const WITHOUT_A_RUN: [(Status, &str); 2] =
    [(Status::Expired, "past its deadline"), (Status::Rejected, "not acceptable, never run")];

#[test]
fn every_end_has_its_verdict() {
    for (cause, exit, phase, expected, _) in table() {
        let what = format!("{cause:?}, {exit:?}, {phase:?}");
        let outcome = status_of(seen(cause, exit, phase), phase);
        assert_eq!(outcome.status, expected, "{what}");
        assert_eq!(outcome.error.is_none(), expected == Status::Succeeded, "{what}: {:?}", outcome.error);
        // A code or a signal stands for how a job ended by itself, and for nothing else.
        let own = matches!(expected, Status::Succeeded | Status::Failed);
        assert_eq!(outcome.exit_code.is_some(), own, "{what}");
        assert_eq!(outcome.signal.is_some(), expected == Status::Signaled, "{what}");
        assert_eq!(outcome.syscall.is_some(), expected == Status::SyscallKilled, "{what}");
        assert_eq!(outcome.usage.is_some(), phase == Running, "{what}");
    }
}

#[test]
fn the_kernels_own_signals_are_told_from_the_jobs() {
    let limits = Bounds::default().default;
    let over = Duration::from_millis(limits.cpu_ms);
    for signal in [libc::SIGXCPU, libc::SIGKILL] {
        let mut spent = seen(EndReason::Ended, Exit::Signal(signal), Running);
        spent.resources.user = over;
        assert_eq!(status_of(spent, Running).status, Status::CpuLimit);
    }
    let mut unnamed = seen(EndReason::Ended, Exit::Signal(libc::SIGSYS), Running);
    unnamed.unnamed_kills = true;
    assert_eq!(status_of(unnamed, Running).status, Status::SyscallKilled);
}

#[test]
fn the_readme_has_the_same_table() {
    let readme = include_str!("../../../../README.md");
    let rows = readme.lines().skip_while(|line| !line.starts_with("| status | when |")).skip(2);
    let mut when: BTreeMap<&str, &str> = BTreeMap::new();
    for row in rows.take_while(|line| line.starts_with('|')) {
        let cells: Vec<&str> = row.split(" | ").map(|cell| cell.trim_matches(['|', ' '])).collect();
        for status in cells[0].split(", ") {
            assert_eq!(when.insert(status.trim_matches('`'), cells[1]), None, "{status} is there twice");
        }
    }
    let all: BTreeSet<&str> = Status::ALL.iter().map(|status| status.as_str()).collect();
    assert_eq!(when.keys().copied().collect::<BTreeSet<_>>(), all);
    let verdicts = table().into_iter().map(|(.., status, why)| (status, why)).chain(WITHOUT_A_RUN);
    let mut reached = BTreeSet::new();
    for (status, why) in verdicts {
        let said = when[status.as_str()];
        assert!(said.contains(why), "{}: the README says {said:?}, and not {why:?}", status.as_str());
        reached.insert(status.as_str());
    }
    assert_eq!(reached, all, "each status has a verdict that leads to it");
}
