//! What happens to a delivery whose message was delivered before, until it is clear that its job has to run.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::amqp::{Delivery, Message, PublishOnce, Publisher};
use crate::worker::disposition::Settlement;
use crate::worker::recent_results::{CachedResult, MessageFingerprint, RecentResults};
use crate::worker::reply::Replies;
use crate::worker::request::Request;

/// Before a delivery is requeued whose count could not be stored, so that it does not spin.
const COUNT_RETRY_DELAY: Duration = Duration::from_millis(250);

/// Deduplication, and the count of deliveries where the queue keeps none.
#[derive(Debug)]
pub(super) struct Redelivery {
    pub(super) recent_results: RecentResults,
    pub(super) publisher: Publisher,
    pub(super) delivery_limit: u32,
    /// Cancelled when the worker drains.
    pub(super) draining: CancellationToken,
    /// Cancelled when the drain timeout expires.
    pub(super) kill: CancellationToken,
}

impl Redelivery {
    /// Answers a job whose result is known, and has a delivery counted whose queue does not count. Breaks if that has
    /// settled the delivery.
    pub(super) async fn answer_or_count(
        &self,
        delivery: Delivery,
        request: &Request,
        replies: &Replies,
    ) -> ControlFlow<Settlement, Delivery> {
        let earlier = self.earlier_result(&delivery, request.fingerprint).await;
        if delivery.is_gone() {
            delivery.lost();
            return ControlFlow::Break(Settlement::Redelivered);
        }
        if let (Ok(to), Some(earlier)) = (&request.reply_to, earlier) {
            return ControlFlow::Break(replies.republish_result(delivery, to.clone(), &earlier).await);
        }
        if delivery.uncounted && delivery.dropped.is_none() && !self.limit_reached(&delivery) {
            self.republish_with_count(delivery, replies).await;
            return ControlFlow::Break(Settlement::Redelivered);
        }
        ControlFlow::Continue(delivery)
    }

    /// After the last delivery that the broker grants it would drop the job silently. So the job is not run once more:
    /// whatever ended every worker that had it would do so again. If the broker tells the two apart, deliveries that
    /// were only requeued, as by workers that drain, do not count.
    pub(super) fn limit_reached(&self, delivery: &Delivery) -> bool {
        delivery.failures >= self.delivery_limit
    }

    /// The result that this very message got from this worker before; then only its ack was lost. If it still runs
    /// here, because its channel was closed meanwhile, waits for that result.
    async fn earlier_result(
        &self,
        delivery: &Delivery,
        fingerprint: Option<MessageFingerprint>,
    ) -> Option<Arc<CachedResult>> {
        let fingerprint = fingerprint.filter(|_| delivery.redelivered)?;
        tokio::select! {
            biased;
            () = self.draining.cancelled() => None,
            () = delivery.gone() => None,
            () = self.recent_results.wait_until_settled(fingerprint) => self.recent_results.find(fingerprint),
        }
    }

    /// A classic queue says that a message was delivered before, and not how often: a job that kills every worker would
    /// do so for ever. So before it is run again its queue gets a copy with a count instead, which outlives whoever runs
    /// that. Between the two steps there are both: no fault loses the job, and one may double it.
    async fn republish_with_count(&self, delivery: Delivery, replies: &Replies) {
        let queue = replies.queue(&delivery);
        let connected = tokio::select! {
            biased;
            () = self.draining.cancelled() => false,
            // It is redelivered; a copy would be one job too many.
            () = delivery.gone() => return delivery.lost(),
            connected = self.publisher.up() => connected,
        };
        if !connected {
            return delivery.requeue().await;
        }
        let copy = Message::counted(&delivery, queue);
        let published = self.kill.run_until_cancelled(self.publisher.publish_once(&copy)).await;
        if published == Some(PublishOnce::Confirmed) {
            return delivery.ack_counted().await;
        }
        tracing::warn!(
            id = delivery.id,
            queue,
            "could not republish a job with its delivery count; requeueing"
        );
        self.draining.run_until_cancelled(tokio::time::sleep(COUNT_RETRY_DELAY)).await;
        delivery.requeue().await;
    }
}
