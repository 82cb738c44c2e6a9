//! What may happen to the broker while jobs are under way. No job is lost; some may come twice.

use std::time::Duration;

use lapin::options::QueueDeleteOptions;

use crate::broker::Node;
use crate::requester::{Load, Requester, collect};
use crate::worker::Worker;
use crate::{Queues, eventually};

const JOBS: usize = 40;
const SUCCEEDED: &str = "sandpiper_jobs_completed_total{status=\"succeeded\"}";

/// Publishes jobs that take a moment, so that some are under way when the fault comes.
async fn publish(requester: &Requester, queues: &Queues, name: &str) -> Vec<String> {
    let ids: Vec<String> = (0..JOBS).map(|at| format!("{name}-{at}")).collect();
    for id in &ids {
        requester.run(&queues.jobs, id, &queues.replies, "import time; time.sleep(0.1)").await;
    }
    ids
}

async fn under_way(worker: &Worker) {
    eventually("jobs are under way", async || (worker.metric(SUCCEEDED) > 2.0).then_some(())).await;
}

/// Every job has its result, nothing waits, and the worker takes jobs again.
async fn all_is_well(node: &Node, worker: &mut Worker, queues: &Queues, ids: &[String]) {
    let requester = Requester::connect(node.url()).await;
    // Not declared again: that would hide that the broker has forgotten it, and what was in it.
    let mut replies = requester.listen(&queues.replies).await;
    collect(&mut replies, ids).await;
    worker.until_ready().await;
    worker.assert_alive();
    eventually("nothing waits in the queue", async || {
        let running = worker.metric("sandpiper_jobs_running");
        (requester.waiting(&queues.jobs).await == 0 && running == 0.0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_closed_by_an_operator() {
    let node = &Node::shared();
    let queues = Queues::of("closed");
    let mut worker = Worker::ready(node.url(), &queues.settings(&[])).await;
    let requester = Requester::connect(node.url()).await;
    requester.declare(&queues.replies).await;
    let ids = publish(&requester, &queues, "job").await;
    under_way(&worker).await;
    node.ctl(&["close_all_connections", "-p", node.vhost(), "maintenance"]);
    all_is_well(node, &mut worker, &queues, &ids).await;
    let reconnects = "sandpiper_connection_reconnects_total{role=\"consume\"}";
    eventually("it has connected anew", async || (worker.metric(reconnects) >= 1.0).then_some(())).await;
    let log = worker.log();
    let said = log.lines().find(|line| line.contains("\"consume\"") && line.contains("trying again"));
    assert!(said.is_some_and(|said| said.contains("CONNECTION_FORCED - maintenance")), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_jobs_queue_is_deleted() {
    let node = &Node::shared();
    let queues = Queues::of("deleted");
    let mut worker = Worker::ready(node.url(), &queues.settings(&[])).await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    requester.channel.queue_delete(queues.jobs.as_str().into(), QueueDeleteOptions::default()).await.unwrap();
    eventually("the worker notices", async || {
        (worker.metric("sandpiper_connection_reconnects_total{role=\"consume\"}") >= 1.0).then_some(())
    })
    .await;
    worker.until_ready().await;
    requester.submit(&queues.jobs, "after", &queues.replies).await;
    collect(&mut replies, &["after".into()]).await;
    worker.assert_alive();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_memory_alarm() {
    let node = &Node::start();
    let (on, off) = (["absolute", "1MiB"], ["absolute", "512MiB"]);
    an_alarm(node, "memory", "set_vm_memory_high_watermark", &on, &off).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_alarm() {
    let node = &Node::start();
    an_alarm(node, "disk", "set_disk_free_limit", &["1000GB"], &["50MB"]).await;
}

async fn an_alarm(node: &Node, name: &str, set: &str, on: &[&str], off: &[&str]) {
    let queues = Queues::of(name);
    let mut worker = Worker::ready(node.url(), &queues.settings(&[])).await;
    let mut leaver = Worker::ready(node.url(), &queues.settings(&["worker.drain_timeout_ms=2000"])).await;
    let requester = Requester::connect(node.url()).await;
    requester.declare(&queues.replies).await;
    // Without an end and more than both can do, so that both have something to publish: the broker blocks whoever
    // publishes while the alarm is on, and tells nobody else.
    let load = Load::start(node.url(), &queues, 0.5, Duration::from_millis(50)).await;
    under_way(&worker).await;
    under_way(&leaver).await;
    node.ctl(&[&[set], on].concat());
    worker.until_not_ready().await;
    // One that has to go meanwhile cannot publish what it has done: it gives it back, and goes.
    leaver.until_not_ready().await;
    leaver.terminate();
    assert_eq!(leaver.ended().await.code(), Some(0), "{}", leaver.log());
    worker.assert_alive();
    assert_eq!(worker.metric("sandpiper_connection_up{role=\"publish\"}"), 1.0);
    assert_eq!(worker.metric("sandpiper_connection_blocked{role=\"publish\"}"), 1.0);
    eventually("the intake pauses and what ran has ended", async || {
        (worker.metric("sandpiper_jobs_running") == 0.0).then_some(())
    })
    .await;
    node.ctl(&[&[set], off].concat());
    let ids = load.end().await;
    all_is_well(node, &mut worker, &queues, &ids).await;
    assert_eq!(worker.metric("sandpiper_connection_reconnects_total{role=\"publish\"}"), 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn restarted_and_killed() {
    let node = &Node::start();
    let mut queues = Queues::of("restarted");
    let mut worker = Worker::ready(node.url(), &queues.settings(&[])).await;
    // A reply queue of its own for each round: a duplicate may come late.
    let name = |kill: bool| format!("restarted.replies.{kill}");
    let requester = Requester::connect(node.url()).await;
    for kill in [false, true] {
        requester.declare(&name(kill)).await;
    }
    // Stopped before it is killed, and every queue declared before that: a broker that is killed soon after it has
    // declared a queue, of either kind, may have forgotten it, with what it has confirmed. A clean stop writes it
    // down.
    for kill in [false, true] {
        queues.replies = name(kill);
        let requester = Requester::connect(node.url()).await;
        let before = worker.metric(SUCCEEDED);
        let ids = publish(&requester, &queues, if kill { "killed" } else { "stopped" }).await;
        eventually("jobs are under way", async || (worker.metric(SUCCEEDED) > before + 2.0).then_some(()))
            .await;
        if kill {
            node.kill();
        } else {
            node.stop();
        }
        worker.until_not_ready().await;
        worker.assert_alive();
        node.start_again();
        all_is_well(node, &mut worker, &queues, &ids).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn not_there_at_the_start() {
    let node = &Node::start();
    let queues = Queues::of("absent");
    node.stop();
    let mut worker = Worker::start(node.url(), &queues.settings(&[])).await;
    eventually("it has tried more than once", async || {
        (worker.metric("sandpiper_connection_reconnects_total{role=\"consume\"}") >= 2.0).then_some(())
    })
    .await;
    worker.until_not_ready().await;
    worker.assert_alive();
    assert!(!worker.log().contains("guest:guest"), "a password in the log");
    node.start_again();
    worker.until_ready().await;
    let requester = Requester::connect(node.url()).await;
    requester.declare(&queues.replies).await;
    let ids = publish(&requester, &queues, "job").await;
    all_is_well(node, &mut worker, &queues, &ids).await;
}
