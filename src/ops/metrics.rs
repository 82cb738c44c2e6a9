//! What the worker counts, in a registry of its own, under the names that dashboards and alerts use.
//!
//! Labels are bounded: every one is an enum here, a name from the configuration or a system call's name as
//! the kernel's table has it. Every child of an enum is there from the start, at 0, so that a rate over the
//! first event is not lost. Who counts what is up to the callers; nothing here decides anything.

use std::sync::Arc;
use std::time::Duration;

use prometheus::{
    Encoder, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

use crate::job::{Outcome, Status};

/// Why the registry could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MetricsError {
    /// Two metrics under one name, or a name that is none.
    #[error("register a metric")]
    Register(#[source] prometheus::Error),
}

/// A closed set of label values.
trait Label: Copy + 'static {
    const ALL: &'static [Self];
    fn label(self) -> &'static str;
}

macro_rules! label {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident => $label:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($(#[$variant_doc])* $variant,)+ }
        impl $name {
            /// The label's value.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $label,)+ }
            }
        }
        impl Label for $name {
            const ALL: &'static [Self] = &[$(Self::$variant,)+];
            fn label(self) -> &'static str {
                self.as_str()
            }
        }
    };
}

label! {
    /// How a delivery was given back to the broker.
    Settled {
        /// Acked after its reply was confirmed.
        Acked => "acked",
        /// Given back, to be delivered again.
        Requeued => "requeued",
        /// Stored in the dead queue, then acked.
        DeadLettered => "dead_lettered",
        /// The channel was gone: the broker delivers it again.
        Lost => "lost",
    }
}

label! {
    /// Why a message went to the dead queue.
    DeadReason {
        /// Not a job at all.
        Malformed => "malformed",
        /// Delivered so often that the broker would drop it next.
        Poison => "poison",
    }
}

label! {
    /// What became of one attempt to publish.
    Published {
        /// The broker took it on.
        Confirmed => "confirmed",
        /// Its queue does not exist.
        Returned => "returned",
        /// The broker refused it.
        Nacked => "nacked",
        /// No confirm in time.
        TimedOut => "timed_out",
        /// Its requester no longer listens, and nobody else could read it.
        Dropped => "dropped",
        /// The channel or connection broke.
        Failed => "failed",
    }
}

label! {
    /// What a broker connection is for.
    Role {
        /// Takes jobs on and acks them.
        Consume => "consume",
        /// Publishes results.
        Publish => "publish",
    }
}

label! {
    /// Which way a body goes.
    Body {
        /// A job.
        Job => "job",
        /// A result.
        Result => "result",
    }
}

/// The label of a system call whose name is not known: a kernel that grants no listener.
const UNKNOWN_SYSCALL: &str = "unknown";

/// All metrics of one worker. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    registry: Registry,
    received: IntCounterVec,
    completed: IntCounterVec,
    settled: IntCounterVec,
    dead_lettered: IntCounterVec,
    timeouts: IntCounter,
    syscall_kills: IntCounterVec,
    syscalls_refused: IntCounterVec,
    published: IntCounterVec,
    redirected: IntCounter,
    connection_up: IntGaugeVec,
    connection_blocked: IntGaugeVec,
    reconnects: IntCounterVec,
    draining: IntGauge,
    slots: IntGauge,
    running: IntGauge,
    standby: IntGaugeVec,
    zygote_restarts: IntCounterVec,
    queue_wait: Histogram,
    start: Histogram,
    run: Histogram,
    total: Histogram,
    confirm: Histogram,
    body_bytes: HistogramVec,
    memory_peak: Histogram,
}

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
        self.0.body_bytes.with_label_values(&[body.label()]).observe(bytes as f64);
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
        self.0.settled.with_label_values(&[action.label()]).inc();
    }

    /// A message went to the dead queue.
    pub fn dead_lettered(&self, reason: DeadReason) {
        self.0.dead_lettered.with_label_values(&[reason.label()]).inc();
    }

    /// One attempt to publish ended like this.
    pub fn published(&self, outcome: Published) {
        self.0.published.with_label_values(&[outcome.label()]).inc();
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
        self.0.connection_up.with_label_values(&[role.label()]).set(i64::from(up));
    }

    /// The broker blocked or unblocked a connection.
    pub fn connection_blocked(&self, role: Role, blocked: bool) {
        self.0.connection_blocked.with_label_values(&[role.label()]).set(i64::from(blocked));
    }

    /// A connection was lost, or did not come up, and is tried anew.
    pub fn reconnect(&self, role: Role) {
        self.0.reconnects.with_label_values(&[role.label()]).inc();
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

/// Registers metrics one by one.
struct Shelf(Registry);

impl Shelf {
    fn add<C: prometheus::core::Collector + Clone + 'static>(
        &self,
        metric: prometheus::Result<C>,
    ) -> prometheus::Result<C> {
        let metric = metric?;
        self.0.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    fn counter(&self, name: &str, help: &str) -> prometheus::Result<IntCounter> {
        self.add(IntCounter::new(name, help))
    }

    fn counters(&self, name: &str, help: &str, label: &str) -> prometheus::Result<IntCounterVec> {
        self.add(IntCounterVec::new(Opts::new(name, help), &[label]))
    }

    fn counters_of<L: Label>(
        &self,
        name: &str,
        help: &str,
        label: &str,
    ) -> prometheus::Result<IntCounterVec> {
        let counters = self.counters(name, help, label)?;
        for value in L::ALL {
            counters.with_label_values(&[value.label()]);
        }
        Ok(counters)
    }

    fn gauge(&self, name: &str, help: &str) -> prometheus::Result<IntGauge> {
        self.add(IntGauge::new(name, help))
    }

    fn gauges(&self, name: &str, help: &str, label: &str) -> prometheus::Result<IntGaugeVec> {
        self.add(IntGaugeVec::new(Opts::new(name, help), &[label]))
    }

    fn gauges_of<L: Label>(&self, name: &str, help: &str, label: &str) -> prometheus::Result<IntGaugeVec> {
        let gauges = self.gauges(name, help, label)?;
        for value in L::ALL {
            gauges.with_label_values(&[value.label()]);
        }
        Ok(gauges)
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> prometheus::Result<Histogram> {
        self.add(Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec())))
    }
}

