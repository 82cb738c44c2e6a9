//! The way of one job, from its delivery to its settlement.
//!
//! Every delivery is settled exactly once, and only after whatever is to be known of it is safe with the
//! broker. A user's failure is a result. Our own failure is tried again elsewhere before it is one.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio_util::sync::CancellationToken;

use crate::amqp::{Address, AddressError, Addresses, Delivery, Message, Properties, Publisher, Sent, Told};
use crate::config;
use crate::job::{self, Admission, Context, Job, Outcome, Refusal, RefusalKind, Reply, Status};
use crate::ops::metrics::{DeadReason, Metrics};
use crate::ops::traces::{self, Traces};
use crate::retry::Delays;
use crate::sandbox::Sandbox;
use crate::script::Payload;
use crate::worker::answered::{Answer, Answered, Key};
use crate::worker::coding;
use crate::worker::disposition::{NotRun, not_run};
use crate::worker::live::Live;
use crate::worker::outgoing::Outgoing;
use crate::worker::running::Running;
use crate::worker::slots::Slots;

/// Deliveries in which our own failure to start a job is given back instead of answered: another worker may
/// be better off. Few, because where every worker fails each costs a start.
const STARTS: u32 = 3;

/// About how long such a job is held back before it goes on, doubled each time, so that a worker that cannot
/// start anything does not spin.
const BREATHER: Duration = Duration::from_millis(250);

/// What all jobs of a worker go through.
#[derive(Debug)]
pub(super) struct Pipeline {
    pub(super) worker: String,
    pub(super) admission: Admission,
    pub(super) addresses: Addresses,
    pub(super) amqp: config::Amqp,
    pub(super) start_timeout: Duration,
    pub(super) slots: Slots,
    pub(super) running: Running,
    pub(super) outgoing: Outgoing,
    pub(super) sandbox: Sandbox,
    pub(super) publisher: Publisher,
    pub(super) answered: Answered,
    pub(super) metrics: Metrics,
    pub(super) traces: Traces,
    /// Ends what still runs when the time for draining is over.
    pub(super) kill: CancellationToken,
}

impl Pipeline {
    /// All of it. True where the requester got an answer; else the job comes again.
    pub(super) async fn process(self: Arc<Self>, mut delivery: Delivery) -> bool {
        let _held = self.metrics.holding();
        let (to, mut context) = (self.address(&delivery), self.context(&delivery));
        // A compressed body can become as large as any.
        let size = match delivery.properties.content_encoding {
            Some(_) => self.admission.max_body_bytes,
            None => delivery.body.len(),
        };
        let job = heavy(size, || self.parse(&delivery, &mut context));
        delivery.id = Some(context.id.clone());
        // Without a name, two jobs of the same words are two jobs all the same: neither answers for the other.
        let key = job
            .as_ref()
            .is_ok_and(|job| job.named)
            .then(|| heavy(delivery.body.len(), || Key::of(&delivery)));
        let before = self.answered_before(&delivery, key).await;
        if delivery.is_gone() {
            delivery.lost();
            return false;
        }
        if let (Ok(to), Some(before)) = (&to, before) {
            return self.answer_again(delivery, to.clone(), &before).await;
        }
        if delivery.uncounted && delivery.dropped.is_none() && self.not_poison(&delivery).is_ok() {
            self.count(delivery).await;
            return false;
        }
        let _under_way = key.map(|key| self.answered.begin(key));
        let ended = self.outcome(&delivery, job, &to, &context).await;
        let to = to.unwrap_or_else(|_| self.addresses.results());
        self.conclude(delivery, key, to, context, ended).await
    }

    /// The result that this very message got from this worker before; then only its ack was lost. Where it still
    /// runs here, because its channel went away under it, that result is waited for.
    async fn answered_before(&self, delivery: &Delivery, key: Option<Key>) -> Option<Arc<Answer>> {
        let key = key.filter(|_| delivery.redelivered)?;
        tokio::select! {
            biased;
            () = self.slots.draining().cancelled() => None,
            () = delivery.gone() => None,
            () = self.answered.until_over(key) => self.answered.find(key),
        }
    }

