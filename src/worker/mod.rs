//! The worker as a service: jobs from the queue, through the sandbox, results back, until it is told to stop.
//!
//! The way of one job is [`pipeline`]; how many go it at a time, [`slots`]; how all of it ends, [`drain`].
//! The main loop takes whatever the broker hands out: the prefetch bounds how much that is.

mod drain;
mod health;
mod pipeline;
mod running;
mod slots;

use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use drain::{Ended, Shutdown};
pub use health::Health;

use crate::amqp::{Addresses, Command, Consumer, Publisher};
use crate::config::Config;
use crate::ops::metrics::Metrics;
use crate::sandbox::Sandbox;
use pipeline::Pipeline;
use running::Running;
use slots::Slots;

/// Takes jobs until `shutdown` says otherwise. The broker need not be there, now or later: it is tried for
/// ever. `health` tells others how it goes.
pub async fn serve(
    config: &Config,
    sandbox: Sandbox,
    metrics: &Metrics,
    health: &Health,
    shutdown: &Shutdown,
) -> Ended {
    let name = name(config);
    sandbox.warm_up();
    metrics.slots(config.worker.slots);
    config.environments.keys().for_each(|environment| metrics.environment(environment));

    let publisher = Publisher::start(&config.amqp, &name, metrics);
    let drain = shutdown.drain.clone();
    let mut consumer = Consumer::start(&config.amqp, &name, prefetch(config), metrics, drain.clone());
    let running = Running::default();
    health.watch(consumer.state(), publisher.state(), drain.clone(), running.clone());
    tracing::info!(worker = name, slots = config.worker.slots, "taking jobs");

    let kill = CancellationToken::new();
    let pipeline = Arc::new(Pipeline {
        worker: name,
        admission: config.admission(),
        addresses: Addresses::new(&config.amqp),
        amqp: config.amqp.clone(),
        start_timeout: config.sandbox.start_timeout,
        slots: Slots::new(config.worker.slots, publisher.state(), drain, metrics),
        running: running.clone(),
        sandbox: sandbox.clone(),
        publisher: publisher.clone(),
        metrics: metrics.clone(),
        kill: kill.clone(),
    });
    let commands = tokio::spawn(obey(consumer.commands(), running));
    let jobs = TaskTracker::new();
    let work = async {
        while let Some(delivery) = consumer.next().await {
            jobs.spawn(pipeline.clone().process(delivery));
        }
    };
    let ended = drain::until_empty(work, &jobs, &kill, shutdown, config.worker.drain_timeout, metrics).await;
    if ended == Ended::Drained {
        drain::say_goodbye(consumer, &publisher).await;
        sandbox.close().await;
    }
    commands.abort();
    ended
}

/// Does what is asked of all workers.
async fn obey(commands: Option<tokio::sync::mpsc::Receiver<Command>>, running: Running) {
    let Some(mut commands) = commands else { return };
    while let Some(command) = commands.recv().await {
        match command {
            Command::Cancel(id) => running.cancel(&id),
        }
    }
}

/// One delivery for each slot, and a few that wait for one.
fn prefetch(config: &Config) -> u16 {
    let slots = u16::try_from(config.worker.slots).unwrap_or(u16::MAX);
    // Zero would mean no limit.
    slots.saturating_add(config.amqp.prefetch_surplus).max(1)
}

/// What results and logs call this worker.
fn name(config: &Config) -> String {
    if !config.worker.name.is_empty() {
        return config.worker.name.clone();
    }
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}:{}", host.trim(), std::process::id())
}
