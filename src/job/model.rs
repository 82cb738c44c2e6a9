//! A job as the worker takes it on, what the operator lets a job ask for, and why a body is no such job.

use std::collections::{BTreeMap, BTreeSet};

use crate::job::{Bounds, Cpus, Limits, Metadata};

/// A job that passed every check: defaults filled in, limits inside the operator's maxima.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// 1-128 of `A-Za-z0-9._:-`.
    pub id: String,
    /// Its publisher gave it that, or the message that it came in: it goes by it however often it comes.
    pub named: bool,
    /// The source, as it came.
    pub code: String,
    /// Code that runs before the filter; empty where there is none.
    pub preload: String,
    /// The host's network.
    pub enable_network: bool,
    /// One of the configured environments.
    pub environment: String,
    /// Standard input.
    pub stdin: Vec<u8>,
    /// `sys.argv[1:]`.
    pub args: Vec<String>,
    /// Added to the process's environment.
    pub env: BTreeMap<String, String>,
    /// Laid into the working directory.
    pub files: Vec<InputFile>,
    /// Glob patterns of files to return.
    pub artifacts: Vec<String>,
    /// In force for this job.
    pub limits: Limits,
    /// Past it the job is not run.
    pub deadline: Option<jiff::Timestamp>,
    /// Send output while it runs.
    pub stream: bool,
    /// Echoed in the result.
    pub metadata: Option<Metadata>,
}

/// A file for the working directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputFile {
    /// Relative, and staying inside; no `.`, `..` or empty part.
    pub path: String,
    /// Its bytes.
    pub content: Vec<u8>,
}

/// What the operator lets a job ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admission {
    /// Limits by default, and at most.
    pub bounds: Bounds,
    /// Largest body that is read at all.
    pub max_body_bytes: usize,
    /// `preload` may be given.
    pub allow_preload: bool,
    /// `enable_network` may be true.
    pub allow_network: bool,
    /// The names that `environment` may have.
    pub environments: BTreeSet<String>,
}

impl Default for Admission {
    /// What the default configuration allows.
    fn default() -> Self {
        let mut bounds = Bounds::default();
        bounds.maximum.cpus = Cpus::of_this_machine();
        Self {
            bounds,
            max_body_bytes: 8 << 20,
            allow_preload: false,
            allow_network: false,
            environments: BTreeSet::from(["default".into()]),
        }
    }
}

/// Why a body is not run, and all that its requester needs to recognise it.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{reason}")]
pub struct Refusal {
    /// The job's id where it has an acceptable one, else the one it would have got.
    pub id: String,
    /// The job's metadata, where it could be had.
    pub metadata: Option<Metadata>,
    /// Where the message goes.
    pub kind: RefusalKind,
    /// One sentence that names the field, what is wrong with it, and the remedy.
    pub reason: String,
}

/// The two ways in which a body is not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalKind {
    /// It cannot be read as a job: not JSON, or not of the contract's fields and types.
    Malformed,
    /// It is a job, and asks for what it may not have.
    Unacceptable,
}