    /// A classic queue says that a message was delivered before, and not how often: a job that kills every worker
    /// would do so for ever. So before it is run again its queue gets a copy with a count instead, which outlives
    /// whoever runs that. Between the two steps there are both: no fault loses the job, and one may double it.
    async fn count(&self, delivery: Delivery) {
        let queue = self.queue(&delivery);
        let can_tell = tokio::select! {
            biased;
            () = self.slots.draining().cancelled() => false,
            // It comes again; a copy would be one job too many.
            () = delivery.gone() => return delivery.lost(),
            can_tell = self.publisher.up() => can_tell,
        };
        if !can_tell {
            return delivery.requeue().await;
        }
        let copy = Message::counted(&delivery, queue);
        let told = self.kill.run_until_cancelled(self.publisher.tell(&copy)).await;
        if told == Some(Told::Heard) {
            return delivery.ack_counted().await;
        }
        tracing::warn!(
            id = delivery.id,
            queue,
            "a job that came again could not be stored with its count; it is given back"
        );
        self.slots.draining().run_until_cancelled(tokio::time::sleep(BREATHER)).await;
        delivery.requeue().await;
    }

    /// Publishes a result once more. The requester may have it already, and knows it by its message id.
    async fn answer_again(&self, delivery: Delivery, to: Address, before: &Answer) -> bool {
        tracing::info!(
            id = delivery.id,
            queue = self.queue(&delivery),
            message_id = before.message_id,
            "a job that came again was answered before"
        );
        let _publishing = (self.outgoing.enter(delivery.queue), self.metrics.publishing());
        let message = Message::result(to, &delivery.properties, &before.message_id, before.body.clone());
        let sent = self.publish_result(message.of_job(delivery.id.clone())).await;
        match sent {
            Some(()) => delivery.ack().await,
            None => delivery.requeue().await,
        }
        sent.is_some()
    }

