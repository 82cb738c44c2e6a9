//! What the worker counts, in a registry of its own, under the names that dashboards and alerts use.
//!
//! Labels are bounded: every one is an enum here, a name from the configuration or a system call's name as
//! the kernel's table has it. Every child of an enum is there from the start, at 0, so that a rate over the
//! first event is not lost. Who counts what is up to the callers; nothing here decides anything.

mod labels;
mod registry;

use std::sync::Arc;
use std::time::Duration;

use prometheus::{Encoder, IntGauge, Registry, TextEncoder};

pub use labels::{Body, DeadReason, Published, Role, Settled};
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
        let mut text = Vec::new();
        if let Err(error) = TextEncoder::new().encode(&self.0.registry.gather(), &mut text) {
            tracing::warn!(%error, "metrics could not be written down");
        }
        String::from_utf8_lossy(&text).into_owned()
    }

    /// A queue is taken from: its child shows at 0 before anything came.
    pub fn queue(&self, name: &str) {
        self.0.received.with_label_values(&[name]);
    }

    /// A delivery came from `queue`, with a body of so many bytes.
    pub fn received(&self, queue: &str, bytes: usize) {
        self.0.received.with_label_values(&[queue]).inc();
        self.body(Body::Job, bytes);
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
                let syscall = outcome.syscall.as_deref().unwrap_or(UNKNOWN_SYSCALL);
                inner.syscall_kills.with_label_values(&[syscall]).inc();
            }
            _ => {}
        }
        for blocked in &outcome.blocked_syscalls {
            inner.syscalls_refused.with_label_values(&[blocked.syscall.as_str()]).inc_by(blocked.count);
        }
        if let Some(start) = outcome.start {
            inner.start.observe(start.as_secs_f64());
        }
        if let Some(run) = outcome.run {
            inner.run.observe(run.as_secs_f64());
        }
        if let Some(usage) = outcome.usage {
            #[expect(clippy::cast_precision_loss, reason = "a histogram of sizes far below 2^52 bytes")]
            inner.memory_peak.observe(usage.memory_peak_bytes as f64);
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

    /// A result went to the results queue because its own reply queue was gone.
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
        Running(self.0.running.clone())
    }

    /// An environment exists: its children show at 0 before anything happened in it.
    pub fn environment(&self, name: &str) {
        self.0.standby.with_label_values(&[name]);
        self.0.zygote_restarts.with_label_values(&[name]);
    }

    /// So many children of `environment` stand ready for a job.
    pub fn standby(&self, environment: &str, children: usize) {
        let children = i64::try_from(children).unwrap_or(i64::MAX);
        self.0.standby.with_label_values(&[environment]).set(children);
    }

    /// The zygote of `environment` was started again.
    pub fn zygote_restarted(&self, environment: &str) {
        self.0.zygote_restarts.with_label_values(&[environment]).inc();
    }
}

/// A running job, counted for as long as this lives.
#[derive(Debug)]
#[must_use = "the job counts as running only while this lives"]
pub struct Running(IntGauge);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.dec();
    }
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
    fn a_job_counts_as_running_for_as_long_as_its_guard_lives() {
        let metrics = Metrics::new().unwrap();
        let guard = metrics.running();
        assert!(metrics.render().contains("sandpiper_jobs_running 1"));
        drop(guard);
        assert!(metrics.render().contains("sandpiper_jobs_running 0"));
    }
}
