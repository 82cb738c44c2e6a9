//! Watches one job from its start to the death of everything in it, and says what was seen.
//!
//! Nothing that the process prints or returns decides anything here except its own exit. What ended it is what
//! this loop itself did, or what the kernel told.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, SystemTime};

use sandpiper_shim::abi::{REPORT_LEN, Report};
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::policy::{Judgement, Policy};
use super::streams::{Input, Output};
use crate::job::{Captured, Limits};
use crate::sys::launch::Launched;
use crate::sys::notify::{Listener, Question};
use crate::sys::process::{Child, Exit, Resources};
use crate::sys::{fd, ready};

/// Refusals that are answered at once; after that each takes [`REFUSAL_DELAY`].
const PROMPT_REFUSALS: u64 = 1_000;
/// Slows a flood of refused calls down to what costs the worker nothing.
const REFUSAL_DELAY: Duration = Duration::from_millis(10);
/// Never look at the CPU clock more often than this.
const CPU_CHECK_MIN: Duration = Duration::from_millis(10);

/// What ended a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// Its main process ended by itself.
    Ended,
    /// Wall time over.
    Timeout,
    /// CPU time over.
    CpuLimit,
    /// It wrote too much.
    OutputLimit,
    /// It made this forbidden call.
    Forbidden(String),
    /// It was asked to stop.
    Cancelled,
    /// A step of the start failed.
    StartFailed(Report),
    /// It did not come as far as the hand-over in time.
    StartTimeout,
    /// It sent something that is no report.
    Garbled,
}

/// Everything that was seen of a job.
#[derive(Debug)]
pub(super) struct Observation {
    pub(super) cause: Cause,
    pub(super) exit: Exit,
    pub(super) resources: Resources,
    /// Forbidden calls kill by themselves, and nobody is told which one it was.
    pub(super) unnamed_kills: bool,
    pub(super) stdout: Captured,
    pub(super) stderr: Captured,
    pub(super) refused: BTreeMap<String, u64>,
    /// When the code was handed over; none where it never was.
    pub(super) handed_over: Option<(Instant, SystemTime)>,
    pub(super) finished: Instant,
    pub(super) finished_at: SystemTime,
}

/// The worker's ends of everything that leads into a job.
#[derive(Debug)]
pub(super) struct Ends {
    pub(super) control: OwnedFd,
    pub(super) stdin: OwnedFd,
    pub(super) stdout: OwnedFd,
    pub(super) stderr: OwnedFd,
}

/// What a job is given, and how long.
#[derive(Debug)]
pub(super) struct Terms<'a> {
    pub(super) limits: &'a Limits,
    pub(super) policy: &'a Policy,
    pub(super) start_by: Instant,
    /// The wall has left the limit of open files to be set once the process is locked down.
    pub(super) limits_files: bool,
    pub(super) assignment: Vec<u8>,
    pub(super) stdin: Vec<u8>,
}

/// Watches until everything of the job is dead.
///
/// # Errors
/// Our own trouble with descriptors, or with a child that cannot be waited for.
pub(super) async fn watch(
    launched: Launched,
    ends: Ends,
    mut terms: Terms<'_>,
    stop: &CancellationToken,
) -> io::Result<Observation> {
    let init = ready::readable(launched.init)?;
    let job = ready::readable(launched.job)?;
    let mut watch = Watch {
        job,
        control: Some(ready::readable(ends.control)?),
        listener: None,
        unnamed_kills: false,
        stdout: Output::new(ends.stdout, terms.limits.output_bytes)?,
        stderr: Output::new(ends.stderr, terms.limits.output_bytes)?,
        stdin: Input::new(ends.stdin, std::mem::take(&mut terms.stdin))?,
        assignment: None,
        deadline: terms.start_by,
        cpu_check: None,
        handed_over: None,
        exit: None,
        refused: BTreeMap::new(),
        refusals: 0,
        waiting: None,
    };
    let cause = watch.until_over(terms, stop).await;
    // The namespace's first process takes every other with it, and is gone when the last of them is.
    init.get_ref().kill();
    watch.job.get_ref().kill();
    let (exit, resources) = match watch.exit {
        Some(exit) => exit,
        None => ended(&watch.job).await?,
    };
    ended(&init).await?;
    let (stdout, stderr) = (watch.stdout.finish(), watch.stderr.finish());
    let cause = match cause? {
        // The last of it was still in the pipe.
        Cause::Ended if stdout.truncated || stderr.truncated => Cause::OutputLimit,
        cause => cause,
    };
    Ok(Observation {
        cause,
        exit,
        resources,
        unnamed_kills: watch.unnamed_kills,
        stdout,
        stderr,
        refused: watch.refused,
        handed_over: watch.handed_over,
        finished: Instant::now(),
        finished_at: SystemTime::now(),
    })
}

