//! Warm starts: one zygote an environment, which has done the imports, and standby children made from it.
//!
//! A keeper task starts the zygote, starts it again when it is gone, and keeps a few children standing by: both
//! walls up, the filter on, waiting for a job. A job takes one of them, or has one made for it where its limits
//! are not the default ones. Whatever cannot be had here at the moment is had by a cold start.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{Notify, watch as channel};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::job::Limits;
use crate::ops::metrics::Metrics;
use crate::sandbox::environment::Environment;
use crate::sandbox::identity::IdentityLease;
use crate::sandbox::outer_wall::plan::Plan;
use crate::sandbox::start::StartContext;
use crate::sandbox::start::zygote::{Process, ZygoteNamespace};
use crate::sandbox::supervise::verdict;
use crate::sandbox::supervise::{EndReason, JobSupervisor};

/// Forks after which a zygote is replaced, so that not every job for ever has the same address layout.
const FORKS: u64 = 5_000;
const FIRST_DELAY: Duration = Duration::from_millis(200);
const LONGEST_DELAY: Duration = Duration::from_secs(30);

/// The warm side of one environment.
#[derive(Debug)]
pub(in crate::sandbox) struct WarmPool {
    process: tokio::sync::Mutex<Option<Process>>,
    standby: Mutex<VecDeque<Standby>>,
    /// A child was taken, or the zygote is gone: the keeper has something to do.
    wake: Notify,
    keeper: Mutex<Option<JoinHandle<()>>>,
    ended: CancellationToken,
    state: channel::Sender<State>,
}

/// How far a zygote is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Starting,
    /// As many children stand by as should.
    Ready,
    /// Why it could not be started; the keeper tries again.
    Failed(String),
}

/// A job's process before its job.
#[derive(Debug)]
pub(in crate::sandbox) struct Standby {
    pub(in crate::sandbox) supervisor: JobSupervisor,
    pub(in crate::sandbox) lease: IdentityLease,
    pub(in crate::sandbox) generation: Arc<ZygoteNamespace>,
}

impl WarmPool {
    pub(in crate::sandbox) fn new() -> Self {
        Self {
            process: tokio::sync::Mutex::new(None),
            standby: Mutex::default(),
            wake: Notify::new(),
            keeper: Mutex::default(),
            ended: CancellationToken::new(),
            state: channel::Sender::new(State::Starting),
        }
    }

    /// Starts the keeper, once. It counts where there are metrics.
    pub(in crate::sandbox) fn keep(
        self: &Arc<Self>,
        context: &Arc<StartContext>,
        environment: &Arc<Environment>,
        metrics: Option<&Metrics>,
    ) {
        let mut keeper = self.keeper.lock().unwrap_or_else(PoisonError::into_inner);
        if keeper.is_none() {
            let (pool, context) = (Arc::downgrade(self), Arc::downgrade(context));
            *keeper = Some(tokio::spawn(keep(pool, context, Arc::clone(environment), metrics.cloned())));
        }
    }

    /// Ends the zygote and every child that stands by.
    pub(in crate::sandbox) async fn end(&self, limits: &Limits) {
        self.ended.cancel();
        let keeper = self.keeper.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(keeper) = keeper {
            // Were it cut short, a child that it is making would be left behind.
            let _ = keeper.await;
        }
        let process = self.process.lock().await.take();
        let standing = std::mem::take(&mut *self.standby.lock().unwrap_or_else(PoisonError::into_inner));
        for standby in standing {
            let group = standby.lease.group.as_ref();
            let _ = standby.supervisor.finish(EndReason::Cancelled, limits, group).await;
        }
        if let Some(process) = process {
            process.end().await;
        }
    }

    /// Waits until the first children stand by, or says why there are none.
    pub(in crate::sandbox) async fn ready(&self) -> Result<(), String> {
        let mut state = self.state.subscribe();
        match state.wait_for(|state| *state != State::Starting).await.as_deref() {
            Ok(State::Failed(why)) => Err(why.clone()),
            _ => Ok(()),
        }
    }

