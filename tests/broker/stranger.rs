//! A publisher without a client library, so that envelopes are possible which no library would write, and what
//! becomes of them: the worker goes on.

use std::io::{Read, Write};
use std::net::TcpStream;

use lapin::ExchangeKind;
use lapin::options::{ExchangeDeclareOptions, QueueBindOptions};
use lapin::types::FieldTable;
use sandpiper::amqp::dead::Dead;
use serde_json::json;

use crate::broker::Node;
use crate::requester::{Requester, collect, next};
use crate::worker::Worker;
use crate::{PATIENCE, Queues, amqp10, eventually};

const METHOD: u8 = 1;
const HEADER: u8 = 2;
const BODY: u8 = 3;

/// A connection with one channel in confirm mode.
pub(crate) struct Stranger(TcpStream);

pub(crate) fn short(bytes: &[u8]) -> Vec<u8> {
    [&[u8::try_from(bytes.len()).unwrap()], bytes].concat()
}

fn long(bytes: &[u8]) -> Vec<u8> {
    [&u32::try_from(bytes.len()).unwrap().to_be_bytes()[..], bytes].concat()
}

impl Stranger {
    pub(crate) fn connect(node: &Node) -> Self {
        let stream = TcpStream::connect(node.address()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut stranger = Self(stream);
        stranger.0.write_all(b"AMQP\0\0\x09\x01").unwrap();
        stranger.expect([10, 10]);
        let login = [long(b""), short(b"PLAIN"), long(b"\0guest\0guest"), short(b"en_US")].concat();
        stranger.method(0, [10, 11], &login);
        let tune = stranger.expect([10, 30]);
        // As offered, but without heartbeats.
        stranger.method(0, [10, 31], &[&tune[..6], &[0, 0]].concat());
        stranger.method(0, [10, 40], &[short(node.vhost().as_bytes()), short(b""), vec![0]].concat());
        stranger.expect([10, 41]);
        stranger.method(1, [20, 10], &short(b""));
        stranger.expect([20, 11]);
        stranger.method(1, [85, 10], &[0]);
        stranger.expect([85, 11]);
        stranger
    }

    fn frame(&mut self, kind: u8, channel: u16, payload: &[u8]) {
        let frame = [&[kind][..], &channel.to_be_bytes(), &long(payload), &[0xce]].concat();
        self.0.write_all(&frame).unwrap();
    }

    fn method(&mut self, channel: u16, [class, method]: [u16; 2], arguments: &[u8]) {
        let payload = [&class.to_be_bytes()[..], &method.to_be_bytes(), arguments].concat();
        self.frame(METHOD, channel, &payload);
    }

    /// The arguments of the next method, which must be that one.
    fn expect(&mut self, [class, method]: [u16; 2]) -> Vec<u8> {
        let mut head = [0; 7];
        self.0.read_exact(&mut head).unwrap();
        let mut rest = vec![0; u32::from_be_bytes(head[3..].try_into().unwrap()) as usize + 1];
        self.0.read_exact(&mut rest).unwrap();
        let expected = [class.to_be_bytes(), method.to_be_bytes()].concat();
        let text = String::from_utf8_lossy(&rest);
        assert_eq!((head[0], &rest[..4]), (METHOD, &expected[..]), "the broker said {text:?}");
        rest[4..].to_vec()
    }

    /// Publishes, and waits until the broker keeps it. `properties` are flags, and all that they announce.
    pub(crate) fn publish(
        &mut self,
        exchange: &[u8],
        key: &[u8],
        (flags, properties): (u16, Vec<u8>),
        body: &[u8],
    ) {
        self.method(1, [60, 40], &[vec![0, 0], short(exchange), short(key), vec![0]].concat());
        let size = u64::try_from(body.len()).unwrap().to_be_bytes();
        let header = [&[0, 60, 0, 0][..], &size, &flags.to_be_bytes(), &properties].concat();
        self.frame(HEADER, 1, &header);
        self.frame(BODY, 1, body);
        self.expect([60, 80]);
    }
}

pub(crate) const HEADERS: u16 = 1 << 13;
pub(crate) const CORRELATION_ID: u16 = 1 << 10;
const REPLY_TO: u16 = 1 << 9;
const MESSAGE_ID: u16 = 1 << 7;

/// One header, so large that the payload of a frame with nothing else has this size.
pub(crate) fn large(payload: usize) -> Vec<u8> {
    let around = 12 + 2 + 4 + (1 + 4 + 1 + 4);
    long(&[short(b"much"), vec![b'S'], long(&vec![b'x'; payload - around])].concat())
}

/// Lists in lists, so many, below one header.
pub(crate) fn nested(depth: u32) -> Vec<u8> {
    let mut value = Vec::new();
    for left in (0..depth).rev() {
        value.push(b'A');
        value.extend((left * 5 + 1).to_be_bytes());
    }
    value.push(b'V');
    long(&[short(b"deep"), value].concat())
}

#[tokio::test(flavor = "multi_thread")]
async fn envelopes_that_no_library_writes() {
    let node = &Node::shared();
    const BAD: &[u8] = b"\xff\xfe\x80\xc3";
    let queues = Queues::of("stranger");
    let mut worker = Worker::ready(node.url(), &queues.settings(&[])).await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    let mut results = requester.listen(&queues.results).await;
    let mut stranger = Stranger::connect(node);
    let (jobs, reply_to) = (queues.jobs.as_bytes(), short(queues.replies.as_bytes()));
    let job = |id: &str| json!({"id": id, "code": "print(1)"}).to_string().into_bytes();

    // What has to be echoed, or says where to.
    let binary = [short(BAD), reply_to.clone()].concat();
    stranger.publish(b"", jobs, (CORRELATION_ID | REPLY_TO, binary), &job("correlation"));
    let (properties, result) = next(&mut replies).await;
    assert_eq!((&result["id"], &result["status"]), (&json!("correlation"), &json!("rejected")), "{result}");
    assert!(result["error"].as_str().unwrap().contains("correlation_id is not UTF-8"), "{result}");
    assert_eq!(properties.correlation_id().as_ref().unwrap().as_str(), "\u{1a}".repeat(4));
    stranger.publish(b"", jobs, (REPLY_TO, short(BAD)), &job("reply"));
    let (_, result) = next(&mut results).await;
    assert_eq!((&result["id"], &result["status"]), (&json!("reply"), &json!("rejected")), "{result}");
    assert!(result["error"].as_str().unwrap().contains("reply_to"), "{result}");

    // What nobody needs: content type, message id, type, application, cluster; names of headers; and
    // more brackets than lapin's stack has room for.
    for flag in [1 << 15, 1 << 14, MESSAGE_ID, 1 << 5, 1 << 3, 1 << 2] {
        let words =
            if flag < REPLY_TO { [reply_to.clone(), short(BAD)] } else { [short(BAD), reply_to.clone()] };
        stranger.publish(b"", jobs, (REPLY_TO | flag, words.concat()), &job("word"));
        // What would say how to read the body cannot be left aside.
        let status = if flag == 1 << 14 { "rejected" } else { "succeeded" };
        assert_eq!(next(&mut replies).await.1["status"], status, "{flag:b}");
    }
    let field = [short(BAD), vec![b'F'], long(&[short(BAD), vec![b't', 1]].concat())].concat();
    for (what, headers) in [("names", long(&field)), ("depth", nested(20_000))] {
        let properties = (HEADERS | REPLY_TO, [headers, reply_to.clone()].concat());
        stranger.publish(b"", jobs, properties, &job(what));
        let result = next(&mut replies).await.1;
        assert_eq!((&result["id"], &result["status"]), (&json!(what), &json!("succeeded")), "{result}");
    }
    // More headers than lapin takes in one frame, though the broker does, and sends them on: it allows publishers a
    // few bytes more than what was agreed.
    for size in [131_060, 131_072] {
        let properties = (HEADERS | REPLY_TO, [large(size - reply_to.len()), reply_to.clone()].concat());
        stranger.publish(b"", jobs, properties, &job("large"));
        let result = next(&mut replies).await.1;
        assert_eq!((&result["id"], &result["status"]), (&json!("large"), &json!("succeeded")), "{result}");
    }
    // A routing key is a stranger's, too, where the queue is bound to an exchange of topics.
    let (exchange, options) = ("stranger.topics", ExchangeDeclareOptions::default());
    let declaring = requester.channel.exchange_declare(
        exchange.into(),
        ExchangeKind::Topic,
        options,
        FieldTable::default(),
    );
    declaring.await.unwrap();
    let binding = requester.channel.queue_bind(
        queues.jobs.as_str().into(),
        exchange.into(),
        "#".into(),
        QueueBindOptions::default(),
        FieldTable::default(),
    );
    binding.await.unwrap();
    stranger.publish(exchange.as_bytes(), BAD, (REPLY_TO, reply_to.clone()), &job("key"));
    assert_eq!(next(&mut replies).await.1["id"], "key");

    // And all of it at once on what is no job: the dead queue can be read.
    let all = [nested(5_000), short(BAD), reply_to.clone(), short(BAD)].concat();
    stranger.publish(b"", jobs, (HEADERS | CORRELATION_ID | REPLY_TO | MESSAGE_ID, all), b"no job");
    assert_eq!(next(&mut replies).await.1["status"], "rejected");
    // By the broker's own hand as well, with the envelope as it came.
    let dead = queues.dead.as_bytes();
    stranger.publish(
        b"",
        dead,
        (HEADERS | CORRELATION_ID, [nested(5_000), short(BAD)].concat()),
        b"as it came",
    );
    let amqp = sandpiper::config::Amqp {
        urls: vec![sandpiper::config::Secret::new(node.url().into())],
        dead_queue: queues.dead.clone(),
        ..sandpiper::config::Config::default().amqp
    };
    // With the one whose encoding nobody knows.
    let bodies = eventually("all three are in the dead queue", async || {
        let mut dead = Dead::open(&amqp).await.unwrap();
        let mut bodies = Vec::new();
        while let Some(message) = dead.next().await.unwrap() {
            bodies.push(String::from_utf8(message.body).unwrap());
        }
        dead.close().await.unwrap();
        (bodies.len() == 3).then_some(bodies)
    })
    .await;
    assert_eq!(bodies[1..], ["no job", "as it came"]);

    requester.submit(&queues.jobs, "after", &queues.replies).await;
    collect(&mut replies, &["after".into()]).await;
    worker.assert_alive();
    for role in ["consume", "publish"] {
        let reconnects = format!("sandpiper_connection_reconnects_total{{role=\"{role}\"}}");
        assert_eq!(worker.metric(&reconnects), 0.0, "a stranger cost everybody the connection");
    }
    assert_eq!(worker.metric("sandpiper_deliveries_settled_total{action=\"requeued\"}"), 0.0);
}

/// What AMQP 1.0 may say and AMQP 0-9-1 has no room for: RabbitMQ takes it, and then fails over it each time that it
/// delivers it, with the connection of whoever consumes.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_the_broker_cannot_hand_on() {
    let node = &Node::shared();
    const LIMIT: u32 = 8;
    // Before that it takes a plugin.
    if !node.is_at_least((4, 0)) {
        return;
    }
    let queues = Queues::of("undeliverable");
    let limit = format!("amqp.delivery_limit={LIMIT}");
    let settings = queues.settings(&["worker.slots=2", &limit]);
    let mut worker = Worker::ready(node.url(), &settings).await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    let ids: Vec<String> = (0..20).map(|at| format!("job-{at}")).collect();
    for id in &ids[..5] {
        requester.submit(&queues.jobs, id, &queues.replies).await;
    }
    amqp10::publish(node, &queues.jobs, &"t".repeat(300), br#"{"code": "print(1)"}"#);
    for id in &ids[5..] {
        requester.submit(&queues.jobs, id, &queues.replies).await;
    }
    eventually("the broker gives it up", async || (requester.waiting(&queues.dead).await > 0).then_some(()))
        .await;
    let log = worker.log();
    let said = log.lines().find(|line| line.contains("\"consume\"") && line.contains("trying again"));
    assert!(said.is_some_and(|said| said.contains("INTERNAL_ERROR")), "{log}");
    // The others have their results, and are not where it is.
    collect(&mut replies, &ids).await;
    assert_eq!(requester.waiting(&queues.dead).await, 1);
    worker.until_ready().await;
    worker.assert_alive();
    eventually("nothing waits", async || (requester.waiting(&queues.jobs).await == 0).then_some(())).await;

    // And as many are taken at one time as before.
    for id in ["one", "two"] {
        requester.run(&queues.jobs, id, &queues.replies, "import time; time.sleep(3)").await;
    }
    eventually("both slots are taken", async || {
        (worker.metric("sandpiper_jobs_running") == 2.0).then_some(())
    })
    .await;
    collect(&mut replies, &["one".into(), "two".into()]).await;
}
