//! The port that operators look at: `/metrics`, `/healthz`, `/readyz`.
//!
//! What is answered comes from the [`Probes`] that the caller hands in; this file only speaks HTTP. It has
//! no authentication and says nothing secret: keep it inside the cluster.
//!
//! It runs on a thread of its own: where the worker stands still, that is what there is to be answered.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

/// How long requests that are under way may take once the server was told to stop.
const LAST_REQUESTS: Duration = Duration::from_secs(1);

/// What the three pages show.
pub trait Probes: Send + Sync + 'static {
    /// Every metric in the Prometheus text format.
    fn metrics(&self) -> String;
    /// Whether the process works at all. Never depends on the broker: restarting us does not mend it.
    fn live(&self) -> Result<(), String>;
    /// Whether it takes jobs at this moment.
    fn ready(&self) -> Result<(), String>;
    /// What does not work though it takes jobs, a sentence each.
    fn degraded(&self) -> Vec<String>;
}

/// Why the port could not be opened or served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HttpError {
    /// The address is not ours, or somebody else has it.
    #[error("http.listen: cannot listen on {address}: {source}; name a free address, or \"\" for none")]
    Bind {
        /// As configured.
        address: SocketAddr,
        /// What the kernel said.
        source: std::io::Error,
    },
}

/// A port that is open but does not answer yet.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
}

impl Server {
    /// Opens the port, so that a wrong address ends the start and not a running worker.
    pub fn bind(address: SocketAddr) -> Result<Self, HttpError> {
        let bind = |source| HttpError::Bind { address, source };
        let listener = TcpListener::bind(address).map_err(bind)?;
        listener.set_nonblocking(true).map_err(bind)?;
        let address = listener.local_addr().map_err(bind)?;
        Ok(Self { listener, address })
    }

    /// Where it listens: with port 0 configured, the port that the kernel chose.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers until `stop`, then lets the requests under way end. Tells when it has, and how.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn serve(
        self,
        probes: Arc<dyn Probes>,
        stop: CancellationToken,
    ) -> io::Result<oneshot::Receiver<io::Result<()>>> {
        let (tell, ended) = oneshot::channel();
        std::thread::Builder::new().name("http".into()).spawn(move || {
            // Where nobody waits any longer the process ends.
            let _ = tell.send(self.answer(probes, stop));
        })?;
        Ok(ended)
    }

    fn answer(self, probes: Arc<dyn Probes>, stop: CancellationToken) -> io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(self.answer_until(probes, stop))
    }

    async fn answer_until(self, probes: Arc<dyn Probes>, stop: CancellationToken) -> io::Result<()> {
        let listener = tokio::net::TcpListener::from_std(self.listener)?;
        let graceful =
            axum::serve(listener, router(probes)).with_graceful_shutdown(stop.clone().cancelled_owned());
        let hard = async {
            stop.cancelled().await;
            tokio::time::sleep(LAST_REQUESTS).await;
        };
        tokio::select! {
            // Accept errors are retried inside axum; it only ends by `stop`.
            _ = graceful.into_future() => {}
            () = hard => {}
        }
        Ok(())
    }
}

fn router(probes: Arc<dyn Probes>) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .fallback(|| async { (StatusCode::NOT_FOUND, "not here; try /metrics, /healthz or /readyz\n") })
        .with_state(probes)
}

async fn metrics(State(probes): State<Arc<dyn Probes>>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], probes.metrics()).into_response()
}

async fn healthz(State(probes): State<Arc<dyn Probes>>) -> Response {
    verdict(probes.live().map(|()| vec!["alive".into()]))
}

async fn readyz(State(probes): State<Arc<dyn Probes>>) -> Response {
    // What is degraded still takes jobs: it is told, and does not count.
    let degraded = |()| {
        let lines = probes.degraded().into_iter().map(|what| format!("degraded: {what}"));
        std::iter::once("ready".into()).chain(lines).collect()
    };
    verdict(probes.ready().map(degraded))
}

fn verdict(state: Result<Vec<String>, String>) -> Response {
    let (code, lines) = match state {
        Ok(lines) => (StatusCode::OK, lines),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, vec![reason]),
    };
    let text: String = lines.iter().map(|line| line.replace('\n', " ") + "\n").collect();
    (code, text).into_response()
}
