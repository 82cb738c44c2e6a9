//! Looks after the worker from a thread of its own, which nothing else waits on: a worker whose deliveries stand
//! still is named in the log, and the service manager no longer hears from it and starts it anew.

use std::io;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::health::Health;
use crate::ops::service_manager::ServiceManager;

/// Between two looks, unless the service manager wants to hear more often.
const PERIOD: Duration = Duration::from_secs(1);
/// The same before the worker has begun.
const AT_THE_START: Duration = Duration::from_millis(50);

/// The thread; it ends when this is dropped.
#[derive(Debug)]
pub struct Watchdog {
    end: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Starts to look after the worker that `health` is of.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn start(health: Health, manager: ServiceManager) -> io::Result<Self> {
        let (end, ended) = mpsc::channel();
        let mut round =
            Round { health, manager, has_begun: false, drains: false, status: String::new(), stuck: None };
        let thread = std::thread::Builder::new().name("watchdog".into()).spawn(move || {
            let mut pause = AT_THE_START;
            while ended.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
                pause = round.look();
            }
            // The worker may have drained since the last look.
            round.look();
        })?;
        Ok(Self { end: Some(end), thread: Some(thread) })
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        drop(self.end.take());
        // A thread that panicked has said so.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// What the thread keeps from one look to the next.
struct Round {
    health: Health,
    manager: ServiceManager,
    /// What the service manager was told: that the worker has begun, that it drains, and how it is.
    has_begun: bool,
    drains: bool,
    status: String,
    /// Why the worker stood still at the last look.
    stuck: Option<String>,
}

impl Round {
    /// How long until the next one.
    fn look(&mut self) -> Duration {
        if !self.health.has_begun() {
            return AT_THE_START;
        }
        if !std::mem::replace(&mut self.has_begun, true) {
            self.manager.ready();
        }
        if self.health.is_draining() && !std::mem::replace(&mut self.drains, true) {
            self.manager.stopping();
        }
        let stuck = self.health.alive().err();
        match (&stuck, &self.stuck) {
            (Some(why), None) => tracing::error!(%why, "the worker stands still"),
            (None, Some(_)) => tracing::warn!("the worker moves again"),
            _ => {}
        }
        if stuck.is_none() {
            self.manager.alive();
        }
        let status = match &stuck {
            Some(why) => why.clone(),
            None => self.health.ready().err().unwrap_or_else(|| "taking jobs".into()),
        };
        // Why a worker stands still has a number in it that grows.
        if status != self.status && (stuck.is_none() || self.stuck.is_none()) {
            self.manager.status(&status);
            self.status = status;
        }
        self.stuck = stuck;
        self.manager.interval().map_or(PERIOD, |interval| interval.min(PERIOD))
    }
}
