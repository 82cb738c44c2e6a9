//! A span for each job, to an OpenTelemetry collector.
//!
//! Where to is said by OpenTelemetry's own variables, as for any program. Sending takes a build with the feature
//! `otlp`; without it a worker that is told to send says that it cannot.

#[cfg(feature = "otlp")]
mod otlp;

use std::time::SystemTime;

use crate::job::Outcome;

#[cfg(feature = "otlp")]
pub use otlp::Traces;

/// What a span tells of a job besides its outcome.
#[cfg_attr(not(feature = "otlp"), expect(dead_code, reason = "a build that sends no spans reads none of it"))]
#[derive(Debug)]
pub struct EndedJob<'a> {
    /// The queue it came from.
    pub queue: &'a str,
    /// Its id.
    pub id: &'a str,
    /// Its requester's id for it.
    pub correlation_id: Option<&'a str>,
    /// The trace that its requester wants it in, as W3C writes it.
    pub traceparent: Option<&'a str>,
    /// What belongs to that.
    pub tracestate: Option<&'a str>,
    /// The size of its message's body.
    pub body_bytes: usize,
    /// Which delivery of it this was.
    pub attempt: u32,
    /// When that came in.
    pub received: SystemTime,
    /// What became of it.
    pub outcome: &'a Outcome,
}

/// Why no traces can be sent.
#[cfg_attr(
    not(feature = "otlp"),
    expect(dead_code, reason = "a build that sends no spans has no such error")
)]
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TracesError {
    /// A variable asks for what is not there.
    #[error("{variable}={value}: {remedy}")]
    Unsupported {
        /// The variable.
        variable: &'static str,
        /// What it says.
        value: String,
        /// What it may say.
        remedy: &'static str,
    },
    /// The exporter does not understand its variables.
    #[error("the OTEL_EXPORTER_OTLP_ variables will not do: {0}")]
    Exporter(String),
}

/// Where traces are to go, and the variable that says so.
fn endpoint() -> Option<(&'static str, String)> {
    let off = said("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true"))
        || said("OTEL_TRACES_EXPORTER").is_some_and(|value| value == "none");
    first_said(["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"]).filter(|_| !off)
}

/// What is said of traces goes before what is said of everything.
fn first_said(names: [&'static str; 2]) -> Option<(&'static str, String)> {
    names.into_iter().find_map(|name| Some((name, said(name)?)))
}

fn said(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Sends no spans.
#[cfg(not(feature = "otlp"))]
#[derive(Clone, Debug)]
pub struct Traces;

/// No span.
#[cfg(not(feature = "otlp"))]
#[derive(Debug)]
pub struct Span;

#[cfg(not(feature = "otlp"))]
impl Traces {
    /// Says so where spans are wanted.
    ///
    /// # Errors
    /// None; a build that sends has some.
    pub fn start(_: &str) -> Result<Self, TracesError> {
        if let Some((variable, _)) = endpoint() {
            tracing::warn!("{variable} is set, but this build sends no traces: cargo build --features otlp");
        }
        Ok(Self)
    }

    /// Nothing.
    pub fn job(&self, _: &EndedJob<'_>) -> Span {
        Span
    }

    /// Nothing is under way.
    pub async fn close(&self) {}
}
