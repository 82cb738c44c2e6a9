//! Logs: structured events on standard error, for people or one JSON object a line.
//!
//! Standard output belongs to results. What is logged never holds code, output or a secret; that is
//! up to those who log, this file only sets up where it goes. Where that is systemd's journal, each line begins
//! with its priority, which the journal takes off again, and the time is left to it.

use std::fmt;
use std::io::IsTerminal;
use std::os::linux::fs::MetadataExt;

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

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
    let journal = goes_to_the_journal();
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none());
    match (&log.format, journal) {
        (LogFormat::Text, false) => builder.try_init(),
        (LogFormat::Text, true) => builder.without_time().map_event_format(Prioritised).try_init(),
        (LogFormat::Json, journal) => {
            let builder = builder.json().flatten_event(true).with_current_span(false);
            if journal { builder.map_event_format(Prioritised).try_init() } else { builder.try_init() }
        }
    }
    .map_err(TelemetryError::Twice)
}

/// Whether standard error is the journal's: systemd says which file it connected. A variable that was inherited by
/// somebody whose output goes elsewhere names another one.
fn goes_to_the_journal() -> bool {
    let Ok(stderr) = std::fs::metadata("/proc/self/fd/2") else { return false };
    std::env::var("JOURNAL_STREAM")
        .is_ok_and(|said| said == format!("{}:{}", stderr.st_dev(), stderr.st_ino()))
}

/// Events with their priority before them, as `sd-daemon(3)` has it.
struct Prioritised<F>(F);

impl<S, N, F> FormatEvent<S, N> for Prioritised<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let priority = match *event.metadata().level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            Level::DEBUG | Level::TRACE => 7,
        };
        write!(writer, "<{priority}>")?;
        self.0.format_event(context, writer, event)
    }
}
