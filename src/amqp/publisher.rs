//! Publishes results over a connection of its own, each until the broker has confirmed that it keeps it.
//!
//! One message at a time on a channel: lapin pairs a returned message with whichever confirm comes next, and
//! with several under way that may be another message's. A channel is cheap; as many are kept as results were
//! ever under way at once. One that did not end in a plain confirm is not used again: after a nack it may be
//! past help (it met a leader election), and after a timeout a late confirm may still come.
//!
//! A reply address is a stranger's word, and nobody else waits for it. One that refuses a result twice, confirms none in
//! time, breaks its channel or its connection, or is gone loses that result to the results queue, and is avoided for a
//! minute ([`Refusals`]). What is in time depends on who waits: [`Pace`].

mod attempt;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::amqp::confirm_channels::Outlet;
use crate::amqp::connection::dialer::Dialer;
use crate::amqp::connection::link::Link;
use crate::amqp::connection::supervisor::{LinkState, Session, State, Supervisor};
use crate::amqp::pace::Pace;
use crate::amqp::refusals::{Refusals, Try};
use crate::amqp::{Address, Error, Message, chain, faults};
use crate::config;
use crate::ops::metrics::{Body, Metrics, Published, Role};
use crate::retry::Delays;
use attempt::{BrokerAnswer, Care, Late};

/// The first pause between two attempts; it grows up to [`LONGEST_DELAY`].
const FIRST_DELAY: Duration = Duration::from_millis(100);

/// The longest pause between two attempts at one message. Connecting has its own.
const LONGEST_DELAY: Duration = Duration::from_secs(5);

/// Faults of the connection over one message for a reply address, after which it goes to the results queue: the broker
/// fails over some addresses that it did not hand out, and closes the connection.
const FAULTS: u32 = 3;

/// Refusals of one message for a queue of our own, after which it is published without what else came with it.
const REFUSALS: u32 = 3;

/// What became of a message that was published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// Where it was meant to go.
    Delivered,
    /// In the results queue: the queue it was meant for is gone or takes nothing.
    Redirected,
    /// Nowhere: the requester no longer listens, and its address is nobody else's.
    Dropped,
    /// Nowhere: the broker takes no message with a body of more than so many bytes.
    TooLarge(usize),
}

/// Outcome of a single attempt to publish, without retries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PublishOnce {
    /// The broker has stored it for the requester.
    Confirmed,
    /// Nobody consumes from that address any more, or it takes nothing.
    Unroutable,
    /// It may or may not have arrived.
    Unknown,
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
    /// Reply addresses that took nothing lately.
    refusals: Arc<Refusals>,
    pace: Pace,
    /// The largest body that the broker takes, as far as it has said.
    largest: Arc<AtomicUsize>,
}

/// Of an address that took no result lately.
const NOT_WAITED_FOR: &str = "took no result lately";

/// Why an address did not take a result.
struct NotTaken {
    why: &'static str,
    late: Option<Late>,
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
        let largest = Arc::new(AtomicUsize::new(usize::MAX));
        let session = Publishing { outlet: sender, closing: closing.clone(), largest: largest.clone() };
        let task = tokio::spawn(supervisor.run(session));
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
            refusals: Arc::default(),
            pace: Pace::new(config.prefetch_surplus.into()),
            largest,
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

    /// The largest body that may be published: `configured`, or less where the broker has said so.
    pub fn largest(&self, configured: usize) -> usize {
        self.0.largest.load(Ordering::Relaxed).min(configured)
    }

    /// Publishes until the broker confirmed it, through faults and reconnects, for as long as it takes. A reply
    /// address that does not take it at once is not waited for: the results queue takes its place.
    ///
    /// Dropped before its end, it may or may not have been stored.
    pub async fn publish(&self, message: &Message) -> Sent {
        if self.is_own(&message.to) {
            return self.insist(message, &message.to).await;
        }
        let results = Address::Queue(self.0.config.results_queue.clone());
        loop {
            let NotTaken { why, late } = match self.offer(message).await {
                Ok(sent) => return sent,
                Err(not_taken) => not_taken,
            };
            let sent = match &late {
                None => self.insist(message, &results).await,
                Some(late) => tokio::select! {
                    biased;
                    () = late.confirmed.cancelled() => return Sent::Delivered,
                    // It was the connection that did not answer.
                    () = late.outlet.link.lost(), if matches!(message.to, Address::Queue(_)) => continue,
                    sent = self.insist(message, &results) => {
                        // The broker confirms others meanwhile: so it is the address.
                        if why != NOT_WAITED_FOR {
                            self.is_late(&message.to);
                        }
                        sent
                    }
                },
            };
            tracing::info!(id = message.job(), "a reply queue {why}: its result went to the results queue");
            self.0.metrics.redirected();
            return if sent == Sent::Delivered { Sent::Redirected } else { sent };
        }
    }

