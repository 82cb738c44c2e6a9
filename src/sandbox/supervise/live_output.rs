//! Output of a job as it is read, for whoever wants it before the job has ended.
//!
//! The one who watches the job only ever adds to it and never waits. What nobody has taken yet is at most what
//! the job may write at all.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::job::Stream;

/// Pieces that are kept apart. A job that writes to both streams by turns, byte for byte, would else cost more
/// for its pieces than for its bytes; past this, which stream came first is not kept.
const PIECES: usize = 64;

/// A tap on both streams of a job. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Tap(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    pieces: Mutex<VecDeque<(Stream, Vec<u8>)>>,
    more: Notify,
}

impl Tap {
    /// Waits until at least so many bytes can be taken.
    pub async fn holds(&self, bytes: usize) {
        loop {
            let more = self.0.more.notified();
            if self.pending() >= bytes {
                return;
            }
            more.await;
        }
    }

    /// How many bytes can be taken.
    pub fn pending(&self) -> usize {
        self.lock().iter().map(|(_, bytes)| bytes.len()).sum()
    }

    /// At most so many bytes of one stream, the oldest.
    pub fn take(&self, most: usize) -> Option<(Stream, Vec<u8>)> {
        let mut pieces = self.lock();
        let (stream, bytes) = pieces.front_mut()?;
        let stream = *stream;
        if bytes.len() > most {
            let rest = bytes.split_off(most);
            return Some((stream, std::mem::replace(bytes, rest)));
        }
        pieces.pop_front()
    }

    pub(in crate::sandbox) fn add(&self, stream: Stream, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let mut pieces = self.lock();
        let apart = if pieces.len() < PIECES { 1 } else { PIECES };
        let same = pieces.iter_mut().rev().take(apart).find(|(last, _)| *last == stream);
        match same {
            Some((_, held)) => held.extend_from_slice(bytes),
            None => pieces.push_back((stream, bytes.to_vec())),
        }
        drop(pieces);
        // One reader: a notice that nobody waits for is kept for it.
        self.0.more.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<(Stream, Vec<u8>)>> {
        self.0.pieces.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;

    #[test]
    fn what_is_added_comes_out_in_order_and_in_pieces() {
        let tap = Tap::default();
        tap.add(Stream::Stdout, b"ab");
        tap.add(Stream::Stdout, b"cd");
        tap.add(Stream::Stderr, b"");
        tap.add(Stream::Stderr, b"x");
        assert_eq!(tap.pending(), 5);
        let taken: Vec<_> = std::iter::from_fn(|| tap.take(3)).collect();
        let expected = [(Stream::Stdout, &b"abc"[..]), (Stream::Stdout, b"d"), (Stream::Stderr, b"x")];
        assert_eq!(taken, expected.map(|(stream, bytes)| (stream, bytes.to_vec())));
    }

    #[test]
    fn pieces_are_bounded_and_no_byte_is_lost() {
        let tap = Tap::default();
        for at in 0..10_000_u32 {
            let stream = if at % 2 == 0 { Stream::Stdout } else { Stream::Stderr };
            tap.add(stream, &at.to_be_bytes());
        }
        assert!(tap.lock().len() <= PIECES);
        let mut seen = [Vec::new(), Vec::new()];
        while let Some((stream, bytes)) = tap.take(1_000) {
            seen[usize::from(stream == Stream::Stderr)].extend(bytes);
        }
        for (first, bytes) in seen.iter().enumerate() {
            let numbers: Vec<_> =
                bytes.chunks(4).map(|c| u32::from_be_bytes(c.try_into().unwrap())).collect();
            let first = u32::try_from(first).unwrap();
            assert_eq!(numbers, (0..5_000).map(|at| 2 * at + first).collect::<Vec<_>>());
        }
    }

    #[tokio::test]
    async fn a_reader_waits_for_as_much_as_it_wants() {
        let tap = Tap::default();
        let reader = tap.clone();
        let waits = tokio::spawn(async move { reader.holds(3).await });
        tap.add(Stream::Stdout, b"ab");
        tokio::task::yield_now().await;
        assert!(!waits.is_finished());
        tap.add(Stream::Stderr, b"c");
        waits.await.unwrap();
    }
}
