//! Watches one job from its start to the death of everything in it, and says what was seen.
//!
//! Nothing that the process prints or returns decides anything here except its own exit. What ended it is what
//! this loop itself did, or what the kernel told.

pub(super) mod census;
pub(super) mod events;
pub(super) mod live_output;
pub(super) mod streams;
pub(super) mod syscall_trace;
pub(super) mod verdict;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, SystemTime};

use sandpiper_shim::abi::Report;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::job::{Captured, InputFile, Limits, Stream};
use crate::sandbox::cgroup::Cgroup;
use crate::sandbox::host::PROCESSORS;
use crate::sandbox::inner_wall::{Judgement, Policy};
use crate::sandbox::supervise::census::{Census, Counted, Excess, OomKills};
use crate::sandbox::supervise::events::{asked, at, ended, read_report, receive};
use crate::sandbox::supervise::live_output::Tap;
use crate::sandbox::supervise::streams::{Input, Output};
use crate::sandbox::supervise::syscall_trace::Trace;
use crate::sandbox::workdir::inputs::{self, InputsNotWritten};
use crate::sys::job_dir::JobDir;
use crate::sys::launch::Launched;
use crate::sys::notify::{Listener, Notification};
use crate::sys::process::{Child, Exit, Resources};
use crate::sys::ready;

/// Refusals that are answered at once; after that each takes [`REFUSAL_DELAY`].
const PROMPT_REFUSALS: u64 = 1_000;
/// Slows a flood of refused calls down to what costs the worker nothing.
const REFUSAL_DELAY: Duration = Duration::from_millis(10);
/// Never look at the CPU clock, or at memory, more often than this.
const CPU_CHECK_MIN: Duration = Duration::from_millis(10);
/// A job that lost a process to its memory limit, or holds too much of what no limit of the kernel's counts, is noticed
/// within this.
const MEMORY_CHECK: Duration = Duration::from_millis(50);
/// So long a job's memory is looked at more often where no group counts it.
const COUNTED_CLOSELY: Duration = Duration::from_millis(300);

/// What ended a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum EndReason {
    /// Its main process ended by itself.
    Ended,
    /// Wall time over.
    Timeout,
    /// CPU time over.
    CpuLimit,
    /// The kernel killed one of its processes because the job's memory was over.
    MemoryLimit,
    /// The same because that of the machine, or of the container around, was over.
    MemoryElsewhere,
    /// It held more record locks of files than a job may.
    TooManyLocks,
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
    ProtocolViolation,
    /// Its files could not be laid into its working directory.
    InputsNotWritten(InputsNotWritten),
}

/// Everything that was seen of a job.
#[derive(Debug)]
pub(super) struct Observation {
    pub(super) cause: EndReason,
    pub(super) exit: Exit,
    pub(super) resources: Resources,
    /// Forbidden calls kill by themselves, and nobody is told which one it was.
    pub(super) unnamed_kills: bool,
    pub(super) stdout: Captured,
    pub(super) stderr: Captured,
    pub(super) refused: BTreeMap<String, u64>,
    /// It was refused a process or a thread because it had as many as it may have; none where nothing counts that.
    pub(super) ran_out_of_processes: Option<bool>,
    /// Its working directory; none where it did not come as far as that.
    pub(super) job_dir: Option<JobDir>,
    /// When the code was handed over; none where it never was.
    pub(super) handed_over: Option<(Instant, SystemTime)>,
    pub(super) finished: Instant,
    pub(super) finished_at: SystemTime,
}

/// The worker's ends of everything that leads into a job.
#[derive(Debug)]
pub(super) struct ParentEnds {
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
    /// Where all of its processes are; else each is looked at alone.
    pub(super) group: Option<&'a Cgroup>,
    /// What counts the kernel's kills where there is no group.
    pub(super) kills: Option<&'a OomKills>,
    pub(super) assignment: Vec<u8>,
    pub(super) stdin: Vec<u8>,
    pub(super) files: Vec<InputFile>,
    /// Shown its output as it is read.
    pub(super) tap: Option<Tap>,
    /// Takes notes of calls that are let through; none for a job.
    pub(super) trace: Option<&'a Trace>,
}

