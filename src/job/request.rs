//! A job as the worker takes it on, what the operator lets a job ask for, and the way from a message body
//! to either a [`Job`] or a [`Refusal`].

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;

use super::check;
use super::metadata::Written;
use super::raw::{self, Salvage};
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

/// The name that a body gives its job, whatever else is wrong with it.
pub fn named(body: &[u8]) -> Option<String> {
    Salvage::from_body(body).id
}

/// Reads and checks one message body.
///
/// `message_id` is the AMQP property, the job's id where the body has none.
pub fn parse(body: &[u8], message_id: Option<&str>, admission: &Admission) -> Result<Job, Refusal> {
    if body.len() > admission.max_body_bytes {
        let reason = format!(
            "the body has {} bytes, above this worker's maximum of {}",
            body.len(),
            admission.max_body_bytes
        );
        return Err(Refusal::new(body, message_id, RefusalKind::Unacceptable, reason));
    }
    let mut raw = match raw::read(body) {
        Ok(raw) => raw,
        Err(reason) => return Err(Refusal::new(body, message_id, RefusalKind::Malformed, reason)),
    };
    let name = name(raw.id.as_deref(), message_id);
    let (named, id) = (name.is_some(), name.unwrap_or_else(unnamed));
    let (metadata, metadata_fits) = match raw.metadata.take() {
        None => (None, true),
        Some(Written::Fits(metadata)) => (Some(metadata), true),
        Some(Written::TooLarge) => (None, false),
    };
    let checked = if metadata_fits { check::check(raw, admission) } else { Err(check::metadata_too_large()) };
    match checked {
        Ok(job) => Ok(Job { id, named, metadata, ..job }),
        Err(reason) => Err(Refusal { id, metadata, kind: RefusalKind::Unacceptable, reason }),
    }
}

impl Refusal {
    /// The refusal of `body`, with what can be had of its names.
    pub fn new(body: &[u8], message_id: Option<&str>, kind: RefusalKind, reason: String) -> Self {
        let Salvage { id, metadata } = Salvage::from_body(body);
        Self { id: name(id.as_deref(), message_id).unwrap_or_else(unnamed), metadata, kind, reason }
    }
}

/// The name that a job goes by, where it has one.
fn name(id: Option<&str>, message_id: Option<&str>) -> Option<String> {
    let message_id = message_id.filter(|id| !id.is_empty());
    if let Some(id) = id.or(message_id).filter(|id| check::is_id(id)) {
        return Some(id.to_owned());
    }
    let message_id = message_id?;
    if check::is_id(message_id) {
        return Some(message_id.to_owned());
    }
    // Brokers let any text be a message id. One that cannot be a job id still names this message, so the
    // id is made from it: it stays the same over every delivery, and readers can drop duplicates.
    Some(Uuid::new_v5(&Uuid::NAMESPACE_OID, message_id.as_bytes()).to_string())
}

/// A name for a job that has none.
fn unnamed() -> String {
    Uuid::now_v7().to_string()
}
