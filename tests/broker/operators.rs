//! What operators do to a broker, on purpose or not.

use std::collections::HashSet;
use std::time::Duration;

use lapin::BasicProperties;
use lapin::options::{BasicPublishOptions, QueueDeclareOptions, QueueDeleteOptions, QueuePurgeOptions};
use lapin::types::{AMQPValue, FieldTable};
use serde_json::json;

use crate::broker::Node;
use crate::proxy::Proxy;
use crate::requester::{Requester, collect, next};
use crate::worker::Worker;
use crate::{Queues, eventually, oracle};

const RECONNECTS: &str = "sandpiper_connection_reconnects_total{role=\"consume\"}";

#[tokio::test(flavor = "multi_thread")]
async fn a_queue_with_other_arguments() {
    let node = &Node::shared();
    let queues = Queues::of("mismatch");
    let requester = Requester::connect(node.url()).await;
    let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    requester
        .channel
        .queue_declare(queues.jobs.as_str().into(), options, FieldTable::default())
        .await
        .unwrap();
    let mut worker = Worker::start(node.url(), &queues.settings(&[])).await;
    eventually("it has tried more than once", async || (worker.metric(RECONNECTS) >= 3.0).then_some(()))
        .await;
    worker.assert_alive();
    worker.until_not_ready().await;
    let log = worker.log();
    let said =
        log.lines().find(|line| line.contains("x-dead-letter-exchange")).unwrap_or_else(|| panic!("{log}"));
    assert!(said.contains(&queues.jobs) && said.contains("topology"), "no remedy in {said}");
    // Slower each time: at two seconds at most here, half a minute by default.
    let waits: Vec<_> = log.lines().filter(|line| line.contains("\"pause\"")).collect();
    assert!(waits.len() < 20, "it spins: {} tries", waits.len());

    let deleted =
        requester.channel.queue_delete(queues.jobs.as_str().into(), QueueDeleteOptions::default()).await;
    deleted.unwrap();
    worker.until_ready().await;
}

/// Has the broker take back what is not acked in time, unless a consumer asked for a time of its own.
fn expect_acks(node: &Node, timeout: Duration, look: Duration) {
    for (key, value) in [("consumer_timeout", timeout), ("channel_tick_interval", look)] {
        node.ctl(&["eval", &format!("application:set_env(rabbit, {key}, {}).", value.as_millis())]);
    }
}

const SHORT: [Duration; 2] = [Duration::from_millis(1_500), Duration::from_millis(500)];
const USUAL: [Duration; 2] = [Duration::from_secs(1_800), Duration::from_secs(60)];

