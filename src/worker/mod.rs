//! The worker as a service: jobs from the queue, through the sandbox, results back, until it is told to stop.
//!
//! The way of one job is [`pipeline`]; how many go it at a time, [`slots`]; how all of it ends, [`drain`].
//! The main loop takes whatever the broker hands out: the prefetch bounds how much that is.

mod blocking;
mod coding;
mod control;
mod disposition;
mod drain;
mod health;
mod in_flight;
mod outgoing;
mod output_streamer;
mod pipeline;
mod recent_results;
mod redelivery;
mod reply;
mod request;
mod slots;
mod watchdog;

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use drain::{Shutdown, Stopped};
pub use health::Health;
pub use in_flight::MAX_CANCELLATIONS;
pub use watchdog::Watchdog;

use crate::amqp::{Addresses, Consumer, Publisher};
use crate::config::{self, Config};
use crate::ops::metrics::Metrics;
use crate::ops::traces::Traces;
use crate::sandbox::Sandbox;
use control::Control;
use disposition::Settlement;
use in_flight::InFlightJobs;
use outgoing::Outgoing;
use pipeline::Pipeline;
use recent_results::RecentResults;
use redelivery::Redelivery;
use reply::Replies;
use request::Requests;
use slots::Slots;

/// Takes jobs until `shutdown` says otherwise, or `once` so many have been answered. The broker need not be
/// there, now or later: it is tried for ever. `health` tells others how it goes.
pub async fn serve(
    config: &Config,
    sandbox: Sandbox,
    metrics: &Metrics,
    traces: &Traces,
    health: &Health,
    shutdown: &Shutdown,
    once: Option<NonZeroUsize>,
) -> Stopped {
    let name = name(config);
    sandbox.warm_up(Some(metrics));
    metrics.slots(config.worker.slots);
    config.amqp.queues.iter().for_each(|queue| metrics.queue(&queue.name));
    for (name, environment) in &config.environments {
        metrics.environment(name, environment.warm);
    }

    let publisher = Publisher::start(&config.amqp, &name, metrics);
    let drain = shutdown.drain.clone();
    let prefetch = prefetch(config, once);
    let outgoing = Outgoing::new(&prefetch, Some(metrics));
    let timeout = config.consumer_timeout();
    let mut consumer =
        Consumer::start(&config.amqp, &name, prefetch, timeout, publisher.cut_off(), metrics, drain.clone());
    let in_flight = InFlightJobs::default();
    health.watch(consumer.state(), publisher.state(), drain.clone(), in_flight.clone(), outgoing.clone());
    let pulse = tokio::spawn(health.clone().pulse());
    tracing::info!(worker = name, slots = config.worker.slots, "taking jobs");

    let kill = CancellationToken::new();
    let control = Arc::new(Control {
        worker: name.clone(),
        since: jiff::Timestamp::now(),
        slots: config.worker.slots,
        queues: config.amqp.queues.iter().map(|queue| queue.name.clone()).collect(),
        drain: drain.clone(),
        addresses: Addresses::new(&config.amqp),
        operators: config.amqp.operators.clone(),
        in_flight: in_flight.clone(),
        publisher: publisher.clone(),
    });
    let recent_results = RecentResults::default();
    let requests = Requests {
        worker: name.clone(),
        admission: config.admission(),
        addresses: Addresses::new(&config.amqp),
        metrics: metrics.clone(),
    };
    let redelivery = Redelivery {
        recent_results: recent_results.clone(),
        publisher: publisher.clone(),
        delivery_limit: config.amqp.delivery_limit,
        draining: drain.clone(),
        kill: kill.clone(),
    };
    let replies = Replies {
        worker: name,
        amqp: config.amqp.clone(),
        addresses: Addresses::new(&config.amqp),
        publisher: publisher.clone(),
        outgoing,
        recent_results: recent_results.clone(),
        metrics: metrics.clone(),
        traces: traces.clone(),
        kill: kill.clone(),
    };
    let pipeline = Arc::new(Pipeline {
        requests,
        redelivery,
        replies,
        recent_results,
        in_flight,
        slots: Slots::new(
            config.worker.slots,
            config.amqp.queues.iter().map(|queue| queue.weight),
            publisher.state(),
            drain.clone(),
            metrics,
        ),
        sandbox: sandbox.clone(),
        start_timeout: config.sandbox.start_timeout,
        publisher: publisher.clone(),
        metrics: metrics.clone(),
        kill: kill.clone(),
    });
    let commands = tokio::spawn(control.run(consumer.commands()));
    let jobs = TaskTracker::new();
    let quota = once.map(|jobs| Quota::new(jobs.get(), drain.clone()));
    let work = async {
        loop {
            let permit = match &quota {
                Some(quota) => quota.permit().await,
                None => None,
            };
            let Some(delivery) = consumer.next().await else { break };
            if drain.is_cancelled() {
                jobs.spawn(delivery.requeue());
                continue;
            }
            let (pipeline, quota) = (pipeline.clone(), quota.clone());
            jobs.spawn(async move {
                let settlement = pipeline.process(delivery).await;
                if let (Some(quota), Some(permit), Settlement::Answered) = (quota, permit, settlement) {
                    quota.used(permit);
                }
            });
        }
    };
    let ended = drain::until_empty(work, &jobs, &kill, shutdown, config.worker.drain_timeout, metrics).await;
    if ended == Stopped::Drained {
        drain::say_goodbye(consumer, &publisher).await;
        sandbox.close().await;
    }
    commands.abort();
    pulse.abort();
    ended
}

