//! One requester's reply address beside everybody else's jobs: it costs its own results their way and nobody a wait.
//!
//! Each kind is tried on a worker of two slots that has never seen the address: so many jobs with it, and then one of a
//! stranger. That one takes no more than [`TIMES`] what it takes behind as many ordinary jobs.

use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::StreamExt;
use lapin::options::{QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Consumer};
use serde_json::{Value, json};

use crate::broker::Node;
use crate::requester::{Requester, collect, next};
use crate::worker::Worker;
use crate::{PATIENCE, Queues, eventually};

/// The bound.
const TIMES: u32 = 3;

/// Jobs before the stranger's: more than the worker holds at one time, and enough that what a busy machine adds to a
/// single one does not decide.
const JOBS: usize = 20;

/// The same where each has megabytes of output.
const LARGE_JOBS: usize = 8;

/// Each is measured so often, and the one in the middle counts.
const ROUNDS: usize = 5;

const DIRECT: &str = "amq.rabbitmq.reply-to";

/// A worker, somebody who harms, and a stranger.
struct Scene {
    queues: Queues,
    worker: Worker,
    requester: Requester,
    stranger: Consumer,
    results: Consumer,
    usual: Duration,
}

impl Scene {
    async fn new(node: &Node, kind: &str) -> Self {
        Self::with_ordinary(node, kind, &ordinary(), ROUNDS).await
    }

    /// Ordinary jobs have these bodies.
    async fn with_ordinary(node: &Node, kind: &str, ordinary: &[Vec<u8>], rounds: usize) -> Self {
        let queues = Queues::of(&format!("neighbours.{kind}"));
        let settings = queues.settings(&["worker.slots=2", "amqp.prefetch_surplus=2"]);
        let worker = Worker::ready(node.url(), &settings).await;
        worker.until_warm().await;
        let requester = Requester::connect(node.url()).await;
        let stranger = requester.replies(&queues.replies).await;
        let results = requester.listen(&queues.results).await;
        let mut scene = Self { queues, worker, requester, stranger, results, usual: Duration::ZERO };
        let other = format!("{}.ordinary", scene.queues.jobs);
        let mut read = scene.requester.replies(&other).await;
        let mut took = Vec::new();
        for round in 0..rounds {
            took.push(scene.measure(&format!("usual-{round}"), ordinary, &other).await);
            for _ in ordinary {
                next(&mut read).await;
            }
        }
        scene.usual = middle(took);
        scene
    }

    /// So many messages for one reply address, then a stranger's job: how long that takes.
    ///
    /// From the first message on: while a busy machine publishes the last, the first may have come to their end, and the
    /// stranger would wait behind fewer than there are in the other measurement.
    async fn measure(&mut self, id: &str, bodies: &[Vec<u8>], reply_to: &str) -> Duration {
        let properties = BasicProperties::default().with_reply_to(reply_to.into());
        let start = Instant::now();
        self.requester.publish_all(&self.queues.jobs, bodies, properties).await;
        self.stranger_waits(start, id).await
    }

    async fn stranger_waits(&mut self, start: Instant, id: &str) -> Duration {
        self.requester.submit(&self.queues.jobs, id, &self.queues.replies).await;
        collect(&mut self.stranger, &[id.into()]).await;
        start.elapsed()
    }

    /// Every message for the address ended in the results queue, with that status.
    async fn redirected(&mut self, count: usize, status: &str) -> Vec<Value> {
        let mut all = Vec::new();
        for _ in 0..count {
            let (_, result) = next(&mut self.results).await;
            assert_eq!(result["status"], status, "{result}");
            all.push(result);
        }
        all
    }

    /// Prints what was measured, and compares.
    fn judge(&self, kind: &str, took: Vec<Duration>) {
        let (took, usual) = (middle(took), self.usual);
        let ratio = took.as_secs_f64() / usual.as_secs_f64();
        println!("{kind}: a stranger's job took {took:.1?}, {ratio:.2} times the usual {usual:.1?}");
        assert!(took <= usual * TIMES, "{kind}: {took:?} is more than {TIMES} times {usual:?}");
    }

