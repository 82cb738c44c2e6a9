#![doc = include_str!("ARCHITECTURE.md")]

pub mod amqp;
pub mod cli;
pub mod config;
pub mod job;
#[expect(
    unreachable_pub,
    reason = "`pub` there is for the rest of the crate; so the compiler finds what nothing uses"
)]
mod ops;
#[expect(unreachable_pub, reason = "as of `ops`")]
mod retry;
pub mod sandbox;
pub mod script;
#[expect(unreachable_pub, reason = "as of `ops`")]
mod sys;
#[expect(unreachable_pub, reason = "as of `ops`")]
mod worker;
