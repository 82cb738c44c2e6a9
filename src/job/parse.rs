//! The way from a message body to either a [`Job`] or a [`Refusal`].

use uuid::Uuid;

use super::check;
use super::metadata::Written;
use super::model::{Admission, Job, Refusal, RefusalKind};
use super::raw::{self, Salvage};

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
