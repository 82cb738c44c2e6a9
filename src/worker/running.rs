//! Which jobs are here, so that they can be cancelled, and found when they never end.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::amqp::Held;
use crate::job::Status;
use crate::worker::pipeline::{Detour, decided};

/// A cancellation is kept this long for jobs that are still in the queue.
const REMEMBERED: Duration = Duration::from_secs(600);

/// And at most so many of them: they come from anyone who may publish.
pub const REMEMBERED_MAX: usize = 1_024;

/// Past its time limit a job is killed at once; one that is still here this much later is stuck. And a job that waits
/// gets a slot as soon as one is free; where none does for this long, though none is in use, they are stuck.
pub(super) const STUCK: Duration = Duration::from_secs(120);

/// All jobs that this worker holds. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Running(Arc<Mutex<Jobs>>);

#[derive(Debug, Default)]
struct Jobs {
    next: u64,
    /// By the order in which they came.
    here: BTreeMap<u64, Job>,
    /// When a job last came, started or went.
    moved: Option<Instant>,
    cancelled: VecDeque<(Instant, String)>,
}

#[derive(Debug)]
struct Job {
    id: String,
    stop: CancellationToken,
    since: jiff::Timestamp,
    due: Option<Instant>,
}

/// One job's place in the list, until it is dropped.
#[derive(Debug)]
pub(super) struct Entry {
    running: Running,
    key: u64,
    stop: CancellationToken,
}

impl Running {
    /// Enters a job that `kill` ends, too. Not one that was cancelled while it waited in the queue.
    pub(super) fn enter(&self, id: &str, kill: &CancellationToken) -> Result<Entry, Detour> {
        let stop = kill.child_token();
        let mut jobs = self.lock();
        jobs.forget();
        if jobs.cancelled.iter().any(|(_, cancelled)| cancelled == id) {
            return Err(decided(Status::Cancelled, "cancelled on request, before it ran"));
        }
        let key = jobs.next;
        jobs.next += 1;
        jobs.moved = Some(Instant::now());
        jobs.here.insert(
            key,
            Job { id: id.to_owned(), stop: stop.clone(), since: jiff::Timestamp::now(), due: None },
        );
        Ok(Entry { running: self.clone(), key, stop })
    }

    /// Ends every job of that id, now or when it comes.
    pub(super) fn cancel(&self, id: &str) {
        let mut jobs = self.lock();
        jobs.here.values().filter(|job| job.id == id).for_each(|job| job.stop.cancel());
        jobs.forget();
        jobs.cancelled.retain(|(_, cancelled)| cancelled != id);
        if jobs.cancelled.len() == REMEMBERED_MAX {
            jobs.cancelled.pop_front();
        }
        jobs.cancelled.push_back((Instant::now(), id.to_owned()));
    }

    /// All of them, in the order in which they came.
    pub(super) fn list(&self) -> Vec<Held> {
        let held = |job: &Job| Held { id: job.id.clone(), since: job.since, running: job.due.is_some() };
        self.lock().here.values().map(held).collect()
    }

    /// The id of a job that should have ended long ago.
    pub(super) fn overdue(&self, now: Instant) -> Option<String> {
        let overdue = |job: &&Job| job.due.is_some_and(|due| due + STUCK < now);
        self.lock().here.values().find(overdue).map(|job| job.id.clone())
    }

    /// Jobs wait, and none runs that they could wait for: since when nothing has moved.
    pub(super) fn still_since(&self, now: Instant) -> Option<Instant> {
        let jobs = self.lock();
        let waits = jobs.here.values().any(|job| job.due.is_none());
        let runs = jobs.here.values().any(|job| job.due.is_some_and(|due| due >= now));
        jobs.moved.filter(|_| waits && !runs)
    }

    fn lock(&self) -> MutexGuard<'_, Jobs> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Jobs {
    fn forget(&mut self) {
        while self.cancelled.front().is_some_and(|(when, _)| when.elapsed() > REMEMBERED) {
            self.cancelled.pop_front();
        }
    }
}

impl Entry {
    /// Cancelled when the job shall end.
    pub(super) fn stop(&self) -> &CancellationToken {
        &self.stop
    }

    /// The job starts now and has to be over within `time`.
    pub(super) fn due_in(&self, time: Duration) {
        let mut jobs = self.running.lock();
        let now = Instant::now();
        jobs.moved = Some(now);
        if let Some(job) = jobs.here.get_mut(&self.key) {
            job.due = Some(now + time);
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut jobs = self.running.lock();
        jobs.moved = Some(Instant::now());
        jobs.here.remove(&self.key);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;

    #[test]
    fn a_cancelled_job_stops_here_and_does_not_start_later() {
        let (running, kill) = (Running::default(), CancellationToken::new());
        let one = running.enter("one", &kill).unwrap();
        let two = running.enter("two", &kill).unwrap();
        two.due_in(Duration::from_secs(1));
        let held: Vec<_> = running.list().into_iter().map(|job| (job.id, job.running)).collect();
        assert_eq!(held, [("one".to_owned(), false), ("two".to_owned(), true)]);
        running.cancel("one");
        assert!(one.stop().is_cancelled() && !two.stop().is_cancelled());
        assert!(matches!(running.enter("one", &kill), Err(Detour::Decided(_))));
        kill.cancel();
        assert!(two.stop().is_cancelled());
    }

    #[test]
    fn cancellations_are_bounded() {
        let running = Running::default();
        for at in 0..3 * REMEMBERED_MAX {
            running.cancel(&at.to_string());
        }
        assert_eq!(running.lock().cancelled.len(), REMEMBERED_MAX);
        assert!(running.enter("0", &CancellationToken::new()).is_ok());
    }

    #[test]
    fn only_a_job_far_past_its_time_is_stuck_and_only_while_it_is_here() {
        let running = Running::default();
        let entry = running.enter("slow", &CancellationToken::new()).unwrap();
        let now = Instant::now();
        assert_eq!(running.overdue(now + Duration::from_secs(9_999)), None, "it has not started");
        entry.due_in(Duration::from_secs(5));
        assert_eq!(running.overdue(now + Duration::from_secs(6)), None);
        let late = now + Duration::from_secs(6) + STUCK;
        assert_eq!(running.overdue(late).as_deref(), Some("slow"));
        drop(entry);
        assert_eq!(running.overdue(late), None);
    }

    #[tokio::test(start_paused = true)]
    async fn jobs_stand_still_that_wait_for_none() {
        let (running, kill) = (Running::default(), CancellationToken::new());
        assert_eq!(running.still_since(Instant::now()), None, "there are none");
        let waits = running.enter("waits", &kill).unwrap();
        let came = Instant::now();
        assert_eq!(running.still_since(came), Some(came));
        let runs = running.enter("runs", &kill).unwrap();
        runs.due_in(Duration::from_secs(60));
        tokio::time::advance(Duration::from_secs(59)).await;
        assert_eq!(running.still_since(Instant::now()), None, "it waits for the one that runs");
        drop(runs);
        assert_eq!(running.still_since(Instant::now()), Some(Instant::now()));
        drop(waits);
        assert_eq!(running.still_since(Instant::now()), None);
    }
}
