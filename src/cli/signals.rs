//! SIGINT and SIGTERM as a token: the first stops what runs and lets it be cleaned up.

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// The two signals that ask us to end.
pub(super) struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

impl Signals {
    /// From here on neither signal kills us.
    pub(super) fn listen() -> anyhow::Result<Self> {
        let on = |kind| signal(kind).context("failed to listen for signals");
        Ok(Self { interrupt: on(SignalKind::interrupt())?, terminate: on(SignalKind::terminate())? })
    }

    /// The next one of either.
    pub(super) async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }

    /// Cancels `stop` at the first signal, from a task that ends with the runtime.
    pub(super) fn cancel(mut self, stop: CancellationToken) {
        tokio::spawn(async move {
            self.next().await;
            stop.cancel();
        });
    }
}