    /// Why it could not be started, while that is so.
    pub(in crate::sandbox) fn failure(&self) -> Option<String> {
        match &*self.state.borrow() {
            State::Failed(why) => Some(why.clone()),
            State::Starting | State::Ready => None,
        }
    }

    /// Children that stand by.
    fn standing(&self) -> usize {
        self.standby.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// A child that stands by, where there is one that can take these limits on.
    pub(in crate::sandbox) fn take(&self, default: &Limits, limits: &Limits) -> Option<Standby> {
        loop {
            let standby = {
                let mut standby = self.standby.lock().unwrap_or_else(PoisonError::into_inner);
                match standby.front() {
                    Some(first) if !fits(default, limits, first.lease.group.is_some()) => return None,
                    _ => standby.pop_front(),
                }
            };
            self.wake.notify_one();
            let mut standby = standby?;
            if standby.supervisor.still_waits() {
                return Some(standby);
            }
        }
    }

    /// A child made for these limits. Where there is no zygote at the moment the error is `NotConnected`.
    pub(in crate::sandbox) async fn make(
        &self,
        context: &StartContext,
        environment: &Environment,
        mut lease: IdentityLease,
        limits: &Limits,
    ) -> io::Result<Standby> {
        if let Some(group) = &mut lease.group {
            group.begin(limits).await.map_err(io::Error::other)?;
        }
        let mut process = self.process.lock().await;
        let alive = process
            .as_mut()
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotConnected, "there is no zygote at the moment"))?;
        let made = alive.fork(context, environment, &lease, limits).await;
        let forked = match made {
            Ok(forked) => forked,
            Err(error) => {
                *process = None;
                self.wake.notify_one();
                return Err(error);
            }
        };
        let generation = alive.generation();
        if alive.forks() >= FORKS {
            *process = None;
            self.wake.notify_one();
        }
        drop(process);
        let (mut supervisor, plan) = forked;
        let by = Instant::now() + context.timeout;
        let started = match supervisor.start(by, limits, &self.ended).await {
            Ok(started) => started,
            Err(error) => {
                supervisor.finish(EndReason::Cancelled, limits, lease.group.as_ref()).await?;
                return Err(error);
            }
        };
        match started {
            None => Ok(Standby { supervisor, lease, generation }),
            Some(cause) => {
                let why = explain(&cause, &plan);
                supervisor.finish(cause, limits, lease.group.as_ref()).await?;
                Err(io::Error::other(why))
            }
        }
    }
}

/// Why a warm start failed, for a person.
fn explain(cause: &EndReason, plan: &Plan) -> String {
    match cause {
        EndReason::StartFailed(report) => {
            verdict::failed_step(*report, &[Plan::default(), Plan::default(), plan.clone()])
        }
        other => format!("a child of the zygote was not ready: {other:?}"),
    }
}

/// Whether a child with the default limits can run a job with these. What the worker itself watches over,
/// wall time and output, does not matter; nor what can be set from outside on a child that is in a control group.
fn fits(default: &Limits, limits: &Limits, grouped: bool) -> bool {
    let inside = |limits: &Limits| (limits.open_files, limits.disk_bytes);
    // Its own rlimits stay above: they hold no job back that may have no more than the default.
    let outside = if grouped {
        limits.processes <= default.processes && limits.cpu_ms <= default.cpu_ms
    } else {
        let whole = |limits: &Limits| (limits.memory_bytes, limits.processes, limits.cpu_ms);
        whole(default) == whole(limits)
    };
    inside(default) == inside(limits) && outside
}

