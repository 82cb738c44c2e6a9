//! Every metric with its name, its help and its buckets, and the registry that holds them.

use prometheus::{
    Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry,
};

use super::UNKNOWN_SYSCALL;
use super::ages::Ages;
use super::labels::{Body, BoundedLabel, DeadReason, Label, Published, Role, Settled, Start};
use crate::job::Status;

/// The metrics themselves, and what they are made of when somebody looks.
#[derive(Debug)]
pub(super) struct Inner {
    pub(super) registry: Registry,
    pub(super) queues: BoundedLabel,
    pub(super) environments: BoundedLabel,
    pub(super) syscalls: BoundedLabel,
    pub(super) runs: Ages,
    pub(super) deliveries: Ages,
    pub(super) publishes: Ages,
    pub(super) oldest_running: Gauge,
    pub(super) oldest_delivery: Gauge,
    pub(super) oldest_publish: Gauge,
    pub(super) publishing_stuck: IntGauge,
    pub(super) ready: IntGauge,
    pub(super) stuck: IntGauge,
    pub(super) received: IntCounterVec,
    pub(super) redelivered: IntCounterVec,
    pub(super) completed: IntCounterVec,
    pub(super) settled: IntCounterVec,
    pub(super) dead_lettered: IntCounterVec,
    pub(super) timeouts: IntCounter,
    pub(super) syscall_kills: IntCounterVec,
    pub(super) syscalls_refused: IntCounterVec,
    pub(super) published: IntCounterVec,
    pub(super) redirected: IntCounter,
    pub(super) connection_up: IntGaugeVec,
    pub(super) connection_blocked: IntGaugeVec,
    pub(super) reconnects: IntCounterVec,
    pub(super) draining: IntGauge,
    pub(super) slots: IntGauge,
    pub(super) running: IntGauge,
    pub(super) standby: IntGaugeVec,
    pub(super) zygote_up: IntGaugeVec,
    pub(super) zygote_restarts: IntCounterVec,
    pub(super) zygote_failures: IntCounterVec,
    pub(super) start_failures: IntCounterVec,
    pub(super) queue_wait: Histogram,
    pub(super) start: HistogramVec,
    pub(super) run: HistogramVec,
    pub(super) total: Histogram,
    pub(super) confirm: Histogram,
    pub(super) body_bytes: HistogramVec,
    pub(super) memory_peak: Histogram,
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

    fn seconds(&self, name: &str, help: &str) -> prometheus::Result<Gauge> {
        self.add(Gauge::new(name, help))
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> prometheus::Result<Histogram> {
        self.add(Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec())))
    }

    fn histograms(
        &self,
        name: &str,
        help: &str,
        buckets: &[f64],
        labels: &[&str],
    ) -> prometheus::Result<HistogramVec> {
        self.add(HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), labels))
    }

    fn histograms_of<L: Label>(
        &self,
        name: &str,
        help: &str,
        buckets: &[f64],
        label: &str,
    ) -> prometheus::Result<HistogramVec> {
        let histograms = self.histograms(name, help, buckets, &[label])?;
        for value in L::ALL {
            histograms.with_label_values(&[value.label()]);
        }
        Ok(histograms)
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

/// Far more queues and environments than a worker has.
const QUEUES: usize = 64;
const ENVIRONMENTS: usize = 64;

/// More system calls than a kernel's table has.
const SYSCALLS: usize = 512;

/// What is beyond these.
const OTHER: &str = "other";

pub(super) fn build(registry: Registry) -> prometheus::Result<Inner> {
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

    Ok(Inner {
        queues: BoundedLabel::new(QUEUES, OTHER),
        environments: BoundedLabel::new(ENVIRONMENTS, OTHER),
        syscalls: BoundedLabel::new(SYSCALLS, UNKNOWN_SYSCALL),
        runs: Ages::default(),
        deliveries: Ages::default(),
        publishes: Ages::default(),
        oldest_running: shelf.seconds(
            "sandpiper_oldest_running_job_seconds",
            "How long the job that started first of those running has run; 0 while none runs",
        )?,
        oldest_delivery: shelf.seconds(
            "sandpiper_oldest_delivery_seconds",
            "How long the oldest delivery has been held without being given back; 0 while none is held",
        )?,
        oldest_publish: shelf.seconds(
            "sandpiper_oldest_publish_seconds",
            "How long the result that came first of those not yet confirmed has waited for that; 0 while none does",
        )?,
        publishing_stuck: shelf.gauge(
            "sandpiper_publishing_stuck",
            "1 while every delivery that may be held waits for its result to be confirmed, so that no job starts",
        )?,
        ready: shelf.gauge("sandpiper_ready", "1 while the worker takes jobs, as /readyz says")?,
        stuck: shelf.gauge("sandpiper_stuck", "1 while the worker stands still, as /healthz says")?,
        redelivered: shelf.counters(
            "sandpiper_jobs_redelivered_total",
            "Deliveries of messages that had been delivered before",
            "queue",
        )?,
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
            "Results stored in the results queue because their reply queue was gone or did not take them",
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
        zygote_up: shelf.gauges(
            "sandpiper_zygote_up",
            "1 while jobs of a warm environment can start warm; absent for one that starts every job cold",
            "environment",
        )?,
        zygote_failures: shelf.counters(
            "sandpiper_zygote_start_failures_total",
            "Times that an environment's zygote could not be started, such as for a failing import",
            "environment",
        )?,
        start_failures: shelf.counters(
            "sandpiper_job_start_failures_total",
            "Times that a job's process could not be started",
            "environment",
        )?,
        queue_wait: shelf.histogram(
            "sandpiper_job_queue_wait_seconds",
            "From publishing a job, by its timestamp, to its delivery",
            WAIT_SECONDS,
        )?,
        start: shelf.histograms_of::<Start>(
            "sandpiper_job_start_seconds",
            "From taking a job on to handing over its code",
            SECONDS,
            "start",
        )?,
        run: shelf.histograms(
            "sandpiper_job_run_seconds",
            "From handing over the code to everything of the job being dead",
            SECONDS,
            &["environment", "status"],
        )?,
        total: shelf.histogram("sandpiper_job_total_seconds", "From delivery to settlement", SECONDS)?,
        confirm: shelf.histogram(
            "sandpiper_publish_confirm_seconds",
            "From publishing a result to its confirm",
            SECONDS,
        )?,
        body_bytes: shelf.histograms_of::<Body>(
            "sandpiper_message_body_bytes",
            "Size of message bodies",
            BODY_BYTES,
            "body",
        )?,
        memory_peak: shelf.histogram(
            "sandpiper_job_memory_peak_bytes",
            "Peak memory of a job, without page cache",
            MEMORY_BYTES,
        )?,
        registry,
    })
}
