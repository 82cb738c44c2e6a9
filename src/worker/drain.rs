//! How a worker ends: no more jobs, what has not started goes back at once, what runs may end in its time.

use std::future::Future;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::amqp::{Consumer, Publisher};
use crate::ops::metrics::Metrics;

/// For jobs that were killed at the end of the drain time to be dead and given back.
const KILLED: Duration = Duration::from_secs(10);

/// For saying goodbye to a broker that may not answer.
const GOODBYE: Duration = Duration::from_secs(5);

/// What a worker is told from outside.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    /// Take no more jobs, end what runs, then return. The first SIGTERM.
    pub drain: CancellationToken,
    /// Return at once, whatever runs. The second.
    pub now: CancellationToken,
}

/// How a worker ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// Every job was answered or given back.
    Drained,
    /// At once: jobs were cut off, and the broker delivers them again.
    Abandoned,
}

/// Does `work` until its end and then waits for the `jobs` that it began, as long as `shutdown` allows.
pub(super) async fn until_empty(
    work: impl Future<Output = ()>,
    jobs: &TaskTracker,
    kill: &CancellationToken,
    shutdown: &Shutdown,
    drain_timeout: Duration,
    metrics: &Metrics,
) -> Stopped {
    let deadline = async {
        shutdown.drain.cancelled().await;
        metrics.draining();
        tracing::info!(jobs = jobs.len(), timeout = ?drain_timeout, "draining");
        tokio::time::sleep(drain_timeout).await;
        tracing::warn!(
            jobs = jobs.len(),
            "the time for draining is over: what still runs is killed and given back"
        );
        kill.cancel();
        tokio::time::sleep(KILLED).await;
    };
    let all_done = async {
        work.await;
        jobs.close();
        jobs.wait().await;
    };
    tokio::select! {
        biased;
        () = shutdown.now.cancelled() => {
            // Whatever is still polled for the rest of the process's life should know.
            kill.cancel();
            Stopped::Abandoned
        }
        () = all_done => Stopped::Drained,
        () = deadline => Stopped::Drained,
    }
}

/// Closes both connections so that everything sent has arrived, or leaves them after a while.
pub(super) async fn say_goodbye(consumer: Consumer, publisher: &Publisher) {
    let goodbye = async {
        publisher.close().await;
        consumer.close().await;
    };
    if tokio::time::timeout(GOODBYE, goodbye).await.is_err() {
        tracing::warn!("the broker did not answer the goodbye");
    }
}
