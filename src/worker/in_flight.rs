//! The jobs that this worker holds, so that they can be cancelled, listed, and found when they never end.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::amqp::JobInfo;
use crate::job::Status;
use crate::worker::disposition::{NotRun, not_run};

/// A cancellation is kept this long for jobs that are still in the queue.
const CANCELLATION_TTL: Duration = Duration::from_secs(600);

/// And at most so many of them: they come from anyone who may publish.
pub const MAX_CANCELLATIONS: usize = 1_024;

/// Past its time limit a job is killed at once; one that is still listed this much later is stuck. And a job that waits
/// gets a slot as soon as one is free; if none does for this long, though none is in use, they are stuck.
pub(super) const STUCK_AFTER: Duration = Duration::from_secs(120);

/// All of them. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct InFlightJobs(Arc<Mutex<Jobs>>);

#[derive(Debug, Default)]
struct Jobs {
    next: u64,
    /// By the order in which they came.
    entries: BTreeMap<u64, Job>,
    /// When a job last came, started or went.
    moved: Option<Instant>,
    cancelled: VecDeque<Cancelled>,
}

/// A cancellation of jobs that may still come.
#[derive(Debug)]
struct Cancelled {
    when: Instant,
    id: String,
    asker: Asker,
}

/// Who asks about jobs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Asker {
    /// As the broker vouches for it; none where the message names no user.
    pub(super) user: Option<String>,
    /// The operator lets it see and cancel every job.
    pub(super) operator: bool,
}

impl Asker {
    /// Whether a job of this user is the asker's business. One without a user is anybody's who can ask at all.
    fn may(&self, owner: Option<&str>) -> bool {
        owner.is_none() || self.operator || self.user.as_deref() == owner
    }
}

#[derive(Debug)]
struct Job {
    id: String,
    /// Who published it, as the broker vouches for it.
    owner: Option<String>,
    stop: CancellationToken,
    since: jiff::Timestamp,
    due: Option<Instant>,
}

/// A job is listed as long as this lives.
#[derive(Debug)]
pub(super) struct InFlightJob {
    running: InFlightJobs,
    key: u64,
    stop: CancellationToken,
}

impl InFlightJobs {
    /// Enters a job that `kill` ends, too. Not one that was cancelled while it waited in the queue.
    pub(super) fn enter(
        &self,
        id: &str,
        owner: Option<&str>,
        kill: &CancellationToken,
    ) -> Result<InFlightJob, NotRun> {
        let stop = kill.child_token();
        let mut jobs = self.lock();
        jobs.forget();
        if let Some(cancelled) =
            jobs.cancelled.iter().find(|cancelled| cancelled.id == id && cancelled.asker.may(owner))
        {
            tracing::info!(id, cancelled.asker.user, "a job comes that was cancelled before");
            return Err(not_run(Status::Cancelled, "cancelled on request, before it ran"));
        }
        let key = jobs.next;
        jobs.next += 1;
        jobs.moved = Some(Instant::now());
        let job = Job {
            id: id.to_owned(),
            owner: owner.map(str::to_owned),
            stop: stop.clone(),
            since: jiff::Timestamp::now(),
            due: None,
        };
        jobs.entries.insert(key, job);
        Ok(InFlightJob { running: self.clone(), key, stop })
    }

    /// Ends every job of that id which is the asker's business, now or when it comes. Returns how many are listed.
    pub(super) fn cancel(&self, id: &str, asker: &Asker) -> usize {
        let mut jobs = self.lock();
        let meant = jobs.entries.values().filter(|job| job.id == id && asker.may(job.owner.as_deref()));
        let count = meant.inspect(|job| job.stop.cancel()).count();
        jobs.forget();
        jobs.cancelled.retain(|cancelled| cancelled.id != id || cancelled.asker != *asker);
        if jobs.cancelled.len() == MAX_CANCELLATIONS {
            jobs.cancelled.pop_front();
        }
        jobs.cancelled.push_back(Cancelled { when: Instant::now(), id: id.to_owned(), asker: asker.clone() });
        count
    }

    /// Those that are the asker's business, in the order in which they came.
    pub(super) fn list(&self, asker: &Asker) -> Vec<JobInfo> {
        let held = |job: &Job| JobInfo { id: job.id.clone(), since: job.since, running: job.due.is_some() };
        let jobs = self.lock();
        jobs.entries.values().filter(|job| asker.may(job.owner.as_deref())).map(held).collect()
    }

    /// The id of a job that should have ended long ago.
    pub(super) fn overdue(&self, now: Instant) -> Option<String> {
        let overdue = |job: &&Job| job.due.is_some_and(|due| due + STUCK_AFTER < now);
        self.lock().entries.values().find(overdue).map(|job| job.id.clone())
    }

    /// Jobs wait, and none runs that they could wait for: since when nothing has moved.
    pub(super) fn still_since(&self, now: Instant) -> Option<Instant> {
        let jobs = self.lock();
        let waits = jobs.entries.values().any(|job| job.due.is_none());
        let runs = jobs.entries.values().any(|job| job.due.is_some_and(|due| due >= now));
        jobs.moved.filter(|_| waits && !runs)
    }