/// A job's processes, watched from their start until everything is dead. Dropped before that, it takes them
/// with it.
#[derive(Debug)]
pub(super) struct JobSupervisor {
    init: AsyncFd<Child>,
    job: AsyncFd<Child>,
    /// The report comes over it, and then the assignment goes.
    control: Option<AsyncFd<OwnedFd>>,
    listener: Option<AsyncFd<Listener>>,
    unnamed_kills: bool,
    stdout: Output,
    stderr: Output,
    stdin: Option<OwnedFd>,
    /// The job's uid on the host.
    owner: u32,
    job_dir: Option<JobDir>,
    handed_over: Option<(Instant, SystemTime)>,
    /// Where no group tells: what counts the kernel's kills around the job, and how many there had been.
    kills: Option<(OomKills, u64)>,
    /// Of what no group counts.
    census: Census,
    exit: Option<(Exit, Resources)>,
    refused: BTreeMap<String, u64>,
    refusals: u64,
    /// A refusal that is not answered before its time.
    waiting: Option<(Notification, i32, Instant)>,
}

impl JobSupervisor {
    /// `owner` is the job's uid on the host.
    pub(super) fn new(launched: Launched, ends: ParentEnds, owner: u32) -> io::Result<Self> {
        Ok(Self {
            init: ready::readable(launched.init)?,
            job: ready::readable(launched.job)?,
            control: Some(ready::readable(ends.control)?),
            listener: None,
            unnamed_kills: false,
            stdout: Output::new(ends.stdout)?,
            stderr: Output::new(ends.stderr)?,
            stdin: Some(ends.stdin),
            owner,
            job_dir: None,
            handed_over: None,
            kills: None,
            census: Census::new(),
            exit: None,
            refused: BTreeMap::new(),
            refusals: 0,
            waiting: None,
        })
    }

    /// The namespace's first process takes every other with it.
    fn kill(&self) {
        self.init.get_ref().kill();
        self.job.get_ref().kill();
    }

    /// Neither has it ended nor said anything further: it waits for its assignment.
    pub(super) fn still_waits(&mut self) -> bool {
        match self.job.get_ref().try_wait() {
            Ok(Some(exit)) => self.exit = Some(exit),
            Ok(None) => return true,
            Err(_) => {}
        }
        false
    }

    /// Watches until both walls are up. A cause is why they never will be.
    pub(super) async fn start(
        &mut self,
        by: Instant,
        limits: &Limits,
        stop: &CancellationToken,
    ) -> io::Result<Option<EndReason>> {
        loop {
            tokio::select! {
                biased;
                report = receive(&self.control) => {
                    match self.reported(report?)? {
                        Reported::Locked => return Ok(None),
                        Reported::Failed(cause) => return Ok(Some(cause)),
                        Reported::End => {}
                    }
                }
                exit = ended(&self.job) => {
                    self.exit = Some(exit?);
                    return Ok(Some(self.last_report().unwrap_or(EndReason::Ended)));
                }
                () = stop.cancelled() => return Ok(Some(EndReason::Cancelled)),
                () = sleep_until(by) => return Ok(Some(EndReason::StartTimeout)),
                // A preload may write, too.
                () = self.stdout.fill(limits.output_bytes), if self.stdout.is_open() => {}
                () = self.stderr.fill(limits.output_bytes), if self.stderr.is_open() => {}
            }
            if self.stdout.is_over() || self.stderr.is_over() {
                return Ok(Some(EndReason::OutputLimit));
            }
        }
    }

