//! Lays a job's files into its working directory, after its walls stand and before its code is handed over.

use std::io::{self, Write};

use crate::job::{InputFile, Limits};
use crate::sandbox::error::explained;
use crate::sandbox::outer_wall::mounts::INODES;
use crate::sys::place::Place;

/// Why the files are not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::sandbox) enum Unlaid {
    /// The job asks for what cannot be; the sentence says what.
    Refused(String),
    /// Our own trouble.
    Failed(String),
}

/// Writes every file, as the job's user. On a thread that may block: writing waits for nothing but memory, and
/// there may be megabytes of it.
pub(in crate::sandbox) async fn lay(
    place: Place,
    files: Vec<InputFile>,
    limits: Limits,
) -> io::Result<(Place, Result<(), Unlaid>)> {
    if files.is_empty() {
        return Ok((place, Ok(())));
    }
    let laid = tokio::task::spawn_blocking(move || {
        let laid = place.as_owner(|| write(&place, &files, &limits));
        let laid =
            laid.unwrap_or_else(|error| Err(Unlaid::Failed(format!("become the job's user: {error}"))));
        (place, laid)
    });
    laid.await.map_err(io::Error::other)
}

fn write(place: &Place, files: &[InputFile], limits: &Limits) -> Result<(), Unlaid> {
    for (index, file) in files.iter().enumerate() {
        let written = place.create(&file.path).and_then(|mut new| new.write_all(&file.content));
        written.map_err(|error| explain(index, &file.path, &error, limits))?;
    }
    Ok(())
}

fn explain(index: usize, path: &str, error: &io::Error, limits: &Limits) -> Unlaid {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Unlaid::Refused(format!(
            "`files` do not fit into the job's `limits.disk_bytes` of {}: each takes whole pages of memory, and \
             there may be {INODES} files and directories; raise the limit or send less",
            limits.disk_bytes
        )),
        // The directory was empty but for what a preload made: a file, or a link where a directory should be.
        io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory => Unlaid::Refused(format!(
            "`files[{index}].path` is {path:?}, where the preload has made something else; rename one of them"
        )),
        _ => Unlaid::Failed(format!("failed to write the job's file {path:?}: {}", explained(error))),
    }
}
