//! The runtime that lapin uses: tokio's, with streams whose incoming frames are filtered.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use async_rs::traits::Reactor;
use async_rs::util::RuntimeParts;
use async_rs::{Runtime, Tokio, TokioRuntime};
use futures_util::{AsyncRead, AsyncWrite, Stream};
use lapin::tcp::AsyncTcpStream;

use crate::amqp::frames::filter::FrameFilter;

/// A stream as tokio has it, plain or in TLS.
type Bare = AsyncTcpStream<<Tokio as Reactor>::TcpStream>;

/// A stream whose incoming frames are filtered.
pub(in crate::amqp) type Filtered = FrameFilter<Bare>;

/// The runtime of this process, with filtered streams.
pub(in crate::amqp) type FilteringRuntime = Runtime<RuntimeParts<Tokio, FilteringReactor>>;

/// The runtime that lapin shall use.
pub(in crate::amqp) fn runtime() -> FilteringRuntime {
    Runtime::new(RuntimeParts::new(Tokio::current(), FilteringReactor(Tokio::current())))
}

/// The one that dials.
pub(in crate::amqp) fn dialling() -> TokioRuntime {
    Runtime::tokio_current()
}

/// tokio's reactor, but for the type of its streams.
#[derive(Clone, Debug)]
pub(in crate::amqp) struct FilteringReactor(Tokio);

impl Reactor for FilteringReactor {
    type TcpStream = Filtered;
    type Sleep = <Tokio as Reactor>::Sleep;

    /// lapin takes only what was dialled.
    fn register<H: io::Read + io::Write + Send + 'static>(
        &self,
        _: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        Err::<Filtered, _>(io::ErrorKind::Unsupported.into())
    }

    fn sleep(&self, duration: Duration) -> Self::Sleep {
        self.0.sleep(duration)
    }

    fn interval(&self, duration: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.0.interval(duration)
    }

    fn tcp_connect_addr(
        &self,
        address: SocketAddr,
    ) -> impl Future<Output = io::Result<Self::TcpStream>> + Send + 'static {
        let connecting = self.0.tcp_connect_addr(address);
        async { Ok(FrameFilter::new(AsyncTcpStream::Plain(connecting.await?), None)) }
    }
}
