//! How many jobs run at one time, and when none may start.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_util::sync::CancellationToken;

use crate::amqp::{Delivery, LinkState};
use crate::job::Status;
use crate::ops::metrics::{Metrics, Running};
use crate::worker::pipeline::{Detour, decided};

/// The places for running jobs.
#[derive(Debug)]
pub(super) struct Slots {
    places: Arc<Semaphore>,
    /// How the way out for results is: while there is none, no job starts.
    publishing: watch::Receiver<LinkState>,
    drain: CancellationToken,
    metrics: Metrics,
}

/// A place, held while a job runs.
#[derive(Debug)]
#[must_use = "the place is free again as soon as this is dropped"]
pub(super) struct Slot {
    _permit: OwnedSemaphorePermit,
    _running: Running,
}

impl Slots {
    pub(super) fn new(
        slots: usize,
        publishing: watch::Receiver<LinkState>,
        drain: CancellationToken,
        metrics: &Metrics,
    ) -> Self {
        Self { places: Arc::new(Semaphore::new(slots)), publishing, drain, metrics: metrics.clone() }
    }

    /// Cancelled when no job may start any more.
    pub(super) fn draining(&self) -> &CancellationToken {
        &self.drain
    }

    /// A place for `delivery`, or why it shall not run here.
    pub(super) async fn take(&self, delivery: &Delivery, stop: &CancellationToken) -> Result<Slot, Detour> {
        let mut publishing = self.publishing.clone();
        let place = async {
            let permit = self.places.clone().acquire_owned().await;
            let open = publishing.wait_for(|state| *state == LinkState::Up).await.map(drop);
            permit.ok().filter(|_| open.is_ok())
        };
        let permit = tokio::select! {
            biased;
            () = self.drain.cancelled() => None,
            () = stop.cancelled() => return Err(decided(Status::Cancelled, "cancelled on request, before it ran")),
            permit = place => permit,
        };
        let permit = permit.ok_or(Detour::Again)?;
        if delivery.is_gone() {
            // Somebody else has it by now; running it here as well would only double it.
            return Err(Detour::Gone);
        }
        Ok(Slot { _permit: permit, _running: self.metrics.running() })
    }
}