#[derive(Debug)]
struct Watch {
    job: AsyncFd<Child>,
    /// Until the report has come.
    control: Option<AsyncFd<OwnedFd>>,
    listener: Option<AsyncFd<Listener>>,
    unnamed_kills: bool,
    stdout: Output,
    stderr: Output,
    stdin: Input,
    /// The hand-over, once the report has come.
    assignment: Option<Input>,
    /// Of the start, then of the run.
    deadline: Instant,
    cpu_check: Option<Instant>,
    handed_over: Option<(Instant, SystemTime)>,
    exit: Option<(Exit, Resources)>,
    refused: BTreeMap<String, u64>,
    refusals: u64,
    /// A refusal that is not answered before its time.
    waiting: Option<(Question, i32, Instant)>,
}

impl Watch {
    async fn until_over(&mut self, terms: Terms<'_>, stop: &CancellationToken) -> io::Result<Cause> {
        let Terms { limits, policy, limits_files, .. } = terms;
        let mut assignment = Some(terms.assignment);
        loop {
            // In this order: what happened first is likelier to be seen first, and a flood of output or of calls
            // delays nothing that ends the job.
            tokio::select! {
                biased;
                report = receive(&self.control) => {
                    if let Some(cause) = self.reported(report?, &mut assignment, limits, limits_files)? {
                        return Ok(cause);
                    }
                }
                exit = ended(&self.job) => {
                    self.exit = Some(exit?);
                    return Ok(self.last_report().unwrap_or(Cause::Ended));
                }
                () = stop.cancelled() => return Ok(Cause::Cancelled),
                () = sleep_until(self.deadline) => {
                    return Ok(if self.handed_over.is_some() { Cause::Timeout } else { Cause::StartTimeout });
                }
                () = at(self.cpu_check) => {
                    if self.cpu_is_over(limits) {
                        return Ok(Cause::CpuLimit);
                    }
                }
                () = at(self.waiting.map(|(_, _, when)| when)) => self.answer(),
                question = asked(&self.listener), if self.waiting.is_none() => {
                    match policy.judge(question.arch, question.number, &question.arguments) {
                        Judgement::Kill { name } => return Ok(Cause::Forbidden(name.into_owned())),
                        Judgement::Refuse { name, errno } => self.refuse(question, &name, errno),
                    }
                }
                () = self.stdout.fill(), if self.stdout.is_open() => {}
                () = self.stderr.fill(), if self.stderr.is_open() => {}
                () = self.stdin.send(), if self.stdin.is_open() => {}
                () = send(&mut self.assignment) => {}
            }
            if self.stdout.is_over() || self.stderr.is_over() {
                return Ok(Cause::OutputLimit);
            }
        }
    }

    /// The process has said how its start went. With the walls up, it gets what it is to run.
    fn reported(
        &mut self,
        (report, listener): (Option<Report>, Option<OwnedFd>),
        assignment: &mut Option<Vec<u8>>,
        limits: &Limits,
        limits_files: bool,
    ) -> io::Result<Option<Cause>> {
        match (report, listener) {
            (Some(Report::Locked), Some(listener)) => {
                let listener = Listener::new(listener);
                self.listener = Some(ready::readable(listener)?);
            }
            (Some(Report::LockedWithoutListener), None) => self.unnamed_kills = true,
            (Some(report @ Report::Failed { .. }), _) => return Ok(Some(Cause::StartFailed(report))),
            // The end of the socket is the end of the process, or will be.
            (None, None) => {
                self.control = None;
                return Ok(None);
            }
            _ => return Ok(Some(Cause::Garbled)),
        }
        if limits_files {
            self.job.get_ref().limit_open_files(limits.open_files)?;
        }
        if let (Some(control), Some(assignment)) = (self.control.take(), assignment.take()) {
            self.assignment = Some(Input::new(control.into_inner(), assignment)?);
        }
        let now = Instant::now();
        self.handed_over = Some((now, SystemTime::now()));
        self.deadline = now + Duration::from_millis(limits.timeout_ms);
        self.cpu_check = Some(now + soonest(Duration::from_millis(limits.cpu_ms)));
        Ok(None)
    }

