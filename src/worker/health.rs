//! What a worker says of itself when it is asked: whether it takes jobs, and whether it works at all.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::amqp::LinkState;
use crate::worker::in_flight::{InFlightJobs, STUCK_AFTER};
use crate::worker::outgoing::Outgoing;

/// How often the runtime shows that it works.
const BEAT: Duration = Duration::from_secs(1);
/// A runtime that did not for this long does not: a worker that only has much to do is not as late.
const NO_BEAT: Duration = Duration::from_secs(30);

/// The state of a worker, for whoever asks. Cheap to clone; made before the worker starts.
#[derive(Clone, Debug, Default)]
pub struct Health(Arc<OnceLock<Watched>>);

#[derive(Debug)]
struct Watched {
    consuming: watch::Receiver<LinkState>,
    publishing: watch::Receiver<LinkState>,
    drain: CancellationToken,
    running: InFlightJobs,
    outgoing: Outgoing,
    times: Mutex<Times>,
}

#[derive(Debug)]
struct Times {
    /// When the runtime last showed that it works.
    beat: Instant,
    /// When there was last a reason for jobs to wait that is not ours.
    excused: Instant,
}

impl Watched {
    fn times(&self) -> std::sync::MutexGuard<'_, Times> {
        self.times.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Health {
    /// Says "starting" until the worker has begun.
    pub fn new() -> Self {
        Self::default()
    }

    pub(super) fn watch(
        &self,
        consuming: watch::Receiver<LinkState>,
        publishing: watch::Receiver<LinkState>,
        drain: CancellationToken,
        running: InFlightJobs,
        outgoing: Outgoing,
    ) {
        // A second worker under one health would be a mistake of the caller's; the first one is told of.
        let times = Mutex::new(Times { beat: Instant::now(), excused: Instant::now() });
        let _ = self.0.set(Watched { consuming, publishing, drain, running, outgoing, times });
    }

    /// Shows that the runtime works for as long as it is polled. Does not return.
    pub(super) async fn pulse(self) {
        let mut beats = tokio::time::interval(BEAT);
        loop {
            beats.tick().await;
            if let Some(watched) = self.0.get() {
                watched.times().beat = Instant::now();
                watched.outgoing.stuck();
            }
        }
    }

    /// There is a worker to tell of.
    pub(super) fn has_begun(&self) -> bool {
        self.0.get().is_some()
    }

    /// It takes no more jobs, and ends when those that it has are over.
    pub(super) fn is_draining(&self) -> bool {
        self.0.get().is_some_and(|watched| watched.drain.is_cancelled())
    }

    /// Whether it takes jobs now.
    ///
    /// # Errors
    /// Why not, in words for a person.
    pub fn ready(&self) -> Result<(), String> {
        let Some(watched) = self.0.get() else { return Err("starting".into()) };
        if watched.drain.is_cancelled() {
            return Err("draining: no more jobs are taken".into());
        }
        for (what, state) in [("jobs", &watched.consuming), ("results", &watched.publishing)] {
            match *state.borrow() {
                LinkState::Up => {}
                LinkState::Down => return Err(format!("not connected to the broker for {what}")),
                LinkState::Blocked => {
                    return Err(format!(
                        "the broker takes no {what} at the moment: is it short of memory or disk?"
                    ));
                }
            }
        }
        if let Some(stuck) = watched.outgoing.stuck() {
            return Err(format!(
                "all deliveries wait for the broker to confirm their results, the first for {} s; the log says why",
                stuck.as_secs()
            ));
        }
        Ok(())
    }

    /// Whether it works at all. Never a matter of the broker's: a restart of the worker would not mend that.
    ///
    /// # Errors
    /// What is stuck, in words for a person.
    pub fn alive(&self) -> Result<(), String> {
        let Some(watched) = self.0.get() else { return Ok(()) };
        let now = Instant::now();
        let mut times = watched.times();
        // Without a way out for results no job starts.
        if *watched.publishing.borrow() != LinkState::Up {
            times.excused = now;
        }
        let silent = now.saturating_duration_since(times.beat);
        if silent > NO_BEAT {
            return Err(format!("stuck: nothing has been done for {} s", silent.as_secs()));
        }
        if let Some(id) = watched.running.overdue(now) {
            return Err(format!("stuck: job {id} should have ended minutes ago"));
        }
        match watched.running.still_since(now).map(|since| now - since.max(times.excused)) {
            Some(still) if still > STUCK_AFTER => {
                Err(format!("stuck: jobs wait, and none has started for {} s", still.as_secs()))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_is_connected_both_ways_unblocked_and_not_draining() {
        let health = Health::new();
        assert_eq!(health.ready(), Err("starting".into()));
        assert_eq!(health.alive(), Ok(()));
        let (consuming, publishing) =
            (watch::Sender::new(LinkState::Down), watch::Sender::new(LinkState::Down));
        let drain = CancellationToken::new();
        let outgoing = Outgoing::new(&[2], None);
        let (consumes, publishes) = (consuming.subscribe(), publishing.subscribe());
        health.watch(consumes, publishes, drain.clone(), InFlightJobs::default(), outgoing);
        for (jobs, results, ready) in [
            (LinkState::Down, LinkState::Up, false),
            (LinkState::Up, LinkState::Down, false),
            (LinkState::Up, LinkState::Blocked, false),
            (LinkState::Up, LinkState::Up, true),
        ] {
            consuming.send_replace(jobs);
            publishing.send_replace(results);
            assert_eq!(health.ready().is_ok(), ready, "{jobs:?} {results:?}");
            assert_eq!(health.alive(), Ok(()), "liveness is no matter of the broker's");
        }
        drain.cancel();
        assert!(health.ready().is_err());
        assert_eq!(health.alive(), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn not_ready_while_every_delivery_waits_for_a_confirm() {
        let health = Health::new();
        let (state, outgoing) = (watch::Sender::new(LinkState::Up), Outgoing::new(&[2], None));
        let (drain, running) = (CancellationToken::new(), InFlightJobs::default());
        health.watch(state.subscribe(), state.subscribe(), drain, running, outgoing.clone());
        let first = outgoing.enter(0);
        tokio::time::advance(2 * STUCK_AFTER).await;
        assert_eq!(health.ready(), Ok(()), "there is room for another one");
        let second = outgoing.enter(0);
        assert_eq!(health.ready(), Ok(()), "for no time yet");
        tokio::time::advance(Duration::from_secs(6)).await;
        assert!(health.ready().is_err_and(|why| why.contains("the first for 6 s")));
        drop(first);
        assert_eq!(health.ready(), Ok(()));
        drop(second);
    }

    #[tokio::test(start_paused = true)]
    async fn alive_is_a_runtime_that_works_and_jobs_that_move() {
        let health = Health::new();
        let (publishing, running) = (watch::Sender::new(LinkState::Up), InFlightJobs::default());
        let state = publishing.subscribe();
        let outgoing = Outgoing::new(&[2], None);
        health.watch(state.clone(), state, CancellationToken::new(), running.clone(), outgoing);
        let later = |time| tokio::time::advance(time);

        later(NO_BEAT + BEAT).await;
        assert_eq!(health.alive(), Err("stuck: nothing has been done for 31 s".into()));
        let pulse = tokio::spawn(health.clone().pulse());
        tokio::task::yield_now().await;
        assert_eq!(health.alive(), Ok(()));

        // Without a connection jobs may wait for ever, and afterwards as long as any others.
        let waits = running.enter("waits", None, &CancellationToken::new()).ok();
        publishing.send_replace(LinkState::Blocked);
        tokio::time::sleep(2 * STUCK_AFTER).await;
        assert_eq!(health.alive(), Ok(()));
        publishing.send_replace(LinkState::Up);
        assert_eq!(health.alive(), Ok(()));
        tokio::time::sleep(STUCK_AFTER + BEAT).await;
        assert_eq!(health.alive(), Err("stuck: jobs wait, and none has started for 121 s".into()));
        drop(waits);
        assert_eq!(health.alive(), Ok(()));
        pulse.abort();
    }
}
