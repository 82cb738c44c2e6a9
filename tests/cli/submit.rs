//! `submit`, and `bench` through the broker, against a worker and a broker of their own.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use crate::broker::Node;
use crate::support::{Ran, command, eventually, finish};

/// A worker that takes jobs. Killed when dropped.
pub(crate) struct Worker {
    child: Child,
    address: String,
}

impl Worker {
    /// Waits until the worker is ready: it says so on its port.
    pub(crate) fn start(url: &str) -> Self {
        let mut serve =
            command(["serve", "--listen", "127.0.0.1:0", "--slots", "2", "--set", "log.format=json"]);
        let mut child = serve.env("SANDPIPER_AMQP__URL", url).stdout(Stdio::null()).spawn().unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut worker = Self { child, address: String::new() };
        worker.address = log
            .by_ref()
            .map(|line| serde_json::from_str::<serde_json::Value>(&line.unwrap()).unwrap())
            .find_map(|event| event["address"].as_str().map(str::to_owned))
            .expect("the worker tells where it listens");
        // Somebody has to go on reading, or the worker would stop at a full pipe.
        std::thread::spawn(move || log.for_each(drop));
        eventually("the worker is ready", || {
            crate::serve::get(&worker.address, "/readyz").0.starts_with("HTTP/1.1 200")
        });
        worker
    }

    /// Whether a line of its metrics is this one.
    pub(crate) fn says(&self, line: &str) -> bool {
        crate::serve::get(&self.address, "/metrics").1.lines().any(|said| said == line)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

pub(crate) fn with(url: &str, args: &[&str], stdin: &str) -> Ran {
    let mut command: Command = command(args);
    command.env("SANDPIPER_AMQP__URL", url).stdin(Stdio::piped());
    finish(command, stdin.as_bytes())
}

#[test]
fn without_a_broker_it_names_the_key() {
    let ran = with("amqp://127.0.0.1:1", &["submit", "-"], "print(1)");
    assert_eq!(ran.code, 125, "{ran:?}");
    assert!(ran.complaint().contains("amqp.url") && ran.stderr.contains("127.0.0.1:1"), "{ran:?}");
}

#[test]
fn jobs_go_through_the_queue_and_back() {
    let node = Node::start();
    let url = node.url();

    let early = with(url, &["submit", "-"], "print(1)");
    assert_eq!(early.code, 125, "{early:?}");
    assert!(early.complaint().contains("start a worker"), "{early:?}");

    let worker = Worker::start(url);
    let one = with(url, &["submit", "-"], "import sys\nprint('hi')\nsys.exit(4)");
    assert_eq!((one.code, one.stdout.as_str(), one.stderr.as_str()), (4, "hi\n", ""));

    let json = with(url, &["submit", "-", "--json", "--id", "named"], "print('hi')");
    assert_eq!((json.code, &json.json()["id"], &json.json()["stdout"]), (0, &"named".into(), &"hi\n".into()));

    let refused = with(url, &["submit", "-", "--timeout-ms", "999999999"], "print(1)");
    assert_eq!(refused.code, 126, "{refused:?}");
    assert!(refused.complaint().starts_with("rejected: "), "{refused:?}");

    // Two jobs of one name are two jobs; a failed one has a result like any other.
    let jobs = "{\"code\": \"print(1)\", \"id\": \"twin\"}\n\n{\"code\": \"print(2)\", \"id\": \"twin\"}\n{\"code\": \"1/0\"}";
    let batch = with(url, &["submit", "--batch", "-"], jobs);
    assert_eq!((batch.code, batch.stderr.as_str()), (0, ""), "{batch:?}");
    let mut results: Vec<serde_json::Value> =
        batch.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    results.sort_by_key(|result| result["stdout"].to_string());
    let outputs: Vec<&serde_json::Value> = results.iter().map(|result| &result["stdout"]).collect();
    assert_eq!(outputs, ["", "1\n", "2\n"]);

    let holed = with(url, &["submit", "--batch", "-"], "[]\n{\"code\": \"print(3)\"}\n");
    assert_eq!((holed.code, holed.stdout.lines().count()), (1, 1), "{holed:?}");
    assert!(holed.complaint().contains("line 1"), "{holed:?}");

    let bench = with(url, &["bench", "-n", "6", "--concurrency", "2", "--json"], "");
    assert_eq!(bench.code, 0, "{bench:?}");
    assert_eq!(bench.json()["statuses"], serde_json::json!({ "succeeded": 6 }));

    drop(worker);
    let silent = with(url, &["submit", "-", "--wait-ms", "300"], "print(1)");
    assert_eq!(silent.code, 125, "{silent:?}");
    assert!(silent.complaint().contains("1 outstanding"), "{silent:?}");
    let left = with(url, &["submit", "-", "--no-wait"], "print(1)");
    assert_eq!((left.code, left.stdout.as_str(), left.stderr.as_str()), (0, "", ""));
    let left = with(url, &["submit", "-", "--no-wait", "--json", "--id", "mine"], "print(1)");
    assert_eq!(left.json(), serde_json::json!({"id": "mine"}));
    let left = with(url, &["submit", "-", "--no-wait", "--json"], "print(1)");
    assert!(uuid::Uuid::parse_str(left.json()["id"].as_str().unwrap()).is_ok(), "{left:?}");
}
