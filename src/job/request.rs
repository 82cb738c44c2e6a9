//! A job as a publisher writes it, and as the worker takes it on.

use std::collections::BTreeMap;

use crate::job::Limits;

/// A job that passed every check: defaults filled in, limits inside the operator's maxima.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// 1-128 of `A-Za-z0-9._:-`.
    pub id: String,
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
    pub metadata: Option<serde_json::Map<String, serde_json::Value>>,
}

/// A file for the working directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputFile {
    /// Relative, and staying inside.
    pub path: String,
    /// Its bytes.
    pub content: Vec<u8>,
}
