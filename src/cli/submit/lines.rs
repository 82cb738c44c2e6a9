//! The jobs of a batch, one a line.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, bail};
use tokio::sync::mpsc;

use crate::cli::remote::Numbered;
use crate::cli::{End, output};
use crate::job;

/// Jobs as they are read, one a line.
pub(super) struct Batch {
    pub(super) jobs: mpsc::Receiver<Numbered>,
    /// Lines that are no job, or could not be read. They were told of and have no result.
    pub(super) refused: Arc<AtomicUsize>,
}

pub(super) fn ended(refused: &AtomicUsize) -> End {
    if refused.load(Ordering::Relaxed) == 0 { End::Done } else { End::Unsatisfied }
}

/// The lines of a file; empty ones are passed over.
pub(super) fn read(file: &Path, largest: usize) -> anyhow::Result<Batch> {
    let mut input: Box<dyn BufRead + Send> = if file == Path::new("-") {
        Box::new(BufReader::new(std::io::stdin()))
    } else {
        let opened = std::fs::File::open(file);
        Box::new(BufReader::new(opened.with_context(|| format!("failed to read {}", file.display()))?))
    };
    let (send, jobs) = mpsc::channel(64);
    let refused = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&refused);
    std::thread::spawn(move || {
        for number in 1_usize.. {
            let line = match next_line(&mut *input, largest) {
                Ok(Some(line)) => line,
                Ok(None) => break,
                Err(error) => {
                    count.fetch_add(1, Ordering::Relaxed);
                    output::complain(&format!(
                        "the batch ends before line {number}, which cannot be read: {error}"
                    ));
                    break;
                }
            };
            match check(line, largest) {
                Ok(None) => {}
                Ok(Some(job)) => {
                    // The other end is gone when the batch is over.
                    if send.blocking_send((number, job)).is_err() {
                        break;
                    }
                }
                Err(error) => {
                    count.fetch_add(1, Ordering::Relaxed);
                    output::complain(&format!("line {number} of the batch is left out: {error:#}"));
                }
            }
        }
    });
    Ok(Batch { jobs, refused })
}

/// The next line without its end. Of one that is larger than `largest` bytes only the beginning is kept.
fn next_line(input: &mut dyn BufRead, largest: usize) -> std::io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let most = u64::try_from(largest).unwrap_or(u64::MAX).saturating_add(1);
    if input.take(most).read_until(b'\n', &mut line)? == 0 {
        return Ok(None);
    }
    if line.last() == Some(&b'\n') {
        line.pop();
    } else if line.len() > largest {
        input.skip_until(b'\n')?;
    }
    Ok(Some(line))
}

/// A line that is no job at all would end in the dead queue: better said here, with its number.
fn check(line: Vec<u8>, largest: usize) -> anyhow::Result<Option<Vec<u8>>> {
    if line.trim_ascii().is_empty() {
        return Ok(None);
    }
    if line.len() > largest {
        bail!("it has more than amqp.max_body_bytes = {largest} bytes");
    }
    match job::no_object(&line) {
        Some(why) => bail!("{why}"),
        None => Ok(Some(line)),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_is_no_job_names_what_is_wrong() {
        let told = |line: &str| check(line.into(), 100).unwrap_err().to_string();
        assert!(told(r#"{"code": "", "metadata": {"score": NaN}}"#).contains("`metadata.score` is `NaN`"));
        assert!(told("[1]").contains("must be one JSON object"));
        assert!(told(r#"{"code": "cut"#).contains("in `code`"));
        // The worker's to refuse.
        assert!(check(br#"{"unknown": 1}"#.to_vec(), 100).unwrap().is_some());
        assert!(check(b" ".to_vec(), 100).unwrap().is_none());
    }

    #[test]
    fn lines_are_cut_where_they_are_too_long() {
        let mut input = &b"one\n\nlonger than that\nlast"[..];
        let mut lines = Vec::new();
        while let Some(line) = next_line(&mut input, 4).unwrap() {
            lines.push(String::from_utf8(line).unwrap());
        }
        assert_eq!(lines, ["one", "", "longe", "last"]);
    }
}