/// Seconds, from a warm start (about 1 ms) to the longest job (5 minutes).
const SECONDS: &[f64] = &[
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
];

/// Seconds in a queue: nobody counts hours in milliseconds.
const WAIT_SECONDS: &[f64] = &[0.001, 0.01, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0];

/// Bytes, from 256 to 16 MiB.
const BODY_BYTES: &[f64] =
    &[256.0, 1024.0, 4096.0, 16_384.0, 65_536.0, 262_144.0, 1_048_576.0, 4_194_304.0, 16_777_216.0];

/// Bytes, from 4 MiB to 1 GiB.
const MEMORY_BYTES: &[f64] = &[
    4_194_304.0,
    8_388_608.0,
    16_777_216.0,
    33_554_432.0,
    67_108_864.0,
    134_217_728.0,
    268_435_456.0,
    536_870_912.0,
    1_073_741_824.0,
];

fn build(registry: Registry) -> prometheus::Result<Inner> {
    let shelf = Shelf(registry.clone());
    let build_info = shelf.gauges("sandpiper_build_info", "The worker's version; always 1", "version")?;
    build_info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
    registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;

    let completed = shelf.counters("sandpiper_jobs_completed_total", "Jobs that came to an end", "status")?;
    for status in Status::ALL {
        completed.with_label_values(&[status.as_str()]);
    }
    let syscall_kills = shelf.counters(
        "sandpiper_syscall_kills_total",
        "Jobs ended for a forbidden system call",
        "syscall",
    )?;
    let syscalls_refused = shelf.counters(
        "sandpiper_syscalls_refused_total",
        "System calls refused with an errno",
        "syscall",
    )?;
    for vec in [&syscall_kills, &syscalls_refused] {
        vec.with_label_values(&[UNKNOWN_SYSCALL]);
    }
    let body_bytes = shelf.add(HistogramVec::new(
        HistogramOpts::new("sandpiper_message_body_bytes", "Size of message bodies")
            .buckets(BODY_BYTES.to_vec()),
        &["body"],
    ))?;
    for body in Body::ALL {
        body_bytes.with_label_values(&[body.label()]);
    }

    Ok(Inner {
        received: shelf.counters(
            "sandpiper_jobs_received_total",
            "Deliveries taken from a queue",
            "queue",
        )?,
        completed,
        settled: shelf.counters_of::<Settled>(
            "sandpiper_deliveries_settled_total",
            "Deliveries given back to the broker",
            "action",
        )?,
        dead_lettered: shelf.counters_of::<DeadReason>(
            "sandpiper_jobs_dead_lettered_total",
            "Messages stored in the dead queue",
            "reason",
        )?,
        timeouts: shelf
            .counter("sandpiper_job_timeouts_total", "Jobs ended because their wall time was over")?,
        syscall_kills,
        syscalls_refused,
        published: shelf.counters_of::<Published>(
            "sandpiper_results_published_total",
            "Attempts to publish a result",
            "outcome",
        )?,
        redirected: shelf.counter(
            "sandpiper_results_redirected_total",
            "Results stored in the results queue because their reply queue was gone",
        )?,
        connection_up: shelf.gauges_of::<Role>(
            "sandpiper_connection_up",
            "1 while the broker connection is up",
            "role",
        )?,
        connection_blocked: shelf.gauges_of::<Role>(
            "sandpiper_connection_blocked",
            "1 while the broker takes no messages on the connection",
            "role",
        )?,
        reconnects: shelf.counters_of::<Role>(
            "sandpiper_connection_reconnects_total",
            "Attempts to connect to the broker after the first",
            "role",
        )?,
        draining: shelf.gauge("sandpiper_draining", "1 once the worker takes no more jobs on")?,
        slots: shelf.gauge("sandpiper_slots", "Jobs that may run at one time")?,
        running: shelf.gauge("sandpiper_jobs_running", "Jobs that run now")?,
        standby: shelf.gauges(
            "sandpiper_standby_children",
            "Warm processes ready for a job",
            "environment",
        )?,
        zygote_restarts: shelf.counters(
            "sandpiper_zygote_restarts_total",
            "Times that an environment's zygote was started again",
            "environment",
        )?,
        queue_wait: shelf.histogram(
            "sandpiper_job_queue_wait_seconds",
            "From publishing a job, by its timestamp, to its delivery",
            WAIT_SECONDS,
        )?,
        start: shelf.histogram(
            "sandpiper_job_start_seconds",
            "From taking a job on to handing over its code",
            SECONDS,
        )?,
        run: shelf.histogram(
            "sandpiper_job_run_seconds",
            "From handing over the code to everything of the job being dead",
            SECONDS,
        )?,
        total: shelf.histogram("sandpiper_job_total_seconds", "From delivery to settlement", SECONDS)?,
        confirm: shelf.histogram(
            "sandpiper_publish_confirm_seconds",
            "From publishing a result to its confirm",
            SECONDS,
        )?,
        body_bytes,
        memory_peak: shelf.histogram(
            "sandpiper_job_memory_peak_bytes",
            "Peak memory of a job",
            MEMORY_BYTES,
        )?,
        registry,
    })
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
