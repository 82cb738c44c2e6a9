//! `bench`: how long jobs take, and how many go through in a second.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde::Serialize;
use serde_json::json;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::cli::args::ConfigArgs;
use crate::cli::job_args::Asked;
use crate::cli::local;
use crate::cli::remote::{self, Arrived, Over};
use crate::cli::signals::Signals;
use crate::cli::{End, output, runtime};
use crate::config::Config;
use crate::job::Status;
use crate::sandbox::Sandbox;

const EXAMPLES: &str = "\
Examples:
  sandpiper bench --local -n 200
  sandpiper bench --local --pause 10                  jobs that come one by one to a machine at rest
  sandpiper bench --local --concurrency 4 --json
  sandpiper bench --local --cold                      a new interpreter for every job
  sandpiper bench job.py -n 1000 --concurrency 16     through the broker, to a running worker

Times run from a job being accepted to everything of it being dead; through the broker, from
publishing it to reading its result. One job goes before the measurement and is not counted.
Exit code 1 when any job did not succeed.";

/// Measure jobs: p50, p90, p99, the longest, and jobs/s
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// Program to run; print(1) where none is given
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,

    /// Run the jobs in this process, without a broker; else they go through it, and a worker must run
    #[arg(long)]
    local: bool,

    /// How many jobs are measured
    #[arg(long, short = 'n', value_name = "N", default_value = "100")]
    jobs: NonZeroUsize,

    /// How many of them run at one time
    #[arg(long, value_name = "N", default_value = "1")]
    concurrency: NonZeroUsize,

    /// With --local: start a new interpreter for every job
    #[arg(long, requires = "local")]
    cold: bool,

    /// With --local: wait so long before each job, until all that the one before left to do is done
    #[arg(long, value_name = "MS", requires = "local", conflicts_with = "concurrency")]
    pause: Option<u64>,

    /// Print the figures as one JSON document
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    config: ConfigArgs,
}

/// The figures. Their names are part of the command line's contract.
#[derive(Debug, Serialize)]
struct Figures {
    jobs: usize,
    jobs_per_s: f64,
    p50_ms: f64,
    p90_ms: f64,
    p99_ms: f64,
    max_ms: f64,
    /// How many jobs ended with each status.
    statuses: BTreeMap<&'static str, usize>,
}

/// What is measured of one job.
struct Sample {
    took: Duration,
    status: Status,
    verdict: String,
}

pub(super) fn run(args: &Args) -> anyhow::Result<End> {
    let mut config = args.config.load()?;
    // Each job that runs at one time needs an identity of its own.
    config.worker.slots = args.concurrency.get();
    config.environments.values_mut().for_each(|environment| environment.warm &= !args.cold);
    let code = match &args.file {
        Some(file) => {
            std::fs::read_to_string(file).with_context(|| format!("failed to read {}", file.display()))?
        }
        None => "print(1)".into(),
    };
    let body = serde_json::to_vec(&json!({ "code": code })).context("failed to write the job as JSON")?;
    let (samples, wall) = if args.local {
        let sandbox = local::start(&config)?;
        runtime()?.block_on(measure(body, config, sandbox, args))?
    } else {
        runtime()?.block_on(measure_remote(body, &config, args))?
    };
    let figures = figures(&samples, wall);
    if args.json {
        output::print_json(&figures)?;
    } else {
        output::print(table(&figures).as_bytes())?;
    }
    let Some(bad) = samples.iter().find(|sample| sample.status != Status::Succeeded) else {
        return Ok(End::Done);
    };
    output::complain(&format!("not every job succeeded; one of them: {}", bad.verdict));
    Ok(End::Unsatisfied)
}

