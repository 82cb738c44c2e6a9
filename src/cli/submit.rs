//! `submit`: jobs to the queue, results back; one like `exec`, or many as a batch.

use std::io::{BufRead, BufReader};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::mpsc;

use crate::amqp::client::Client;
use crate::cli::args::ConfigArgs;
use crate::cli::job_args::{Asked, JobArgs};
use crate::cli::remote::{self, Arrived, Over};
use crate::cli::{End, output, runtime};
use crate::config::Config;
use crate::job::{Chunk, Reply, Stream};

const EXAMPLES: &str = "\
Examples:
  echo 'print(6 * 7)' | sandpiper submit -
  sandpiper submit job.py --timeout-ms 2000 --json
  sandpiper submit long.py --stream             show what it prints while it runs
  sandpiper submit --batch jobs.ndjson > results.ndjson
  sandpiper submit job.py --no-wait             the result goes to the results queue

The broker is amqp.url of the configuration, best set as SANDPIPER_AMQP__URL. A worker must run, or
have run, so that the queues are there.

Exit code: as of exec. With --batch: 0 when every job has a result, whatever its status, else 1.";

/// Publish a job and wait for its result
///
/// Prints what the job printed and exits with its exit code, like exec, but the job runs on a worker.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// Publish every line of this file as a job (- for standard input), print each result as a line when it comes
    #[arg(long, value_name = "FILE|-", conflicts_with_all = ["file", "job", "JobFlags"])]
    batch: Option<PathBuf>,

    /// Print the result object: one JSON document on standard output, nothing else there
    #[arg(long)]
    json: bool,

    /// Write the returned files below this directory
    #[arg(long, value_name = "DIR", conflicts_with = "batch")]
    artifacts_to: Option<PathBuf>,

    /// Show what the job prints while it runs
    #[arg(long, conflicts_with_all = ["batch", "no_wait", "json"])]
    stream: bool,

    /// Publish to this one of amqp.queues
    #[arg(long, value_name = "NAME")]
    queue: Option<String>,

    /// Only publish; results go to the results queue
    #[arg(long)]
    no_wait: bool,

    /// Give up when no result has come for so long
    #[arg(long, value_name = "MS", default_value_t = 300_000)]
    wait_ms: u64,

    /// With --batch: how many jobs may be ahead of their results
    #[arg(long, value_name = "N", default_value = "1000")]
    window: NonZeroUsize,

    #[command(flatten)]
    job: JobArgs,

    #[command(flatten)]
    config: ConfigArgs,
}

pub(super) fn run(args: &Args) -> anyhow::Result<End> {
    let mut config = args.config.load()?;
    if let Some(queue) = &args.queue {
        let names: Vec<&str> = config.amqp.queues.iter().map(|queue| &*queue.name).collect();
        if !names.contains(&queue.as_str()) {
            bail!("--queue: {queue:?} is none of the configured queues: {}", names.join(", "));
        }
        config.amqp.jobs_queue.clone_from(queue);
    }
    let runtime = runtime()?;
    let end = match &args.batch {
        Some(file) => {
            let jobs = lines(file, config.amqp.max_body_bytes)?;
            runtime.block_on(batch(jobs, args, &config))
        }
        None => match args.job.read(config.amqp.max_body_bytes)? {
            Asked::Body(body) => runtime.block_on(single(body, args, &config)),
            Asked::Refused(refusal) => bail!("{refusal}"),
        },
    };
    // A thread that still reads its input is not waited for.
    runtime.shutdown_background();
    end
}

async fn single(body: Vec<u8>, args: &Args, config: &Config) -> anyhow::Result<End> {
    let client = remote::connect(config).await?;
    if args.no_wait {
        leave(&client, body).await?;
        client.close().await;
        return Ok(End::Done);
    }
    let body = if args.stream { streaming(body) } else { body };
    let mut result: Option<Arrived> = None;
    let mut live = Live { to_terminal: !args.json, ..Live::default() };
    let over = remote::collect_live(
        &client,
        remote::repeated(&body, 1),
        1,
        patience(args),
        |arrived| {
            result = Some(arrived);
            Ok(())
        },
        |chunk| live.show(&chunk),
    );
    let over = over.await?;
    client.close().await;
    let Some(Arrived { reply, .. }) = result else {
        bail!("{}", missing(over, args));
    };
    if let Some(directory) = &args.artifacts_to {
        output::save(&reply, directory)?;
    }
    if args.json {
        output::print_json(&reply)?;
        return Ok(End::Printed(reply.status));
    }
    output::show_rest(&reply, live.shown)
}

/// The job with `stream` set. What is no job is left as it is, for the worker to say so.
fn streaming(body: Vec<u8>) -> Vec<u8> {
    let Ok(mut job) = serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(&body) else {
        return body;
    };
    job.insert("stream".into(), true.into());
    serde_json::to_vec(&job).unwrap_or(body)
}