    /// Nothing of this cost the worker a connection, and all is settled.
    async fn unharmed(&mut self) {
        for role in ["consume", "publish"] {
            let reconnects = format!("sandpiper_connection_reconnects_total{{role=\"{role}\"}}");
            assert_eq!(self.worker.metric(&reconnects), 0.0, "a stranger cost everybody the connection");
        }
        self.worker.until_ready().await;
        eventually("nothing waits for a confirm", async || {
            (self.worker.metric("sandpiper_oldest_publish_seconds") == 0.0).then_some(())
        })
        .await;
    }
}

fn middle(mut took: Vec<Duration>) -> Duration {
    took.sort();
    took[took.len() / 2]
}

fn ordinary() -> Vec<Vec<u8>> {
    vec![br#"{"code": "print(1)"}"#.to_vec(); JOBS]
}

/// A queue that holds so many messages and refuses more.
async fn bounded(requester: &Requester, name: &str, most: i64) {
    let mut arguments = FieldTable::default();
    arguments.insert("x-max-length".into(), AMQPValue::LongLongInt(most));
    arguments.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
    let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    requester.channel.queue_declare(name.into(), options, arguments).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reply_queue_that_refuses() {
    let node = &Node::shared();
    for (kind, body, status) in [
        ("refusing", &br#"{"code": "print(1)"}"#[..], "succeeded"),
        // They need not be jobs.
        ("refusing.malformed", b"x", "rejected"),
    ] {
        let mut scene = Scene::new(node, kind).await;
        let mut took = Vec::new();
        for round in 0..ROUNDS {
            let evil = format!("{kind}.evil-{round}");
            bounded(&scene.requester, &evil, 0).await;
            let bodies = vec![body.to_vec(); JOBS];
            took.push(scene.measure(&format!("stranger-{round}"), &bodies, &evil).await);
            scene.redirected(JOBS, status).await;
        }
        scene.judge(kind, took);
        let nacked = scene.worker.metric("sandpiper_results_published_total{outcome=\"nacked\"}");
        assert!(nacked <= f64::from(u32::try_from(ROUNDS * 2 * JOBS).unwrap()), "{nacked} attempts");
        scene.unharmed().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bounded_reply_queue_whose_reader_died() {
    let node = &Node::shared();
    let mut scene = Scene::new(node, "dead-reader").await;
    let mut took = Vec::new();
    for round in 0..ROUNDS {
        let full = format!("dead-reader.full-{round}");
        bounded(&scene.requester, &full, 2).await;
        took.push(scene.measure(&format!("stranger-{round}"), &ordinary(), &full).await);
        // What there is room for is there, and the rest where somebody can find it. How much there was room for is
        // the queue's affair: what comes at the same time it may take, or refuse.
        eventually("every result is somewhere", async || {
            let there = scene.requester.waiting(&full).await;
            (scene.worker.metric("sandpiper_results_redirected_total") + f64::from(there) > 0.0).then_some(())
        })
        .await;
        let there = usize::try_from(scene.requester.waiting(&full).await).unwrap();
        scene.redirected(JOBS - there, "succeeded").await;
    }
    scene.judge("a bounded reply queue whose reader died", took);
    scene.unharmed().await;
}

/// An address as the broker writes it for a process of its own that is no channel and answers nothing it does not
/// know.
async fn forged(node: &Node, requester: &Requester, queue: &str) -> String {
    let _listening = requester.listen(DIRECT).await;
    requester.declare(queue).await;
    requester.publish(queue, b"", BasicProperties::default().with_reply_to(DIRECT.into())).await;
    let address = requester.take(queue).await.properties.reply_to().as_ref().unwrap().to_string();
    let said = node.ctl(&["eval", "pid_to_list(whereis(file_server_2))."]);
    let id: u32 = said.split('.').nth(1).unwrap().parse().unwrap();
    let mut parts: Vec<String> = address.strip_prefix(DIRECT).unwrap().split('.').map(Into::into).collect();
    let mut process = STANDARD.decode(&parts[1]).unwrap();
    // Id, serial and creation, which has four bytes in the form that brokers use.
    let at = process.len() - 12;
    process[at..at + 4].copy_from_slice(&id.to_be_bytes());
    process[at + 4..at + 8].copy_from_slice(&[0; 4]);
    parts[1] = STANDARD.encode(process);
    format!("{DIRECT}{}", parts.join("."))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forged_direct_address() {
    let node = &Node::shared();
    let mut scene = Scene::new(node, "forged").await;
    let mut took = Vec::new();
    for round in 0..ROUNDS {
        // Each with another key: none is known yet.
        let requester = Requester::connect(node.url()).await;
        let address = forged(node, &requester, &format!("forged.{round}")).await;
        took.push(scene.measure(&format!("stranger-{round}"), &ordinary(), &address).await);
        scene.redirected(JOBS, "succeeded").await;
    }
    scene.judge("a forged direct address", took);
    // One that is alive is served beside it, by its own queue and no other.
    let listener = Requester::connect(node.url()).await;
    let mut direct = listener.listen(DIRECT).await;
    listener.submit(&scene.queues.jobs, "alive", DIRECT).await;
    collect(&mut direct, &["alive".into()]).await;
    scene.unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reply_queue_that_never_confirms() {
    let node = &Node::shared();
    let mut scene = Scene::new(node, "deaf").await;
    let mut took = Vec::new();
    for round in 0..ROUNDS {
        let deaf = format!("deaf.deaf-{round}");
        scene.requester.declare(&deaf).await;
        let asleep = Asleep::new(node, &deaf);
        took.push(scene.measure(&format!("stranger-{round}"), &ordinary(), &deaf).await);
        scene.redirected(JOBS, "succeeded").await;
        drop(asleep);
        // What was sent to it before it was known arrives as well, and makes it known as one that takes results.
        eventually("it takes results again", async || {
            scene.requester.submit(&scene.queues.jobs, "again", &deaf).await;
            let before = scene.requester.waiting(&deaf).await;
            tokio::time::sleep(Duration::from_millis(100)).await;
            (before > 0).then_some(())
        })
        .await;
        while tokio::time::timeout(Duration::from_millis(300), scene.results.next()).await.is_ok() {}
    }
    scene.judge("a reply queue that never confirms", took);
    scene.unharmed().await;
}

/// A queue whose process is suspended, as one without a majority: it is there, takes messages, and never says so.
struct Asleep<'a> {
    node: &'a Node,
    queue: String,
}

impl<'a> Asleep<'a> {
    fn new(node: &'a Node, queue: &str) -> Self {
        let this = Self { node, queue: queue.to_owned() };
        this.say("suspend");
        this
    }

    fn say(&self, what: &str) {
        let queue = format!("rabbit_misc:r(<<\"{}\">>, queue, <<\"{}\">>)", self.node.vhost(), self.queue);
        let said = self.node.ctl(&[
            "eval",
            &format!("{{ok, Q}} = rabbit_amqqueue:lookup({queue}), sys:{what}(amqqueue:get_pid(Q))."),
        ]);
        assert_eq!(said.trim(), "ok");
    }
}

impl Drop for Asleep<'_> {
    fn drop(&mut self) {
        self.say("resume");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reply_queue_that_is_deleted_under_way() {
    let node = &Node::shared();
    let mut scene = Scene::new(node, "deleted").await;
    let mut took = Vec::new();
    for round in 0..ROUNDS {
        let gone = format!("deleted.gone-{round}");
        scene.requester.declare(&gone).await;
        let properties = BasicProperties::default().with_reply_to(gone.as_str().into());
        let start = Instant::now();
        scene.requester.publish_all(&scene.queues.jobs, &ordinary(), properties).await;
        let deleting =
            scene.requester.channel.queue_delete(gone.as_str().into(), QueueDeleteOptions::default());
        deleting.await.unwrap();
        took.push(scene.stranger_waits(start, &format!("stranger-{round}")).await);
    }
    scene.judge("a reply queue that is deleted under way", took);
    scene.unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publisher_without_the_right_to_its_reply_queue() {
    let node = &Node::shared();
    let mut scene = Scene::new(node, "no-right").await;
    // It may publish jobs and nothing else: its reply queue cannot be declared, and what it names is another's.
    let url = node.add_user("tenant", ["^$", "^amq\\.default$", "^$"]);
    let tenant = Requester::connect(&url).await;
    let options = QueueDeclareOptions::default();
    let own = tenant.channel.queue_declare("no-right.own".into(), options, FieldTable::default()).await;
    assert!(own.is_err(), "it has the right");
    let tenant = Requester::connect(&url).await;
    let mut took = Vec::new();
    for round in 0..ROUNDS {
        let properties = BasicProperties::default()
            .with_reply_to(format!("no-right.own-{round}").as_str().into())
            .with_user_id("tenant".into());
        let start = Instant::now();
        tenant.publish_all(&scene.queues.jobs, &ordinary(), properties).await;
        took.push(scene.stranger_waits(start, &format!("stranger-{round}")).await);
        scene.redirected(JOBS, "succeeded").await;
    }
    scene.judge("a publisher without the right to its reply queue", took);
    scene.unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_that_the_broker_does_not_take() {
    let node = &Node::start();
    const MIB: usize = 1 << 20;
    let large = |bytes: usize| {
        let code = format!("print('x' * {bytes})");
        json!({"code": code, "limits": {"output_bytes": 8 * MIB}}).to_string().into_bytes()
    };
    let limit = |bytes: usize| {
        // Channels that are opened from here on.
        node.ctl(&["eval", &format!("application:set_env(rabbit, max_message_size, {bytes}).")]);
    };
    let usual = node.ctl(&["eval", "application:get_env(rabbit, max_message_size)."]);
    limit(64 * MIB);
    let mut scene = Scene::with_ordinary(node, "too-large", &vec![large(6 * MIB); LARGE_JOBS], 3).await;
    limit(4 * MIB);
    // Its channels know the limit of before.
    let settings = scene.queues.settings(&["worker.slots=2", "amqp.prefetch_surplus=2"]);
    scene.worker = Worker::ready(node.url(), &settings).await;
    scene.worker.until_warm().await;
    let own = scene.queues.replies.clone() + ".own";
    let mut replies = scene.requester.replies(&own).await;
    let mut took = Vec::new();
    // Once: each moves 48 MiB.
    let bodies = vec![large(6 * MIB); LARGE_JOBS];
    took.push(scene.measure("stranger", &bodies, &own).await);
    for _ in 0..LARGE_JOBS {
        let (_, result) = next(&mut replies).await;
        assert_eq!(result["status"], "succeeded");
        assert_eq!(result["stdout_truncated"], true);
        let length = result["stdout"].as_str().unwrap().len();
        assert!(length > 3 * MIB && length < 4 * MIB, "{length}");
        assert!(result["error"].as_str().unwrap().contains("max_message_size"), "{}", result["error"]);
    }
    scene.judge("results that are too large for the broker", took);
    scene.unharmed().await;

    // A result of exactly what the broker takes, which is what RabbitMQ 4 takes by default.
    limit(16 * MIB);
    scene.worker = Worker::ready(node.url(), &settings).await;
    let code = format!("import sys\nfor s in sys.stdout, sys.stderr: s.write('x' * {})", 8 * MIB);
    let body = json!({"id": "exactly", "code": code, "limits": {"output_bytes": 8 * MIB}}).to_string();
    let properties = BasicProperties::default().with_reply_to(own.as_str().into());
    scene.requester.publish(&scene.queues.jobs, body.as_bytes(), properties).await;
    let result = tokio::time::timeout(PATIENCE, replies.next()).await.unwrap().unwrap().unwrap();
    assert!(result.data.len() <= 16 * MIB && result.data.len() > 14 * MIB, "{}", result.data.len());
    let text = usual.trim().trim_start_matches("{ok,").trim_end_matches('}').to_owned();
    limit(text.parse().unwrap());
}

/// What takes six times its bytes as JSON, is cut, and is encoded once more.
#[tokio::test(flavor = "multi_thread")]
async fn results_that_grow_as_they_are_encoded() {
    const BYTES: usize = 8 << 20;
    let node = &Node::shared();
    let both = |char: &str| {
        let code = format!("import sys\nfor s in sys.stdout, sys.stderr: s.write('{char}' * {BYTES})");
        json!({"code": code, "limits": {"output_bytes": BYTES}}).to_string().into_bytes()
    };
    let mut scene = Scene::with_ordinary(node, "nul", &vec![both("x"); LARGE_JOBS], 1).await;
    let own = scene.queues.replies.clone() + ".own";
    let mut replies = scene.requester.replies(&own).await;
    let took = scene.measure("stranger", &vec![both("\\0"); LARGE_JOBS], &own).await;
    for _ in 0..LARGE_JOBS {
        let (_, result) = next(&mut replies).await;
        assert_eq!((&result["status"], &result["stdout_truncated"]), (&"succeeded".into(), &true.into()));
    }
    scene.judge("results that grow as they are encoded", vec![took]);
    scene.unharmed().await;
}
