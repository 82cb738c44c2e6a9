//! Jobs that run in this process, without a broker: what `exec` and `bench --local` share.

use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::job::{Job, Outcome, Status};
use crate::sandbox::Sandbox;
use crate::script::Payload;

/// What became of one job, and its result object.
#[derive(Debug)]
pub(super) struct Verdict {
    pub(super) outcome: Outcome,
    pub(super) result: serde_json::Value,
}

/// The same checks that a job from the queue goes through. One that fails them has its verdict.
pub(super) fn admit(body: &[u8], config: &Config) -> Result<Job, Box<Verdict>> {
    let refused = |error: &str| {
        let outcome = Outcome::not_run(Status::Rejected, error);
        Box::new(Verdict { result: json!({ "status": "rejected", "error": error }), outcome })
    };
    let body: serde_json::Value = serde_json::from_slice(body).map_err(|_| refused("not JSON"))?;
    let code = body["code"].as_str().ok_or_else(|| refused("code: required"))?;
    Ok(Job {
        id: "interim".into(),
        code: code.into(),
        preload: String::new(),
        enable_network: false,
        environment: "default".into(),
        stdin: Vec::new(),
        args: Vec::new(),
        env: std::collections::BTreeMap::new(),
        files: Vec::new(),
        artifacts: Vec::new(),
        limits: config.limits.default,
        deadline: None,
        stream: false,
        metadata: None,
    })
}

/// Runs one job to its end.
pub(super) async fn run(sandbox: &Sandbox, job: Job, stop: &CancellationToken) -> Box<Verdict> {
    let limits = job.limits;
    let outcome = sandbox.run(Payload::encode(job), &limits, stop).await;
    Box::new(Verdict { result: json!({ "status": outcome.status, "error": outcome.error }), outcome })
}
