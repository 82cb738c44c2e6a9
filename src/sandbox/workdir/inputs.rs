//! Lays a job's files into its working directory, after its walls stand and before its code is handed over.

use std::io::{self, Write};

use crate::job::{InputFile, Limits};
use crate::sandbox::error::explained;
use crate::sandbox::outer_wall::mounts::INODES;
use crate::sys::job_dir::JobDir;

/// Why the files are not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::sandbox) enum InputsNotWritten {
    /// The job asks for what cannot be; the sentence says what.
    Refused(String),
    /// Our own trouble.
    Failed(String),
}

/// Writes every file, as the job's user. On a thread that may block: writing waits for nothing but memory, and
/// there may be megabytes of it.
pub(in crate::sandbox) async fn lay(
    job_dir: JobDir,
    files: Vec<InputFile>,
    limits: Limits,
) -> io::Result<(JobDir, Result<(), InputsNotWritten>)> {
    if files.is_empty() {
        return Ok((job_dir, Ok(())));
    }
    let laid = tokio::task::spawn_blocking(move || {
        let laid = job_dir.as_owner(|| write(&job_dir, &files, &limits));
        let laid = laid
            .unwrap_or_else(|error| Err(InputsNotWritten::Failed(format!("become the job's user: {error}"))));
        (job_dir, laid)
    });
    laid.await.map_err(io::Error::other)
}

fn write(job_dir: &JobDir, files: &[InputFile], limits: &Limits) -> Result<(), InputsNotWritten> {
    for (index, file) in files.iter().enumerate() {
        let written = job_dir.create(&file.path).and_then(|mut new| new.write_all(&file.content));
        written.map_err(|error| explain(index, &file.path, &error, limits))?;
    }
    Ok(())
}

fn explain(index: usize, path: &str, error: &io::Error, limits: &Limits) -> InputsNotWritten {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => InputsNotWritten::Refused(format!(
            "`files` do not fit into the job's `limits.disk_bytes` of {}: each takes whole pages of memory, and \
             there may be {INODES} files and directories; raise the limit or send less",
            limits.disk_bytes
        )),
        // The directory was empty but for what a preload made: a file, or a link where a directory should be.
        io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory => InputsNotWritten::Refused(format!(
            "`files[{index}].path` is {path:?}, where the preload has made something else; rename one of them"
        )),
        _ => {
            InputsNotWritten::Failed(format!("failed to write the job's file {path:?}: {}", explained(error)))
        }
    }
}
