//! The command line: one file a verb, each ending in an [`End`] that `main` turns into an exit code.
//!
//! The only place that prints: results go to standard output, everything else to standard error.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "printing is what a command line is for")]

mod args;
mod bench;
mod cancel;
mod dead;
mod doctor;
mod exec;
mod job_args;
mod local;
mod output;
mod ping;
mod policy;
mod rehearsal;
mod remote;
mod schema;
mod serve;
mod signals;
mod submit;
mod trace;

use std::ffi::OsString;
use std::time::Duration;

use clap::{Parser, Subcommand};

use crate::job::Status;

const TOUR: &str = "\
A short tour:
  sandpiper doctor                           does this machine have what the sandbox needs?
  echo 'print(6 * 7)' | sandpiper exec -     run a program in the sandbox, without a broker
  sandpiper exec job.py --json               the same for a file, and the whole result as JSON
  sandpiper serve --url amqp://broker        take jobs from RabbitMQ until SIGTERM

Configuration comes from --config FILE, then SANDPIPER_SECTION__KEY, then flags; without any of
them the defaults hold. Logs go to standard error.";

#[derive(Debug, Parser)]
#[command(name = "sandpiper", version, about = "Runs untrusted Python from RabbitMQ, each job in its own locked-down process", after_help = TOUR, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Serve(serve::Args),
    Exec(Box<exec::Args>),
    Submit(Box<submit::Args>),
    Cancel(cancel::Args),
    Dead(dead::Args),
    Ping(ping::Args),
    Policy(policy::Args),
    Schema(schema::Args),
    Bench(bench::Args),
    Doctor(doctor::Args),
}

impl Verb {
    /// Whether the exit code belongs to a job, so that our own failures need one of their own.
    fn runs_a_job(&self) -> bool {
        matches!(self, Self::Exec(_) | Self::Submit(_))
    }
}

/// How a verb ended that could do its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It did what was asked.
    Done,
    /// It did its work, and the answer is no.
    Unsatisfied,
    /// It was told to end at once, and left work behind.
    Abandoned,
    /// The result of a job was printed as JSON.
    Printed(Status),
    /// A job ran; what became of it is told by the exit code.
    Job {
        /// The verdict.
        status: Status,
        /// The job's own exit code.
        exit_code: Option<i32>,
        /// The number of the signal it died of.
        signal: Option<i32>,
    },
}

/// Why a verb could not do its work.
#[derive(Debug)]
pub enum Failure {
    /// The command line cannot be understood.
    Usage {
        /// What clap has to say.
        error: clap::Error,
        /// The verb's exit code belongs to a job.
        runs_a_job: bool,
    },
    /// The verb failed.
    Verb {
        /// The chain of causes.
        error: anyhow::Error,
        /// The verb's exit code belongs to a job.
        runs_a_job: bool,
    },
}

impl Failure {
    /// Says it on standard error: clap's own pages as they are, everything else in one line.
    pub fn report(&self) {
        match self {
            // Nobody is left to tell where standard error is closed.
            Self::Usage { error, .. } => drop(error.print()),
            Self::Verb { error, .. } => output::complain(&chain(error)),
        }
    }
}

/// The error and its causes. Some repeat their cause in their own words already.
fn chain(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |text, cause| {
        if text.is_empty() {
            cause
        } else if text.ends_with(&cause) {
            text
        } else {
            format!("{text}: {cause}")
        }
    })
}

/// Reads the command line and does what it says.
pub fn run(command_line: impl IntoIterator<Item = OsString>) -> Result<End, Failure> {
    let command_line: Vec<OsString> = command_line.into_iter().collect();
    let cli = match Cli::try_parse_from(&command_line) {
        Ok(cli) => cli,
        // --help and --version.
        Err(page) if !page.use_stderr() => {
            drop(page.print());
            return Ok(End::Done);
        }
        Err(error) => {
            let runs_a_job = command_line.get(1).is_some_and(|verb| verb == "exec" || verb == "submit");
            return Err(Failure::Usage { error, runs_a_job });
        }
    };
    let runs_a_job = cli.verb.runs_a_job();
    match cli.verb {
        Verb::Serve(args) => serve::run(&args),
        Verb::Exec(args) => exec::run(&args),
        Verb::Submit(args) => submit::run(&args),
        Verb::Cancel(args) => cancel::run(&args),
        Verb::Dead(args) => dead::run(&args),
        Verb::Ping(args) => ping::run(&args),
        Verb::Policy(args) => policy::run(&args),
        Verb::Schema(args) => schema::run(&args),
        Verb::Bench(args) => bench::run(&args),
        Verb::Doctor(args) => doctor::run(&args),
    }
    .map_err(|error| Failure::Verb { error, runs_a_job })
}

/// The runtime that the verbs run on.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    use anyhow::Context;
    /// Threads for what blocks. Each is short work: more of them would only wait for the disk and the processors.
    const BLOCKING: usize = 64;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .max_blocking_threads(BLOCKING)
        .thread_keep_alive(Duration::MAX)
        .enable_all()
        .build()
        .context("failed to start the runtime")?;
    // One of them from the start and for ever: where the system gives no more threads, work waits for this one,
    // where tokio would panic if there were none.
    runtime.spawn_blocking(|| ());
    Ok(runtime)
}
