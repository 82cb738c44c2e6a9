//! Takes jobs from their queues, and commands from the control exchange, over a connection of its own.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, BoxStream, SelectAll, StreamExt};
use lapin::options::{
    BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions, QueueBindOptions,
    QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, ErrorKind};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::amqp::connection::dialer::Dialer;
use crate::amqp::connection::link::Link;
use crate::amqp::connection::supervisor::{LinkState, Session, State, Supervisor};
use crate::amqp::control::{Command, ReceivedCommand};
use crate::amqp::delivery::{Delivery, Properties};
use crate::amqp::{Error, chain, short, topology};
use crate::config::{self, QueueType};
use crate::ops::metrics::{Metrics, Role, Settled};

/// What one consumer says: which one it is, and a delivery, or that it is at its end.
type Event = (Tag, Option<lapin::Result<lapin::message::Delivery>>);

/// All consumers together, each in its turn.
type Jobs = SelectAll<BoxStream<'static, Event>>;

/// Commands that wait to be looked at; more than that are dropped, a requester can ask again.
const COMMANDS: usize = 64;

/// The stream of jobs, across all connections that it takes.
#[derive(Debug)]
pub struct Consumer {
    deliveries: mpsc::Receiver<Delivery>,
    commands: Option<mpsc::Receiver<ReceivedCommand>>,
    state: watch::Receiver<LinkState>,
    closing: CancellationToken,
    task: JoinHandle<()>,
}

impl Consumer {
    /// Connects and consumes in the background until `drain`, then no more: what was not taken goes back. At most
    /// `prefetch` deliveries of each queue are unsettled at one time, and none for longer than `timeout`, if the
    /// broker lets its consumers decide that. A broker that `cut_off` names is left.
    pub fn start(
        config: &config::Amqp,
        name: &str,
        prefetch: Vec<u16>,
        timeout: Duration,
        cut_off: watch::Receiver<String>,
        metrics: &Metrics,
        drain: CancellationToken,
    ) -> Self {
        // One place: a delivery leaves lapin's hands only when somebody takes it.
        let (sender, deliveries) = mpsc::channel(1);
        let (command_sender, commands) = mpsc::channel(COMMANDS);
        let closing = CancellationToken::new();
        let state = State::new(Role::Consume, metrics);
        let subscription = state.subscribe();
        let supervisor = Supervisor {
            dialer: Dialer::new(config, format!("sandpiper {name} jobs")).limited(config.max_body_bytes),
            state,
            longest_delay: config.reconnect_max,
            leave: drain.clone(),
        };
        let session = Consuming {
            config: config.clone(),
            prefetch,
            timeout,
            untimed: BTreeSet::new(),
            careful: false,
            cut_off,
            metrics: metrics.clone(),
            sender: Some(sender),
            commands: command_sender,
            drain,
            closing: closing.clone(),
        };
        let task = tokio::spawn(supervisor.run(session));
        Self { deliveries, commands: Some(commands), state: subscription, closing, task }
    }

    /// The next job; none once drained.
    pub async fn next(&mut self) -> Option<Delivery> {
        self.deliveries.recv().await
    }

    /// The stream of commands; the first caller gets it.
    pub fn commands(&mut self) -> Option<mpsc::Receiver<ReceivedCommand>> {
        self.commands.take()
    }

    /// How the connection is, now and later.
    pub fn state(&self) -> watch::Receiver<LinkState> {
        self.state.clone()
    }

    /// Ends the connection, after every delivery was settled.
    pub async fn close(self) {
        self.closing.cancel();
        // It cannot be aborted by anybody else, and a panic in it was reported by the runtime.
        let _ = self.task.await;
    }
}

/// What the consumer does with a connection.
struct Consuming {
    config: config::Amqp,
    /// For each queue.
    prefetch: Vec<u16>,
    /// How long a delivery may stay unsettled.
    timeout: Duration,
    /// Queues that let no consumer decide that.
    untimed: BTreeSet<usize>,
    /// The broker broke over a message that it was to deliver, as it does over some that were published by AMQP 1.0. It
    /// counts that as a delivery of every message that went out with it, so each goes out alone for a while: else its
    /// neighbours would end in the dead-letter queue with it, and no worker would have seen them.
    careful: bool,
    /// Brokers of no use.
    cut_off: watch::Receiver<String>,
    metrics: Metrics,
    /// None once drained, so that the reader sees the end.
    sender: Option<mpsc::Sender<Delivery>>,
    commands: mpsc::Sender<ReceivedCommand>,
    drain: CancellationToken,
    closing: CancellationToken,
}

