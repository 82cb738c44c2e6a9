//! One door to run a job: [`Sandbox::run`].
//!
//! Around every job stand two walls. The outer one, namespaces and an own root and identity, is written down as
//! a [`plan`] and raised by the shim before python starts; the inner one, the [`policy`], is set from inside
//! python by the shim, which sends the filter's listener here. Only then does [`watch`] hand over the key to the
//! code, and before that lays the job's [`files`] into its working directory, of which the shim has sent a
//! descriptor along; through the same one [`artifacts`] come back at the end. When `run` returns, nothing of the
//! job is alive.
//!
//! A job's process comes from a new python (cold) or from a [`zygote`] (warm). All the rest is one way.

mod artifacts;
mod census;
mod cgroup;
mod claim;
mod cold;
pub mod doctor;
mod environment;
mod error;
mod events;
mod files;
mod host;
mod identity;
mod init;
mod landlock;
mod launcher;
mod mounts;
mod plan;
pub mod policy;
mod root;
mod streams;
mod tap;
mod trace;
mod verdict;
mod watch;
mod zygote;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::job::{Limits, Outcome, Status};
use crate::ops::metrics::Metrics;
use crate::script::Payload;
use crate::sys::fd;
use crate::sys::userns::{self, Mapping};
use artifacts::Patterns;
use census::OomKills;
use cgroup::Group;
use claim::Claim;
use environment::{Environment, Machine};
use host::Host;
use identity::{INSIDE, Lease, Privilege, Seats};
use launcher::Launcher;
use plan::Plan;
use watch::{Cause, Terms, Watch};

pub use error::StartError;
pub use root::RootError;
pub use tap::Tap;
pub use trace::Trace;

/// Runs jobs, each in a process of its own behind both walls. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Sandbox {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    environments: BTreeMap<String, Environment>,
    seats: Arc<Seats>,
    host: Host,
    launcher: Launcher,
    start_timeout: Duration,
    default_limits: Limits,
    /// Control groups give each job its share of the processor, and can cap it.
    shares_the_processor: bool,
    /// In which zygotes run where the worker may choose uids.
    zygote_namespace: Option<OwnedFd>,
    proxies: Vec<(&'static str, String)>,
    /// None where control groups tell, or nothing does.
    oom_kills: Option<OomKills>,
    /// Only where there is no inner wall.
    trace: Option<Trace>,
    /// Of the uids that jobs have on the host; none where all have the worker's own.
    _claim: Option<Claim>,
    /// Bytes of artifacts that a result can hold, whatever else is in it.
    artifacts_max: u64,
}

impl Sandbox {
    /// Prepares all that jobs share: policy, shim, environments, one identity and one control group a seat.
    ///
    /// To be called before the process has more than one thread: what this system gives is tried in children.
    pub fn start(config: &Config) -> Result<Self, StartError> {
        Self::set_up(config, None)
    }

    /// The same **without the inner wall**: what the policy forbids happens, and is noted in `trace`. For one run of
    /// a trusted program by hand.
    pub fn start_tracing(config: &Config, trace: Trace) -> Result<Self, StartError> {
        Self::set_up(config, Some(trace))
    }