/// What has been printed of a job that still runs.
#[derive(Default)]
struct Live {
    to_terminal: bool,
    next: u64,
    /// Bytes of standard output, and of standard error.
    shown: [usize; 2],
}

impl Live {
    /// A piece that came twice, or out of turn because the job was delivered again, is not shown: the result has
    /// all that is missing.
    fn show(&mut self, chunk: &Chunk) -> anyhow::Result<()> {
        if chunk.seq != self.next || !self.to_terminal {
            return Ok(());
        }
        self.next += 1;
        let bytes = chunk.bytes().context("output is not what it says it is")?;
        let [stdout, stderr] = &mut self.shown;
        match chunk.stream {
            Stream::Stdout => {
                *stdout += bytes.len();
                output::print(&bytes)
            }
            Stream::Stderr => {
                *stderr += bytes.len();
                output::print_error(&bytes);
                Ok(())
            }
        }
    }
}

async fn batch(Batch { mut jobs, refused }: Batch, args: &Args, config: &Config) -> anyhow::Result<End> {
    let client = remote::connect(config).await?;
    if args.no_wait {
        while let Some(job) = jobs.recv().await {
            leave(&client, job).await?;
        }
        client.close().await;
        return Ok(ended(&refused));
    }
    // Draws on standard error, and only where that is a terminal.
    let bar = ProgressBar::no_length().with_style(
        ProgressStyle::with_template("{pos} results, {per_sec}, {elapsed}")
            .context("the progress bar's template")?,
    );
    let mut results = 0_usize;
    let over = remote::collect(&client, jobs, args.window.get(), patience(args), |arrived| {
        results += 1;
        bar.inc(1);
        bar.suspend(|| line(&arrived.body, &arrived.reply))
    });
    let over = over.await;
    bar.finish_and_clear();
    client.close().await;
    match over.with_context(|| format!("stopped after {results} results"))? {
        Over::Complete => Ok(ended(&refused)),
        over => {
            output::complain(&format!("{results} results came; {}", missing(over, args)));
            Ok(End::Unsatisfied)
        }
    }
}

async fn leave(client: &Client, body: Vec<u8>) -> anyhow::Result<()> {
    let id = uuid::Uuid::now_v7().to_string();
    client.submit_and_leave(body, &id).await.context("failed to hand a job over")
}

fn patience(args: &Args) -> Duration {
    Duration::from_millis(args.wait_ms)
}

fn missing(over: Over, args: &Args) -> String {
    match over {
        Over::Complete => "no result came".into(),
        Over::Silent(count) => format!(
            "{count} outstanding, and none came for {} ms (--wait-ms): is a worker running?",
            args.wait_ms
        ),
        Over::Interrupted(count) => format!(
            "interrupted with {count} outstanding: the jobs stay in the queue, their results go to the \
             results queue"
        ),
    }
}

/// The result as it came, on a line of its own.
fn line(body: &[u8], reply: &Reply) -> anyhow::Result<()> {
    if body.contains(&b'\n') {
        return output::print_json(reply);
    }
    output::print(&[body, b"\n"].concat())
}

/// Jobs as they are read, one a line.
struct Batch {
    jobs: mpsc::Receiver<Vec<u8>>,
    /// Lines that are no job, or could not be read. They were told of and have no result.
    refused: Arc<AtomicUsize>,
}

fn ended(refused: &AtomicUsize) -> End {
    if refused.load(Ordering::Relaxed) == 0 { End::Done } else { End::Unsatisfied }
}

/// The lines of a file; empty ones are passed over.
fn lines(file: &Path, largest: usize) -> anyhow::Result<Batch> {
    let input: Box<dyn BufRead + Send> = if file == Path::new("-") {
        Box::new(BufReader::new(std::io::stdin()))
    } else {
        let opened = std::fs::File::open(file);
        Box::new(BufReader::new(opened.with_context(|| format!("failed to read {}", file.display()))?))
    };
    let (send, jobs) = mpsc::channel(64);
    let refused = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&refused);
    std::thread::spawn(move || {
        for (number, line) in (1_usize..).zip(input.split(b'\n')) {
            let job = line.context("it cannot be read").and_then(|line| check(line, largest));
            match job {
                Ok(None) => {}
                Ok(Some(job)) => {
                    // The other end is gone when the batch is over.
                    if send.blocking_send(job).is_err() {
                        break;
                    }
                }
                Err(error) => {
                    count.fetch_add(1, Ordering::Relaxed);
                    output::complain(&format!("line {number} of the batch is left out: {error:#}"));
                }
            }
        }
    });
    Ok(Batch { jobs, refused })
}

/// A line that is no job at all would end in the dead queue: better said here, with its number.
fn check(line: Vec<u8>, largest: usize) -> anyhow::Result<Option<Vec<u8>>> {
    if line.trim_ascii().is_empty() {
        return Ok(None);
    }
    if line.len() > largest {
        bail!("it has {} bytes, above amqp.max_body_bytes = {largest}", line.len());
    }
    serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(&line)
        .context("it is not a JSON object")?;
    Ok(Some(line))
}
