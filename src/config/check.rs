//! From what is written to what is used: ranges, names and what keys must keep to each other.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use super::layers::Origins;
use super::raw::{CpusBound, Raw, RawEnvironment, RawExec, RawSandbox};
use super::{
    ACK_TIMEOUT, Config, ConfigError, Environment, Exec, Http, Log, LogFormat, Proc, Sandbox, Worker,
};
use crate::job::explain::quote;
use crate::job::{Bounds, Cpus, Limits};

/// More concurrent jobs than any machine serves well; catches a slip of the finger.
const SLOTS_MAX: usize = 1_024;
/// More children than that stand by for nothing: each keeps a process and its memory.
const MAX_STANDBY: usize = 256;
/// The longest duration taken for a timeout of ours.
pub(super) const DAY_MS: u64 = 24 * 60 * 60 * 1_000;
pub(super) fn check(raw: Raw, origins: Origins) -> Result<Config, ConfigError> {
    let check = Checker { origins };
    let slots = match raw.worker.slots {
        0 => Config::default().worker.slots,
        slots => slots,
    };
    check.range("worker.slots", slots, 1..=SLOTS_MAX)?;
    let worker = Worker {
        name: raw.worker.name,
        slots,
        drain_timeout: check.duration("worker.drain_timeout_ms", raw.worker.drain_timeout_ms, 0..=DAY_MS)?,
    };
    if worker.name.len() > 255 || worker.name.chars().any(char::is_control) {
        return check.fail("worker.name", "must have at most 255 bytes and no control characters");
    }
    let config = Config {
        amqp: check.amqp(raw.amqp)?,
        worker,
        sandbox: check.sandbox(raw.sandbox, slots)?,
        limits: check.cpus(raw.limits.cpus, check.limits(Bounds::from(&raw.limits))?)?,
        environments: check.environments(raw.environments, slots)?,
        http: Http { listen: check.listen(&raw.http.listen)? },
        log: Log {
            level: check.level(raw.log.level)?,
            format: check.choice(
                "log.format",
                &raw.log.format,
                &[("text", LogFormat::Text), ("json", LogFormat::Json)],
            )?,
        },
    };
    check.ack_timeout(&config)?;
    Ok(config)
}

pub(super) struct Checker {
    pub(super) origins: Origins,
}

impl Checker {
    pub(super) fn fail<T>(&self, key: &str, fault: &str) -> Result<T, ConfigError> {
        Err(self.origins.error(key, format!("{} {fault}", quote(key))))
    }

    pub(super) fn range<T: PartialOrd + std::fmt::Display>(
        &self,
        key: &str,
        value: T,
        range: RangeInclusive<T>,
    ) -> Result<T, ConfigError> {
        if range.contains(&value) {
            return Ok(value);
        }
        self.fail(key, &format!("is {value}; it must be from {} to {}", range.start(), range.end()))
    }

    pub(super) fn duration(
        &self,
        key: &str,
        millis: u64,
        range: RangeInclusive<u64>,
    ) -> Result<Duration, ConfigError> {
        self.range(key, millis, range).map(Duration::from_millis)
    }

    pub(super) fn choice<T: Copy>(
        &self,
        key: &str,
        value: &str,
        choices: &[(&str, T)],
    ) -> Result<T, ConfigError> {
        if let Some((_, choice)) = choices.iter().find(|(name, _)| *name == value) {
            return Ok(*choice);
        }
        let names: Vec<String> = choices.iter().map(|(name, _)| quote(name)).collect();
        self.fail(key, &format!("is {}; it must be {}", quote(value), names.join(" or ")))
    }

    fn sandbox(&self, raw: RawSandbox, slots: usize) -> Result<Sandbox, ConfigError> {
        // One uid a slot, one before for helpers, and the last two numbers have meanings of their own.
        let room = u32::try_from(slots).unwrap_or(u32::MAX).saturating_add(2);
        self.range("sandbox.uid_base", raw.uid_base, 1_001..=u32::MAX - room)?;
        for (key, names) in
            [("sandbox.allow_syscalls", &raw.allow_syscalls), ("sandbox.require", &raw.require)]
        {
            let plausible = |name: &str| {
                !name.is_empty()
                    && name.bytes().all(|byte| {
                        byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"_-".contains(&byte)
                    })
            };
            if let Some(name) = names.iter().find(|name| !plausible(name)) {
                return self.fail(key, &format!("holds {}; a name has only a-z 0-9 _ -", quote(name)));
            }
        }
        Ok(Sandbox {
            shim: optional_path(&raw.shim),
            start_timeout: self.duration("sandbox.start_timeout_ms", raw.start_timeout_ms, 1..=600_000)?,
            allow_preload: raw.allow_preload,
            allow_network: raw.allow_network,
            http_proxy: self.proxy("sandbox.http_proxy", raw.http_proxy, &["http://", "https://"])?,
            https_proxy: self.proxy("sandbox.https_proxy", raw.https_proxy, &["http://", "https://"])?,
            socks5_proxy: self.proxy(
                "sandbox.socks5_proxy",
                raw.socks5_proxy,
                &["socks5://", "socks5h://"],
            )?,
            uid_base: raw.uid_base,
            allow_syscalls: raw.allow_syscalls,
            require: raw.require,
        })
    }

