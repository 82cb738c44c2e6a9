//! What the worker counts, in a registry of its own, under the names that dashboards and alerts use.
//!
//! Labels are bounded: every one is an enum here, a name from the configuration or a system call's name as
//! the kernel's table has it; and where somebody finds more of these than there are, the rest is one. Every child of an enum is there from the start, at 0, so that a rate over the
//! first event is not lost. Who counts what is up to the callers; nothing here decides anything.

mod ages;
#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod documented;
mod labels;
mod registry;

use std::sync::Arc;
use std::time::Duration;

use prometheus::{Encoder, IntGauge, Registry, TextEncoder};

use ages::Age;
pub use labels::{Body, DeadReason, Published, Role, Settled, Start};
use registry::{Inner, build};

use crate::job::{Outcome, Status};

/// Why the registry could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MetricsError {
    /// Two metrics under one name, or a name that is none.
    #[error("register a metric")]
    Register(#[source] prometheus::Error),
}

/// The label of a system call whose name is not known: a kernel that grants no listener.
const UNKNOWN_SYSCALL: &str = "unknown";

/// All metrics of one worker. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Inner>);

impl Metrics {
    /// Registers everything, each enum's children at 0.
    ///
    /// # Errors
    /// [`MetricsError::Register`] where a name is used twice.
    pub fn new() -> Result<Self, MetricsError> {
        build(Registry::new()).map(|inner| Self(Arc::new(inner))).map_err(MetricsError::Register)
    }

    /// Everything, in the text format that Prometheus reads.
    pub fn render(&self) -> String {
        self.0.oldest_running.set(self.0.runs.oldest().as_secs_f64());
        self.0.oldest_delivery.set(self.0.deliveries.oldest().as_secs_f64());
        self.0.oldest_publish.set(self.0.publishes.oldest().as_secs_f64());
        let mut text = Vec::new();
        if let Err(error) = TextEncoder::new().encode(&self.0.registry.gather(), &mut text) {
            tracing::warn!(%error, "metrics could not be written down");
        }
        String::from_utf8_lossy(&text).into_owned()
    }

    /// What the worker says of itself at this moment.
    pub fn state(&self, ready: bool, alive: bool) {
        self.0.ready.set(i64::from(ready));
        self.0.stuck.set(i64::from(!alive));
    }

    /// Jobs come from `queue`: its children show at 0 before anything came.
    pub fn queue(&self, queue: &str) {
        let queue = self.0.queues.bounded(queue);
        self.0.received.with_label_values(&[queue]);
        self.0.redelivered.with_label_values(&[queue]);
    }

    /// A delivery came from `queue`, with a body of so many bytes; again, where it had been delivered before.
    pub fn received(&self, queue: &str, bytes: usize, again: bool) {
        let queue = self.0.queues.bounded(queue);
        self.0.received.with_label_values(&[queue]).inc();
        if again {
            self.0.redelivered.with_label_values(&[queue]).inc();
        }
        self.body(Body::Job, bytes);
    }

    /// A delivery is held, and keeps the broker waiting, until the guard is dropped.
    pub fn holding(&self) -> Holding {
        Holding { _age: self.0.deliveries.begin() }
    }

    /// A result waits for its confirm until the guard is dropped.
    pub fn publishing(&self) -> Holding {
        Holding { _age: self.0.publishes.begin() }
    }

    /// Whether every delivery that may be held waits for a confirm.
    pub fn publishing_stuck(&self, stuck: bool) {
        self.0.publishing_stuck.set(i64::from(stuck));
    }

