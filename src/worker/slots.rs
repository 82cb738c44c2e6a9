//! Weighted fair queueing of the slots over the queues, and the gate that keeps jobs from starting while results cannot be
//! published.
//!
//! Queues share the slots by weight. What counts is the time that their jobs hold slots, so a queue of long jobs
//! gets no more than one of short ones. A slot that falls free goes to the queue that has used least for its
//! weight, among those that have a job waiting; what a queue does not use is there for the others, and is not
//! saved up.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::amqp::{Delivery, LinkState};
use crate::job::Status;
use crate::ops::metrics::{Metrics, Running};
use crate::worker::disposition::{NotRun, not_run};

/// What a job that runs counts for on top of the seconds that it has run, so that slots which fall free in the same
/// moment do not all go to one queue.
const RUNNING_BIAS_S: f64 = 0.1;

/// The permits for running jobs.
#[derive(Debug)]
pub(super) struct Slots {
    permits: FairQueue,
    /// How the way out for results is: while there is none, no job starts.
    publishing: watch::Receiver<LinkState>,
    drain: CancellationToken,
    metrics: Metrics,
}

/// A permit, held while a job runs.
#[derive(Debug)]
#[must_use = "the permit is free again as soon as this is dropped"]
pub(super) struct Slot {
    _permit: SlotPermit,
    _running: Running,
}

impl Slots {
    /// So many `slots`, for queues of these `weights`.
    pub(super) fn new(
        slots: usize,
        weights: impl Iterator<Item = u32>,
        publishing: watch::Receiver<LinkState>,
        drain: CancellationToken,
        metrics: &Metrics,
    ) -> Self {
        Self { permits: FairQueue::new(slots, weights), publishing, drain, metrics: metrics.clone() }
    }

    /// Cancelled when no job may start any more.
    pub(super) fn draining(&self) -> &CancellationToken {
        &self.drain
    }

    /// A permit for `delivery`, or why it shall not run here.
    pub(super) async fn take(&self, delivery: &Delivery, stop: &CancellationToken) -> Result<Slot, NotRun> {
        let mut publishing = self.publishing.clone();
        let permit = async {
            let permit = self.permits.take(delivery.queue).await;
            let open = publishing.wait_for(|state| *state == LinkState::Up).await.map(drop);
            permit.filter(|_| open.is_ok())
        };
        let permit = tokio::select! {
            biased;
            () = self.drain.cancelled() => None,
            () = stop.cancelled() => return Err(not_run(Status::Cancelled, "cancelled on request, before it ran")),
            // Somebody else has it by now; running it here as well would only double it.
            () = delivery.gone() => return Err(NotRun::ChannelClosed),
            permit = permit => permit,
        };
        let permit = permit.ok_or(NotRun::Requeue)?;
        if delivery.is_gone() {
            return Err(NotRun::ChannelClosed);
        }
        Ok(Slot { _permit: permit, _running: self.metrics.running() })
    }
}

/// The permits, without what is known of jobs. Cheap to clone.
#[derive(Clone, Debug)]
struct FairQueue(Arc<Mutex<QueueShares>>);

#[derive(Debug)]
struct QueueShares {
    free: usize,
    /// All times are seconds since then.
    epoch: Instant,
    queues: Vec<QueueShare>,
}

/// What one queue has of the permits.
#[derive(Debug)]
struct QueueShare {
    weight: f64,
    /// Seconds that its jobs held permits, those that still do left out.
    used: f64,
    running: usize,
    /// The sum of the times at which those that run began.
    began: f64,
    waiting: VecDeque<oneshot::Sender<SlotPermit>>,
}

/// One permit; free again when this is dropped.
#[derive(Debug)]
struct SlotPermit {
    /// None where it was never given away.
    permits: Option<FairQueue>,
    queue: usize,
    began: f64,
}

impl FairQueue {
    fn new(count: usize, weights: impl Iterator<Item = u32>) -> Self {
        let share = |weight: u32| QueueShare {
            weight: f64::from(weight),
            used: 0.0,
            running: 0,
            began: 0.0,
            waiting: VecDeque::new(),
        };
        let queues = weights.map(share).collect();
        Self(Arc::new(Mutex::new(QueueShares { free: count, epoch: Instant::now(), queues })))
    }

    /// Waits for a permit. None where there is no such queue.
    async fn take(&self, queue: usize) -> Option<SlotPermit> {
        let turn = {
            let mut shares = self.lock();
            let now = shares.now();
            let min_virtual_time = shares.min_virtual_time(queue, now);
            let (sender, turn) = oneshot::channel();
            let share = shares.queues.get_mut(queue)?;
            if let (Some(min_virtual_time), true) = (min_virtual_time, share.idle()) {
                // Time that it left to others is gone.
                share.used = share.used.max(min_virtual_time * share.weight);
            }
            share.waiting.push_back(sender);
            shares.hand_out(self);
            turn
        };
        turn.await.ok()
    }

    fn lock(&self) -> MutexGuard<'_, QueueShares> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl QueueShares {
    fn now(&self) -> f64 {
        self.epoch.elapsed().as_secs_f64()
    }

    /// How little the queues other than this one have used that want something.
    fn min_virtual_time(&self, queue: usize, now: f64) -> Option<f64> {
        let others = self.queues.iter().enumerate().filter(|(at, share)| *at != queue && !share.idle());
        others.map(|(_, share)| share.virtual_time(now)).min_by(f64::total_cmp)
    }

