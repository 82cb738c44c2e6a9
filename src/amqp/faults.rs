//! What the broker means by closing a channel or a connection.

use lapin::ErrorKind;
use lapin::protocol::{AMQPErrorKind, AMQPHardError};

use crate::amqp::Error;

const NOT_FOUND: u16 = 404;
const PRECONDITION_FAILED: u16 = 406;
const CONTENT_TOO_LARGE: u16 = 311;

/// Whether the broker closed a channel, and nothing but that.
pub(super) fn is_refusal(error: &lapin::Error) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(refused) if matches!(refused.kind(), AMQPErrorKind::Soft(_)))
}

/// Whether the broker closed the connection, with a reason.
pub(super) fn is_closed_by_broker(error: &Error) -> bool {
    let source = match error {
        Error::Lost(Some(source)) | Error::Operation { source, .. } => source,
        _ => return false,
    };
    matches!(source.kind(), ErrorKind::ProtocolError(closed) if matches!(closed.kind(), AMQPErrorKind::Hard(hard)
        if !matches!(hard, AMQPHardError::CONNECTIONFORCED)))
}

/// Whether the broker refused a message for its size, and the largest one that it takes, if it says so.
pub(super) fn too_large(error: &lapin::Error) -> Option<Option<usize>> {
    let ErrorKind::ProtocolError(refused) = error.kind() else { return None };
    let said = refused.get_message().as_str();
    match refused.get_id() {
        CONTENT_TOO_LARGE => {}
        PRECONDITION_FAILED if said.contains("larger than") => {}
        _ => return None,
    }
    // "message size 6291861 is larger than configured max size 4194304"
    let most = said.rsplit(|char: char| !char.is_ascii_digit()).find(|word| !word.is_empty());
    Some(most.and_then(|most| most.parse().ok()))
}

pub(super) fn is_not_found(error: &lapin::Error) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(refused) if refused.get_id() == NOT_FOUND)
}

/// Whether it refused a message that names another user than its publisher.
pub(super) fn is_wrong_user(error: &lapin::Error) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(refused)
        if refused.get_id() == PRECONDITION_FAILED && refused.get_message().as_str().contains("user_id"))
}
