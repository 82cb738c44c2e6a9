//! One door to run a job: [`Sandbox::run`].
//!
//! Around every job stand two walls. The outer one, namespaces and an own root and identity, is written down as
//! a [`plan`] and raised by the shim before python starts; the inner one, the [`policy`], is set from inside
//! python by the shim, which sends the filter's listener here. Only then does [`watch`] hand over the key to the
//! code. When `run` returns, nothing of the job is alive.

pub mod doctor;
mod environment;
mod identity;
mod init;
mod landlock;
mod launcher;
mod plan;
pub mod policy;
mod root;
mod streams;
mod verdict;
mod watch;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::job::{Limits, Outcome, Status};
use crate::script::Payload;
use crate::sys::{fd, probe};
use environment::{Environment, Variant};
use identity::{Privilege, Seats};
use launcher::{Launcher, Order};
use watch::{Cause, Ends, Terms};

pub use root::RootError;

/// Runs jobs, each in a process of its own behind both walls. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Sandbox {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    environments: BTreeMap<String, Environment>,
    seats: Arc<Seats>,
    privilege: Privilege,
    landlock: landlock::Support,
    launcher: Launcher,
    limits_watches: bool,
    start_timeout: Duration,
    proxies: Vec<(&'static str, String)>,
}

/// Why the sandbox could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The shim is not where it should be.
    #[error("find the shim at {path}: {source}; build it beside the worker or set sandbox.shim")]
    Shim {
        /// Where it was looked for.
        path: PathBuf,
        /// Why it was not found.
        source: io::Error,
    },
    /// An interpreter cannot be used.
    #[error("prepare environment {name}: {source}")]
    Environment {
        /// Its name in the configuration.
        name: String,
        /// Why.
        source: RootError,
    },
    /// The policy does not compile.
    #[error("compile the system call policy: {0}")]
    Policy(#[from] policy::PolicyError),
    /// A layer that the operator requires is not there.
    #[error("sandbox.require: {name} is not there: {detail}; `sandpiper doctor` says how to get it")]
    Required {
        /// The layer.
        name: String,
        /// What was found.
        detail: String,
    },
    /// A descriptor or a thread could not be had.
    #[error("set up the sandbox: {0}")]
    Io(#[from] io::Error),
}

impl Sandbox {
    /// Prepares all that jobs share: policy, shim, environments, one identity a slot.
    pub fn start(config: &Config) -> Result<Self, StartError> {
        let settings = &config.sandbox;
        let privilege = Privilege::of_this_process();
        let proc = plan::can_mount_proc(privilege);
        if !proc {
            tracing::warn!("jobs run without /proc: it cannot be mounted");
        }
        let mut environments = BTreeMap::new();
        for (name, environment) in &config.environments {
            let prepared = Environment::prepare(environment, settings, privilege, proc)
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
                seats: Seats::prepare(config.worker.slots, privilege, settings.uid_base),
                privilege,
                landlock: landlock::Support(probe::landlock_abi()),
                launcher: Launcher::start(init_program)?,
                limits_watches: privilege == Privilege::None && plan::can_limit_watches(),
                start_timeout: settings.start_timeout,
                proxies: proxies
                    .into_iter()
                    .filter_map(|(name, value)| Some((name, value.clone()?)))
                    .collect(),
            }),
        })
    }

    /// Runs one job to its end. When this returns, nothing of it is alive.
    ///
    /// `stop` ends it early as [`Status::Cancelled`].
    pub async fn run(&self, payload: Payload, limits: &Limits, stop: &CancellationToken) -> Outcome {
        let (shared, limits, stop) = (Arc::clone(&self.shared), *limits, stop.clone());
        // A task of its own: a caller that goes away does not leave a job unwatched.
        let run = tokio::spawn(async move { shared.run(payload, &limits, &stop).await });
        match run.await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(error)) => {
                tracing::error!(%error, "a job could not be run");
                Outcome::not_run(Status::WorkerError, format!("the sandbox failed: {error}"))
            }
            Err(error) => {
                tracing::error!(%error, "the task that watches a job ended early");
                Outcome::not_run(Status::WorkerError, "the sandbox failed while it ran the job")
            }
        }
    }
}

