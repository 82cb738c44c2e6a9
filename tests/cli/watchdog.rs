//! What a service manager hears of a worker, and that a worker which stands still is found out.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use crate::serve::Worker;
use crate::support::eventually_within;

/// A worker takes 30 s of silence for standing still; a busy machine has some time more.
const NOTICED: Duration = Duration::from_secs(90);

struct Manager(UnixDatagram);

impl Manager {
    /// Waits for a message that holds this line.
    fn hears(&self, line: &str) {
        let begin = Instant::now();
        while !self.next().is_some_and(|message| message.lines().any(|one| one == line)) {
            assert!(begin.elapsed() < NOTICED, "the service manager never heard {line}");
        }
    }

    fn next(&self) -> Option<String> {
        let mut buffer = [0; 1024];
        match self.0.recv(&mut buffer) {
            Ok(length) => Some(String::from_utf8(buffer[..length].to_vec()).unwrap()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn a_worker_that_stands_still_is_found_out() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("notify");
    let manager = Manager(UnixDatagram::bind(&path).unwrap());
    manager.0.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let watched = [("NOTIFY_SOCKET", path.to_str().unwrap()), ("WATCHDOG_USEC", "6000000")];
    let worker = Worker::start_with(&watched);
    manager.hears("READY=1");
    manager.hears("STATUS=not connected to the broker for jobs");
    manager.hears("WATCHDOG=1");
    let answer = || worker.get("/healthz");
    assert!(answer().0.starts_with("HTTP/1.1 200"));

    // As if each of them waited for something that never comes.
    let stopped: Vec<Pid> =
        runtime_threads(worker.pid()).into_iter().inspect(|thread| stop(*thread)).collect();
    assert!(!stopped.is_empty());
    eventually_within(NOTICED, "it is not alive", || answer().0.starts_with("HTTP/1.1 503"));
    assert!(answer().1.starts_with("stuck: nothing has been done for "), "{:?}", answer());
    // What was sent before; then nothing more comes.
    let rest: Vec<String> = std::iter::from_fn(|| manager.next()).collect();
    let (stuck, signs): (Vec<_>, Vec<_>) =
        rest.iter().partition(|message| message.starts_with("STATUS=stuck"));
    assert!(stuck.len() == 1 && signs.iter().all(|sign| *sign == "WATCHDOG=1"), "{rest:?}");

    for thread in stopped {
        ptrace::detach(thread, None).unwrap();
    }
    eventually_within(NOTICED, "it is alive again", || answer().0.starts_with("HTTP/1.1 200"));
    manager.hears("WATCHDOG=1");
    let (status, log) = worker.terminate();
    assert_eq!(status.code(), Some(0), "{log}");
    manager.hears("STOPPING=1");
    for event in ["the worker stands still", "the worker moves again"] {
        assert!(log.contains(event), "{event}: {log}");
    }
}

fn runtime_threads(process: Pid) -> Vec<Pid> {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).unwrap().map(|task| task.unwrap());
    let of_the_runtime = tasks
        .filter(|task| std::fs::read_to_string(task.path().join("comm")).unwrap().starts_with("tokio-rt"));
    of_the_runtime.map(|task| Pid::from_raw(task.file_name().to_str().unwrap().parse().unwrap())).collect()
}

fn stop(thread: Pid) {
    ptrace::seize(thread, ptrace::Options::empty()).unwrap();
    ptrace::interrupt(thread).unwrap();
    waitpid(thread, Some(WaitPidFlag::__WALL)).unwrap();
}
