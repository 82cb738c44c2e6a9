//! Deliveries whose results wait for a confirm. Each keeps its place in the prefetch, and when all do no job comes.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::ops::metrics::Metrics;

/// All places may be taken for so long without that anybody is told: at full load they are, now and then.
const MOMENT: Duration = Duration::from_secs(5);

/// All of them, by queue. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Outgoing {
    queues: Arc<Mutex<Vec<Queue>>>,
    metrics: Option<Metrics>,
}

#[derive(Debug)]
struct Queue {
    /// The prefetch.
    places: usize,
    taken: usize,
    /// Since when all are taken.
    full: Option<Instant>,
}

/// One of them, until it is dropped.
#[derive(Debug)]
pub(super) struct Publishing {
    outgoing: Outgoing,
    queue: usize,
}

impl Outgoing {
    /// With so many places for each queue.
    pub(super) fn new(prefetch: &[u16], metrics: Option<&Metrics>) -> Self {
        let queue = |places: &u16| Queue { places: usize::from(*places), taken: 0, full: None };
        let queues = prefetch.iter().map(queue).collect();
        Self { queues: Arc::new(Mutex::new(queues)), metrics: metrics.cloned() }
    }

    /// A result of a delivery from this queue is published from now on.
    pub(super) fn enter(&self, queue: usize) -> Publishing {
        self.change(queue, |taken| taken + 1);
        Publishing { outgoing: self.clone(), queue }
    }

    /// How long no delivery of some queue could come because of this, if it is long enough to be told.
    pub(super) fn stuck(&self) -> Option<Duration> {
        let queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        let full = queues.iter().filter_map(|queue| queue.full).map(|since| since.elapsed()).max();
        let stuck = full.filter(|full| *full > MOMENT);
        if let Some(metrics) = &self.metrics {
            metrics.publishing_stuck(stuck.is_some());
        }
        stuck
    }

    fn change(&self, queue: usize, taken: impl FnOnce(usize) -> usize) {
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        let queue = &mut queues[queue];
        queue.taken = taken(queue.taken);
        queue.full =
            if queue.taken < queue.places { None } else { queue.full.or_else(|| Some(Instant::now())) };
    }
}

impl Drop for Publishing {
    fn drop(&mut self) {
        self.outgoing.change(self.queue, |taken| taken.saturating_sub(1));
    }
}
