//! The wire contract, tested from outside the crate: every field of a job and a result, and the configuration.
#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod accepted;
mod config;
mod refused;
mod reply;
mod schema;
mod support;