    fn lock(&self) -> MutexGuard<'_, Jobs> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Jobs {
    fn forget(&mut self) {
        while self.cancelled.front().is_some_and(|cancelled| cancelled.when.elapsed() > CANCELLATION_TTL) {
            self.cancelled.pop_front();
        }
    }
}

impl InFlightJob {
    /// Cancelled when the job shall end.
    pub(super) fn stop(&self) -> &CancellationToken {
        &self.stop
    }

    /// The job starts now and has to be over within `time`.
    pub(super) fn due_in(&self, time: Duration) {
        let mut jobs = self.running.lock();
        let now = Instant::now();
        jobs.moved = Some(now);
        if let Some(job) = jobs.entries.get_mut(&self.key) {
            job.due = Some(now + time);
        }
    }
}

impl Drop for InFlightJob {
    fn drop(&mut self) {
        let mut jobs = self.running.lock();
        jobs.moved = Some(Instant::now());
        jobs.entries.remove(&self.key);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;

    #[test]
    fn a_cancelled_job_stops_here_and_does_not_start_later() {
        let (running, kill) = (InFlightJobs::default(), CancellationToken::new());
        let one = running.enter("one", None, &kill).unwrap();
        let two = running.enter("two", None, &kill).unwrap();
        two.due_in(Duration::from_secs(1));
        let held: Vec<_> =
            running.list(&Asker::default()).into_iter().map(|job| (job.id, job.running)).collect();
        assert_eq!(held, [("one".to_owned(), false), ("two".to_owned(), true)]);
        assert_eq!(running.cancel("one", &Asker::default()), 1);
        assert!(one.stop().is_cancelled() && !two.stop().is_cancelled());
        assert!(matches!(running.enter("one", None, &kill), Err(NotRun::Answer(_))));
        kill.cancel();
        assert!(two.stop().is_cancelled());
    }

    #[test]
    fn a_job_with_a_user_is_that_users_and_the_operators() {
        let (running, kill) = (InFlightJobs::default(), CancellationToken::new());
        let user = |name: &str| Asker { user: Some(name.into()), operator: false };
        let (nobody, operator) = (Asker::default(), Asker { operator: true, ..user("operator") });
        let alices = running.enter("job", Some("alice"), &kill).unwrap();
        let anybodys = running.enter("other", None, &kill).unwrap();
        let seen = |asker: &Asker| running.list(asker).len();
        assert_eq!(
            [seen(&nobody), seen(&user("mallory")), seen(&user("alice")), seen(&operator)],
            [1, 1, 2, 2]
        );
        for stranger in [&nobody, &user("mallory")] {
            assert_eq!(running.cancel("job", stranger), 0);
            assert!(!alices.stop().is_cancelled());
            assert!(running.enter("job", Some("alice"), &kill).is_ok(), "not when it comes later, either");
        }
        assert_eq!(running.cancel("other", &user("mallory")), 1);
        assert!(anybodys.stop().is_cancelled());
        assert_eq!(running.cancel("job", &operator), 1);
        assert!(alices.stop().is_cancelled());
        assert!(running.enter("job", Some("alice"), &kill).is_err());
    }

    #[test]
    fn cancellations_are_bounded() {
        let running = InFlightJobs::default();
        for at in 0..3 * MAX_CANCELLATIONS {
            assert_eq!(running.cancel(&at.to_string(), &Asker::default()), 0);
        }
        assert_eq!(running.lock().cancelled.len(), MAX_CANCELLATIONS);
        assert!(running.enter("0", None, &CancellationToken::new()).is_ok());
    }

    #[test]
    fn only_a_job_far_past_its_time_is_stuck_and_only_while_it_is_here() {
        let running = InFlightJobs::default();
        let entry = running.enter("slow", None, &CancellationToken::new()).unwrap();
        let now = Instant::now();
        assert_eq!(running.overdue(now + Duration::from_secs(9_999)), None, "it has not started");
        entry.due_in(Duration::from_secs(5));
        assert_eq!(running.overdue(now + Duration::from_secs(6)), None);
        let late = now + Duration::from_secs(6) + STUCK_AFTER;
        assert_eq!(running.overdue(late).as_deref(), Some("slow"));
        drop(entry);
        assert_eq!(running.overdue(late), None);
    }

    #[tokio::test(start_paused = true)]
    async fn jobs_stand_still_that_wait_for_none() {
        let (running, kill) = (InFlightJobs::default(), CancellationToken::new());
        assert_eq!(running.still_since(Instant::now()), None, "there are none");
        let waits = running.enter("waits", None, &kill).unwrap();
        let came = Instant::now();
        assert_eq!(running.still_since(came), Some(came));
        let runs = running.enter("runs", None, &kill).unwrap();
        runs.due_in(Duration::from_secs(60));
        tokio::time::advance(Duration::from_secs(59)).await;
        assert_eq!(running.still_since(Instant::now()), None, "it waits for the one that runs");
        drop(runs);
        assert_eq!(running.still_since(Instant::now()), Some(Instant::now()));
        drop(waits);
        assert_eq!(running.still_since(Instant::now()), None);
    }
}