    /// Hands over the code, and watches until something ends the job.
    pub(super) async fn run(&mut self, terms: Terms<'_>, stop: &CancellationToken) -> io::Result<EndReason> {
        let Terms { limits, policy, group, trace, .. } = terms;
        let (Some(control), Some(stdin), Some(job_dir)) =
            (self.control.take(), self.stdin.take(), self.job_dir.take())
        else {
            return Ok(EndReason::ProtocolViolation);
        };
        match inputs::lay(job_dir, terms.files, *limits).await? {
            (job_dir, Ok(())) => self.job_dir = Some(job_dir),
            (_, Err(unlaid)) => return Ok(EndReason::InputsNotWritten(unlaid)),
        }
        self.stdout.begin(terms.tap.clone(), Stream::Stdout);
        self.stderr.begin(terms.tap, Stream::Stderr);
        let start = Instant::now();
        self.handed_over = Some((start, SystemTime::now()));
        self.kills = terms.kills.and_then(|kills| Some((kills.clone(), kills.count()?)));
        let mut assignment = Input::new(control.into_inner(), terms.assignment)?;
        let mut stdin = Input::new(stdin, terms.stdin)?;
        let deadline = start + Duration::from_millis(limits.timeout_ms);
        let cpu_limit = Duration::from_millis(limits.cpu_ms);
        // Where memory is only counted, what a job takes at once is taken at its beginning.
        let beginning = start + if group.is_none() { COUNTED_CLOSELY } else { Duration::ZERO };
        let mut next_check = start + if group.is_none() { CPU_CHECK_MIN } else { pause(cpu_limit) };
        loop {
            // In this order: no flood of output or of calls delays what ends the job.
            tokio::select! {
                biased;
                exit = ended(&self.job) => {
                    self.exit = Some(exit?);
                    return Ok(EndReason::Ended);
                }
                () = stop.cancelled() => return Ok(EndReason::Cancelled),
                () = sleep_until(deadline) => return Ok(EndReason::Timeout),
                () = sleep_until(next_check) => {
                    if let (Some(group), Some(main)) = (group, self.job.get_ref().pid()) {
                        self.census.sample(group, main);
                    }
                    if group.is_some_and(Cgroup::killed_for_memory) {
                        return Ok(EndReason::MemoryLimit);
                    }
                    if let Some(cause) = self.count(limits, group.is_some()).await {
                        return Ok(cause);
                    }
                    let used = group.and_then(Cgroup::cpu_time).or_else(|| self.job.get_ref().cpu_time());
                    let left = cpu_limit.saturating_sub(used.unwrap_or_default());
                    if left.is_zero() {
                        return Ok(EndReason::CpuLimit);
                    }
                    let closely = self.census.comes_near() || Instant::now() < beginning;
                    next_check = Instant::now() + if closely { CPU_CHECK_MIN } else { pause(left) };
                }
                () = at(self.waiting.map(|(_, _, when)| when)) => self.answer(),
                question = asked(&self.listener), if self.waiting.is_none() => {
                    if let (Some(trace), Some(listener)) = (trace, &self.listener) {
                        trace.pass(policy, listener.get_ref(), question);
                        continue;
                    }
                    match policy.judge(question.arch, question.number, &question.arguments) {
                        Judgement::Kill { name } => return Ok(EndReason::Forbidden(name.into_owned())),
                        Judgement::Refuse { name, errno } => self.refuse(question, &name, errno),
                    }
                }
                () = assignment.send(), if assignment.is_open() => {}
                () = self.stdout.fill(limits.output_bytes), if self.stdout.is_open() => {}
                () = self.stderr.fill(limits.output_bytes), if self.stderr.is_open() => {}
                () = stdin.send(), if stdin.is_open() => {}
            }
            if self.stdout.is_over() || self.stderr.is_over() {
                return Ok(EndReason::OutputLimit);
            }
        }
    }

    /// Counts what its processes hold together, where it is time to.
    async fn count(&mut self, limits: &Limits, grouped: bool) -> Option<EndReason> {
        let roots = [self.init.get_ref().pid()?, self.job.get_ref().pid()?];
        let memory = (!grouped).then(|| Counted {
            files: self.job_dir.as_ref().map_or(0, JobDir::used),
            limit: limits.memory_bytes,
        });
        match self.census.take(roots, memory).await? {
            Excess::Locks => Some(EndReason::TooManyLocks),
            Excess::Memory => Some(EndReason::MemoryLimit),
        }
    }

