//! Sandpiper from Rust with lapin.
//!
//! ```sh
//! cargo run --example client -- amqp://guest:guest@127.0.0.1:5672/%2f deploy/clients/jobs.ndjson
//! ```
//!
//! Copy `Advice` and `Sandpiper`, and from this repository's Cargo.toml the lines of anyhow, base64, futures-util,
//! lapin, rand, serde_json, tokio and uuid. `main` shows them at work.
#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "lints of the worker, which this is no part of")]

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::StreamExt;
use futures_util::future::try_join_all;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, Consumer};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use uuid::Uuid;

/// What a publisher does about a result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Advice {
    /// stdout, artifacts
    Use,
    /// The program did it and would do it again: tell whoever wrote it, with `error`, stdout and stderr.
    Tell,
    /// Never run. `error` names the field: it is the publisher that has to change.
    Fix,
    /// You asked for it; or it came too late to be of use.
    Drop,
    /// The worker's fault, not the job's: again, after a pause.
    Retry,
}

impl Advice {
    fn on(result: &Value) -> Self {
        match result["status"].as_str().unwrap_or_default() {
            "succeeded" => Self::Use,
            "failed" | "signaled" | "timeout" | "cpu_limit" | "memory_limit" | "output_limit"
            | "syscall_killed" => Self::Tell,
            "rejected" => Self::Fix,
            "cancelled" | "expired" => Self::Drop,
            "worker_error" => Self::Retry,
            // Of a later version. Trying that again could go on for ever.
            _ => Self::Tell,
        }
    }
}

/// A message about a job.
enum News {
    Output(Value),
    Result(Value),
}

type Waiting = Arc<Mutex<HashMap<String, mpsc::UnboundedSender<News>>>>;

struct Sandpiper {
    _connection: Connection,
    channel: Channel,
    reply_to: String,
    waiting: Waiting,
    duplicates: Arc<AtomicUsize>,
}

/// A job that was published.
struct Submitted {
    id: String,
    news: mpsc::UnboundedReceiver<News>,
}

