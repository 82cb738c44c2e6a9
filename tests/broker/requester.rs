//! Somebody who publishes jobs and reads results: lapin without anything of ours.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::{
    BasicConsumeOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, Consumer};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::{PATIENCE, Queues, eventually};

/// Somebody who publishes jobs without a pause, so that some are under way whenever a fault comes, however long
/// it takes to bring about.
pub(crate) struct Load {
    task: JoinHandle<Vec<String>>,
    enough: CancellationToken,
}

impl Load {
    /// Jobs of so many seconds, one every `pause`.
    pub(crate) async fn start(url: &str, queues: &Queues, seconds: f64, pause: Duration) -> Self {
        let requester = Requester::connect(url).await;
        let enough = CancellationToken::new();
        let (jobs, replies, ended) = (queues.jobs.clone(), queues.replies.clone(), enough.clone());
        let task = tokio::spawn(async move {
            let (code, mut ids) = (format!("import time; time.sleep({seconds})"), Vec::new());
            while !ended.is_cancelled() {
                let id = format!("job-{}", ids.len());
                requester.run_until_kept(&jobs, &id, &replies, &code).await;
                ids.push(id);
                tokio::time::sleep(pause).await;
            }
            ids
        });
        Self { task, enough }
    }

    /// No more of them. The ids of all.
    pub(crate) async fn end(self) -> Vec<String> {
        self.enough.cancel();
        let ids = self.task.await.unwrap();
        println!("{} jobs", ids.len());
        ids
    }
}

pub(crate) struct Requester {
    connection: Connection,
    pub(crate) channel: Channel,
}

impl Requester {
    pub(crate) async fn connect(url: &str) -> Self {
        let connection = eventually("the broker lets us in", async || {
            Connection::connect(url, ConnectionProperties::default()).await.ok()
        })
        .await;
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        Self { connection, channel }
    }

    /// A reply queue of our own that outlives a restart of the broker, and what comes out of it.
    pub(crate) async fn replies(&self, queue: &str) -> Consumer {
        self.declare(queue).await;
        self.listen(queue).await
    }

    /// A reply queue that nobody reads yet.
    pub(crate) async fn declare(&self, queue: &str) {
        let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        self.channel.queue_declare(queue.into(), options, FieldTable::default()).await.unwrap();
    }

    /// The same on every node of a cluster, so that it outlives each of them.
    pub(crate) async fn declare_on_all_nodes(&self, queue: &str) {
        let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
        self.channel.queue_declare(queue.into(), options, arguments).await.unwrap();
    }

    pub(crate) async fn listen(&self, queue: &str) -> Consumer {
        let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
        self.channel.basic_consume(queue.into(), "".into(), options, FieldTable::default()).await.unwrap()
    }

    pub(crate) async fn publish(&self, queue: &str, body: &[u8], properties: BasicProperties) {
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let properties = properties.with_delivery_mode(2);
        let confirm = self
            .channel
            .basic_publish("".into(), queue.into(), options, body, properties)
            .await
            .unwrap()
            .await
            .unwrap();
        assert!(confirm.is_ack() && confirm.take_message().is_none(), "not stored in {queue}");
    }

    /// All of them as fast as the broker takes them.
    pub(crate) async fn publish_all(&self, queue: &str, bodies: &[Vec<u8>], properties: BasicProperties) {
        let mut confirms = Vec::new();
        for body in bodies {
            let properties = properties.clone().with_delivery_mode(2);
            let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
            let publishing = self.channel.basic_publish("".into(), queue.into(), options, body, properties);
            confirms.push(publishing.await.unwrap());
        }
        for confirm in confirms {
            let confirm = confirm.await.unwrap();
            assert!(confirm.is_ack() && confirm.take_message().is_none(), "not stored in {queue}");
        }
    }

    /// A job that prints 1.
    pub(crate) async fn submit(&self, queue: &str, id: &str, reply_to: &str) {
        self.run(queue, id, reply_to, "print(1)").await;
    }

    pub(crate) async fn run(&self, queue: &str, id: &str, reply_to: &str, code: &str) {
        let (job, properties) = job(id, reply_to, code);
        self.publish(queue, &job, properties).await;
    }