    /// Kills what is left, and tells what was seen once the last of it is gone.
    ///
    /// # Errors
    /// A child that cannot be waited for.
    pub(super) async fn finish(
        mut self,
        cause: EndReason,
        limits: &Limits,
        group: Option<&Cgroup>,
    ) -> io::Result<Observation> {
        self.kill();
        let (exit, mut resources) = match self.exit {
            Some(exit) => exit,
            None => ended(&self.job).await?,
        };
        ended(&self.init).await?;
        let stdout = self.stdout.finish(limits.output_bytes);
        let stderr = self.stderr.finish(limits.output_bytes);
        if let Some(group) = group {
            let used = group.used();
            // Each has seen something that the other has not: the group all processes, though with coarser times;
            // the main process what it did before it entered.
            resources.user = resources.user.max(used.user);
            resources.system = resources.system.max(used.system);
        }
        let peak = self.census.peak(resources.peak_resident, group);
        resources.peak_resident = if group.is_some() { peak.min(limits.memory_bytes) } else { peak };
        let cause = match cause {
            // Its end may have come before anyone looked; and where its start failed, that is why.
            EndReason::Ended | EndReason::StartFailed(_) | EndReason::MemoryLimit
                if group.is_some_and(Cgroup::killed_for_memory) =>
            {
                let own = group.is_none_or(|group| group.came_near(limits.memory_bytes));
                if own { EndReason::MemoryLimit } else { EndReason::MemoryElsewhere }
            }
            // Nobody else sends it this signal but the job itself.
            EndReason::Ended
                if exit == Exit::Signal(libc::SIGKILL)
                    && self
                        .kills
                        .is_some_and(|(kills, before)| kills.count().is_some_and(|now| now > before)) =>
            {
                EndReason::MemoryElsewhere
            }
            // The last of it was still in the pipe.
            EndReason::Ended if stdout.truncated || stderr.truncated => EndReason::OutputLimit,
            cause => cause,
        };
        Ok(Observation {
            ran_out_of_processes: group.map(Cgroup::ran_out_of_processes),
            cause,
            exit,
            resources,
            unnamed_kills: self.unnamed_kills,
            stdout,
            stderr,
            refused: std::mem::take(&mut self.refused),
            job_dir: self.job_dir.take(),
            handed_over: self.handed_over,
            finished: Instant::now(),
            finished_at: SystemTime::now(),
        })
    }

    /// The process has said how its start went.
    fn reported(&mut self, received: (Option<Report>, Vec<OwnedFd>)) -> io::Result<Reported> {
        let (report, fds) = received;
        let mut fds = fds.into_iter();
        let job_dir = match (report, fds.next(), fds.next(), fds.next()) {
            (Some(Report::Locked), Some(listener), Some(job_dir), None) => {
                self.listener = Some(ready::readable(Listener::new(listener))?);
                job_dir
            }
            (Some(Report::LockedWithoutListener), Some(job_dir), None, None) => {
                self.unnamed_kills = true;
                job_dir
            }
            (Some(report @ Report::Failed { .. }), ..) => {
                return Ok(Reported::Failed(EndReason::StartFailed(report)));
            }
            // The end of the socket is the end of the process, or will be.
            (None, None, ..) => {
                self.control = None;
                return Ok(Reported::End);
            }
            _ => return Ok(Reported::Failed(EndReason::ProtocolViolation)),
        };
        // A preload could have sent another directory than the job's own.
        let Ok(job_dir) = JobDir::new(job_dir, self.owner) else {
            return Ok(Reported::Failed(EndReason::ProtocolViolation));
        };
        self.job_dir = Some(job_dir);
        Ok(Reported::Locked)
    }

    /// What a process said just before it ended, where that has not been read yet.
    fn last_report(&self) -> Option<EndReason> {
        let control = self.control.as_ref()?;
        match read_report(control.get_ref()) {
            Ok((Some(report @ Report::Failed { .. }), _)) => Some(EndReason::StartFailed(report)),
            _ => None,
        }
    }

    fn refuse(&mut self, question: Notification, name: &str, errno: i32) {
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

/// What a report means for a start.
enum Reported {
    Locked,
    Failed(EndReason),
    End,
}

/// How long nothing need be looked at, with so much CPU time left.
fn pause(left: Duration) -> Duration {
    earliest_exhaustion(left).min(MEMORY_CHECK)
}

/// The earliest that so much CPU time can have been used: with every processor busy for the job.
fn earliest_exhaustion(left: Duration) -> Duration {
    (left / *PROCESSORS).max(CPU_CHECK_MIN)
}