impl Shared {
    async fn run(&self, payload: Payload, limits: &Limits, stop: &CancellationToken) -> io::Result<Outcome> {
        let taken = Instant::now();
        let Some(environment) = self.environments.get(&payload.environment) else {
            let error = format!("there is no environment {}", payload.environment);
            return Ok(Outcome::not_run(Status::WorkerError, error));
        };
        let variant = environment.variant(payload.network);
        let Some(seat) = self.seats.take().await else {
            return Ok(Outcome::not_run(Status::WorkerError, "the sandbox has been shut down"));
        };
        let (order, ends) = self.prepare(&payload, limits, environment, variant, &seat)?;
        let plans = (order.origin.clone(), order.init.clone(), order.wall.clone());
        let explain = |report| verdict::failed_step(report, &plans.0, &plans.1, &plans.2);

        let launched = match self.launcher.launch(order).await {
            Ok(launched) => launched,
            Err(error) => {
                let report = watch::read_report(&ends.control).ok().and_then(|(report, _)| report);
                let error = report.map_or_else(|| error.to_string(), explain);
                tracing::error!(%error, "a job could not be started");
                return Ok(Outcome::not_run(Status::WorkerError, error));
            }
        };
        let proxies: Vec<(&str, &str)> = if payload.network {
            self.proxies.iter().map(|(name, value)| (*name, value.as_str())).collect()
        } else {
            Vec::new()
        };
        let terms = Terms {
            limits,
            policy: &variant.policy,
            start_by: taken + self.start_timeout,
            limits_files: plan::open_files(self.privilege, &seat).is_some(),
            assignment: payload.assignment(&proxies),
            stdin: payload.stdin,
        };
        let seen = watch::watch(launched, ends, terms, stop).await?;
        let failed = match seen.cause {
            Cause::StartFailed(report) => Some(explain(report)),
            _ => None,
        };
        let mut outcome = verdict::judge(seen, limits, payload.has_preload, taken);
        if outcome.status == Status::WorkerError {
            outcome.error = failed.or(outcome.error);
            let error = outcome.error.as_deref();
            let said = String::from_utf8_lossy(&outcome.stderr.bytes);
            tracing::error!(error, said = %said.trim_end(), "a job could not be started");
        }
        Ok(outcome)
    }

    /// Everything that a launch needs, and the worker's ends of it.
    fn prepare(
        &self,
        payload: &Payload,
        limits: &Limits,
        environment: &Environment,
        variant: &Variant,
        seat: &identity::Seat,
    ) -> io::Result<(Order, Ends)> {
        let inside = seat.inside(self.privilege);
        let script = fd::sealed_file(c"script", payload.render(inside, inside).as_bytes())?;
        let (stdin, stdin_end) = fd::pipe()?;
        let (stdout_end, stdout) = fd::pipe()?;
        let (stderr_end, stderr) = fd::pipe()?;
        let (control_end, control) = fd::socket_pair()?;
        let job = [&script, &stdin, &stdout, &stderr, &control, &variant.policy_file];
        let kept = job.into_iter().map(fd::out_of_the_way).collect::<io::Result<Vec<OwnedFd>>>()?;
        let [script, stdin, stdout, stderr, control, policy] = &kept[..] else {
            return Err(io::Error::other("a descriptor is missing"));
        };
        let wall = plan::wall(&plan::Job {
            privilege: self.privilege,
            seat,
            root: &variant.root,
            network: payload.network,
            limits,
            memory_by_cgroup: false,
            cgroups: &[],
            coarse: &variant.coarse,
            landlock: self.landlock,
            descriptors: plan::Descriptors {
                script: script.as_fd(),
                stdin: stdin.as_fd(),
                stdout: stdout.as_fd(),
                stderr: stderr.as_fd(),
                control: control.as_fd(),
                policy: policy.as_fd(),
            },
        });
        let order = Order {
            origin: plan::origin(self.privilege, self.limits_watches),
            init: plan::init(self.privilege, seat),
            wall,
            program: Arc::clone(&environment.program),
            control: fd::out_of_the_way(control)?,
            _kept: kept,
        };
        let ends = Ends { control: control_end, stdin: stdin_end, stdout: stdout_end, stderr: stderr_end };
        Ok((order, ends))
    }
}
