//! What is not lost, and what is said, where things go wrong around a verb: interruptions, readers who went away,
//! a broker that takes nothing, words of strangers. One broker for all of it.

use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::broker::Node;
use crate::submit::{Worker, with};
use crate::support::{command, eventually, run};

/// What goes through the dead queue without a worker: jobs straight to it.
const TO_THE_DEAD: [&str; 4] = ["--set", "amqp.jobs_queue=sandpiper.dead", "--set", "amqp.dead_queue=other"];

#[test]
fn a_place_for_files_is_made_before_the_job_runs() {
    for verb in ["exec", "submit"] {
        let ran = run([verb, "--job", r#"{"code": "print(1)"}"#, "--artifacts-to", "/proc/nope"]);
        assert_eq!((ran.code, ran.stdout.as_str()), (125, ""), "{ran:?}");
        assert!(ran.complaint().contains("/proc/nope"), "{ran:?}");
    }
}

#[test]
fn files_that_cannot_be_written_cost_nothing_else() {
    let place = tempfile::tempdir().unwrap();
    std::fs::create_dir(place.path().join("out.txt")).unwrap();
    let job = r#"{"code": "print(1); open('out.txt', 'w').write('x')", "artifacts": ["*.txt"]}"#;
    let to = place.path().to_str().unwrap();
    let ran = run(["exec", "--job", job, "--artifacts-to", to, "--json"]);
    assert_eq!((ran.code, &ran.json()["stdout"]), (125, &"1\n".into()), "{ran:?}");
    assert!(ran.complaint().contains("out.txt"), "{ran:?}");
}

#[test]
fn more_cancellations_than_workers_keep_are_refused() {
    let ids: Vec<String> = (0..1_025).map(|at| format!("job-{at}")).collect();
    let ran = run([&["cancel".to_owned()][..], &ids].concat());
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.complaint().contains("1024"), "{ran:?}");
}

#[test]
fn nothing_is_lost_and_nobody_waits_in_silence() {
    let node = Node::start();
    let url = node.url();
    let worker = Worker::start(url);
    every_result_that_came_survives_an_interruption(url, &worker);
    a_batch_for_nobody_ends(url);
    a_batch_that_cannot_be_read_ends(url);
    the_dead_keep_their_order(url);
    what_strangers_say_of_a_dead_message_is_not_believed(url);
    a_broker_that_takes_nothing_is_named(&node);
}

fn every_result_that_came_survives_an_interruption(url: &str, worker: &Worker) {
    const QUICK: usize = 200;
    let file = tempfile::NamedTempFile::new().unwrap();
    // More than a pipe holds. The last one never ends by itself, so that there is something to interrupt.
    let quick = r#"{"code": "print('x' * 3000)"}"#.to_owned() + "\n";
    let last = r#"{"id": "endless", "code": "import time; time.sleep(60)", "timeout_ms": 60000}"#;
    std::fs::write(file.path(), quick.repeat(QUICK) + last).unwrap();
    let mut submit = command(["submit", "--batch"]);
    let mut submit = submit.arg(file.path()).env("SANDPIPER_AMQP__URL", url).spawn().unwrap();
    let done = format!("sandpiper_deliveries_settled_total{{action=\"acked\"}} {QUICK}");
    eventually("all but the last have ended", || worker.says(&done));
    // It cannot write while nobody reads, and most of what came is still in its hands.
    kill(Pid::from_raw(submit.id().try_into().unwrap()), Signal::SIGINT).unwrap();
    let mut results = String::new();
    submit.stdout.take().unwrap().read_to_string(&mut results).unwrap();
    let ended = submit.wait_with_output().unwrap();
    let said = String::from_utf8(ended.stderr).unwrap();
    assert_eq!((ended.status.code(), results.lines().count()), (Some(1), QUICK), "{said}");
    for part in ["200 results came", "interrupted with 1 outstanding", "line 201 of the batch"] {
        assert!(said.contains(part), "{said}");
    }
    assert_eq!(with(url, &["cancel", "endless"], "").code, 0);
}

fn a_batch_for_nobody_ends(url: &str) {
    let mut submit = command(["submit", "--batch", "-", "--window", "1"]);
    let submit = submit.env("SANDPIPER_AMQP__URL", url).stdin(Stdio::piped());
    let mut submit = submit.spawn().unwrap();
    drop(submit.stdout.take());
    let jobs = r#"{"code": "print(1)"}"#.to_owned() + "\n";
    // Standard input stays open: nothing but the reader who is gone ends it.
    std::io::Write::write_all(submit.stdin.as_mut().unwrap(), jobs.repeat(3).as_bytes()).unwrap();
    let mut said = String::new();
    submit.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(submit.wait().unwrap().code(), Some(1), "{said}");
    assert!(said.contains("standard output"), "{said}");
}

fn a_batch_that_cannot_be_read_ends(url: &str) {
    let ran = with(url, &["submit", "--batch", "/"], "");
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.complaint().contains("line 1"), "{ran:?}");
    let large = format!("{{\"code\": \"{}\"}}\n{{\"code\": \"print(2)\"}}", "#".repeat(300_000));
    let ran = with(url, &["submit", "--batch", "-", "--set", "amqp.max_body_bytes=100000"], &large);
    assert_eq!((ran.code, ran.stdout.lines().count()), (1, 1), "{ran:?}");
    assert!(ran.complaint().contains("line 1") && ran.stderr.contains("amqp.max_body_bytes"), "{ran:?}");
}

