//! The dead queue, for the command line: looking at what could not be handled, and giving it another chance.
//!
//! Messages are taken without acknowledging them, so nothing is lost whatever happens here. What was only
//! looked at goes back at the end; until then other readers do not see it. A broker puts what is given back behind
//! what was given back before, so only taking all and giving all back keeps the order: that is why it is done.
//! And a quorum queue takes what is given back at once in any order, and later than it says, so each is waited for.

use std::collections::BTreeSet;
use std::time::Duration;

use lapin::options::{
    BasicAckOptions, BasicGetOptions, BasicNackOptions, BasicPublishOptions, ConfirmSelectOptions,
    QueueDeclareOptions, QueuePurgeOptions,
};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Confirmation};
use tokio::time::Instant;
use uuid::Uuid;

use crate::amqp::client::ClientError;
use crate::amqp::connection::dialer::Dialer;
use crate::amqp::connection::link::Link;
use crate::amqp::headers::{described, last_death, shown};
use crate::amqp::message::revived;
use crate::amqp::{Error, faults, short};
use crate::config;

/// Namespace of the keys of dead messages: a random UUID, chosen once.
const KEYS: Uuid = Uuid::from_u128(0x1b8a_52c7_60f4_4d0e_9d35_7a41_c2e8_0b96);

/// An open dead queue.
#[derive(Debug)]
pub struct Dead {
    link: Link,
    channel: Channel,
    queue: String,
    /// Where jobs come from; the first is for those of which it is not known.
    jobs: Vec<String>,
    /// How many messages of those that were there at the start have not been looked at.
    left: u32,
    /// What was taken and is not settled, by the broker's numbers, in the order of the queue.
    held: BTreeSet<u64>,
}

/// A message of the dead queue.
#[derive(Debug)]
pub struct DeadMessage {
    /// Names the message: made from all of it that counts, so it stays the same whatever else comes and goes.
    pub key: String,
    /// `message_id`, which often is the job's id.
    pub message_id: Option<String>,
    /// Where its result was wanted.
    pub reply_to: Option<String>,
    /// What its result should carry.
    pub correlation_id: Option<String>,
    /// Why it is here, in words.
    pub reason: Option<String>,
    /// The queue that it was in, as far as it says.
    pub queue: Option<String>,
    /// Deliveries before it was given up.
    pub attempt: Option<u64>,
    /// Who gave it up; none where it was the broker.
    pub worker: Option<String>,
    /// When; RFC 3339.
    pub at: Option<String>,
    /// As it came.
    pub body: Vec<u8>,
    raw: BasicProperties,
    tag: u64,
}

impl Dead {
    /// Connects, and counts what is there.
    ///
    /// # Errors
    /// No broker, or no such queue on it.
    pub async fn open(config: &config::Amqp) -> Result<Self, ClientError> {
        let dialer = Dialer::new(config, format!("sandpiper dead {}", std::process::id()));
        let link = dialer.impatient().dial().await?;
        let channel = link.channel().await?;
        let left = match count(&link, &channel, &config.dead_queue).await {
            Err(Error::Operation { source, .. }) if faults::is_not_found(&source) => {
                return Err(ClientError::NoDeadQueue { queue: config.dead_queue.clone() });
            }
            found => found?,
        };
        link.ask("turn confirms on", channel.confirm_select(ConfirmSelectOptions::default())).await?;
        Ok(Self {
            left,
            queue: config.dead_queue.clone(),
            jobs: [&config.jobs_queue]
                .into_iter()
                .chain(config.queues.iter().map(|queue| &queue.name))
                .cloned()
                .collect(),
            held: BTreeSet::new(),
            link,
            channel,
        })
    }

    /// How many messages are there that were not looked at.
    pub fn left(&self) -> u32 {
        self.left
    }

    /// The next message, oldest first; none past what was there when the queue was opened.
    ///
    /// # Errors
    /// The connection is gone. Everything that was taken goes back by itself.
    pub async fn next(&mut self) -> Result<Option<DeadMessage>, ClientError> {
        if self.left == 0 {
            return Ok(None);
        }
        let getting = self.channel.basic_get(short(&self.queue)?, BasicGetOptions { no_ack: false });
        let Some(message) = self.link.ask("read the dead queue", getting).await? else {
            self.left = 0;
            return Ok(None);
        };
        self.left -= 1;
        let message = message.delivery;
        self.held.insert(message.delivery_tag);
        Ok(Some(DeadMessage::new(message.properties, message.data, message.delivery_tag)))
    }

    /// Where a message goes when it is replayed: back to where it came from. What it says of that may be forged, so
    /// only a queue of the configuration will do.
    pub fn origin(&self, message: &DeadMessage) -> &str {
        let known = self.jobs.iter().find(|queue| Some(*queue) == message.queue.as_ref());
        known.or(self.jobs.first()).map(String::as_str).unwrap_or_default()
    }

