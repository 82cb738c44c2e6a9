//! Publishes results over a connection of its own, each until the broker has confirmed that it keeps it.
//!
//! One message at a time on a channel: lapin pairs a returned message with whichever confirm comes next, and
//! with several under way that may be another message's. A channel is cheap; as many are kept as results were
//! ever under way at once. One that did not end in a plain confirm is not used again: after a nack it may be
//! past help (it met a leader election), and after a timeout a late confirm may still come.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::FieldTable;
use lapin::{Channel, Confirmation, ErrorKind};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::amqp::connection::Dialer;
use crate::amqp::link::Link;
use crate::amqp::message::fitting;
use crate::amqp::supervisor::{LinkState, Session, State, Supervisor};
use crate::amqp::{Address, Error, Message, chain, short, topology};
use crate::config;
use crate::ops::metrics::{Body, Metrics, Published, Role};
use crate::retry::Delays;

/// The first pause after a refused message; it grows up to [`LONGEST_DELAY`].
const FIRST_DELAY: Duration = Duration::from_millis(100);

/// The longest pause between two attempts at one message. Connecting has its own.
const LONGEST_DELAY: Duration = Duration::from_secs(5);

/// A reply queue that refuses a result for this long (it is full), or confirms none (it has lost its majority), does
/// not get it: a requester must not be able to hold up the results of all others. The results queue does.
const PATIENCE: Duration = Duration::from_secs(30);

/// Attempts at a direct reply-to address. It may be what breaks the connection, for everybody: the broker fails
/// over addresses that it did not hand out. And no requester would outlive so many faults of the broker's.
const DIRECT_FAILURES: u32 = 3;

/// What became of a message that was published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// Where it was meant to go.
    Delivered,
    /// In the results queue: the queue it was meant for is gone or takes nothing.
    Redirected,
    /// Nowhere: the requester no longer listens, and its address is nobody else's.
    Dropped,
}

/// What became of a message that is published once only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// The broker has it for whoever asked.
    Heard,
    /// Nobody listens at that address any more.
    NobodyThere,
    /// It may or may not have arrived.
    Failed,
}

/// Publishes messages, across all connections that it takes. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Publisher(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    config: config::Amqp,
    metrics: Metrics,
    outlet: watch::Receiver<Option<Arc<Outlet>>>,
    /// The broker that was found to be cut off last.
    cut_off: watch::Sender<String>,
    state: watch::Receiver<LinkState>,
    closing: CancellationToken,
    task: Mutex<Option<JoinHandle<()>>>,
    /// Direct reply-to addresses travel over a connection of their own, dialled when the first one comes. What a
    /// stranger writes can look like an address of the broker's and still make it fail: some versions then close
    /// the connection that asked.
    direct: tokio::sync::Mutex<Option<Arc<Outlet>>>,
    dialer: Dialer,
}

/// A connection with its idle channels.
#[derive(Debug)]
struct Outlet {
    link: Arc<Link>,
    idle: Mutex<Vec<Channel>>,
}

/// What the broker said to one attempt.
enum Answer {
    Confirmed,
    Returned,
    Nacked,
    /// Nothing, though it answers otherwise.
    Overdue,
}

impl Publisher {
    /// Connects in the background.
    pub fn start(config: &config::Amqp, name: &str, metrics: &Metrics) -> Self {
        let closing = CancellationToken::new();
        let state = State::new(Role::Publish, metrics);
        let subscription = state.subscribe();
        let (sender, outlet) = watch::channel(None);
        let supervisor = Supervisor {
            dialer: Dialer::new(config, format!("sandpiper {name} results")),
            state,
            longest_delay: config.reconnect_max,
            leave: closing.clone(),
        };
        let task = tokio::spawn(supervisor.run(Publishing { outlet: sender, closing: closing.clone() }));
        Self(Arc::new(Inner {
            config: config.clone(),
            metrics: metrics.clone(),
            outlet,
            cut_off: watch::Sender::default(),
            state: subscription,
            closing,
            task: Mutex::new(Some(task)),
            direct: tokio::sync::Mutex::default(),
            dialer: Dialer::new(config, format!("sandpiper {name} direct results")),
        }))
    }

    /// Waits until the broker takes messages. False where it never will again.
    pub async fn up(&self) -> bool {
        self.0.state.clone().wait_for(|state| *state == LinkState::Up).await.is_ok()
    }

    /// Names brokers, as they are found to have lost the majority of their cluster. Whoever only consumes would wait
    /// there for ever.
    pub fn cut_off(&self) -> watch::Receiver<String> {
        self.0.cut_off.subscribe()
    }

    /// How the connection is, now and later.
    pub fn state(&self) -> watch::Receiver<LinkState> {
        self.0.state.clone()
    }

