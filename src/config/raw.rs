//! Configuration as written: the keys of `config.toml` with their plain types, nothing checked yet.
//!
//! The defaults come from [`Config::default`], so they are stated once.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::config::{Auth, Config, Environment, Exec, LogFormat, Proc, Topology};
use crate::job::{Bounds, Cpus, Limits};

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Raw {
    pub(super) amqp: RawAmqp,
    pub(super) worker: RawWorker,
    pub(super) sandbox: RawSandbox,
    pub(super) limits: RawBounds,
    pub(super) environments: BTreeMap<String, RawEnvironment>,
    pub(super) http: RawHttp,
    pub(super) log: RawLog,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawAmqp {
    pub(super) url: OneOrMany,
    pub(super) url_file: String,
    pub(super) ca_file: String,
    pub(super) cert_file: String,
    pub(super) key_file: String,
    pub(super) auth: String,
    pub(super) jobs_queue: String,
    pub(super) queues: Vec<RawQueue>,
    pub(super) results_queue: String,
    pub(super) dead_queue: String,
    pub(super) results_max_bytes: u64,
    pub(super) dead_max_bytes: u64,
    pub(super) topology: String,
    pub(super) queue_type: String,
    pub(super) single_active_consumer: bool,
    pub(super) max_priority: u8,
    pub(super) consumer_priority: i32,
    pub(super) delivery_limit: u32,
    pub(super) prefetch_surplus: u16,
    pub(super) reply_to_allow: String,
    pub(super) operators: Vec<String>,
    pub(super) heartbeat_ms: u64,
    pub(super) connect_timeout_ms: u64,
    pub(super) operation_timeout_ms: u64,
    pub(super) reconnect_max_ms: u64,
    pub(super) max_body_bytes: usize,
    pub(super) max_result_bytes: usize,
}

/// What is not written has its default, or what `[amqp]` says for all queues.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawQueue {
    pub(super) name: String,
    pub(super) weight: Option<u32>,
    pub(super) queue_type: Option<String>,
    pub(super) single_active_consumer: Option<bool>,
    pub(super) max_priority: Option<u8>,
    pub(super) consumer_priority: Option<i32>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub(super) enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawWorker {
    pub(super) name: String,
    pub(super) slots: usize,
    pub(super) drain_timeout_ms: u64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawSandbox {
    pub(super) shim: String,
    pub(super) start_timeout_ms: u64,
    pub(super) allow_preload: bool,
    pub(super) allow_network: bool,
    pub(super) http_proxy: String,
    pub(super) https_proxy: String,
    pub(super) socks5_proxy: String,
    pub(super) uid_base: u32,
    pub(super) allow_syscalls: Vec<String>,
    pub(super) require: Vec<String>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawBounds {
    pub(super) timeout_ms: Bound,
    pub(super) cpu_ms: Bound,
    pub(super) memory_bytes: Bound,
    pub(super) output_bytes: Bound,
    pub(super) processes: Bound,
    pub(super) open_files: Bound,
    pub(super) disk_bytes: Bound,
    pub(super) cpus: CpusBound,
}

/// 0 is no cap, and as much as the machine has.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CpusBound {
    pub(super) default: f64,
    pub(super) maximum: f64,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Bound {
    pub(super) default: u64,
    pub(super) maximum: u64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawEnvironment {
    pub(super) python: String,
    pub(super) mounts: Vec<String>,
    pub(super) allow_exec: RawExec,
    pub(super) proc: String,
    pub(super) warm: bool,
    pub(super) imports: Vec<String>,
    pub(super) standby: usize,
    pub(super) fast_exit: bool,
    pub(super) huge_pages: bool,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub(super) enum RawExec {
    All(bool),
    Programs(Vec<String>),
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawHttp {
    pub(super) listen: String,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawLog {
    pub(super) level: String,
    pub(super) format: String,
}

impl Raw {
    /// What holds where nothing is written.
    pub(super) fn defaults() -> Self {
        let Config { amqp, worker, sandbox, limits, environments, http, log } = Config::default();
        let path = |path: Option<PathBuf>| path.as_deref().map(text).unwrap_or_default();
        Self {
            amqp: RawAmqp {
                url: match amqp.urls.as_slice() {
                    [one] => OneOrMany::One(one.expose().to_owned()),
                    many => OneOrMany::Many(many.iter().map(|url| url.expose().to_owned()).collect()),
                },
                url_file: path(amqp.url_file),
                ca_file: path(amqp.ca_file),
                cert_file: path(amqp.identity.as_ref().map(|(certificate, _)| certificate.clone())),
                key_file: path(amqp.identity.map(|(_, key)| key)),
                auth: match amqp.auth {
                    Auth::Plain => "plain".into(),
                    Auth::External => "external".into(),
                },
                jobs_queue: amqp.jobs_queue,
                // The one of `jobs_queue` alone, which goes without saying.
                queues: Vec::new(),
                results_queue: amqp.results_queue,
                dead_queue: amqp.dead_queue,
                results_max_bytes: amqp.results_max_bytes,
                dead_max_bytes: amqp.dead_max_bytes,
                topology: match amqp.topology {
                    Topology::Declare => "declare".into(),
                    Topology::Passive => "passive".into(),
                },
                queue_type: amqp.queue_type.as_str().into(),
                single_active_consumer: false,
                max_priority: 0,
                consumer_priority: 0,
                delivery_limit: amqp.delivery_limit,
                prefetch_surplus: amqp.prefetch_surplus,
                reply_to_allow: amqp.reply_to_allow,
                operators: amqp.operators,
                heartbeat_ms: millis(amqp.heartbeat),
                connect_timeout_ms: millis(amqp.connect_timeout),
                operation_timeout_ms: millis(amqp.operation_timeout),
                reconnect_max_ms: millis(amqp.reconnect_max),
                max_body_bytes: amqp.max_body_bytes,
                max_result_bytes: amqp.max_result_bytes,
            },
            worker: RawWorker {
                name: worker.name,
                // One for each CPU, so that the default reads the same on every machine.
                slots: 0,
                drain_timeout_ms: millis(worker.drain_timeout),
            },
            sandbox: RawSandbox {
                shim: path(sandbox.shim),
                start_timeout_ms: millis(sandbox.start_timeout),
                allow_preload: sandbox.allow_preload,
                allow_network: sandbox.allow_network,
                http_proxy: sandbox.http_proxy.unwrap_or_default(),
                https_proxy: sandbox.https_proxy.unwrap_or_default(),
                socks5_proxy: sandbox.socks5_proxy.unwrap_or_default(),
                uid_base: sandbox.uid_base,
                allow_syscalls: sandbox.allow_syscalls,
                require: sandbox.require,
            },
            limits: RawBounds::from(limits),
            environments: environments.into_iter().map(|(name, it)| (name, it.into())).collect(),
            http: RawHttp { listen: http.listen.map(|address| address.to_string()).unwrap_or_default() },
            log: RawLog {
                level: log.level,
                format: match log.format {
                    LogFormat::Text => "text".into(),
                    LogFormat::Json => "json".into(),
                },
            },
        }
    }
}

impl From<Environment> for RawEnvironment {
    fn from(environment: Environment) -> Self {
        Self {
            python: text(&environment.python),
            mounts: environment.mounts.iter().map(|mount| text(mount)).collect(),
            allow_exec: match environment.allow_exec {
                Exec::Nothing => RawExec::All(false),
                Exec::Programs(paths) => RawExec::Programs(paths.iter().map(|path| text(path)).collect()),
                Exec::Anything => RawExec::All(true),
            },
            proc: match environment.proc {
                Proc::Own => "own".into(),
                Proc::None => "none".into(),
            },
            warm: environment.warm,
            imports: environment.imports,
            // As many as slots, in the same way.
            standby: 0,
            fast_exit: environment.fast_exit,
            huge_pages: environment.huge_pages,
        }
    }
}

impl From<Bounds> for RawBounds {
    fn from(bounds: Bounds) -> Self {
        let bound =
            |of: fn(&Limits) -> u64| Bound { default: of(&bounds.default), maximum: of(&bounds.maximum) };
        Self {
            timeout_ms: bound(|limits| limits.timeout_ms),
            cpu_ms: bound(|limits| limits.cpu_ms),
            memory_bytes: bound(|limits| limits.memory_bytes),
            output_bytes: bound(|limits| limits.output_bytes),
            processes: bound(|limits| limits.processes),
            open_files: bound(|limits| limits.open_files),
            disk_bytes: bound(|limits| limits.disk_bytes),
            cpus: CpusBound {
                default: bounds.default.cpus.map_or(0.0, Cpus::processors),
                maximum: bounds.maximum.cpus.map_or(0.0, Cpus::processors),
            },
        }
    }
}

impl From<&RawBounds> for Bounds {
    fn from(raw: &RawBounds) -> Self {
        let limits = |of: fn(&Bound) -> u64| Limits {
            timeout_ms: of(&raw.timeout_ms),
            cpu_ms: of(&raw.cpu_ms),
            memory_bytes: of(&raw.memory_bytes),
            output_bytes: of(&raw.output_bytes),
            processes: of(&raw.processes),
            open_files: of(&raw.open_files),
            disk_bytes: of(&raw.disk_bytes),
            // Checked by themselves.
            cpus: None,
        };
        Self { default: limits(|bound| bound.default), maximum: limits(|bound| bound.maximum) }
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
