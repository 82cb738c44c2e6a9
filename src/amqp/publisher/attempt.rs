//! One attempt to publish a message, and what the broker said to it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use lapin::{Channel, Confirmation};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Publisher;
use crate::amqp::confirm_channels::Outlet;
use crate::amqp::connection::link::Link;
use crate::amqp::{Address, Error, Message, faults, topology};

/// No confirm is late before this, even where the usual one takes far less.
const LEAST_PATIENCE: Duration = Duration::from_millis(50);

/// No direct reply-to address is slow to answer for before this. Waiting for it only decides how that is counted.
const LEAST_DIRECT_PATIENCE: Duration = Duration::from_millis(10);

/// So long a direct reply-to address is given where nobody waits for the place.
const DIRECT_PATIENCE: Duration = Duration::from_secs(1);

/// What a message takes beside its body where the broker counts that as well.
const ENVELOPE: usize = 4_096;

/// What the broker said to one attempt.
#[derive(Debug)]
pub(super) enum BrokerAnswer {
    Confirmed,
    Returned,
    Nacked,
    /// Nothing, though it may answer otherwise.
    Overdue(Late),
    /// It closed the channel over this message.
    Refused(Box<lapin::Error>),
    /// It closed the channel, as it takes no body of more than so many bytes.
    TooLarge(usize),
}

/// A result that was sent, and its confirm has not come so far.
#[derive(Debug)]
pub(super) struct Late {
    pub(super) outlet: Arc<Outlet>,
    /// It has come after all.
    pub(super) confirmed: CancellationToken,
}

impl Late {
    fn new(outlet: &Arc<Outlet>) -> Self {
        Self { outlet: outlet.clone(), confirmed: CancellationToken::new() }
    }
}

/// How an attempt is made.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Care {
    /// By a channel that nothing was published on before: after a nack an older one may be past help.
    pub(super) fresh: bool,
    /// Without waiting for the confirm.
    pub(super) unawaited: bool,
    /// By a connection of its own, for a direct address, so that innocents share no second fault.
    pub(super) alone: bool,
}

impl Publisher {
    /// One attempt, on a channel that has nothing else under way.
    pub(super) async fn attempt(
        &self,
        message: &Message,
        to: &Address,
        care: Care,
    ) -> Result<BrokerAnswer, Error> {
        match to {
            Address::Queue(name) if self.is_own(to) => self.attempt_own(message, name, care).await,
            Address::Queue(name) => {
                self.attempt_strange(self.outlet().await?, message, name, true, care).await
            }
            Address::Direct(name) => self.attempt_direct(message, name, care).await,
        }
    }

    /// To a queue of our own: the confirm is waited for as any other answer of the broker's.
    async fn attempt_own(&self, message: &Message, name: &str, care: Care) -> Result<BrokerAnswer, Error> {
        let outlet = self.outlet().await?;
        let channel = outlet.channel(care.fresh).await?;
        let start = Instant::now();
        let publishing = async { outlet.publish(&channel, message, name, true).await?.await };
        let confirmation = match outlet.link.ask_for_now("have a result confirmed", publishing).await {
            Ok(Some(confirmation)) => confirmation,
            Ok(None) => {
                // One queue that does not answer, of all that share this connection?
                if !outlet.declares().await? {
                    outlet.link.give_up();
                    let broker = outlet.link.broker().to_owned();
                    self.0.cut_off.send_replace(broker.clone());
                    return Err(Error::NoMajority { broker });
                }
                tracing::warn!(
                    id = message.job(),
                    to = name,
                    "a result is not confirmed in time; it is published again"
                );
                return Ok(BrokerAnswer::Overdue(Late::new(&outlet)));
            }
            Err(error) => return self.refused(error, message),
        };
        if matches!(confirmation, Confirmation::Ack(Some(_))) {
            topology::ensure(&outlet.link, &channel, &self.0.config).await?;
        }
        Ok(self.answered(&outlet, channel, confirmation, start))
    }

    /// To an address that a stranger wrote, which may keep the confirm back for ever.
    async fn attempt_strange(
        &self,
        outlet: Arc<Outlet>,
        message: &Message,
        name: &str,
        mandatory: bool,
        care: Care,
    ) -> Result<BrokerAnswer, Error> {
        let what = "have a result confirmed";
        let channel = outlet.channel(care.fresh).await?;
        let start = Instant::now();
        // That it is not sent yet is no fault of the address.
        let sent = tokio::select! {
            biased;
            sent = outlet.publish(&channel, message, name, mandatory) => sent,
            () = outlet.link.lost() => return Err(outlet.link.loss()),
        };
        let mut overdue = std::pin::pin!(async {
            if !care.unawaited {
                self.overdue(&outlet.link, name).await;
            }
        });
        let mut confirm = match sent {
            Ok(confirm) => Box::pin(confirm),
            Err(source) => {
                let source = Box::new(source);
                return self.refused(Error::Operation { what: what.into(), source }, message);
            }
        };
        let confirmation = tokio::select! {
            biased;
            confirmation = &mut confirm => confirmation,
            () = outlet.link.lost() => return Err(outlet.link.loss()),
            () = &mut overdue => {
                // It was sent, and may still arrive. That clears the address.
                let (name, refusals, timeout) =
                    (name.to_owned(), self.0.refusals.clone(), self.0.config.operation_timeout);
                let late = Late::new(&outlet);
                let (outlet, confirmed) = (outlet.clone(), late.confirmed.clone());
                tokio::spawn(async move {
                    if let Ok(Ok(Confirmation::Ack(None))) = tokio::time::timeout(timeout, confirm).await {
                        confirmed.cancel();
                        refusals.forget(&name);
                        outlet.give_back(channel);
                    } else {
                        refusals.given_up(&name);
                    }
                });
                return Ok(BrokerAnswer::Overdue(late));
            }
        };
        match confirmation {
            Ok(confirmation) => Ok(self.answered(&outlet, channel, confirmation, start)),
            Err(source) => {
                self.refused(Error::Operation { what: what.into(), source: Box::new(source) }, message)
            }
        }
    }

