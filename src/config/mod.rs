//! Configuration as used: checked, complete, in the types that the rest of the worker wants.
//!
//! `layers` puts defaults, file, environment variables and flags over each other into `raw`, the keys as
//! written; `check` makes a [`Config`] of that.

mod broker;
mod check;
mod defaults;
mod layers;
mod raw;
mod url;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::job::{Admission, Bounds, Cpus};
use layers::Layers;

/// Why there is no configuration to work with. No message holds a secret.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A file cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("{}, line {line}: {message}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What the parser says.
        message: String,
    },
    /// A key is unknown, or its value will not do.
    #[error("{origin}: {sentence}")]
    Invalid {
        /// Where it was set: the file, the variable, the command line.
        origin: String,
        /// The key, the fault and the remedy.
        sentence: String,
    },
}

impl Config {
    /// Reads the configuration: defaults, then the file, then `SANDPIPER_SECTION__KEY`, then flags.
    ///
    /// Without `file` it is the one that `SANDPIPER_CONFIG` names, if any. `overrides` are flags by the key
    /// they set: `("worker.slots", "4")`.
    pub fn load(
        file: Option<&Path>,
        env: impl Iterator<Item = (String, String)>,
        overrides: &[(String, String)],
    ) -> Result<Self, ConfigError> {
        let mut variables: Vec<_> = env.filter(|(name, _)| name.starts_with("SANDPIPER_")).collect();
        // In a fixed order, so that the same mistakes give the same error.
        variables.sort();
        let mut layers = Layers::defaults();
        if let Some(file) = file.or_else(|| layers::file_variable(&variables)) {
            layers.file(file)?;
        }
        layers.variables(&variables)?;
        for (key, value) in overrides {
            layers.flag(key, value)?;
        }
        let (raw, origins) = layers.finish()?;
        check::check(raw, origins)
    }

    /// Every key with its default, as it would be written in a file.
    pub fn defaults_as_written() -> toml::Table {
        // Plain text, numbers and lists always have a form in TOML.
        toml::Table::try_from(raw::Raw::defaults()).unwrap_or_default()
    }

    /// What jobs may ask for.
    pub fn admission(&self) -> Admission {
        let mut bounds = self.limits;
        bounds.maximum.cpus = Cpus::less(bounds.maximum.cpus, Cpus::of_this_machine());
        Admission {
            bounds,
            max_body_bytes: self.amqp.max_body_bytes,
            allow_preload: self.sandbox.allow_preload,
            allow_network: self.sandbox.allow_network,
            environments: self.environments.keys().cloned().collect(),
        }
    }

    /// How long a delivery may stay unacked: it waits for those taken before it, then it runs.
    pub fn longest_unacked(&self) -> Duration {
        let one =
            Duration::from_millis(self.limits.maximum.timeout_ms).saturating_add(self.sandbox.start_timeout);
        one.saturating_mul(self.rounds())
    }

    /// How many of the longest jobs, one after the other, that is.
    fn rounds(&self) -> u32 {
        // The jobs of the lightest queue wait for their share of the slots.
        let weights = self.amqp.queues.iter().map(|queue| u64::from(queue.weight));
        let turns = weights.clone().sum::<u64>().div_ceil(weights.min().unwrap_or(1).max(1));
        let surplus = usize::from(self.amqp.prefetch_surplus).div_ceil(self.worker.slots.max(1));
        u32::try_from(turns).unwrap_or(u32::MAX).saturating_add(u32::try_from(surplus).unwrap_or(u32::MAX))
    }

    /// How long the broker is to wait for an ack before it takes a delivery back: never less than it does by itself,
    /// and for the longest job twice the time that it may take, as its result has to reach a broker that may be busy.
    pub fn consumer_timeout(&self) -> Duration {
        self.longest_unacked().saturating_mul(2).max(ACK_TIMEOUT)
    }
}

/// After this time without an ack RabbitMQ takes a delivery back, unless it was told otherwise.
const ACK_TIMEOUT: Duration = Duration::from_secs(30 * 60);

impl Amqp {
    /// The broker addresses of this moment: `url_file` read anew where there is one, so that a rotated
    /// password is picked up.
    pub fn current_urls(&self) -> Result<Vec<Secret>, ConfigError> {
        match &self.url_file {
            Some(file) => url::read_file(file),
            None => Ok(self.urls.clone()),
        }
    }
}

/// Everything an operator can set.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// `[amqp]`
    pub amqp: Amqp,
    /// `[worker]`
    pub worker: Worker,
    /// `[sandbox]`
    pub sandbox: Sandbox,
    /// `[limits]`
    pub limits: Bounds,
    /// `[environments.NAME]`; `default` is always there.
    pub environments: BTreeMap<String, Environment>,
    /// `[http]`
    pub http: Http,
    /// `[log]`
    pub log: Log,
}

