//! The broker: the only place that names lapin.
//!
//! A worker holds two connections, because a broker that is short of memory blocks those that publish, and a
//! blocked connection sends no acks either. The consumer takes deliveries and settles them; the publisher
//! sends results and waits for their confirms. Each has a supervisor task that dials, sets up, watches, and
//! after any fault does it all again, for ever. lapin's own recovery is not used.
//!
//! Who waits for whom: a job's task waits for its confirm, then settles its delivery. A delivery is settled on
//! the channel that it came by or not at all: what belonged to a lost channel comes again, by the broker's
//! own doing. Every wait for the broker has an end: an answer, the connection's loss, or a timeout.

mod address;
pub mod client;
mod confirm_channels;
mod connection;
mod consumer;
mod control;
pub mod dead;
mod delivery;
mod faults;
mod frames;
mod headers;
mod message;
mod pace;
mod publisher;
mod refusals;
mod topology;

use std::path::PathBuf;
use std::time::Duration;

use crate::config::ConfigError;

pub use address::{Address, AddressError, Addresses};
pub use connection::supervisor::LinkState;
pub use consumer::Consumer;
pub use control::{Command, JobInfo, Pong, ReceivedCommand};
pub use delivery::{Delivery, Properties};
pub use message::Message;
pub use publisher::{PublishOnce, Publisher, Sent};
pub use topology::CONTROL;

/// What the broker, or the way to it, made impossible.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read.
    #[error("read {key} {path}")]
    File {
        /// The key that names it.
        key: &'static str,
        /// As configured.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("understand {key} {path}: {fault}")]
    Pem {
        /// The key that names it.
        key: &'static str,
        /// As configured.
        path: PathBuf,
        /// What is wrong, and the remedy.
        fault: &'static str,
    },
    /// `amqp.url_file` cannot be read any more, or holds what is no address.
    #[error("find a broker address: {0}")]
    Addresses(ConfigError),
    /// No address at all.
    #[error("find a broker address: amqp.url and amqp.url_file name none")]
    NoAddress,
    /// An address that is none. It is not shown: it may hold a password.
    #[error("understand amqp.url, address {position}: {reason}; write amqp://user:password@host:5672/vhost")]
    Url {
        /// Counted from 1.
        position: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// The broker could not be reached, or did not let us in.
    #[error("connect to {broker}{hint}")]
    Connect {
        /// Host and port.
        broker: String,
        /// What may be behind it, where that is likely.
        hint: &'static str,
        /// What lapin said.
        source: Box<lapin::Error>,
    },
    /// No answer in time.
    #[error("{what} within {after:?}")]
    Timeout {
        /// The operation.
        what: String,
        /// How long it was waited for.
        after: Duration,
    },
    /// The broker takes no messages from anybody, and nobody can say for how long.
    #[error("{what}: the broker takes no messages, it is short of memory or disk space; see to that first")]
    Blocked {
        /// The operation.
        what: String,
    },
    /// The broker refused an operation, or the channel broke over it.
    #[error("{what}")]
    Operation {
        /// The operation.
        what: String,
        /// What lapin said.
        source: Box<lapin::Error>,
    },
    /// A queue or exchange exists, but not as it is wanted here.
    #[error(
        "declare {name}: it exists with other arguments ({detail}); set amqp.topology = \"passive\" to take it \
         as it is, or delete it"
    )]
    Mismatch {
        /// The queue or exchange.
        name: String,
        /// The broker's own words, which name the argument.
        detail: String,
    },
    /// A queue or exchange that is only to be checked is not there.
    #[error(
        "find {name}: it is not there, and amqp.topology = \"passive\" declares nothing; declare it as {wanted}, or \
         set amqp.topology = \"declare\""
    )]
    Missing {
        /// The queue or exchange.
        name: String,
        /// What it has to be.
        wanted: String,
    },
    /// A name that no broker takes.
    #[error("use {name:?} as a name: more than 255 bytes")]
    Name {
        /// The name.
        name: String,
    },
    /// The broker cancelled the consumer, which it does without a reason.
    #[error(
        "go on consuming: the broker cancelled the consumer of {queue}; was the queue deleted, did its node go \
         away, or was a delivery not acked within the consumer timeout?"
    )]
    ConsumerEnded {
        /// The queue.
        queue: String,
    },
    /// The broker's node agrees with the others of its cluster on nothing any more.
    #[error(
        "go on at {broker}: it declares no queue and confirms no message; has it lost the rest of its cluster?"
    )]
    NoMajority {
        /// Host and port.
        broker: String,
    },
    /// The connection is gone.
    #[error("reach the broker: the connection is lost")]
    Lost(
        /// Why, as far as it is known: the broker's own words where it closed the connection.
        #[source]
        Option<Box<lapin::Error>>,
    ),
}

/// An error and all its causes in one line, for a log.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        // Some repeat their cause in their own words.
        if !text.ends_with(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        cause = error.source();
    }
    text
}

/// A name in the form that lapin wants; it would panic over one that is too long.
fn short(name: &str) -> Result<lapin::types::ShortString, Error> {
    lapin::types::ShortString::try_new(name).map_err(|_| Error::Name { name: name.to_owned() })
}
