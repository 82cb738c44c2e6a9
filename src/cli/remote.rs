//! Jobs that go through the broker: what `submit` and `bench` share.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::amqp::client::{Client, ReplyMessage};
use crate::cli::output;
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

/// A job to publish, and its number: the line of a batch.
pub(super) type Numbered = (usize, Vec<u8>);

/// How the collecting ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Over {
    /// Every job has its result.
    Complete,
    /// Nothing came for too long.
    Silent(Missing),
    /// We were told to end.
    Interrupted(Missing),
}

impl Over {
    /// What there is no result of; none where all of it has one.
    pub(super) fn missing(&self) -> Option<&Missing> {
        match self {
            Self::Complete => None,
            Self::Silent(missing) | Self::Interrupted(missing) => Some(missing),
        }
    }
}

/// What there is no result of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Missing {
    /// Jobs that were published.
    pub(super) outstanding: usize,
    /// The id that the message of the oldest of them has.
    pub(super) oldest: Option<String>,
    /// The number of the last job that was published; what comes after it was not.
    pub(super) last: usize,
}

/// A connection to the configured broker, with a reply queue of our own, for a question that a person waits for.
pub(super) async fn connect(config: &Config) -> anyhow::Result<Client> {
    Client::connect(&config.amqp, false).await.context(UNREACHABLE)
}

/// The same for many jobs, which a broker that takes no messages for a while delays and does not end.
pub(super) async fn connect_for_many(config: &Config) -> anyhow::Result<Client> {
    Client::connect(&config.amqp, true).await.context(UNREACHABLE)
}

const UNREACHABLE: &str = "failed to reach the broker (amqp.url)";

/// Publishes `jobs` as they come, at most `window` ahead of their results, and hands each result on.
pub(super) async fn collect(
    client: &Client,
    jobs: mpsc::Receiver<Numbered>,
    window: usize,
    patience: Duration,
    arrived: impl FnMut(Arrived) -> anyhow::Result<()>,
) -> anyhow::Result<Over> {
    collect_live(client, jobs, window, patience, arrived, |_, _| Ok(())).await
}

/// The same, with what jobs write while they run, each piece with the id of its message. However it ends, every
/// result that has come is handed on.
pub(super) async fn collect_live(
    client: &Client,
    jobs: mpsc::Receiver<Numbered>,
    window: usize,
    patience: Duration,
    arrived: impl FnMut(Arrived) -> anyhow::Result<()>,
    written: impl FnMut(Chunk, &str) -> anyhow::Result<()>,
) -> anyhow::Result<Over> {
    let mut collecting = Collecting { client, pending: HashMap::new(), last: 0, arrived, written };
    let over = collecting.until_over(jobs, window, patience).await;
    if over.as_ref().is_ok_and(|over| *over == Over::Complete) {
        return over;
    }
    for answer in client.rest().await {
        collecting.take(answer)?;
    }
    Ok(match over? {
        Over::Complete => Over::Complete,
        Over::Silent(_) => Over::Silent(collecting.missing()),
        Over::Interrupted(_) => Over::Interrupted(collecting.missing()),
    })
}

/// Jobs on their way out and back.
struct Collecting<'a, A, W> {
    client: &'a Client,
    /// When each was published, by the id of its message.
    pending: HashMap<String, Instant>,
    last: usize,
    arrived: A,
    written: W,
}

impl<A, W> Collecting<'_, A, W>
where
    A: FnMut(Arrived) -> anyhow::Result<()>,
    W: FnMut(Chunk, &str) -> anyhow::Result<()>,
{
    async fn until_over(
        &mut self,
        mut jobs: mpsc::Receiver<Numbered>,
        window: usize,
        patience: Duration,
    ) -> anyhow::Result<Over> {
        let mut signals = Signals::listen()?;
        let mut publishing = JoinSet::new();
        let mut blocked = self.client.blocked();
        let mut more = true;
        while more || !self.pending.is_empty() || !publishing.is_empty() {
            let room = self.pending.len() < window && publishing.len() < PUBLISHING;
            tokio::select! {
                job = jobs.recv(), if more && room => {
                    let Some((number, job)) = job else {
                        more = false;
                        continue;
                    };
                    // Ours alone, so that two jobs with one id are told apart. It names the job that has no id.
                    let id = uuid::Uuid::now_v7().to_string();
                    self.pending.insert(id.clone(), Instant::now());
                    self.last = number;
                    let client = self.client.clone();
                    publishing.spawn(async move { client.submit(job, &id).await });
                }
                Some(published) = publishing.join_next() => {
                    published.context("a task ended early")?.context("failed to hand a job over")?;
                }
                answer = self.client.next() => self.take(answer.context("failed to wait for results")?)?,
                Ok(()) = blocked.changed() => {
                    if *blocked.borrow_and_update() && self.client.is_patient() {
                        output::complain(BLOCKED);
                    }
                }
                () = signals.next() => return Ok(Over::Interrupted(self.missing())),
                () = tokio::time::sleep(patience), if !self.pending.is_empty() => {
                    return Ok(Over::Silent(self.missing()));
                }
            }
        }
        Ok(Over::Complete)
    }

    fn take(&mut self, answer: ReplyMessage) -> anyhow::Result<()> {
        if answer.kind == "output" && self.pending.contains_key(&answer.id) {
            let chunk = serde_json::from_slice(&answer.body).context("output cannot be understood")?;
            return (self.written)(chunk, &answer.message_id);
        }
        if answer.kind != "result" {
            return Ok(());
        }
        // A second result is a duplicate.
        let Some(published) = self.pending.remove(&answer.id) else { return Ok(()) };
        let reply = serde_json::from_slice(&answer.body).context("a result cannot be understood")?;
        (self.arrived)(Arrived { body: answer.body, reply, took: published.elapsed() })
    }

    fn missing(&self) -> Missing {
        let oldest = self.pending.iter().min_by_key(|(_, published)| **published);
        Missing { outstanding: self.pending.len(), oldest: oldest.map(|(id, _)| id.clone()), last: self.last }
    }
}

const BLOCKED: &str =
    "the broker takes no messages for now, it is short of memory or disk space; waiting until it does";

/// The same job, so many times.
pub(super) fn repeated(body: &[u8], times: usize) -> mpsc::Receiver<Numbered> {
    let (send, jobs) = mpsc::channel(PUBLISHING);
    let body = body.to_vec();
    tokio::spawn(async move {
        for number in 1..=times {
            // The other end is gone when the collecting is over.
            if send.send((number, body.clone())).await.is_err() {
                break;
            }
        }
    });
    jobs
}