    /// Publishes until the broker confirmed it, through faults and reconnects, for as long as it takes.
    ///
    /// Dropped before its end, it may or may not have been stored.
    pub async fn publish(&self, message: &Message) -> Sent {
        let [results, dead] = [&self.0.config.results_queue, &self.0.config.dead_queue]
            .map(|queue| Address::Queue(queue.clone()));
        let mut to = message.to.clone();
        let mut delays = Delays::new(FIRST_DELAY, LONGEST_DELAY);
        let (mut refused_since, mut failures) = (None, 0);
        loop {
            // After a fault a direct address gets a connection for itself, so that innocents share no second one.
            let start = Instant::now();
            let answer = self.attempt(message, &to, failures > 0).await;
            self.count(&answer, &to);
            match answer {
                Ok(Answer::Confirmed) => {
                    self.0.metrics.body(Body::Result, message.body.len());
                    return if to == message.to { Sent::Delivered } else { Sent::Redirected };
                }
                Ok(Answer::Returned) if matches!(to, Address::Direct(_)) => return Sent::Dropped,
                Ok(Answer::Returned) if to != results && to != dead => {
                    self.redirect("is gone", &mut to, &results);
                    continue;
                }
                // Our own queue is gone. It is declared again by the next attempt.
                Ok(Answer::Returned) => tracing::warn!("a queue of our own is gone; trying again"),
                Ok(Answer::Nacked | Answer::Overdue) => {
                    let since = *refused_since.get_or_insert(start);
                    if since.elapsed() > PATIENCE && to != results && to != dead {
                        self.redirect("takes nothing", &mut to, &results);
                        continue;
                    }
                }
                Err(error) => {
                    tracing::warn!(error = chain(&error), "a result is published again");
                    failures += 1;
                    if failures == DIRECT_FAILURES && matches!(to, Address::Direct(_)) {
                        self.redirect("cannot be reached", &mut to, &results);
                    }
                }
            }
            tokio::time::sleep(delays.next_delay()).await;
        }
    }

    /// Publishes once, for what is worth nothing later or is said again in the result. Never to another queue.
    pub async fn tell(&self, message: &Message) -> Told {
        match self.attempt(message, &message.to, false).await {
            Ok(Answer::Confirmed) => Told::Heard,
            Ok(Answer::Returned) => Told::NobodyThere,
            Ok(Answer::Nacked | Answer::Overdue) => Told::Failed,
            Err(error) => {
                tracing::debug!(error = chain(&error), "a message that is not repeated was not confirmed");
                Told::Failed
            }
        }
    }

    fn redirect(&self, why: &str, to: &mut Address, results: &Address) {
        tracing::info!("a reply queue {why}: its result goes to the results queue");
        self.0.metrics.redirected();
        *to = results.clone();
    }

    fn count(&self, answer: &Result<Answer, Error>, to: &Address) {
        self.0.metrics.published(match answer {
            Ok(Answer::Confirmed) => Published::Confirmed,
            Ok(Answer::Returned) if matches!(to, Address::Direct(_)) => Published::Dropped,
            Ok(Answer::Returned) => Published::Returned,
            Ok(Answer::Nacked) => Published::Nacked,
            Ok(Answer::Overdue) | Err(Error::Timeout { .. }) => Published::TimedOut,
            Err(_) => Published::Failed,
        });
    }

    /// One attempt, on a channel that has nothing else under way.
    async fn attempt(&self, message: &Message, to: &Address, alone: bool) -> Result<Answer, Error> {
        let (name, mandatory, outlet) = match to {
            Address::Queue(name) => (name, true, self.outlet().await?),
            // Delivered past the queues: the broker would call it unroutable though it arrived.
            Address::Direct(name) => (name, false, self.direct(alone).await?),
        };
        if !mandatory && !outlet.listens(name).await? {
            return Ok(Answer::Returned);
        }
        let channel = outlet.channel().await?;
        let start = Instant::now();
        let publishing = async {
            let options = BasicPublishOptions { mandatory, ..BasicPublishOptions::default() };
            let properties = fitting(&message.properties, outlet.link.headers_room());
            channel
                .basic_publish("".into(), short(name).unwrap_or_default(), options, &message.body, properties)
                .await?
                .await
        };
        let Some(confirmation) = outlet.link.ask_for_now("have a result confirmed", publishing).await? else {
            // One queue that does not answer, of all that share this connection?
            if !outlet.declares().await? {
                outlet.link.give_up();
                let broker = outlet.link.broker().to_owned();
                self.0.cut_off.send_replace(broker.clone());
                return Err(Error::NoMajority { broker });
            }
            tracing::warn!("a result is not confirmed in time; it is published again");
            return Ok(Answer::Overdue);
        };
        match confirmation {
            Confirmation::Ack(None) => {
                self.0.metrics.confirm(start.elapsed());
                outlet.give_back(channel);
                Ok(Answer::Confirmed)
            }
            Confirmation::Ack(Some(_)) => {
                if name == &self.0.config.results_queue || name == &self.0.config.dead_queue {
                    topology::ensure(&outlet.link, &channel, &self.0.config).await?;
                }
                outlet.give_back(channel);
                Ok(Answer::Returned)
            }
            Confirmation::Nack(_) | Confirmation::NotRequested => Ok(Answer::Nacked),
        }
    }

