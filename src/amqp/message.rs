//! What is published: a result for whoever asked, or a copy for the dead queue.

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};

use crate::amqp::headers::{
    BODY_BYTES, BROKERS, DELIVERIES, HEADER_MAX, SIGNATURE, USER, copied_headers, without,
};
use crate::amqp::{Address, Delivery, Properties, short};

/// A message that survives a restart of the broker.
const PERSISTENT: u8 = 2;

/// One that need not.
const TRANSIENT: u8 = 1;

/// What a requester writes before the broker makes an address of it.
const BARE_DIRECT: &str = "amq.rabbitmq.reply-to";

/// What is to be published, and where.
#[derive(Clone, Debug)]
pub struct Message {
    pub(super) to: Address,
    pub(super) body: Vec<u8>,
    pub(super) properties: BasicProperties,
    /// The id of the job that it is about, for the log.
    pub(super) job: Option<String>,
}

impl Message {
    /// Names the job that the message is about in what is logged of it.
    pub fn of_job(self, id: Option<String>) -> Self {
        Self { job: id, ..self }
    }

    /// The id of that job.
    pub fn job(&self) -> Option<&str> {
        self.job.as_deref()
    }

    /// The result of a job, as an answer to the message that `asked` for it. `message_id` is the same for
    /// every duplicate.
    pub fn result(to: Address, asked: &Properties, message_id: &str, body: Vec<u8>) -> Self {
        Self::answer("result", PERSISTENT, to, asked, message_id, body)
    }

    /// Output of a job that still runs. All of it stands in the result as well: no disk has to keep it.
    pub fn output(to: Address, asked: &Properties, message_id: &str, body: Vec<u8>) -> Self {
        Self::answer("output", TRANSIENT, to, asked, message_id, body)
    }

    /// What a worker says of itself when it is asked.
    pub fn pong(to: Address, asked: &Properties, message_id: &str, body: Vec<u8>) -> Self {
        Self::answer("pong", TRANSIENT, to, asked, message_id, body)
    }

    fn answer(
        kind: &str,
        delivery_mode: u8,
        to: Address,
        asked: &Properties,
        message_id: &str,
        body: Vec<u8>,
    ) -> Self {
        let mut headers = FieldTable::default();
        for (name, value) in [("traceparent", &asked.traceparent), ("tracestate", &asked.tracestate)] {
            if let Some(value) = value.as_ref().filter(|value| value.len() <= HEADER_MAX) {
                headers.insert(name.into(), AMQPValue::LongString(value.as_str().into()));
            }
        }
        let mut properties = BasicProperties::default()
            .with_content_type("application/json".into())
            .with_type(kind.into())
            .with_delivery_mode(delivery_mode)
            .with_timestamp(now())
            .with_headers(headers);
        if let Ok(message_id) = short(message_id) {
            properties = properties.with_message_id(message_id);
        }
        if let Some(correlation_id) = asked.raw.correlation_id().clone() {
            properties = properties.with_correlation_id(correlation_id);
        }
        Self { to, body, properties, job: None }
    }

    /// The same without anything that a stranger wrote, for a broker that refuses it as it is.
    pub(super) fn bare(&self) -> Self {
        let mut properties = BasicProperties::default().with_delivery_mode(PERSISTENT);
        if let Some(message_id) = self.properties.message_id().clone() {
            properties = properties.with_message_id(message_id);
        }
        if let Some(kind) = self.properties.kind().clone() {
            properties = properties.with_type(kind);
        }
        Self { properties, ..self.clone() }
    }

    /// The same with another body.
    pub fn with_body(self, body: Vec<u8>) -> Self {
        Self { body, ..self }
    }

    /// The same for a body that is not kept: what stands in its place says how long it was, and `why` it is not there.
    pub fn stub(self, bytes: usize, why: &str) -> Self {
        let mut headers = self.properties.headers().clone().unwrap_or_default();
        headers.insert(BODY_BYTES.into(), AMQPValue::LongLongInt(i64::try_from(bytes).unwrap_or(i64::MAX)));
        let body = serde_json::json!({ "dropped": format!("a body of {bytes} bytes was not kept: {why}") });
        Self {
            body: body.to_string().into_bytes(),
            properties: self.properties.with_headers(headers),
            ..self
        }
    }

