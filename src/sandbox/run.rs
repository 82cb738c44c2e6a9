//! One job, from its process to its outcome.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::environment::Environment;
use super::identity::uid_claim::UidRangeClaim;
use super::start::warm_pool::{Standby, WarmPool};
use super::start::{StartContext, StartFailure, StartedJob, cold};
use super::supervise::census::OomKills;
use super::supervise::live_output::Tap;
use super::supervise::syscall_trace::Trace;
use super::supervise::{EndReason, Terms, verdict};
use super::workdir::artifacts::{self, Wanted};
use super::workdir::brought::Brought;
use super::workdir::patterns::Patterns;
use crate::job::{Limits, Outcome, Status};
use crate::script::Payload;

/// All that jobs share.
#[derive(Debug)]
pub(super) struct Engine {
    pub(super) environments: BTreeMap<String, Arc<Environment>>,
    /// Of the environments that start jobs warm.
    pub(super) warm_pools: BTreeMap<String, Arc<WarmPool>>,
    pub(super) start: Arc<StartContext>,
    /// Control groups give each job its share of the processor, and can cap it.
    pub(super) shares_the_processor: bool,
    pub(super) proxies: Vec<(&'static str, String)>,
    /// None if control groups tell, or if nothing does.
    pub(super) oom_kills: Option<OomKills>,
    /// Only without an inner wall.
    pub(super) trace: Option<Trace>,
    /// Of the uids that jobs have on the host; none if all have the worker's own.
    pub(super) _claim: Option<UidRangeClaim>,
    /// The most processes that a job can ask for.
    pub(super) processes_max: u64,
    /// Bytes of artifacts that a result can hold, whatever else is in it.
    pub(super) artifacts_max: u64,
}

impl Engine {
    pub(super) async fn run(
        &self,
        mut payload: Payload,
        limits: &Limits,
        stop: &CancellationToken,
        tap: Option<Tap>,
    ) -> io::Result<Outcome> {
        let taken = Instant::now();
        let Some(environment) = self.environments.get(&payload.environment) else {
            let error = format!("there is no environment {}", payload.environment);
            return Ok(Outcome::not_run(Status::WorkerError, error));
        };
        let variant = environment.variant(payload.network);
        let wanted = std::mem::take(&mut payload.artifacts);
        let wanted = match Patterns::compile(wanted).await? {
            Ok(patterns) => patterns.map(|patterns| Wanted { patterns, brought: brought(&payload) }),
            Err(error) => {
                let error = format!("`artifacts` cannot be matched: {error}; give fewer or plainer patterns");
                return Ok(Outcome::not_run(Status::Rejected, error));
            }
        };
        let (mut started, warm) = match self.start_warm(&payload, environment, limits).await {
            Some(started) => (started, true),
            None => match cold::start(&self.start, &payload, environment, limits, stop, taken).await {
                Ok(started) => (started, false),
                Err(StartFailure::Job(outcome)) => return Ok(*outcome),
                Err(StartFailure::Ours(error)) => return Err(error),
            },
        };
        let proxies: Vec<(&str, &str)> = if payload.network {
            self.proxies.iter().map(|(name, value)| (*name, value.as_str())).collect()
        } else {
            Vec::new()
        };
        let terms = Terms {
            limits,
            policy: &variant.policy,
            group: started.lease.group.as_ref(),
            kills: self.oom_kills.as_ref(),
            assignment: payload.assignment(warm, &proxies),
            stdin: payload.stdin,
            files: payload.files,
            tap,
            trace: self.trace.as_ref(),
        };
        let cause = match started.supervisor.run(terms, stop).await {
            Ok(cause) => cause,
            Err(error) => {
                // Its seat is free again only when nothing of it is alive.
                let group = started.lease.group.as_ref();
                started.supervisor.finish(EndReason::Cancelled, limits, group).await?;
                return Err(error);
            }
        };
        let mut seen = started.supervisor.finish(cause, limits, started.lease.group.as_ref()).await?;
        let job_dir = seen.job_dir.take();
        let ran_out_of_processes = verdict::ran_out_of_processes(&seen);
        let mut outcome = verdict::judge(seen, limits, payload.has_preload, taken);
        outcome.warm = warm;
        if ran_out_of_processes {
            verdict::name_the_processes(&mut outcome, limits, self.processes_max);
        }
        if let Some(job_dir) = job_dir {
            artifacts::take(job_dir, wanted, self.artifacts_max, &mut outcome).await?;
        }
        Ok(outcome)
    }

    /// A process out of a zygote, where there is one and the job can go there.
    async fn start_warm(
        &self,
        payload: &Payload,
        environment: &Environment,
        limits: &Limits,
    ) -> Option<StartedJob> {
        let pool = self.warm_pools.get(&environment.name)?;
        // A zygote has no network, and what a preload does must not come after the imports.
        if payload.network || payload.has_preload {
            return None;
        }
        let standby = match pool.take(&self.start.default_limits, limits) {
            Some(mut standby) => {
                let begun = match &mut standby.lease.group {
                    Some(group) => group.go_on(limits).await,
                    None => Ok(()),
                };
                if let Err(error) = begun {
                    tracing::warn!(id = payload.id, %error, "a job starts cold");
                    let Standby { supervisor, lease, .. } = standby;
                    // Its seat is free again only when it is dead, which that failed to wait for is said already.
                    let _ = supervisor.finish(EndReason::Cancelled, limits, lease.group.as_ref()).await;
                    return None;
                }
                standby
            }
            None => {
                let lease = self.start.seats.take().await?;
                let made = pool.make(&self.start, environment, lease, limits).await;
                made.inspect_err(|error| tracing::debug!(id = payload.id, %error, "a job starts cold"))
                    .ok()?
            }
        };
        let Standby { supervisor, lease, generation } = standby;
        Some(StartedJob { supervisor, lease, _generation: Some(generation) })
    }
}

/// What is in a job's directory before it runs.
fn brought(payload: &Payload) -> Brought {
    let program = (payload.program.as_str(), payload.source.as_slice());
    let files = payload.files.iter().map(|file| (file.path.as_str(), file.content.as_slice()));
    Brought::of(files.chain([program]))
}
