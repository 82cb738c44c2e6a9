//! `serve`: the worker as a service, until SIGTERM.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio_util::sync::CancellationToken;

use crate::cli::args::ConfigArgs;
use crate::cli::signals::Signals;
use crate::cli::{End, runtime};
use crate::config::Config;
use crate::ops::http::{Probes, Server};
use crate::ops::metrics::Metrics;
use crate::ops::service_manager::ServiceManager;
use crate::ops::traces::Traces;
use crate::sandbox::Sandbox;
use crate::sandbox::doctor::{Check, demand, examine};
use crate::worker::{self, Health, Shutdown, Stopped, Watchdog};

/// Far more than it takes to kill what runs and to remove its control groups.
const CLEANING: Duration = Duration::from_secs(2);

const PORT_FAILED: &str = "the port for metrics and health failed";

const EXAMPLES: &str = "\
Examples:
  sandpiper serve --url amqp://user:password@broker:5672/vhost
  sandpiper serve --config /etc/sandpiper/config.toml --slots 8
  SANDPIPER_AMQP__URL=amqp://… sandpiper serve --set log.format=json
  sandpiper serve --once 100                    a hundred jobs, then end; it waits for them

SIGTERM drains: no new jobs are taken, running ones get worker.drain_timeout, the rest goes back
to the queue; exit code 0. A second signal ends at once: exit code 3, and what ran comes again.
Exit code 1: it could not start; `sandpiper doctor` says what this machine lacks.";

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

    /// End after so many jobs have been answered, as after SIGTERM; for batches
    #[arg(long, value_name = "N")]
    once: Option<NonZeroUsize>,

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
    Signals::hold()?;
    let checks = examine(&config);
    demand(&config, &checks, |check| check.required).context("failed to start the worker")?;
    for Check { name, detail, without, .. } in checks.iter().filter(|check| !check.ok) {
        tracing::warn!(layer = %name, %detail, %without, "a layer of the sandbox is missing: see sandpiper doctor");
    }
    let sandbox = Sandbox::start_examined(&config).context("failed to start the worker")?;
    let runtime = runtime()?;
    let end = runtime.block_on(serve(&config, sandbox, args.once));
    // What was cut off is not waited for, but what the sandbox made in the system is removed.
    runtime.shutdown_timeout(CLEANING);
    end
}

/// The worker, with the operators' port open from before its start until after its drain.
async fn serve(config: &Config, sandbox: Sandbox, once: Option<NonZeroUsize>) -> anyhow::Result<End> {
    let metrics = Metrics::new().context("failed to set up metrics")?;
    let traces = Traces::start(&worker::name(config)).context("failed to start the worker")?;
    let health = Health::new();
    let shutdown = Shutdown::default();
    let closed = CancellationToken::new();
    tokio::spawn(obey(Signals::listen()?, shutdown.clone()));
    let _watchdog = Watchdog::start(health.clone(), ServiceManager::from_environment())
        .context("failed to start the watchdog")?;
    let port = match config.http.listen {
        Some(address) => {
            let server = Server::bind(address)?;
            tracing::info!(address = %server.address(), "metrics and health are served");
            let view = View { metrics: metrics.clone(), health: health.clone(), sandbox: sandbox.clone() };
            Some(server.serve(Arc::new(view), closed.clone()).context(PORT_FAILED)?)
        }
        None => None,
    };
    let ended = worker::serve(config, sandbox, &metrics, &traces, &health, &shutdown, once).await;
    closed.cancel();
    if ended == Stopped::Drained {
        traces.close().await;
    }
    if let (Some(port), Stopped::Drained) = (port, ended) {
        port.await.map_err(anyhow::Error::new).and_then(|ended| Ok(ended?)).context(PORT_FAILED)?;
    }
    Ok(match ended {
        Stopped::Drained => End::Done,
        Stopped::Abandoned => End::Abandoned,
    })
}

/// The first signal drains, the second ends.
async fn obey(mut signals: Signals, shutdown: Shutdown) {
    signals.next().await;
    shutdown.drain.cancel();
    signals.next().await;
    tracing::warn!("told to end at once: what still runs is cut off and comes again");
    shutdown.now.cancel();
}

/// What the port shows of the worker.
struct View {
    metrics: Metrics,
    health: Health,
    sandbox: Sandbox,
}

impl Probes for View {
    fn metrics(&self) -> String {
        self.metrics.state(self.health.ready().is_ok(), self.health.alive().is_ok());
        self.metrics.render()
    }

    fn live(&self) -> Result<(), String> {
        self.health.alive()
    }

    fn ready(&self) -> Result<(), String> {
        self.health.ready()
    }

    fn degraded(&self) -> Vec<String> {
        let explained = |(name, why)| format!("environment {name} starts every job cold: {why}");
        self.sandbox.gone_cold().into_iter().map(explained).collect()
    }
}