    /// The connection that is up, as soon as there is one.
    async fn outlet(&self) -> Result<Arc<Outlet>, Error> {
        let mut outlet = self.0.outlet.clone();
        let outlet = outlet.wait_for(Option::is_some).await.map_err(|_| Error::Lost(None))?;
        outlet.clone().ok_or(Error::Lost(None))
    }

    /// The connection for direct reply-to addresses, or a new one for this attempt `alone`.
    async fn direct(&self, alone: bool) -> Result<Arc<Outlet>, Error> {
        let dial = async || {
            let link = Arc::new(self.0.dialer.dial().await?);
            Ok(Arc::new(Outlet { link, idle: Mutex::default() }))
        };
        if alone {
            self.0.dialer.avoid_last();
            return dial().await;
        }
        let mut direct = self.0.direct.lock().await;
        if let Some(outlet) = direct.as_ref().filter(|outlet| !outlet.link.is_lost()) {
            return Ok(outlet.clone());
        }
        let outlet = dial().await?;
        *direct = Some(outlet.clone());
        Ok(outlet)
    }

    /// Ends the connection, after everything was published.
    pub async fn close(&self) {
        self.0.closing.cancel();
        let task = self.0.task.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(task) = task {
            // It cannot be aborted by anybody else, and a panic in it was reported by the runtime.
            let _ = task.await;
        }
        if let Some(outlet) = self.0.direct.lock().await.take() {
            outlet.link.close().await;
        }
    }
}

impl Outlet {
    /// A channel in confirm mode with nothing under way.
    async fn channel(&self) -> Result<Channel, Error> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        if let Some(channel) = idle.filter(|channel| channel.status().connected()) {
            return Ok(channel);
        }
        let channel = self.link.channel().await?;
        let selecting = channel.confirm_select(ConfirmSelectOptions::default());
        self.link.ask("turn confirms on", selecting).await?;
        Ok(channel)
    }

    fn give_back(&self, channel: Channel) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(channel);
    }

    /// Whether the broker declares a queue at once. One that has lost the majority of its cluster goes on answering what
    /// it need not agree on with others, since RabbitMQ 4.3, which does not pause it.
    async fn declares(&self) -> Result<bool, Error> {
        let channel = self.link.channel().await?;
        let options =
            QueueDeclareOptions { exclusive: true, auto_delete: true, ..QueueDeclareOptions::default() };
        let declaring = async {
            let queue = channel.queue_declare("".into(), options, FieldTable::default()).await?;
            channel.queue_delete(queue.name().clone(), QueueDeleteOptions::default()).await
        };
        match self.link.ask_for_now("declare a queue", declaring).await {
            Ok(answer) => Ok(answer.is_some()),
            // Not allowed, for one: an answer all the same.
            Err(Error::Operation { .. }) if !self.link.is_lost() => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Whether a requester still listens on its direct reply-to address: the broker answers a passive
    /// declaration of it, and nothing else tells.
    async fn listens(&self, address: &str) -> Result<bool, Error> {
        let channel = self.channel().await?;
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let declaring = channel.queue_declare(short(address)?, options, FieldTable::default());
        match self.link.ask("look for a requester", declaring).await {
            Ok(_) => {
                self.give_back(channel);
                Ok(true)
            }
            // A refusal costs the channel and nothing else.
            Err(Error::Operation { source, .. }) if is_not_found(&source) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

pub(super) fn is_not_found(error: &lapin::Error) -> bool {
    const NOT_FOUND: u16 = 404;
    matches!(error.kind(), ErrorKind::ProtocolError(refused) if refused.get_id() == NOT_FOUND)
}

/// What the publisher does with a connection: lend it to whoever has something to say.
struct Publishing {
    outlet: watch::Sender<Option<Arc<Outlet>>>,
    closing: CancellationToken,
}

impl Session for Publishing {
    async fn run(&mut self, link: &Arc<Link>, state: &State) -> Result<(), Error> {
        self.outlet.send_replace(Some(Arc::new(Outlet { link: link.clone(), idle: Mutex::default() })));
        state.up(link);
        let ended = tokio::select! {
            () = link.lost() => Err(link.loss()),
            () = self.closing.cancelled() => Ok(()),
        };
        self.outlet.send_replace(None);
        if ended.is_ok() {
            link.close().await;
        }
        ended
    }
}
