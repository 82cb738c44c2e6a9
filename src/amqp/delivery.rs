//! A delivery in plain types, and the one chance to settle it.
//!
//! It is settled on the channel that it came by. Where that is gone nothing is sent: the broker delivers the
//! message again by itself, and the settlement counts as lost.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use lapin::BasicProperties;
use lapin::options::{BasicAckOptions, BasicNackOptions};
use lapin::types::AMQPValue;
use tokio::time::Instant;

use crate::amqp::chain;
use crate::amqp::connection::link::Link;
use crate::amqp::connection::signer::Signer;
use crate::amqp::frames::sanitize::SUBSTITUTE;
use crate::amqp::headers::{DELIVERIES, SIGNATURE, USER, number, text as header};
use crate::config::{self, QueueType};
use crate::ops::metrics::{Metrics, Settled};

/// A message from a queue of jobs.
#[derive(Debug)]
#[must_use = "an unsettled delivery blocks a place in the prefetch"]
pub struct Delivery {
    /// Which of `amqp.queues` it came from.
    pub queue: usize,
    /// The job, as it came.
    pub body: Vec<u8>,
    /// How many bytes it had, if they were too many and none of them came.
    pub dropped: Option<usize>,
    /// What its publisher wrote on the envelope.
    pub properties: Properties,
    /// Which delivery of this message it is, counted from 1, as far as the broker tells.
    pub attempt: u32,
    /// How many deliveries before it count towards the delivery limit. Fewer than all where the broker tells what
    /// was lost from what was given back, as RabbitMQ 4.3 does.
    pub failures: u32,
    /// It was delivered before, here or elsewhere.
    pub redelivered: bool,
    /// It was, and its queue does not count how often. Whoever has it must, before the job runs.
    pub uncounted: bool,
    /// The job's id once it is known, for the log.
    pub id: Option<String>,
    /// When it came in.
    pub received: Instant,
    settler: Settler,
}

/// The properties that the contract reads.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Properties {
    /// Where the result is wanted.
    pub reply_to: Option<String>,
    /// Echoed in the result.
    pub correlation_id: Option<String>,
    /// How the body is compressed, where it is.
    pub content_encoding: Option<String>,
    /// Who published it, by the broker's word: it refuses a message that names another user than its publisher.
    pub user_id: Option<String>,
    /// The job's id where its body names none.
    pub message_id: Option<String>,
    /// How long the message is worth anything.
    pub expiration: Option<Duration>,
    /// When it was published: in milliseconds by the header `timestamp_in_ms`, else in whole seconds, as the
    /// protocol has it.
    pub timestamp: Option<SystemTime>,
    /// W3C trace context, passed on.
    pub traceparent: Option<String>,
    /// W3C trace context, passed on.
    pub tracestate: Option<String>,
    /// Everything, for a copy in the dead queue.
    pub(super) raw: BasicProperties,
}

impl Properties {
    pub(super) fn new(raw: BasicProperties) -> Self {
        let text = |property: &Option<lapin::types::ShortString>| property.as_ref().map(ToString::to_string);
        Self {
            reply_to: text(raw.reply_to()),
            correlation_id: text(raw.correlation_id()),
            content_encoding: text(raw.content_encoding()),
            user_id: text(raw.user_id()),
            message_id: text(raw.message_id()),
            expiration: text(raw.expiration()).and_then(|ms| ms.parse().ok()).map(Duration::from_millis),
            timestamp: published(&raw),
            traceparent: header(&raw, "traceparent"),
            tracestate: header(&raw, "tracestate"),
            raw,
        }
    }

