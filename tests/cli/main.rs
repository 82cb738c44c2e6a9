//! The command line as a person or a script meets it: the real binary, its output, its exit codes.
//!
//! Nothing here needs a broker. `exec` and `bench` run real jobs and need what `sandpiper doctor` calls required.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod bench;
mod config;
mod doctor;
mod exec;
mod help;
mod job_document;
mod serve;
mod support;
