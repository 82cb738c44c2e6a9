//! The worker's port and its end, with no broker in reach.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, ChildStderr, ExitStatus};

use crate::support::{command, run};

/// A running worker, whose broker address nobody listens on.
pub(crate) struct Worker {
    child: Child,
    address: String,
    /// Kept open, so that the worker can go on logging.
    log: BufReader<ChildStderr>,
}

impl Worker {
    fn start() -> Self {
        Self::start_with(&[])
    }

    pub(crate) fn start_with(environment: &[(&str, &str)]) -> Self {
        let args =
            ["serve", "--url", "amqp://127.0.0.1:1", "--listen", "127.0.0.1:0", "--set", "log.format=json"];
        let mut child = command(args).envs(environment.iter().copied()).spawn().unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        let address = loop {
            line.clear();
            assert_ne!(log.read_line(&mut line).unwrap(), 0, "the worker ended before it served its port");
            let event: serde_json::Value =
                serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"));
            if let Some(address) =
                event["address"].as_str().filter(|_| event["message"] == "metrics and health are served")
            {
                break address.to_owned();
            }
        };
        Self { child, address, log }
    }

    pub(crate) fn get(&self, path: &str) -> (String, String) {
        get(&self.address, path)
    }

    pub(crate) fn pid(&self) -> nix::unistd::Pid {
        nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap())
    }

    pub(crate) fn terminate(mut self) -> (ExitStatus, String) {
        nix::sys::signal::kill(self.pid(), nix::sys::signal::Signal::SIGTERM).unwrap();
        let mut rest = String::new();
        self.log.read_to_string(&mut rest).unwrap();
        (self.child.wait().unwrap(), rest)
    }
}

/// Head and body of what the port answers.
pub(crate) fn get(address: &str, path: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: worker\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It is gone already where the test came to its end.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[test]
fn without_a_broker_it_is_alive_but_not_ready_and_ends_on_sigterm() {
    let worker = Worker::start();
    let (head, body) = worker.get("/healthz");
    assert!(head.starts_with("HTTP/1.1 200"), "{head} {body}");
    let (head, body) = worker.get("/readyz");
    assert!(head.starts_with("HTTP/1.1 503"), "{head} {body}");
    assert_eq!(body.lines().count(), 1, "a reason in one line: {body:?}");
    assert!(body.trim().len() > 5, "{body:?}");
    let (head, body) = worker.get("/nothing");
    assert!(head.starts_with("HTTP/1.1 404"), "{head} {body}");
    let (status, log) = worker.terminate();
    assert_eq!(status.code(), Some(0), "{log}");
}

#[test]
fn metrics_come_in_the_text_format() {
    let worker = Worker::start();
    let (head, body) = worker.get("/metrics");
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    assert!(head.to_lowercase().contains("content-type: text/plain; version=0.0.4"), "{head}");
    assert!(body.contains("# TYPE sandpiper_"), "{body}");
    assert!(body.contains("status=\"syscall_killed\""), "every status is there from the start: {body}");
}

#[cfg(not(feature = "otlp"))]
#[test]
fn traces_that_this_build_cannot_send_are_named() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut command = command(["serve", "--listen", &taken.local_addr().unwrap().to_string()]);
    let ended = command.env("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318").output().unwrap();
    let said = String::from_utf8(ended.stderr).unwrap();
    let wanted =
        "OTEL_EXPORTER_OTLP_ENDPOINT is set, but this build sends no traces: cargo build --features otlp";
    assert!(said.contains(wanted), "{said}");
}

#[test]
fn a_taken_port_ends_the_start_and_names_the_key() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let ran = run(["serve", "--listen", &address, "--set", "log.level=off"]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.complaint().contains("http.listen") && ran.stderr.contains(&address), "{ran:?}");
}