async fn keep(
    zygote: Weak<WarmPool>,
    weak: Weak<StartContext>,
    environment: Arc<Environment>,
    metrics: Option<Metrics>,
) {
    let mut started_before = false;
    let mut delays = crate::retry::Delays::new(FIRST_DELAY, LONGEST_DELAY);
    let name = environment.name.clone();
    while let (Some(zygote), Some(context)) = (zygote.upgrade(), weak.upgrade()) {
        if zygote.ended.is_cancelled() {
            return;
        }
        let tended = tend(&zygote, &context, &environment).await;
        if let Some(metrics) = &metrics {
            metrics.standby(&name, zygote.standing());
            if tended.is_ok() || !zygote.ended.is_cancelled() {
                metrics.zygote(&name, tended.is_ok());
            }
            if matches!(tended, Ok(true)) && started_before {
                metrics.zygote_restarted(&name);
            }
        }
        match tended {
            Ok(started) => {
                started_before |= started;
                delays.reset();
                zygote.state.send_replace(State::Ready);
                drop(context);
                tokio::select! {
                    () = zygote.wake.notified() => {}
                    () = zygote.ended.cancelled() => return,
                    // Looks now and then whether the sandbox is still there.
                    () = tokio::time::sleep(LONGEST_DELAY) => {}
                }
            }
            // What was cut off is no fault.
            Err(_) if zygote.ended.is_cancelled() => return,
            Err(error) => {
                let delay = delays.next_delay();
                let retry_ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
                tracing::error!(environment = name, %error, retry_ms, "no warm start at the moment");
                zygote.state.send_replace(State::Failed(error.to_string()));
                drop(context);
                tokio::select! {
                    () = tokio::time::sleep(delay) => {}
                    () = zygote.ended.cancelled() => return,
                }
            }
        }
    }
}

/// Starts the zygote where there is none, and makes the children that are missing, all at one time: while one
/// raises its walls, the next can be forked. Tells whether it has started a zygote.
async fn tend(zygote: &WarmPool, context: &StartContext, environment: &Environment) -> io::Result<bool> {
    let mut process = zygote.process.lock().await;
    let start = process.is_none() && !zygote.ended.is_cancelled();
    if start {
        *process = Some(Process::start(context, environment).await?);
    }
    drop(process);
    let (mut making, mut made_all) = (FuturesUnordered::new(), Ok(start));
    loop {
        while made_all.is_ok()
            && zygote.standing() + making.len() < environment.standby
            && !zygote.ended.is_cancelled()
        {
            // There is a seat for each slot and each child; without one, more jobs run than there are slots.
            let Some(lease) = context.seats.try_take() else { break };
            making.push(zygote.make(context, environment, lease, &context.default_limits));
        }
        // None is dropped half made: the zygote's answer would be taken for that to another order.
        tokio::select! {
            made = making.next() => match made {
                Some(Ok(made)) => {
                    zygote.standby.lock().unwrap_or_else(PoisonError::into_inner).push_back(made);
                }
                // The first says why; those after it may only miss the zygote.
                Some(Err(error)) => made_all = made_all.and(Err(error)),
                None => break,
            },
            () = zygote.wake.notified() => {}
        }
    }
    if made_all.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotConnected) {
        // It has made as many as it may, or somebody else has found it dead: it is only to be started anew.
        zygote.wake.notify_one();
        return Ok(start);
    }
    made_all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::Bounds;

    #[test]
    fn a_standing_child_takes_what_can_still_be_set_from_outside() {
        let default = Bounds::default().default;
        let fits = |limits, grouped| super::fits(&default, &limits, grouped);
        assert!(fits(Limits { timeout_ms: 1, output_bytes: 1, ..default }, false));
        for limits in [
            Limits { memory_bytes: default.memory_bytes * 2, ..default },
            Limits { processes: 1, ..default },
            Limits { cpu_ms: 1, ..default },
        ] {
            assert!(fits(limits, true) && !fits(limits, false), "{limits:?}");
        }
        for limits in [
            Limits { processes: default.processes + 1, ..default },
            Limits { cpu_ms: default.cpu_ms + 1, ..default },
            Limits { disk_bytes: 1, ..default },
            Limits { open_files: 64, ..default },
        ] {
            assert!(!fits(limits, true) && !fits(limits, false), "{limits:?}");
        }
    }
}
