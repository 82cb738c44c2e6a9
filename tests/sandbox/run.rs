//! One job through `sandpiper exec --job - --json`, and all that can be seen of it from outside.

use std::fmt;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::case::{Case, slowness};
use crate::supervise;

/// In the worker's environment, as an operator's password would be; no job may ever see it.
pub(crate) const SECRET: &str = "amqp://canary:hunter2hunter2@127.0.0.1:1/canary";

/// Beyond the job's own wall time: start of the worker and of python, on a busy machine.
const SLACK: Duration = Duration::from_secs(20);

/// What starting a process may take, in milliseconds; the worker's own default.
const START_MS: u64 = 10_000;

pub(crate) struct Ran {
    /// The one JSON document on standard output, or why there is none.
    pub(crate) result: Result<Value, String>,
    pub(crate) report: supervise::Report,
    /// Files that were left in the directory it ran in, and in its temporary directory.
    pub(crate) files: Vec<PathBuf>,
    pub(crate) elapsed: Duration,
    log: String,
}

pub(crate) fn exec(case: &Case) -> Ran {
    let place = tempfile::tempdir().unwrap();
    let (cwd, tmp, report) =
        (place.path().join("cwd"), place.path().join("tmp"), place.path().join("report"));
    std::fs::create_dir(&cwd).unwrap();
    std::fs::create_dir(&tmp).unwrap();
    let limit = Duration::from_millis(case.timeout_ms()) + SLACK * slowness().try_into().unwrap();

    let mut command = Command::new(std::env::current_exe().unwrap());
    command.arg(supervise::FLAG).arg(&report).arg(limit.as_millis().to_string());
    command.arg(worker()).args(["exec", "--job", "-", "--json"]);
    if is_warm() {
        command.arg("--warm");
    }
    for key in case.set.iter().chain(&patience()) {
        command.arg("--set").arg(key);
    }
    command.env_clear().env("PATH", "/usr/local/bin:/usr/bin:/bin").env("TMPDIR", &tmp);
    command.env("SANDPIPER_AMQP__URL", SECRET);
    if let Some(run) = std::env::var_os("SP_TEST_RUN") {
        command.env("SP_TEST_RUN", run);
    }
    command.current_dir(&cwd).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());

    let began = Instant::now();
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let job = case.job().to_string();
    // A worker that ended early closes its end; what it said meanwhile tells more than this error.
    let feeder = std::thread::spawn(move || stdin.write_all(job.as_bytes()));
    let output = child.wait_with_output().unwrap();
    let elapsed = began.elapsed();
    drop(feeder.join().unwrap());

    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    let report =
        std::fs::read(&report).unwrap_or_else(|e| panic!("the supervisor gave no report: {e}\n{log}"));
    Ran {
        result: serde_json::from_slice(&output.stdout)
            .map_err(|e| format!("{e}: {}", String::from_utf8_lossy(&output.stdout))),
        report: serde_json::from_slice(&report).unwrap(),
        files: [cwd, tmp].iter().flat_map(|d| entries(d)).collect(),
        elapsed,
        log,
    }
}

/// Whether this machine has a layer of the sandbox, as the worker sees it.
pub(crate) fn has(layer: &str) -> bool {
    let output = Command::new(worker()).args(["doctor", "--layers", "--json"]).env_clear().output().unwrap();
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let check = found["checks"].as_array().unwrap().iter().find(|c| c["name"] == layer);
    check.unwrap_or_else(|| panic!("doctor knows no layer {layer}"))["ok"] == true
}

/// Settings of a worker on a slow machine, as `--set` takes them.
pub(crate) fn patience() -> Vec<String> {
    let slow = slowness();
    if slow == 1 { Vec::new() } else { vec![format!("sandbox.start_timeout_ms={}", START_MS * slow)] }
}

/// Jobs are to start in forks of a warm interpreter.
pub(crate) fn is_warm() -> bool {
    std::env::var_os("SP_TEST_WARM").is_some()
}

pub(crate) fn worker() -> PathBuf {
    std::env::var_os("SP_TEST_BIN").map_or_else(|| env!("CARGO_BIN_EXE_sandpiper").into(), PathBuf::from)
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect()
}

impl Ran {
    pub(crate) fn stdout_of_job(&self) -> String {
        self.result.as_ref().ok().and_then(|r| r["stdout"].as_str()).unwrap_or_default().to_owned()
    }
}

impl fmt::Display for Ran {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let short = |text: &str| -> String {
            let cut: String = text.chars().take(4_000).collect();
            if cut.len() < text.len() { format!("{cut} [{} bytes in all]", text.len()) } else { cut }
        };
        match &self.result {
            Ok(result) => write!(f, "result: {}", short(&result.to_string()))?,
            Err(e) => write!(f, "no result: {}", short(e))?,
        }
        write!(
            f,
            "\n  seen: {:?} after {:?}\n  worker's log: {}",
            self.report,
            self.elapsed,
            short(&self.log)
        )
    }
}