async fn measure(
    body: Vec<u8>,
    config: Config,
    sandbox: Sandbox,
    args: &Args,
) -> anyhow::Result<(Vec<Sample>, Duration)> {
    let runner = Arc::new(Runner { sandbox, config, body, stop: CancellationToken::new() });
    Signals::listen()?.cancel(runner.stop.clone());
    for (name, environment) in &runner.config.environments {
        if environment.warm
            && let Err(why) = runner.sandbox.warmed_up(name).await
        {
            bail!("environment {name} does not start warm: {why}; --cold measures cold starts");
        }
    }
    runner.one().await;
    let mut samples = Vec::with_capacity(args.jobs.get());
    let mut running = JoinSet::new();
    let mut left = args.jobs.get();
    let begin = Instant::now();
    while samples.len() < args.jobs.get() {
        if let Some(pause) = args.pause {
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
        while left > 0 && running.len() < args.concurrency.get() {
            left -= 1;
            let runner = Arc::clone(&runner);
            running.spawn(async move { runner.one().await });
        }
        let sample = running.join_next().await.context("no job is running")?;
        samples.push(sample.context("a job's task ended early")?);
        if runner.stop.is_cancelled() {
            while running.join_next().await.is_some() {}
            bail!("interrupted after {} of {} jobs", samples.len(), args.jobs);
        }
    }
    runner.sandbox.close().await;
    Ok((samples, begin.elapsed()))
}

/// A worker that does not answer for so long does not answer at all.
const PATIENCE: Duration = Duration::from_secs(60);

async fn measure_remote(
    body: Vec<u8>,
    config: &Config,
    args: &Args,
) -> anyhow::Result<(Vec<Sample>, Duration)> {
    let client = remote::connect_for_many(config).await?;
    let mut samples = Vec::with_capacity(args.jobs.get());
    let first = remote::collect(&client, remote::repeated(&body, 1), 1, PATIENCE, |_| Ok(())).await?;
    complete(first, 0, args)?;
    let begin = Instant::now();
    let jobs = remote::repeated(&body, args.jobs.get());
    let over = remote::collect(&client, jobs, args.concurrency.get(), PATIENCE, |arrived| {
        let Arrived { reply, took, .. } = arrived;
        samples.push(Sample { took, status: reply.status, verdict: output::verdict(&reply) });
        Ok(())
    });
    let over = over.await?;
    let wall = begin.elapsed();
    complete(over, samples.len(), args)?;
    client.close().await;
    Ok((samples, wall))
}

fn complete(over: Over, results: usize, args: &Args) -> anyhow::Result<()> {
    match over {
        Over::Complete => Ok(()),
        Over::Silent(_) => bail!(
            "no result for {} s, after {results} of {} jobs: is a worker running?",
            PATIENCE.as_secs(),
            args.jobs
        ),
        Over::Interrupted(_) => bail!("interrupted after {results} of {} jobs", args.jobs),
    }
}

/// All that one measured job needs.
struct Runner {
    sandbox: Sandbox,
    config: Config,
    body: Vec<u8>,
    stop: CancellationToken,
}

impl Runner {
    async fn one(&self) -> Sample {
        let begin = Instant::now();
        let reply = match local::admit(Asked::Body(self.body.clone()), &self.config) {
            Ok(job) => local::run(&self.sandbox, job, &self.stop).await,
            Err(refused) => *refused,
        };
        Sample { took: begin.elapsed(), status: reply.status, verdict: output::verdict(&reply) }
    }
}

fn figures(samples: &[Sample], wall: Duration) -> Figures {
    let mut sorted: Vec<Duration> = samples.iter().map(|sample| sample.took).collect();
    sorted.sort_unstable();
    let mut statuses = BTreeMap::new();
    for sample in samples {
        *statuses.entry(sample.status.as_str()).or_default() += 1;
    }
    Figures {
        jobs: samples.len(),
        jobs_per_s: per_second(samples.len(), wall),
        p50_ms: ms(percentile(&sorted, 50)),
        p90_ms: ms(percentile(&sorted, 90)),
        p99_ms: ms(percentile(&sorted, 99)),
        max_ms: ms(percentile(&sorted, 100)),
        statuses,
    }
}

/// The smallest sample that `percent` of all samples do not exceed (nearest rank).
fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or_default()
}

/// Milliseconds, to the microsecond.
#[expect(clippy::cast_precision_loss, reason = "a time of 2^53 us is 285 years")]
fn ms(time: Duration) -> f64 {
    time.as_micros() as f64 / 1_000.0
}

/// To the hundredth.
#[expect(clippy::cast_precision_loss, reason = "nobody measures 2^53 jobs")]
fn per_second(jobs: usize, wall: Duration) -> f64 {
    (jobs as f64 / wall.as_secs_f64() * 100.0).round() / 100.0
}

fn table(figures: &Figures) -> String {
    let Figures { jobs, jobs_per_s, p50_ms, p90_ms, p99_ms, max_ms, statuses } = figures;
    let statuses: Vec<String> = statuses.iter().map(|(status, count)| format!("{count} {status}")).collect();
    format!(
        "jobs      {jobs} ({})\njobs/s    {jobs_per_s:.1}\np50       {p50_ms:.2} ms\np90       {p90_ms:.2} ms\n\
         p99       {p99_ms:.2} ms\nmax       {max_ms:.2} ms\n",
        statuses.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sorted(count: u64) -> Vec<Duration> {
        (1..=count).map(Duration::from_millis).collect()
    }

    #[test]
    fn percentiles_are_nearest_ranks() {
        let hundred = sorted(100);
        assert_eq!(percentile(&hundred, 50), Duration::from_millis(50));
        assert_eq!(percentile(&hundred, 99), Duration::from_millis(99));
        assert_eq!(percentile(&hundred, 100), Duration::from_millis(100));
        let three = sorted(3);
        assert_eq!(percentile(&three, 50), Duration::from_millis(2));
        assert_eq!(percentile(&three, 90), Duration::from_millis(3));
        assert_eq!(percentile(&sorted(1), 50), Duration::from_millis(1));
    }

    #[test]
    fn the_json_has_the_names_that_scripts_read() {
        let sample = |status, ms| Sample { took: Duration::from_millis(ms), status, verdict: String::new() };
        let samples = [sample(Status::Succeeded, 4), sample(Status::Timeout, 2)];
        let shown = serde_json::to_value(figures(&samples, Duration::from_millis(500))).ok();
        let expected = json!({
            "jobs": 2, "jobs_per_s": 4.0, "p50_ms": 2.0, "p90_ms": 4.0, "p99_ms": 4.0, "max_ms": 4.0,
            "statuses": { "succeeded": 1, "timeout": 1 },
        });
        assert_eq!(shown, Some(expected));
    }
}
