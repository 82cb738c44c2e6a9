//! Where a result goes: what a publisher wrote into `reply_to`, checked before anything is sent there.
//!
//! The name comes from a stranger. One that means one of our own queues would feed results to workers; a
//! malformed direct reply-to makes the broker close the whole connection, with everybody's results on it.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use globset::{Glob, GlobMatcher};

use crate::config;

/// What names of direct reply-to queues begin with.
const DIRECT: &str = "amq.rabbitmq.reply-to";

/// Longest name that the protocol can carry.
const NAME_MAX: usize = 255;

/// A checked destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A queue. A result for one that is gone goes to the results queue.
    Queue(String),
    /// A requester that listens on its own channel. Nobody else could read a result that it no longer takes.
    Direct(String),
}

impl Address {
    /// As the broker knows it.
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Queue(name) | Self::Direct(name) => name,
        }
    }
}

/// Why a `reply_to` is not written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AddressError {
    /// Longer than a name can be.
    #[error("reply_to is longer than 255 bytes; name a queue")]
    TooLong,
    /// Not something that names a queue.
    #[error("reply_to contains a control character; name a queue")]
    ControlCharacter,
    /// A queue that workers, not requesters, read.
    #[error("reply_to names one of the workers' own queues; name a queue of yours, or leave it out")]
    Own,
    /// Not what the operator allows.
    #[error("reply_to does not match the operator's pattern amqp.reply_to_allow; name another queue")]
    NotAllowed,
    /// Not what the broker hands out to requesters.
    #[error("reply_to is not a direct reply-to address; copy it as the broker delivered it")]
    MalformedDirect,
}

/// Checks addresses against the operator's settings.
#[derive(Clone, Debug)]
pub struct Addresses {
    results: String,
    own: Vec<String>,
    allow: Option<GlobMatcher>,
}

impl Addresses {
    /// A pattern that is none allows nothing; the configuration has refused it before.
    pub fn new(config: &config::Amqp) -> Self {
        Self {
            results: config.results_queue.clone(),
            own: config.queues.iter().map(|queue| &queue.name).chain([&config.dead_queue]).cloned().collect(),
            allow: Glob::new(&config.reply_to_allow).ok().map(|glob| glob.compile_matcher()),
        }
    }

    /// The results queue, for whoever named no other, or none that will do.
    pub fn results(&self) -> Address {
        Address::Queue(self.results.clone())
    }

    /// The destination that `reply_to` names.
    ///
    /// # Errors
    /// Names the field, what is wrong with it, and the remedy; for the publisher of the job.
    pub fn check(&self, reply_to: Option<&str>) -> Result<Address, AddressError> {
        let name = match reply_to {
            None | Some("") => return Ok(self.results()),
            Some(name) if name == self.results => return Ok(self.results()),
            Some(name) => name,
        };
        if self.own.iter().any(|own| own == name) {
            return Err(AddressError::Own);
        }
        if !self.allow.as_ref().is_some_and(|allow| allow.is_match(name)) {
            return Err(AddressError::NotAllowed);
        }
        Self::form(name)
    }

    /// Where an answer to an operator's question goes. The pattern is for publishers of jobs.
    ///
    /// # Errors
    /// The address is none that can be answered.
    pub fn of_operator(&self, reply_to: &str) -> Result<Address, AddressError> {
        if reply_to.is_empty() || reply_to == self.results || self.own.iter().any(|own| own == reply_to) {
            return Err(AddressError::Own);
        }
        Self::form(reply_to)
    }

    /// What can be told from the name alone.
    fn form(name: &str) -> Result<Address, AddressError> {
        if name.len() > NAME_MAX {
            return Err(AddressError::TooLong);
        }
        if name.chars().any(char::is_control) {
            return Err(AddressError::ControlCharacter);
        }
        match name.strip_prefix(DIRECT) {
            None => Ok(Address::Queue(name.to_owned())),
            Some(rest) if is_direct(rest) => Ok(Address::Direct(name.to_owned())),
            Some(_) => Err(AddressError::MalformedDirect),
        }
    }
}

/// What RabbitMQ appends to the pseudo-queue's name: `.` a channel's process `.` a key, each in base64.
fn is_direct(rest: &str) -> bool {
    let mut parts = rest.split('.');
    let (Some(""), Some(process), Some(key), None) = (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return false;
    };
    STANDARD.decode(process).is_ok_and(|process| is_process(&process))
        && STANDARD.decode(key).is_ok_and(|key| !key.is_empty())
}

