//! The worker as a service: jobs from the queue, through the sandbox, results back, until it is told to stop.
//!
//! The way of one job is [`pipeline`]; how many go it at a time, [`slots`]; how all of it ends, [`drain`].
//! The main loop takes whatever the broker hands out: the prefetch bounds how much that is.

mod answered;
mod coding;
mod control;
mod disposition;
mod drain;
mod health;
mod live;
mod outgoing;
mod pipeline;
mod running;
mod slots;
mod watchdog;

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use drain::{Ended, Shutdown};
pub use health::Health;
pub use running::REMEMBERED_MAX;
pub use watchdog::Watchdog;

use crate::amqp::{Addresses, Consumer, Publisher};
use crate::config::{self, Config};
use crate::ops::metrics::Metrics;
use crate::ops::traces::Traces;
use crate::sandbox::Sandbox;
use answered::Answered;
use control::Control;
use outgoing::Outgoing;
use pipeline::Pipeline;
use running::Running;
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
) -> Ended {
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
    let running = Running::default();
    health.watch(consumer.state(), publisher.state(), drain.clone(), running.clone(), outgoing.clone());
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
        running: running.clone(),
        publisher: publisher.clone(),
    });
    let pipeline = Arc::new(Pipeline {
        worker: name,
        admission: config.admission(),
        addresses: Addresses::new(&config.amqp),
        amqp: config.amqp.clone(),
        start_timeout: config.sandbox.start_timeout,
        slots: Slots::new(
            config.worker.slots,
            config.amqp.queues.iter().map(|queue| queue.weight),
            publisher.state(),
            drain.clone(),
            metrics,
        ),
        running,
        outgoing,
        sandbox: sandbox.clone(),
        publisher: publisher.clone(),
        answered: Answered::default(),
        metrics: metrics.clone(),
        traces: traces.clone(),
        kill: kill.clone(),
    });
    let commands = tokio::spawn(control.obey(consumer.commands()));
    let jobs = TaskTracker::new();
    let quota = once.map(|jobs| Quota::new(jobs.get(), drain.clone()));
    let work = async {
        loop {
            let place = match &quota {
                Some(quota) => quota.place().await,
                None => None,
            };
            let Some(delivery) = consumer.next().await else { break };
            if drain.is_cancelled() {
                jobs.spawn(delivery.requeue());
                continue;
            }
            let (pipeline, quota) = (pipeline.clone(), quota.clone());
            jobs.spawn(async move {
                let answered = pipeline.process(delivery).await;
                if let (Some(quota), Some(place), true) = (quota, place, answered) {
                    quota.used(place);
                }
            });
        }
    };
    let ended = drain::until_empty(work, &jobs, &kill, shutdown, config.worker.drain_timeout, metrics).await;
    if ended == Ended::Drained {
        drain::say_goodbye(consumer, &publisher).await;
        sandbox.close().await;
    }
    commands.abort();
    pulse.abort();
    ended
}

/// So many jobs and no more. A job that is given back unanswered does not count.
#[derive(Clone, Debug)]
struct Quota {
    places: Arc<Semaphore>,
    left: Arc<AtomicUsize>,
    drain: CancellationToken,
}

impl Quota {
    fn new(jobs: usize, drain: CancellationToken) -> Self {
        // More places than a semaphore has are as good as no limit.
        let places = Arc::new(Semaphore::new(jobs.min(Semaphore::MAX_PERMITS)));
        Self { places, left: Arc::new(AtomicUsize::new(jobs)), drain }
    }

    /// A place for one more job; none when the worker drains.
    async fn place(&self) -> Option<OwnedSemaphorePermit> {
        let place = self.places.clone().acquire_owned();
        self.drain.run_until_cancelled(place).await.and_then(Result::ok)
    }

    /// A job was answered. After the last one the worker drains.
    fn used(&self, place: OwnedSemaphorePermit) {
        place.forget();
        if self.left.fetch_sub(1, Ordering::Relaxed) == 1 {
            tracing::info!("as many jobs as were wanted have been answered");
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
