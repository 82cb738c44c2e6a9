//! Takes jobs from their queue, and commands from the control exchange, over a connection of its own.

use std::sync::Arc;

use futures_util::StreamExt;
use lapin::Channel;
use lapin::options::{
    BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions, QueueBindOptions,
    QueueDeclareOptions,
};
use lapin::types::FieldTable;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::amqp::connection::{Dialer, Link};
use crate::amqp::control::{Command, Heard};
use crate::amqp::delivery::{Delivery, Properties};
use crate::amqp::supervisor::{LinkState, Session, State, Supervisor};
use crate::amqp::{Error, short, topology};
use crate::config;
use crate::ops::metrics::{Metrics, Role, Settled};

/// Our name for the one consumer on a channel.
const TAG: &str = "sandpiper";

/// Commands that wait to be looked at; more than that are dropped, a requester can ask again.
const COMMANDS: usize = 64;

/// The stream of jobs, across all connections that it takes.
#[derive(Debug)]
pub struct Consumer {
    deliveries: mpsc::Receiver<Delivery>,
    commands: Option<mpsc::Receiver<Heard>>,
    state: watch::Receiver<LinkState>,
    closing: CancellationToken,
    task: JoinHandle<()>,
}

impl Consumer {
    /// Connects and consumes in the background until `drain`, then no more: what was not taken goes back.
    pub fn start(
        config: &config::Amqp,
        name: &str,
        prefetch: u16,
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
            dialer: Dialer::new(config, format!("sandpiper {name} jobs")),
            state,
            longest_delay: config.reconnect_max,
            leave: drain.clone(),
        };
        let session = Consuming {
            config: config.clone(),
            prefetch,
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
    pub fn commands(&mut self) -> Option<mpsc::Receiver<Heard>> {
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
    prefetch: u16,
    metrics: Metrics,
    /// None once drained, so that the reader sees the end.
    sender: Option<mpsc::Sender<Delivery>>,
    commands: mpsc::Sender<Heard>,
    drain: CancellationToken,
    closing: CancellationToken,
}

impl Session for Consuming {
    async fn run(&mut self, link: &Arc<Link>, state: &State) -> Result<(), Error> {
        let channel = link.channel().await?;
        topology::ensure(link, &channel, &self.config).await?;
        let mut commands = listen(link).await?;
        link.ask("set the prefetch", channel.basic_qos(self.prefetch, BasicQosOptions::default())).await?;
        let consuming = channel.basic_consume(
            short(&self.config.jobs_queue)?,
            TAG.into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        );
        let mut jobs = link.ask("consume the jobs queue", consuming).await?;
        state.up(link);

        let Some(sender) = &self.sender else { return Ok(()) };
        loop {
            tokio::select! {
                biased;
                () = self.drain.cancelled() => break,
                () = link.lost() => return Err(Error::Lost),
                command = commands.next() => self.hear(command)?,
                // The place first: a delivery in our hands must have somewhere to go.
                job = async { (sender.reserve().await, jobs.next().await) } => match job {
                    (Ok(place), Some(Ok(job))) => {
                        self.metrics.received(&self.config.jobs_queue, job.data.len(), job.redelivered);
                        place.send(Delivery::new(job, link.clone(), self.metrics.clone()));
                    }
                    (_, Some(Err(source))) => return Err(broken("go on consuming", source)),
                    (_, None) => return Err(Error::ConsumerEnded),
                    // The reader is gone: nobody will take another job.
                    (Err(_), Some(Ok(_))) => break,
                },
            }
        }
        self.sender = None;
        self.stop(link, &channel, jobs).await?;
        // What still runs can still be cancelled.
        loop {
            tokio::select! {
                biased;
                () = self.closing.cancelled() => break,
                () = link.lost() => return Err(Error::Lost),
                command = commands.next() => self.hear(command)?,
            }
        }
        link.close().await;
        Ok(())
    }
}

impl Consuming {
    /// Passes a command on.
    fn hear(&self, message: Option<lapin::Result<lapin::message::Delivery>>) -> Result<(), Error> {
        let message = message.ok_or(Error::ConsumerEnded)?;
        let message = message.map_err(|source| broken("listen for commands", source))?;
        if let Some(command) = Command::parse(&message.data) {
            let properties = Properties::new(message.properties);
            // A full channel: the requester sees no effect and asks again.
            let _ = self.commands.try_send(Heard { command, properties });
        }
        Ok(())
    }

    /// Takes no more jobs, and gives back those that came in but were not taken.
    async fn stop(&self, link: &Link, channel: &Channel, mut jobs: lapin::Consumer) -> Result<(), Error> {
        let cancelling = channel.basic_cancel(TAG.into(), BasicCancelOptions::default());
        link.ask("cancel the consumer", cancelling).await?;
        loop {
            let job = tokio::select! {
                job = jobs.next() => job,
                () = link.lost() => return Err(Error::Lost),
            };
            let Some(Ok(job)) = job else { return Ok(()) };
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

fn broken(what: &str, source: lapin::Error) -> Error {
    Error::Operation { what: what.to_owned(), source: Box::new(source) }
}
