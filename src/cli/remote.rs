//! Jobs that go through the broker: what `submit` and `bench` share.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::amqp::client::Client;
use crate::cli::signals::Signals;
use crate::config::Config;
use crate::job::{Chunk, Reply};

/// Jobs that wait for their confirm at one time.
const PUBLISHING: usize = 32;

/// A result that came.
#[derive(Debug)]
pub(super) struct Arrived {
    /// As the worker wrote it.
    pub(super) body: Vec<u8>,
    /// The same, read.
    pub(super) reply: Reply,
    /// From publishing the job to reading its result.
    pub(super) took: Duration,
}

/// How the collecting ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Over {
    /// Every job has its result.
    Complete,
    /// Nothing came for too long; so many results are missing.
    Silent(usize),
    /// We were told to end; so many results are missing.
    Interrupted(usize),
}

/// A connection to the configured broker, with a reply queue of our own.
pub(super) async fn connect(config: &Config) -> anyhow::Result<Client> {
    Client::connect(&config.amqp).await.context("failed to reach the broker (amqp.url)")
}

/// Publishes `jobs` as they come, at most `window` ahead of their results, and hands each result on.
pub(super) async fn collect(
    client: &Client,
    jobs: mpsc::Receiver<Vec<u8>>,
    window: usize,
    patience: Duration,
    arrived: impl FnMut(Arrived) -> anyhow::Result<()>,
) -> anyhow::Result<Over> {
    collect_live(client, jobs, window, patience, arrived, |_| Ok(())).await
}

/// The same, with what jobs write while they run.
pub(super) async fn collect_live(
    client: &Client,
    mut jobs: mpsc::Receiver<Vec<u8>>,
    window: usize,
    patience: Duration,
    mut arrived: impl FnMut(Arrived) -> anyhow::Result<()>,
    mut written: impl FnMut(Chunk) -> anyhow::Result<()>,
) -> anyhow::Result<Over> {
    let mut signals = Signals::listen()?;
    let mut pending: HashMap<String, Instant> = HashMap::new();
    let mut publishing = JoinSet::new();
    let mut more = true;
    while more || !pending.is_empty() || !publishing.is_empty() {
        tokio::select! {
            job = jobs.recv(), if more && pending.len() < window && publishing.len() < PUBLISHING => {
                let Some(job) = job else {
                    more = false;
                    continue;
                };
                // Ours alone, so that two jobs with one id are told apart. It names the job that has no id.
                let id = uuid::Uuid::now_v7().to_string();
                pending.insert(id.clone(), Instant::now());
                let client = client.clone();
                publishing.spawn(async move { client.submit(job, &id).await });
            }
            Some(published) = publishing.join_next() => {
                published.context("a task ended early")?.context("failed to hand a job over")?;
            }
            answer = client.next() => {
                let answer = answer.context("failed to wait for results")?;
                if answer.kind == "output" && pending.contains_key(&answer.id) {
                    written(serde_json::from_slice(&answer.body).context("output cannot be understood")?)?;
                }
                // A second result is a duplicate.
                let Some(published) = (answer.kind == "result").then(|| pending.remove(&answer.id)).flatten() else {
                    continue;
                };
                let reply = serde_json::from_slice(&answer.body).context("a result cannot be understood")?;
                arrived(Arrived { body: answer.body, reply, took: published.elapsed() })?;
            }
            () = signals.next() => return Ok(Over::Interrupted(pending.len())),
            () = tokio::time::sleep(patience), if !pending.is_empty() => return Ok(Over::Silent(pending.len())),
        }
    }
    Ok(Over::Complete)
}

/// The same job, so many times.
pub(super) fn repeated(body: &[u8], times: usize) -> mpsc::Receiver<Vec<u8>> {
    let (send, jobs) = mpsc::channel(PUBLISHING);
    let body = body.to_vec();
    tokio::spawn(async move {
        for _ in 0..times {
            // The other end is gone when the collecting is over.
            if send.send(body.clone()).await.is_err() {
                break;
            }
        }
    });
    jobs
}
