//! Workers that come, go, die and meet.

use std::collections::HashSet;
use std::time::Duration;

use lapin::ExchangeKind;
use lapin::options::{ExchangeDeclareOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};

use crate::broker::Node;
use crate::requester::{Load, Requester, assert_silent, collect, next};
use crate::worker::Worker;
use crate::{Queues, eventually, oracle, skip};

async fn running(worker: &Worker, jobs: f64) {
    eventually("jobs run", async || (worker.metric("sandpiper_jobs_running") == jobs).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_full_slots() {
    let node = &Node::shared();
    for warm in [true, false] {
        killed(node, warm).await;
    }
}

async fn killed(node: &Node, warm: bool) {
    let queues = Queues::of(if warm { "killed-warm" } else { "killed-cold" });
    let settings = queues.settings(&["worker.slots=4", &format!("environments.default.warm={warm}")]);
    let mounts = oracle::mounts();
    let mut worker = Worker::ready(node.url(), &settings).await;
    if warm {
        worker.until_warm().await;
    }
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    let ids: Vec<String> = (0..4).map(|at| format!("job-{at}")).collect();
    // With a process of its own below it, and a file, so that there is something to leave behind.
    let code = "import os, time\nopen('left', 'w').write('x')\nif os.fork() == 0:\n    time.sleep(50)\ntime.sleep(5)";
    for id in &ids {
        requester.run(&queues.jobs, id, &queues.replies, code).await;
    }
    running(&worker, 4.0).await;
    // Of each job: its first process, python, and the child. Of the zygote: its first process, python, and two
    // children that stand by, with a first process each.
    let expected = if warm { 12 + 2 + 4 } else { 12 };
    let processes = eventually("every job has its processes", async || {
        let processes = worker.processes();
        (processes.len() >= expected).then_some(processes)
    })
    .await;
    // Else nothing would be found below because it is looked for in vain.
    if oracle::cgroups_of(worker.pid()).is_empty() {
        skip("no control groups here that could be left behind");
    }
    worker.kill();
    oracle::are_gone(&processes).await;
    assert_eq!(oracle::mounts(), mounts);
    assert_eq!(worker.scratch(), Vec::<std::path::PathBuf>::new());

    let mut heir = Worker::ready(node.url(), &settings).await;
    oracle::holds(node, &mut [&mut heir], &queues, &mut replies, &ids, &HashSet::new()).await;
    // Groups outlive their processes; whoever comes next clears them away.
    assert_eq!(oracle::cgroups_of(worker.pid()), Vec::<std::path::PathBuf>::new());
    let processes = heir.processes();
    heir.terminate();
    assert_eq!(heir.ended().await.code(), Some(0), "{}", heir.log());
    oracle::are_gone(&processes).await;
    assert_eq!(heir.scratch(), Vec::<std::path::PathBuf>::new());
    assert_eq!(oracle::cgroups_of(heir.pid()), Vec::<std::path::PathBuf>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn rolling_restart_under_load() {
    let node = &Node::shared();
    const ROUNDS: usize = 10;
    let queues = Queues::of("rolling");
    let settings = queues.settings(&["worker.slots=2"]);
    let mut worker = Worker::ready(node.url(), &settings).await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    let load = Load::start(node.url(), &queues, 0.05, Duration::from_millis(20)).await;
    for _ in 0..ROUNDS {
        eventually("the worker works", async || {
            (worker.metric("sandpiper_jobs_completed_total{status=\"succeeded\"}") > 2.0).then_some(())
        })
        .await;
        let next = Worker::ready(node.url(), &settings).await;
        worker.terminate();
        assert_eq!(worker.ended().await.code(), Some(0), "{}", worker.log());
        worker = next;
    }
    let ids = load.end().await;
    // In good order nothing is lost, and nothing comes twice either.
    oracle::holds(node, &mut [&mut worker], &queues, &mut replies, &ids, &HashSet::new()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_id_twice_at_once() {
    let node = &Node::shared();
    let queues = Queues::of("twins");
    let settings = queues.settings(&["worker.slots=1", "amqp.prefetch_surplus=0"]);
    let one = Worker::ready(node.url(), &settings).await;
    let two = Worker::ready(node.url(), &settings).await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    for _ in 0..2 {
        requester.run(&queues.jobs, "twin", &queues.replies, "import time; time.sleep(2)").await;
    }
    for worker in [&one, &two] {
        let received = "sandpiper_jobs_received_total{queue=\"twins.jobs\"} 1";
        eventually("each has one", async || worker.get("/metrics").1.contains(received).then_some(())).await;
    }
    let (first, _) = next(&mut replies).await;
    let (second, _) = next(&mut replies).await;
    assert!(first.message_id().is_some());
    assert_eq!(first.message_id(), second.message_id());
    assert_silent(&mut replies).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_one_takes_over_a_single_active_consumer_queue() {
    let node = &Node::shared();
    let queues = Queues::of("single");
    // Made by an operator, and taken as it is.
    let requester = Requester::connect(node.url()).await;
    for (name, single) in [(&queues.jobs, true), (&queues.results, false), (&queues.dead, false)] {
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
        if single {
            arguments.insert("x-single-active-consumer".into(), AMQPValue::Boolean(true));
        }
        let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        requester.channel.queue_declare(name.as_str().into(), options, arguments).await.unwrap();
    }
    let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    let (control, kind) = ("sandpiper.control".into(), ExchangeKind::Fanout);
    requester.channel.exchange_declare(control, kind, options, FieldTable::default()).await.unwrap();
    let settings = queues.settings(&["amqp.topology=passive", "worker.slots=1"]);
    let mut one = Worker::ready(node.url(), &settings).await;
    let two = Worker::ready(node.url(), &settings).await;
    let mut replies = requester.replies(&queues.replies).await;
    let ids: Vec<String> = (0..4).map(|at| format!("job-{at}")).collect();
    for id in &ids {
        requester.submit(&queues.jobs, id, &queues.replies).await;
    }
    collect(&mut replies, &ids).await;
    let taken = |worker: &Worker| worker.metric("sandpiper_jobs_completed_total{status=\"succeeded\"}");
    assert_eq!((taken(&one), taken(&two)), (4.0, 0.0), "one is active");
    let acked = "sandpiper_deliveries_settled_total{action=\"acked\"}";
    eventually("all are acked", async || (one.metric(acked) == 4.0).then_some(())).await;
    one.kill();
    for id in &ids {
        requester.submit(&queues.jobs, id, &queues.replies).await;
    }
    collect(&mut replies, &ids).await;
    assert_eq!(taken(&two), 4.0);
}