    fn hand_out(&mut self, permits: &FairQueue) {
        let now = self.now();
        while self.free > 0 {
            for share in &mut self.queues {
                // Those who gave up waiting: cancelled, or drained.
                share.waiting.retain(|waiting| !waiting.is_closed());
            }
            let waiting = self.queues.iter_mut().enumerate().filter(|(_, share)| !share.waiting.is_empty());
            let next =
                waiting.min_by(|(_, one), (_, two)| one.virtual_time(now).total_cmp(&two.virtual_time(now)));
            let Some((queue, share)) = next else { return };
            let Some(waiting) = share.waiting.pop_front() else { return };
            let permit = SlotPermit { permits: Some(permits.clone()), queue, began: now };
            match waiting.send(permit) {
                Ok(()) => {
                    self.free -= 1;
                    share.running += 1;
                    share.began += now;
                }
                // It gave up in this moment. The lock is ours: the permit must not be given back by itself.
                Err(mut permit) => permit.permits = None,
            }
        }
    }
}

impl QueueShare {
    fn idle(&self) -> bool {
        self.running == 0 && self.waiting.is_empty()
    }

    #[expect(clippy::cast_precision_loss, reason = "a number of slots")]
    fn virtual_time(&self, now: f64) -> f64 {
        let running = self.running as f64;
        (self.used + running * (now + RUNNING_BIAS_S) - self.began) / self.weight
    }
}

impl Drop for SlotPermit {
    fn drop(&mut self) {
        let Some(permits) = self.permits.take() else { return };
        let mut shares = permits.lock();
        let now = shares.now();
        shares.free += 1;
        if let Some(share) = shares.queues.get_mut(self.queue) {
            share.running -= 1;
            share.began -= self.began;
            share.used += now - self.began;
            if share.running == 0 {
                // Sums of fractions do not come out even.
                share.began = 0.0;
            }
        }
        shares.hand_out(&permits);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;
    use std::time::Duration;

    /// A queue that always has as many jobs waiting as are `held`, each of which takes so long. Returns the seconds
    /// that they had permits.
    async fn backlog(permits: &FairQueue, queue: usize, held: usize, job: Duration, until: Instant) -> f64 {
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..held {
            let permits = permits.clone();
            tasks.spawn(async move {
                let mut used = Duration::ZERO;
                while Instant::now() < until {
                    let _permit = permits.take(queue).await.unwrap();
                    if Instant::now() < until {
                        tokio::time::sleep(job).await;
                        used += job;
                    }
                }
                used.as_secs_f64()
            });
        }
        tasks.join_all().await.into_iter().sum()
    }

    const LONG: Duration = Duration::from_millis(2_000);
    const SHORT: Duration = Duration::from_millis(100);

    fn after(seconds: u64) -> Instant {
        Instant::now() + Duration::from_secs(seconds)
    }

    #[tokio::test(start_paused = true)]
    async fn time_is_shared_by_weight_whatever_jobs_take() {
        for (slots, jobs) in
            [(4, [SHORT, SHORT]), (1, [SHORT, SHORT]), (2, [LONG, SHORT]), (3, [SHORT, LONG])]
        {
            let permits = FairQueue::new(slots, [3, 1].into_iter());
            let until = after(300);
            let (three, one) = tokio::join!(
                backlog(&permits, 0, slots + 2, jobs[0], until),
                backlog(&permits, 1, slots + 2, jobs[1], until),
            );
            let ratio = three / one;
            assert!((2.8..3.2).contains(&ratio), "{slots} slots, {jobs:?}: {ratio}");
            assert!(three + one > 295.0 * f64::from(u32::try_from(slots).unwrap()), "slots stood empty");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_one_queue_leaves_the_others_use_and_it_is_not_made_up_for() {
        let permits = FairQueue::new(2, [1, 9].into_iter());
        let alone = backlog(&permits, 0, 4, SHORT, after(100)).await;
        assert!(alone > 198.0, "only {alone} of 200 seconds");
        let until = after(100);
        let (light, heavy) =
            tokio::join!(backlog(&permits, 0, 4, SHORT, until), backlog(&permits, 1, 4, SHORT, until));
        assert!((19.0..21.0).contains(&light) && heavy > 177.0, "{light} and {heavy}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_backlog_of_long_jobs_delays_another_queue_by_one_of_them_at_most() {
        let permits = FairQueue::new(1, [1, 1].into_iter());
        let until = after(100);
        let backlog = tokio::spawn({
            let permits = permits.clone();
            async move { backlog(&permits, 0, 50, LONG, until).await }
        });
        tokio::time::sleep(Duration::from_secs(50)).await;
        let begin = Instant::now();
        drop(permits.take(1).await);
        assert!(begin.elapsed() <= LONG, "{:?}", begin.elapsed());
        backlog.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn who_gives_up_waiting_takes_no_place_with_him() {
        let permits = FairQueue::new(1, [1].into_iter());
        let held = permits.take(0).await.unwrap();
        for _ in 0..3 {
            assert!(tokio::time::timeout(SHORT, permits.take(0)).await.is_err());
        }
        // Handed over in the moment in which it is given up.
        let mut late = Box::pin(permits.take(0));
        assert!(futures_util::poll!(&mut late).is_pending());
        drop(held);
        drop(late);
        assert!(tokio::time::timeout(SHORT, permits.take(0)).await.unwrap().is_some());
    }
}
