//! A connection that messages are published by, with its channels.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use lapin::Channel;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::FieldTable;

use crate::amqp::connection::link::Link;
use crate::amqp::headers::fitting;
use crate::amqp::{Error, Message, faults, short};

/// Channels of a direct connection on which the broker hangs, before another one is dialled.
const HUNG: usize = 64;

/// A connection with its idle channels.
#[derive(Debug)]
pub(super) struct Outlet {
    pub(super) link: Arc<Link>,
    idle: Mutex<Vec<Channel>>,
    /// Channels on which the broker hangs.
    pub(super) hung: AtomicUsize,
}

impl Outlet {
    pub(super) fn new(link: Arc<Link>) -> Self {
        Self { link, idle: Mutex::default(), hung: AtomicUsize::default() }
    }

    /// It is there, and the broker hangs on few of its channels.
    pub(super) fn is_usable(&self) -> bool {
        !self.link.is_lost() && self.hung.load(Ordering::Relaxed) < HUNG
    }

    /// A channel in confirm mode with nothing under way; a `fresh` one was not used before.
    pub(super) async fn channel(&self, fresh: bool) -> Result<Channel, Error> {
        let idle = || self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let idle = if fresh { None } else { idle() };
        if let Some(channel) = idle.filter(|channel| channel.status().connected()) {
            return Ok(channel);
        }
        let channel = self.link.channel().await?;
        let selecting = channel.confirm_select(ConfirmSelectOptions::default());
        self.link.ask("turn confirms on", selecting).await?;
        Ok(channel)
    }

    pub(super) fn give_back(&self, channel: Channel) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(channel);
    }

    /// Whether the broker declares a queue at once. One that has lost the majority of its cluster goes on answering what
    /// it need not agree on with others, since RabbitMQ 4.3, which does not pause it.
    pub(super) async fn declares(&self) -> Result<bool, Error> {
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
    pub(super) async fn listens(&self, address: &str) -> Result<bool, Error> {
        let channel = self.channel(false).await?;
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let declaring = channel.queue_declare(short(address)?, options, FieldTable::default());
        // The connection is not to blame for an answer that never comes.
        match self.link.ask_for_now("look for a requester", declaring).await {
            Ok(Some(_)) => {
                self.give_back(channel);
                Ok(true)
            }
            Ok(None) => Ok(false),
            // A refusal costs the channel and nothing else.
            Err(Error::Operation { source, .. }) if faults::is_not_found(&source) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Hands a message over; what comes back is its confirm.
    pub(super) async fn publish(
        &self,
        channel: &Channel,
        message: &Message,
        name: &str,
        mandatory: bool,
    ) -> lapin::Result<lapin::PublisherConfirm> {
        let options = BasicPublishOptions { mandatory, ..BasicPublishOptions::default() };
        let properties = fitting(&message.properties, self.link.headers_room());
        let name = short(name).unwrap_or_default();
        channel.basic_publish("".into(), name, options, &message.body, properties).await
    }
}