    /// Publishes to the address of a stranger, if that takes it now; else the reason.
    async fn offer(&self, message: &Message) -> Result<Sent, NotTaken> {
        const ONCE_MORE: &str = "a result is published again";
        let (to, refusals) = (message.to.name(), &self.0.refusals);
        let is_direct = matches!(message.to, Address::Direct(_));
        let tried = refusals.may_try(to);
        if tried == Try::Unawaited || (tried == Try::Not && is_direct) {
            // A direct address costs nobody anything: the broker drops what nobody listens for.
            let care = Care { unawaited: tried == Try::Unawaited, ..Care::default() };
            let late = match self.attempt(message, &message.to, care).await {
                Ok(BrokerAnswer::Confirmed) if tried == Try::Unawaited => {
                    refusals.forget(to);
                    return Ok(Sent::Delivered);
                }
                Ok(BrokerAnswer::Overdue(late)) if tried == Try::Unawaited => Some(late),
                _ => {
                    refusals.given_up(to);
                    None
                }
            };
            return Err(NotTaken { why: NOT_WAITED_FOR, late });
        }
        if tried == Try::Not {
            return Err(NotTaken { why: NOT_WAITED_FOR, late: None });
        }
        let mut delays = Delays::new(FIRST_DELAY, LONGEST_DELAY);
        let (mut care, mut faults) = (Care::default(), 0);
        loop {
            let answer = self.attempt(message, &message.to, care).await;
            self.count(&answer, is_direct);
            let why = match answer {
                Ok(BrokerAnswer::Confirmed) => {
                    refusals.forget(to);
                    self.0.metrics.body(Body::Result, message.body.len());
                    return Ok(Sent::Delivered);
                }
                Ok(BrokerAnswer::Returned) => {
                    refusals.forget(to);
                    let gone = NotTaken { why: "is gone", late: None };
                    return if is_direct { Ok(Sent::Dropped) } else { Err(gone) };
                }
                Ok(BrokerAnswer::TooLarge(most)) => return Ok(Sent::TooLarge(most)),
                // A queue that elects its leader refuses on old channels, and would not on a new one.
                Ok(BrokerAnswer::Nacked) if !care.fresh => {
                    care.fresh = true;
                    continue;
                }
                Ok(BrokerAnswer::Nacked) => "refuses results",
                Ok(BrokerAnswer::Refused(error)) if !care.fresh => {
                    tracing::warn!(id = message.job(), error = chain(&*error), ONCE_MORE);
                    care.fresh = true;
                    continue;
                }
                Ok(BrokerAnswer::Refused(error)) => {
                    tracing::warn!(id = message.job(), error = chain(&*error), "the broker refuses a result");
                    "makes the broker refuse results"
                }
                Ok(BrokerAnswer::Overdue(late)) => {
                    refusals.refused_again(to);
                    return Err(NotTaken { why: "does not confirm results", late: Some(late) });
                }
                Err(error) => {
                    tracing::warn!(id = message.job(), error = chain(&error), ONCE_MORE);
                    let ours_is_up = self.0.outlet.borrow().is_some();
                    let blamed = faults::is_closed_by_broker(&error) || (is_direct && ours_is_up);
                    faults += u32::from(blamed);
                    care.alone = true;
                    match faults {
                        FAULTS.. => "breaks the connection",
                        // The first one may be another's.
                        1 if is_direct => continue,
                        _ => {
                            tokio::time::sleep(delays.next_delay()).await;
                            continue;
                        }
                    }
                }
            };
            refusals.refused(to);
            return Err(NotTaken { why, late: None });
        }
    }

    /// An address has not confirmed in time what others of the broker's have.
    fn is_late(&self, address: &Address) {
        match address {
            Address::Queue(name) => self.0.refusals.slow(name),
            // Here a confirm says nothing: what is late is the answer whether anybody listens.
            Address::Direct(name) => self.0.refusals.refused(name),
        }
    }

    /// Publishes to a queue of our own, for as long as it takes.
    async fn insist(&self, message: &Message, to: &Address) -> Sent {
        let mut delays = Delays::new(FIRST_DELAY, LONGEST_DELAY);
        let (mut refused, mut bare) = (0, None);
        loop {
            let message = bare.as_ref().unwrap_or(message);
            let care = Care { fresh: refused > 0, ..Care::default() };
            let answer = self.attempt(message, to, care).await;
            self.count(&answer, false);
            match answer {
                Ok(BrokerAnswer::Confirmed) => {
                    self.0.metrics.body(Body::Result, message.body.len());
                    return Sent::Delivered;
                }
                // It is declared again by the next attempt.
                Ok(BrokerAnswer::Returned) => {
                    tracing::warn!(
                        id = message.job(),
                        to = to.name(),
                        "a queue of our own is gone; trying again"
                    );
                }
                Ok(BrokerAnswer::TooLarge(most)) => return Sent::TooLarge(most),
                Ok(BrokerAnswer::Nacked | BrokerAnswer::Overdue(_)) => refused = refused.max(1),
                Ok(BrokerAnswer::Refused(error)) => {
                    tracing::warn!(
                        id = message.job(),
                        error = chain(&*error),
                        "the broker refuses a message; it is published again"
                    );
                    refused += 1;
                    if refused == REFUSALS {
                        bare = Some(message.bare());
                    }
                }
                Err(error) => {
                    tracing::warn!(id = message.job(), error = chain(&error), "a result is published again");
                }
            }
            tokio::time::sleep(delays.next_delay()).await;
        }
    }

