//! A connection that is up: watched, asked with a time limit of our own, and given up for good.

use std::future::Future;
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use lapin::{Connection, ConnectionStatus, Event};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::amqp::Error;
use crate::amqp::connection::signer::Signer;
use crate::amqp::frames::oversize::Dropped;

/// A handle on the socket under a connection, to end it where lapin would wait on.
#[derive(Clone, Debug, Default)]
pub(in crate::amqp) struct Socket(Arc<Mutex<Option<TcpStream>>>);

impl Socket {
    pub(in crate::amqp) fn keep(&self, stream: &impl AsFd) {
        let handle = stream.as_fd().try_clone_to_owned().ok().map(TcpStream::from);
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = handle;
    }

    pub(in crate::amqp) fn shut(&self) {
        if let Some(stream) = self.0.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // It fails only where the connection is gone already.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// Why a connection was lost; set before it counts as lost, where it is known at all.
type Reason = Arc<OnceLock<Box<lapin::Error>>>;

/// A connection that came up. Once lost it stays lost; dropping it closes it.
#[derive(Debug)]
pub(in crate::amqp) struct Link {
    connection: Connection,
    broker: String,
    socket: Socket,
    timeout: Duration,
    patient: bool,
    dropped: Dropped,
    signer: Signer,
    user: Option<String>,
    lost: CancellationToken,
    reason: Reason,
    blocked: watch::Receiver<bool>,
    _watcher: DropGuard,
}

impl Link {
    pub(in crate::amqp) fn new(
        connection: Connection,
        broker: String,
        socket: Socket,
        timeout: Duration,
        patient: bool,
    ) -> Self {
        let lost = CancellationToken::new();
        let watcher = CancellationToken::new();
        let reason = Reason::default();
        let (blocked, is_blocked) = watch::channel(false);
        let events = connection.events_listener();
        // What happened before somebody listened is told to nobody.
        if !connection.status().connected() {
            lost.cancel();
        }
        tokio::spawn(watcher.clone().run_until_cancelled_owned(watch_events(
            events,
            connection.status().clone(),
            lost.clone(),
            reason.clone(),
            blocked,
        )));
        Self {
            connection,
            broker,
            socket,
            timeout,
            patient,
            dropped: Dropped::default(),
            signer: Signer::new(b""),
            user: None,
            lost,
            reason,
            blocked: is_blocked,
            _watcher: watcher.drop_guard(),
        }
    }

    /// Host and port, for logs.
    pub(in crate::amqp) fn broker(&self) -> &str {
        &self.broker
    }

    /// Ends when the connection is gone.
    pub(in crate::amqp) async fn lost(&self) {
        self.lost.cancelled().await;
    }

    /// The same with notes of bodies that did not come through.
    pub(in crate::amqp) fn noting(self, dropped: Dropped) -> Self {
        Self { dropped, ..self }
    }

    /// The same with what signs for the workers of this broker.
    pub(in crate::amqp) fn signing(self, signer: Signer) -> Self {
        Self { signer, ..self }
    }

    /// The same with the user that logged in, where that is known.
    pub(in crate::amqp) fn of_user(self, user: Option<String>) -> Self {
        Self { user, ..self }
    }

    /// Signs for the workers of this broker.
    pub(in crate::amqp) fn signer(&self) -> &Signer {
        &self.signer
    }

    /// The user that logged in, where that is known.
    pub(in crate::amqp) fn user(&self) -> Option<&str> {
        self.user.as_deref()
    }

    /// How large the body of a delivery was, if it was too large to come through.
    pub(in crate::amqp) fn dropped(&self, channel: u16, delivery: u64) -> Option<u64> {
        self.dropped.take(channel, delivery)
    }

    /// The error of whoever needed it after it was lost.
    pub(in crate::amqp) fn loss(&self) -> Error {
        Error::Lost(self.reason.get().cloned())
    }

    /// Whether it is gone.
    pub(in crate::amqp) fn is_lost(&self) -> bool {
        self.lost.is_cancelled()
    }

    /// Whether the broker takes no messages from it at the moment.
    pub(in crate::amqp) fn blocked(&self) -> watch::Receiver<bool> {
        self.blocked.clone()
    }

    /// Whether it waits for as long as that lasts.
    pub(in crate::amqp) fn is_patient(&self) -> bool {
        self.patient
    }

    /// Gives the connection up, because of something that only its user saw.
    pub(in crate::amqp) fn give_up(&self) {
        self.lost.cancel();
        self.socket.shut();
    }

    /// How many bytes of headers a message may carry here: one frame has to hold them, beside everything else
    /// of its properties.
    pub(in crate::amqp) fn headers_room(&self) -> usize {
        /// Eight short strings of 255 bytes, and the frame around them.
        const OTHERS: usize = 2_200;
        let frame = usize::try_from(self.connection.configuration().frame_max()).unwrap_or(usize::MAX);
        frame.saturating_sub(OTHERS)
    }

    /// A new channel.
    pub(in crate::amqp) async fn channel(&self) -> Result<lapin::Channel, Error> {
        self.ask("open a channel", self.connection.create_channel()).await
    }

    /// Waits for the answer to one operation: until it comes, the connection is lost, or it is overdue, which
    /// counts as lost.
    pub(in crate::amqp) async fn ask<T>(
        &self,
        what: &str,
        operation: impl Future<Output = lapin::Result<T>>,
    ) -> Result<T, Error> {
        match self.ask_for_now(what, operation).await? {
            Some(answer) => Ok(answer),
            None => {
                self.give_up();
                Err(Error::Timeout { what: what.into(), after: self.timeout })
            }
        }
    }

    /// The same, and the connection is kept: none where the answer is overdue. While the broker blocks the
    /// connection the clock stands still, unless somebody waits: it owes us nothing then.
    pub(in crate::amqp) async fn ask_for_now<T>(
        &self,
        what: &str,
        operation: impl Future<Output = lapin::Result<T>>,
    ) -> Result<Option<T>, Error> {
        let mut operation = std::pin::pin!(operation);
        let mut blocked = self.blocked();
        loop {
            let is_blocked = *blocked.borrow_and_update();
            tokio::select! {
                biased;
                answer = &mut operation => {
                    return answer
                        .map(Some)
                        .map_err(|source| Error::Operation { what: what.into(), source: Box::new(source) });
                }
                () = self.lost() => return Err(self.loss()),
                Ok(()) = blocked.changed() => {}
                () = tokio::time::sleep(self.timeout), if !(is_blocked && self.patient) => {
                    return if is_blocked { Err(Error::Blocked { what: what.into() }) } else { Ok(None) };
                }
            }
        }
    }

    /// The same, and a blocked connection is no reason to wait longer.
    pub(in crate::amqp) async fn ask_in_time<T>(
        &self,
        what: &str,
        operation: impl Future<Output = lapin::Result<T>>,
    ) -> Result<T, Error> {
        let answer = tokio::time::timeout(self.timeout, self.ask(what, operation)).await;
        answer.unwrap_or_else(|_| Err(Error::Timeout { what: what.into(), after: self.timeout }))
    }

    /// Says goodbye, so that everything sent before has reached the broker.
    pub(in crate::amqp) async fn close(&self) {
        let goodbye = self.connection.close(lapin::protocol::constants::REPLY_SUCCESS, "goodbye".into());
        if let Err(error) = self.ask_in_time("close the connection", goodbye).await {
            tracing::debug!(error = crate::amqp::chain(&error), "the connection was gone before its end");
        }
    }
}

/// Follows what lapin reports of one connection until it is gone.
async fn watch_events(
    events: impl futures_util::Stream<Item = Event>,
    status: ConnectionStatus,
    lost: CancellationToken,
    reason: Reason,
    blocked: watch::Sender<bool>,
) {
    let mut events = std::pin::pin!(events);
    while let Some(event) = events.next().await {
        match event {
            Event::ConnectionBlocked(reason) => {
                tracing::warn!(reason, "the broker takes no messages for now");
                blocked.send_replace(true);
            }
            Event::ConnectionUnblocked => {
                tracing::info!("the broker takes messages again");
                blocked.send_replace(false);
            }
            // Errors of a single channel come here as well; whoever uses it sees them.
            Event::Error(error) if !status.connected() => {
                // The first one says it; what breaks over it later only follows.
                let _ = reason.set(Box::new(error));
                break;
            }
            _ => {}
        }
    }
    lost.cancel();
}