    /// A body of so many bytes went its way.
    pub fn body(&self, body: Body, bytes: usize) {
        #[expect(
            clippy::cast_precision_loss,
            reason = "a histogram of sizes; bodies are far below 2^52 bytes"
        )]
        self.0.body_bytes.with_label_values(&[body.as_str()]).observe(bytes as f64);
    }

    /// A job came to its end. Counts the status and all that the outcome tells of calls, times and memory.
    pub fn completed(&self, outcome: &Outcome) {
        let inner = &*self.0;
        inner.completed.with_label_values(&[outcome.status.as_str()]).inc();
        match outcome.status {
            Status::Timeout => inner.timeouts.inc(),
            Status::SyscallKilled => {
                let name = outcome.syscall.as_deref().unwrap_or(UNKNOWN_SYSCALL);
                let name = labels::syscall(&inner.syscalls, name);
                inner.syscall_kills.with_label_values(&[name]).inc();
            }
            _ => {}
        }
        for blocked in &outcome.blocked_syscalls {
            let name = labels::syscall(&inner.syscalls, &blocked.syscall);
            inner.syscalls_refused.with_label_values(&[name]).inc_by(blocked.count);
        }
        if let Some(usage) = outcome.usage {
            #[expect(clippy::cast_precision_loss, reason = "a histogram of sizes far below 2^52 bytes")]
            inner.memory_peak.observe(usage.memory_peak_bytes as f64);
        }
    }

    /// A job of `environment` went through the sandbox: how it started, where it did, and how long it ran.
    pub fn ran(&self, environment: &str, outcome: &Outcome) {
        let inner = &*self.0;
        let environment = inner.environments.bounded(environment);
        if let Some(took) = outcome.start {
            let start = if outcome.warm { Start::Warm } else { Start::Cold };
            inner.start.with_label_values(&[start.as_str()]).observe(took.as_secs_f64());
        }
        if let Some(run) = outcome.run {
            let status = outcome.status.as_str();
            inner.run.with_label_values(&[environment, status]).observe(run.as_secs_f64());
        }
        if outcome.status == Status::WorkerError && outcome.started_at.is_none() {
            inner.start_failures.with_label_values(&[environment]).inc();
        }
    }

    /// A job waited so long in its queue.
    pub fn queue_wait(&self, wait: Duration) {
        self.0.queue_wait.observe(wait.as_secs_f64());
    }

    /// From delivery to settlement.
    pub fn total(&self, total: Duration) {
        self.0.total.observe(total.as_secs_f64());
    }

    /// A delivery was settled.
    pub fn settled(&self, action: Settled) {
        self.0.settled.with_label_values(&[action.as_str()]).inc();
    }

    /// A message went to the dead queue.
    pub fn dead_lettered(&self, reason: DeadReason) {
        self.0.dead_lettered.with_label_values(&[reason.as_str()]).inc();
    }

    /// One attempt to publish ended like this.
    pub fn published(&self, outcome: Published) {
        self.0.published.with_label_values(&[outcome.as_str()]).inc();
    }

    /// From publishing to the broker's confirm.
    pub fn confirm(&self, took: Duration) {
        self.0.confirm.observe(took.as_secs_f64());
    }

    /// A result went to the results queue because its own reply queue was gone or did not take it.
    pub fn redirected(&self) {
        self.0.redirected.inc();
    }

    /// A connection came up or went down.
    pub fn connection_up(&self, role: Role, up: bool) {
        self.0.connection_up.with_label_values(&[role.as_str()]).set(i64::from(up));
    }

    /// The broker blocked or unblocked a connection.
    pub fn connection_blocked(&self, role: Role, blocked: bool) {
        self.0.connection_blocked.with_label_values(&[role.as_str()]).set(i64::from(blocked));
    }

    /// A connection was lost, or did not come up, and is tried anew.
    pub fn reconnect(&self, role: Role) {
        self.0.reconnects.with_label_values(&[role.as_str()]).inc();
    }

    /// The worker takes no more jobs on.
    pub fn draining(&self) {
        self.0.draining.set(1);
    }

    /// How many jobs may run at one time.
    pub fn slots(&self, slots: usize) {
        self.0.slots.set(i64::try_from(slots).unwrap_or(i64::MAX));
    }

    /// One more job runs, until the guard is dropped.
    pub fn running(&self) -> Running {
        self.0.running.inc();
        Running { count: self.0.running.clone(), _age: self.0.runs.begin() }
    }

    /// An environment exists: its children show at 0 before anything happened in it.
    pub fn environment(&self, name: &str, warm: bool) {
        let inner = &*self.0;
        let name = inner.environments.bounded(name);
        let never_ran = [Status::Rejected, Status::Expired];
        for status in Status::ALL.into_iter().filter(|status| !never_ran.contains(status)) {
            inner.run.with_label_values(&[name, status.as_str()]);
        }
        inner.start_failures.with_label_values(&[name]);
        inner.standby.with_label_values(&[name]);
        inner.zygote_restarts.with_label_values(&[name]);
        inner.zygote_failures.with_label_values(&[name]);
        if warm {
            inner.zygote_up.with_label_values(&[name]);
        }
    }

    /// So many children of `environment` stand ready for a job.
    pub fn standby(&self, environment: &str, children: usize) {
        let children = i64::try_from(children).unwrap_or(i64::MAX);
        self.0.standby.with_label_values(&[self.0.environments.bounded(environment)]).set(children);
    }

    /// The zygote of `environment` is there, or could not be started.
    pub fn zygote(&self, environment: &str, up: bool) {
        let environment = self.0.environments.bounded(environment);
        self.0.zygote_up.with_label_values(&[environment]).set(i64::from(up));
        if !up {
            self.0.zygote_failures.with_label_values(&[environment]).inc();
        }
    }

    /// The zygote of `environment` was started again.
    pub fn zygote_restarted(&self, environment: &str) {
        self.0.zygote_restarts.with_label_values(&[self.0.environments.bounded(environment)]).inc();
    }
}

