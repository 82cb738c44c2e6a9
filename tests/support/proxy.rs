//! A TCP proxy between a worker and its broker that fails on demand.
//!
//! It tells the worker's connections apart by the names that they give themselves, so that a fault can meet the
//! one that takes jobs and spare the one that sends results, or the other way round.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU8, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// What is wrong with the way to the broker.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Fault {
    /// Nothing.
    None,
    /// New connections are closed at once.
    Refuse,
    /// New connections are taken, and nobody says a word.
    Silent,
    /// Nothing gets through either way, new connections included, and nobody is told.
    Blackhole,
    /// What the worker sends on its connection for jobs does not arrive: acks, above all.
    HoldAcks,
    /// What the broker says on the connection for results does not arrive: confirms, above all.
    HoldConfirms,
    /// Everything takes this much longer, each way.
    Latency(Duration),
    /// A new connection is reset after the broker has said so many bytes.
    CutAfter(usize),
}

/// Consumers ask for what they like.
const NO_TIMEOUT: i64 = 0;

/// Whose connection it is, as its handshake says.
const UNKNOWN: u8 = 0;
const JOBS: u8 = 1;
const RESULTS: u8 = 2;

#[derive(Clone, Copy, PartialEq)]
enum Way {
    ToBroker,
    ToWorker,
}

/// A running proxy. Ends, with all its connections, when this is dropped.
pub(crate) struct Proxy {
    address: SocketAddr,
    vhost: String,
    fault: watch::Sender<Fault>,
    resets: watch::Sender<u64>,
    timeout: Arc<AtomicI64>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// In front of the broker that `url` names.
    pub(crate) async fn start(url: &str) -> Self {
        let (broker, vhost) = url.rsplit_once('@').unwrap().1.split_once('/').unwrap();
        let broker: SocketAddr = broker.parse().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (fault, resets) = (watch::Sender::new(Fault::None), watch::Sender::new(0));
        let timeout = Arc::new(AtomicI64::new(NO_TIMEOUT));
        let task =
            tokio::spawn(accept(listener, broker, fault.subscribe(), resets.subscribe(), timeout.clone()));
        Self { address, vhost: vhost.to_owned(), fault, resets, timeout, task }
    }

    /// The broker's address by way of the proxy.
    pub(crate) fn url(&self) -> String {
        format!("amqp://guest:guest@{}/{}", self.address, self.vhost)
    }

    pub(crate) fn set(&self, fault: Fault) {
        self.fault.send_replace(fault);
    }

    /// Has consumers that come from here on ask the broker for this timeout of theirs, instead of what they ask for.
    pub(crate) fn set_consumer_timeout(&self, timeout: Duration) {
        self.timeout.store(i64::try_from(timeout.as_millis()).unwrap(), Ordering::Relaxed);
    }

    /// Resets every connection. What was held back is lost.
    pub(crate) fn reset(&self) {
        self.resets.send_modify(|count| *count += 1);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.reset();
        self.task.abort();
    }
}

async fn accept(
    listener: TcpListener,
    broker: SocketAddr,
    fault: watch::Receiver<Fault>,
    resets: watch::Receiver<u64>,
    timeout: Arc<AtomicI64>,
) {
    loop {
        let Ok((worker, _)) = listener.accept().await else { return };
        let mut resets = resets.clone();
        resets.mark_unchanged();
        tokio::spawn(serve(worker, broker, fault.clone(), resets, timeout.clone()));
    }
}