    /// Until it is confirmed, or as much of it as the broker takes. None where the time for draining was over first.
    async fn publish_result(&self, mut message: Message) -> Option<()> {
        loop {
            let sent = self.kill.run_until_cancelled(self.publisher.publish(&message)).await?;
            let Sent::TooLarge(most) = sent else { return Some(()) };
            let Some(smaller) = heavy(message.body().len(), || Reply::shrink(message.body(), most)) else {
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

    /// The straight way: check, encode, a slot, the sandbox.
    async fn outcome(
        &self,
        delivery: &Delivery,
        job: Result<Job, NotRun>,
        to: &Result<Address, AddressError>,
        context: &Context,
    ) -> Result<Outcome, NotRun> {
        let job = job?;
        self.not_poison(delivery)?;
        let to = to.as_ref().map_err(|error| not_run(Status::Rejected, error.to_string()))?;
        delivery.properties.echoable().map_err(|error| not_run(Status::Rejected, error))?;
        still_wanted(delivery, &job)?;
        let entry = self.running.enter(&job.id, delivery.properties.user_id.as_deref(), &self.kill)?;
        let (limits, stream, environment) = (job.limits, job.stream, job.environment.clone());
        let payload = heavy(job.code.len(), || Payload::encode(job));
        let slot = self.slots.take(delivery, entry.stop()).await?;
        entry.due_in(self.start_timeout + Duration::from_millis(limits.timeout_ms));
        let live = stream.then(|| self.live(delivery, to, context));
        let tap = live.as_ref().map(Live::tap);
        let outcome = self.sandbox.run_tapped(payload, &limits, entry.stop(), tap).await;
        drop(slot);
        self.metrics.ran(&environment, &outcome);
        if let Some(live) = live {
            self.kill.run_until_cancelled(live.finish(&outcome)).await;
        }
        self.our_own_failure_elsewhere_first(delivery, &outcome).await?;
        Ok(outcome)
    }

    fn live(&self, delivery: &Delivery, to: &Address, context: &Context) -> Live {
        let (publisher, asked) = (self.publisher.clone(), delivery.properties.clone());
        Live::start(publisher, to.clone(), asked, context.id.clone(), context.attempt)
    }

    /// The reply, its confirm, and only then the end of the delivery.
    async fn conclude(
        &self,
        delivery: Delivery,
        key: Option<Key>,
        to: Address,
        context: Context,
        ended: Result<Outcome, NotRun>,
    ) -> bool {
        let received = delivery.received;
        let answered = match ended {
            // It was not the requester who ended it: the time for draining was over.
            Ok(outcome) if outcome.status == Status::Cancelled && self.kill.is_cancelled() => {
                delivery.requeue().await;
                false
            }
            Ok(outcome) => self.answer_and_ack(delivery, key, to, context, outcome).await,
            Err(NotRun::Answer(outcome)) => self.answer_and_ack(delivery, key, to, context, *outcome).await,
            Err(NotRun::DeadLetter(reason, outcome)) => {
                self.bury(delivery, to, context, reason, *outcome).await
            }
            Err(NotRun::Requeue) => {
                delivery.requeue().await;
                false
            }
            Err(NotRun::ChannelClosed) => {
                tracing::debug!(
                    id = context.id,
                    queue = self.queue(&delivery),
                    "a job's channel is gone; it will come again"
                );
                delivery.lost();
                false
            }
        };
        self.metrics.total(received.elapsed());
        answered
    }

    async fn answer_and_ack(
        &self,
        delivery: Delivery,
        key: Option<Key>,
        to: Address,
        context: Context,
        outcome: Outcome,
    ) -> bool {
        let _publishing = (self.outgoing.enter(delivery.queue), self.metrics.publishing());
        let answered = self.answer(&delivery, key, to, context, outcome).await.is_some();
        if answered {
            delivery.ack().await;
        } else {
            delivery.requeue().await;
        }
        answered
    }

    /// Publishes the result. None where the time for draining was over before it was confirmed.
    async fn answer(
        &self,
        delivery: &Delivery,
        key: Option<Key>,
        to: Address,
        context: Context,
        outcome: Outcome,
    ) -> Option<()> {
        self.metrics.completed(&outcome);
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
        let _until_kept = self.traces.job(&traces::Ended {
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
        let body = heavy(outcome.bytes(), || Reply::new(context, outcome).encode_for(most, largest));
        let kept = key
            .filter(|_| ran && body.len() <= Answer::LARGEST)
            .map(|key| (key, Answer { message_id: message_id.clone(), body: body.clone() }));
        let message = Message::result(to, &delivery.properties, &message_id, body);
        self.publish_result(message.of_job(delivery.id.clone())).await?;
        if let Some((key, answer)) = kept {
            self.answered.keep(key, answer);
        }
        Some(())
    }

    /// Stores a copy with the reason in the dead queue, tells the requester, and lets go of the original. Not
    /// a nack, with which the broker would move it there by itself: that carries no reason.
    async fn bury(
        &self,
        delivery: Delivery,
        to: Address,
        context: Context,
        reason: DeadReason,
        outcome: Outcome,
    ) -> bool {
        let why = outcome.error.clone().unwrap_or_default();
        let trace_id = delivery.properties.trace_id();
        let queue = self.queue(&delivery);
        tracing::warn!(
            id = context.id,
            queue,
            reason = reason.as_str(),
            trace_id,
            "a message goes to the dead queue"
        );
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
        if stored.is_none() || self.answer(&delivery, None, to, context, outcome).await.is_none() {
            delivery.requeue().await;
            return false;
        }
        self.metrics.dead_lettered(reason);
        delivery.ack_dead_lettered().await;
        true
    }

    fn queue(&self, delivery: &Delivery) -> &str {
        &self.amqp.queues[delivery.queue].name
    }

    fn address(&self, delivery: &Delivery) -> Result<Address, AddressError> {
        self.addresses.check(delivery.properties.reply_to.as_deref())
    }

    /// What is known of the job before its body is.
    fn context(&self, delivery: &Delivery) -> Context {
        let queued = delivery.properties.queued(SystemTime::now());
        if let Some(queued) = queued {
            self.metrics.queue_wait(queued);
        }
        Context {
            id: String::new(),
            limits: None,
            attempt: delivery.attempt,
            redelivered: delivery.redelivered,
            worker: self.worker.clone(),
            queued,
            metadata: None,
        }
    }

    /// The body as a job, or as what it lacks to be one.
    fn parse(&self, delivery: &Delivery, context: &mut Context) -> Result<Job, NotRun> {
        if let Some(bytes) = delivery.dropped {
            return Err(self.too_large(bytes, delivery, context));
        }
        let Properties { content_encoding, message_id, .. } = &delivery.properties;
        let encoding = content_encoding.as_deref();
        match coding::parse(&delivery.body, encoding, message_id.as_deref(), &self.admission) {
            Ok(job) => {
                context.id.clone_from(&job.id);
                context.limits = Some(self.sandbox.in_force(job.limits));
                context.metadata.clone_from(&job.metadata);
                Ok(job)
            }
            Err(Refusal { id, metadata, kind, reason }) => {
                (context.id, context.metadata) = (id, metadata);
                let outcome = Box::new(Outcome::not_run(Status::Rejected, reason));
                Err(match kind {
                    RefusalKind::Malformed => NotRun::DeadLetter(DeadReason::Malformed, outcome),
                    RefusalKind::Unacceptable => NotRun::Answer(outcome),
                })
            }
        }
    }

    /// The body is not there: what is known of the job is what stands on its envelope.
    fn too_large(&self, bytes: usize, delivery: &Delivery, context: &mut Context) -> NotRun {
        if let Err(Refusal { id, .. }) =
            job::parse(b"", delivery.properties.message_id.as_deref(), &self.admission)
        {
            context.id = id;
        }
        let most = self.admission.max_body_bytes;
        let why = format!("the body has {bytes} bytes, above this worker's maximum of {most}");
        NotRun::DeadLetter(DeadReason::TooLarge, Box::new(Outcome::not_run(Status::Rejected, why)))
    }

    /// After the last delivery that the broker grants it would drop the job without a word. So it is not run
    /// once more: whatever ended every worker that had it would do so again. Where the broker tells the two apart, a
    /// job that was only given back, as by workers that drain, has no such end before it.
    fn not_poison(&self, delivery: &Delivery) -> Result<(), NotRun> {
        let before = delivery.failures;
        if before < self.amqp.delivery_limit {
            return Ok(());
        }
        let why =
            format!("the job was delivered {before} times and never came to an end; it is not run again");
        Err(NotRun::DeadLetter(DeadReason::Poison, Box::new(Outcome::not_run(Status::WorkerError, why))))
    }

    /// A job that we could not even start is given back a few times, after a pause, before that is its result.
    /// One whose code was handed over is not: it may have done something.
    async fn our_own_failure_elsewhere_first(
        &self,
        delivery: &Delivery,
        outcome: &Outcome,
    ) -> Result<(), NotRun> {
        let ours = outcome.status == Status::WorkerError && outcome.started_at.is_none();
        if !ours || delivery.attempt >= STARTS.min(self.amqp.delivery_limit) {
            return Ok(());
        }
        let why = outcome.error.as_deref();
        tracing::warn!(
            id = delivery.id,
            queue = self.queue(delivery),
            error = why,
            attempt = delivery.attempt,
            "a job could not be started; it is given back"
        );
        let longest = BREATHER * 2_u32.pow(delivery.attempt.min(STARTS));
        let pause = Delays::new(longest / 2, longest).next_delay();
        self.slots.draining().run_until_cancelled(tokio::time::sleep(pause)).await;
        Err(NotRun::Requeue)
    }
}

/// Past its deadline, or its message's expiration, nobody waits for the result.
fn still_wanted(delivery: &Delivery, job: &Job) -> Result<(), NotRun> {
    if delivery.properties.expired(SystemTime::now()) {
        return Err(not_run(Status::Expired, "the message's expiration had passed before the job could run"));
    }
    match job.deadline {
        Some(deadline) if deadline <= jiff::Timestamp::now() => Err(not_run(
            Status::Expired,
            format!("the deadline {deadline} had passed before the job could run"),
        )),
        _ => Ok(()),
    }
}

/// Work on so many bytes, which does not keep a thread of the runtime from other jobs.
fn heavy<T>(bytes: usize, work: impl FnOnce() -> T) -> T {
    /// Less is done in a fraction of a millisecond.
    const HEAVY: usize = 256 << 10;
    if bytes < HEAVY { work() } else { tokio::task::block_in_place(work) }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
