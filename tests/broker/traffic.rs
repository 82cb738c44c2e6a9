//! Every job comes back exactly once; what is none is kept, told of, and harms nothing.

use lapin::BasicProperties;
use lapin::types::AMQPValue;
use serde_json::{Value, json};

use crate::broker::Node;
use crate::requester::{Requester, assert_silent, collect, next};
use crate::worker::Worker;
use crate::{Queues, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_jobs_through_two_workers() {
    let node = &Node::shared();
    let queues = Queues::of("thousand");
    let one = Worker::ready(node.url(), &queues.settings(&[])).await;
    let two = Worker::ready(node.url(), &queues.settings(&[])).await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    let ids: Vec<String> = (0..1_000).map(|at| format!("job-{at}")).collect();
    for id in &ids {
        requester.submit(&queues.jobs, id, &queues.replies).await;
    }
    let seen = collect(&mut replies, &ids).await;
    assert!(seen.values().all(|count| *count == 1), "without a fault there are no duplicates");
    assert_silent(&mut replies).await;
    assert_eq!(requester.waiting(&queues.jobs).await, 0);
    let acked = "sandpiper_deliveries_settled_total{action=\"acked\"}";
    eventually("every delivery is acked", async || {
        (one.metric(acked) + two.metric(acked) == 1_000.0).then_some(())
    })
    .await;
    assert!(one.metric(acked) > 0.0 && two.metric(acked) > 0.0, "one worker did it all");
    assert!(!one.log().contains("print(1)"), "code in the log");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_job_is_dead_lettered_and_rejected() {
    let node = &Node::shared();
    let queues = Queues::of("malformed");
    let mut worker = Worker::ready(node.url(), &queues.settings(&[])).await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    let nested = "[".repeat(100_000);
    let bodies: [(&str, &[u8]); 8] = [
        ("not JSON", b"print(1)"),
        ("nothing", b""),
        ("not an object", b"[1, 2]"),
        ("a wrong type", br#"{"code": 7}"#),
        ("an unknown field", br#"{"code": "print(1)", "timeuot_ms": 5}"#),
        ("bad UTF-8", b"{\"code\": \"\xff\xfe\"}"),
        ("nested brackets", nested.as_bytes()),
        ("duplicate keys", br#"{"code": "print(1)", "code": "print(2)"}"#),
    ];
    for (what, body) in bodies {
        let properties = BasicProperties::default()
            .with_reply_to(queues.replies.as_str().into())
            .with_correlation_id(what.into());
        requester.publish(&queues.jobs, body, properties).await;
        let (properties, result) = next(&mut replies).await;
        assert_eq!(result["status"], "rejected", "{what}: {result}");
        assert_eq!(properties.correlation_id().as_ref().unwrap().as_str(), what);

        let dead = requester.take(&queues.dead).await;
        assert_eq!(dead.data, body, "{what}");
        let headers = dead.properties.headers().as_ref().unwrap().inner();
        let AMQPValue::LongString(reason) = &headers["x-sandpiper-reason"] else { panic!("{headers:?}") };
        assert_eq!(Value::from(reason.to_string()), result["error"], "{what}");
        assert_eq!(headers["x-sandpiper-attempt"], AMQPValue::LongLongInt(1));
        assert!(headers.contains_key("x-sandpiper-worker"));
    }
    requester.submit(&queues.jobs, "after", &queues.replies).await;
    collect(&mut replies, &["after".into()]).await;
    worker.assert_alive();
    assert_eq!(requester.waiting(&queues.jobs).await, 0);
    let malformed = "sandpiper_jobs_dead_lettered_total{reason=\"malformed\"}";
    eventually("all are counted", async || (worker.metric(malformed) == 8.0).then_some(())).await;
    assert_eq!(worker.metric("sandpiper_deliveries_settled_total{action=\"requeued\"}"), 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_acceptable_is_rejected_and_acked() {
    let node = &Node::shared();
    let queues = Queues::of("unacceptable");
    let _worker = Worker::ready(node.url(), &queues.settings(&["amqp.max_body_bytes=65536"])).await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    let jobs = [
        json!({"id": "limit", "code": "print(1)", "timeout_ms": 999_999_999}),
        json!({"id": "preload", "code": "print(1)", "preload": "import os"}),
    ];
    for job in jobs {
        let properties = BasicProperties::default().with_reply_to(queues.replies.as_str().into());
        requester.publish(&queues.jobs, job.to_string().as_bytes(), properties).await;
        let (_, result) = next(&mut replies).await;
        assert_eq!(result["status"], "rejected", "{result}");
        assert!(!result["error"].as_str().unwrap().is_empty());
    }
    assert_eq!(requester.waiting(&queues.dead).await, 0, "a job that can be read is answered, not kept");
}

/// Sizes of a worker's memory, in bytes.
fn memory(worker: &Worker, field: &str) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{}/status", worker.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.trim_matches(|char: char| !char.is_ascii_digit()).parse::<usize>().unwrap() << 10
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_is_too_large_does_not_come_in() {
    let node = &Node::start();
    // RabbitMQ 4 takes no more than 16 MiB unless it is told to.
    let bytes: usize = if node.is_at_least((4, 0)) { 16 << 20 } else { 40 << 20 };
    let queues = Queues::of("oversize");
    let worker = Worker::ready(node.url(), &queues.settings(&["amqp.max_body_bytes=65536"])).await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    let to = BasicProperties::default().with_reply_to(queues.replies.as_str().into());
    // The largest that is read, and the smallest that is not.
    let exactly = |bytes: usize| {
        let job = |comment: &str| json!({"id": "fits", "code": format!("print(1) #{comment}")}).to_string();
        let job = job(&"x".repeat(bytes - job("").len()));
        assert_eq!(job.len(), bytes);
        job.into_bytes()
    };
    requester.publish(&queues.jobs, &exactly(65_536), to.clone()).await;
    assert_eq!(next(&mut replies).await.1["status"], "succeeded");
    requester.publish(&queues.jobs, &exactly(65_537), to.clone()).await;
    assert_eq!(next(&mut replies).await.1["status"], "rejected");
    requester.take(&queues.dead).await;

    let before = memory(&worker, "VmRSS:");
    let large = vec![b' '; bytes];
    for at in 0..4 {
        let named = to.clone().with_message_id(format!("large-{at}").into());
        requester.publish(&queues.jobs, &large, named).await;
    }
    for at in 0..4 {
        let (_, result) = next(&mut replies).await;
        assert_eq!(result["status"], "rejected", "{result}");
        assert!(result["id"].as_str().unwrap().starts_with("large-"), "{result}");
        let error = result["error"].as_str().unwrap();
        assert!(error.contains(&bytes.to_string()) && error.contains("65536"), "{error}");
        let stub = requester.take(&queues.dead).await;
        assert!(stub.data.len() < 1_024 && String::from_utf8_lossy(&stub.data).contains(&bytes.to_string()));
        let headers = stub.properties.headers().as_ref().unwrap().inner();
        assert_eq!(headers["x-sandpiper-body-bytes"], AMQPValue::LongLongInt(i64::try_from(bytes).unwrap()));
        assert!(headers.contains_key("x-sandpiper-reason"), "{at}");
    }
    let grown = memory(&worker, "VmHWM:").saturating_sub(before);
    println!("4 bodies of {} MiB took {} MiB of memory", bytes >> 20, grown >> 20);
    assert!(grown < bytes / 4 * 3, "{grown} bytes");
    let counted = "sandpiper_jobs_dead_lettered_total{reason=\"too_large\"}";
    eventually("all are counted", async || (worker.metric(counted) == 5.0).then_some(())).await;
    requester.submit(&queues.jobs, "after", &queues.replies).await;
    collect(&mut replies, &["after".into()]).await;
    assert_eq!(requester.waiting(&queues.jobs).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn poison_is_dead_lettered_from_a_quorum_queue() {
    poison_is_dead_lettered("quorum").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn poison_is_dead_lettered_from_a_classic_queue() {
    poison_is_dead_lettered("classic").await;
}

async fn poison_is_dead_lettered(kind: &str) {
    let node = &Node::shared();
    let queues = Queues::of(&format!("poison.{kind}"));
    let kind = format!("amqp.queue_type={kind}");
    let settings = queues.settings(&["amqp.delivery_limit=2", &kind]);
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    let mut worker = Worker::ready(node.url(), &settings).await;
    requester.run(&queues.jobs, "poison", &queues.replies, "import time; time.sleep(50)").await;
    // It "kills" every worker that runs it: twice is what the limit grants.
    for _ in 0..2 {
        eventually("the job runs", async || (worker.metric("sandpiper_jobs_running") == 1.0).then_some(()))
            .await;
        drop(worker);
        worker = Worker::ready(node.url(), &settings).await;
    }
    let (_, result) = next(&mut replies).await;
    assert_eq!(result["status"], "worker_error", "{result}");
    assert_eq!((&result["id"], &result["attempt"]), (&json!("poison"), &json!(3)));
    let dead = requester.take(&queues.dead).await;
    let headers = dead.properties.headers().as_ref().unwrap().inner();
    assert!(headers.contains_key("x-sandpiper-reason") && headers.contains_key("x-sandpiper-worker"));
    assert_eq!(headers["x-sandpiper-attempt"], AMQPValue::LongLongInt(3));
    // It counts what the broker has confirmed, and the broker may tell us first.
    let counted = || worker.metric("sandpiper_jobs_dead_lettered_total{reason=\"poison\"}") == 1.0;
    eventually("it is counted", async || counted().then_some(())).await;
    assert_eq!(requester.waiting(&queues.jobs).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_past_its_time_is_not_run() {
    let node = &Node::shared();
    let queues = Queues::of("expired");
    let worker = Worker::ready(node.url(), &queues.settings(&[])).await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    let to = BasicProperties::default().with_reply_to(queues.replies.as_str().into());
    let late = json!({"id": "deadline", "code": "print(1)", "deadline": "2020-01-01T00:00:00Z"});
    requester.publish(&queues.jobs, late.to_string().as_bytes(), to.clone()).await;
    // Published an hour ago, it says, and good for a minute; the broker counts from when it came.
    let an_hour_ago = jiff::Timestamp::now().as_second() - 3_600;
    let old = to.with_timestamp(u64::try_from(an_hour_ago).unwrap()).with_expiration("60000".into());
    requester.publish(&queues.jobs, br#"{"id": "expiration", "code": "print(1)"}"#, old).await;
    // They are looked at at the same time: either may be first.
    let mut expired = Vec::new();
    for _ in 0..2 {
        let (_, result) = next(&mut replies).await;
        assert_eq!(result["status"], "expired", "{result}");
        assert_eq!(result["started_at"], Value::Null);
        expired.push(result["id"].clone());
    }
    expired.sort_by_key(ToString::to_string);
    assert_eq!(expired, ["deadline", "expiration"]);
    assert_eq!(worker.metric("sandpiper_jobs_completed_total{status=\"expired\"}"), 2.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_cancelled_where_it_runs_and_where_it_waits() {
    let node = &Node::shared();
    let queues = Queues::of("cancelled");
    let worker = Worker::ready(node.url(), &queues.settings(&["worker.slots=1"])).await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    // One after the other: of two that come at once either may get the slot.
    let job = json!({"id": "runs", "code": "import time; print(1, flush=True); time.sleep(50)",
        "stream": true, "timeout_ms": 60_000});
    let properties = BasicProperties::default().with_reply_to(queues.replies.as_str().into());
    requester.publish(&queues.jobs, job.to_string().as_bytes(), properties).await;
    // It has its code: one that is cancelled while its interpreter starts never ran.
    let (properties, output) = next(&mut replies).await;
    assert_eq!(properties.kind().as_ref().unwrap().as_str(), "output", "{output}");
    requester.run(&queues.jobs, "waits", &queues.replies, "import time; time.sleep(50)").await;
    let received = format!("sandpiper_jobs_received_total{{queue=\"{}\"}}", queues.jobs);
    eventually("one waits", async || (worker.metric(&received) == 2.0).then_some(())).await;
    let amqp = sandpiper::config::Amqp {
        urls: vec![sandpiper::config::Secret::new(node.url().into())],
        ..sandpiper::config::Config::default().amqp
    };
    let client = sandpiper::amqp::client::Client::connect(&amqp, false).await.unwrap();
    for (id, ran) in [("waits", false), ("runs", true)] {
        client.cancel(id).await.unwrap();
        let (_, result) = next(&mut replies).await;
        assert_eq!((&result["id"], &result["status"]), (&json!(id), &json!("cancelled")), "{result}");
        assert_eq!(result["started_at"].is_string(), ran, "{result}");
    }
    client.close().await;
}

/// As gzip, and as a section of AMQP 1.0; with what cannot be read like that in between.
#[tokio::test(flavor = "multi_thread")]
async fn what_bodies_are_wrapped_in_is_undone() {
    let node = &Node::shared();
    let queues = Queues::of("wrapped");
    let worker = Worker::ready(node.url(), &queues.settings(&[])).await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    let job = br#"{"id": "a", "code": "print(1)", "metadata": {"n": 18446744073709551616, "f": 1.50}}"#;
    let value = [&[0, 0x53, 0x77, 0xb1, 0, 0, 0, u8::try_from(job.len()).unwrap()][..], job].concat();
    let bomb = gzip(&[&job[..], &vec![b' '; 64 << 20]].concat());
    let wrapped: [(&[u8], &str, &str); 6] = [
        (&gzip(job), "gzip", "succeeded"),
        (&value, "", "succeeded"),
        (job, "br", "`content_encoding` is `br`"),
        (&bomb, "gzip", "the body has more than 8388608 bytes decompressed"),
        (job, "zstd", "the body is not zstd"),
        (job, "utf-8", "succeeded"),
    ];
    for (body, encoding, wanted) in wrapped {
        let properties = BasicProperties::default()
            .with_reply_to(queues.replies.as_str().into())
            .with_content_encoding(encoding.into());
        requester.publish(&queues.jobs, body, properties).await;
        let (_, result) = next(&mut replies).await;
        if wanted == "succeeded" {
            assert_eq!((&result["status"], &result["stdout"]), (&wanted.into(), &"1\n".into()), "{result}");
        } else {
            assert_eq!(result["status"], "rejected", "{result}");
            assert!(result["error"].as_str().unwrap().starts_with(wanted), "{result}");
        }
    }
    // The two that are no job at all; the one that is too large is answered and done with.
    eventually("both are kept", async || (requester.waiting(&queues.dead).await == 2).then_some(())).await;
    assert!(worker.metric("process_resident_memory_bytes") < f64::from(200 << 20));
}

fn gzip(plain: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut encoder, plain).unwrap();
    encoder.finish().unwrap()
}
