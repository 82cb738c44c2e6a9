//! Output of a job while it runs.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::StreamExt;
use lapin::{BasicProperties, Consumer};
use serde_json::{Value, json};

use crate::broker::Node;
use crate::requester::{Requester, assert_silent, collect};
use crate::worker::Worker;
use crate::{PATIENCE, Queues};

/// What came of one job: pieces in their order, then the result.
struct Streamed {
    pieces: Vec<Value>,
    result: Value,
}

impl Streamed {
    /// Everything that a stream carried.
    fn of(&self, stream: &str) -> Vec<u8> {
        let pieces = self.pieces.iter().filter(|piece| piece["stream"] == stream);
        pieces
            .flat_map(|piece| {
                let data = piece["data"].as_str().unwrap();
                if piece["encoding"] == "base64" { STANDARD.decode(data).unwrap() } else { data.into() }
            })
            .collect()
    }
}

async fn ask(requester: &Requester, queues: &Queues, job: Value, reply_to: &str) {
    let properties =
        BasicProperties::default().with_reply_to(reply_to.into()).with_correlation_id("mine".into());
    requester.publish(&queues.jobs, job.to_string().as_bytes(), properties).await;
}

async fn read(replies: &mut Consumer) -> Streamed {
    let mut pieces = Vec::new();
    loop {
        let message = tokio::time::timeout(PATIENCE, replies.next()).await.unwrap().unwrap().unwrap();
        let body: Value = serde_json::from_slice(&message.data).unwrap();
        assert_eq!(message.properties.correlation_id().as_ref().unwrap().as_str(), "mine");
        assert!(message.properties.message_id().is_some());
        match message.properties.kind().as_ref().unwrap().as_str() {
            "output" => {
                assert_eq!(body["seq"], pieces.len(), "out of order");
                let mut fields: Vec<_> = body.as_object().unwrap().keys().cloned().collect();
                fields.sort();
                assert_eq!(fields, ["data", "encoding", "id", "seq", "stream"]);
                pieces.push(body);
            }
            "result" => return Streamed { pieces, result: body },
            other => panic!("a message of type {other}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn output_comes_in_order_before_the_result() {
    let node = &Node::shared();
    let queues = Queues::of("stream");
    let worker = Worker::ready(node.url(), &queues.settings(&[])).await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;

    // A character in two halves, and bytes that are no text at all.
    let code = "import sys, time\no = sys.stdout.buffer\n\
        o.write(b'caf\\xc3'); o.flush(); time.sleep(2)\n\
        o.write(b'\\xa9\\n'); o.flush(); time.sleep(2)\n\
        sys.stderr.write('aside\\n'); time.sleep(2)\n\
        o.write(b'\\xff\\xfe'); o.flush(); time.sleep(50)";
    let job = json!({"id": "live", "code": code, "stream": true, "timeout_ms": 60_000});
    ask(&requester, &queues, job, &queues.replies).await;
    // All of it comes while the job runs, which nothing but a cancellation ends in time.
    let mut pieces = Vec::new();
    while pieces.len() < 4 {
        let message = tokio::time::timeout(PATIENCE, replies.next()).await.unwrap().unwrap().unwrap();
        let body: Value = serde_json::from_slice(&message.data).unwrap();
        assert_eq!(message.properties.kind().as_ref().unwrap().as_str(), "output", "{body}");
        pieces.push((body["seq"].clone(), body["stream"].clone(), body["data"].clone()));
    }
    let expected =
        [(0, "stdout", "caf"), (1, "stdout", "é\n"), (2, "stderr", "aside\n"), (3, "stdout", "//4=")];
    assert_eq!(pieces, expected.map(|(seq, stream, data)| (json!(seq), json!(stream), json!(data))));
    assert_eq!(worker.metric("sandpiper_jobs_running"), 1.0);
    let amqp = sandpiper::config::Amqp {
        urls: vec![sandpiper::config::Secret::new(node.url().into())],
        ..sandpiper::config::Config::default().amqp
    };
    let client = sandpiper::amqp::client::Client::connect(&amqp, false).await.unwrap();
    client.cancel("live").await.unwrap();
    let streamed = read(&mut replies).await;
    assert_eq!((streamed.pieces.len(), &streamed.result["status"]), (0, &json!("cancelled")));
    assert_eq!(streamed.result["stderr"], "aside\n");

    // One that does not ask for it gets none; one that asks and prints nothing neither.
    for (id, stream, code) in [("quiet", false, "print(1)"), ("empty", true, "pass")] {
        let job = json!({"id": id, "code": code, "stream": stream});
        ask(&requester, &queues, job, &queues.replies).await;
        let streamed = read(&mut replies).await;
        assert_eq!((streamed.pieces.len(), &streamed.result["status"]), (0, &json!("succeeded")), "{id}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_come_as_they_are_printed() {
    let node = &Node::shared();
    let queues = Queues::of("lines");
    let _worker = Worker::ready(node.url(), &queues.settings(&[])).await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    // Nothing is flushed, and the job does not end by itself in time.
    let code = "import multiprocessing, sys, time\n\
        print('one')\nprint('two', file=sys.stderr)\n\
        child = multiprocessing.Process(target=lambda: print('three')); child.start(); child.join()\n\
        print('half of four', end='')\ntime.sleep(60)";
    let job = json!({"id": "lines", "code": code, "stream": true, "timeout_ms": 5_000});
    ask(&requester, &queues, job, &queues.replies).await;
    let begun = std::time::Instant::now();
    let mut seen = [String::new(), String::new()];
    while seen[0] != "one\nthree\n" || seen[1] != "two\n" {
        let message = tokio::time::timeout(PATIENCE, replies.next()).await.unwrap().unwrap().unwrap();
        let body: Value = serde_json::from_slice(&message.data).unwrap();
        assert_eq!(message.properties.kind().as_ref().unwrap().as_str(), "output", "{seen:?} {body}");
        seen[usize::from(body["stream"] == "stderr")] += body["data"].as_str().unwrap();
    }
    assert!(begun.elapsed().as_secs() < 5, "only when the job had ended");
    let streamed = read(&mut replies).await;
    assert_eq!((streamed.pieces.len(), &streamed.result["status"]), (0, &json!("timeout")));
    assert_eq!(streamed.result["stdout"], "one\nthree\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_is_sent_in_few_pieces() {
    let node = &Node::shared();
    let queues = Queues::of("flood");
    let _worker = Worker::ready(node.url(), &queues.settings(&[])).await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    // Short lines by turns, without end: the limit ends it.
    let code = "import os\nwhile True:\n    os.write(1, 'ö'.encode() * 50)\n    os.write(2, b'e')";
    let limits = json!({"output_bytes": 1_000_001});
    let job = json!({"id": "flood", "code": code, "stream": true, "limits": limits, "timeout_ms": 60_000});
    ask(&requester, &queues, job, &queues.replies).await;
    let streamed = read(&mut replies).await;
    assert_eq!(streamed.result["status"], "output_limit");
    for stream in ["stdout", "stderr"] {
        let whole = streamed.result[stream].as_str().unwrap();
        assert_eq!(
            String::from_utf8(streamed.of(stream)).unwrap(),
            whole,
            "{stream} differs from the result"
        );
    }
    assert_eq!(streamed.result["stdout"].as_str().unwrap().len(), 1_000_000);
    let run = streamed.result["timing"]["run_ms"].as_u64().unwrap();
    // A turn every 40 ms with both streams' pieces, and what is above 64 KiB.
    let most = 2 * PIECES_A_ROUND * (run / 40 + 2);
    assert!(u64::try_from(streamed.pieces.len()).unwrap() <= most, "{} in {run} ms", streamed.pieces.len());
    assert_silent(&mut replies).await;
}

/// Pieces that are kept apart in one turn.
const PIECES_A_ROUND: u64 = 64;

#[tokio::test(flavor = "multi_thread")]
async fn nobody_listening_delays_nothing() {
    let node = &Node::shared();
    let queues = Queues::of("unheard");
    let worker = Worker::ready(node.url(), &queues.settings(&[])).await;
    let requester = Requester::connect(node.url()).await;
    let job = json!({"id": "unheard", "code": "print('x' * 900_000)", "stream": true});
    ask(&requester, &queues, job, "nobody.has.this.queue").await;
    // The result goes where results without a reader go; its pieces nowhere.
    let result = requester.take(&queues.results).await;
    assert_eq!(result.properties.kind().as_ref().unwrap().as_str(), "result");
    assert_eq!(requester.waiting(&queues.results).await, 0);
    assert_eq!(worker.metric("sandpiper_results_redirected_total"), 1.0);
    let mut replies = requester.replies(&queues.replies).await;
    requester.submit(&queues.jobs, "after", &queues.replies).await;
    collect(&mut replies, &["after".into()]).await;
}
