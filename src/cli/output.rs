//! How results and complaints reach a person or a program.

use std::io::{ErrorKind, Write};

use anyhow::Context;

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
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error).context("failed to write standard output"),
        _ => Ok(()),
    }
}

/// One JSON document and a line end.
pub(super) fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    let mut text = serde_json::to_vec(value).context("failed to write JSON")?;
    text.push(b'\n');
    print(&text)
}
