//! One door to run a job: [`Sandbox::run`].

pub mod doctor;
pub mod policy;

use std::time::{Duration, SystemTime};

use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::job::{Limits, Outcome, Status};
use crate::script::Payload;

/// Runs jobs, each in a process of its own behind both walls.
#[derive(Debug)]
pub struct Sandbox {
    _private: (),
}

/// Why the sandbox could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {}

impl Sandbox {
    /// Prepares all that jobs share: policy, shim, environments, one identity a slot.
    pub fn start(_config: &Config) -> Result<Self, StartError> {
        Ok(Self { _private: () })
    }

    /// Runs one job to its end. When this returns, nothing of it is alive.
    ///
    /// `stop` ends it early as [`Status::Cancelled`].
    pub async fn run(&self, _payload: Payload, _limits: &Limits, _stop: &CancellationToken) -> Outcome {
        let _ = (Duration::ZERO, SystemTime::now());
        Outcome::not_run(Status::WorkerError, "the sandbox is not built yet")
    }
}