/// A process identifier in Erlang's external term format: version, tag, node name, id, serial, creation. The
/// node is named `reply@` and a hash in digits; any other name makes the broker fail over it.
fn is_process(term: &[u8]) -> bool {
    const VERSION: u8 = 131;
    const PID: u8 = 103;
    const NEW_PID: u8 = 88;
    let [VERSION, tag, rest @ ..] = term else { return false };
    let creation = match *tag {
        PID => 1,
        NEW_PID => 4,
        _ => return false,
    };
    let (length, rest) = match rest {
        // The three ways to write an atom: with a length of 16 bits (latin 1, UTF-8), or of 8 (UTF-8).
        [100 | 118, high, low, rest @ ..] => (usize::from(u16::from_be_bytes([*high, *low])), rest),
        [119, length, rest @ ..] => (usize::from(*length), rest),
        _ => return false,
    };
    let Some((node, rest)) = rest.split_at_checked(length) else { return false };
    let hash = node.strip_prefix(b"reply@");
    hash.is_some_and(|hash| matches!(hash.len(), 1..=10) && hash.iter().all(u8::is_ascii_digit))
        && rest.len() == 4 + 4 + creation
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::Config;

    fn addresses(allow: &str) -> Addresses {
        Addresses::new(&config::Amqp { reply_to_allow: allow.into(), ..Config::default().amqp })
    }

    /// As RabbitMQ 3.10 delivered it.
    const LIVE: &str =
        "amq.rabbitmq.reply-to.g1h3DnJlcGx5QDEzMjQ5MTg3AAAEKwAAAABnLZWN.VmhRVK9wRbZ/VhLZEwXXvQ==";

    #[test]
    fn no_reply_to_means_the_results_queue() {
        let addresses = addresses("replies.*");
        for none in [None, Some(""), Some("sandpiper.results")] {
            assert_eq!(addresses.check(none), Ok(Address::Queue("sandpiper.results".into())));
        }
    }

    #[test]
    fn a_queue_is_taken_where_the_pattern_allows_it() {
        let addresses = addresses("replies.*");
        assert_eq!(addresses.check(Some("replies.7")), Ok(Address::Queue("replies.7".into())));
        assert_eq!(addresses.check(Some("other")), Err(AddressError::NotAllowed));
    }

    #[test]
    fn hostile_addresses_are_refused() {
        let addresses = addresses("*");
        let long = "q".repeat(256);
        for (name, error) in [
            ("sandpiper.jobs", AddressError::Own),
            ("sandpiper.dead", AddressError::Own),
            ("a\u{0}b", AddressError::ControlCharacter),
            ("a\nb", AddressError::ControlCharacter),
            (long.as_str(), AddressError::TooLong),
            ("amq.rabbitmq.reply-to", AddressError::MalformedDirect),
            ("amq.rabbitmq.reply-to.", AddressError::MalformedDirect),
            ("amq.rabbitmq.reply-to.bogus.bogus", AddressError::MalformedDirect),
            ("amq.rabbitmq.reply-to-bogus", AddressError::MalformedDirect),
            // Base64, but of no process.
            ("amq.rabbitmq.reply-to.Ym9ndXM=.Ym9ndXM=", AddressError::MalformedDirect),
            ("amq.rabbitmq.reply-to.g2gAAAA=.Ym9ndXM=", AddressError::MalformedDirect),
            // A process, but of a node whose name no broker hands out: x@y.
            ("amq.rabbitmq.reply-to.g2d3A3hAeQAAAAEAAAAAAQ==.Ym9ndXM=", AddressError::MalformedDirect),
        ] {
            assert_eq!(addresses.check(Some(name)), Err(error), "{name:?}");
        }
        for cut in 1..LIVE.len() - DIRECT.len() {
            if let Ok(address) = addresses.check(Some(&LIVE[..LIVE.len() - cut])) {
                // A key may be shorter and still be base64.
                assert!(
                    LIVE[..LIVE.len() - cut].rsplit('.').next().unwrap().len().is_multiple_of(4),
                    "{address:?}"
                );
            }
        }
    }

    #[test]
    fn an_operator_is_answered_anywhere_but_on_the_workers_own_queues() {
        let addresses = addresses("replies.*");
        assert_eq!(addresses.of_operator("amq.gen-1"), Ok(Address::Queue("amq.gen-1".into())));
        for own in ["", "sandpiper.results", "sandpiper.jobs", "sandpiper.dead"] {
            assert_eq!(addresses.of_operator(own), Err(AddressError::Own), "{own}");
        }
        assert!(addresses.of_operator("amq.rabbitmq.reply-to.bogus.bogus").is_err());
    }

    #[test]
    fn a_live_direct_reply_to_is_taken() {
        assert_eq!(addresses("*").check(Some(LIVE)), Ok(Address::Direct(LIVE.into())));
    }

    proptest! {
        /// Whatever a publisher writes, what is accepted is what it wrote, and harms neither broker nor workers.
        #[test]
        fn what_is_accepted_is_an_address(
            text in prop_oneof![any::<String>(), Just(LIVE.to_owned()), Just("sandpiper.jobs".to_owned()), "q{250,260}"],
            at in any::<prop::sample::Index>(), damage in prop::option::of(any::<char>()),
        ) {
            let mut characters: Vec<char> = text.chars().collect();
            if let (Some(damage), false) = (damage, characters.is_empty()) {
                let at = at.index(characters.len());
                characters[at] = damage;
            }
            let text: String = characters.into_iter().collect();
            if let Ok(address) = addresses("*").check(Some(&text)).or_else(|_| addresses("*").of_operator(&text)) {
                prop_assert_eq!(address.name(), if text.is_empty() { "sandpiper.results" } else { &text });
                prop_assert!(text.len() <= NAME_MAX && !text.contains(char::is_control));
                prop_assert!(text != "sandpiper.jobs" && text != "sandpiper.dead", "results for workers");
                prop_assert_eq!(matches!(address, Address::Direct(_)), text.starts_with(DIRECT));
            }
        }
    }
}
