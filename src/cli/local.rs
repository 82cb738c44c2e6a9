//! Jobs that run in this process, without a broker: what `exec` and `bench --local` share.

use anyhow::Context as _;
use tokio_util::sync::CancellationToken;

use crate::cli::job_args::Asked;
use crate::cli::signals::Signals;
use crate::config::Config;
use crate::job::{self, Context, Job, Limits, Outcome, Refusal, Reply, Status};
use crate::sandbox::Sandbox;
use crate::script::Payload;

/// The worker's name in a result that no worker made.
const WORKER: &str = "local";

/// Starts the sandbox: before there is a runtime, and with signals held back until somebody listens in it.
pub(super) fn start(config: &Config) -> anyhow::Result<Sandbox> {
    Signals::hold()?;
    Sandbox::start(config).context("failed to start the sandbox")
}

/// The same checks that a job from the queue goes through. One that fails them has its result.
pub(super) fn admit(asked: Asked, config: &Config) -> Result<Job, Box<Reply>> {
    let parsed = match asked {
        Asked::Body(body) => job::parse(&body, None, &config.admission()),
        Asked::Refused(refusal) => Err(refusal),
    };
    let job = parsed.map_err(|Refusal { id, metadata, reason, .. }| {
        let refused = Outcome::not_run(Status::Rejected, reason);
        Box::new(Reply::new(Context { metadata, ..context(id, None) }, refused))
    })?;
    match job.deadline {
        Some(deadline) if deadline < jiff::Timestamp::now() => {
            let expired = Outcome::not_run(Status::Expired, format!("the deadline {deadline} has passed"));
            Err(Box::new(reply(&job, expired)))
        }
        _ => Ok(job),
    }
}

/// Runs one job to its end.
pub(super) async fn run(sandbox: &Sandbox, mut job: Job, stop: &CancellationToken) -> Reply {
    let (limits, metadata) = (sandbox.in_force(job.limits), job.metadata.take());
    let context = Context { metadata, ..context(job.id.clone(), Some(limits)) };
    Reply::new(context, sandbox.run(Payload::encode(job), &limits, stop).await)
}

fn reply(job: &Job, outcome: Outcome) -> Reply {
    let context = context(job.id.clone(), Some(job.limits));
    Reply::new(Context { metadata: job.metadata.clone(), ..context }, outcome)
}

fn context(id: String, limits: Option<Limits>) -> Context {
    Context {
        id,
        limits,
        attempt: 1,
        redelivered: false,
        worker: WORKER.into(),
        queued: None,
        metadata: None,
    }
}
