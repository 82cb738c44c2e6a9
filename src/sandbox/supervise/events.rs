//! What a job's supervisor waits for: a child's end, a report, a question of the kernel's. Each can be dropped while
//! it waits without losing anything.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use sandpiper_shim::abi::{REPORT_LEN, Report};
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep_until};

use crate::sys::fd;
use crate::sys::notify::{Listener, Notification};
use crate::sys::process::{Child, Exit, Resources};

/// Collects a child when it has ended.
pub(in crate::sandbox) async fn ended(child: &AsyncFd<Child>) -> io::Result<(Exit, Resources)> {
    loop {
        let mut ready = child.readable().await?;
        match child.get_ref().try_wait()? {
            Some(exit) => return Ok(exit),
            None => ready.clear_ready(),
        }
    }
}

pub(in crate::sandbox) async fn at(when: Option<Instant>) {
    match when {
        Some(when) => sleep_until(when).await,
        None => std::future::pending().await,
    }
}

/// The next question of the kernel's; for ever pending where there is no listener.
pub(in crate::sandbox) async fn asked(listener: &Option<AsyncFd<Listener>>) -> Notification {
    let Some(listener) = listener else { return std::future::pending().await };
    loop {
        let Ok(mut ready) = listener.readable().await else { return std::future::pending().await };
        match listener.get_ref().receive() {
            Ok(question) => return question,
            // The process that asked is gone.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
            // Nobody is left to ask. Readiness would never end now, so it is not waited for.
            Err(_) => return std::future::pending().await,
        }
    }
}

/// The report, and the descriptors beside it; nothing where the socket ended.
pub(in crate::sandbox) async fn receive(
    control: &Option<AsyncFd<OwnedFd>>,
) -> io::Result<(Option<Report>, Vec<OwnedFd>)> {
    let Some(control) = control else { return std::future::pending().await };
    loop {
        let mut ready = control.readable().await?;
        match read_report(control.get_ref()) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
            other => return other,
        }
    }
}

/// A report is written at once and so read at once; anything shorter is none, and what is none but brings a
/// descriptor is garbled.
pub(in crate::sandbox) fn read_report(control: &OwnedFd) -> io::Result<(Option<Report>, Vec<OwnedFd>)> {
    let mut bytes = [0; REPORT_LEN];
    let received = fd::receive(control.as_fd(), &mut bytes)?;
    if received.length == 0 {
        return Ok((None, Vec::new()));
    }
    let report = (received.length == REPORT_LEN).then(|| Report::decode(&bytes)).flatten();
    report.map(|report| (Some(report), received.fds)).ok_or_else(|| io::ErrorKind::InvalidData.into())
}
