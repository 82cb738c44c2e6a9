//! `exec`: one job, here and now, without a broker.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use tokio_util::sync::CancellationToken;

use crate::cli::args::ConfigArgs;
use crate::cli::job_args::JobArgs;
use crate::cli::local;
use crate::cli::signals::Signals;
use crate::cli::{End, output, runtime, trace};
use crate::config::Config;
use crate::job::{Job, Reply};
use crate::sandbox::{Sandbox, Trace};

const EXAMPLES: &str = "\
Examples:
  echo 'print(6 * 7)' | sandpiper exec -
  sandpiper exec job.py --timeout-ms 2000 --memory-bytes 67108864 -- --flag value
  sandpiper exec job.py < input.txt
  sandpiper exec job.py --file data.csv --artifact '*.png' --artifacts-to out/
  sandpiper exec --job '{\"code\": \"print(1)\", \"limits\": {\"cpu_ms\": 500}}' --json
  sandpiper exec trusted.py --trace-syscalls     what does this program need that the policy forbids?

Exit code:
  the job's own, or
  128 + n  when it died of signal n
  124      timeout, cpu_limit, cancelled, expired
  137      memory_limit, output_limit
  126      rejected, syscall_killed
  125      sandpiper itself failed
Each but the first comes with one line on standard error. With --json: 0 when there is a result,
125 when there is none or it is worker_error. With --trace-syscalls the same; the document is then
{\"result\": RESULT, \"outside_policy\": [{\"syscall\", \"arguments\", \"class\", \"errno\", \"count\", \"allow\", \"note\"}]}:
\"allow\" is the line of the configuration that allows the call, or null; then \"note\" says why nothing does.";

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

    /// Write the returned files below this directory, where no file of their name is
    #[arg(long, value_name = "DIR")]
    artifacts_to: Option<PathBuf>,

    /// Let returned files take the place of files that are there; without this those are left, and that is an error
    #[arg(long, requires = "artifacts_to")]
    overwrite: bool,

    /// Run in a fork of a warm interpreter instead of a new one
    #[arg(long)]
    warm: bool,

    /// Find out what a TRUSTED program needs: let every system call happen, and print those outside the policy
    ///
    /// THE INNER WALL IS OFF for this run: what the policy would kill, refuse or quietly deny is let through to the
    /// kernel, counted, and printed at the end with the line of the configuration that would allow it (a table on
    /// standard error; a field with --json). The outer wall stays: namespaces, the read-only root, the uid, the
    /// limits, Landlock. Never give it a program that you would not run yourself. Cold starts only.
    #[arg(long, conflicts_with = "warm")]
    trace_syscalls: bool,

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
    if let Some(directory) = &args.artifacts_to {
        output::prepare(directory)?;
    }
    let trace = args.trace_syscalls.then(Trace::default);
    let mut environment = String::new();
    let reply = match local::admit(asked, &config) {
        Ok(job) => {
            environment.clone_from(&job.environment);
            let sandbox = match &trace {
                None => local::start(&config)?,
                Some(trace) => start_tracing(&config, trace)?,
            };
            runtime()?.block_on(run_to_end(job, sandbox, args.warm))?
        }
        Err(refused) => *refused,
    };
    let seen = trace.as_ref().map(|trace| trace::rows(trace, &environment));
    if args.json {
        match &seen {
            None => output::print_json(&reply)?,
            Some(rows) => output::print_json(&trace::Document::new(&reply, rows))?,
        }
    }
    let end = if args.json { End::Printed(reply.status) } else { output::show(&reply)? };
    if let (Some(rows), false) = (&seen, args.json) {
        output::print_error(trace::page(rows).as_bytes());
    }
    // Last: what cannot be written costs nothing else of the result.
    if let Some(directory) = &args.artifacts_to {
        output::save(&reply, directory, args.overwrite)?;
    }
    Ok(end)
}

/// The one place that makes a sandbox without its inner wall.
fn start_tracing(config: &Config, trace: &Trace) -> anyhow::Result<Sandbox> {
    output::complain(
        "--trace-syscalls: THE INNER WALL IS OFF for this run, every system call is let through; only the outer \
         wall stands around this program",
    );
    Signals::hold()?;
    Sandbox::start_tracing(config, trace.clone()).context("failed to start the sandbox")
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
