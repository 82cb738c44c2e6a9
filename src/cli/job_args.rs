//! A job as the command line describes it, for `exec` and `submit`.
//!
//! Flags become the same JSON document that a publisher would send, so that there is one set of checks and
//! one set of messages for every way in.

use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use clap::Args;
use serde_json::{Map, Value, json};

use crate::job::{Refusal, RefusalKind};
use crate::sys::input::readable_within;

/// How long an open pipe on standard input may stay silent before the job runs without it.
const SILENT_PIPE: std::time::Duration = std::time::Duration::from_millis(500);

/// What the command line asks for.
#[derive(Debug)]
pub(super) enum Asked {
    /// A message body, as a publisher would send it.
    Body(Vec<u8>),
    /// What cannot even be written down as one.
    Refused(Refusal),
}

/// Where the job comes from.
#[derive(Debug, Args)]
pub(super) struct JobArgs {
    /// Python source file; - reads the source from standard input
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,

    /// The program's arguments, `sys.argv[1:]`; put -- before those that begin with a dash
    #[arg(value_name = "ARGS", requires = "file")]
    args: Vec<String>,

    /// A whole job as JSON: the document itself, a file that holds it, or - for standard input
    #[arg(long, value_name = "JSON|FILE|-", conflicts_with_all = ["file", "JobFlags"])]
    job: Option<String>,

    #[command(flatten)]
    flags: JobFlags,
}

/// What can be asked for a job, as flags.
#[derive(Debug, Args)]
#[command(next_help_heading = "Job")]
pub(super) struct JobFlags {
    /// Name of the job; a new one where none is given
    #[arg(long, value_name = "ID")]
    id: Option<String>,

    /// Named interpreter of the configuration
    #[arg(long, value_name = "NAME")]
    environment: Option<String>,

    /// Environment variable for the job (repeatable)
    #[arg(long, value_name = "NAME=VALUE")]
    env: Vec<String>,

    /// The job's standard input, - for ours. Without this ours is passed on, unless it is a terminal or carries
    /// the code; an open pipe that stays silent is not waited for
    #[arg(long, value_name = "FILE|-")]
    stdin: Option<PathBuf>,

    /// Lay a file into the working directory: --file data.csv, or --file name/inside=path/outside (repeatable)
    #[arg(long = "file", value_name = "[INSIDE=]FILE")]
    files: Vec<String>,

    /// Return the files that match this glob pattern (repeatable)
    #[arg(long = "artifact", value_name = "PATTERN")]
    artifacts: Vec<String>,

    /// Code that runs before the system call filter; only where the configuration allows it
    #[arg(long, value_name = "FILE")]
    preload: Option<PathBuf>,

    /// Let the job use the network; only where the configuration allows it
    #[arg(long)]
    enable_network: bool,

    /// Wall time in milliseconds
    #[arg(long, value_name = "MS", help_heading = "Limits")]
    timeout_ms: Option<u64>,

    /// CPU time in milliseconds, over all processes
    #[arg(long, value_name = "MS", help_heading = "Limits")]
    cpu_ms: Option<u64>,

    /// Memory in bytes, files in the working directory included
    #[arg(long, value_name = "BYTES", help_heading = "Limits")]
    memory_bytes: Option<u64>,

    /// Bytes of standard output, and as many of standard error
    #[arg(long, value_name = "BYTES", help_heading = "Limits")]
    output_bytes: Option<u64>,

    /// Processes at one time, threads included
    #[arg(long, value_name = "N", help_heading = "Limits")]
    processes: Option<u64>,

    /// Open descriptors of one process
    #[arg(long, value_name = "N", help_heading = "Limits")]
    open_files: Option<u64>,

    /// Bytes in the working directory and /tmp together
    #[arg(long, value_name = "BYTES", help_heading = "Limits")]
    disk_bytes: Option<u64>,

    /// Processors that all processes may use together, such as 1.5
    #[arg(long, value_name = "N", help_heading = "Limits")]
    cpus: Option<f64>,
}

impl JobArgs {
    /// The job as a message body. At most `largest` bytes are read of anything, and one more so that the
    /// check of the body's size still sees that it is too large.
    pub(super) fn read(&self, largest: usize) -> anyhow::Result<Asked> {
        match (&self.job, &self.file) {
            (Some(job), _) if job.trim_start().starts_with(['{', '[', '"']) => {
                Ok(Asked::Body(job.clone().into_bytes()))
            }
            (Some(job), _) => read(Path::new(job), largest).map(Asked::Body),
            (None, Some(file)) => self.flags.read(file, &self.args, largest),
            (None, None) => bail!("nothing to run: give a FILE, - for code on standard input, or --job"),
        }
    }
}

