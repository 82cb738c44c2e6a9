//! SIGINT and SIGTERM as a token: the first stops what runs and lets it be cleaned up.

use anyhow::Context;
use nix::sys::signal::{SigSet, Signal};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// The two signals that ask us to end.
pub(super) struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

impl Signals {
    /// From here on both signals wait for [`listen`](Self::listen). For what has to be done before there is a
    /// runtime to listen with; on the thread that will then run it.
    pub(super) fn hold() -> anyhow::Result<()> {
        both().thread_block().context("failed to hold signals back")
    }

    /// From here on neither signal kills us.
    pub(super) fn listen() -> anyhow::Result<Self> {
        let on = |kind| signal(kind).context("failed to listen for signals");
        let signals =
            Self { interrupt: on(SignalKind::interrupt())?, terminate: on(SignalKind::terminate())? };
        both().thread_unblock().context("failed to let signals through")?;
        Ok(signals)
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

fn both() -> SigSet {
    [Signal::SIGINT, Signal::SIGTERM].into_iter().collect()
}