    /// The same while queues change their leaders or the broker takes nothing: published again until it is kept.
    pub(crate) async fn run_until_kept(&self, queue: &str, id: &str, reply_to: &str, code: &str) {
        let (job, properties) = job(id, reply_to, code);
        let begin = Instant::now();
        while !self.is_kept(queue, &job, properties.clone()).await {
            assert!(begin.elapsed() < 3 * PATIENCE, "{queue} keeps no job");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// By a channel of its own each time: one that has met an election may refuse for ever.
    async fn is_kept(&self, queue: &str, body: &[u8], properties: BasicProperties) -> bool {
        let channel = self.connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        let publishing = async {
            let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
            let properties = properties.with_delivery_mode(2);
            channel.basic_publish("".into(), queue.into(), options, body, properties).await?.await
        };
        let confirm = tokio::time::timeout(Duration::from_secs(5), publishing).await;
        drop(channel.close(200, "done".into()).await);
        confirm.is_ok_and(|confirm| {
            confirm.is_ok_and(|confirm| confirm.is_ack() && confirm.take_message().is_none())
        })
    }

    /// How many messages wait in a queue.
    pub(crate) async fn waiting(&self, queue: &str) -> u32 {
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        self.channel
            .queue_declare(queue.into(), options, FieldTable::default())
            .await
            .unwrap()
            .message_count()
    }

    /// The next message of a queue, taken out of it.
    pub(crate) async fn take(&self, queue: &str) -> Delivery {
        eventually(&format!("{queue} holds a message"), async || {
            let options = BasicGetOptions { no_ack: true };
            self.channel.basic_get(queue.into(), options).await.unwrap().map(|message| message.delivery)
        })
        .await
    }
}

fn job(id: &str, reply_to: &str, code: &str) -> (Vec<u8>, BasicProperties) {
    let properties = BasicProperties::default()
        .with_reply_to(reply_to.into())
        .with_correlation_id(format!("c-{id}").into());
    (json!({"id": id, "code": code, "timeout_ms": 60_000}).to_string().into_bytes(), properties)
}

/// The next message as its properties and its body.
pub(crate) async fn next(replies: &mut Consumer) -> (BasicProperties, Value) {
    let message = tokio::time::timeout(PATIENCE, replies.next()).await.expect("no result came");
    opened(message.unwrap().unwrap())
}

fn opened(message: Delivery) -> (BasicProperties, Value) {
    let body = serde_json::from_slice(&message.data).unwrap();
    (message.properties, body)
}

/// Reads results until each of `ids` has one. Returns how often each came, and sees to it that duplicates carry
/// the same message id.
pub(crate) async fn collect(replies: &mut Consumer, ids: &[String]) -> HashMap<String, usize> {
    let mut seen: HashMap<String, (String, usize)> = HashMap::new();
    while seen.len() < ids.len() {
        let Ok(message) = tokio::time::timeout(PATIENCE, replies.next()).await else {
            let missing: Vec<_> = ids.iter().filter(|id| !seen.contains_key(*id)).collect();
            panic!("no result came for {missing:?}");
        };
        let (properties, body) = opened(message.unwrap().unwrap());
        let id = body["id"].as_str().unwrap().to_owned();
        assert!(ids.contains(&id), "{id} was never asked for");
        assert_eq!(body["status"], "succeeded", "{body}");
        assert_eq!(properties.correlation_id().as_ref().unwrap().as_str(), format!("c-{id}"));
        let message_id = properties.message_id().as_ref().unwrap().to_string();
        let entry = seen.entry(id).or_insert_with(|| (message_id.clone(), 0));
        assert_eq!(entry.0, message_id, "a duplicate carries another message id");
        entry.1 += 1;
    }
    seen.into_iter().map(|(id, (_, count))| (id, count)).collect()
}

/// Nothing more comes for a moment.
pub(crate) async fn assert_silent(replies: &mut Consumer) {
    let more = tokio::time::timeout(Duration::from_millis(500), replies.next()).await;
    assert!(more.is_err(), "one result too many: {more:?}");
}

/// What else has come, until nothing more does for a moment.
pub(crate) async fn rest(replies: &mut Consumer) -> HashMap<String, usize> {
    let mut seen = HashMap::new();
    while let Ok(message) = tokio::time::timeout(Duration::from_millis(500), replies.next()).await {
        let body: Value = serde_json::from_slice(&message.unwrap().unwrap().data).unwrap();
        *seen.entry(body["id"].as_str().unwrap().to_owned()).or_default() += 1;
    }
    seen
}
