//! One door to run a job: [`Sandbox::run`].
//!
//! Around every job stand two walls. The outer one, namespaces and an own root and identity, is written down as a plan in
//! [`outer_wall`] and raised by the shim before python starts; the inner one, the policy in [`inner_wall`], is set from
//! inside python by the shim, which sends the filter's listener here. Only then does [`supervise`] hand over the key to
//! the code. Before that the job's files go into its [`workdir`], of which the shim has sent a descriptor along; through
//! the same one its artifacts come back at the end. When `run` returns, nothing of the job is alive.
//!
//! A job's process comes from a new python (cold) or from a zygote (warm), both in [`start`]. All the rest is one way.

mod cgroup;
pub mod doctor;
mod environment;
mod error;
mod host;
mod identity;
pub mod inner_wall;
mod outer_wall;
mod run;
mod setup;
mod start;
mod supervise;
mod workdir;

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::job::{Limits, Outcome, Status};
use crate::ops::metrics::Metrics;
use crate::script::Payload;
use run::Engine;
use start::warm_pool::WarmPool;

pub use environment::RootError;
pub use error::StartError;
pub use supervise::live_output::Tap;
pub use supervise::syscall_trace::Trace;

/// Runs jobs, each in a process of its own behind both walls. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Sandbox {
    engine: Arc<Engine>,
}

impl Sandbox {
    /// Prepares all that jobs share: policy, shim, environments, one identity and one control group a seat.
    ///
    /// To be called before the process has more than one thread: what this system gives is tried in children.
    pub fn start(config: &Config) -> Result<Self, StartError> {
        Self::demand_layers(config)?;
        Self::start_examined(config)
    }

    /// Like [`Sandbox::start`], for a caller that has [demanded](doctor::demand) the layers itself: the same children are
    /// not forked twice.
    pub fn start_examined(config: &Config) -> Result<Self, StartError> {
        Ok(Self { engine: Arc::new(setup::set_up(config, None)?) })
    }

    /// The same **without the inner wall**: what the policy forbids happens, and is noted in `trace`. For one run of
    /// a trusted program by hand.
    pub fn start_tracing(config: &Config, trace: Trace) -> Result<Self, StartError> {
        Self::demand_layers(config)?;
        Ok(Self { engine: Arc::new(setup::set_up(config, Some(trace))?) })
    }

    fn demand_layers(config: &Config) -> Result<(), StartError> {
        let required = &config.sandbox.require;
        if required.is_empty() {
            return Ok(());
        }
        doctor::demand(config, &doctor::examine(config), |check| required.contains(&check.name))
    }

    /// Starts the zygotes of warm environments, and keeps them. Jobs start cold until their zygote is there.
    ///
    /// Must be called inside a tokio runtime.
    pub fn warm_up(&self, metrics: Option<&Metrics>) {
        for (name, pool) in &self.engine.warm_pools {
            if let Some(environment) = self.engine.environments.get(name) {
                pool.keep(&self.engine.start, environment, metrics);
            }
        }
    }

    /// Waits until `environment` starts its jobs warm.
    ///
    /// # Errors
    /// Why it does not.
    pub async fn warmed_up(&self, environment: &str) -> Result<(), String> {
        self.warm_up(None);
        match self.engine.warm_pools.get(environment) {
            Some(pool) => pool.ready().await,
            None if self.engine.environments.contains_key(environment) => {
                Err("it starts every job cold: `warm` is off, or there is no user namespace".into())
            }
            None => Err("there is no such environment".into()),
        }
    }

    /// Warm environments whose jobs all start cold at the moment, each with the reason.
    pub fn gone_cold(&self) -> Vec<(String, String)> {
        let cold = |(name, pool): (&String, &Arc<WarmPool>)| Some((name.clone(), pool.failure()?));
        self.engine.warm_pools.iter().filter_map(cold).collect()
    }

    /// Ends the zygotes and all that stands by; jobs that still run are not touched. Without it they are killed
    /// when the process ends, and left for whoever collects them.
    pub async fn close(&self) {
        for pool in self.engine.warm_pools.values() {
            pool.end(&self.engine.start.default_limits).await;
        }
    }

    /// These limits without what nothing here could keep: results tell what was in force.
    pub fn in_force(&self, limits: Limits) -> Limits {
        Limits { cpus: limits.cpus.filter(|_| self.engine.shares_the_processor), ..limits }
    }

    /// Runs one job to its end. When this returns, nothing of it is alive.
    ///
    /// `stop` ends it early as [`Status::Cancelled`].
    pub async fn run(&self, payload: Payload, limits: &Limits, stop: &CancellationToken) -> Outcome {
        self.run_tapped(payload, limits, stop, None).await
    }

    /// The same, with its output going through `tap` as it is read.
    pub async fn run_tapped(
        &self,
        payload: Payload,
        limits: &Limits,
        stop: &CancellationToken,
        tap: Option<Tap>,
    ) -> Outcome {
        let (engine, limits, stop) = (Arc::clone(&self.engine), *limits, stop.clone());
        let id = payload.id.clone();
        // A task of its own: a caller that goes away does not leave a job unwatched.
        let run = tokio::spawn(async move { engine.run(payload, &limits, &stop, tap).await });
        match run.await {
            Ok(Ok(outcome)) => placeless(outcome, &id),
            Ok(Err(error)) => {
                let error = error::explained(&error);
                tracing::error!(id, error, "a job could not be run");
                let error = error::without_places(&error);
                Outcome::not_run(Status::WorkerError, format!("the sandbox failed: {error}"))
            }
            Err(error) => {
                tracing::error!(id, %error, "the task that watches a job ended early");
                Outcome::not_run(Status::WorkerError, "the sandbox failed while it ran the job")
            }
        }
    }
}

/// The outcome as its requester reads it: of our own failure the operator's log has all.
fn placeless(mut outcome: Outcome, id: &str) -> Outcome {
    if let (Status::WorkerError, Some(error)) = (outcome.status, &mut outcome.error) {
        let told = error::without_places(error);
        if told != *error {
            tracing::error!(id, error, "a job could not be run");
            *error = told;
        }
    }
    outcome
}
