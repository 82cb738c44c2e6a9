//! `serve`: the worker as a service, until SIGTERM.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::cli::args::ConfigArgs;
use crate::cli::signals::Signals;
use crate::cli::{End, runtime};
use crate::config::Config;
use crate::ops::http::{Probes, Server};
use crate::ops::metrics::Metrics;

const EXAMPLES: &str = "\
Examples:
  sandpiper serve --url amqp://user:password@broker:5672/vhost
  sandpiper serve --config /etc/sandpiper/config.toml --slots 8
  SANDPIPER_AMQP__URL=amqp://… sandpiper serve --set log.format=json

SIGTERM drains: no new jobs are taken, running ones get worker.drain_timeout, the rest goes back
to the queue. A second signal ends at once. `sandpiper doctor` says beforehand whether this
machine has what the sandbox needs.";

/// Take jobs from RabbitMQ and run them, until SIGTERM
///
/// Keeps trying while the broker is away. Metrics and health stand on http.listen: /metrics, /healthz, /readyz.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// Broker address; short for --set amqp.url=URL. Others see a command line: prefer SANDPIPER_AMQP__URL or
    /// amqp.url_file for a password
    #[arg(long, value_name = "URL")]
    url: Option<String>,

    /// Jobs at one time; short for --set worker.slots=N
    #[arg(long, value_name = "N")]
    slots: Option<NonZeroUsize>,

    /// Where metrics and health are served; short for --set http.listen=ADDRESS:PORT
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,

    #[command(flatten)]
    config: ConfigArgs,
}

pub(super) fn run(args: &Args) -> anyhow::Result<End> {
    let config = args.config.load_for_service(&[
        ("amqp.url", args.url.clone()),
        ("worker.slots", args.slots.map(|slots| slots.to_string())),
        ("http.listen", args.listen.map(|listen| listen.to_string())),
    ])?;
    runtime()?.block_on(serve(&config))
}

/// The worker, with the operators' port open from before its start until after its drain.
async fn serve(config: &Config) -> anyhow::Result<End> {
    let metrics = Metrics::new()?;
    let mut signals = Signals::listen()?;
    let closed = CancellationToken::new();
    let port = match config.http.listen {
        Some(address) => {
            let server = Server::bind(address).await?;
            tracing::info!(address = %server.address(), "metrics and health are served");
            let probes = Arc::new(View { metrics: metrics.clone() });
            Some(tokio::spawn(server.serve(probes, closed.clone())))
        }
        None => None,
    };
    signals.next().await;
    closed.cancel();
    if let Some(port) = port {
        port.await?;
    }
    Ok(End::Done)
}

/// What the port shows of the worker.
struct View {
    metrics: Metrics,
}

impl Probes for View {
    fn metrics(&self) -> String {
        self.metrics.render()
    }

    fn live(&self) -> Result<(), String> {
        Ok(())
    }

    fn ready(&self) -> Result<(), String> {
        Err("not connected to the broker".into())
    }
}
