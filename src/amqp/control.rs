//! What every worker hears at once: messages of the control exchange, and what it says back.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::amqp::Properties;
use crate::job;

/// A message to all workers: a JSON object with one field.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// `{"cancel": "ID"}`: end the job of that id, wherever it waits or runs. Workers without it do nothing.
    Cancel(String),
    /// `{"ping": {}}`: say who you are and what you do, to the message's `reply_to`.
    Ping {},
}

/// A command as it was received.
#[derive(Clone, Debug, PartialEq)]
pub struct ReceivedCommand {
    /// What to do.
    pub command: Command,
    /// Where an answer is wanted, and what it has to carry.
    pub properties: Properties,
}

/// What a worker says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Pong {
    /// Its name, as in its results.
    pub worker: String,
    /// The version of the worker.
    pub version: String,
    /// When it started.
    #[schemars(with = "String", extend("format" = "date-time"))]
    pub since: jiff::Timestamp,
    /// Jobs it runs at one time.
    pub slots: usize,
    /// The queues that it takes them from.
    pub queues: Vec<String>,
    /// It takes no more jobs and ends when those that run have ended.
    pub draining: bool,
    /// The jobs that it holds, in the order in which they came.
    pub jobs: Vec<JobInfo>,
}

/// A job that a worker holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct JobInfo {
    /// Its id.
    pub id: String,
    /// When it came to the worker.
    #[schemars(with = "String", extend("format" = "date-time"))]
    pub since: jiff::Timestamp,
    /// It runs; else it waits for a slot.
    pub running: bool,
}

impl Command {
    /// As it travels.
    pub(super) fn to_body(&self) -> Vec<u8> {
        // A string in a map of one key: nothing in it can fail to be JSON.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// What a body says, where it says anything that this version understands.
    pub(super) fn parse(body: &[u8]) -> Option<Self> {
        let command = serde_json::from_slice(body).ok()?;
        // It is logged, and kept for a while, and anybody may have sent it.
        match &command {
            Self::Cancel(id) if !job::is_id(id) => None,
            _ => Some(command),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_command_survives_its_way_and_the_unknown_is_none() {
        for (command, body) in [
            (Command::Cancel("job-1".into()), &br#"{"cancel":"job-1"}"#[..]),
            (Command::Ping {}, br#"{"ping":{}}"#),
        ] {
            assert_eq!(command.to_body(), body);
            assert_eq!(Command::parse(body), Some(command));
        }
        for body in
            [&b"{}"[..], b"", b"{\"reboot\":\"now\"}", b"\xff", b"[]", b"\"ping\"", b"{\"cancel\":\"no id\"}"]
        {
            assert_eq!(Command::parse(body), None, "{body:?}");
        }
        let long = Command::Cancel("x".repeat(1 << 20)).to_body();
        assert_eq!(Command::parse(&long), None);
    }

    proptest! {
        /// Random bytes are no JSON; this is.
        #[test]
        fn what_is_understood_names_a_job(id in prop_oneof![any::<String>(), "[a-z.]{0,140}"], before in ".{0,2}") {
            let body = [before.as_bytes(), &Command::Cancel(id.clone()).to_body()].concat();
            if let Some(command) = Command::parse(&body) {
                prop_assert!(job::is_id(&id));
                prop_assert_eq!(command, Command::Cancel(id));
            }
        }
    }
}