impl Session for Consuming {
    async fn run(&mut self, link: &Arc<Link>, state: &State) -> Result<(), Error> {
        let ended = self.deliver(link, state).await;
        if ended.as_ref().is_err_and(is_internal) {
            self.careful = true;
        }
        ended
    }
}

impl Consuming {
    /// From setting the connection up to its end.
    async fn deliver(&mut self, link: &Arc<Link>, state: &State) -> Result<(), Error> {
        let channel = link.channel().await?;
        topology::ensure(link, &channel, &self.config).await?;
        let mut commands = commands(link).await?;
        let mut prefetch = Prefetch::Full;
        if self.careful {
            tracing::warn!("the broker failed over a message; taking one at a time until that is over");
            prefetch = Prefetch::One;
        }
        let mut taken = 0;
        let (channel, mut jobs) = self.consume(link, channel, prefetch).await?;
        state.up(link);

        let mut cut_off = self.cut_off.clone();
        cut_off.mark_unchanged();
        loop {
            let Some(sender) = &self.sender else { return Ok(()) };
            tokio::select! {
                biased;
                () = self.drain.cancelled() => break,
                () = link.lost() => return Err(link.loss()),
                Ok(()) = cut_off.changed() => {
                    if *cut_off.borrow_and_update() == link.broker() {
                        return Err(Error::NoMajority { broker: link.broker().to_owned() });
                    }
                }
                command = commands.next() => self.hear(command)?,
                // The place first: a delivery in our hands must have somewhere to go.
                job = async { (sender.reserve().await, jobs.next().await) } => match job {
                    (Ok(place), Some((tag, Some(Ok(job))))) => {
                        let config = &self.config.queues[tag.queue];
                        let dropped = link.dropped(channel.id(), job.delivery_tag);
                        let dropped = dropped.map(|bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
                        let bytes = dropped.unwrap_or(job.data.len());
                        self.metrics.received(&config.name, bytes, job.redelivered);
                        taken += 1;
                        // What came back is delivered before what is new.
                        let over = !job.redelivered || taken >= self.most();
                        let (through, metrics) = (link.clone(), self.metrics.clone());
                        place.send(Delivery::new(tag.queue, config, job, dropped, through, metrics));
                        if over && prefetch == Prefetch::One {
                            self.careful = false;
                            prefetch = Prefetch::Full;
                            self.cancel(link, &channel, Prefetch::One).await?;
                            let more = self.consume_all(link, &channel, Prefetch::Full).await;
                            jobs.extend(more.map_err(|refused| refused.error)?);
                        }
                    }
                    (_, Some((_, Some(Err(source))))) => return Err(broken("go on consuming", source)),
                    // Of one that we cancelled.
                    (_, Some((tag, None))) if tag.prefetch != prefetch => {}
                    (_, Some((tag, None))) => {
                        return Err(Error::ConsumerEnded { queue: self.config.queues[tag.queue].name.clone() });
                    }
                    (_, None) => return Err(link.loss()),
                    // The reader is gone: nobody will take another job.
                    (Err(_), Some((_, Some(Ok(_))))) => break,
                },
            }
        }
        self.sender = None;
        self.stop(link, &channel, prefetch, jobs).await?;
        // What still runs can still be cancelled.
        loop {
            tokio::select! {
                biased;
                () = self.closing.cancelled() => break,
                () = link.lost() => return Err(link.loss()),
                command = commands.next() => self.hear(command)?,
            }
        }
        link.close().await;
        Ok(())
    }

    /// How many deliveries may be unsettled at one time, over all queues.
    fn most(&self) -> usize {
        self.prefetch.iter().copied().map(usize::from).sum()
    }

    /// One consumer for each queue, all on one channel: `channel`, or another one where the broker closed that.
    async fn consume(
        &mut self,
        link: &Link,
        mut channel: Channel,
        prefetch: Prefetch,
    ) -> Result<(Channel, Jobs), Error> {
        loop {
            match self.consume_all(link, &channel, prefetch).await {
                Ok(jobs) => return Ok((channel, jobs)),
                Err(Refused { queue, error }) if takes_no_timeout(&error) && self.untimed.insert(queue) => {
                    tracing::warn!(
                        queue = self.config.queues[queue].name,
                        error = chain(&error),
                        "the queue is not of the type that amqp.queue_type says; consuming it without a timeout"
                    );
                    channel = link.channel().await?;
                }
                Err(Refused { error, .. }) => return Err(error),
            }
        }
    }

    /// Each with a prefetch of its own.
    async fn consume_all(&self, link: &Link, channel: &Channel, prefetch: Prefetch) -> Result<Jobs, Refused> {
        let mut all = Jobs::new();
        for (at, (queue, full)) in self.config.queues.iter().zip(&self.prefetch).enumerate() {
            // It holds for the consumers that come after it.
            let refused = |error| Refused { queue: at, error };
            let tag = Tag { queue: at, prefetch };
            let messages = if prefetch == Prefetch::One { 1 } else { *full };
            let limiting = channel.basic_qos(messages, BasicQosOptions::default());
            link.ask("set the prefetch", limiting).await.map_err(refused)?;
            let mut arguments = FieldTable::default();
            // RabbitMQ 4.3 refuses it for a classic queue, whose deliveries have no timeout there. Earlier versions do
            // not look at it.
            if queue.kind == QueueType::Quorum && !self.untimed.contains(&at) {
                let millis = i64::try_from(self.timeout.as_millis()).unwrap_or(i64::MAX);
                arguments.insert(TIMEOUT.into(), AMQPValue::LongLongInt(millis));
            }
            if queue.consumer_priority != 0 {
                arguments.insert("x-priority".into(), AMQPValue::LongInt(queue.consumer_priority));
            }
            let options = BasicConsumeOptions::default();
            let name = short(&queue.name).map_err(refused)?;
            let consuming = channel.basic_consume(name, tag.name(), options, arguments);
            let jobs =
                link.ask(&format!("consume queue {}", queue.name), consuming).await.map_err(refused)?;
            // Else an end would go unseen among the others.
            let end = stream::once(async { None });
            all.push(jobs.map(Some).chain(end).map(move |event| (tag, event)).boxed());
        }
        Ok(all)
    }

    /// Ends the consumers with this prefetch. What they have delivered stays.
    async fn cancel(&self, link: &Link, channel: &Channel, prefetch: Prefetch) -> Result<(), Error> {
        for queue in 0..self.config.queues.len() {
            let name = Tag { queue, prefetch }.name();
            let cancelling = channel.basic_cancel(name, BasicCancelOptions::default());
            link.ask("cancel a consumer", cancelling).await?;
        }
        Ok(())
    }

    /// Passes a command on.
    fn hear(&self, message: Option<lapin::Result<lapin::message::Delivery>>) -> Result<(), Error> {
        let message = message.ok_or_else(|| Error::ConsumerEnded { queue: topology::CONTROL.into() })?;
        let message = message.map_err(|source| broken("listen for commands", source))?;
        if let Some(command) = Command::parse(&message.data) {
            let properties = Properties::new(message.properties);
            // A full channel: the requester sees no effect and asks again.
            let _ = self.commands.try_send(ReceivedCommand { command, properties });
        }
        Ok(())
    }

    /// Takes no more jobs, and gives back those that came in but were not taken.
    async fn stop(
        &self,
        link: &Link,
        channel: &Channel,
        prefetch: Prefetch,
        mut jobs: Jobs,
    ) -> Result<(), Error> {
        self.cancel(link, channel, prefetch).await?;
        loop {
            let job = tokio::select! {
                job = jobs.next() => job,
                () = link.lost() => return Err(link.loss()),
            };
            let job = match job {
                Some((_, Some(Ok(job)))) => job,
                // One consumer is at its end; the others may hold more.
                Some(_) => continue,
                None => return Ok(()),
            };
            let options = BasicNackOptions { requeue: true, ..BasicNackOptions::default() };
            let given_back = link.ask("requeue a job", job.acker.nack(options)).await;
            self.metrics.settled(if matches!(given_back, Ok(true)) {
                Settled::Requeued
            } else {
                Settled::Lost
            });
        }
    }
}

/// How long, in milliseconds, the broker waits for the ack of one of a consumer's deliveries.
const TIMEOUT: &str = "x-consumer-timeout";

/// A queue that could not be consumed, and why.
struct Refused {
    queue: usize,
    error: Error,
}

/// Whether the broker refused a consumer for its timeout, as it does where a passive worker takes a classic queue for
/// a quorum queue.
fn takes_no_timeout(error: &Error) -> bool {
    const PRECONDITION_FAILED: u16 = 406;
    let Error::Operation { source, .. } = error else { return false };
    matches!(source.kind(), ErrorKind::ProtocolError(refused)
        if refused.get_id() == PRECONDITION_FAILED && refused.get_message().as_str().contains(TIMEOUT))
}

/// How many unsettled deliveries the consumers of a connection may have each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Prefetch {
    /// As many as is configured.
    Full,
    /// One.
    One,
}

