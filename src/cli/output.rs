//! How results and complaints reach a person or a program.

use std::io::{ErrorKind, Write};

use anyhow::Context;

use crate::cli::End;
use crate::job::{Outcome, Status};

/// One line on standard error, opened by our name so that it is not taken for the job's.
pub(super) fn complain(message: &str) {
    let line = format!("sandpiper: {}\n", message.trim_end().replace('\n', "\n  "));
    // Nobody is left to tell where standard error is closed.
    drop(std::io::stderr().write_all(line.as_bytes()));
}

/// Bytes on standard output. A reader who went away (`| head`) is no failure.
pub(super) fn print(bytes: &[u8]) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(error).context("failed to write standard output")
        }
        _ => Ok(()),
    }
}

/// One JSON document and a line end.
pub(super) fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    let mut text = serde_json::to_vec(value).context("failed to write JSON")?;
    text.push(b'\n');
    print(&text)
}

/// Prints what a job printed, and the one line that says what became of it where its own exit code does not.
pub(super) fn show(outcome: &Outcome) -> anyhow::Result<End> {
    print(&outcome.stdout.bytes)?;
    // Nobody is left to tell where standard error is closed.
    drop(std::io::stderr().write_all(&outcome.stderr.bytes));
    let status = outcome.status;
    if !matches!(status, Status::Succeeded | Status::Failed) {
        if outcome.stderr.bytes.last().is_some_and(|last| *last != b'\n') {
            drop(std::io::stderr().write_all(b"\n"));
        }
        let error = outcome.error.as_deref().unwrap_or("no more is known");
        complain(&format!("{}: {}", status.as_str(), one_line(error)));
    }
    let signal = outcome.signal.as_deref().and_then(crate::sys::signal::number);
    Ok(End::Job { status, exit_code: outcome.exit_code, signal })
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