    /// The value is not shown: it may hold a password.
    fn proxy(&self, key: &str, proxy: String, schemes: &[&str]) -> Result<Option<String>, ConfigError> {
        if proxy.is_empty() {
            return Ok(None);
        }
        if schemes.iter().any(|scheme| proxy.len() > scheme.len() && proxy.starts_with(scheme)) {
            return Ok(Some(proxy));
        }
        self.fail(key, &format!("must begin with {} and name a host", schemes.join(" or ")))
    }

    fn limits(&self, bounds: Bounds) -> Result<Bounds, ConfigError> {
        type Of = fn(&Limits) -> u64;
        let every: [(&str, Of); 7] = [
            ("timeout_ms", |limits| limits.timeout_ms),
            ("cpu_ms", |limits| limits.cpu_ms),
            ("memory_bytes", |limits| limits.memory_bytes),
            ("output_bytes", |limits| limits.output_bytes),
            ("processes", |limits| limits.processes),
            ("open_files", |limits| limits.open_files),
            ("disk_bytes", |limits| limits.disk_bytes),
        ];
        for (name, of) in every {
            let (default, maximum) = (of(&bounds.default), of(&bounds.maximum));
            // What the kernel takes is signed.
            let range = of(&Limits::MINIMUM)..=i64::MAX.unsigned_abs();
            self.range(&format!("limits.{name}.default"), default, range)?;
            if default > maximum {
                return self.fail(
                    &format!("limits.{name}.default"),
                    &format!("is {default}, above `limits.{name}.maximum` of {maximum}"),
                );
            }
        }
        Ok(bounds)
    }

    /// 0 is no cap by default, and at most what the machine has.
    fn cpus(&self, raw: CpusBound, mut bounds: Bounds) -> Result<Bounds, ConfigError> {
        let read = |key: &str, processors: f64| match Cpus::new(processors) {
            Some(cpus) if cpus.thousandths() == 0 => Ok(None),
            Some(cpus) if cpus >= Cpus::MINIMUM => Ok(Some(cpus)),
            _ => self.fail(
                key,
                &format!("is {processors}; it must be {} or more processors, or 0 for no cap", Cpus::MINIMUM),
            ),
        };
        bounds.default.cpus = read("limits.cpus.default", raw.default)?;
        bounds.maximum.cpus = read("limits.cpus.maximum", raw.maximum)?;
        match (bounds.default.cpus, Cpus::less(bounds.maximum.cpus, Cpus::of_this_machine())) {
            (Some(default), Some(maximum)) if default > maximum => self.fail(
                "limits.cpus.default",
                &format!("is {default}, above what a job may ask for here, {maximum}"),
            ),
            _ => Ok(bounds),
        }
    }