    fn set_up(config: &Config, trace: Option<Trace>) -> Result<Self, StartError> {
        let settings = &config.sandbox;
        if !settings.require.is_empty() {
            doctor::demand(config, |check| settings.require.contains(&check.name))?;
        }
        fd::allow_more()?;
        let host = Host::examine();
        let privilege = host.privilege;
        let standby: usize = config.environments.values().filter(|one| one.warm).map(|one| one.standby).sum();
        // A child that stands by holds a seat, so there are more seats than slots.
        let seats = config.worker.slots.saturating_add(standby);
        let groups = cgroup::start(seats, &config.limits.default).unwrap_or_else(|error| {
            tracing::warn!(
                %error,
                "there are no cgroups: the memory of a job's processes is counted now and then, without what lies in \
                 pipes and sockets; CPU time is limited for each process alone"
            );
            Vec::new()
        });
        let oom_kills = groups.is_empty().then(OomKills::find).flatten();
        let seat_count = u32::try_from(seats).unwrap_or(u32::MAX);
        if privilege == Privilege::Full {
            identity::range_exists(settings.uid_base, seat_count)?;
        }
        let zygote_namespace = match privilege {
            Privilege::Full => {
                let (inside, outside) = (INSIDE, settings.uid_base.saturating_add(1));
                userns::make(&[
                    Mapping { inside: 0, outside: settings.uid_base, count: 1 },
                    Mapping { inside, outside, count: seat_count },
                ])
                .inspect_err(|error| tracing::warn!(%error, "every job starts cold: no user namespace"))
                .inspect(|namespace| plan::limit_watches(namespace.as_fd()))
                .ok()
            }
            Privilege::None => None,
        };
        let claim = (privilege == Privilege::Full).then(|| {
            let first = settings.uid_base.saturating_add(1);
            Claim::lay(first..first.saturating_add(seat_count))
        });
        let machine = Machine {
            host,
            seats: seat_count,
            memory_group: !groups.is_empty(),
            cpu_group: groups.iter().all(Group::shares_the_processor) && !groups.is_empty(),
            can_start_warm: trace.is_none() && (privilege == Privilege::None || zygote_namespace.is_some()),
            traces: trace.is_some(),
        };
        let mut environments = BTreeMap::new();
        for (name, environment) in &config.environments {
            let prepared = Environment::prepare(name, environment, settings, &machine)
                .map_err(|error| error.of(name))?;
            environments.insert(name.clone(), prepared);
        }
        let proxies = [
            ("HTTP_PROXY", &settings.http_proxy),
            ("http_proxy", &settings.http_proxy),
            ("HTTPS_PROXY", &settings.https_proxy),
            ("https_proxy", &settings.https_proxy),
            ("ALL_PROXY", &settings.socks5_proxy),
            ("all_proxy", &settings.socks5_proxy),
        ];
        let init_program = fd::out_of_the_way(fd::sealed_file(c"init", &init::program())?)?;
        Ok(Self {
            shared: Arc::new(Shared {
                environments,
                seats: Seats::prepare(seats, privilege, settings.uid_base, groups),
                host,
                launcher: Launcher::start(init_program)?,
                start_timeout: settings.start_timeout,
                default_limits: config.limits.default,
                shares_the_processor: machine.cpu_group,
                zygote_namespace,
                oom_kills,
                trace,
                _claim: claim,
                // Base64 makes four bytes of three.
                artifacts_max: (config.amqp.max_result_bytes as u64) / 4 * 3,
                proxies: proxies
                    .into_iter()
                    .filter_map(|(name, value)| Some((name, value.clone()?)))
                    .collect(),
            }),
        })
    }

    /// Starts the zygotes of warm environments, and keeps them. Jobs start cold until their zygote is there.
    ///
    /// Must be called inside a tokio runtime.
    pub fn warm_up(&self, metrics: Option<&Metrics>) {
        for (name, environment) in &self.shared.environments {
            if let Some(zygote) = &environment.zygote {
                zygote.keep(&self.shared, name, metrics);
            }
        }
    }

    /// Waits until `environment` starts its jobs warm.
    ///
    /// # Errors
    /// Why it does not.
    pub async fn warmed_up(&self, environment: &str) -> Result<(), String> {
        self.warm_up(None);
        let environment = self.shared.environments.get(environment);
        match environment.map(|environment| &environment.zygote) {
            Some(Some(zygote)) => zygote.ready().await,
            Some(None) => {
                Err("it starts every job cold: `warm` is off, or there is no user namespace".into())
            }
            None => Err("there is no such environment".into()),
        }
    }

    /// Warm environments whose jobs all start cold at the moment, each with the reason.
    pub fn gone_cold(&self) -> Vec<(String, String)> {
        let cold = |(name, environment): (&String, &Environment)| {
            Some((name.clone(), environment.zygote.as_ref()?.failure()?))
        };
        self.shared.environments.iter().filter_map(cold).collect()
    }

    /// Ends the zygotes and all that stands by; jobs that still run are not touched. Without it they are killed
    /// when the process ends, and left for whoever collects them.
    pub async fn close(&self) {
        for environment in self.shared.environments.values() {
            if let Some(zygote) = &environment.zygote {
                zygote.end(&self.shared.default_limits).await;
            }
        }
    }

