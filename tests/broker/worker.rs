//! The real `sandpiper serve` as a process of its own.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::eventually;
use crate::oracle::Process;

/// Workers that this process has started.
static WORKERS: AtomicU32 = AtomicU32::new(0);

/// A running worker, killed when this is dropped.
pub(crate) struct Worker {
    child: Child,
    address: String,
    log: tempfile::NamedTempFile,
    /// What it has for temporary files, all its own.
    scratch: tempfile::TempDir,
}

/// What is unusual about where a worker runs.
#[derive(Clone, Debug, Default)]
pub(crate) struct Surroundings {
    /// A program and its arguments that becomes the worker, whose own command line follows.
    pub(crate) through: Vec<String>,
    pub(crate) environment: Vec<(&'static str, String)>,
    /// Where its log and its temporary files are.
    pub(crate) disk: Option<PathBuf>,
}

impl Worker {
    /// Starts one with further settings (`worker.slots=4`) and waits for its port, not for the broker.
    pub(crate) async fn start(url: &str, settings: &[String]) -> Self {
        Self::start_in(url, settings, &Surroundings::default()).await
    }

    /// The same in a place of its own kind.
    pub(crate) async fn start_in(url: &str, settings: &[String], surroundings: &Surroundings) -> Self {
        let disk = surroundings.disk.clone().unwrap_or_else(std::env::temp_dir);
        let log = tempfile::NamedTempFile::new_in(&disk).unwrap();
        let program = env!("CARGO_BIN_EXE_sandpiper").to_owned();
        let line: Vec<&String> = surroundings.through.iter().chain([&program]).collect();
        let mut command = Command::new(line[0]);
        command.args(&line[1..]).args(["serve", "--listen", "127.0.0.1:0", "--set", "log.format=json"]);
        // Reconnects in tests shall not wait for half a minute.
        command.args(["--set", "amqp.reconnect_max_ms=2000"]);
        // Jobs of two workers under one user would share what the kernel counts for it, and any number of tests
        // may run on this machine.
        let number = WORKERS.fetch_add(1, Ordering::Relaxed);
        let uids = 3_000_000 + std::process::id() % 30_000 * 1_000 + number % 60 * 16;
        command.args(["--set", &format!("sandbox.uid_base={uids}")]);
        for setting in settings {
            command.args(["--set", setting]);
        }
        let scratch = tempfile::tempdir_in(&disk).unwrap();
        let child = command
            .envs(surroundings.environment.iter().map(|(name, value)| (name, value)))
            .env("SANDPIPER_AMQP__URL", url)
            .env("TMPDIR", scratch.path())
            .stdin(Stdio::null())
            .stderr(log.reopen().unwrap())
            .spawn()
            .unwrap();
        let mut worker = Self { child, address: String::new(), log, scratch };
        worker.address = eventually("the worker opens its port", async || {
            let log = worker.log();
            assert!(worker.child.try_wait().unwrap().is_none(), "the worker ended");
            let mut events =
                log.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
            events.find_map(|event| event["address"].as_str().map(ToOwned::to_owned))
        })
        .await;
        worker
    }

    /// Starts one and waits until it takes jobs.
    pub(crate) async fn ready(url: &str, settings: &[String]) -> Self {
        Self::ready_in(url, settings, &Surroundings::default()).await
    }

    /// The same in a place of its own kind.
    pub(crate) async fn ready_in(url: &str, settings: &[String], surroundings: &Surroundings) -> Self {
        let worker = Self::start_in(url, settings, surroundings).await;
        worker.until_ready().await;
        worker
    }

    /// Waits until as many children stand by as do by default.
    pub(crate) async fn until_warm(&self) {
        let standing = "sandpiper_standby_children{environment=\"default\"}";
        eventually("children stand by", async || (self.metric(standing) >= 2.0).then_some(())).await;
    }

    pub(crate) async fn until_ready(&self) {
        eventually("the worker is ready", async || self.get("/readyz").0.then_some(())).await;
    }

    pub(crate) async fn until_not_ready(&self) {
        eventually("the worker is not ready", async || (!self.get("/readyz").0).then_some(())).await;
    }

    /// Whether a page answers 200, and its text.
    pub(crate) fn get(&self, path: &str) -> (bool, String) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: worker\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.starts_with("HTTP/1.1 200"), body.to_owned())
    }

    pub(crate) fn assert_alive(&mut self) {
        assert!(self.child.try_wait().unwrap().is_none(), "the worker ended: {}", self.log());
        assert!(self.get("/healthz").0, "not alive");
    }

    /// The value of one line of the metrics, named with its labels.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").1;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.unwrap_or_else(|| panic!("{name} is missing")).parse().unwrap()
    }

    /// The sum over all children of a metric, whatever their labels.
    pub(crate) fn total(&self, name: &str) -> f64 {
        let text = self.get("/metrics").1;
        let children = text.lines().filter(|line| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with('{') || rest.starts_with(' '))
        });
        let values: Vec<f64> = children
            .filter_map(|line| line.rsplit_once(' '))
            .map(|(_, value)| value.parse().unwrap())
            .collect();
        assert!(!values.is_empty(), "{name} is missing");
        values.iter().sum()
    }

    pub(crate) fn terminate(&self) {
        self.signal(nix::sys::signal::Signal::SIGTERM);
    }

    fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Kills it as the kernel would, and waits until it is collected.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Every process below it, as long as it lives.
    pub(crate) fn processes(&self) -> Vec<Process> {
        crate::oracle::descendants(self.pid())
    }

    /// What it left among its temporary files.
    pub(crate) fn scratch(&self) -> Vec<std::path::PathBuf> {
        std::fs::read_dir(self.scratch.path()).unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    /// Waits for its end.
    pub(crate) async fn ended(&mut self) -> ExitStatus {
        eventually("the worker ends", async || self.child.try_wait().unwrap()).await
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.log.path()).unwrap()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("--- the worker's log\n{}", self.log());
        }
        // It is gone already where the test came to its end.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
