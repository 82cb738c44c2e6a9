//! What may happen on the way to the broker. Made by a proxy, so that each fault comes exactly where it is meant.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use lapin::BasicProperties;
use tokio::net::TcpListener;

use crate::broker::Node;
use crate::proxy::{Fault, Proxy};
use crate::requester::{Requester, assert_silent, collect, next};
use crate::worker::Worker;
use crate::{Queues, eventually, oracle};

/// Nothing but a heartbeat would notice in time: every other patience is a minute.
const HEARTBEAT_ONLY: [&str; 3] =
    ["amqp.heartbeat_ms=1000", "amqp.operation_timeout_ms=60000", "amqp.connect_timeout_ms=2000"];

/// Two heartbeats, and what a busy machine takes to act on them. Far below [`HEARTBEAT_ONLY`]'s minute.
const NOTICED: Duration = Duration::from_secs(30);

const JOBS: usize = 12;

async fn publish(requester: &Requester, queues: &Queues, code: &str) -> Vec<String> {
    let ids: Vec<String> = (0..JOBS).map(|at| format!("job-{at}")).collect();
    for id in &ids {
        requester.run(&queues.jobs, id, &queues.replies, code).await;
    }
    ids
}

async fn running(worker: &Worker) {
    eventually("a job runs", async || (worker.metric("sandpiper_jobs_running") >= 1.0).then_some(())).await;
}

