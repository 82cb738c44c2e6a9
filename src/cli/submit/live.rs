//! Output of a job that still runs, as far as it can be shown.

use anyhow::Context;

use crate::cli::output;
use crate::job::{Chunk, Reply, Stream};

/// What has been printed of a job that still runs.
#[derive(Default)]
pub(super) struct Live {
    to_terminal: bool,
    next: u64,
    /// The first piece, and the id of its message, which says in which of its runs the job wrote it.
    first: Option<(Chunk, String)>,
    /// A second run has begun.
    again: bool,
    /// Bytes of standard output, and of standard error.
    bytes: [usize; 2],
}

impl Live {
    pub(super) fn new(to_terminal: bool) -> Self {
        Self { to_terminal, ..Self::default() }
    }

    /// A piece that came twice is not shown, nor one of a second run: they say other things, or the same in other
    /// pieces. The result has all that is missing.
    pub(super) fn show(&mut self, chunk: Chunk, message_id: &str) -> anyhow::Result<()> {
        self.again |= chunk.seq == 0 && self.first.as_ref().is_some_and(|(_, first)| first != message_id);
        if chunk.seq != self.next || self.again || !self.to_terminal {
            return Ok(());
        }
        self.next += 1;
        let bytes = chunk.bytes().context("output is not what it says it is")?;
        let [stdout, stderr] = &mut self.bytes;
        match chunk.stream {
            Stream::Stdout => {
                *stdout += bytes.len();
                output::print(&bytes)?;
            }
            Stream::Stderr => {
                *stderr += bytes.len();
                output::print_error(&bytes);
            }
        }
        self.first.get_or_insert_with(|| (chunk, message_id.to_owned()));
        Ok(())
    }

    /// How much of this result was shown: nothing where it is another run's, which is said.
    pub(super) fn shown(&self, reply: &Reply) -> [usize; 2] {
        match &self.first {
            Some((chunk, message_id)) if chunk.message_id(reply.attempt).to_string() != *message_id => {
                output::complain("the job was delivered again and ran anew; all that it wrote then:");
                [0, 0]
            }
            _ => self.bytes,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;

    #[test]
    fn only_pieces_of_one_run_are_put_together() {
        let piece = |seq, attempt, text: &str| {
            let chunk = Chunk::new("id", seq, Stream::Stderr, text.into());
            let message_id = chunk.message_id(attempt).to_string();
            (chunk, message_id)
        };
        let mut live = Live::new(true);
        for (chunk, message_id) in [
            piece(0, 1, "a"),
            piece(0, 1, "a"),
            piece(1, 1, "bc"),
            // Its worker is gone, and the next one begins anew, with other pieces.
            piece(0, 2, "abc"),
            piece(1, 2, "d"),
            piece(2, 2, "e"),
        ] {
            live.show(chunk, &message_id).unwrap();
        }
        assert_eq!((live.bytes, live.again), ([0, 3], true));
        let mut reply: Reply =
            serde_json::from_str(include_str!("../../../tests/fixtures/contract/example_result.json"))
                .unwrap();
        for (attempt, shown) in [(1, [0, 3]), (2, [0, 0])] {
            reply.attempt = attempt;
            assert_eq!(live.shown(&reply), shown);
        }
    }
}