impl Sandpiper {
    async fn connect(url: &str, direct: bool) -> anyhow::Result<Self> {
        let connection = Connection::connect(url, ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        let reply_to = if direct {
            // No queue at all: quickest, and what comes when we are gone is lost.
            "amq.rabbitmq.reply-to".to_owned()
        } else {
            // A queue of our own: what comes when we are gone is in sandpiper.results.
            let options = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
            channel.queue_declare("".into(), options, FieldTable::default()).await?.name().to_string()
        };
        let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
        let replies = channel
            .basic_consume(reply_to.as_str().into(), "".into(), options, FieldTable::default())
            .await?;
        let (waiting, duplicates) = (Waiting::default(), Arc::new(AtomicUsize::new(0)));
        tokio::spawn(read(replies, Arc::clone(&waiting), Arc::clone(&duplicates)));
        Ok(Self { _connection: connection, channel, reply_to, waiting, duplicates })
    }

    /// Returns when the broker keeps the job. Dropping what it returns does not stop the job: `cancel` does.
    async fn submit(&self, job: &Value) -> anyhow::Result<Submitted> {
        let mut job = job.clone();
        let id = job["id"].as_str().map_or_else(|| Uuid::now_v7().to_string(), str::to_owned);
        job["id"] = id.as_str().into();
        let (sender, news) = mpsc::unbounded_channel();
        self.waiting.lock().unwrap().insert(id.clone(), sender);
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
        let properties = BasicProperties::default()
            .with_reply_to(self.reply_to.as_str().into())
            .with_correlation_id(id.as_str().into())
            .with_message_id(id.as_str().into())
            .with_content_type("application/json".into())
            .with_timestamp(now)
            .with_delivery_mode(2);
        self.publish("", "sandpiper.jobs", &job, properties).await?;
        Ok(Submitted { id, news })
    }

    /// Tries again where that helps, under a new id: results under one id are duplicates.
    async fn run(&self, mut job: Value, on_output: impl AsyncFn(Value)) -> anyhow::Result<Value> {
        const ATTEMPTS: u32 = 2;
        for attempt in 1.. {
            let mut submitted = self.submit(&job).await?;
            let result = timeout(Duration::from_secs(60), submitted.result(&on_output))
                .await
                .with_context(|| format!("no result of {} within 60 s", submitted.id))??;
            if Advice::on(&result) != Advice::Retry || attempt == ATTEMPTS {
                return Ok(result);
            }
            job["id"] = format!("{}.{attempt}", submitted.id).into();
            sleep(Duration::from_millis(rand::random_range(500..1_000) << attempt)).await;
        }
        unreachable!("the last attempt returns")
    }

    async fn cancel(&self, id: &str) -> anyhow::Result<()> {
        self.publish("sandpiper.control", "", &json!({ "cancel": id }), BasicProperties::default()).await
    }

    async fn publish(
        &self,
        exchange: &str,
        key: &str,
        message: &Value,
        properties: BasicProperties,
    ) -> anyhow::Result<()> {
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let body = message.to_string();
        let confirm =
            self.channel.basic_publish(exchange.into(), key.into(), options, body.as_bytes(), properties);
        match confirm.await?.await? {
            Confirmation::Ack(None) => Ok(()),
            Confirmation::Ack(Some(_)) => bail!("there is no queue for {exchange}{key}; does a worker run?"),
            _ => bail!("the broker does not take messages for {exchange}{key}; is the queue full?"),
        }
    }
}

impl Submitted {
    /// Waits for the result, and hands on what comes before it.
    async fn result(&mut self, on_output: &impl AsyncFn(Value)) -> anyhow::Result<Value> {
        let mut shown = 0;
        loop {
            match self.news.recv().await.context("the connection is gone")? {
                News::Result(result) => return Ok(result),
                // A job that had to start again sends its output from 0 again: what was shown is not shown twice.
                News::Output(piece) if piece["seq"] == shown => {
                    shown += 1;
                    on_output(piece).await;
                }
                News::Output(_) => {}
            }
        }
    }
}

/// Hands each reply to whoever waits for it, once.
async fn read(mut replies: Consumer, waiting: Waiting, duplicates: Arc<AtomicUsize>) {
    let (mut seen, mut order) = (HashSet::new(), VecDeque::new());
    while let Some(Ok(message)) = replies.next().await {
        let text = |property: &Option<_>| property.as_ref().map(ToString::to_string).unwrap_or_default();
        let message_id = text(message.properties.message_id());
        if !seen.insert(message_id.clone()) {
            // Delivery is at least once.
            duplicates.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        order.push_back(message_id);
        if order.len() > 10_000 {
            seen.remove(&order.pop_front().unwrap_or_default());
        }
        let Ok(body) = serde_json::from_slice(&message.data) else { continue };
        let id = text(message.properties.correlation_id());
        let mut waiting = waiting.lock().unwrap();
        // Where nobody waits any more, sending fails, and nothing is lost that anybody wants.
        if text(message.properties.kind()) == "output" {
            let _ = waiting.get(&id).map(|news| news.send(News::Output(body)));
        } else {
            let _ = waiting.remove(&id).map(|news| news.send(News::Result(body)));
        }
    }
    waiting.lock().unwrap().clear();
}

fn show(name: &str, result: &Value) {
    let advice = format!("{:?}", Advice::on(result)).to_lowercase();
    let text = result["error"].as_str().or(result["stdout"].as_str()).unwrap_or_default();
    println!("{name}: {}, {advice}: {}", result["status"].as_str().unwrap_or_default(), text.trim());
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let [_, url, file] = &std::env::args().collect::<Vec<_>>()[..] else {
        bail!("usage: client AMQP_URL JOBS.ndjson");
    };
    let sandpiper = &Sandpiper::connect(url, false).await?;
    let ignore = async |_| ();

    println!("== every status");
    let lines = std::fs::read_to_string(file)?;
    let jobs = lines.lines().map(serde_json::from_str).collect::<Result<Vec<Value>, _>>()?;
    let results = try_join_all(jobs.iter().map(|job| sandpiper.run(job.clone(), ignore))).await?;
    for (job, result) in jobs.iter().zip(&results) {
        show(job["id"].as_str().unwrap_or_default(), result);
    }

    println!("== output while it runs");
    let count = "import time\nfor n in range(3):\n    print('step', n)\n    time.sleep(0.3)";
    let write = async |piece: Value| print!("{}", piece["data"].as_str().unwrap_or_default());
    show("counts", &sandpiper.run(json!({ "code": count, "stream": true }), write).await?);

    println!("== cancelled while it runs");
    let long = "import time\nprint('started')\ntime.sleep(60)";
    let cancel = async |piece: Value| {
        let id = piece["id"].as_str().unwrap_or_default();
        sandpiper.cancel(id).await.expect("workers listen");
    };
    show("sleeps", &sandpiper.run(json!({ "code": long, "stream": true }), cancel).await?);

    println!("== files in, files out, metadata");
    let job = json!({
        "code": "import os\nos.mkdir('out')\nopen('out/upper.txt', 'w').write(open('in.txt').read().upper())",
        "files": [{ "path": "in.txt", "content": "hello" }],
        "artifacts": ["out/*.txt"],
        "metadata": { "customer": "c-17" },
    });
    let result = sandpiper.run(job, ignore).await?;
    for file in result["artifacts"].as_array().context("artifacts are a list")? {
        let content = STANDARD.decode(file["base64"].as_str().unwrap_or_default())?;
        let (path, customer) = (file["path"].as_str(), result["metadata"]["customer"].as_str());
        println!(
            "{} {} {}",
            path.unwrap_or_default(),
            String::from_utf8(content)?,
            customer.unwrap_or_default()
        );
    }

    println!("== published twice, handled once");
    let job = json!({ "id": Uuid::now_v7().to_string(), "code": "print('once')" });
    let mut first = sandpiper.submit(&job).await?;
    let mut second = sandpiper.submit(&job).await?;
    let result = tokio::select! {
        Ok(result) = first.result(&ignore) => result,
        Ok(result) = second.result(&ignore) => result,
        else => bail!("no result"),
    };
    show("twice", &result);
    while sandpiper.duplicates.load(Ordering::Relaxed) == 0 {
        sleep(Duration::from_millis(50)).await;
    }
    println!("duplicates dropped: {}", sandpiper.duplicates.load(Ordering::Relaxed));

    println!("== direct reply-to");
    let direct = Sandpiper::connect(url, true).await?;
    show("direct", &direct.run(json!({ "code": "print(6 * 7)" }), ignore).await?);
    Ok(())
}
