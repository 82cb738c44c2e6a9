//! Sandpiper runs untrusted Python from a message queue.

pub mod amqp;
pub mod cli;
pub mod config;
pub mod job;
pub mod ops;
pub mod retry;
pub mod sandbox;
pub mod script;
pub mod sys;
pub mod worker;
