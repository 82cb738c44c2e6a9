//! Keeps one connection alive: dial, set up, watch, and after any fault the same again, for ever.
//!
//! What is done with a connection is a [`Session`]: the consumer's or the publisher's.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::amqp::connection::dialer::Dialer;
use crate::amqp::connection::link::Link;
use crate::amqp::{Error, chain};
use crate::ops::metrics::{Metrics, Role};
use crate::retry::Delays;

/// The first pause between two attempts; it grows up to `amqp.reconnect_max`.
const FIRST_DELAY: Duration = Duration::from_millis(200);

/// A connection that lasted this long proves that the broker is well: the pauses start small again.
const STEADY: Duration = Duration::from_secs(30);

/// How a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkState {
    /// Not there, or not yet set up.
    Down,
    /// In use.
    Up,
    /// There, but the broker takes no messages from it.
    Blocked,
}

/// Tells everybody concerned how a connection is.
#[derive(Clone, Debug)]
pub(in crate::amqp) struct State {
    role: Role,
    metrics: Metrics,
    sender: watch::Sender<LinkState>,
}

impl State {
    pub(in crate::amqp) fn new(role: Role, metrics: &Metrics) -> Self {
        Self { role, metrics: metrics.clone(), sender: watch::Sender::new(LinkState::Down) }
    }

    pub(in crate::amqp) fn subscribe(&self) -> watch::Receiver<LinkState> {
        self.sender.subscribe()
    }

    /// The session has set `link` up and uses it.
    pub(in crate::amqp) fn up(&self, link: &Link) {
        tracing::info!(role = self.role.as_str(), broker = link.broker(), "connected to the broker");
        self.set(if *link.blocked().borrow() { LinkState::Blocked } else { LinkState::Up });
    }

    fn set(&self, state: LinkState) {
        self.metrics.connection_up(self.role, state != LinkState::Down);
        self.metrics.connection_blocked(self.role, state == LinkState::Blocked);
        self.sender.send_replace(state);
    }

    /// Mirrors the broker's word on `link` for as long as it is up.
    async fn follow(&self, link: &Link) {
        let mut blocked = link.blocked();
        while blocked.changed().await.is_ok() {
            if *self.sender.borrow() != LinkState::Down {
                self.set(if *blocked.borrow() { LinkState::Blocked } else { LinkState::Up });
            }
        }
        std::future::pending().await
    }
}

/// What is done with a connection for as long as it lasts.
pub(in crate::amqp) trait Session: Send + 'static {
    /// Sets `link` up, tells `state` when that is done, and uses it. `Ok` is the end of all sessions; after an
    /// error there will be another one.
    fn run(&mut self, link: &Arc<Link>, state: &State) -> impl Future<Output = Result<(), Error>> + Send;
}

/// Runs sessions of one role, one after the other.
#[derive(Debug)]
pub(in crate::amqp) struct Supervisor {
    pub(in crate::amqp) dialer: Dialer,
    pub(in crate::amqp) state: State,
    /// `amqp.reconnect_max`.
    pub(in crate::amqp) longest_delay: Duration,
    /// Ends the supervisor where no session is under way; a session looks after itself.
    pub(in crate::amqp) leave: CancellationToken,
}

impl Supervisor {
    /// Ends when a session says so, or after `leave`.
    pub(in crate::amqp) async fn run(self, mut session: impl Session) {
        let role = self.state.role;
        let mut delays = Delays::new(FIRST_DELAY, self.longest_delay);
        while !self.leave.is_cancelled() {
            let start = Instant::now();
            let Err(error) = self.once(&mut session).await else { return };
            if start.elapsed() > STEADY {
                delays.reset();
            }
            let pause = delays.next_delay();
            tracing::warn!(
                role = role.as_str(),
                error = chain(&error),
                ?pause,
                "no connection to the broker; trying again"
            );
            self.leave.run_until_cancelled(tokio::time::sleep(pause)).await;
            self.state.metrics.reconnect(role);
        }
    }

    /// One connection, from dialling to its end.
    async fn once(&self, session: &mut impl Session) -> Result<(), Error> {
        let Some(link) = self.leave.run_until_cancelled(self.dialer.dial()).await else { return Ok(()) };
        let link = Arc::new(link?);
        let ended = tokio::select! {
            ended = session.run(&link, &self.state) => ended,
            () = self.state.follow(&link) => Err(link.loss()),
        };
        self.state.set(LinkState::Down);
        self.dialer.avoid_last();
        // Whatever else still holds this connection must not keep deliveries back from other workers.
        link.give_up();
        ended
    }
}
