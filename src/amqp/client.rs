//! The other side of the queue, for the command line: publishes jobs and reads their results.
//!
//! One connection, no second try: a person waits, and wants to hear of a fault at once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::{FutureExt, StreamExt};
use lapin::message::Delivery;
use lapin::options::{
    BasicCancelOptions, BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Confirmation};
use tokio::sync::watch;

use crate::amqp::connection::dialer::Dialer;
use crate::amqp::connection::link::Link;
use crate::amqp::message::now;
use crate::amqp::{Command, Error, chain, faults, short, topology};
use crate::config;

/// Why a job could not be published, or its result not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The broker, or the way to it.
    #[error(transparent)]
    Broker(#[from] Error),
    /// Nobody declared the jobs queue.
    #[error("publish to {queue}: there is no such queue; start a worker, which declares it")]
    NoQueue {
        /// The jobs queue.
        queue: String,
    },
    /// The broker would not take the job.
    #[error("publish to {queue}: the broker refused the job; is the queue full?")]
    Refused {
        /// The jobs queue.
        queue: String,
    },
    /// Nobody declared the dead queue.
    #[error(
        "find {queue}: there is no such queue; start a worker, which declares it, or set amqp.dead_queue"
    )]
    NoDeadQueue {
        /// The dead queue.
        queue: String,
    },
    /// Nobody listens to commands.
    #[error("reach a worker: none listens on the exchange sandpiper.control; start one")]
    NoWorker,
}

/// A message on our reply queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplyMessage {
    /// The id under which the job was submitted; empty where the message carries none.
    pub id: String,
    /// The same for every duplicate.
    pub message_id: String,
    /// `result`, `output` while a job runs, or `pong`.
    pub kind: String,
    /// JSON.
    pub body: Vec<u8>,
}

/// A publisher of jobs with a reply queue of its own. Cheap to clone; all clones share the queue, so that some
/// publish while one reads.
#[derive(Clone, Debug)]
pub struct Client(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    link: Link,
    queue: String,
    reply_to: ShortString,
    /// Where answers come in.
    listening: Channel,
    /// Channels in confirm mode that carry nothing: one message at a time on each, see the publisher.
    idle: Mutex<Vec<Channel>>,
    answers: tokio::sync::Mutex<lapin::Consumer>,
    /// The broker refused a message with the name of the connection's user.
    is_known_otherwise: AtomicBool,
}

impl Client {
    /// Connects and opens the reply queue, which goes with the connection. A `patient` one waits for as long as the
    /// broker takes no messages.
    ///
    /// # Errors
    /// No broker at any address, or it does not let us in.
    pub async fn connect(config: &config::Amqp, patient: bool) -> Result<Self, ClientError> {
        let dialer = Dialer::new(config, format!("sandpiper client {}", std::process::id()));
        let link = if patient { dialer } else { dialer.impatient() }.dial().await?;
        let channel = link.channel().await?;
        let options =
            QueueDeclareOptions { exclusive: true, auto_delete: true, ..QueueDeclareOptions::default() };
        let declaring = channel.queue_declare("".into(), options, FieldTable::default());
        let queue = link.ask("declare a reply queue", declaring).await?;
        let options = BasicConsumeOptions { no_ack: true, exclusive: true, ..BasicConsumeOptions::default() };
        let consuming =
            channel.basic_consume(queue.name().clone(), "".into(), options, FieldTable::default());
        let answers = link.ask("consume the reply queue", consuming).await?;
        Ok(Self(Arc::new(Inner {
            reply_to: queue.name().clone(),
            queue: config.jobs_queue.clone(),
            listening: channel,
            idle: Mutex::default(),
            answers: tokio::sync::Mutex::new(answers),
            is_known_otherwise: AtomicBool::new(false),
            link,
        })))
    }

    /// Publishes one job and waits until the broker keeps it. `id` comes back with its result.
    ///
    /// # Errors
    /// No jobs queue, or the broker would not take the job.
    pub async fn submit(&self, body: Vec<u8>, id: &str) -> Result<(), ClientError> {
        let properties = asking(id)?.with_reply_to(self.0.reply_to.clone());
        self.hand_over(body, properties).await
    }

    /// Publishes one job whose result is left to the results queue, and waits until the broker keeps it.
    ///
    /// # Errors
    /// No jobs queue, or the broker would not take the job.
    pub async fn submit_and_leave(&self, body: Vec<u8>, id: &str) -> Result<(), ClientError> {
        self.hand_over(body, asking(id)?).await
    }

    async fn hand_over(&self, body: Vec<u8>, properties: BasicProperties) -> Result<(), ClientError> {
        match self.publish_as_user("", &self.0.queue, &body, properties).await? {
            Confirmation::Ack(None) => Ok(()),
            Confirmation::Ack(Some(_)) => Err(ClientError::NoQueue { queue: self.0.queue.clone() }),
            Confirmation::Nack(_) | Confirmation::NotRequested => {
                Err(ClientError::Refused { queue: self.0.queue.clone() })
            }
        }
    }

    /// Asks every worker to end the job of that id. Nobody says whether one had it.
    ///
    /// # Errors
    /// The broker could not be told, or no worker listens.
    pub async fn cancel(&self, id: &str) -> Result<(), ClientError> {
        self.command(&Command::Cancel(id.to_owned())).await
    }

    /// Asks every worker who it is and what it does. Each answers with a `pong`, a [`crate::amqp::Pong`] as JSON.
    ///
    /// # Errors
    /// The broker could not be told, or no worker listens.
    pub async fn ping(&self) -> Result<(), ClientError> {
        self.command(&Command::Ping {}).await
    }