fn all(ids: &[String]) -> HashSet<String> {
    ids.iter().cloned().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_broker_is_noticed_by_its_heartbeat() {
    let node = &Node::start();
    let queues = Queues::of("frozen");
    let mut worker = Worker::ready(node.url(), &queues.settings(&HEARTBEAT_ONLY)).await;
    let requester = Requester::connect(node.url()).await;
    requester.declare(&queues.replies).await;
    let ids = publish(&requester, &queues, "import time; time.sleep(0.5)").await;
    running(&worker).await;
    let begin = Instant::now();
    node.freeze();
    worker.until_not_ready().await;
    let noticed = begin.elapsed();
    // The other connection as well, so that nobody goes on with half a broker.
    eventually("both connections are down", async || {
        let up = |role| worker.metric(&format!("sandpiper_connection_up{{role=\"{role}\"}}"));
        (up("consume") + up("publish") == 0.0).then_some(())
    })
    .await;
    worker.assert_alive();
    node.thaw();
    assert!(noticed < NOTICED, "noticed after {noticed:?}");
    // The requester of before may have been cut off as well.
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    oracle::holds(node, &mut [&mut worker], &queues, &mut replies, &ids, &all(&ids)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_half_open_connection_is_noticed_by_its_heartbeat() {
    let node = &Node::shared();
    let queues = Queues::of("half-open");
    let proxy = Proxy::start(node.url()).await;
    let settings = queues.settings(&[&HEARTBEAT_ONLY[..], &["worker.slots=2"]].concat());
    let mut worker = Worker::ready(&proxy.url(), &settings).await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    let ids = publish(&requester, &queues, "import time; time.sleep(0.5)").await;
    running(&worker).await;
    let begin = Instant::now();
    proxy.set(Fault::Blackhole);
    worker.until_not_ready().await;
    assert!(begin.elapsed() < NOTICED, "noticed after {:?}", begin.elapsed());
    worker.assert_alive();
    // What was held back arrives late, as it may in a real network; nobody may act on it any more.
    proxy.set(Fault::None);
    oracle::holds(node, &mut [&mut worker], &queues, &mut replies, &ids, &all(&ids)).await;
    assert!(!worker.log().contains("PRECONDITION"), "a delivery of the old channel was acked on the new one");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_accepts_and_is_silent() {
    let node = &Node::shared();
    let queues = Queues::of("silent");
    let proxy = Proxy::start(node.url()).await;
    proxy.set(Fault::Silent);
    let mut worker = Worker::start(&proxy.url(), &queues.settings(&["amqp.connect_timeout_ms=500"])).await;
    eventually("it gave up more than once", async || {
        (worker.metric("sandpiper_connection_reconnects_total{role=\"consume\"}") >= 2.0).then_some(())
    })
    .await;
    worker.assert_alive();
    assert!(worker.log().contains("within 500ms"), "{}", worker.log());
    proxy.set(Fault::None);
    proxy.reset();
    worker.until_ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_confirm_that_never_comes() {
    let node = &Node::shared();
    let queues = Queues::of("unconfirmed");
    let proxy = Proxy::start(node.url()).await;
    let settings = queues.settings(&["amqp.operation_timeout_ms=3000", "amqp.connect_timeout_ms=3000"]);
    let mut worker = Worker::ready(&proxy.url(), &settings).await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    // So that a channel for results is open, and nothing but the confirm is waited for.
    requester.submit(&queues.jobs, "before", &queues.replies).await;
    collect(&mut replies, &["before".into()]).await;
    // Its own confirm has come as well: else it is that one which is held back, and its channel is not free.
    let acked = "sandpiper_deliveries_settled_total{action=\"acked\"}";
    eventually("it is settled", async || (worker.metric(acked) == 1.0).then_some(())).await;
    // Before the job, so that no haste is needed: the connection for results has nothing else to hear.
    proxy.set(Fault::HoldConfirms);
    requester.submit(&queues.jobs, "job-0", &queues.replies).await;
    let (first, _) = next(&mut replies).await;
    let timed_out = "sandpiper_results_published_total{outcome=\"timed_out\"}";
    eventually("the confirm is overdue", async || (worker.metric(timed_out) >= 1.0).then_some(())).await;
    assert_eq!(worker.metric(acked), 1.0, "acked too early");
    worker.until_not_ready().await;
    proxy.set(Fault::None);
    let (second, body) = next(&mut replies).await;
    assert_eq!(body["id"], "job-0");
    assert_eq!(first.message_id(), second.message_id(), "a duplicate carries another message id");
    requester.submit(&queues.jobs, "after", &queues.replies).await;
    oracle::holds(node, &mut [&mut worker], &queues, &mut replies, &["after".into()], &HashSet::new()).await;
    assert_eq!(worker.metric(acked), 3.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_between_the_confirm_and_the_ack() {
    let node = &Node::shared();
    let queues = Queues::of("unacked");
    let proxy = Proxy::start(node.url()).await;
    let mut worker = Worker::ready(&proxy.url(), &queues.settings(&[])).await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    // Before the job, which still comes in: only what the worker says there is held back.
    proxy.set(Fault::HoldAcks);
    requester.submit(&queues.jobs, "job-0", &queues.replies).await;
    let (first, body) = next(&mut replies).await;
    assert_eq!((&body["id"], &body["redelivered"]), (&"job-0".into(), &false.into()));
    // Sent, as far as the worker knows, and on its way for ever.
    let acked = "sandpiper_deliveries_settled_total{action=\"acked\"}";
    eventually("the worker has acked", async || (worker.metric(acked) == 1.0).then_some(())).await;
    worker.kill();
    proxy.reset();
    proxy.set(Fault::None);
    let _next = Worker::ready(node.url(), &queues.settings(&[])).await;
    let (second, body) = next(&mut replies).await;
    assert_eq!((&body["id"], &body["redelivered"]), (&"job-0".into(), &true.into()));
    assert_eq!(first.message_id(), second.message_id(), "a duplicate carries another message id");
    assert_silent(&mut replies).await;
    assert_eq!(requester.waiting(&queues.jobs).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_addresses_are_dead() {
    let node = &Node::shared();
    let queues = Queues::of("addresses");
    let closed = {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap()
    };
    let silent = Proxy::start(node.url()).await;
    silent.set(Fault::Silent);
    let urls = format!("[\"amqp://{closed}\", \"{}\", \"{}\"]", silent.url(), node.url());
    let timeout = Duration::from_secs(5);
    let worker = Worker::start(&urls, &queues.settings(&["amqp.connect_timeout_ms=5000"])).await;
    let begin = Instant::now();
    worker.until_ready().await;
    // One timeout for the silent one; both connections are dialled at the same time.
    assert!(begin.elapsed() < 2 * timeout, "connected after {:?}", begin.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn cut_off_at_any_byte_of_the_handshake() {
    let node = &Node::shared();
    let queues = Queues::of("cut");
    let proxy = Proxy::start(node.url()).await;
    let settings = queues.settings(&["amqp.connect_timeout_ms=1000", "amqp.operation_timeout_ms=10000"]);
    let mut worker = Worker::ready(&proxy.url(), &settings).await;
    let reconnects = "sandpiper_connection_reconnects_total{role=\"consume\"}";
    // In the greeting, in the tuning, at the queues, and where the worker thinks that it is up.
    for bytes in [0, 7, 300, 520, 560, 620, 700, 800] {
        let before = worker.metric(reconnects);
        proxy.set(Fault::CutAfter(bytes));
        proxy.reset();
        eventually("it was cut off and tries again", async || {
            (worker.metric(reconnects) > before).then_some(())
        })
        .await;
        worker.assert_alive();
    }
    proxy.set(Fault::Refuse);
    let before = worker.metric(reconnects);
    eventually("it is refused and tries again", async || (worker.metric(reconnects) > before).then_some(()))
        .await;
    proxy.set(Fault::None);
    proxy.reset();
    worker.until_ready().await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    let ids = publish(&requester, &queues, "print(1)").await;
    oracle::holds(node, &mut [&mut worker], &queues, &mut replies, &ids, &HashSet::new()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_and_reset() {
    let node = &Node::shared();
    let queues = Queues::of("slow");
    let proxy = Proxy::start(node.url()).await;
    proxy.set(Fault::Latency(Duration::from_millis(100)));
    let mut worker = Worker::ready(&proxy.url(), &queues.settings(&[])).await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    let ids = publish(&requester, &queues, "import time; time.sleep(0.2)").await;
    running(&worker).await;
    proxy.reset();
    // While they run, and while what they wrote is under way.
    worker.until_ready().await;
    proxy.reset();
    oracle::holds(node, &mut [&mut worker], &queues, &mut replies, &ids, &all(&ids)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_without_names_do_not_answer_for_each_other() {
    let node = &Node::shared();
    const TWINS: usize = 2;
    let queues = Queues::of("nameless");
    let settings = queues.settings(&["worker.slots=1", "amqp.prefetch_surplus=1"]);
    let proxy = Proxy::start(node.url()).await;
    let mut worker = Worker::ready(&proxy.url(), &settings).await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    // The same words twice: two jobs.
    let job = br#"{"code": "import time; time.sleep(4)"}"#;
    for _ in 0..TWINS {
        let properties = BasicProperties::default().with_reply_to(queues.replies.as_str().into());
        requester.publish(&queues.jobs, job, properties).await;
    }
    eventually("one runs and one waits", async || {
        let received = worker.metric("sandpiper_jobs_received_total{queue=\"nameless.jobs\"}");
        (received == 2.0 && worker.metric("sandpiper_jobs_running") == 1.0).then_some(())
    })
    .await;
    proxy.reset();
    let mut ids = HashSet::new();
    // The one that ran has two: its ack was lost, and nothing tells it from the other.
    for _ in 0..TWINS + 1 {
        ids.insert(next(&mut replies).await.1["id"].as_str().unwrap().to_owned());
    }
    assert_eq!(ids.len(), TWINS + 1, "one answered for the other");
    worker.assert_alive();
    let lost = worker.metric("sandpiper_deliveries_settled_total{action=\"lost\"}");
    assert_eq!(lost, 2.0, "what waited and what ran were lost with their channel");
}