    /// To a requester that listens on a channel of its own. The broker hands it over if there is one, and drops it if
    /// there is none, without a word. So it is asked at the same time: it may hang over an address that names a process
    /// of its own which is no channel.
    async fn attempt_direct(&self, message: &Message, name: &str, care: Care) -> Result<BrokerAnswer, Error> {
        // While there is no broker no address is at fault.
        self.outlet().await?;
        let outlet = self.direct(care.alone).await?;
        if self.0.refusals.has_refused(name) {
            return self.attempt_strange(outlet, message, name, false, care).await;
        }
        let asking = {
            let (outlet, name) = (outlet.clone(), name.to_owned());
            // By itself, as it may have to be left behind.
            tokio::spawn(async move { outlet.listens(&name).await })
        };
        let answer = self.attempt_strange(outlet.clone(), message, name, false, care).await?;
        if !matches!(answer, BrokerAnswer::Confirmed) {
            return Ok(answer);
        }
        let mut asking = asking;
        tokio::select! {
            biased;
            listens = &mut asking => match listens {
                Ok(Ok(true)) => Ok(BrokerAnswer::Confirmed),
                Ok(Ok(false)) => Ok(BrokerAnswer::Returned),
                Ok(Err(error)) => Err(error),
                // A panic in it was reported by the runtime.
                Err(_) => Err(Error::Lost(None)),
            },
            () = self.0.pace.late(
                &outlet.link, LEAST_DIRECT_PATIENCE, DIRECT_PATIENCE, || self.0.refusals.has_refused(name)
            ) => {
                outlet.hung.fetch_add(1, Ordering::Relaxed);
                let (name, refusals) = (name.to_owned(), self.0.refusals.clone());
                let late = Late::new(&outlet);
                let answered = late.confirmed.clone();
                tokio::spawn(async move {
                    // The requester is only slow: it has the result, and so has the results queue.
                    if let Ok(Ok(true)) = asking.await {
                        outlet.hung.fetch_sub(1, Ordering::Relaxed);
                        answered.cancel();
                        refusals.forget(&name);
                    }
                });
                Ok(BrokerAnswer::Overdue(late))
            }
        }
    }

    /// Ends when a confirm for this address is not to be waited for any longer.
    async fn overdue(&self, link: &Link, name: &str) {
        let (refusals, longest) = (&self.0.refusals, self.0.config.operation_timeout);
        // Another result for the same address has found out meanwhile. One that probes it is on its own.
        let known = refusals.has_refused(name);
        self.0.pace.late(link, LEAST_PATIENCE, longest, || !known && refusals.has_refused(name)).await;
    }

    /// What a confirm says, and what is to be done with its channel.
    fn answered(
        &self,
        outlet: &Outlet,
        channel: Channel,
        confirmation: Confirmation,
        start: Instant,
    ) -> BrokerAnswer {
        match confirmation {
            Confirmation::Ack(None) => {
                let took = start.elapsed();
                self.0.pace.confirmed(took);
                self.0.metrics.confirm(took);
                outlet.give_back(channel);
                BrokerAnswer::Confirmed
            }
            Confirmation::Ack(Some(_)) => {
                outlet.give_back(channel);
                BrokerAnswer::Returned
            }
            Confirmation::Nack(_) | Confirmation::NotRequested => BrokerAnswer::Nacked,
        }
    }

    /// The broker closed the channel over this message and over nothing else; or the connection is gone.
    fn refused(&self, error: Error, message: &Message) -> Result<BrokerAnswer, Error> {
        let Error::Operation { source, .. } = error else { return Err(error) };
        match faults::too_large(&source) {
            _ if !faults::is_refusal(&source) => {
                Err(Error::Operation { what: "have a result confirmed".into(), source })
            }
            None => Ok(BrokerAnswer::Refused(source)),
            Some(most) => {
                // Some versions count more than the body. Less each time, whatever it says.
                let body = message.body.len();
                let most = most.unwrap_or(body / 2).saturating_sub(ENVELOPE).min(body - body / 16);
                tracing::warn!(
                    id = message.job(),
                    bytes = body,
                    most,
                    "a message is larger than the broker takes"
                );
                self.0.largest.fetch_min(most, Ordering::Relaxed);
                Ok(BrokerAnswer::TooLarge(most))
            }
        }
    }
}
