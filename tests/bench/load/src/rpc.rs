//! The publisher: persistent messages with confirms, results read from a queue of its own.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use futures_util::StreamExt;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{PATIENCE, arguments, connect, short, text};

/// Confirms that may be outstanding when many jobs are left behind.
const UNCONFIRMED: usize = 1000;

/// What is published.
#[derive(Debug, clap::Args)]
pub(crate) struct Jobs {
    /// Where it is routed by: a queue, or several with commas, in turn
    #[arg(long, value_delimiter = ',', required = true)]
    queue: Vec<String>,

    /// Publish to this exchange, each message under a routing key of its own
    #[arg(long, default_value = "")]
    exchange: String,

    /// Whose jobs these are
    #[arg(long, value_enum, default_value = "sandpiper")]
    kind: Kind,

    /// The program that each job runs
    #[arg(long, default_value = "print(1)")]
    code: String,

    /// How many
    #[arg(long, short = 'n')]
    jobs: usize,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Kind {
    Sandpiper,
    Celery,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    jobs: Jobs,

    /// How many wait for their result at one time
    #[arg(long, default_value = "1")]
    window: usize,

    /// What every job must print
    #[arg(long, default_value = "1\n")]
    expect: String,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Fill {
    #[command(flatten)]
    jobs: Jobs,
}

/// What is read of a result: Sandpiper's, or Celery's, whose task returns what the program printed.
#[derive(Debug, Deserialize)]
struct Reply {
    status: String,
    #[serde(alias = "result")]
    stdout: Value,
    worker: Option<String>,
}

/// Publishes, at most `window` ahead of the results.
pub(crate) async fn run(url: &str, args: &Args) -> anyhow::Result<Value> {
    let (_publishing, channel) = connect(url).await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    let (_reading, replies) = connect(url).await?;
    let options =
        QueueDeclareOptions { exclusive: true, auto_delete: true, ..QueueDeclareOptions::default() };
    let queue = replies.queue_declare("".into(), options, FieldTable::default()).await?;
    let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
    let mut results =
        replies.basic_consume(queue.name().clone(), "".into(), options, FieldTable::default()).await?;

    let run = uuid::Uuid::now_v7().simple().to_string();
    let count = args.jobs.jobs;
    let mut sent: Vec<Instant> = Vec::with_capacity(count);
    let mut took: Vec<Option<Duration>> = vec![None; count];
    let mut workers: BTreeMap<String, usize> = BTreeMap::new();
    let (mut answered, mut duplicates) = (0, 0);
    let begin = Instant::now();
    while answered < count {
        while sent.len() < count && sent.len() - answered < args.window {
            let at = sent.len();
            sent.push(Instant::now());
            args.jobs.publish(&channel, at, &format!("{run}-{at}"), Some(queue.name().as_str())).await?;
        }
        let message = tokio::time::timeout(PATIENCE, results.next())
            .await
            .with_context(|| format!("no result for {PATIENCE:?}, after {answered} of {count}"))?
            .context("the reply queue is gone")??;
        let now = Instant::now();
        let id = message.properties.correlation_id().as_ref().map(ToString::to_string).unwrap_or_default();
        let at: usize = id
            .strip_prefix(&format!("{run}-"))
            .and_then(|at| at.parse().ok())
            .filter(|at| *at < sent.len())
            .with_context(|| format!("a result of nobody's: {id:?}"))?;
        let reply: Reply = serde_json::from_slice(&message.data)
            .with_context(|| format!("not a result: {}", String::from_utf8_lossy(&message.data)))?;
        if !reply.status.eq_ignore_ascii_case("succeeded") && reply.status != "SUCCESS"
            || reply.stdout != args.expect.as_str()
        {
            bail!("a job did not do what it should: {}", String::from_utf8_lossy(&message.data));
        }
        if took[at].replace(now - sent[at]).is_some() {
            duplicates += 1;
            continue;
        }
        answered += 1;
        *workers.entry(reply.worker.unwrap_or_default()).or_default() += 1;
    }
    let wall = begin.elapsed();
    if !channel.wait_for_confirms().await?.is_empty() {
        bail!("jobs came back: there is no such queue");
    }
    let mut took: Vec<Duration> = took.into_iter().flatten().collect();
    took.sort_unstable();
    let rank = |percent: usize| ms(took[(took.len() * percent).div_ceil(100).max(1) - 1]);
    Ok(json!({
        "jobs": count, "duplicates": duplicates, "seconds": wall.as_secs_f64(),
        "jobs_per_s": per_second(count, wall),
        "p50_ms": rank(50), "p90_ms": rank(90), "p99_ms": rank(99), "max_ms": rank(100),
        "workers": workers, "cpu_s": cpu()?,
    }))
}

/// Publishes as fast as the broker takes it. Without a reply queue: results go to the results queue.
pub(crate) async fn fill(url: &str, args: &Fill) -> anyhow::Result<Value> {
    let (_connection, channel) = connect(url).await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    let run = uuid::Uuid::now_v7().simple().to_string();
    let begin = Instant::now();
    for at in 0..args.jobs.jobs {
        args.jobs.publish(&channel, at, &format!("{run}-{at}"), None).await?;
        if (at + 1) % UNCONFIRMED == 0 || at + 1 == args.jobs.jobs {
            let confirming = tokio::time::timeout(PATIENCE, channel.wait_for_confirms());
            if !confirming.await.context("the broker confirms nothing")??.is_empty() {
                bail!("jobs came back: there is no such queue");
            }
        }
    }
    let wall = begin.elapsed();
    let jobs = args.jobs.jobs;
    Ok(json!({ "jobs": jobs, "seconds": wall.as_secs_f64(), "jobs_per_s": per_second(jobs, wall) }))
}

impl Jobs {
    async fn publish(
        &self,
        channel: &Channel,
        at: usize,
        id: &str,
        reply_to: Option<&str>,
    ) -> anyhow::Result<()> {
        let mut properties = BasicProperties::default()
            .with_content_type("application/json".into())
            .with_content_encoding("utf-8".into())
            .with_delivery_mode(2)
            .with_correlation_id(short(id)?)
            .with_message_id(short(id)?)
            .with_headers(self.headers(id));
        if let Some(queue) = reply_to {
            properties = properties.with_reply_to(short(queue)?);
        }
        let body = match self.kind {
            Kind::Sandpiper => json!({ "code": self.code }),
            Kind::Celery => json!([
                [self.code],
                {},
                { "callbacks": null, "errbacks": null, "chain": null, "chord": null },
            ]),
        };
        // A consistent-hash exchange spreads by the routing key.
        let key = if self.exchange.is_empty() { &self.queue[at % self.queue.len()] } else { id };
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        // The confirms are waited for together, at the end.
        drop(
            channel
                .basic_publish(
                    short(&self.exchange)?,
                    short(key)?,
                    options,
                    body.to_string().as_bytes(),
                    properties,
                )
                .await?,
        );
        Ok(())
    }

    /// Celery's protocol keeps the task and its id here; ours, the time of publishing.
    fn headers(&self, id: &str) -> FieldTable {
        match self.kind {
            Kind::Sandpiper => {
                let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                let millis = i64::try_from(since.as_millis()).unwrap_or(i64::MAX);
                arguments([("timestamp_in_ms", AMQPValue::LongLongInt(millis))])
            }
            Kind::Celery => arguments([
                ("lang", text("py")),
                ("task", text("run")),
                ("id", text(id)),
                ("root_id", text(id)),
                ("parent_id", AMQPValue::Void),
                ("group", AMQPValue::Void),
                ("retries", AMQPValue::LongInt(0)),
            ]),
        }
    }
}

/// Seconds of processor time that this process took.
fn cpu() -> anyhow::Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let micros = (usage.user_time() + usage.system_time()).num_microseconds();
    Ok(Duration::from_micros(u64::try_from(micros).unwrap_or_default()).as_secs_f64())
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

#[expect(clippy::cast_precision_loss, reason = "nobody measures 2^53 jobs")]
fn per_second(jobs: usize, wall: Duration) -> f64 {
    jobs as f64 / wall.as_secs_f64()
}
