//! What operators ask of workers and queues that are there: `ping`, `cancel`, `dead`, `serve --once`, and a look
//! at a job while it runs. One broker for all of it.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::Stdio;

use serde_json::Value;

use crate::broker::Node;
use crate::submit::{Worker, with};
use crate::support::{PATIENCE, Ran, command, run};

/// A queue other than the dead one, looked at like it.
const AS_DEAD: [&str; 4] =
    ["--set", "amqp.jobs_queue=other.jobs", "--set", "amqp.results_queue=other.results"];

#[test]
fn an_id_that_is_none_is_refused_before_anybody_is_asked() {
    let ran = run(["cancel", "no such id"]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.complaint().contains("\"no such id\""), "{ran:?}");
}

#[test]
fn workers_and_queues_can_be_asked_and_told() {
    let node = Node::start();
    let url = node.url();
    nobody_is_there(url);
    let worker = Worker::start(url);
    a_worker_says_who_it_is(url);
    a_running_job_is_cancelled(&node);
    output_is_shown_while_the_job_runs(url);
    the_dead_are_listed_shown_and_purged(url);
    the_dead_are_jobs_again(url);
    drop(worker);
    a_batch_worker_ends_by_itself(url);
}

fn nobody_is_there(url: &str) {
    for (args, what) in [
        (&["cancel", "job-1"][..], "start one"),
        (&["ping", "--wait-ms", "200"], "no worker answered"),
        (&["dead", "list"], "sandpiper.dead"),
    ] {
        let ran = with(url, args, "");
        assert_eq!(ran.code, 1, "{ran:?}");
        assert!(ran.complaint().contains(what), "{ran:?}");
    }
}

fn pongs(url: &str) -> Value {
    with(url, &["ping", "--json"], "").json()
}

fn a_worker_says_who_it_is(url: &str) {
    let text = with(url, &["ping"], "");
    assert_eq!(text.code, 0, "{text:?}");
    assert!(text.stdout.contains("takes jobs, 0 of 2 slots"), "{text:?}");
    let pongs = pongs(url);
    assert_eq!(pongs.as_array().map(Vec::len), Some(1), "{pongs}");
    assert_eq!(
        (&pongs[0]["version"], &pongs[0]["jobs"]),
        (&env!("CARGO_PKG_VERSION").into(), &Value::Array(vec![]))
    );
}

/// Asks until the worker says that it runs the job.
fn until_it_runs(url: &str, id: &str) {
    let begin = std::time::Instant::now();
    loop {
        let pongs = pongs(url);
        if pongs[0]["jobs"].as_array().unwrap().iter().any(|job| job["id"] == id && job["running"] == true) {
            return;
        }
        assert!(begin.elapsed() < PATIENCE, "it never ran: {pongs}");
    }
}

