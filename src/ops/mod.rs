//! What operators watch a worker by.

pub mod http;
pub mod metrics;
pub mod service_manager;
pub mod telemetry;
pub mod traces;
