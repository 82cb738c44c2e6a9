//! The worker's port and its end, with no broker in reach.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::support::{command, eventually, run};

const ARGS: [&str; 7] =
    ["serve", "--url", "amqp://127.0.0.1:1", "--listen", "127.0.0.1:0", "--set", "log.format=json"];

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
        let mut command = command(ARGS);
        command.envs(environment.iter().copied());
        Self::from(command)
    }

    /// With no more than so many descriptors.
    fn start_with_descriptors(most: u32) -> Self {
        let mut command = Command::new("sh");
        let limited = format!("ulimit -n {most} && exec \"$@\"");
        command.args(["-c", &limited, "sh", env!("CARGO_BIN_EXE_sandpiper")]).args(ARGS);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        Self::from(command)
    }

    fn from(mut command: Command) -> Self {
        let mut child = command.spawn().unwrap();
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

/// How many connections to that address somebody has accepted.
fn connections(address: &str) -> usize {
    let port = format!(":{:04X}", address.parse::<std::net::SocketAddr>().unwrap().port());
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let accepted = |line: &&str| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        // The listener itself is in state 0A; what waits for it has no inode yet.
        columns[1].ends_with(&port) && columns[3] != "0A" && columns[9] != "0"
    };
    table.lines().skip(1).filter(accepted).count()
}

/// Connections that want nothing but a place: each kind as many as there are descriptors, and more.
#[test]
fn the_port_answers_while_strangers_hold_it() {
    const DESCRIPTORS: u32 = 256;
    const MANY: usize = 300;
    let worker = Worker::start_with_descriptors(DESCRIPTORS);
    let open = |said: &[u8]| {
        let mut stream = TcpStream::connect(&worker.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        // One that had to give way already hears nothing any more.
        drop(stream.write_all(said));
        stream
    };
    let descriptors = || connections(&worker.address);
    let page = b"GET /metrics HTTP/1.1\r\nHost: worker\r\n\r\n".repeat(200);
    let large = [b"GET /healthz HTTP/1.1\r\nX: ", &vec![b'x'; 1 << 20][..]].concat();
    for (kind, said) in [
        ("half a request", &b"GET /metrics HTTP/1.1\r\nX: "[..]),
        ("nothing", b""),
        ("answers that are not read", &page),
        ("a large head", &large),
    ] {
        // The large ones cannot all be written.
        let count = if said.len() > 100_000 { 30 } else { MANY };
        let mut held: Vec<TcpStream> = (0..count).map(|_| open(said)).collect();
        for path in ["/healthz", "/metrics", "/healthz"] {
            let begin = Instant::now();
            let (head, _) = worker.get(path);
            assert!(head.starts_with("HTTP/1.1 200"), "{kind}: {head}");
            // A probe's time; the connections that stand before it take their grace, 32 at a time.
            assert!(begin.elapsed() < Duration::from_secs(5), "{kind}: {:?}", begin.elapsed());
        }
        // One more waits for its place.
        let taken = descriptors();
        assert!(taken <= usize::try_from(DESCRIPTORS).unwrap() / 8 + 1, "{kind}: {taken} descriptors");
        if kind == "half a request" {
            // The last of them still has its place, and loses it by itself.
            let mut rest = Vec::new();
            drop(held.last_mut().unwrap().read_to_end(&mut rest));
            eventually("half requests are given up", || descriptors() == 0);
        }
    }
    let (status, log) = worker.terminate();
    assert_eq!(status.code(), Some(0), "{log}");
    assert!(!log.contains("Too many open files"), "{log}");
}