    /// Publishes a message to the queue that it came from as the job that it was, and takes it out of the dead queue
    /// when the broker has confirmed that. Whatever goes wrong, it is in one of the two; at worst in both.
    ///
    /// # Errors
    /// No such queue, or the broker would not take it.
    pub async fn replay(&mut self, message: DeadMessage) -> Result<(), ClientError> {
        let queue = self.origin(&message).to_owned();
        let publishing = async {
            let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
            self.channel
                .basic_publish(
                    "".into(),
                    short(&queue).unwrap_or_default(),
                    options,
                    &message.body,
                    revived(&message.raw),
                )
                .await?
                .await
        };
        match self.link.ask("have a message confirmed", publishing).await? {
            Confirmation::Ack(None) => {}
            Confirmation::Ack(Some(_)) => return Err(ClientError::NoQueue { queue }),
            Confirmation::Nack(_) | Confirmation::NotRequested => {
                return Err(ClientError::Refused { queue });
            }
        }
        let acking = self.channel.basic_ack(message.tag, BasicAckOptions::default());
        self.link.ask("take a message out of the dead queue", acking).await?;
        self.held.remove(&message.tag);
        Ok(())
    }

    /// Removes every message that nobody holds, for good. Returns how many there were.
    ///
    /// # Errors
    /// The connection is gone, or the operation is not allowed.
    pub async fn purge(&mut self) -> Result<u32, ClientError> {
        self.left = 0;
        let purging = self.channel.queue_purge(short(&self.queue)?, QueuePurgeOptions::default());
        Ok(self.link.ask("purge the dead queue", purging).await?)
    }

    /// Puts back what was only looked at, and says goodbye.
    ///
    /// # Errors
    /// The connection is gone. Everything goes back by itself then.
    pub async fn close(mut self) -> Result<(), ClientError> {
        if self.held.is_empty() {
            self.link.close().await;
            return Ok(());
        }
        while self.next().await?.is_some() {}
        let before = self.count().await?;
        let mut patience = RETURN;
        for (given_back, tag) in (1..).zip(&self.held) {
            let options = BasicNackOptions { requeue: true, ..BasicNackOptions::default() };
            self.link.ask("put messages back", self.channel.basic_nack(*tag, options)).await?;
            // There is no answer to that, and where others read as well it may never be seen.
            if !self.holds(before + given_back, patience).await? {
                patience = Duration::ZERO;
            }
        }
        self.link.close().await;
        Ok(())
    }

    async fn count(&self) -> Result<u32, Error> {
        count(&self.link, &self.channel, &self.queue).await
    }

    /// Waits until so many messages are in the queue, but not for long.
    async fn holds(&self, messages: u32, patience: Duration) -> Result<bool, Error> {
        let until = Instant::now() + patience;
        while self.count().await? < messages {
            if Instant::now() >= until {
                return Ok(false);
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(true)
    }
}

/// How long a message may take on its way back.
const RETURN: Duration = Duration::from_secs(1);

/// How many messages wait in a queue.
async fn count(link: &Link, channel: &Channel, queue: &str) -> Result<u32, Error> {
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let finding = channel.queue_declare(short(queue)?, options, FieldTable::default());
    Ok(link.ask("find the dead queue", finding).await?.message_count())
}

impl DeadMessage {
    fn new(raw: BasicProperties, body: Vec<u8>, tag: u64) -> Self {
        let word = |property: &Option<lapin::types::ShortString>| property.as_ref().map(ToString::to_string);
        let (message_id, reply_to) = (word(raw.message_id()), word(raw.reply_to()));
        let correlation_id = word(raw.correlation_id());
        // A worker takes the broker's word off what it writes itself. So where that is there it is the last one, and
        // what else is said is a publisher's.
        let death = last_death(&raw);
        let broker = |field: &str| shown(death?.get(field)?);
        let ours = |field: &str| match death {
            Some(_) => None,
            None => described(&raw, &format!("x-sandpiper-{field}")),
        };
        Self {
            key: key(&body, [&message_id, &reply_to, &correlation_id]),
            reason: ours("reason").or_else(|| broker("reason")),
            queue: ours("queue").or_else(|| broker("queue")),
            attempt: ours("attempt").and_then(|attempt| attempt.parse().ok()),
            worker: ours("worker"),
            at: ours("at").or_else(|| broker("time")),
            message_id,
            reply_to,
            correlation_id,
            body,
            raw,
            tag,
        }
    }
}

/// Short enough to type, long enough to tell apart what a dead queue holds.
fn key(body: &[u8], properties: [&Option<String>; 3]) -> String {
    let mut all = body.to_vec();
    for property in properties {
        all.push(0);
        all.extend(property.iter().flat_map(|text| text.bytes()));
    }
    let uuid = Uuid::new_v5(&KEYS, &all);
    uuid.simple().to_string()[..12].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_tells_apart_whatever_differs() {
        let some = |text: &str| Some(text.to_owned());
        let one = key(b"body", [&some("m"), &None, &None]);
        assert_eq!(one, key(b"body", [&some("m"), &None, &None]));
        assert_eq!(one.len(), 12);
        for other in [
            key(b"bod", [&some("ym"), &None, &None]),
            key(b"body", [&None, &some("m"), &None]),
            key(b"body", [&some("m"), &None, &some("c")]),
        ] {
            assert_ne!(one, other);
        }
    }
}
