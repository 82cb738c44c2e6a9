//! A job's metadata: a JSON object that is handed through as its publisher wrote it.
//!
//! Read into numbers and maps and written again it would be another text: integers past 64 bits rounded, floats
//! another in their last place, names in another order.

use std::fmt;

use serde::de::{Deserializer, Error, Unexpected};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::json::{Fault, code_unit};

/// Bytes of metadata as compact JSON.
pub(super) const METADATA_MAX: usize = 4 << 10;
/// Bytes of it as it is written, with spaces, and six for a character where the publisher escapes.
const WRITTEN_MAX: usize = 8 * METADATA_MAX;

/// A JSON object, digit for digit and name for name as it came.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Metadata(Box<RawValue>);

impl Metadata {
    /// The object as it is written.
    pub fn as_json(&self) -> &str {
        self.0.get()
    }

    /// From a body that is refused: none where anything is wrong with it.
    pub(super) fn salvage(written: &[u8]) -> Option<Self> {
        match serde_json::from_slice::<Option<Written>>(written) {
            Ok(Some(Written::Fits(metadata))) if metadata.is_readable() => Some(metadata),
            _ => None,
        }
    }

    /// Whether everybody can read it: no halves of surrogate pairs, no more nesting than in a job.
    pub(super) fn is_readable(&self) -> bool {
        // Within the job, as in the result, it is one level down.
        Fault::find(&format!("[{}]", self.as_json())).is_none()
    }
}

impl PartialEq for Metadata {
    fn eq(&self, other: &Self) -> bool {
        self.as_json() == other.as_json()
    }
}

/// Metadata in a job, if it is small enough to be echoed.
#[derive(Debug)]
pub(super) enum Written {
    /// At most [`METADATA_MAX`] bytes.
    Fits(Metadata),
    /// More than that.
    TooLarge,
}

impl<'de> Deserialize<'de> for Written {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = <&'de RawValue>::deserialize(deserializer)?;
        let written = raw.get();
        let found = match written.as_bytes().first() {
            Some(b'{') if written.len() > WRITTEN_MAX || weight(written) > METADATA_MAX => {
                return Ok(Self::TooLarge);
            }
            Some(b'{') => return Ok(Self::Fits(Metadata(raw.to_owned()))),
            Some(b'[') => Unexpected::Seq,
            Some(b'"') => Unexpected::Str(""),
            Some(b't') => Unexpected::Bool(true),
            Some(b'f') => Unexpected::Bool(false),
            Some(b'n') => Unexpected::Unit,
            _ => Unexpected::Other("a number"),
        };
        Err(D::Error::invalid_type(found, &AnObject))
    }
}

struct AnObject;

impl serde::de::Expected for AnObject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }
}

/// The bytes that JSON takes without spaces, and without escapes that it does not need.
fn weight(json: &str) -> usize {
    let mut rest = json.as_bytes();
    let (mut bytes, mut in_text) = (0, false);
    while let Some((&byte, after)) = rest.split_first() {
        let (cost, length) = match byte {
            b'"' => {
                in_text = !in_text;
                (1, 1)
            }
            b'\\' => escape_weight(rest),
            b' ' | b'\t' | b'\n' | b'\r' if !in_text => (0, 1),
            _ => (1, 1),
        };
        bytes += cost;
        rest = after.get(length - 1..).unwrap_or_default();
    }
    bytes
}

/// What the character that is escaped here takes, and how long its escape is.
fn escape_weight(rest: &[u8]) -> (usize, usize) {
    match (rest.get(1), rest.get(..6).and_then(code_unit)) {
        (Some(b'u'), Some(unit)) => {
            let cost = match unit {
                0x08 | 0x09 | 0x0a | 0x0c | 0x0d | 0x22 | 0x5c => 2,
                0..0x20 => 6,
                0x20..0x80 => 1,
                // Half of a pair is half of four bytes.
                0x80..0x800 | 0xd800..=0xdfff => 2,
                _ => 3,
            };
            (cost, 6)
        }
        (Some(b'/'), _) => (1, 2),
        _ => (2, 2),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;

    #[test]
    fn the_weight_is_that_of_compact_json() {
        for written in [
            r#"{"a": [1, 2.50, true ], "b" : null}"#,
            r#"{"a\/b": "\u00e9\u4f60\ud83d\ude00", "c": "\u0041\u0000\u001f\n\"\\"}"#,
            "{ \"a b\" :\n\t\"c  d\" }",
        ] {
            let value: serde_json::Value = serde_json::from_str(written).unwrap();
            // The number is not written shorter here.
            let compact = value.to_string().replace("2.5,", "2.50,");
            assert_eq!(weight(written), compact.len(), "{written}");
        }
    }
}
