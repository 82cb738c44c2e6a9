//! The command line as a person or a script meets it: the real binary, its output, its exit codes.
//!
//! `exec` and `bench` run real jobs and need what `sandpiper doctor` calls required; `submit` starts a broker of
//! its own.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod bench;
#[allow(dead_code, clippy::print_stdout, reason = "the broker's own tests use the rest")]
#[path = "../support/broker.rs"]
mod broker;
mod cgroups;
mod config;
mod doctor;
mod environments;
mod exec;
mod files;
mod hardship;
mod help;
mod job_document;
mod journal;
mod operate;
mod policy;
mod schema;
mod serve;
mod submit;
mod support;
mod watchdog;