    async fn command(&self, command: &Command) -> Result<(), ClientError> {
        let properties = BasicProperties::default()
            .with_content_type("application/json".into())
            .with_reply_to(self.0.reply_to.clone());
        let body = command.to_body();
        let sent = self.publish_as_user(topology::CONTROL, "", &body, properties).await;
        match sent {
            Ok(Confirmation::Ack(None)) => Ok(()),
            Ok(_) => Err(ClientError::NoWorker),
            // The first worker declares the exchange.
            Err(ClientError::Broker(Error::Operation { source, .. })) if faults::is_not_found(&source) => {
                Err(ClientError::NoWorker)
            }
            Err(error) => Err(error),
        }
    }

    /// The next message on our reply queue.
    ///
    /// # Errors
    /// The connection is gone, and the queue with it.
    pub async fn next(&self) -> Result<ReplyMessage, ClientError> {
        let mut answers = self.0.answers.lock().await;
        let message = tokio::select! {
            message = answers.next() => message,
            () = self.0.link.lost() => None,
        };
        let message = message.ok_or_else(|| self.0.link.loss())?.map_err(|source| {
            let error = Error::Operation { what: "read results".into(), source: Box::new(source) };
            tracing::debug!(error = chain(&error), "the reply queue is gone");
            error
        })?;
        Ok(ReplyMessage::new(message))
    }

    /// Those that have come and were not read. With them the reply queue ends: what comes later goes to the results
    /// queue. A broker that does not answer, because it takes nothing or is gone, is not waited for.
    pub async fn rest(&self) -> Vec<ReplyMessage> {
        let mut answers = self.0.answers.lock().await;
        let ending = self.0.listening.basic_cancel(answers.tag(), BasicCancelOptions::default());
        let ended = self.0.link.ask_in_time("end the reply queue", ending).await;
        let mut rest = Vec::new();
        loop {
            let next = match &ended {
                Ok(()) => answers.next().await,
                Err(_) => answers.next().now_or_never().flatten(),
            };
            match next {
                Some(Ok(message)) => rest.push(ReplyMessage::new(message)),
                _ => return rest,
            }
        }
    }

    /// Whether the broker takes no messages, now and later.
    pub fn blocked(&self) -> watch::Receiver<bool> {
        self.0.link.blocked()
    }

    /// Whether it waits for such a broker.
    pub fn is_patient(&self) -> bool {
        self.0.link.is_patient()
    }

    /// Says goodbye.
    pub async fn close(&self) {
        self.0.link.close().await;
    }

    /// Publishes under the name of the connection's user, which the broker vouches for: a job is that user's, and so is a
    /// command. A broker that knows the user by another name, as behind OAuth, gets messages without one.
    async fn publish_as_user(
        &self,
        exchange: &str,
        key: &str,
        body: &[u8],
        properties: BasicProperties,
    ) -> Result<Confirmation, ClientError> {
        if let Some(user) = self.user() {
            let named = properties.clone().with_user_id(user);
            match self.publish(exchange, key, body, named).await {
                Err(ClientError::Broker(Error::Operation { source, .. }))
                    if faults::is_wrong_user(&source) =>
                {
                    self.0.is_known_otherwise.store(true, Ordering::Relaxed);
                }
                sent => return sent,
            }
        }
        self.publish(exchange, key, body, properties).await
    }

    fn user(&self) -> Option<ShortString> {
        if self.0.is_known_otherwise.load(Ordering::Relaxed) {
            return None;
        }
        self.0.link.user().and_then(|user| short(user).ok())
    }

    async fn publish(
        &self,
        exchange: &str,
        key: &str,
        body: &[u8],
        properties: BasicProperties,
    ) -> Result<Confirmation, ClientError> {
        let channel = self.channel().await?;
        let (exchange, key) = (short(exchange)?, short(key)?);
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let publishing =
            async { channel.basic_publish(exchange, key, options, body, properties).await?.await };
        let answer = self.0.link.ask("have a message confirmed", publishing).await?;
        self.0.idle.lock().unwrap_or_else(PoisonError::into_inner).push(channel);
        Ok(answer)
    }

    async fn channel(&self) -> Result<Channel, Error> {
        let idle = self.0.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        if let Some(channel) = idle {
            return Ok(channel);
        }
        let channel = self.0.link.channel().await?;
        self.0.link.ask("turn confirms on", channel.confirm_select(ConfirmSelectOptions::default())).await?;
        Ok(channel)
    }
}

impl ReplyMessage {
    fn new(message: Delivery) -> Self {
        let text =
            |property: &Option<ShortString>| property.as_ref().map(ToString::to_string).unwrap_or_default();
        Self {
            id: text(message.properties.correlation_id()),
            message_id: text(message.properties.message_id()),
            kind: text(message.properties.kind()),
            body: message.data,
        }
    }
}

fn asking(id: &str) -> Result<BasicProperties, Error> {
    Ok(BasicProperties::default()
        .with_content_type("application/json".into())
        .with_delivery_mode(2)
        .with_correlation_id(short(id)?)
        .with_message_id(short(id)?)
        .with_timestamp(now())
        .with_headers(millisecond_timestamp()))
}

/// The protocol's own timestamp has whole seconds; this header, which RabbitMQ's own plugin writes as well,
/// has milliseconds.
fn millisecond_timestamp() -> FieldTable {
    let mut headers = FieldTable::default();
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    if let Ok(millis) = i64::try_from(since.as_millis()) {
        headers.insert("timestamp_in_ms".into(), AMQPValue::LongLongInt(millis));
    }
    headers
}
