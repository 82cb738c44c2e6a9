//! The worker against a real RabbitMQ node: what it promises about jobs, and the faults it has to survive.
//!
//! Needs `rabbitmq-server` and what `sandpiper doctor` calls required. A node takes seconds to start, so tests that do
//! not harm it share one for a run of nextest, each in a virtual host of its own ([`Node::shared`]). Those that stop,
//! freeze or fill it, or change what it is told, start one for themselves ([`Node::start`]).
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test that cannot go on has failed, and says why"
)]

mod amqp10;
#[path = "../support/broker.rs"]
mod broker;
mod canary;
mod clock;
mod cluster;
mod faults;
mod fleet;
mod identity;
mod neighbours;
mod network;
mod operators;
mod oracle;
#[path = "../support/proxy.rs"]
mod proxy;
mod queues;
mod replies;
mod requester;
mod shortage;
mod shutdown;
mod soak;
mod stranger;
mod stream;
mod tls;
mod traffic;
mod worker;

use std::time::Duration;

/// How long anything may take that has to happen. Generous: a busy machine is no failure.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `condition` gives something.
async fn eventually<T>(what: &str, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    let trying = async {
        loop {
            if let Some(value) = condition().await {
                return value;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, trying)
        .await
        .unwrap_or_else(|_| panic!("it never came to pass that {what}"))
}

/// Says that this machine cannot do a part; in CI that is a failure.
fn skip(why: &str) {
    assert!(std::env::var("CI").as_deref() != Ok("true"), "SKIPPED: {why}");
    println!("SKIPPED: {why}");
}

/// Names and settings of queues for one scenario.
struct Queues {
    jobs: String,
    results: String,
    dead: String,
    replies: String,
}

impl Queues {
    fn of(scenario: &str) -> Self {
        println!("--- {scenario}");
        let name = |kind: &str| format!("{scenario}.{kind}");
        Self { jobs: name("jobs"), results: name("results"), dead: name("dead"), replies: name("replies") }
    }

    fn settings(&self, more: &[&str]) -> Vec<String> {
        let mut settings = vec![
            format!("amqp.jobs_queue={}", self.jobs),
            format!("amqp.results_queue={}", self.results),
            format!("amqp.dead_queue={}", self.dead),
        ];
        settings.extend(more.iter().map(|setting| (*setting).to_owned()));
        settings
    }
}
