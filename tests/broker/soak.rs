//! Faults by chance, one after the other, while jobs go through. At the end nothing is lost.
//!
//! Short by default; `SP_SOAK_SECONDS=180` makes it long, `SP_SOAK_SEED=…` repeats one.

use std::collections::HashSet;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::broker::Node;
use crate::proxy::{Fault, Proxy};
use crate::requester::Requester;
use crate::worker::Worker;
use crate::{Queues, oracle};

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// What happens next.
#[derive(Debug)]
enum Event {
    Network(Fault),
    Closed,
    Frozen,
    KilledWorker,
    Restarted,
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_by_chance() {
    let node = &Node::start();
    let queues = Queues::of("soak");
    let seed = number("SP_SOAK_SEED")
        .unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos().into());
    let time = Duration::from_secs(number("SP_SOAK_SECONDS").unwrap_or(15));
    println!("SP_SOAK_SEED={seed}, for {time:?}");
    let mut chance = StdRng::seed_from_u64(seed);

    let proxy = Proxy::start(node.url()).await;
    let settings = queues.settings(&[
        "worker.slots=2",
        "amqp.heartbeat_ms=1000",
        "amqp.operation_timeout_ms=2000",
        "amqp.connect_timeout_ms=1000",
        "amqp.reconnect_max_ms=500",
        // Every fault may cost a delivery, and none of these jobs is poison.
        "amqp.delivery_limit=1000",
    ]);
    let mut workers =
        vec![Worker::ready(&proxy.url(), &settings).await, Worker::ready(&proxy.url(), &settings).await];
    Requester::connect(node.url()).await.declare(&queues.replies).await;
    let begin = Instant::now();
    let mut ids = Vec::new();
    while begin.elapsed() < time {
        // Its connection does not go through the proxy, but operators and the heartbeat end it as well.
        let requester = Requester::connect(node.url()).await;
        for _ in 0..chance.random_range(1..8) {
            let id = format!("job-{}", ids.len());
            let code = format!("import time; time.sleep({})", chance.random_range(0.0..0.3));
            requester.run(&queues.jobs, &id, &queues.replies, &code).await;
            ids.push(id);
        }
        let event = match chance.random_range(0..10) {
            0 => Event::Network(Fault::Refuse),
            1 => Event::Network(Fault::Blackhole),
            2 => Event::Network(Fault::HoldAcks),
            3 => Event::Network(Fault::HoldConfirms),
            4 => Event::Network(Fault::CutAfter(chance.random_range(0..3_000))),
            5 => Event::Network(Fault::Latency(Duration::from_millis(chance.random_range(1..200)))),
            6 => Event::Closed,
            7 => Event::Frozen,
            8 => Event::KilledWorker,
            _ => Event::Restarted,
        };
        println!("{:6.2} s: {event:?}", begin.elapsed().as_secs_f64());
        happen(node, &proxy, &mut workers, &settings, event, &mut chance).await;
    }
    proxy.set(Fault::None);
    println!("{} jobs in {:?}", ids.len(), begin.elapsed());
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.listen(&queues.replies).await;
    let doubled: HashSet<String> = ids.iter().cloned().collect();
    let mut workers: Vec<&mut Worker> = workers.iter_mut().collect();
    oracle::holds(node, &mut workers, &queues, &mut replies, &ids, &doubled).await;
}

async fn happen(
    node: &Node,
    proxy: &Proxy,
    workers: &mut [Worker],
    settings: &[String],
    event: Event,
    chance: &mut StdRng,
) {
    let a_while = Duration::from_millis(chance.random_range(50..2_500));
    let one = chance.random_range(0..workers.len());
    match event {
        Event::Network(fault) => {
            proxy.set(fault);
            if chance.random_bool(0.5) {
                proxy.reset();
            }
            tokio::time::sleep(a_while).await;
            proxy.set(Fault::None);
        }
        Event::Closed => drop(node.ctl(&["close_all_connections", "chance"])),
        Event::Frozen => {
            node.freeze();
            tokio::time::sleep(a_while).await;
            node.thaw();
        }
        Event::KilledWorker => {
            let processes = workers[one].processes();
            workers[one].kill();
            oracle::are_gone(&processes).await;
            assert_eq!(workers[one].scratch(), Vec::<std::path::PathBuf>::new());
            workers[one] = Worker::start(&proxy.url(), settings).await;
        }
        Event::Restarted => {
            workers[one].terminate();
            workers[one].ended().await;
            workers[one] = Worker::start(&proxy.url(), settings).await;
        }
    }
}