/// One consumer.
#[derive(Clone, Copy, Debug)]
struct Tag {
    queue: usize,
    prefetch: Prefetch,
}

impl Tag {
    /// As the broker knows it.
    fn name(self) -> ShortString {
        match self.prefetch {
            Prefetch::Full => format!("sandpiper.{}", self.queue),
            Prefetch::One => format!("sandpiper.{}.one", self.queue),
        }
        .into()
    }
}

/// Whether the broker closed the connection over a fault of its own.
fn is_internal(error: &Error) -> bool {
    const INTERNAL_ERROR: u16 = 541;
    let source = match error {
        Error::Lost(Some(source)) | Error::Operation { source, .. } => source,
        _ => return false,
    };
    matches!(source.kind(), ErrorKind::ProtocolError(closed) if closed.get_id() == INTERNAL_ERROR)
}

/// Commands, where we may have them: a user who may declare nothing still takes jobs.
async fn commands(link: &Link) -> Result<BoxStream<'static, lapin::Result<lapin::message::Delivery>>, Error> {
    match listen(link).await {
        Err(Error::Operation { what, source }) if is_refused(&source) => {
            tracing::warn!(
                error = chain(&*source),
                "not allowed to {what}: cancel and ping do not reach this worker; its user needs to configure, \
                 write and read amq.gen-*, and to read {}",
                topology::CONTROL
            );
            Ok(stream::pending().boxed())
        }
        heard => Ok(heard?.boxed()),
    }
}

