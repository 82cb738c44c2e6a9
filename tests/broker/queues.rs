//! Several queues for one worker, and queues of other kinds.

use lapin::BasicProperties;
use lapin::options::QueueDeleteOptions;
use lapin::types::{AMQPValue, FieldTable};
use sandpiper::amqp::dead::Dead;
use sandpiper::config::Config;

use crate::broker::Node;
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

pub(crate) async fn slots_are_shared_by_weight(node: &Node) {
    const JOBS: usize = 120;
    let queues = Queues::of("weights");
    let batch = format!("{}.batch", queues.jobs);
    let settings = two(&queues, &["worker.slots=2"]);
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
        worker.log().contains(&format!("ended the consumer of {batch}")).then_some(())
    })
    .await;
    worker.until_ready().await;
    for (queue, id) in [(&batch, "c"), (&queues.jobs, "d")] {
        requester.submit(queue, id, &queues.replies).await;
    }
    collect(&mut replies, &["c".into(), "d".into()]).await;
}

pub(crate) async fn the_dead_go_back_to_where_they_came_from(node: &Node) {
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
    drop(worker);
    requester.channel.queue_purge(queues.dead.as_str().into(), Default::default()).await.unwrap();

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
    requester.channel.queue_purge(queues.dead.as_str().into(), Default::default()).await.unwrap();
    requester.publish(&queues.dead, b"forged", BasicProperties::default().with_headers(headers)).await;
    let (dead, message) = one().await;
    assert_eq!(dead.origin(&message), queues.jobs);
    dead.close().await.unwrap();
}
