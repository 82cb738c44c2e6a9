//! How results and complaints reach a person or a program.

use std::io::{ErrorKind, Write};
use std::path::{Component, Path};

use anyhow::{Context, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;

use crate::cli::End;
use crate::job::{Encoding, Reply, Status};
use crate::sys::job_dir::write_below;

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

/// The same where a reader who went away is one: what goes on would be for nobody.
pub(super) fn print_for_somebody(bytes: &[u8]) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush()).context("failed to write standard output")
}

/// Text of strangers, fit for a line on a terminal.
pub(super) fn one_line(text: &str) -> String {
    text.chars().map(|char| if char.is_control() { ' ' } else { char }).collect()
}

/// Bytes of the job's on standard error.
pub(super) fn print_error(bytes: &[u8]) {
    // Nobody is left to tell where standard error is closed.
    drop(std::io::stderr().write_all(bytes));
}

/// One JSON document and a line end.
pub(super) fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    print(&on_one_line(serde_json::to_vec(value).context("failed to write JSON")?))
}

/// A JSON document as a line. A result has line ends of its own where its job's metadata was written with them; in JSON
/// they are only ever space.
pub(super) fn on_one_line(mut json: Vec<u8>) -> Vec<u8> {
    for byte in json.iter_mut().filter(|byte| matches!(byte, b'\n' | b'\r')) {
        *byte = b' ';
    }
    json.push(b'\n');
    json
}

/// Prints what a job printed, and the one line that says what became of it where its own exit code does not.
pub(super) fn show(reply: &Reply) -> anyhow::Result<End> {
    show_rest(reply, [0, 0])
}

/// The same where so many bytes of both streams were printed before.
pub(super) fn show_rest(reply: &Reply, shown: [usize; 2]) -> anyhow::Result<End> {
    let stdout = stream(&reply.stdout, reply.stdout_encoding)?;
    print(stdout.get(shown[0]..).unwrap_or_default())?;
    let stderr = stream(&reply.stderr, reply.stderr_encoding)?;
    print_error(stderr.get(shown[1]..).unwrap_or_default());
    if !matches!(reply.status, Status::Succeeded | Status::Failed) {
        if stderr.last().is_some_and(|last| *last != b'\n') {
            drop(std::io::stderr().write_all(b"\n"));
        }
        complain(&verdict(reply));
    } else if let (Status::Succeeded, Some(note)) = (reply.status, &reply.error) {
        // What of the result had to be left out.
        complain(note);
    }
    Ok(End::Job {
        status: reply.status,
        exit_code: reply.exit_code,
        signal: reply.signal.as_deref().and_then(crate::sys::signal::number),
    })
}

/// The status and why, in one line.
pub(super) fn verdict(reply: &Reply) -> String {
    let error = reply.error.as_deref().unwrap_or("no more is known");
    let error: Vec<&str> = error.split_whitespace().collect();
    format!("{}: {}", reply.status.as_str(), error.join(" "))
}

/// A directory for returned files, made where it is missing.
pub(super) fn prepare(directory: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(directory)
        .with_context(|| format!("failed to make {}, for the returned files", directory.display()))
}

/// Writes the returned files below `directory`, which is made where it is missing. Their names come from the job:
/// none leads out of it, by its parts or through a link, and none takes the place of what is there unless
/// `overwrite` says so. What cannot be written holds up none of the others.
pub(super) fn save(reply: &Reply, directory: &Path, overwrite: bool) -> anyhow::Result<()> {
    let failed = || format!("failed to write the returned files to {}", directory.display());
    std::fs::create_dir_all(directory).with_context(failed)?;
    let below = std::fs::File::open(directory).with_context(failed)?;
    let mut left = Vec::new();
    for artifact in &reply.artifacts {
        let path = &artifact.path;
        if path.is_empty() || !Path::new(path).components().all(|part| matches!(part, Component::Normal(_))) {
            left.push(format!("{path:?} leads elsewhere"));
            continue;
        }
        let Ok(content) = BASE64.decode(&artifact.base64) else {
            left.push(format!("{path:?} is not base64"));
            continue;
        };
        match write_below(&below, path, &content, overwrite) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                left.push(format!("{path:?} is there already (--overwrite replaces it)"));
            }
            Err(error) => left.push(format!("{path:?} cannot be written: {error}")),
        }
    }
    if !left.is_empty() {
        bail!(
            "{} of {} returned files were not written to {}: {}",
            left.len(),
            reply.artifacts.len(),
            directory.display(),
            left.join("; ")
        );
    }
    Ok(())
}

fn stream(text: &str, encoding: Encoding) -> anyhow::Result<Vec<u8>> {
    match encoding {
        Encoding::Utf8 => Ok(text.as_bytes().to_vec()),
        Encoding::Base64 => BASE64.decode(text).context("the result holds output that is not base64"),
    }
}