    /// Refuses what cannot be echoed as it was.
    ///
    /// # Errors
    /// The field, what is wrong with it, and the remedy, for the publisher.
    pub fn echoable(&self) -> Result<(), &'static str> {
        match &self.correlation_id {
            Some(id) if id.contains(SUBSTITUTE) => {
                Err("correlation_id is not UTF-8, or contains the character \
                U+001A; write binary ones in hexadecimal or base64")
            }
            _ => Ok(()),
        }
    }

    /// The trace that the job belongs to, where its context is one: 32 hexadecimal digits, fit for a log.
    pub fn trace_id(&self) -> Option<&str> {
        let mut parts = self.traceparent.as_deref()?.split('-');
        let hex = |part: Option<&'_ str>, length: usize| {
            part.is_some_and(|part| {
                part.len() == length
                    && part.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
            })
        };
        let (version, trace, parent, flags) = (parts.next(), parts.next(), parts.next(), parts.next());
        let valid = hex(version, 2) && hex(trace, 32) && hex(parent, 16) && hex(flags, 2);
        // Later versions may have more parts; all zeros means none.
        trace.filter(|trace| valid && version != Some("ff") && trace.bytes().any(|digit| digit != b'0'))
    }

    /// How long the message waited before `now`, where its publisher wrote when it was sent.
    pub fn queued(&self, now: SystemTime) -> Option<Duration> {
        self.timestamp.map(|sent| now.duration_since(sent).unwrap_or_default())
    }

    /// Whether the message was worth nothing any more at `now`.
    pub fn expired(&self, now: SystemTime) -> bool {
        // A timestamp is cut to whole seconds: the message may be up to one second younger than it says.
        const CUT: Duration = Duration::from_secs(1);
        match (self.queued(now), self.expiration) {
            (Some(queued), Some(expiration)) => queued > expiration.saturating_add(CUT),
            _ => false,
        }
    }
}

fn published(raw: &BasicProperties) -> Option<SystemTime> {
    let exact = raw.headers().as_ref().and_then(|headers| match headers.inner().get("timestamp_in_ms") {
        Some(AMQPValue::LongLongInt(millis)) => u64::try_from(*millis).ok().map(Duration::from_millis),
        _ => None,
    });
    let since = exact.or_else(|| raw.timestamp().map(Duration::from_secs))?;
    SystemTime::UNIX_EPOCH.checked_add(since)
}

/// How often a message was delivered before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counted {
    /// In all.
    deliveries: u32,
    /// Of those, how many count towards the delivery limit.
    failures: u32,
}

/// How often a queue of this kind has counted the message that it delivers again. Anybody may write such a header;
/// a quorum queue puts its own in that place. Before RabbitMQ 4.3 it counts all deliveries in `x-delivery-count`.
/// Since then there it counts those that were lost with their channel, and leaves the header out where there was none;
/// all of them, those that were given back too, are in `x-acquired-count`.
fn counted(raw: &BasicProperties, kind: QueueType) -> Option<Counted> {
    if kind == QueueType::Classic {
        return None;
    }
    let (failures, acquired) = (number(raw, "x-delivery-count"), number(raw, "x-acquired-count"));
    let deliveries = failures.max(acquired)?;
    Some(Counted { deliveries, failures: failures.unwrap_or(0) })
}

/// How often a message was delivered before this copy of it, and who published it, by a worker's word. Anybody may
/// write such headers; without the signature they are nobody's.
fn noted(raw: &BasicProperties, body: &[u8], link: &Link) -> Option<(u32, String)> {
    let (deliveries, signature) = (number(raw, DELIVERIES)?, header(raw, SIGNATURE)?);
    let user = header(raw, USER).unwrap_or_default();
    let words = [&*deliveries.to_string(), &*user];
    link.signer().verify(words, raw, body, &signature).then_some((deliveries, user))
}

/// Settles one delivery, once.
#[derive(Debug)]
struct Settler {
    acker: lapin::Acker,
    link: Arc<Link>,
    metrics: Metrics,
}

