//! How a worker ends, and that no job ends with it.

use std::time::{Duration, Instant};

use crate::broker::Node;
use crate::requester::{Requester, assert_silent, collect, next};
use crate::worker::Worker;
use crate::{Queues, eventually};

async fn running(worker: &Worker, jobs: f64) {
    eventually("jobs run", async || (worker.metric("sandpiper_jobs_running") == jobs).then_some(())).await;
}

fn ids(count: usize) -> Vec<String> {
    (0..count).map(|at| format!("job-{at}")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn drained_under_load() {
    let node = &Node::shared();
    let queues = Queues::of("drained");
    let settings = queues.settings(&["worker.slots=2", "amqp.prefetch_surplus=4"]);
    let mut worker = Worker::ready(node.url(), &settings).await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    let ids = ids(10);
    for id in &ids[..2] {
        requester.run(&queues.jobs, id, &queues.replies, "import time; time.sleep(10)").await;
    }
    running(&worker, 2.0).await;
    for id in &ids[2..] {
        requester.submit(&queues.jobs, id, &queues.replies).await;
    }
    let received = "sandpiper_jobs_received_total{queue=\"drained.jobs\"}";
    eventually("it holds as many as it may", async || (worker.metric(received) == 6.0).then_some(())).await;
    worker.terminate();
    eventually("what has not started is given back at once", async || {
        (requester.waiting(&queues.jobs).await == 8).then_some(())
    })
    .await;
    worker.assert_alive();
    assert_eq!(worker.ended().await.code(), Some(0), "{}", worker.log());
    // What ran has its result; the rest is for another worker. Nothing comes twice, and nothing is in both places.
    collect(&mut replies, &ids[..2]).await;
    assert_silent(&mut replies).await;
    let _next = Worker::ready(node.url(), &settings).await;
    collect(&mut replies, &ids[2..]).await;
    assert_silent(&mut replies).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_only_given_back_is_no_poison() {
    let node = &Node::shared();
    // Before 4.3 a quorum queue counts what was given back like what was lost, and drops it after so many times.
    if !node.is_at_least((4, 3)) {
        return;
    }
    const LIMIT: u64 = 2;
    let queues = Queues::of("given-back");
    let limit = format!("amqp.delivery_limit={LIMIT}");
    let settings = queues.settings(&["worker.slots=1", "worker.drain_timeout_ms=100", &limit]);
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    let mut worker = Worker::ready(node.url(), &settings).await;
    let ids = ids(2);
    for id in &ids {
        requester.run(&queues.jobs, id, &queues.replies, "import time; time.sleep(8)").await;
    }
    let received = format!("sandpiper_jobs_received_total{{queue=\"{}\"}}", queues.jobs);
    for _ in 0..=LIMIT {
        // One runs, and one waits for its slot.
        running(&worker, 1.0).await;
        eventually("it holds both", async || (worker.metric(&received) == 2.0).then_some(())).await;
        worker.terminate();
        assert_eq!(worker.ended().await.code(), Some(0), "{}", worker.log());
        worker = Worker::ready(node.url(), &settings).await;
    }
    for _ in &ids {
        let (_, result) = next(&mut replies).await;
        assert_eq!(result["status"], "succeeded", "{result}");
        // One that is given back while the other is may come to the same worker once more.
        assert!(result["attempt"].as_u64().unwrap() >= LIMIT + 2, "{result}");
    }
    assert_silent(&mut replies).await;
    assert_eq!(requester.waiting(&queues.dead).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_the_end_of_the_drain_time() {
    let node = &Node::shared();
    let queues = Queues::of("impatient");
    let settings = queues.settings(&["worker.slots=2", "worker.drain_timeout_ms=1000"]);
    let mut worker = Worker::ready(node.url(), &settings).await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    for id in ids(2) {
        requester.run(&queues.jobs, &id, &queues.replies, "import time; time.sleep(40)").await;
    }
    running(&worker, 2.0).await;
    let start = Instant::now();
    worker.terminate();
    assert_eq!(worker.ended().await.code(), Some(0), "{}", worker.log());
    assert!(start.elapsed() < Duration::from_secs(30), "it waited for its jobs");
    eventually("what was killed is given back", async || {
        (requester.waiting(&queues.jobs).await == 2).then_some(())
    })
    .await;
    assert_silent(&mut replies).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_at_once() {
    let node = &Node::shared();
    let queues = Queues::of("second");
    let settings = queues.settings(&["worker.slots=1"]);
    let mut worker = Worker::ready(node.url(), &settings).await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    requester.run(&queues.jobs, "job-0", &queues.replies, "import time; time.sleep(5)").await;
    running(&worker, 1.0).await;
    worker.terminate();
    eventually("it drains", async || worker.log().contains("\"draining\"").then_some(())).await;
    worker.terminate();
    // Another code than after a drain: it did not wait for its job.
    assert_eq!(worker.ended().await.code(), Some(3), "{}", worker.log());
    // The broker gives the job to the next one.
    let _next = Worker::ready(node.url(), &settings).await;
    collect(&mut replies, &ids(1)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn drained_while_the_broker_is_away() {
    let node = &Node::start();
    let queues = Queues::of("away");
    let mut worker = Worker::ready(node.url(), &queues.settings(&[])).await;
    node.stop();
    worker.until_not_ready().await;
    worker.terminate();
    assert_eq!(worker.ended().await.code(), Some(0), "{}", worker.log());
}