    /// These limits without what nothing here could keep: results tell what was in force.
    pub fn in_force(&self, limits: Limits) -> Limits {
        Limits { cpus: limits.cpus.filter(|_| self.shared.shares_the_processor), ..limits }
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
        let (shared, limits, stop) = (Arc::clone(&self.shared), *limits, stop.clone());
        // A task of its own: a caller that goes away does not leave a job unwatched.
        let run = tokio::spawn(async move { shared.run(payload, &limits, &stop, tap).await });
        match run.await {
            Ok(Ok(outcome)) => placeless(outcome),
            Ok(Err(error)) => {
                let error = error::explained(&error);
                tracing::error!(error, "a job could not be run");
                let error = error::without_places(&error);
                Outcome::not_run(Status::WorkerError, format!("the sandbox failed: {error}"))
            }
            Err(error) => {
                tracing::error!(%error, "the task that watches a job ended early");
                Outcome::not_run(Status::WorkerError, "the sandbox failed while it ran the job")
            }
        }
    }
}

/// The outcome as its requester reads it: of our own failure the operator's log has all.
fn placeless(mut outcome: Outcome) -> Outcome {
    if let (Status::WorkerError, Some(error)) = (outcome.status, &mut outcome.error) {
        let told = error::without_places(error);
        if told != *error {
            tracing::error!(error, "a job could not be run");
            *error = told;
        }
    }
    outcome
}

/// A job's process, both walls up, waiting for its assignment.
#[derive(Debug)]
struct Started {
    watch: Watch,
    lease: Lease,
    /// The zygote's namespace, which must outlive the job.
    _generation: Option<Arc<zygote::Generation>>,
}

impl Shared {
    async fn run(
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
        let patterns = match Patterns::compile(wanted).await? {
            Ok(patterns) => patterns,
            Err(error) => {
                let error = format!("`artifacts` cannot be matched: {error}; give fewer or plainer patterns");
                return Ok(Outcome::not_run(Status::Rejected, error));
            }
        };
        let (mut started, warm) = match self.start_warm(&payload, environment, limits).await {
            Some(started) => (started, true),
            None => match self.start_cold(&payload, environment, limits, stop, taken).await? {
                Ok(started) => (started, false),
                Err(outcome) => return Ok(*outcome),
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
        let cause = match started.watch.run(terms, stop).await {
            Ok(cause) => cause,
            Err(error) => {
                // Its seat is free again only when nothing of it is alive.
                let group = started.lease.group.as_ref();
                started.watch.finish(Cause::Cancelled, limits, group).await?;
                return Err(error);
            }
        };
        let mut seen = started.watch.finish(cause, limits, started.lease.group.as_ref()).await?;
        let place = seen.place.take();
        let mut outcome = verdict::judge(seen, limits, payload.has_preload, taken);
        outcome.warm = warm;
        if let Some(place) = place {
            artifacts::take(place, patterns, self.artifacts_max, &mut outcome).await?;
        }
        Ok(outcome)
    }

    /// A process out of a zygote, where there is one and the job can go there.
    async fn start_warm(
        &self,
        payload: &Payload,
        environment: &Environment,
        limits: &Limits,
    ) -> Option<Started> {
        let zygote = environment.zygote.as_ref()?;
        // A zygote has no network, and what a preload does must not come after the imports.
        if payload.network || payload.has_preload {
            return None;
        }
        let standby = match zygote.take(&self.default_limits, limits) {
            Some(mut standby) => {
                let begun = match &mut standby.lease.group {
                    Some(group) => group.go_on(limits).await,
                    None => Ok(()),
                };
                if let Err(error) = begun {
                    tracing::warn!(%error, "a job starts cold");
                    let zygote::Standby { watch, lease, .. } = standby;
                    // Its seat is free again only when it is dead, which that failed to wait for is said already.
                    let _ = watch.finish(Cause::Cancelled, limits, lease.group.as_ref()).await;
                    return None;
                }
                standby
            }
            None => {
                let lease = self.seats.take().await?;
                let made = zygote.make(self, environment, lease, limits).await;
                made.inspect_err(|error| tracing::debug!(%error, "a job starts cold")).ok()?
            }
        };
        let zygote::Standby { watch, lease, generation } = standby;
        Some(Started { watch, lease, _generation: Some(generation) })
    }

    /// Why a warm start failed, for a person.
    fn explain(&self, cause: &Cause, plan: &Plan) -> String {
        match cause {
            Cause::StartFailed(report) => {
                verdict::failed_step(*report, &[Plan::default(), Plan::default(), plan.clone()])
            }
            other => format!("a child of the zygote was not ready: {other:?}"),
        }
    }
}