fn a_running_job_is_cancelled(node: &Node) {
    let url = node.url();
    let mut submit = command(["submit", "--json", "--job"]);
    submit.arg(r#"{"id": "long", "code": "import time; time.sleep(50)", "timeout_ms": 60000}"#);
    let submit = submit.env("SANDPIPER_AMQP__URL", url).spawn().unwrap();
    until_it_runs(url, "long");
    // The broker vouches for who submitted it, so it is no other user's to end or to see.
    node.ctl(&["add_user", "stranger", "stranger"]);
    node.ctl(&["set_permissions", "stranger", ".*", ".*", ".*"]);
    let stranger = url.replacen("guest:guest", "stranger:stranger", 1);
    assert_ne!(stranger, url);
    assert_eq!(with(&stranger, &["cancel", "long"], "").code, 0);
    assert_eq!(pongs(&stranger)[0]["jobs"], Value::Array(vec![]));
    until_it_runs(url, "long");
    let cancel = with(url, &["cancel", "long", "another"], "");
    assert_eq!((cancel.code, cancel.stderr.as_str()), (0, ""));
    let result = submit.wait_with_output().unwrap();
    let result: Value = serde_json::from_slice(&result.stdout).unwrap();
    assert_eq!((&result["id"], &result["status"]), (&"long".into(), &"cancelled".into()), "{result}");
}

fn output_is_shown_while_the_job_runs(url: &str) {
    let code = "import sys, time\nprint('fir', end='')\nprint('st', flush=True)\nsys.stderr.write('aside\\n')\n\
                time.sleep(4)\nprint('lást', end='')\nsys.exit(3)";
    let mut submit = command(["submit", "-", "--stream", "--id", "live"]);
    let mut submit = submit.env("SANDPIPER_AMQP__URL", url).stdin(Stdio::piped()).spawn().unwrap();
    submit.stdin.take().unwrap().write_all(code.as_bytes()).unwrap();
    let mut stdout = BufReader::new(submit.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    assert_eq!(line, "first\n");
    // The rest is still to come: the job runs.
    until_it_runs(url, "live");
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    let ended = submit.wait_with_output().unwrap();
    assert_eq!(
        (rest.as_str(), ended.stderr.as_slice(), ended.status.code()),
        ("lást", &b"aside\n"[..], Some(3))
    );
}

fn listed(url: &str, more: &[&str]) -> Vec<Value> {
    let args = [&["dead", "list", "--json"], more].concat();
    let ran = with(url, &args, "");
    assert_eq!(ran.code, 0, "{ran:?}");
    ran.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn ids(listed: &[Value]) -> Vec<&str> {
    listed.iter().map(|message| message["id"].as_str().unwrap()).collect()
}

fn the_dead_are_listed_shown_and_purged(url: &str) {
    assert_eq!(listed(url, &[]), Vec::<Value>::new());
    let bodies = ["one", "two", "three"].map(|id| format!("{{\"id\": \"{id}\", \"code\": 7}}"));
    for body in &bodies {
        // Each waits for its rejection, so their order is known.
        assert_eq!(with(url, &["submit", "--job", body], "").code, 126);
    }
    let first = listed(url, &[]);
    assert_eq!(ids(&first), ["one", "two", "three"]);
    assert!(first[0]["reason"].as_str().unwrap().contains("code"), "{first:?}");
    assert_eq!((&first[0]["attempt"], first[0]["at"].is_string()), (&1.into(), true));
    assert_eq!(listed(url, &[]), first, "looking at them changes nothing");

    let short = with(url, &["dead", "list", "--limit", "2"], "");
    assert_eq!((short.code, short.stdout.lines().count()), (0, 2), "{short:?}");
    assert!(short.complaint().starts_with("1 more"), "{short:?}");

    let key = first[1]["key"].as_str().unwrap();
    for name in [key, "two"] {
        let shown = with(url, &["dead", "show", name], "");
        assert_eq!((shown.code, &shown.stdout), (0, &bodies[1]), "{shown:?}");
        assert!(shown.stderr.contains("reason: "), "{shown:?}");
    }
    assert_eq!(with(url, &["dead", "show", key, "--json"], "").json()["body"], bodies[1].as_str());
    let unknown = with(url, &["dead", "show", "four"], "");
    assert_eq!(unknown.code, 1, "{unknown:?}");
    assert!(unknown.complaint().contains("four"), "{unknown:?}");
    assert_eq!(ids(&listed(url, &[])), ["one", "two", "three"]);

    let asked = with(url, &["dead", "purge"], "");
    assert_eq!(asked.code, 1, "{asked:?}");
    assert!(asked.complaint().contains("3 messages") && asked.stderr.contains("--yes"), "{asked:?}");
    assert_eq!(listed(url, &[]).len(), 3);
    let purged = with(url, &["dead", "purge", "--yes"], "");
    assert_eq!((purged.code, purged.complaint()), (0, "3 messages are gone"));
    assert_eq!(listed(url, &[]), Vec::<Value>::new());
}

/// Waits until a queue holds so many messages, and names them sorted: those that somebody gave back stand in the
/// order in which the broker heard of it.
fn eventually(url: &str, queue: &str, count: usize) -> Vec<String> {
    let queue = format!("amqp.dead_queue={queue}");
    let begin = std::time::Instant::now();
    loop {
        let found = listed(url, &[&AS_DEAD[..], &["--set", &queue]].concat());
        if found.len() == count {
            let mut names: Vec<_> = ids(&found).into_iter().map(str::to_owned).collect();
            names.sort();
            return names;
        }
        assert!(begin.elapsed() < PATIENCE, "{queue} never held {count}: {found:?}");
    }
}

fn the_dead_are_jobs_again(url: &str) {
    // Good jobs in the dead queue, as after the last worker that could run them failed.
    for id in ["sound", "whole", "kept"] {
        let job = format!("{{\"id\": \"{id}\", \"code\": \"print(1)\"}}");
        let to_the_dead = ["--set", "amqp.jobs_queue=sandpiper.dead", "--set", "amqp.dead_queue=other"];
        let sent = with(url, &[&["submit", "--no-wait", "--job", &job][..], &to_the_dead].concat(), "");
        assert_eq!(sent.code, 0, "{sent:?}");
    }
    let one = with(url, &["dead", "replay", "whole"], "");
    assert_eq!((one.code, one.complaint()), (0, "1 messages are jobs again"));
    assert_eq!(eventually(url, "sandpiper.results", 1), ["whole"]);
    assert_eq!(ids(&listed(url, &[])), ["sound", "kept"]);

    let half = with(url, &["dead", "replay", "sound", "nobody"], "");
    assert_eq!(half.code, 1, "{half:?}");
    assert!(half.stderr.contains("1 messages are jobs again") && half.stderr.contains("nobody"), "{half:?}");
    let all = with(url, &["dead", "replay", "--all"], "");
    assert_eq!(all.code, 0, "{all:?}");
    assert_eq!(eventually(url, "sandpiper.results", 3), ["kept", "sound", "whole"]);
    assert_eq!(listed(url, &[]), Vec::<Value>::new());
}

fn a_batch_worker_ends_by_itself(url: &str) {
    let before = eventually(url, "sandpiper.results", 3).len();
    for id in ["a", "b", "c", "d", "e"] {
        let job = format!("{{\"id\": \"{id}\", \"code\": \"print(1)\"}}");
        assert_eq!(with(url, &["submit", "--no-wait", "--job", &job], "").code, 0);
    }
    let served: Ran = with(url, &["serve", "--once", "3", "--slots", "2", "--listen", "127.0.0.1:0"], "");
    assert_eq!(served.code, 0, "{served:?}");
    assert_eq!(eventually(url, "sandpiper.results", before + 3).len(), before + 3);
    assert_eq!(eventually(url, "sandpiper.jobs", 2), ["d", "e"]);
}