    /// Publishes once, for what is worth nothing later or is said again in the result. Never to another queue.
    pub async fn publish_once(&self, message: &Message) -> PublishOnce {
        let (to, refusals) = (message.to.name(), &self.0.refusals);
        let tried = refusals.may_try(to);
        if tried == Try::Not {
            return PublishOnce::Unroutable;
        }
        let care = Care { unawaited: tried == Try::Unawaited, ..Care::default() };
        let answer = self.attempt(message, &message.to, care).await;
        if care.unawaited && !matches!(answer, Ok(BrokerAnswer::Overdue(_))) {
            refusals.given_up(to);
        }
        match answer {
            // It may be only slow.
            Ok(BrokerAnswer::Overdue(_)) if tried == Try::Unawaited => PublishOnce::Unknown,
            Ok(BrokerAnswer::Confirmed) => {
                refusals.forget(to);
                PublishOnce::Confirmed
            }
            Ok(BrokerAnswer::Returned | BrokerAnswer::TooLarge(_)) => {
                refusals.forget(to);
                PublishOnce::Unroutable
            }
            Ok(BrokerAnswer::Overdue(_)) if !self.is_own(&message.to) => {
                self.is_late(&message.to);
                PublishOnce::Unknown
            }
            Ok(BrokerAnswer::Refused(_)) if !self.is_own(&message.to) => {
                refusals.refused(to);
                PublishOnce::Unroutable
            }
            Ok(BrokerAnswer::Nacked | BrokerAnswer::Overdue(_) | BrokerAnswer::Refused(_)) => {
                // A full queue may have room for the next piece; one that is probed has had its chance.
                refusals.refused_again(to);
                PublishOnce::Unknown
            }
            Err(error) => {
                refusals.refused_again(to);
                tracing::debug!(
                    id = message.job(),
                    error = chain(&error),
                    "a message that is not repeated was not confirmed"
                );
                PublishOnce::Unknown
            }
        }
    }

    /// Queues that workers declare and operators look after. All others are a stranger's word.
    fn is_own(&self, address: &Address) -> bool {
        let Address::Queue(name) = address else { return false };
        let config = &self.0.config;
        [&config.results_queue, &config.dead_queue]
            .into_iter()
            .chain(config.queues.iter().map(|queue| &queue.name))
            .any(|own| own == name)
    }

    fn count(&self, answer: &Result<BrokerAnswer, Error>, is_direct: bool) {
        self.0.metrics.published(match answer {
            Ok(BrokerAnswer::Confirmed) => Published::Confirmed,
            Ok(BrokerAnswer::Returned) if is_direct => Published::Dropped,
            Ok(BrokerAnswer::Returned) => Published::Returned,
            Ok(BrokerAnswer::Nacked) => Published::Nacked,
            Ok(BrokerAnswer::Overdue(_)) => Published::TimedOut,
            Ok(BrokerAnswer::Refused(_) | BrokerAnswer::TooLarge(_)) => Published::Refused,
            Err(_) => Published::Failed,
        });
    }

    /// The connection that is up, as soon as there is one.
    async fn outlet(&self) -> Result<Arc<Outlet>, Error> {
        let mut outlet = self.0.outlet.clone();
        let outlet = outlet.wait_for(Option::is_some).await.map_err(|_| Error::Lost(None))?;
        outlet.clone().ok_or(Error::Lost(None))
    }

    /// The connection for direct reply-to addresses, or a new one for this attempt `alone`.
    async fn direct(&self, alone: bool) -> Result<Arc<Outlet>, Error> {
        let dial = async || Ok(Arc::new(Outlet::new(Arc::new(self.0.dialer.dial().await?))));
        if alone {
            self.0.dialer.avoid_last();
            return dial().await;
        }
        let mut direct = self.0.direct.lock().await;
        if let Some(outlet) = direct.as_ref().filter(|outlet| outlet.is_usable()) {
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

/// What the publisher does with a connection: lend it to whoever has something to say.
struct Publishing {
    outlet: watch::Sender<Option<Arc<Outlet>>>,
    closing: CancellationToken,
    largest: Arc<AtomicUsize>,
}

impl Session for Publishing {
    async fn run(&mut self, link: &Arc<Link>, state: &State) -> Result<(), Error> {
        // Another broker may take more.
        self.largest.store(usize::MAX, Ordering::Relaxed);
        self.outlet.send_replace(Some(Arc::new(Outlet::new(link.clone()))));
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