async fn serve(
    worker: TcpStream,
    broker: SocketAddr,
    fault: watch::Receiver<Fault>,
    mut resets: watch::Receiver<u64>,
    timeout: Arc<AtomicI64>,
) {
    let now = *fault.borrow();
    match now {
        Fault::Refuse => {
            drop(worker.set_zero_linger());
            return;
        }
        Fault::Silent => {
            // Until somebody resets it; a peer that gives up is not answered either.
            drop(resets.changed().await);
            return;
        }
        _ => {}
    }
    let Ok(upstream) = TcpStream::connect(broker).await else { return };
    for stream in [&worker, &upstream] {
        drop(stream.set_nodelay(true));
        // However it ends, it ends with a reset: a fault is no goodbye.
        drop(stream.set_zero_linger());
    }
    let cut = if let Fault::CutAfter(bytes) = now { bytes } else { usize::MAX };
    let (whose, left) = (AtomicU8::new(UNKNOWN), AtomicUsize::new(cut));
    let shared = Arc::new(Connection { fault, whose, left, timeout });
    let (from_worker, to_worker) = worker.into_split();
    let (from_broker, to_broker) = upstream.into_split();
    tokio::select! {
        // The reset first: a fault that ends right after it must not let through what was held back.
        biased;
        _ = resets.changed() => {}
        () = pump(from_worker, to_broker, Way::ToBroker, shared.clone()) => {}
        () = pump(from_broker, to_worker, Way::ToWorker, shared.clone()) => {}
    }
}

struct Connection {
    fault: watch::Receiver<Fault>,
    whose: AtomicU8,
    /// Bytes that the broker may still say.
    left: AtomicUsize,
    /// What consumers ask for, in milliseconds.
    timeout: Arc<AtomicI64>,
}

impl Connection {
    fn holds(&self, fault: Fault, way: Way) -> bool {
        let whose = self.whose.load(Ordering::Relaxed);
        match fault {
            Fault::Blackhole => true,
            Fault::HoldAcks => way == Way::ToBroker && whose == JOBS,
            Fault::HoldConfirms => way == Way::ToWorker && whose == RESULTS,
            _ => false,
        }
    }

    /// Puts another consumer timeout in the place of the worker's. All of a frame as small as that which starts a
    /// consumer is read at once.
    fn shorten(&self, bytes: &mut [u8]) {
        const NAME: &[u8] = b"x-consumer-timeoutl";
        let timeout = self.timeout.load(Ordering::Relaxed);
        if timeout == NO_TIMEOUT {
            return;
        }
        let starts = (0..bytes.len()).filter(|at| bytes[*at..].starts_with(NAME)).collect::<Vec<_>>();
        for at in starts {
            bytes[at + NAME.len()..][..8].copy_from_slice(&timeout.to_be_bytes());
        }
    }

    fn recognise(&self, bytes: &[u8]) {
        let says = |name: &[u8]| bytes.windows(name.len()).any(|window| window == name);
        if self.whose.load(Ordering::Relaxed) == UNKNOWN && says(b"connection_name") {
            let whose = if says(b" jobs") {
                JOBS
            } else if says(b" results") {
                RESULTS
            } else {
                UNKNOWN
            };
            self.whose.store(whose, Ordering::Relaxed);
        }
    }
}

async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, way: Way, connection: Arc<Connection>) {
    let mut fault = connection.fault.clone();
    let mut bytes = vec![0; 64 << 10];
    while let Ok(read @ 1..) = from.read(&mut bytes).await {
        if way == Way::ToBroker {
            connection.recognise(&bytes[..read]);
            connection.shorten(&mut bytes[..read]);
        }
        let mut bytes = &bytes[..read];
        let Ok(now) = fault.wait_for(|fault| !connection.holds(*fault, way)).await.map(|fault| *fault) else {
            break;
        };
        if let Fault::Latency(latency) = now {
            tokio::time::sleep(latency).await;
        }
        let mut last = false;
        if way == Way::ToWorker {
            let left = connection.left.load(Ordering::Relaxed);
            last = left < bytes.len();
            bytes = &bytes[..left.min(bytes.len())];
            connection.left.store(left.saturating_sub(bytes.len()), Ordering::Relaxed);
        }
        if to.write_all(bytes).await.is_err() || last {
            break;
        }
    }
}
