//! Several queues for one worker, and queues of other kinds.

use lapin::BasicProperties;
use lapin::options::QueueDeleteOptions;
use lapin::types::{AMQPValue, FieldTable};
use sandpiper::amqp::dead::Dead;
use sandpiper::config::Config;

use crate::broker::Node;
use crate::proxy::Proxy;
use crate::requester::{Requester, collect, next};
use crate::worker::Worker;
use crate::{Queues, eventually};

/// Settings for two queues, the first with three times the weight of the second.
fn two(queues: &Queues, more: &[&str]) -> Vec<String> {
    let mut settings = vec![
        format!("amqp.queues=[{{name = \"{0}\", weight = 3}}, {{name = \"{0}.batch\"}}]", queues.jobs),
        format!("amqp.results_queue={}", queues.results),
        format!("amqp.dead_queue={}", queues.dead),
    ];
    settings.extend(more.iter().map(|setting| (*setting).to_owned()));
    settings
}

fn config(url: &str, settings: &[String]) -> Config {
    let pair = |setting: &str| setting.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()));
    let mut overrides: Vec<_> = settings.iter().filter_map(|setting| pair(setting)).collect();
    overrides.push(("amqp.url".into(), url.into()));
    Config::load(None, std::iter::empty(), &overrides).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn slots_are_shared_by_weight() {
    let node = &Node::shared();
    const JOBS: usize = 120;
    let queues = Queues::of("weights");
    let batch = format!("{}.batch", queues.jobs);
    // More than run, so that of both some always wait here, however slow the broker is.
    let more = ["worker.slots=2", "amqp.prefetch_surplus=40", "limits.timeout_ms.maximum=60000"];
    let settings = two(&queues, &more);
    // Declared by a worker that takes nothing.
    drop(Worker::ready(node.url(), &settings).await);
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    let names = |prefix: &str| (0..JOBS).map(|at| format!("{prefix}-{at}")).collect::<Vec<_>>();
    let (urgent, later) = (names("urgent"), names("later"));
    // The light one first, so that it has every chance to be in the way.
    for (queue, ids) in [(&batch, &later), (&queues.jobs, &urgent)] {
        for id in ids {
            requester.run(queue, id, &queues.replies, "import time; time.sleep(0.05)").await;
        }
    }
    let worker = Worker::ready(node.url(), &settings).await;
    let mut first = 0;
    for _ in 0..80 {
        let id = next(&mut replies).await.1["id"].as_str().unwrap().to_owned();
        first += usize::from(id.starts_with("urgent"));
    }
    println!("{first} of the first 80 results are from the queue of weight 3 of 4");
    assert!((52..=68).contains(&first), "{first} of 80 results from the queue of weight 3 of 4");
    for _ in 80..2 * JOBS {
        next(&mut replies).await;
    }
    for queue in [&queues.jobs, &batch] {
        assert_eq!(worker.metric(&format!("sandpiper_jobs_received_total{{queue=\"{queue}\"}}")), 120.0);
        assert_eq!(requester.waiting(queue).await, 0);
    }
    let metrics = worker.get("/metrics").1;
    assert_eq!(metrics.matches("sandpiper_jobs_received_total{").count(), 2, "other queues than configured");

    // What the heavy one leaves is there for the other: both slots.
    for id in ["a", "b"] {
        requester.run(&batch, id, &queues.replies, "import time; time.sleep(3)").await;
    }
    eventually("both slots run", async || (worker.metric("sandpiper_jobs_running") == 2.0).then_some(()))
        .await;
    collect(&mut replies, &["a".into(), "b".into()]).await;

    // One of them is deleted under the worker: all is set up again.
    requester.channel.queue_delete(batch.as_str().into(), QueueDeleteOptions::default()).await.unwrap();
    eventually("the worker says which", async || {
        worker.log().contains(&format!("cancelled the consumer of {batch}")).then_some(())
    })
    .await;
    worker.until_ready().await;
    for (queue, id) in [(&batch, "c"), (&queues.jobs, "d")] {
        requester.submit(queue, id, &queues.replies).await;
    }
    collect(&mut replies, &["c".into(), "d".into()]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_dead_go_back_to_where_they_came_from() {
    let node = &Node::shared();
    let queues = Queues::of("origin");
    let batch = format!("{}.batch", queues.jobs);
    let settings = two(&queues, &[]);
    let worker = Worker::ready(node.url(), &settings).await;
    let requester = Requester::connect(node.url()).await;
    requester.publish(&batch, b"no job", BasicProperties::default()).await;
    let amqp = config(node.url(), &settings).amqp;
    let one = async || {
        eventually("a message is dead", async || {
            let mut dead = Dead::open(&amqp).await.unwrap();
            match dead.next().await.unwrap() {
                Some(message) => Some((dead, message)),
                None => {
                    dead.close().await.unwrap();
                    None
                }
            }
        })
        .await
    };
    let (mut dead, message) = one().await;
    assert_eq!((dead.origin(&message), message.queue.as_deref()), (&*batch, Some(&*batch)));
    dead.replay(message).await.unwrap();
    dead.close().await.unwrap();
    let received = format!("sandpiper_jobs_received_total{{queue=\"{batch}\"}}");
    eventually("it came again by the same queue", async || (worker.metric(&received) == 2.0).then_some(()))
        .await;
    let (mut dead, message) = one().await;
    dead.purge().await.unwrap();
    drop((dead, message));
    // The copy is there before the original is acked: else that would come back, before what is to expire.
    let settled = "sandpiper_deliveries_settled_total{action=\"dead_lettered\"}";
    eventually("both are settled", async || (worker.metric(settled) == 2.0).then_some(())).await;
    drop(worker);
    let emptied = async || {
        // What was looked at is back when its connection has ended.
        eventually("it is back, and goes", async || {
            let purging = requester.channel.queue_purge(queues.dead.as_str().into(), Default::default());
            (purging.await.unwrap() == 1).then_some(())
        })
        .await;
    };
    emptied().await;

    // Expired in the queue, so dead by the broker's hand; and what its publisher says of the queue is not believed.
    let mut headers = FieldTable::default();
    for (name, queue) in [("x-sandpiper-queue", &queues.jobs), ("x-first-death-queue", &queues.jobs)] {
        headers.insert(name.into(), AMQPValue::LongString(queue.as_str().into()));
    }
    let properties = BasicProperties::default().with_headers(headers).with_expiration("1".into());
    requester.publish(&batch, br#"{"code": "print(1)"}"#, properties).await;
    let (dead, message) = one().await;
    assert_eq!(dead.origin(&message), batch);
    dead.close().await.unwrap();
    // Nor one that is not the operator's.
    let mut headers = FieldTable::default();
    headers.insert("x-sandpiper-queue".into(), AMQPValue::LongString("payments".into()));
    emptied().await;
    requester.publish(&queues.dead, b"forged", BasicProperties::default().with_headers(headers)).await;
    let (dead, message) = one().await;
    assert_eq!(dead.origin(&message), queues.jobs);
    dead.close().await.unwrap();
}

fn settings(queues: &Queues, more: &[&str]) -> Vec<String> {
    queues.settings(&[&["worker.slots=1", "amqp.prefetch_surplus=0"], more].concat())
}

const ACKED: &str = "sandpiper_deliveries_settled_total{action=\"acked\"}";

#[tokio::test(flavor = "multi_thread")]
async fn high_priorities_come_first_in_a_classic_queue() {
    let node = &Node::shared();
    let queues = Queues::of("priorities");
    let settings = settings(&queues, &["amqp.queue_type=classic", "amqp.max_priority=5"]);
    drop(Worker::ready(node.url(), &settings).await);
    let table = node.list_queues(&["name", "type"]);
    for queue in [&queues.jobs, &queues.results, &queues.dead] {
        assert!(table.contains(&format!("{queue}\tclassic")), "{table}");
    }
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    let order = ["low-0", "low-1", "low-2", "high-0", "high-1", "middle", "none"];
    for id in order {
        let properties = BasicProperties::default().with_reply_to(queues.replies.as_str().into());
        let properties = match id.split('-').next() {
            Some("low") => properties.with_priority(1),
            Some("high") => properties.with_priority(5),
            Some("middle") => properties.with_priority(3),
            _ => properties,
        };
        let job = format!("{{\"id\": \"{id}\", \"code\": \"print(1)\"}}");
        requester.publish(&queues.jobs, job.as_bytes(), properties).await;
    }
    let _worker = Worker::ready(node.url(), &settings).await;
    let mut seen = Vec::new();
    for _ in order {
        seen.push(next(&mut replies).await.1["id"].as_str().unwrap().to_owned());
    }
    assert_eq!(seen, ["high-0", "high-1", "middle", "low-0", "low-1", "low-2", "none"]);
}

/// RabbitMQ 4 deals two of a quorum queue's messages whose priority is above 4 to one of the others; 3 knows none.
#[tokio::test(flavor = "multi_thread")]
async fn high_priorities_come_first_in_a_quorum_queue() {
    let node = &Node::shared();
    let queues = Queues::of("priorities.quorum");
    let settings = settings(&queues, &[]);
    drop(Worker::ready(node.url(), &settings).await);
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    let names = |kind: &str| (0..6).map(|at| format!("{kind}-{at}")).collect::<Vec<_>>();
    let order = [names("low"), names("high")].concat();
    for id in &order {
        let priority = if id.starts_with("high") { 5 } else { 4 };
        let properties = BasicProperties::default().with_reply_to(queues.replies.as_str().into());
        let job = format!("{{\"id\": \"{id}\", \"code\": \"print(1)\"}}");
        requester.publish(&queues.jobs, job.as_bytes(), properties.with_priority(priority)).await;
    }
    let _worker = Worker::ready(node.url(), &settings).await;
    let mut seen = Vec::new();
    for _ in &order {
        seen.push(next(&mut replies).await.1["id"].as_str().unwrap().to_owned());
    }
    println!("{seen:?}");
    if node.is_at_least((4, 0)) {
        let high = seen[..9].iter().filter(|id| id.starts_with("high")).count();
        assert_eq!(high, 6, "{seen:?}");
    } else {
        assert_eq!(seen, order);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_worker_is_active_until_the_next_takes_over() {
    let node = &Node::shared();
    for kind in ["quorum", "classic"] {
        let queues = Queues::of(&format!("active.{kind}"));
        let kind = format!("amqp.queue_type={kind}");
        let settings = settings(&queues, &["amqp.single_active_consumer=true", &kind]);
        let mut first = Worker::ready(node.url(), &settings).await;
        let second = Worker::ready(node.url(), &settings).await;
        let requester = Requester::connect(node.url()).await;
        let mut replies = requester.replies(&queues.replies).await;
        let ids: Vec<String> = (0..10).map(|at| format!("job-{at}")).collect();
        for id in &ids[..8] {
            requester.submit(&queues.jobs, id, &queues.replies).await;
        }
        collect(&mut replies, &ids[..8]).await;
        eventually("all are acked", async || (first.metric(ACKED) == 8.0).then_some(())).await;
        assert_eq!(second.metric(ACKED), 0.0, "both are active");
        first.kill();
        for id in &ids[8..] {
            requester.submit(&queues.jobs, id, &queues.replies).await;
        }
        collect(&mut replies, &ids[8..]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_preferred_worker_gets_jobs_first() {
    let node = &Node::shared();
    for kind in ["quorum", "classic"] {
        let queues = Queues::of(&format!("preferred.{kind}"));
        let kind = format!("amqp.queue_type={kind}");
        // Room for one more job: the broker may hear of the next one before it hears of the ack of the last.
        let room = "amqp.prefetch_surplus=1";
        let other = Worker::ready(node.url(), &settings(&queues, &[&kind, room])).await;
        let first = settings(&queues, &[&kind, room, "amqp.consumer_priority=10"]);
        let first = Worker::ready(node.url(), &first).await;
        let requester = Requester::connect(node.url()).await;
        let mut replies = requester.replies(&queues.replies).await;
        for at in 0..10 {
            let id = format!("job-{at}");
            let acked = || first.metric(ACKED) + other.metric(ACKED) == f64::from(at);
            eventually("the last one is acked", async || acked().then_some(())).await;
            requester.submit(&queues.jobs, &id, &queues.replies).await;
            collect(&mut replies, &[id]).await;
        }
        // Without preference it were every other one.
        assert!(other.metric(ACKED) <= 1.0, "the other worker had {}", other.metric(ACKED));
        for at in 10..14 {
            requester
                .run(&queues.jobs, &format!("job-{at}"), &queues.replies, "import time; time.sleep(1)")
                .await;
        }
        eventually("a busy worker leaves jobs to the other", async || {
            (other.metric("sandpiper_jobs_running") == 1.0).then_some(())
        })
        .await;
        let ids: Vec<String> = (10..14).map(|at| format!("job-{at}")).collect();
        collect(&mut replies, &ids).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_passive_worker_declares_nothing() {
    let node = &Node::shared();
    let queues = Queues::of("passive");
    let passive = queues.settings(&["amqp.topology=passive"]);
    let mut worker = Worker::start(node.url(), &passive).await;
    let missing = format!(
        "find {}: it is not there, and amqp.topology = \\\"passive\\\" declares nothing; declare it as a durable \
         queue with the arguments x-delivery-limit=1000000000, x-max-length-bytes=1073741824, x-queue-type=quorum",
        queues.dead
    );
    eventually("it says what is missing", async || worker.log().contains(&missing).then_some(())).await;
    worker.until_not_ready().await;
    worker.assert_alive();
    assert!(!node.list_queues(&["name"]).contains("passive."), "it declared a queue");
    drop(Worker::ready(node.url(), &queues.settings(&[])).await);
    worker.until_ready().await;
    drop(worker);

    // Nor does it need to be allowed to.
    let url = node.add_user("watcher", ["^$", ".*", ".*"]);
    let worker = Worker::ready(&url, &passive).await;
    let log = worker.log();
    let said = log.lines().find(|line| line.contains("cancel and ping do not reach this worker"));
    assert!(said.is_some_and(|said| said.contains("amq.gen-*")), "{log}");
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    requester.submit(&queues.jobs, "allowed", &queues.replies).await;
    collect(&mut replies, &["allowed".into()]).await;
    worker.terminate();
    let mut worker = worker;
    assert_eq!(worker.ended().await.code(), Some(0), "{}", worker.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_passive_worker_takes_a_queue_of_another_type() {
    let node = &Node::shared();
    let queues = Queues::of("classic-after-all");
    drop(Worker::ready(node.url(), &queues.settings(&["amqp.queue_type=classic"])).await);
    let worker = Worker::ready(node.url(), &queues.settings(&["amqp.topology=passive"])).await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    requester.submit(&queues.jobs, "taken", &queues.replies).await;
    collect(&mut replies, &["taken".into()]).await;
    let refused = worker.log().contains("consuming it without a timeout");
    assert_eq!(refused, node.is_at_least((4, 3)), "{}", worker.log());
    assert_eq!(worker.metric("sandpiper_connection_reconnects_total{role=\"consume\"}"), 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_classic_queue_redelivers_without_running_twice() {
    let node = &Node::shared();
    let queues = Queues::of("redelivered");
    let settings = queues.settings(&["amqp.queue_type=classic"]);
    let proxy = Proxy::start(node.url()).await;
    let worker = Worker::ready(&proxy.url(), &settings).await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    requester.run(&queues.jobs, "slow", &queues.replies, "import time; time.sleep(10)").await;
    eventually("it runs", async || (worker.metric("sandpiper_jobs_running") == 1.0).then_some(())).await;
    proxy.reset();
    collect(&mut replies, &["slow".into()]).await;
    eventually("it is answered from memory", async || {
        worker.log().contains("was answered before").then_some(())
    })
    .await;
    assert_eq!(worker.metric("sandpiper_jobs_completed_total{status=\"succeeded\"}"), 1.0, "it ran twice");
    eventually("the queue is empty", async || (requester.waiting(&queues.jobs).await == 0).then_some(()))
        .await;
}