impl Delivery {
    /// From `queue`, the `at`th of the configured ones; without its body, if so many bytes of it were dropped.
    pub(super) fn new(
        at: usize,
        queue: &config::Queue,
        delivery: lapin::message::Delivery,
        dropped: Option<usize>,
        link: Arc<Link>,
        metrics: Metrics,
    ) -> Self {
        let noted = noted(&delivery.properties, &delivery.data, &link);
        let (noted, user) = noted.map_or((0, None), |(noted, user)| (noted, Some(user)));
        let counted = counted(&delivery.properties, queue.kind).filter(|_| delivery.redelivered);
        let once = u32::from(delivery.redelivered);
        let before = counted.unwrap_or(Counted { deliveries: once, failures: once });
        Self {
            queue: at,
            body: delivery.data,
            dropped,
            properties: match user {
                // A copy is a worker's, and its job is not.
                Some(user) => {
                    let user_id = Some(user).filter(|user| !user.is_empty());
                    Properties { user_id, ..Properties::new(delivery.properties) }
                }
                None => Properties::new(delivery.properties),
            },
            attempt: noted.saturating_add(before.deliveries).saturating_add(1),
            failures: noted.saturating_add(before.failures),
            redelivered: delivery.redelivered || noted > 0,
            uncounted: delivery.redelivered && counted.is_none(),
            id: None,
            received: Instant::now(),
            settler: Settler { acker: delivery.acker, link, metrics },
        }
    }

    /// Signs what is written on a copy of it.
    pub(super) fn signer(&self) -> &Signer {
        self.settler.link.signer()
    }

    /// Its channel is gone: the broker has given the message to somebody else, or will.
    pub fn is_gone(&self) -> bool {
        self.settler.link.is_lost() || !self.settler.acker.usable()
    }

    /// Waits until the connection that it came by is gone.
    pub async fn gone(&self) {
        self.settler.link.lost().await;
    }

    /// Nothing is said of it any more: the broker has given the message to somebody else, or will.
    pub fn lost(self) {
        self.settler.metrics.settled(Settled::Lost);
    }

    /// The message is done with.
    pub async fn ack(self) {
        let acking = self.settler.acker.ack(BasicAckOptions::default());
        self.settler.settle(self.id.as_deref(), "ack", Settled::Acked, acking).await;
    }

    /// The message is stored in the dead queue, so that it is done with here.
    pub async fn ack_dead_lettered(self) {
        let acking = self.settler.acker.ack(BasicAckOptions::default());
        self.settler.settle(self.id.as_deref(), "ack", Settled::DeadLettered, acking).await;
    }

    /// A copy with a higher count is stored in its queue, in place of this message.
    pub async fn ack_counted(self) {
        let acking = self.settler.acker.ack(BasicAckOptions::default());
        self.settler.settle(self.id.as_deref(), "ack", Settled::Counted, acking).await;
    }

    /// The message shall come again, here or elsewhere.
    pub async fn requeue(self) {
        let options = BasicNackOptions { requeue: true, ..BasicNackOptions::default() };
        let requeuing = self.settler.acker.nack(options);
        self.settler.settle(self.id.as_deref(), "requeue", Settled::Requeued, requeuing).await;
    }
}