impl JobFlags {
    fn read(&self, file: &Path, args: &[String], largest: usize) -> anyhow::Result<Asked> {
        let code_on_stdin = file == Path::new("-");
        if code_on_stdin && self.stdin.as_deref() == Some(Path::new("-")) {
            bail!("standard input cannot carry both the code and the job's input");
        }
        let mut job = Map::new();
        for (field, source) in [("code", Some(file)), ("preload", self.preload.as_deref())] {
            let Some(source) = source else { continue };
            match String::from_utf8(read(source, largest)?) {
                Ok(text) => job.insert(field.into(), text.into()),
                Err(error) => return Ok(self.refused(field, &error)),
            };
        }
        let stdin = match &self.stdin {
            Some(path) => read(path, largest)?,
            None if code_on_stdin => Vec::new(),
            None => our_stdin(largest)?,
        };
        if !stdin.is_empty() {
            job.insert("stdin".into(), json!({ "base64": BASE64.encode(stdin) }));
        }
        for (name, value) in [("id", &self.id), ("environment", &self.environment)] {
            if let Some(value) = value {
                job.insert(name.into(), value.as_str().into());
            }
        }
        if self.enable_network {
            job.insert("enable_network".into(), true.into());
        }
        if !args.is_empty() {
            job.insert("args".into(), json!(args));
        }
        if !self.artifacts.is_empty() {
            job.insert("artifacts".into(), json!(self.artifacts));
        }
        let files: Vec<Value> =
            self.files.iter().map(|file| laid_in(file, largest)).collect::<Result<_, _>>()?;
        if !files.is_empty() {
            job.insert("files".into(), files.into());
        }
        let env: Map<String, Value> = self.env.iter().map(|pair| variable(pair)).collect::<Result<_, _>>()?;
        if !env.is_empty() {
            job.insert("env".into(), env.into());
        }
        if let Some(timeout_ms) = self.timeout_ms {
            job.insert("timeout_ms".into(), timeout_ms.into());
        }
        let mut limits: Map<String, Value> = [
            ("cpu_ms", self.cpu_ms),
            ("memory_bytes", self.memory_bytes),
            ("output_bytes", self.output_bytes),
            ("processes", self.processes),
            ("open_files", self.open_files),
            ("disk_bytes", self.disk_bytes),
        ]
        .into_iter()
        .filter_map(|(name, limit)| limit.map(|limit| (name.to_owned(), limit.into())))
        .collect();
        if let Some(cpus) = self.cpus {
            limits.insert("cpus".into(), cpus.into());
        }
        if !limits.is_empty() {
            job.insert("limits".into(), limits.into());
        }
        serde_json::to_vec(&job).map(Asked::Body).context("failed to write the job as JSON")
    }

    fn refused(&self, field: &str, error: &std::string::FromUtf8Error) -> Asked {
        let at = error.utf8_error().valid_up_to();
        Asked::Refused(Refusal {
            id: self.id.clone().unwrap_or_else(|| uuid::Uuid::now_v7().to_string()),
            metadata: None,
            kind: RefusalKind::Malformed,
            reason: format!("`{field}` is not UTF-8 at byte {at}; save it as UTF-8"),
        })
    }
}

fn variable(pair: &str) -> anyhow::Result<(String, Value)> {
    let (name, value) =
        pair.split_once('=').with_context(|| format!("--env {pair}: write it as NAME=VALUE"))?;
    Ok((name.to_owned(), value.into()))
}

fn laid_in(file: &str, largest: usize) -> anyhow::Result<Value> {
    let (inside, outside) = match file.split_once('=') {
        Some((inside, outside)) => (inside, Path::new(outside)),
        None => {
            let name = Path::new(file).file_name().and_then(|name| name.to_str());
            (name.with_context(|| format!("--file {file}: name it inside, as NAME={file}"))?, Path::new(file))
        }
    };
    Ok(json!({ "path": inside, "base64": BASE64.encode(read(outside, largest)?) }))
}

fn read(path: &Path, largest: usize) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let most = largest as u64 + 1;
    if path == Path::new("-") {
        std::io::stdin().lock().take(most).read_to_end(&mut bytes)
    } else {
        std::fs::File::open(path).and_then(|file| file.take(most).read_to_end(&mut bytes))
    }
    .with_context(|| format!("failed to read {}", shown(path)))?;
    Ok(bytes)
}

fn shown(path: &Path) -> String {
    if path == Path::new("-") { "standard input".into() } else { path.display().to_string() }
}

/// What stands on our standard input for the job. A pipe that somebody holds open without writing must not
/// hang a job that never asked for input, so silence is waited for only briefly, and said.
fn our_stdin(largest: usize) -> anyhow::Result<Vec<u8>> {
    let stdin = std::io::stdin();
    if stdin.is_terminal() {
        return Ok(Vec::new());
    }
    if !readable_within(&stdin, SILENT_PIPE).unwrap_or(false) {
        super::output::complain(
            "standard input is open but silent, so the job runs without it; --stdin - waits for it",
        );
        return Ok(Vec::new());
    }
    read(Path::new("-"), largest)
}
