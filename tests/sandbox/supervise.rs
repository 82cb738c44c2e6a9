//! This binary's other face: the parent of one worker process.
//!
//! It is a child subreaper, so whatever the worker leaves behind, alive or dead, becomes its child and is seen;
//! the processes of other tests, which run at the same time, never do. It writes down what it saw in a file, because
//! the standard streams are the worker's.

use std::collections::HashSet;
use std::ffi::OsString;
use std::process::{Command, ExitCode};
use std::sync::mpsc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

pub(crate) const FLAG: &str = "--supervise";

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Report {
    /// Of the worker; none where a signal ended it.
    pub(crate) exit_code: Option<i32>,
    /// It did not end in time and was killed.
    pub(crate) hung: bool,
    /// Processes that were alive when the worker had ended.
    pub(crate) survivors: Vec<String>,
    /// Processes that were dead by then, but that the worker had not waited for.
    pub(crate) unreaped: usize,
}

/// `REPORT MILLISECONDS PROGRAM ARGS...`
pub(crate) fn supervise(mut args: impl Iterator<Item = OsString>) -> ExitCode {
    let report = args.next().unwrap();
    let limit = Duration::from_millis(args.next().unwrap().to_str().unwrap().parse().unwrap());
    nix::sys::prctl::set_child_subreaper(true).unwrap();
    let mut worker = Command::new(args.next().unwrap()).args(args).spawn().unwrap();
    let pid = Pid::from_raw(worker.id().try_into().unwrap());

    let (ended, watch) = mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        let hung = watch.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout);
        if hung {
            kill(pid, Signal::SIGKILL).unwrap();
        }
        hung
    });
    let status = worker.wait().unwrap();
    drop(ended);
    let hung = watchdog.join().unwrap();

    let mut unreaped = 0;
    let mut survivors = Vec::new();
    let mut killed = HashSet::new();
    let mut how = WaitPidFlag::WNOHANG;
    loop {
        match waitpid(None, Some(how)) {
            Ok(WaitStatus::StillAlive) => {
                // Killed one generation at a time: the children of a survivor become ours when it dies. Whichever
                // ends first is waited for: the first process of a pid namespace ends after all others.
                for (pid, name) in children() {
                    if killed.insert(pid) {
                        survivors.push(format!("{pid} {name}"));
                        let _ = kill(pid, Signal::SIGKILL);
                    }
                }
                how = WaitPidFlag::empty();
            }
            Ok(status) => {
                unreaped += usize::from(!status.pid().is_some_and(|pid| killed.contains(&pid)));
                how = WaitPidFlag::WNOHANG;
            }
            Err(_) => break,
        }
    }
    let seen = Report { exit_code: status.code(), hung, survivors, unreaped };
    std::fs::write(report, serde_json::to_vec(&seen).unwrap()).unwrap();
    ExitCode::SUCCESS
}

/// Our children that are alive, with their names.
fn children() -> Vec<(Pid, String)> {
    let me = std::process::id().to_string();
    let child = |entry: std::fs::DirEntry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
        // pid (name) state ppid ...; the name may hold anything, so the last parenthesis counts.
        let (head, tail) = stat.rsplit_once(") ")?;
        let mut fields = tail.split(' ');
        let alive = fields.next()? != "Z";
        (alive && fields.next()? == me)
            .then(|| (Pid::from_raw(pid), head.split_once('(').unwrap().1.to_owned()))
    };
    std::fs::read_dir("/proc").unwrap().flatten().filter_map(child).collect()
}