#[tokio::test(flavor = "multi_thread")]
async fn the_ack_timeout() {
    let node = &Node::start();
    let queues = Queues::of("overdue");
    let [timeout, look] = SHORT;
    expect_acks(node, timeout, look);
    let proxy = Proxy::start(node.url()).await;
    proxy.set_consumer_timeout(timeout);
    let settings = queues.settings(&["amqp.delivery_limit=2", "worker.slots=2"]);
    let mut worker = Worker::ready(&proxy.url(), &settings).await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    requester.run(&queues.jobs, "slow", &queues.replies, "import time; time.sleep(4)").await;
    let lost = "sandpiper_deliveries_settled_total{action=\"lost\"}";
    eventually("the ack that came too late is counted", async || (worker.metric(lost) >= 1.0).then_some(()))
        .await;
    // Its result came all the same. That it comes again does not count as poison, and once it has a result it is
    // answered with that.
    eventually("it is answered from memory", async || {
        worker.log().contains("was answered before").then_some(())
    })
    .await;
    assert_eq!(worker.metric("sandpiper_jobs_completed_total{status=\"succeeded\"}"), 1.0, "it ran twice");
    // 4.3 cancels the consumer and says nothing; before that the channel is closed with a reason.
    let why = match node.is_at_least((4, 3)) {
        true => "the broker cancelled the consumer of overdue.jobs",
        false => "PRECONDITION_FAILED - delivery acknowledgement on channel",
    };
    let log = worker.log();
    assert!(log.contains(why), "{log}");
    let [timeout, look] = USUAL;
    expect_acks(node, timeout, look);
    requester.submit(&queues.jobs, "after", &queues.replies).await;
    let (ids, doubled) = (["slow".to_owned(), "after".to_owned()], HashSet::from(["slow".to_owned()]));
    oracle::holds(node, &mut [&mut worker], &queues, &mut replies, &ids, &doubled).await;
    assert_eq!(requester.waiting(&queues.dead).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_says_how_long_its_jobs_may_take() {
    let node = &Node::start();
    // Earlier versions ask no consumer.
    if !node.is_at_least((4, 3)) {
        return;
    }
    let queues = Queues::of("patient");
    let [timeout, look] = SHORT;
    expect_acks(node, timeout, look);
    let worker = Worker::ready(node.url(), &queues.settings(&["worker.slots=2"])).await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    // Longer than the broker waited for the one before this, where the worker had no say.
    requester.run(&queues.jobs, "slow", &queues.replies, "import time; time.sleep(12)").await;
    collect(&mut replies, &["slow".into()]).await;
    let settled =
        |action| worker.metric(&format!("sandpiper_deliveries_settled_total{{action=\"{action}\"}}"));
    eventually("it is settled", async || (settled("acked") + settled("lost") == 1.0).then_some(())).await;
    assert_eq!((settled("acked"), worker.metric(RECONNECTS)), (1.0, 0.0), "{}", worker.log());
    let [timeout, look] = USUAL;
    expect_acks(node, timeout, look);
}

/// Cuts the worker off, and waits until it was not let in again more than once.
async fn until_refused(node: &Node, worker: &mut Worker) {
    let before = worker.metric(RECONNECTS);
    node.ctl(&["close_all_connections", "-p", "tenant", "revoked"]);
    eventually("it is refused more than once", async || {
        (worker.metric(RECONNECTS) >= before + 2.0).then_some(())
    })
    .await;
    worker.until_not_ready().await;
    worker.assert_alive();
}

#[tokio::test(flavor = "multi_thread")]
async fn permissions_and_password_are_lost() {
    let node = &Node::shared();
    const SECRETS: [&str; 2] = ["f1rst-secret", "sec0nd-secret"];
    let queues = Queues::of("revoked");
    node.ctl(&["add_vhost", "tenant"]);
    node.ctl(&["add_user", "worker", SECRETS[0]]);
    let grant = || node.ctl(&["set_permissions", "-p", "tenant", "worker", ".*", ".*", ".*"]);
    grant();
    let url = |secret: &str| format!("amqp://worker:{secret}@{}/tenant", node.address());
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), url(SECRETS[0])).unwrap();
    let from_file = format!("amqp.url_file={}", file.path().display());
    let mut worker = Worker::ready("amqp://127.0.0.1:1", &queues.settings(&[&from_file])).await;

    node.ctl(&["clear_permissions", "-p", "tenant", "worker"]);
    until_refused(node, &mut worker).await;
    grant();
    worker.until_ready().await;

    node.ctl(&["change_password", "worker", SECRETS[1]]);
    until_refused(node, &mut worker).await;
    // The file is read anew: nobody has to restart the worker.
    std::fs::write(file.path(), url(SECRETS[1])).unwrap();
    worker.until_ready().await;

    node.ctl(&["delete_vhost", "tenant"]);
    worker.until_not_ready().await;
    worker.assert_alive();
    node.ctl(&["add_vhost", "tenant"]);
    grant();
    worker.until_ready().await;
    let log = worker.log();
    assert!(SECRETS.iter().all(|secret| !log.contains(secret)), "a password in the log");
    assert!(log.contains("ACCESS_REFUSED") || log.contains("ACCESS-REFUSED"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn small_frames() {
    let node = &Node::shared();
    let queues = Queues::of("frames");
    // The smallest that the broker agrees to.
    let frame = if node.is_at_least((4, 1)) { 8_192 } else { 4_096 };
    let url = format!("{}?frame_max={frame}", node.url());
    let mut worker = Worker::ready(&url, &queues.settings(&[])).await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    let code = format!("# {}\nprint('y' * 500_000)", "x".repeat(200_000));
    requester.run(&queues.jobs, "large", &queues.replies, &code).await;
    let (_, body) = next(&mut replies).await;
    assert_eq!(body["stdout"].as_str().map(str::len), Some(500_001), "{}", body["error"]);
    // Headers that fit the frame by themselves, and no longer with ours on the copy for the dead queue.
    let mut headers = FieldTable::default();
    headers.insert("large".into(), AMQPValue::LongString("h".repeat(frame - 1_096).as_str().into()));
    let properties =
        BasicProperties::default().with_headers(headers).with_reply_to(queues.replies.as_str().into());
    requester.publish(&queues.jobs, b"no job", properties).await;
    let (_, body) = next(&mut replies).await;
    assert_eq!(body["status"], "rejected");
    let dead = requester.take(&queues.dead).await;
    assert!(dead.properties.headers().as_ref().unwrap().inner().contains_key("x-sandpiper-reason"));
    requester.submit(&queues.jobs, "after", &queues.replies).await;
    oracle::holds(node, &mut [&mut worker], &queues, &mut replies, &["after".into()], &HashSet::new()).await;
    assert_eq!(worker.metric(RECONNECTS), 0.0);
    assert_eq!(worker.metric("sandpiper_connection_reconnects_total{role=\"publish\"}"), 0.0);
}

/// Memory of the worker itself, without its jobs, in MiB. Not the pages of its binary, which an unoptimised build
/// has three times as many of.
fn anonymous(worker: &Worker) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", worker.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() / 1_024.0
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_backlog() {
    let node = &Node::shared();
    const WAITING: usize = 20_000;
    let queues = Queues::of("backlog");
    let worker = Worker::ready(node.url(), &queues.settings(&["worker.slots=2"])).await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    // Both slots taken, so that all else waits; and what a first job costs is spent.
    let ids = ["one".to_owned(), "two".to_owned()];
    for id in &ids {
        requester.submit(&queues.jobs, id, &queues.replies).await;
    }
    collect(&mut replies, &ids).await;
    let before = anonymous(&worker);
    let body = json!({"code": format!("# {}", "x".repeat(2_000))}).to_string();
    let mut confirms = Vec::new();
    for _ in 0..WAITING {
        let properties =
            BasicProperties::default().with_reply_to(queues.replies.as_str().into()).with_delivery_mode(2);
        let published = requester
            .channel
            .basic_publish(
                "".into(),
                queues.jobs.as_str().into(),
                BasicPublishOptions::default(),
                body.as_bytes(),
                properties,
            )
            .await
            .unwrap();
        confirms.push(published);
    }
    for confirm in confirms {
        confirm.await.unwrap();
    }
    let done = worker.metric("sandpiper_jobs_completed_total{status=\"succeeded\"}");
    eventually("it works on the backlog", async || {
        (worker.metric("sandpiper_jobs_completed_total{status=\"succeeded\"}") > done + 200.0).then_some(())
    })
    .await;
    // A queue that does not answer within a quarter of a second counts as empty.
    let waiting = eventually("the broker says how many wait", async || {
        Some(requester.waiting(&queues.jobs).await).filter(|waiting| *waiting > 0)
    })
    .await;
    let during = anonymous(&worker);
    println!("{waiting} jobs waiting: {during:.1} MiB; before there was any: {before:.1} MiB");
    assert!(waiting > 10_000, "only {waiting} are left: this says nothing about a backlog");
    assert!(during < before + 8.0 && during < 40.0, "{during} MiB, {before} before");
    requester.channel.queue_purge(queues.jobs.as_str().into(), QueuePurgeOptions::default()).await.unwrap();
}