/// A running job, counted for as long as this lives.
#[derive(Debug)]
#[must_use = "the job counts as running only while this lives"]
pub struct Running {
    count: IntGauge,
    _age: Age,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.count.dec();
    }
}

/// A delivery that is held, for as long as this lives.
#[derive(Debug)]
#[must_use = "the delivery counts as held only while this lives"]
pub struct Holding {
    _age: Age,
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;

    #[test]
    fn every_child_of_an_enum_shows_at_zero_from_the_start() {
        let text = Metrics::new().unwrap().render();
        for status in Status::ALL {
            let line = format!("sandpiper_jobs_completed_total{{status=\"{}\"}} 0", status.as_str());
            assert!(text.contains(&line), "{line} is missing");
        }
        for line in [
            "sandpiper_deliveries_settled_total{action=\"lost\"} 0",
            "sandpiper_jobs_dead_lettered_total{reason=\"poison\"} 0",
            "sandpiper_job_timeouts_total 0",
            "sandpiper_syscall_kills_total{syscall=\"unknown\"} 0",
            "sandpiper_results_published_total{outcome=\"returned\"} 0",
            "sandpiper_connection_up{role=\"publish\"} 0",
            "sandpiper_build_info{version=",
            "process_open_fds ",
        ] {
            assert!(text.contains(line), "{line} is missing from\n{text}");
        }
    }

    #[test]
    fn an_outcome_is_counted_once_under_what_it_was() {
        let metrics = Metrics::new().unwrap();
        let mut outcome = Outcome::not_run(Status::SyscallKilled, "ptrace is forbidden");
        outcome.syscall = Some("ptrace".into());
        metrics.completed(&outcome);
        let text = metrics.render();
        assert!(text.contains("sandpiper_jobs_completed_total{status=\"syscall_killed\"} 1"));
        assert!(text.contains("sandpiper_syscall_kills_total{syscall=\"ptrace\"} 1"));
        assert!(text.contains("sandpiper_job_timeouts_total 0"));
    }

    #[test]
    fn nobody_can_make_the_metrics_grow_without_bound() {
        let metrics = Metrics::new().unwrap();
        let flood = |from: usize| {
            for at in from..from + 3_000 {
                let mut outcome = Outcome::not_run(Status::SyscallKilled, "forbidden");
                // What a job can choose: numbers without a name, of any ABI; names are the kernel's.
                outcome.syscall = Some(format!("{}{at}", ["syscall_", "x32:", "i386:", "name"][at % 4]));
                outcome.blocked_syscalls = vec![crate::job::BlockedSyscall {
                    syscall: format!("{}{at}", ["syscall_", "foreign:", "call"][at % 3]),
                    count: 1,
                }];
                outcome.run = Some(Duration::ZERO);
                metrics.completed(&outcome);
                metrics.ran(&format!("environment{at}"), &outcome);
                metrics.received(&format!("queue{at}"), 1, true);
            }
            let text = metrics.render();
            (text.lines().count(), text)
        };
        let (before, _) = flood(0);
        let (after, text) = flood(3_000);
        assert_eq!(before, after, "still growing");
        for gone in ["syscall_", "i386:", "x32:", "foreign:"] {
            assert!(!text.contains(&format!("syscall=\"{gone}")), "{gone} is a label");
        }
        for line in [
            "sandpiper_jobs_received_total{queue=\"other\"} ",
            "sandpiper_job_run_seconds_count{environment=\"other\",status=\"syscall_killed\"} ",
        ] {
            assert!(text.contains(line), "{line} is missing");
        }
        let kills = text.lines().filter(|line| line.starts_with("sandpiper_syscall_kills_total{"));
        let killed: f64 = kills.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum();
        assert_eq!(killed, 6_000.0, "each is counted, under whatever name");
    }

    #[test]
    fn the_oldest_counts_for_as_long_as_it_is_there() {
        let metrics = Metrics::new().unwrap();
        let oldest = || {
            let text = metrics.render();
            let line =
                text.lines().find(|line| line.starts_with("sandpiper_oldest_delivery_seconds ")).unwrap();
            line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()
        };
        assert_eq!(oldest(), 0.0);
        let first = metrics.holding();
        let between = std::time::Instant::now();
        let second = metrics.holding();
        let so_far = between.elapsed().as_secs_f64();
        assert!(oldest() >= so_far, "the first counts");
        drop(first);
        assert!(oldest() <= between.elapsed().as_secs_f64(), "the second counts");
        drop(second);
        assert_eq!(oldest(), 0.0);
    }

    #[test]
    fn a_job_counts_as_running_for_as_long_as_its_guard_lives() {
        let metrics = Metrics::new().unwrap();
        let guard = metrics.running();
        assert!(metrics.render().contains("sandpiper_jobs_running 1"));
        drop(guard);
        assert!(metrics.render().contains("sandpiper_jobs_running 0"));
    }
}
