//! Logs: structured events on standard error, for people or one JSON object a line.
//!
//! Standard output belongs to results. What is logged never holds code, output or a secret; that is
//! up to those who log, this file only sets up where it goes.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::config::{Log, LogFormat};

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TelemetryError {
    /// The filter of the configuration cannot be understood.
    #[error("log.level: {0:?} is not a filter such as \"info\" or \"info,sandpiper=debug\"")]
    Level(String, #[source] tracing_subscriber::filter::ParseError),
    /// Somebody else set up logging in this process.
    #[error("logging is already set up in this process")]
    Twice(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Sends this process's events to standard error, from here to its end.
pub fn start(log: &Log) -> Result<(), TelemetryError> {
    let filter = EnvFilter::builder()
        .parse(&log.level)
        .map_err(|source| TelemetryError::Level(log.level.clone(), source))?;
    // lapin logs a returned message with its whole body, which is a job's output. What it has to say of faults
    // comes back to us as errors, and is logged where they are handled.
    let filter = match "lapin=off".parse() {
        Ok(silence) => filter.add_directive(silence),
        Err(_) => filter,
    };
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none());
    match log.format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(false).try_init(),
    }
    .map_err(TelemetryError::Twice)
}
