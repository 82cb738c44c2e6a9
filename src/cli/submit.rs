//! `submit`: jobs to the queue, results back; one like `exec`, or many as a batch.

mod lines;
mod live;

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::amqp::client::Client;
use crate::cli::args::ConfigArgs;
use crate::cli::job_args::{Asked, JobArgs};
use crate::cli::remote::{self, Arrived, Missing, Over};
use crate::cli::submit::lines::{Batch, ended};
use crate::cli::submit::live::Live;
use crate::cli::{End, output, runtime};
use crate::config::Config;
use crate::job::{self, Members};

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

    /// Print the result object: one JSON document on standard output, nothing else there; with --no-wait one with
    /// the id of the job
    #[arg(long)]
    json: bool,

    /// Write the returned files below this directory, where no file of their name is
    #[arg(long, value_name = "DIR", conflicts_with = "batch")]
    artifacts_to: Option<PathBuf>,

    /// Let returned files take the place of files that are there; without this those are left, and that is an error
    #[arg(long, requires = "artifacts_to")]
    overwrite: bool,

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
            let jobs = lines::read(file, config.amqp.max_body_bytes)?;
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
    if let Some(directory) = &args.artifacts_to {
        output::prepare(directory)?;
    }
    let client = remote::connect(config).await?;
    let own_id = job::named(&body);
    if args.no_wait {
        let id = leave(&client, body).await?;
        client.close().await;
        if args.json {
            output::print_json(&json!({ "id": own_id.unwrap_or(id) }))?;
        }
        return Ok(End::Done);
    }
    let body = if args.stream { streaming(body) } else { body };
    let mut result: Option<Arrived> = None;
    let mut live = Live::new(!args.json);
    let over = remote::collect_live(
        &client,
        remote::repeated(&body, 1),
        1,
        patience(args),
        |arrived| {
            result = Some(arrived);
            Ok(())
        },
        |chunk, message_id| live.show(chunk, message_id),
    );
    let over = over.await?;
    client.close().await;
    let Some(Arrived { reply, .. }) = result else {
        let id = own_id.or_else(|| over.missing()?.oldest.clone());
        let cancel = id.map(|id| format!("; sandpiper cancel {id} ends it")).unwrap_or_default();
        bail!("{}{cancel}", missing(&over, args));
    };
    let end = if args.json {
        output::print_json(&reply)?;
        End::Printed(reply.status)
    } else {
        output::show_rest(&reply, live.shown(&reply))?
    };
    // Last: what cannot be written costs nothing else of the result.
    if let Some(directory) = &args.artifacts_to {
        output::save(&reply, directory, args.overwrite)?;
    }
    Ok(end)
}

/// The job with `stream` set; all else stays as it is written. What is no job is left for the worker to say so.
fn streaming(mut body: Vec<u8>) -> Vec<u8> {
    let stream = Members::of(&body).find(|(name, _)| &body[name.clone()] == b"\"stream\"");
    match (stream, body.iter().position(|byte| *byte == b'{')) {
        (Some((_, value)), _) => drop(body.splice(value, *b"true")),
        (None, Some(open)) if Members::of(&body).next().is_some() => {
            body.splice(open + 1..open + 1, *b"\"stream\":true,");
        }
        (None, _) => {}
    }
    body
}

async fn batch(Batch { mut jobs, refused }: Batch, args: &Args, config: &Config) -> anyhow::Result<End> {
    let client = remote::connect_for_many(config).await?;
    if args.no_wait {
        let mut last = 0;
        while let Some((number, job)) = jobs.recv().await {
            leave(&client, job).await.with_context(|| format!("stopped after line {last} of the batch"))?;
            last = number;
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
        bar.suspend(|| line(arrived.body))
    });
    let over = over.await;
    bar.finish_and_clear();
    client.close().await;
    match over.with_context(|| format!("stopped after {results} results")) {
        Ok(over) => {
            let Some(Missing { last, .. }) = over.missing() else { return Ok(ended(&refused)) };
            output::complain(&format!(
                "{results} results came; {}; line {last} of the batch was the last to be sent",
                missing(&over, args)
            ));
        }
        Err(error) => output::complain(&format!("{error:#}")),
    }
    Ok(End::Unsatisfied)
}

/// Returns the id of the message, which is that of a job without one of its own.
async fn leave(client: &Client, body: Vec<u8>) -> anyhow::Result<String> {
    let id = uuid::Uuid::now_v7().to_string();
    client.submit_and_leave(body, &id).await.context("failed to hand a job over")?;
    Ok(id)
}

fn patience(args: &Args) -> Duration {
    Duration::from_millis(args.wait_ms)
}

fn missing(over: &Over, args: &Args) -> String {
    match over {
        Over::Complete => "no result came".into(),
        Over::Silent(Missing { outstanding, .. }) => format!(
            "{outstanding} outstanding, and none came for {} ms (--wait-ms): is a worker running?",
            args.wait_ms
        ),
        Over::Interrupted(Missing { outstanding, .. }) => format!(
            "interrupted with {outstanding} outstanding: the jobs stay in the queue, their results go to the \
             results queue"
        ),
    }
}

/// The result as it came, on a line of its own.
fn line(body: Vec<u8>) -> anyhow::Result<()> {
    output::print_for_somebody(&output::on_one_line(body))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_made_to_stream_and_stays_as_it_is_written() {
        for (written, streams) in [
            (
                r#" {"code": "1", "metadata": {"n": 1e400 }}"#,
                r#" {"stream":true,"code": "1", "metadata": {"n": 1e400 }}"#,
            ),
            (r#"{"code": "{", "stream": false }"#, r#"{"code": "{", "stream": true}"#),
            (r#"{"metadata": {"stream": 1}}"#, r#"{"stream":true,"metadata": {"stream": 1}}"#),
            ("[]", "[]"),
            ("{}", "{}"),
            ("{ no job", "{ no job"),
        ] {
            assert_eq!(String::from_utf8(streaming(written.into())).unwrap(), streams);
        }
    }
}
