//! Where results go, and what they carry.

use lapin::BasicProperties;
use lapin::options::{BasicGetOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable};

use crate::broker::Node;
use crate::requester::{Requester, assert_silent, collect, next};
use crate::worker::Worker;
use crate::{Queues, eventually};

const DIRECT: &str = "amq.rabbitmq.reply-to";

#[tokio::test(flavor = "multi_thread")]
async fn properties_are_as_promised() {
    let node = &Node::shared();
    let queues = Queues::of("properties");
    let worker = Worker::ready(node.url(), &queues.settings(&[])).await;
    let requester = Requester::connect(node.url()).await;
    let mut headers = FieldTable::default();
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    headers.insert("traceparent".into(), AMQPValue::LongString(trace.into()));
    headers.insert("tracestate".into(), AMQPValue::LongString("vendor=t61rcWkgMzE".into()));
    headers.insert("private".into(), AMQPValue::LongString("not yours".into()));
    let asked = BasicProperties::default()
        .with_correlation_id("Ünïcode \u{7f} and spaces ".into())
        .with_message_id("from-the-envelope".into())
        .with_headers(headers);
    // Twice, and without reply_to: the results queue.
    for _ in 0..2 {
        requester.publish(&queues.jobs, br#"{"code": "print(1)"}"#, asked.clone()).await;
    }
    let mut ids = Vec::new();
    for _ in 0..2 {
        let result = requester.take(&queues.results).await;
        let properties = &result.properties;
        let text = |property: &Option<lapin::types::ShortString>| property.as_ref().unwrap().to_string();
        assert_eq!(properties.correlation_id(), asked.correlation_id());
        assert_eq!(text(properties.content_type()), "application/json");
        assert_eq!(text(properties.kind()), "result");
        assert_eq!(*properties.delivery_mode(), Some(2));
        assert!(properties.timestamp().is_some());
        let headers = properties.headers().as_ref().unwrap().inner();
        assert_eq!(headers["traceparent"], AMQPValue::LongString(trace.into()));
        assert_eq!(headers["tracestate"], AMQPValue::LongString("vendor=t61rcWkgMzE".into()));
        assert!(!headers.contains_key("private"));
        let body: serde_json::Value = serde_json::from_slice(&result.data).unwrap();
        assert_eq!(body["id"], "from-the-envelope");
        ids.push(text(properties.message_id()));
    }
    assert_eq!(ids[0], ids[1], "the same job has the same message id");
    let log = worker.log();
    let ended = log.lines().filter(|line| line.contains("job ended"));
    let traced = ended.filter(|line| line.contains("\"trace_id\":\"0af7651916cd43dd8448eb211c80319c\""));
    assert_eq!(traced.count(), 2, "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vanished_reply_queue_is_replaced_by_the_results_queue() {
    let node = &Node::shared();
    let queues = Queues::of("vanished");
    let worker = Worker::ready(node.url(), &queues.settings(&[])).await;
    let requester = Requester::connect(node.url()).await;
    requester.submit(&queues.jobs, "lost", "nobody.has.this.queue").await;
    let mut results = requester.listen(&queues.results).await;
    collect(&mut results, &["lost".into()]).await;
    assert_eq!(worker.metric("sandpiper_results_published_total{outcome=\"returned\"}"), 1.0);
    // The requester may have the result before the worker has its confirm.
    let redirected = async || (worker.metric("sandpiper_results_redirected_total") == 1.0).then_some(());
    eventually("the result is counted as redirected", redirected).await;
    let log = worker.log();
    let line = log.lines().find(|line| line.contains("went to the results queue"));
    assert!(line.is_some_and(|line| line.contains("\"id\":\"lost\"")), "{line:?}");

    // Even the results queue may vanish.
    requester
        .channel
        .queue_delete(queues.results.as_str().into(), QueueDeleteOptions::default())
        .await
        .unwrap();
    requester.submit(&queues.jobs, "twice-lost", "nobody.has.this.queue").await;
    eventually("the results queue is back with the result", async || {
        let probe = Requester::connect(node.url()).await;
        let get = BasicGetOptions { no_ack: true };
        probe.channel.basic_get(queues.results.as_str().into(), get).await.ok().flatten().map(drop)
    })
    .await;
    assert!(!worker.log().contains("\\\"stdout\\\""), "a result in the log");
}

#[tokio::test(flavor = "multi_thread")]
async fn direct_reply_to_is_served_alive_and_survived_dead() {
    let node = &Node::shared();
    let queues = Queues::of("direct");
    let worker = Worker::ready(node.url(), &queues.settings(&[])).await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.listen(DIRECT).await;
    requester.submit(&queues.jobs, "alive", DIRECT).await;
    collect(&mut replies, &["alive".into()]).await;
    assert_silent(&mut replies).await;

    let gone = Requester::connect(node.url()).await;
    let _never_read = gone.listen(DIRECT).await;
    gone.run(&queues.jobs, "dead", DIRECT, "import time; time.sleep(2)").await;
    drop((_never_read, gone));
    let dropped = "sandpiper_results_published_total{outcome=\"dropped\"}";
    eventually("the result is dropped and counted", async || (worker.metric(dropped) == 1.0).then_some(()))
        .await;
    requester.submit(&queues.jobs, "after", DIRECT).await;
    collect(&mut replies, &["after".into()]).await;
    assert_eq!(worker.metric("sandpiper_connection_reconnects_total{role=\"publish\"}"), 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hostile_reply_to_harms_nobody_else() {
    let node = &Node::shared();
    let queues = Queues::of("hostile");
    let worker = Worker::ready(node.url(), &queues.settings(&[])).await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    let mut results = requester.listen(&queues.results).await;
    let refused = [
        format!("{DIRECT}.bogus.bogus"),
        format!("{DIRECT}.Ym9ndXM=.Ym9ndXM="),
        // Well formed, but of a node that no broker names so.
        format!("{DIRECT}.g2d3A3hAeQAAAAEAAAAAAQ==.a2V5a2V5a2V5a2V5a2V5aw=="),
        "tab\tand\nnewline".to_owned(),
        queues.jobs.clone(),
        queues.dead.clone(),
    ];
    for (at, reply_to) in refused.iter().enumerate() {
        requester.submit(&queues.jobs, &format!("hostile-{at}"), reply_to).await;
        let (_, result) = next(&mut results).await;
        assert_eq!(result["status"], "rejected", "{reply_to:?}: {result}");
        assert!(result["error"].as_str().unwrap().contains("reply_to"), "{result}");
    }
    // Not hostile, only odd: no queue of that name.
    requester.submit(&queues.jobs, "long", &"q".repeat(255)).await;
    requester.submit(&queues.jobs, "empty", "").await;
    collect(&mut results, &["long".into(), "empty".into()]).await;
    // As the broker writes them, but of a node that never was.
    let stranger = format!("{DIRECT}.g1h3CXJlcGx5QDEyMwAABAAAAAAAYwECAw==.a2V5a2V5a2V5a2V5a2V5aw==");
    requester.submit(&queues.jobs, "stranger", &stranger).await;
    requester.submit(&queues.jobs, "after", &queues.replies).await;
    collect(&mut replies, &["after".into()]).await;
    for role in ["consume", "publish"] {
        let reconnects = format!("sandpiper_connection_reconnects_total{{role=\"{role}\"}}");
        assert_eq!(worker.metric(&reconnects), 0.0, "a stranger cost everybody the connection");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_reply_queue_is_replaced_by_the_results_queue() {
    let node = &Node::shared();
    let queues = Queues::of("full");
    let worker = Worker::ready(node.url(), &queues.settings(&[])).await;
    let requester = Requester::connect(node.url()).await;
    let mut arguments = FieldTable::default();
    arguments.insert("x-max-length".into(), AMQPValue::LongLongInt(1));
    arguments.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
    let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    requester.channel.queue_declare(queues.replies.as_str().into(), options, arguments).await.unwrap();
    requester.publish(&queues.replies, b"in the way", BasicProperties::default()).await;
    let mut results = requester.listen(&queues.results).await;
    requester.submit(&queues.jobs, "refused", &queues.replies).await;
    collect(&mut results, &["refused".into()]).await;
    let nacked = "sandpiper_results_published_total{outcome=\"nacked\"}";
    assert_eq!(worker.metric(nacked), 2.0, "once more, by another channel, and then no more");
    assert_eq!(worker.metric("sandpiper_results_redirected_total"), 1.0);
    // For a minute it is not even asked.
    requester.submit(&queues.jobs, "remembered", &queues.replies).await;
    collect(&mut results, &["remembered".into()]).await;
    assert_eq!(worker.metric(nacked), 2.0);
    assert_eq!(requester.take(&queues.replies).await.data, b"in the way");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vanished_dead_queue_is_declared_again() {
    let node = &Node::shared();
    let queues = Queues::of("undead");
    let _worker = Worker::ready(node.url(), &queues.settings(&[])).await;
    let requester = Requester::connect(node.url()).await;
    let mut results = requester.listen(&queues.results).await;
    let deleting = requester.channel.queue_delete(queues.dead.as_str().into(), QueueDeleteOptions::default());
    deleting.await.unwrap();
    requester.publish(&queues.jobs, b"no job", BasicProperties::default()).await;
    let (_, result) = next(&mut results).await;
    assert_eq!(result["status"], "rejected", "{result}");
    assert_eq!(requester.take(&queues.dead).await.data, b"no job");
    assert_silent(&mut results).await;
}
