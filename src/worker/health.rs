//! What a worker says of itself when it is asked: whether it takes jobs, and whether it works at all.

use std::sync::{Arc, OnceLock};

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::amqp::LinkState;
use crate::worker::running::Running;

/// The state of a worker, for whoever asks. Cheap to clone; made before the worker starts.
#[derive(Clone, Debug, Default)]
pub struct Health(Arc<OnceLock<Watched>>);

#[derive(Debug)]
struct Watched {
    consuming: watch::Receiver<LinkState>,
    publishing: watch::Receiver<LinkState>,
    drain: CancellationToken,
    running: Running,
}

impl Health {
    /// Says "starting" until the worker has begun.
    pub fn new() -> Self {
        Self::default()
    }

    pub(super) fn watch(
        &self,
        consuming: watch::Receiver<LinkState>,
        publishing: watch::Receiver<LinkState>,
        drain: CancellationToken,
        running: Running,
    ) {
        // A second worker under one health would be a mistake of the caller's; the first one is told of.
        let _ = self.0.set(Watched { consuming, publishing, drain, running });
    }

    /// Whether it takes jobs now.
    ///
    /// # Errors
    /// Why not, in words for a person.
    pub fn ready(&self) -> Result<(), String> {
        let Some(watched) = self.0.get() else { return Err("starting".into()) };
        if watched.drain.is_cancelled() {
            return Err("draining: no more jobs are taken".into());
        }
        for (what, state) in [("jobs", &watched.consuming), ("results", &watched.publishing)] {
            match *state.borrow() {
                LinkState::Up => {}
                LinkState::Down => return Err(format!("not connected to the broker for {what}")),
                LinkState::Blocked => {
                    return Err(format!(
                        "the broker takes no {what} at the moment: is it short of memory or disk?"
                    ));
                }
            }
        }
        Ok(())
    }

    /// Whether it works at all. Never a matter of the broker's: a restart of the worker would not mend that.
    ///
    /// # Errors
    /// What is stuck, in words for a person.
    pub fn alive(&self) -> Result<(), String> {
        match self.0.get().and_then(|watched| watched.running.stuck(Instant::now())) {
            Some(id) => Err(format!("stuck: job {id} should have ended minutes ago")),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_is_connected_both_ways_unblocked_and_not_draining() {
        let health = Health::new();
        assert_eq!(health.ready(), Err("starting".into()));
        assert_eq!(health.alive(), Ok(()));
        let (consuming, publishing) =
            (watch::Sender::new(LinkState::Down), watch::Sender::new(LinkState::Down));
        let drain = CancellationToken::new();
        health.watch(consuming.subscribe(), publishing.subscribe(), drain.clone(), Running::default());
        for (jobs, results, ready) in [
            (LinkState::Down, LinkState::Up, false),
            (LinkState::Up, LinkState::Down, false),
            (LinkState::Up, LinkState::Blocked, false),
            (LinkState::Up, LinkState::Up, true),
        ] {
            consuming.send_replace(jobs);
            publishing.send_replace(results);
            assert_eq!(health.ready().is_ok(), ready, "{jobs:?} {results:?}");
            assert_eq!(health.alive(), Ok(()), "liveness is no matter of the broker's");
        }
        drain.cancel();
        assert!(health.ready().is_err());
        assert_eq!(health.alive(), Ok(()));
    }
}