/// The broker and what is declared on it.
#[derive(Clone, Debug, PartialEq)]
pub struct Amqp {
    /// Broker addresses, tried in turn: `amqp://user:password@host:5672/vhost`. Secret: never logged.
    pub urls: Vec<Secret>,
    /// Re-read at each reconnect; replaces `urls`.
    pub url_file: Option<PathBuf>,
    /// PEM file of the authorities to trust for `amqps://`.
    pub ca_file: Option<PathBuf>,
    /// PEM files of this worker's certificate, with what leads up to the authority, and of its key.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// How it says who it is.
    pub auth: Auth,
    /// Where whoever submits jobs puts them; one of `queues`.
    pub jobs_queue: String,
    /// Where jobs come from; never empty.
    pub queues: Vec<Queue>,
    /// The reply queue for a job without `reply_to`, and for one whose `reply_to` is gone or does not take it.
    pub results_queue: String,
    /// What could not be handled.
    pub dead_queue: String,
    /// Most bytes that the results queue is declared to hold; 0 for no bound.
    pub results_max_bytes: u64,
    /// The same for the dead queue.
    pub dead_max_bytes: u64,
    /// Declare the queues, or only check that they are there.
    pub topology: Topology,
    /// What kind of queue to declare for results and for the dead; each of `queues` has its own.
    pub queue_type: QueueType,
    /// Deliveries before a job counts as poison.
    pub delivery_limit: u32,
    /// Deliveries taken beyond the slots.
    pub prefetch_surplus: u16,
    /// Glob pattern that a `reply_to` must match.
    pub reply_to_allow: String,
    /// Users who may list and cancel every job.
    pub operators: Vec<String>,
    /// Heartbeat interval asked of the broker.
    pub heartbeat: Duration,
    /// Around TCP connect, TLS and the AMQP handshake together.
    pub connect_timeout: Duration,
    /// Around every other broker operation.
    pub operation_timeout: Duration,
    /// Longest pause between two connection attempts.
    pub reconnect_max: Duration,
    /// Largest message body taken on.
    pub max_body_bytes: usize,
    /// Largest result, measured as encoded JSON.
    pub max_result_bytes: usize,
}

/// A queue that jobs come from.
#[derive(Clone, Debug, PartialEq)]
pub struct Queue {
    /// Its name on the broker.
    pub name: String,
    /// Its share of the slots, beside those of the others, while all of them have jobs.
    pub weight: u32,
    /// As what it is declared.
    pub kind: QueueType,
    /// All of its jobs go to one worker, and to the next one when that is gone.
    pub single_active_consumer: bool,
    /// How many priorities its messages may have; 0 for none. Classic queues only.
    pub max_priority: u8,
    /// Workers with a higher one are served first.
    pub consumer_priority: i32,
}

impl Queue {
    /// One that gets everything where it is the only one.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            weight: 1,
            kind: QueueType::Quorum,
            single_active_consumer: false,
            max_priority: 0,
            consumer_priority: 0,
        }
    }
}

/// How a worker says who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Auth {
    /// By the user and password of the address.
    Plain,
    /// By its certificate.
    External,
}

/// What kind of queue the broker makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueType {
    /// Replicated, and it counts deliveries.
    Quorum,
    /// On one node, with priorities.
    Classic,
}

impl QueueType {
    /// As the broker calls it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Quorum => "quorum",
            Self::Classic => "classic",
        }
    }
}

/// How the worker treats its queues at start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Topology {
    /// Declare them.
    Declare,
    /// Only check that they exist.
    Passive,
}

/// Slots and drain.
#[derive(Clone, Debug, PartialEq)]
pub struct Worker {
    /// Shown in results and logs; the host name and process id where empty.
    pub name: String,
    /// Jobs at one time.
    pub slots: usize,
    /// From SIGTERM to the kill of what still runs.
    pub drain_timeout: Duration,
}

/// What every job's process is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct Sandbox {
    /// The shim library; beside the worker's binary where none is given.
    pub shim: Option<PathBuf>,
    /// From taking a job on to handing over its code.
    pub start_timeout: Duration,
    /// Publishers may send code that runs before the filter.
    pub allow_preload: bool,
    /// Jobs may ask for the host's network.
    pub allow_network: bool,
    /// Set for network jobs as `HTTP_PROXY`.
    pub http_proxy: Option<String>,
    /// Set for network jobs as `HTTPS_PROXY`.
    pub https_proxy: Option<String>,
    /// Set for network jobs as `ALL_PROXY`.
    pub socks5_proxy: Option<String>,
    /// The first of the host uids and gids that jobs run under, one for each slot, and one before for helpers.
    pub uid_base: u32,
    /// System calls that are allowed on top of the policy.
    pub allow_syscalls: Vec<String>,
    /// Layers that must be there for the worker to start.
    pub require: Vec<String>,
}

/// A named interpreter.
#[derive(Clone, Debug, PartialEq)]
pub struct Environment {
    /// The interpreter, as an absolute path.
    pub python: PathBuf,
    /// Further files and directories that its jobs may read, mounted under their own paths.
    pub mounts: Vec<PathBuf>,
    /// What its jobs may execute.
    pub allow_exec: Exec,
    /// What its jobs see in `/proc`.
    pub proc: Proc,
    /// Its jobs start as forks of a python that has done the imports already.
    pub warm: bool,
    /// Modules that this python imports once.
    pub imports: Vec<String>,
    /// Forks that stand ready before their jobs come.
    pub standby: usize,
    /// A fork whose job would not notice ends without taking its python apart.
    pub fast_exit: bool,
    /// The python that is forked moves its memory into huge pages.
    pub huge_pages: bool,
}

/// What jobs may execute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exec {
    /// Nothing.
    Nothing,
    /// These programs, and what is in these directories.
    Programs(Vec<PathBuf>),
    /// All that their root holds and that they write themselves.
    Anything,
}

/// What jobs see in `/proc`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proc {
    /// Their own processes.
    Own,
    /// Nothing: `smaps` and its like tell whether others have the same files mapped.
    None,
}

/// The port for metrics and health.
#[derive(Clone, Debug, PartialEq)]
pub struct Http {
    /// None where it is switched off.
    pub listen: Option<SocketAddr>,
}

/// What is logged, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct Log {
    /// A `tracing` filter: `info`, `sandpiper=debug`.
    pub level: String,
    /// For machines or for people.
    pub format: LogFormat,
}

/// The shape of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// A string that does not show in logs, errors or `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a secret.
    pub fn new(secret: String) -> Self {
        Self(secret)
    }

    /// The secret itself, for the one place that needs it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[secret]")
    }
}