impl Settler {
    async fn settle(
        &self,
        id: Option<&str>,
        what: &str,
        action: Settled,
        settling: impl Future<Output = lapin::Result<bool>>,
    ) {
        let action = match self.link.ask(what, settling).await {
            Ok(true) => action,
            Ok(false) => Settled::Lost,
            Err(error) => {
                tracing::debug!(
                    id,
                    error = chain(&error),
                    "a delivery could not be settled; it will come again"
                );
                Settled::Lost
            }
        };
        self.metrics.settled(action);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;
    use lapin::types::{FieldTable, ShortString};

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn a_message_expires_by_its_timestamp_and_expiration() {
        let raw = BasicProperties::default().with_timestamp(100).with_expiration("5000".into());
        let properties = Properties::new(raw);
        assert_eq!(properties.queued(at(103)), Some(Duration::from_secs(3)));
        assert!(!properties.expired(at(105)));
        assert!(!properties.expired(at(106)));
        assert!(properties.expired(at(107)));
        // A publisher whose clock is ahead: it waited for nothing, and is not expired.
        assert_eq!(properties.queued(at(90)), Some(Duration::ZERO));
        assert!(!properties.expired(at(90)));
    }

    #[test]
    fn without_a_timestamp_nothing_is_known_of_the_wait() {
        let properties = Properties::new(BasicProperties::default().with_expiration("1".into()));
        assert_eq!(properties.queued(at(9)), None);
        assert!(!properties.expired(at(9)));
    }

    #[test]
    fn what_is_no_number_of_milliseconds_is_no_expiration() {
        let raw = BasicProperties::default().with_timestamp(u64::MAX).with_expiration("soon".into());
        let properties = Properties::new(raw);
        assert_eq!((properties.expiration, properties.timestamp), (None, None));
    }

    #[test]
    fn only_a_trace_context_has_a_trace_id() {
        let trace = "0af7651916cd43dd8448eb211c80319c";
        let id = |traceparent: String| {
            let properties = Properties { traceparent: Some(traceparent), ..Properties::default() };
            properties.trace_id().map(str::to_owned)
        };
        for good in ["00-{}-b7ad6b7169203331-01", "cc-{}-b7ad6b7169203331-01-what-comes-later"] {
            assert_eq!(id(good.replace("{}", trace)).as_deref(), Some(trace));
        }
        for bad in [
            "",
            "00-{}",
            "00-{}-b7ad6b7169203331",
            "ff-{}-b7ad6b7169203331-01",
            "00-{}0-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c8\n319c-b7ad6b7169203331-01",
        ] {
            assert_eq!(id(bad.replace("{}", trace)), None, "{bad:?}");
        }
    }

    #[test]
    fn what_was_given_back_counts_as_delivered_and_not_as_failed() {
        let counted = |headers: &[(&'static str, i64)]| {
            let mut table = FieldTable::default();
            for (name, value) in headers {
                table.insert((*name).into(), AMQPValue::LongLongInt(*value));
            }
            counted(&BasicProperties::default().with_headers(table), QueueType::Quorum)
        };
        // As RabbitMQ 4.3 writes them: after two requeues; after two requeues and a lost channel.
        let given_back = counted(&[("x-acquired-count", 2)]);
        assert_eq!(given_back, Some(Counted { deliveries: 2, failures: 0 }));
        let lost = counted(&[("x-acquired-count", 3), ("x-delivery-count", 1)]);
        assert_eq!(lost, Some(Counted { deliveries: 3, failures: 1 }));
        // As it does before: whatever it was.
        let either = counted(&[("x-delivery-count", 3)]);
        assert_eq!(either, Some(Counted { deliveries: 3, failures: 3 }));
        assert_eq!(counted(&[]), None);
    }

    #[test]
    fn headers_are_read_whatever_their_type() {
        let mut headers = FieldTable::default();
        headers.insert("traceparent".into(), AMQPValue::LongString("00-ab".into()));
        headers.insert("tracestate".into(), AMQPValue::ShortString(ShortString::from("a=b")));
        headers.insert("x-delivery-count".into(), AMQPValue::LongLongInt(7));
        headers.insert("x-acquired-count".into(), AMQPValue::LongUInt(9));
        let raw = BasicProperties::default().with_headers(headers);
        let (quorum, classic) = (counted(&raw, QueueType::Quorum), counted(&raw, QueueType::Classic));
        assert_eq!((quorum, classic), (Some(Counted { deliveries: 9, failures: 7 }), None));
        let properties = Properties::new(raw);
        assert_eq!(properties.traceparent.as_deref(), Some("00-ab"));
        assert_eq!(properties.tracestate.as_deref(), Some("a=b"));
    }
}