    /// The body.
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    /// A copy of `delivery` for the queue that it came from, on which its deliveries are counted.
    pub fn counted(delivery: &Delivery, queue: &str) -> Self {
        let raw = &delivery.properties.raw;
        let mut headers = copied_headers(raw);
        let deliveries = delivery.attempt.saturating_sub(1);
        headers.insert(DELIVERIES.into(), AMQPValue::LongLongInt(deliveries.into()));
        let user = delivery.properties.user_id.as_deref().unwrap_or_default();
        headers.insert(USER.into(), AMQPValue::LongString(user.into()));
        let mut properties = copied_properties(raw).with_delivery_mode(PERSISTENT);
        let words = [&*deliveries.to_string(), user];
        let signature = delivery.signer().sign(words, &properties, &delivery.body);
        headers.insert(SIGNATURE.into(), AMQPValue::LongString(signature.into()));
        properties = properties.with_headers(headers);
        if let Some(expiration) = raw.expiration().clone() {
            properties = properties.with_expiration(expiration);
        }
        Self {
            to: Address::Queue(queue.to_owned()),
            body: delivery.body.clone(),
            properties,
            job: delivery.id.clone(),
        }
    }

    /// A copy of `delivery` for the dead queue, with what came with it, and where it was and the reason, as headers.
    pub fn dead(delivery: &Delivery, dead_queue: &str, queue: &str, reason: &str, worker: &str) -> Self {
        let raw = &delivery.properties.raw;
        let mut headers = without(&copied_headers(raw), &BROKERS);
        headers.insert("x-sandpiper-queue".into(), AMQPValue::LongString(queue.into()));
        let reason = &reason[..reason.floor_char_boundary(HEADER_MAX)];
        headers.insert("x-sandpiper-reason".into(), AMQPValue::LongString(reason.into()));
        headers.insert("x-sandpiper-attempt".into(), AMQPValue::LongLongInt(delivery.attempt.into()));
        headers.insert("x-sandpiper-worker".into(), AMQPValue::LongString(worker.into()));
        let at = format!("{:.3}", jiff::Timestamp::now());
        headers.insert("x-sandpiper-at".into(), AMQPValue::LongString(at.into()));
        let properties = copied_properties(raw).with_headers(headers).with_delivery_mode(PERSISTENT);
        Self {
            to: Address::Queue(dead_queue.to_owned()),
            body: delivery.body.clone(),
            properties,
            job: delivery.id.clone(),
        }
    }
}

/// A dead message as it was when it was a job: without what was written on it since.
pub(super) fn revived(raw: &BasicProperties) -> BasicProperties {
    let headers = without(&copied_headers(raw), &BROKERS);
    copied_properties(raw).with_headers(headers).with_delivery_mode(PERSISTENT)
}

/// The properties that say what the message was. Not its expiration: what is dead must not vanish before
/// somebody has looked at it. Not its user id: the broker holds that against who publishes, and that is us.
fn copied_properties(raw: &BasicProperties) -> BasicProperties {
    let mut copied = BasicProperties::default();
    macro_rules! copy {
        ($($get:ident => $with:ident),+ $(,)?) => {
            $(if let Some(value) = raw.$get().clone() { copied = copied.$with(value); })+
        };
    }
    copy! {
        content_type => with_content_type,
        content_encoding => with_content_encoding,
        priority => with_priority,
        correlation_id => with_correlation_id,
        reply_to => with_reply_to,
        message_id => with_message_id,
        timestamp => with_timestamp,
        kind => with_type,
        app_id => with_app_id,
    }
    if copied.reply_to().as_ref().is_some_and(|name| name.as_str() == BARE_DIRECT) {
        // The broker would refuse it from whoever does not listen there.
        copied = copied.with_reply_to("".into());
    }
    copied
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;
    use crate::amqp::headers::HEADERS_MAX;

    #[test]
    fn a_copy_for_the_dead_queue_leaves_out_what_would_steer_the_broker() {
        let mut headers = FieldTable::default();
        for name in ["CC", "BCC", "x-sandpiper-reason", "tenant"] {
            headers.insert(name.into(), AMQPValue::LongString("value".into()));
        }
        let raw = BasicProperties::default()
            .with_headers(headers)
            .with_correlation_id("c".into())
            .with_expiration("1".into())
            .with_user_id("guest".into());
        assert_eq!(
            copied_headers(&raw).inner().keys().map(|key| key.as_str()).collect::<Vec<_>>(),
            ["tenant"]
        );
        assert_eq!(copied_properties(&raw), BasicProperties::default().with_correlation_id("c".into()));
    }

    #[test]
    fn headers_that_would_not_fit_a_frame_are_left_out() {
        let mut headers = FieldTable::default();
        headers.insert("a".into(), AMQPValue::LongString("small".into()));
        headers.insert("b".into(), AMQPValue::LongString("x".repeat(HEADERS_MAX).as_str().into()));
        let copied = copied_headers(&BasicProperties::default().with_headers(headers));
        assert_eq!(copied.inner().len(), 1);
    }
}
