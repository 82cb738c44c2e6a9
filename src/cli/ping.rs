//! `ping`: which workers are there, what they run, and since when.

use std::time::Duration;

use anyhow::Context;
use tokio::time::{Instant, timeout_at};

use crate::amqp::Pong;
use crate::amqp::client::ClientError;
use crate::cli::args::ConfigArgs;
use crate::cli::output::one_line;
use crate::cli::{End, output, remote, runtime};
use crate::config::Config;

const EXAMPLES: &str = "\
Examples:
  sandpiper ping
  sandpiper ping --json | jq '[.[].jobs | length] | add'

Exit code: 0 when a worker answered, 1 when none did.";

/// Ask every worker who it is and what it runs
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// How long to wait for answers: nobody knows how many will come
    #[arg(long, value_name = "MS", default_value_t = 1_000)]
    wait_ms: u64,

    /// Print one JSON array of the answers
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    config: ConfigArgs,
}

pub(super) fn run(args: &Args) -> anyhow::Result<End> {
    let config = args.config.load()?;
    let wait = Duration::from_millis(args.wait_ms);
    let mut pongs = runtime()?.block_on(collect(&config, wait))?;
    pongs.sort_by(|one, other| one.worker.cmp(&other.worker));
    if args.json {
        output::print_json(&pongs)?;
    } else {
        output::print(shown(&pongs, jiff::Timestamp::now()).as_bytes())?;
        if pongs.is_empty() {
            output::complain(&format!("no worker answered within {} ms (--wait-ms)", args.wait_ms));
        }
    }
    Ok(if pongs.is_empty() { End::Unsatisfied } else { End::Done })
}

async fn collect(config: &Config, wait: Duration) -> anyhow::Result<Vec<Pong>> {
    let client = remote::connect(config).await?;
    match client.ping().await {
        Err(ClientError::NoWorker) => return Ok(Vec::new()),
        asked => asked?,
    }
    let until = Instant::now() + wait;
    let mut pongs = Vec::new();
    while let Ok(answer) = timeout_at(until, client.next()).await {
        let answer = answer.context("failed to wait for answers")?;
        if answer.kind != "pong" {
            continue;
        }
        match serde_json::from_slice(&answer.body) {
            Ok(pong) => pongs.push(pong),
            // One of another version, or no worker at all; the others count.
            Err(error) => output::complain(&format!("an answer cannot be understood: {error}")),
        }
    }
    client.close().await;
    Ok(pongs)
}

/// A line a worker, and below it one a job.
fn shown(pongs: &[Pong], now: jiff::Timestamp) -> String {
    use std::fmt::Write;
    let mut text = String::new();
    for pong in pongs {
        let running = pong.jobs.iter().filter(|job| job.running).count();
        let state = if pong.draining { "draining" } else { "takes jobs" };
        // Writing to a String does not fail.
        let _ = writeln!(
            text,
            "{}  {state}, {running} of {} slots, up {}, version {}, {} {}",
            one_line(&pong.worker),
            pong.slots,
            ago(pong.since, now),
            one_line(&pong.version),
            if pong.queues.len() == 1 { "queue" } else { "queues" },
            one_line(&pong.queues.join(", ")),
        );
        for job in &pong.jobs {
            let state = if job.running { "runs" } else { "waits" };
            let _ = writeln!(text, "  {}  {state}, here for {}", one_line(&job.id), ago(job.since, now));
        }
    }
    text
}

/// A span in the two largest units that it has. Another machine's clock may be ahead of ours.
fn ago(since: jiff::Timestamp, now: jiff::Timestamp) -> String {
    let seconds = now.as_second().saturating_sub(since.as_second()).max(0);
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min {} s", seconds % 60),
        (0, _, _) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;
    use crate::amqp::JobInfo;

    #[test]
    fn a_worker_and_its_jobs_are_shown_with_their_age() {
        let at = |seconds| jiff::Timestamp::from_second(seconds).unwrap();
        let pong = Pong {
            worker: "host\u{1b}1".into(),
            version: "0.1.0".into(),
            since: at(0),
            slots: 2,
            queues: vec!["sandpiper.jobs".into()],
            draining: false,
            jobs: vec![
                JobInfo { id: "a".into(), since: at(100_000), running: true },
                JobInfo { id: "b".into(), since: at(200_000), running: false },
            ],
        };
        assert_eq!(
            shown(&[pong], at(100_061)),
            "host 1  takes jobs, 1 of 2 slots, up 1 d 3 h, version 0.1.0, queue sandpiper.jobs\n\
             \x20 a  runs, here for 1 min 1 s\n\
             \x20 b  waits, here for 0 s\n"
        );
        assert_eq!(ago(at(0), at(7_300)), "2 h 1 min");
    }
}
