//! Who is who: what one publisher may say of another's jobs, and what it may say in a worker's name.

use lapin::BasicProperties;
use lapin::options::{BasicPublishOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use serde_json::{Value, json};

use crate::broker::Node;
use crate::requester::{Requester, assert_silent, collect, next};
use crate::worker::Worker;
use crate::{Queues, eventually};

/// A user of the broker who may do everything but be somebody else.
async fn user(node: &Node, name: &str) -> Requester {
    Requester::connect(&node.add_user(name, [".*"; 3])).await
}

/// Says something to all workers, in the name of a user or in nobody's.
async fn say(requester: &Requester, command: &Value, user: Option<&str>, reply_to: &str) {
    let mut properties = BasicProperties::default().with_reply_to(reply_to.into());
    if let Some(user) = user {
        properties = properties.with_user_id(user.into());
    }
    let (options, body) = (BasicPublishOptions::default(), command.to_string());
    let channel = &requester.channel;
    let saying =
        channel.basic_publish("sandpiper.control".into(), "".into(), options, body.as_bytes(), properties);
    assert!(saying.await.unwrap().await.unwrap().is_ack());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_is_not_taken_for_anothers() {
    let node = &Node::shared();
    let queues = Queues::of("identity.ids");
    let _worker = Worker::ready(node.url(), &queues.settings(&[])).await;
    let (alice, mallory) = (user(node, "alice.ids").await, user(node, "mallory.ids").await);
    let mut results = alice.listen(&queues.results).await;
    let body = br#"{"id": "report-2041", "code": "print(1)"}"#;
    let named = |correlation: &str| BasicProperties::default().with_correlation_id(correlation.into());
    let mut ids = Vec::new();
    for (publisher, properties) in [
        (&alice, named("a").with_user_id("alice.ids".into())),
        (&alice, named("a").with_user_id("alice.ids".into())),
        (&mallory, named("m")),
        // All that she can copy.
        (&mallory, named("a")),
        (&mallory, named("a").with_user_id("mallory.ids".into())),
    ] {
        publisher.publish(&queues.jobs, body, properties).await;
        let (properties, result) = next(&mut results).await;
        assert_eq!(result["id"], "report-2041");
        ids.push(properties.message_id().as_ref().unwrap().to_string());
    }
    assert_eq!(ids[0], ids[1], "the same job of the same publisher");
    for other in &ids[2..] {
        assert_ne!(&ids[0], other, "{ids:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_else_counts_deliveries() {
    let node = &Node::shared();
    for kind in ["quorum", "classic"] {
        let queues = Queues::of(&format!("identity.count.{kind}"));
        let kind = format!("amqp.queue_type={kind}");
        let worker = Worker::ready(node.url(), &queues.settings(&[&kind])).await;
        let requester = Requester::connect(node.url()).await;
        let mut replies = requester.replies(&queues.replies).await;
        for signature in [None, Some(""), Some("AAAA"), Some("c2lnbmVk")] {
            let mut headers = FieldTable::default();
            headers.insert("x-sandpiper-deliveries".into(), AMQPValue::LongLongInt(1_000));
            headers.insert("x-sandpiper-user".into(), AMQPValue::LongString("alice".into()));
            if let Some(signature) = signature {
                headers.insert("x-sandpiper-signature".into(), AMQPValue::LongString(signature.into()));
            }
            let properties = BasicProperties::default()
                .with_reply_to(queues.replies.as_str().into())
                .with_headers(headers);
            requester.publish(&queues.jobs, br#"{"code": "print(1)"}"#, properties).await;
            let (_, result) = next(&mut replies).await;
            assert_eq!((&result["status"], &result["attempt"]), (&json!("succeeded"), &json!(1)), "{result}");
            assert_eq!(result["redelivered"], false);
        }
        assert_eq!(worker.metric("sandpiper_jobs_dead_lettered_total{reason=\"poison\"}"), 0.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_cancelled_by_whoever_may() {
    let node = &Node::shared();
    let queues = Queues::of("identity.cancel");
    let settings = queues.settings(&["worker.slots=1", "amqp.operators=[\"operator\"]"]);
    let worker = Worker::ready(node.url(), &settings).await;
    let (alice, mallory) = (user(node, "alice").await, user(node, "mallory").await);
    let operator = user(node, "operator").await;
    let mut replies = alice.replies(&queues.replies).await;
    let pongs = format!("{}.pongs", queues.replies);
    let mut pong = mallory.replies(&pongs).await;
    let run = async |id: &str| {
        let body = json!({"id": id, "code": "import time; time.sleep(50)", "timeout_ms": 60_000}).to_string();
        let properties = BasicProperties::default()
            .with_reply_to(queues.replies.as_str().into())
            .with_user_id("alice".into());
        alice.publish(&queues.jobs, body.as_bytes(), properties).await;
        eventually("the job runs", async || (worker.metric("sandpiper_jobs_running") == 1.0).then_some(()))
            .await;
    };
    run("hers").await;
    let cancel = json!({"cancel": "hers"});
    for _ in 0..100 {
        say(&mallory, &cancel, None, "").await;
        say(&mallory, &cancel, Some("mallory"), "").await;
    }
    // She does not even learn of it; and the answer comes after all that she said before.
    for (asker, name, sees) in [
        (&mallory, None, false),
        (&mallory, Some("mallory"), false),
        (&alice, Some("alice"), true),
        (&operator, Some("operator"), true),
    ] {
        say(asker, &json!({"ping": {}}), name, &pongs).await;
        let (_, answer) = next(&mut pong).await;
        assert_eq!(answer["jobs"].to_string().contains("hers"), sees, "{name:?}: {answer}");
    }
    assert_eq!(worker.metric("sandpiper_jobs_running"), 1.0);
    assert!(!worker.log().contains("asked to end a job"), "what hits nothing is not logged");
    say(&alice, &cancel, Some("alice"), "").await;
    assert_eq!(next(&mut replies).await.1["status"], "cancelled");
    assert!(worker.log().contains("asked to end a job"));
    run("hers-too").await;
    say(&operator, &json!({"cancel": "hers-too"}), Some("operator"), "").await;
    assert_eq!(next(&mut replies).await.1["status"], "cancelled");
    // Before it came, by somebody else.
    say(&mallory, &json!({"cancel": "later"}), Some("mallory"), "").await;
    let body = br#"{"id": "later", "code": "print(1)"}"#;
    let to = BasicProperties::default().with_reply_to(queues.replies.as_str().into());
    alice.publish(&queues.jobs, body, to.with_user_id("alice".into())).await;
    assert_eq!(next(&mut replies).await.1["status"], "succeeded");
    assert_silent(&mut replies).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn queues_that_nobody_reads_are_bounded() {
    let node = &Node::shared();
    let bounds = |queue: &str| {
        let table = node.list_queues(&["name", "arguments"]);
        let line = table.lines().find(|line| line.split_whitespace().next() == Some(queue));
        line.unwrap_or_else(|| panic!("{table}")).contains("x-max-length-bytes")
    };
    let queues = Queues::of("identity.bounded");
    let worker = Worker::ready(node.url(), &queues.settings(&["amqp.dead_max_bytes=0"])).await;
    assert!(bounds(&queues.results) && !bounds(&queues.dead) && !bounds(&queues.jobs));
    assert!(!worker.log().contains("another bound"), "{}", worker.log());
    drop(worker);
    // As an earlier version declared it: taken as it is, with a word about it.
    let requester = Requester::connect(node.url()).await;
    let queues = Queues::of("identity.unbounded");
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    let declaring =
        requester.channel.queue_declare(queues.results.as_str().into(), options, arguments.clone());
    declaring.await.unwrap();
    // And with a bound of its operator's.
    arguments.insert("x-delivery-limit".into(), AMQPValue::LongLongInt(1_000_000_000));
    arguments.insert("x-max-length-bytes".into(), AMQPValue::LongLongInt(5 << 20));
    requester.channel.queue_declare(queues.dead.as_str().into(), options, arguments).await.unwrap();
    let worker = Worker::ready(node.url(), &queues.settings(&[])).await;
    let log = worker.log();
    let warned: Vec<_> = log.lines().filter(|line| line.contains("another bound")).collect();
    assert_eq!(warned.len(), 2, "{log}");
    assert!(!bounds(&queues.results) && bounds(&queues.dead));
    let mut replies = requester.replies(&queues.replies).await;
    requester.submit(&queues.jobs, "works", &queues.replies).await;
    collect(&mut replies, &["works".into()]).await;
}