/// So many jobs and no more. A job that is requeued unanswered does not count.
#[derive(Clone, Debug)]
struct Quota {
    permits: Arc<Semaphore>,
    left: Arc<AtomicUsize>,
    drain: CancellationToken,
}

impl Quota {
    fn new(jobs: usize, drain: CancellationToken) -> Self {
        // More permits than a semaphore has are as good as no limit.
        let permits = Arc::new(Semaphore::new(jobs.min(Semaphore::MAX_PERMITS)));
        Self { permits, left: Arc::new(AtomicUsize::new(jobs)), drain }
    }

    /// A permit for one more job; none when the worker drains.
    async fn permit(&self) -> Option<OwnedSemaphorePermit> {
        let permit = self.permits.clone().acquire_owned();
        self.drain.run_until_cancelled(permit).await.and_then(Result::ok)
    }

    /// A job was answered. After the last one the worker drains.
    fn used(&self, permit: OwnedSemaphorePermit) {
        permit.forget();
        if self.left.fetch_sub(1, Ordering::Relaxed) == 1 {
            tracing::info!("--once limit reached; draining");
            self.drain.cancel();
        }
    }
}

/// How many unsettled deliveries of each queue are held: one for each slot, because any of them alone may have jobs,
/// and of those few more that wait for a slot the share that its weight gives it; never more than are wanted at all.
fn prefetch(config: &Config, once: Option<NonZeroUsize>) -> Vec<u16> {
    let most = once.map_or(u16::MAX, |jobs| u16::try_from(jobs.get()).unwrap_or(u16::MAX));
    let slots = u16::try_from(config.worker.slots).unwrap_or(u16::MAX);
    let surplus = u64::from(config.amqp.prefetch_surplus);
    let weights: u64 = config.amqp.queues.iter().map(|queue| u64::from(queue.weight)).sum();
    let of = |queue: &config::Queue| {
        let share = (surplus * u64::from(queue.weight)).div_ceil(weights);
        // Zero would mean no limit.
        slots.saturating_add(u16::try_from(share).unwrap_or(u16::MAX)).clamp(1, most)
    };
    config.amqp.queues.iter().map(of).collect()
}

/// What results and logs call this worker.
pub fn name(config: &Config) -> String {
    if !config.worker.name.is_empty() {
        return config.worker.name.clone();
    }
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}:{}", host.trim(), std::process::id())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;

    #[test]
    fn the_surplus_is_shared_and_the_slots_are_everybodys() {
        let mut config = Config::default();
        (config.worker.slots, config.amqp.prefetch_surplus) = (4, 4);
        assert_eq!(prefetch(&config, None), [8]);
        let queue = |weight| config::Queue { weight, ..config::Queue::new("q") };
        config.amqp.queues = vec![queue(3), queue(1)];
        assert_eq!(prefetch(&config, None), [7, 5]);
        assert_eq!(prefetch(&config, NonZeroUsize::new(2)), [2, 2]);
        config.amqp.prefetch_surplus = 0;
        assert_eq!(prefetch(&config, None), [4, 4]);
    }
}
