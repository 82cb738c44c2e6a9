//! What operators watch a worker by.

pub mod metrics;
