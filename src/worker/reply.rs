//! The end of a delivery: its result, the broker's confirm, and only then the ack.

use std::time::{Duration, SystemTime};

use tokio_util::sync::CancellationToken;

use crate::amqp::{Address, Addresses, Delivery, Message, Publisher, Sent};
use crate::config;
use crate::job::{self, Context, Outcome, Reply, Status};
use crate::ops::metrics::{DeadReason, Metrics};
use crate::ops::traces::{self, Traces};
use crate::worker::blocking::blocking;
use crate::worker::disposition::{NotRun, Settlement};
use crate::worker::outgoing::Outgoing;
use crate::worker::recent_results::{CachedResult, MessageFingerprint, RecentResults};
use crate::worker::request::Request;

/// What it takes to publish results.
#[derive(Debug)]
pub(super) struct Replies {
    pub(super) worker: String,
    pub(super) amqp: config::Amqp,
    pub(super) addresses: Addresses,
    pub(super) publisher: Publisher,
    pub(super) outgoing: Outgoing,
    pub(super) recent_results: RecentResults,
    pub(super) metrics: Metrics,
    pub(super) traces: Traces,
    /// Cancelled when the drain timeout expires: what is not confirmed by then is redelivered.
    pub(super) kill: CancellationToken,
}

impl Replies {
    /// Publishes the result, waits for its confirm, and then settles the delivery.
    pub(super) async fn settle(
        &self,
        delivery: Delivery,
        request: Request,
        result: Result<Outcome, NotRun>,
    ) -> Settlement {
        let received = delivery.received;
        let settlement = match result {
            // It was not the requester who ended it: the drain timeout has expired.
            Ok(outcome) if outcome.status == Status::Cancelled && self.kill.is_cancelled() => {
                requeue(delivery).await
            }
            Ok(outcome) => self.answer(delivery, request, outcome).await,
            Err(NotRun::Answer(outcome)) => self.answer(delivery, request, *outcome).await,
            Err(NotRun::DeadLetter(reason, outcome)) => {
                self.dead_letter(delivery, request, reason, *outcome).await
            }
            Err(NotRun::Requeue) => requeue(delivery).await,
            Err(NotRun::ChannelClosed) => {
                let id = &request.context.id;
                tracing::debug!(id, queue = self.queue(&delivery), "channel closed; the job is redelivered");
                delivery.lost();
                Settlement::Redelivered
            }
        };
        self.metrics.total(received.elapsed());
        settlement
    }

    async fn answer(&self, delivery: Delivery, request: Request, outcome: Outcome) -> Settlement {
        let _publishing = (self.outgoing.enter(delivery.queue), self.metrics.publishing());
        match self.publish_outcome(&delivery, request, outcome).await {
            Some(()) => {
                delivery.ack().await;
                Settlement::Answered
            }
            None => requeue(delivery).await,
        }
    }

    /// Publishes a copy with the reason to the dead-letter queue, sends the requester a result, then acks. A nack, with
    /// which the broker would dead-letter it by itself, carries no reason.
    async fn dead_letter(
        &self,
        delivery: Delivery,
        request: Request,
        reason: DeadReason,
        outcome: Outcome,
    ) -> Settlement {
        let why = outcome.error.clone().unwrap_or_default();
        let trace_id = delivery.properties.trace_id();
        let queue = self.queue(&delivery);
        let id = &request.context.id;
        tracing::warn!(id, queue, reason = reason.as_str(), trace_id, "message dead-lettered");
        let mut copy = Message::dead(&delivery, &self.amqp.dead_queue, queue, &why, &self.worker);
        if let Some(bytes) = delivery.dropped {
            let most = format!("amqp.max_body_bytes is {}", self.amqp.max_body_bytes);
            copy = copy.stub(bytes, &most);
        }
        let _publishing = (self.outgoing.enter(delivery.queue), self.metrics.publishing());
        let mut stored = self.kill.run_until_cancelled(self.publisher.publish(&copy)).await;
        if let Some(Sent::TooLarge(most)) = stored {
            let stub = copy.stub(delivery.body.len(), &format!("the broker takes no more than {most}"));
            stored = self.kill.run_until_cancelled(self.publisher.publish(&stub)).await;
        }
        if stored.is_none() || self.publish_outcome(&delivery, request, outcome).await.is_none() {
            return requeue(delivery).await;
        }
        self.metrics.dead_lettered(reason);
        delivery.ack_dead_lettered().await;
        Settlement::Answered
    }