    /// What a process said just before it ended, where that has not been read yet.
    fn last_report(&self) -> Option<Cause> {
        let control = self.control.as_ref()?;
        match read_report(control.get_ref()) {
            Ok((Some(report @ Report::Failed { .. }), _)) => Some(Cause::StartFailed(report)),
            _ => None,
        }
    }

    fn cpu_is_over(&mut self, limits: &Limits) -> bool {
        let limit = Duration::from_millis(limits.cpu_ms);
        let used = self.job.get_ref().cpu_time().unwrap_or_default();
        self.cpu_check = Some(Instant::now() + soonest(limit.saturating_sub(used)));
        used >= limit
    }

    fn refuse(&mut self, question: Question, name: &str, errno: i32) {
        *self.refused.entry(name.to_owned()).or_default() += 1;
        self.refusals += 1;
        let delay = if self.refusals > PROMPT_REFUSALS { REFUSAL_DELAY } else { Duration::ZERO };
        self.waiting = Some((question, errno, Instant::now() + delay));
        if delay.is_zero() {
            self.answer();
        }
    }

    fn answer(&mut self) {
        if let (Some((question, errno, _)), Some(listener)) = (self.waiting.take(), &self.listener) {
            listener.get_ref().refuse(question, errno);
        }
    }
}

/// The earliest that so much CPU time can have been used: with every processor busy for the job.
fn soonest(left: Duration) -> Duration {
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    (left / u32::try_from(processors).unwrap_or(u32::MAX)).max(CPU_CHECK_MIN)
}

/// Collects a child when it has ended.
async fn ended(child: &AsyncFd<Child>) -> io::Result<(Exit, Resources)> {
    loop {
        let mut ready = child.readable().await?;
        match child.get_ref().try_wait()? {
            Some(exit) => return Ok(exit),
            None => ready.clear_ready(),
        }
    }
}

async fn at(when: Option<Instant>) {
    match when {
        Some(when) => sleep_until(when).await,
        None => std::future::pending().await,
    }
}

async fn send(input: &mut Option<Input>) {
    match input {
        Some(open) if open.is_open() => open.send().await,
        _ => std::future::pending().await,
    }
}

/// The next question of the kernel's; for ever pending where there is no listener.
async fn asked(listener: &Option<AsyncFd<Listener>>) -> Question {
    let Some(listener) = listener else { return std::future::pending().await };
    loop {
        let Ok(mut ready) = listener.readable().await else { return std::future::pending().await };
        match listener.get_ref().receive() {
            Ok(question) => return question,
            // The process that asked is gone.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
            // Nobody is left to ask. Readiness would never end now, so it is not waited for.
            Err(_) => return std::future::pending().await,
        }
    }
}

/// The report, and the listener beside it; nothing where the socket ended.
async fn receive(control: &Option<AsyncFd<OwnedFd>>) -> io::Result<(Option<Report>, Option<OwnedFd>)> {
    let Some(control) = control else { return std::future::pending().await };
    loop {
        let mut ready = control.readable().await?;
        match read_report(control.get_ref()) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
            other => return other,
        }
    }
}

/// A report is written at once and so read at once; anything shorter is none, and what is none but brings a
/// descriptor is garbled.
pub(super) fn read_report(control: &OwnedFd) -> io::Result<(Option<Report>, Option<OwnedFd>)> {
    use std::os::fd::AsFd;
    let mut bytes = [0; REPORT_LEN];
    let received = fd::receive(control.as_fd(), &mut bytes)?;
    if received.length == 0 {
        return Ok((None, None));
    }
    let report = (received.length == REPORT_LEN).then(|| Report::decode(&bytes)).flatten();
    report.map(|report| (Some(report), received.fd)).ok_or_else(|| io::ErrorKind::InvalidData.into())
}