fn listed(url: &str) -> Vec<Value> {
    let ran = with(url, &["dead", "list", "--json"], "");
    assert_eq!(ran.code, 0, "{ran:?}");
    ran.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn the_dead_keep_their_order(url: &str) {
    let ids: Vec<String> = (0..100).map(|at| format!("dead-{at}")).collect();
    let jobs: Vec<String> =
        ids.iter().map(|id| format!("{{\"id\": \"{id}\", \"code\": \"print(1)\"}}")).collect();
    let sent = [&["submit", "--no-wait", "--batch", "-"][..], &TO_THE_DEAD].concat();
    assert_eq!(with(url, &sent, &jobs.join("\n")).code, 0);
    for _ in 0..3 {
        let listed = listed(url);
        let seen: Vec<&str> = listed.iter().map(|message| message["id"].as_str().unwrap()).collect();
        assert_eq!(seen, ids);
    }
    assert_eq!(with(url, &["dead", "purge", "--yes"], "").code, 0);
}

fn what_strangers_say_of_a_dead_message_is_not_believed(url: &str) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        use lapin::types::{AMQPValue, FieldTable};
        let connection =
            lapin::Connection::connect(url, lapin::ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(lapin::options::ConfirmSelectOptions::default()).await.unwrap();
        // A queue whose messages the broker itself moves to the dead queue.
        let mut arguments = FieldTable::default();
        for (name, value) in [("exchange", ""), ("routing-key", "sandpiper.dead")] {
            arguments.insert(format!("x-dead-letter-{name}").into(), AMQPValue::LongString(value.into()));
        }
        let options = lapin::options::QueueDeclareOptions { exclusive: true, ..Default::default() };
        channel.queue_declare("short-lived".into(), options, arguments).await.unwrap();
        let mut headers = FieldTable::default();
        for name in ["reason", "at", "worker", "attempt", "queue"] {
            let forged = AMQPValue::LongString("\u{1b}[2Jforged\n".into());
            headers.insert(format!("x-sandpiper-{name}").into(), forged);
        }
        let properties = lapin::BasicProperties::default().with_headers(headers).with_expiration("1".into());
        let options = lapin::options::BasicPublishOptions::default();
        let published =
            channel.basic_publish("".into(), "short-lived".into(), options, b"body", properties).await;
        assert!(published.unwrap().await.unwrap().is_ack());
        eventually("it is dead", || with(url, &["dead", "list"], "").stdout.contains("expired"));
        connection.close(200, "done".into()).await.unwrap();
    });
    let listed = listed(url);
    assert_eq!((&listed[0]["reason"], &listed[0]["queue"]), (&"expired".into(), &"short-lived".into()));
    assert_eq!((&listed[0]["worker"], &listed[0]["attempt"]), (&Value::Null, &Value::Null));
    assert!(listed[0]["at"].as_str().unwrap().ends_with('Z'), "{listed:?}");
    // Where the broker says nothing it is a worker's word, or was; in any case none that steers a terminal.
    assert!(!with(url, &["dead", "list"], "").stdout.contains('\u{1b}'));
    assert_eq!(with(url, &["dead", "purge", "--yes"], "").code, 0);
}

fn a_broker_that_takes_nothing_is_named(node: &Node) {
    node.ctl(&["set_vm_memory_high_watermark", "absolute", "1MiB"]);
    let begin = std::time::Instant::now();
    for args in [&["cancel", "job"][..], &["ping"], &["submit", "-", "--no-wait"], &["submit", "-"]] {
        let ran =
            with(node.url(), &[args, &["--set", "amqp.operation_timeout_ms=1000"]].concat(), "print(1)");
        assert!(ran.code == 1 || ran.code == 125, "{ran:?}");
        assert!(ran.complaint().contains("takes no messages"), "{ran:?}");
    }
    assert!(begin.elapsed() < Duration::from_secs(60), "they waited for the broker");
    // A batch waits, says so, and still ends when it is told to.
    let mut submit = command(["submit", "--batch", "-", "--set", "amqp.operation_timeout_ms=1000"]);
    let submit = submit.env("SANDPIPER_AMQP__URL", node.url()).stdin(Stdio::piped());
    let mut submit = submit.spawn().unwrap();
    std::io::Write::write_all(submit.stdin.as_mut().unwrap(), b"{\"code\": \"print(1)\"}\n").unwrap();
    let mut said = BufReader::new(submit.stderr.take().unwrap());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    assert!(line.contains("waiting until it does"), "{line}");
    kill(Pid::from_raw(submit.id().try_into().unwrap()), Signal::SIGINT).unwrap();
    line.clear();
    said.read_line(&mut line).unwrap();
    assert!(line.contains("interrupted with 1 outstanding"), "{line}");
    assert_eq!(submit.wait().unwrap().code(), Some(1));
    node.ctl(&["set_vm_memory_high_watermark", "absolute", "512MiB"]);
}