/// A queue of this worker's own behind the control exchange. It goes with the connection.
async fn listen(link: &Link) -> Result<lapin::Consumer, Error> {
    let channel = link.channel().await?;
    let options =
        QueueDeclareOptions { exclusive: true, auto_delete: true, ..QueueDeclareOptions::default() };
    let declaring = channel.queue_declare("".into(), options, FieldTable::default());
    let queue = link.ask("declare a queue for commands", declaring).await?;
    let binding = channel.queue_bind(
        queue.name().clone(),
        topology::CONTROL.into(),
        "".into(),
        QueueBindOptions::default(),
        FieldTable::default(),
    );
    link.ask("bind the queue for commands", binding).await?;
    let options = BasicConsumeOptions { no_ack: true, exclusive: true, ..BasicConsumeOptions::default() };
    let consuming = channel.basic_consume(queue.name().clone(), "".into(), options, FieldTable::default());
    link.ask("listen for commands", consuming).await
}

fn is_refused(error: &lapin::Error) -> bool {
    const ACCESS_REFUSED: u16 = 403;
    matches!(error.kind(), ErrorKind::ProtocolError(refused) if refused.get_id() == ACCESS_REFUSED)
}

fn broken(what: &str, source: lapin::Error) -> Error {
    Error::Operation { what: what.to_owned(), source: Box::new(source) }
}
