//! A piece of output of a job that still runs, as its requester reads it.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::job::Encoding;

/// Namespace of the message ids of output: a random UUID, chosen once.
const OUTPUT: Uuid = Uuid::from_u128(0xc0f5_31d9_7e2a_4a86_b1d4_09e7_5a38_f26b);

/// The two streams of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A piece of output. All of it stands in the result as well.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "Output", title = "Sandpiper output", deny_unknown_fields)]
pub struct Chunk {
    /// The job's id.
    pub id: String,
    /// Counted from 0, over both streams. A job that is delivered again begins anew.
    pub seq: u64,
    /// Which of the two.
    pub stream: Stream,
    /// What was written, whole characters.
    pub data: String,
    /// How `data` is written.
    pub encoding: Encoding,
}

impl Chunk {
    /// Writes `bytes` down as text where they are.
    pub fn new(id: &str, seq: u64, stream: Stream, bytes: Vec<u8>) -> Self {
        let (data, encoding) = match String::from_utf8(bytes) {
            Ok(text) => (text, Encoding::Utf8),
            Err(error) => (STANDARD.encode(error.as_bytes()), Encoding::Base64),
        };
        Self { id: id.to_owned(), seq, stream, data, encoding }
    }

    /// The bytes that were written.
    ///
    /// # Errors
    /// `data` is not what `encoding` says.
    pub fn bytes(&self) -> Result<Vec<u8>, base64::DecodeError> {
        match self.encoding {
            Encoding::Utf8 => Ok(self.data.as_bytes().to_vec()),
            Encoding::Base64 => STANDARD.decode(&self.data),
        }
    }

    /// The `message_id`: the same for every duplicate of this piece.
    pub fn message_id(&self, attempt: u32) -> Uuid {
        Uuid::new_v5(&OUTPUT, format!("{attempt} {} {}", self.seq, self.id).as_bytes())
    }
}

/// Cuts off the beginning of a character whose end has not come yet.
pub fn incomplete_end(bytes: &mut Vec<u8>) -> Vec<u8> {
    match std::str::from_utf8(bytes) {
        Err(error) if error.error_len().is_none() => bytes.split_off(error.valid_up_to()),
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_survive_whatever_they_are() {
        for (bytes, encoding) in [(&b"hi\0"[..], Encoding::Utf8), (b"\xff\xfe", Encoding::Base64)] {
            let chunk = Chunk::new("j", 0, Stream::Stdout, bytes.to_vec());
            assert_eq!(chunk.encoding, encoding);
            assert_eq!(chunk.bytes().as_deref(), Ok(bytes));
        }
    }

    #[test]
    fn only_an_unfinished_character_is_cut_off() {
        for (bytes, whole) in [("añ".as_bytes(), 3), (&"añ".as_bytes()[..2], 1), (b"a\xffb", 3), (b"", 0)] {
            let mut kept = bytes.to_vec();
            let rest = incomplete_end(&mut kept);
            assert_eq!(kept.len(), whole, "{bytes:?}");
            assert_eq!([kept, rest].concat(), bytes);
        }
    }
}
