//! The port that operators look at: `/metrics`, `/healthz`, `/readyz`.
//!
//! What is answered comes from the [`Probes`] that the caller hands in; this file only speaks HTTP. It has
//! no authentication and says nothing secret: keep it inside the cluster.
//!
//! It runs on a thread of its own: where the worker stands still, that is what there is to be answered.
//!
//! Whoever reaches the port may open connections and say nothing, or read nothing. So there are few at one time, each
//! has its time, and where all are taken the oldest gives way to whoever comes: a probe asks at once and is answered
//! within milliseconds. The descriptors of the jobs are never taken for it.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::socket::{Backlog, listen};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::{Id, JoinSet};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

/// How long requests that are under way may take once the server was told to stop.
const LAST_REQUESTS: Duration = Duration::from_secs(1);

/// Connections at one time, unless that would be more than an eighth of the descriptors that we may have.
const CONNECTIONS_MAX: usize = 64;

/// For a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);

/// For a connection, whose client may take its time to read.
const LIFETIME: Duration = Duration::from_secs(30);

/// Before a connection gives way to another: enough to ask and be answered.
const GRACE: Duration = Duration::from_millis(50);

/// Before accepting is tried again.
const PAUSE: Duration = Duration::from_millis(100);

/// Bytes of a request's head.
const HEAD_MAX: usize = 16 << 10;

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
        // std asks for 128: who comes behind so many would have to come again after a second.
        listen(&listener, Backlog::MAXALLOWABLE).map_err(|errno| bind(errno.into()))?;
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
        let mut connections = Connections::new(router(probes), stop.clone());
        // One that has come while all places are taken.
        let mut waiting = None;
        // Given up where there are no more descriptors, to answer all the same.
        let mut spare = File::open("/dev/null").ok();
        loop {
            if let Some(stream) = waiting.take_if(|_| connections.have_room()) {
                connections.serve(stream);
            }
            let give_way = connections.oldest_gives_way();
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                () = connections.ended() => spare = spare.or_else(|| File::open("/dev/null").ok()),
                () = sleep_until(give_way), if waiting.is_some() => connections.end_oldest(),
                accepted = listener.accept(), if waiting.is_none() => match accepted {
                    Ok((stream, _)) => waiting = Some(stream),
                    Err(error) if is_exhausted(&error) && spare.take().is_some() => {}
                    // Who gave up meanwhile, or there are still no more descriptors.
                    Err(_) => sleep(PAUSE).await,
                }
            }
        }
        connections.finish().await;
        Ok(())
    }
}

/// No descriptor could be had for a connection.
fn is_exhausted(error: &io::Error) -> bool {
    matches!(error.raw_os_error().map(Errno::from_raw), Some(Errno::EMFILE | Errno::ENFILE))
}

/// What is open, the oldest first.
struct Connections {
    open: VecDeque<Open>,
    tasks: JoinSet<()>,
    most: usize,
    router: Router,
    stop: CancellationToken,
}

struct Open {
    task: Id,
    since: Instant,
    end: CancellationToken,
}

impl Connections {
    fn new(router: Router, stop: CancellationToken) -> Self {
        let descriptors = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft);
        let most = usize::try_from(descriptors / 8).unwrap_or(CONNECTIONS_MAX).clamp(1, CONNECTIONS_MAX);
        Self { open: VecDeque::new(), tasks: JoinSet::new(), most, router, stop }
    }

    fn have_room(&self) -> bool {
        self.open.len() < self.most
    }

    fn serve(&mut self, stream: TcpStream) {
        let end = CancellationToken::new();
        let serving = serve(stream, self.router.clone(), end.clone(), self.stop.clone());
        let task = self.tasks.spawn(serving).id();
        self.open.push_back(Open { task, since: Instant::now(), end });
    }

    /// Waits until one of them has ended.
    async fn ended(&mut self) {
        let task = match self.tasks.join_next_with_id().await {
            Some(Ok((task, ()))) => task,
            Some(Err(error)) => error.id(),
            None => return std::future::pending().await,
        };
        self.open.retain(|open| open.task != task);
    }

    fn oldest_gives_way(&self) -> Instant {
        self.open.front().map_or_else(Instant::now, |oldest| oldest.since + GRACE)
    }

    fn end_oldest(&mut self) {
        if let Some(oldest) = self.open.pop_front() {
            oldest.end.cancel();
        }
    }

    /// Lets the requests under way end, but not for long.
    async fn finish(mut self) {
        let all = async { while self.tasks.join_next().await.is_some() {} };
        drop(tokio::time::timeout(LAST_REQUESTS, all).await);
    }
}

/// Answers one connection's request, until that ends, is to end, or had its time. One only: a page takes a millisecond
/// of computing, and a connection could ask for thousands at a time.
async fn serve(stream: TcpStream, router: Router, end: CancellationToken, stop: CancellationToken) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_buf_size(HEAD_MAX).keep_alive(false);
    let serving = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut serving = pin!(serving);
    tokio::select! {
        // A client that is gone, or spoke no HTTP.
        _ = serving.as_mut() => return,
        () = end.cancelled() => return,
        () = sleep(LIFETIME) => return,
        () = stop.cancelled() => {}
    }
    serving.as_mut().graceful_shutdown();
    // Whoever stops us does not wait for long.
    drop(serving.await);
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
