//! What every worker hears at once: messages of the control exchange.

use serde::{Deserialize, Serialize};

/// A message to all workers: a JSON object with one field.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// `{"cancel": "ID"}`: end the job of that id, wherever it waits or runs. Workers without it do nothing.
    Cancel(String),
}

impl Command {
    /// As it travels.
    pub(super) fn to_body(&self) -> Vec<u8> {
        // A string in a map of one key: nothing in it can fail to be JSON.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// What a body says, where it says anything that this version understands.
    pub(super) fn parse(body: &[u8]) -> Option<Self> {
        serde_json::from_slice(body).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_survives_its_way_and_the_unknown_is_none() {
        let cancel = Command::Cancel("job-1".into());
        assert_eq!(cancel.to_body(), br#"{"cancel":"job-1"}"#);
        assert_eq!(Command::parse(&cancel.to_body()), Some(cancel));
        for body in [&b"{}"[..], b"", b"{\"reboot\":\"now\"}", b"\xff", b"[]"] {
            assert_eq!(Command::parse(body), None);
        }
    }
}