    /// Publishes a result once more. The requester may have it already, and knows it by its message id.
    pub(super) async fn republish_result(
        &self,
        delivery: Delivery,
        to: Address,
        earlier: &CachedResult,
    ) -> Settlement {
        let CachedResult { message_id, body } = earlier;
        let (id, queue) = (&delivery.id, self.queue(&delivery));
        tracing::info!(id, queue, message_id, "job was answered before; republishing its result");
        let _publishing = (self.outgoing.enter(delivery.queue), self.metrics.publishing());
        let message = Message::result(to, &delivery.properties, message_id, body.clone());
        match self.publish_result(message.of_job(delivery.id.clone())).await {
            Some(()) => {
                delivery.ack().await;
                Settlement::Answered
            }
            None => requeue(delivery).await,
        }
    }

    /// Publishes what became of a job. None if the drain timeout expired before the broker confirmed it.
    async fn publish_outcome(
        &self,
        delivery: &Delivery,
        Request { context, reply_to, fingerprint }: Request,
        outcome: Outcome,
    ) -> Option<()> {
        self.report(delivery, &context, &outcome);
        let _until_kept = self.traces.job(&traces::EndedJob {
            queue: self.queue(delivery),
            id: &context.id,
            correlation_id: delivery.properties.correlation_id.as_deref(),
            traceparent: delivery.properties.traceparent.as_deref(),
            tracestate: delivery.properties.tracestate.as_deref(),
            body_bytes: delivery.dropped.unwrap_or(delivery.body.len()),
            attempt: context.attempt,
            received: SystemTime::now() - delivery.received.elapsed(),
            outcome: &outcome,
        });
        let asked = &delivery.properties;
        let asked = [&asked.correlation_id, &asked.reply_to, &asked.user_id].map(Option::as_deref);
        let message_id = job::message_id(&context.id, asked).to_string();
        let ran = outcome.started_at.is_some() && outcome.status != Status::WorkerError;
        let most = self.amqp.max_result_bytes;
        let largest = self.publisher.largest(most);
        let body = blocking(outcome.bytes(), || Reply::new(context, outcome).encode_for(most, largest));
        let kept = fingerprint.filter(|_| ran && body.len() <= CachedResult::LARGEST).map(|fingerprint| {
            (fingerprint, CachedResult { message_id: message_id.clone(), body: body.clone() })
        });
        let to = reply_to.unwrap_or_else(|_| self.addresses.results());
        let message = Message::result(to, &delivery.properties, &message_id, body);
        self.publish_result(message.of_job(delivery.id.clone())).await?;
        self.keep(kept);
        Some(())
    }

    fn keep(&self, result: Option<(MessageFingerprint, CachedResult)>) {
        if let Some((fingerprint, result)) = result {
            self.recent_results.keep(fingerprint, result);
        }
    }

    /// The one event of a job, and its counts.
    fn report(&self, delivery: &Delivery, context: &Context, outcome: &Outcome) {
        self.metrics.completed(outcome);
        tracing::info!(
            id = context.id,
            queue = self.queue(delivery),
            status = outcome.status.as_str(),
            exit_code = outcome.exit_code,
            signal = outcome.signal,
            syscall = outcome.syscall,
            attempt = context.attempt,
            trace_id = delivery.properties.trace_id(),
            queued_ms = context.queued.map(millis),
            start_ms = outcome.start.map(millis),
            run_ms = outcome.run.map(millis),
            "job ended"
        );
    }

    /// Publishes until the broker has confirmed the message, or as much of it as the broker takes. None if the drain
    /// timeout expired first.
    async fn publish_result(&self, mut message: Message) -> Option<()> {
        loop {
            let sent = self.kill.run_until_cancelled(self.publisher.publish(&message)).await?;
            let Sent::TooLarge(most) = sent else { return Some(()) };
            let Some(smaller) = blocking(message.body().len(), || Reply::shrink(message.body(), most)) else {
                tracing::error!(
                    id = message.job(),
                    most,
                    "the broker takes no result, however small; this one is lost"
                );
                return Some(());
            };
            message = message.with_body(smaller);
        }
    }

    /// The queue that a delivery came from.
    pub(super) fn queue(&self, delivery: &Delivery) -> &str {
        &self.amqp.queues[delivery.queue].name
    }
}

async fn requeue(delivery: Delivery) -> Settlement {
    delivery.requeue().await;
    Settlement::Redelivered
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
