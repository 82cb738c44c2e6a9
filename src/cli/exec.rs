//! `exec`: one job, here and now, without a broker.

use std::path::PathBuf;

use anyhow::bail;
use tokio_util::sync::CancellationToken;

use crate::cli::args::ConfigArgs;
use crate::cli::job_args::JobArgs;
use crate::cli::local;
use crate::cli::signals::Signals;
use crate::cli::{End, output, runtime};
use crate::job::{Job, Reply};
use crate::sandbox::Sandbox;

const EXAMPLES: &str = "\
Examples:
  echo 'print(6 * 7)' | sandpiper exec -
  sandpiper exec job.py --timeout-ms 2000 --memory-bytes 67108864 -- --flag value
  sandpiper exec job.py < input.txt
  sandpiper exec job.py --file data.csv --artifact '*.png' --artifacts-to out/
  sandpiper exec --job '{\"code\": \"print(1)\", \"limits\": {\"cpu_ms\": 500}}' --json

Exit code:
  the job's own, or
  128 + n  when it died of signal n
  124      timeout, cpu_limit, cancelled, expired
  137      memory_limit, output_limit
  126      rejected, syscall_killed
  125      sandpiper itself failed
Each but the first comes with one line on standard error. With --json: 0 when there is a result,
125 when there is none or it is worker_error.";

/// Run one job in the sandbox, without a broker
///
/// Prints what the job printed and exits with its exit code. Needs no root where the kernel gives user
/// namespaces to ordinary users, no broker and no configuration.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// Print the result object: one JSON document on standard output, nothing else there
    #[arg(long)]
    json: bool,

    /// Write the returned files below this directory
    #[arg(long, value_name = "DIR")]
    artifacts_to: Option<PathBuf>,

    /// Run in a fork of a warm interpreter instead of a new one
    #[arg(long)]
    warm: bool,

    #[command(flatten)]
    job: JobArgs,

    #[command(flatten)]
    config: ConfigArgs,
}

pub(super) fn run(args: &Args) -> anyhow::Result<End> {
    let mut config = args.config.load()?;
    config.worker.slots = 1;
    for environment in config.environments.values_mut() {
        environment.warm &= args.warm;
        environment.standby = 1;
    }
    let asked = args.job.read(config.amqp.max_body_bytes)?;
    let reply = match local::admit(asked, &config) {
        Ok(job) => {
            let sandbox = local::start(&config)?;
            runtime()?.block_on(run_to_end(job, sandbox, args.warm))?
        }
        Err(refused) => *refused,
    };
    if let Some(directory) = &args.artifacts_to {
        output::save(&reply, directory)?;
    }
    if args.json {
        output::print_json(&reply)?;
        return Ok(End::Printed(reply.status));
    }
    output::show(&reply)
}

/// Runs the job, until its end or until we are told to stop: then everything of it is killed first.
async fn run_to_end(job: Job, sandbox: Sandbox, warm: bool) -> anyhow::Result<Reply> {
    let stop = CancellationToken::new();
    Signals::listen()?.cancel(stop.clone());
    if warm && let Err(why) = sandbox.warmed_up(&job.environment).await {
        bail!("--warm: environment {} does not start warm: {why}", job.environment);
    }
    let reply = local::run(&sandbox, job, &stop).await;
    sandbox.close().await;
    Ok(reply)
}
