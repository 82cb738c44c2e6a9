//! The way of one job, from its delivery to its settlement.
//!
//! Every delivery is settled exactly once, and only after the broker has confirmed what is to be known of it. A failure
//! of the job is a result. A failure of the worker is retried on another worker before it is one.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio_util::sync::CancellationToken;

use crate::amqp::{Address, Delivery, Publisher};
use crate::job::{Job, Outcome, Status};
use crate::ops::metrics::{DeadReason, Metrics};
use crate::retry::Delays;
use crate::sandbox::Sandbox;
use crate::script::Payload;
use crate::worker::blocking::blocking;
use crate::worker::disposition::{NotRun, Settlement, not_run};
use crate::worker::in_flight::InFlightJobs;
use crate::worker::output_streamer::OutputStreamer;
use crate::worker::recent_results::RecentResults;
use crate::worker::redelivery::Redelivery;
use crate::worker::reply::Replies;
use crate::worker::request::{Request, Requests};
use crate::worker::slots::Slots;

/// Deliveries in which a failed start is requeued instead of answered: another worker may be able to start the job.
/// Few, because if every worker fails, each costs a start.
const MAX_START_ATTEMPTS: u32 = 3;

/// About how long such a job is held before it is requeued, doubled each time, so that a worker that cannot start
/// anything does not spin.
const START_RETRY_DELAY: Duration = Duration::from_millis(250);

/// What all jobs of a worker go through.
#[derive(Debug)]
pub(super) struct Pipeline {
    pub(super) requests: Requests,
    pub(super) redelivery: Redelivery,
    pub(super) replies: Replies,
    pub(super) recent_results: RecentResults,
    pub(super) in_flight: InFlightJobs,
    pub(super) slots: Slots,
    pub(super) sandbox: Sandbox,
    pub(super) start_timeout: Duration,
    pub(super) publisher: Publisher,
    pub(super) metrics: Metrics,
    /// Ends running jobs when the drain timeout expires.
    pub(super) kill: CancellationToken,
}

impl Pipeline {
    /// Takes one delivery from its arrival to its settlement.
    pub(super) async fn process(self: Arc<Self>, mut delivery: Delivery) -> Settlement {
        let _held = self.metrics.holding();
        let (request, job) = self.requests.read(&mut delivery, &self.sandbox);
        let delivery = match self.redelivery.answer_or_count(delivery, &request, &self.replies).await {
            ControlFlow::Continue(delivery) => delivery,
            ControlFlow::Break(settlement) => return settlement,
        };
        let _unsettled = request.fingerprint.map(|fingerprint| self.recent_results.begin(fingerprint));
        let result = match job {
            Ok(job) => self.execute(&delivery, &request, job).await,
            Err(not_run) => Err(not_run),
        };
        self.replies.settle(delivery, request, result).await
    }

    /// Checks, encodes, takes a slot, runs.
    async fn execute(&self, delivery: &Delivery, request: &Request, job: Job) -> Result<Outcome, NotRun> {
        let reply_to = self.admit(delivery, request, &job)?;
        let entry = self.in_flight.enter(&job.id, delivery.properties.user_id.as_deref(), &self.kill)?;
        let (limits, stream, environment) = (job.limits, job.stream, job.environment.clone());
        let payload = blocking(job.code.len(), || Payload::encode(job));
        let slot = self.slots.take(delivery, entry.stop()).await?;
        entry.due_in(self.start_timeout + Duration::from_millis(limits.timeout_ms));
        let streamer = stream.then(|| self.stream_output(delivery, request, reply_to));
        let live_output = streamer.as_ref().map(OutputStreamer::tap);
        let outcome = self.sandbox.run_tapped(payload, &limits, entry.stop(), live_output).await;
        drop(slot);
        self.metrics.ran(&environment, &outcome);
        if let Some(streamer) = streamer {
            self.kill.run_until_cancelled(streamer.finish(&outcome)).await;
        }
        self.requeue_failed_start(delivery, request, &outcome).await?;
        Ok(outcome)
    }

    /// What is checked after the body: whether it may run once more, where its result goes, whether it is still wanted.
    fn admit<'a>(&self, delivery: &Delivery, request: &'a Request, job: &Job) -> Result<&'a Address, NotRun> {
        if self.redelivery.limit_reached(delivery) {
            let why = format!(
                "the job was delivered {} times and never came to an end; it is not run again",
                delivery.failures
            );
            let outcome = Box::new(Outcome::not_run(Status::WorkerError, why));
            return Err(NotRun::DeadLetter(DeadReason::Poison, outcome));
        }
        let reply_to =
            request.reply_to.as_ref().map_err(|error| not_run(Status::Rejected, error.to_string()))?;
        delivery.properties.echoable().map_err(|error| not_run(Status::Rejected, error))?;
        check_not_expired(delivery, job)?;
        Ok(reply_to)
    }

    fn stream_output(&self, delivery: &Delivery, request: &Request, reply_to: &Address) -> OutputStreamer {
        let (publisher, asked) = (self.publisher.clone(), delivery.properties.clone());
        let context = &request.context;
        OutputStreamer::start(publisher, reply_to.clone(), asked, context.id.clone(), context.attempt)
    }

    /// Requeues a job that could not be started, a few times and after a pause, before that is its result. Not one whose
    /// code was handed over: it may have done something.
    async fn requeue_failed_start(
        &self,
        delivery: &Delivery,
        request: &Request,
        outcome: &Outcome,
    ) -> Result<(), NotRun> {
        let ours = outcome.status == Status::WorkerError && outcome.started_at.is_none();
        if !ours || delivery.attempt >= MAX_START_ATTEMPTS.min(self.redelivery.delivery_limit) {
            return Ok(());
        }
        tracing::warn!(
            id = request.context.id,
            queue = self.replies.queue(delivery),
            error = outcome.error.as_deref(),
            attempt = delivery.attempt,
            "job could not be started; requeueing"
        );
        let longest = START_RETRY_DELAY * 2_u32.pow(delivery.attempt.min(MAX_START_ATTEMPTS));
        let pause = Delays::new(longest / 2, longest).next_delay();
        self.slots.draining().run_until_cancelled(tokio::time::sleep(pause)).await;
        Err(NotRun::Requeue)
    }
}

/// Past its deadline, or its message's expiration, nobody waits for the result.
fn check_not_expired(delivery: &Delivery, job: &Job) -> Result<(), NotRun> {
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