    fn environments(
        &self,
        raw: BTreeMap<String, RawEnvironment>,
        slots: usize,
    ) -> Result<BTreeMap<String, Environment>, ConfigError> {
        let mut environments = BTreeMap::new();
        for (name, raw) in raw {
            let key = format!("environments.{name}");
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
            if name.is_empty() || name.len() > 64 || !name.bytes().all(plain) {
                return self.fail(&key, "must have a name of 1 to 64 characters A-Z a-z 0-9 _ -");
            }
            let absolute = |field: &str, path: String| {
                let plain = Path::new(&path).is_absolute() && !path.contains('\0');
                if plain {
                    Ok(PathBuf::from(path))
                } else {
                    self.fail(&format!("{key}.{field}"), "must hold absolute paths")
                }
            };
            let python = absolute("python", raw.python)?;
            let mounts =
                raw.mounts.into_iter().map(|mount| absolute("mounts", mount)).collect::<Result<_, _>>()?;
            let module = |name: &&String| !name.split('.').all(is_identifier);
            if let Some(name) = raw.imports.iter().find(module) {
                let problem = format!("must hold names of modules, as in `import a.b`; `{name}` is none");
                return self.fail(&format!("{key}.imports"), &problem);
            }
            let standby = match raw.standby {
                // With one alone a job that follows another at once would wait for its child.
                0 => slots.clamp(2, MAX_STANDBY),
                number => number,
            };
            if standby > MAX_STANDBY {
                let problem = format!("must be at most {MAX_STANDBY}");
                return self.fail(&format!("{key}.standby"), &problem);
            }
            let proc =
                self.choice(&format!("{key}.proc"), &raw.proc, &[("own", Proc::Own), ("none", Proc::None)])?;
            let allow_exec = match raw.allow_exec {
                RawExec::All(false) => Exec::Nothing,
                RawExec::All(true) => Exec::Anything,
                RawExec::Programs(paths) if paths.is_empty() => Exec::Nothing,
                RawExec::Programs(paths) => Exec::Programs(
                    paths.into_iter().map(|path| self.program(&key, path)).collect::<Result<_, _>>()?,
                ),
            };
            let RawEnvironment { warm, imports, fast_exit, huge_pages, .. } = raw;
            let environment = Environment {
                python,
                mounts,
                allow_exec,
                proc,
                warm,
                imports,
                standby,
                fast_exit,
                huge_pages,
            };
            environments.insert(name, environment);
        }
        Ok(environments)
    }

    /// A program, or a directory of programs, that no job can write to.
    fn program(&self, environment: &str, path: String) -> Result<PathBuf, ConfigError> {
        let mut steps = Path::new(&path).components().skip(1).peekable();
        let plain = Path::new(&path).is_absolute()
            && !path.contains('\0')
            && steps.peek().is_some()
            && steps.all(|step| matches!(step, Component::Normal(_)));
        let own = ["/work", "/tmp", "/dev", "/proc"].iter().find(|own| Path::new(&path).starts_with(own));
        let key = format!("{environment}.allow_exec");
        match own {
            _ if !plain => self.fail(
                &key,
                "must be true, false, or a list of programs and directories by absolute paths, such as \
                 [\"/sbin/ldconfig\", \"/usr/bin\"]",
            ),
            Some(own) => self.fail(&key, &format!("names {}; {own} is each job's own", quote(&path))),
            None => Ok(PathBuf::from(path)),
        }
    }

    fn listen(&self, listen: &str) -> Result<Option<SocketAddr>, ConfigError> {
        if matches!(listen, "" | "off") {
            return Ok(None);
        }
        listen.parse().map(Some).or_else(|_| {
            self.fail(
                "http.listen",
                &format!(
                    "is {}; it must be an address and a port such as `127.0.0.1:9464`, or `off`",
                    quote(listen)
                ),
            )
        })
    }

    fn level(&self, level: String) -> Result<String, ConfigError> {
        // A bare word that is no level would be taken for the name of a module, and silence all others.
        let meant = |directive: &str| {
            let levels = ["off", "error", "warn", "info", "debug", "trace"];
            directive.contains(['=', '[']) || levels.contains(&directive.trim().to_lowercase().as_str())
        };
        match tracing_subscriber::EnvFilter::try_new(&level) {
            Ok(_) if level.split(',').all(meant) => Ok(level),
            _ => self.fail(
                "log.level",
                &format!(
                    "is {}; it must be a filter such as `info` or `info,sandpiper=debug`",
                    quote(&level)
                ),
            ),
        }
    }

    /// The broker's default is a bound: before RabbitMQ 4.3 no consumer can ask for more.
    fn ack_timeout(&self, config: &Config) -> Result<(), ConfigError> {
        let (longest, rounds) = (config.longest_unacked(), config.rounds());
        if longest < ACK_TIMEOUT {
            return Ok(());
        }
        self.fail(
            "limits.timeout_ms.maximum",
            &format!(
                "lets a job stay unacked for {} ms ({rounds} rounds of it and `sandbox.start_timeout_ms`, as \
             `amqp.prefetch_surplus` waits behind `worker.slots`, and queues for their share by weight); the \
             broker gives up after {} ms: lower it or the surplus, or bring the weights together",
                longest.as_millis(),
                ACK_TIMEOUT.as_millis(),
            ),
        )
    }
}

pub(super) fn optional_path(text: &str) -> Option<PathBuf> {
    (!text.is_empty()).then(|| PathBuf::from(text))
}

/// Whether this is one part of a Python module's name, in ASCII.
fn is_identifier(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    name.bytes().all(plain) && !name.is_empty() && !name.as_bytes()[0].is_ascii_digit()
}
