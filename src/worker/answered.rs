//! The last results, so that a job whose ack was lost is answered again and not run again; and what is under way,
//! so that one that comes again while it still runs here does not run twice at once.
//!
//! Small and bounded: it serves the moments after a lost connection, not duplicates of last week. A result is
//! found only by the very message that it answered, its body and where the answer goes and under which names:
//! nobody gets at another's result by choosing its id.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::amqp::Delivery;

/// Most results that are kept.
const RESULTS: usize = 256;

/// Most bytes of all of them together.
const BYTES: usize = 4 << 20;

/// Namespace of the keys: a random UUID, chosen once.
const KEYS: Uuid = Uuid::from_u128(0x7d21_0c94_e35b_4f68_8a1e_6b90_d4c7_253f);

/// What names a message. A name-based UUID is a hash of 122 bits, and finding a second message for the first
/// one's hash takes all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Key(Uuid);

/// A result as it was published.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) message_id: String,
    pub(super) body: Vec<u8>,
}

/// Results by the messages that they answered. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Answered(Arc<Mutex<Results>>);

#[derive(Debug, Default)]
struct Results {
    /// The oldest first.
    kept: VecDeque<(Key, Arc<Answer>)>,
    bytes: usize,
    /// Numbered, because nothing keeps two of one key from being under way.
    under_way: Vec<(u64, Key, CancellationToken)>,
    next: u64,
}

/// A message is under way as long as this lives.
#[derive(Debug)]
#[must_use = "the message counts as under way only while this lives"]
pub(super) struct UnderWay {
    answered: Answered,
    number: u64,
    over: CancellationToken,
}

impl Answer {
    /// A larger body is not kept.
    pub(super) const LARGEST: usize = BYTES;
}

impl Key {
    pub(super) fn of(delivery: &Delivery) -> Self {
        let properties = &delivery.properties;
        Self::new(
            &delivery.body,
            [&properties.message_id, &properties.reply_to, &properties.correlation_id, &properties.user_id]
                .map(Option::as_deref),
        )
    }

    fn new(body: &[u8], properties: [Option<&str>; 4]) -> Self {
        // Each with its length before it, so that nothing can move from one into the next.
        let mut all = Vec::with_capacity(body.len() + 1_024);
        for part in properties {
            all.extend(part.map_or(usize::MAX, str::len).to_be_bytes());
            all.extend(part.unwrap_or_default().as_bytes());
        }
        all.extend(body);
        Self(Uuid::new_v5(&KEYS, &all))
    }
}

impl Answered {
    /// Keeps a result that the broker has confirmed.
    pub(super) fn keep(&self, key: Key, answer: Answer) {
        let mut results = self.lock();
        if answer.body.len() > BYTES || results.kept.iter().any(|(kept, _)| *kept == key) {
            return;
        }
        results.bytes += answer.body.len();
        results.kept.push_back((key, Arc::new(answer)));
        while results.kept.len() > RESULTS || results.bytes > BYTES {
            let Some((_, oldest)) = results.kept.pop_front() else { break };
            results.bytes -= oldest.body.len();
        }
    }

    /// The result that this message got before.
    pub(super) fn find(&self, key: Key) -> Option<Arc<Answer>> {
        self.lock().kept.iter().rev().find(|(kept, _)| *kept == key).map(|(_, answer)| Arc::clone(answer))
    }

    /// From here on the message is under way.
    pub(super) fn begin(&self, key: Key) -> UnderWay {
        let over = CancellationToken::new();
        let mut results = self.lock();
        let number = results.next;
        results.next += 1;
        results.under_way.push((number, key, over.clone()));
        UnderWay { answered: self.clone(), number, over }
    }

    /// Waits until the same message, which came before, is not under way any more.
    pub(super) async fn until_over(&self, key: Key) {
        loop {
            let twin = self
                .lock()
                .under_way
                .iter()
                .find(|(_, other, _)| *other == key)
                .map(|(_, _, over)| over.clone());
            match twin {
                Some(over) => over.cancelled().await,
                None => return,
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Results> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.answered.lock().under_way.retain(|(number, ..)| *number != self.number);
        self.over.cancel();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(bytes: usize) -> Answer {
        Answer { message_id: "m".into(), body: vec![0; bytes] }
    }

    #[test]
    fn only_the_very_message_finds_its_result() {
        let answered = Answered::default();
        let key = Key::new(b"body", [Some("id"), Some("replies"), None, None]);
        answered.keep(key, answer(7));
        assert_eq!(answered.find(key).as_deref(), Some(&answer(7)));
        for other in [
            Key::new(b"bodY", [Some("id"), Some("replies"), None, None]),
            Key::new(b"body", [Some("id"), Some("mine"), None, None]),
            Key::new(b"body", [Some("id"), Some("replies"), Some(""), None]),
            Key::new(b"body", [Some("idreplies"), Some(""), None, None]),
            Key::new(b"sbody", [Some("id"), Some("replie"), None, None]),
        ] {
            assert_eq!(answered.find(other), None);
        }
    }

    #[tokio::test]
    async fn a_twin_waits_for_the_one_that_is_under_way_and_for_no_other() {
        let answered = Answered::default();
        let (key, other) = (Key::new(b"body", [None; 4]), Key::new(b"other", [None; 4]));
        let _other = answered.begin(other);
        answered.until_over(key).await;
        let (one, two) = (answered.begin(key), answered.begin(key));
        let waiting = answered.clone();
        let twin = tokio::spawn(async move { waiting.until_over(key).await });
        drop(one);
        tokio::task::yield_now().await;
        assert!(!twin.is_finished());
        drop(two);
        assert!(twin.await.is_ok());
    }

    #[test]
    fn the_oldest_give_way() {
        let answered = Answered::default();
        let key = |at: usize| Key::new(&at.to_be_bytes(), [None; 4]);
        for at in 0..RESULTS + 10 {
            answered.keep(key(at), answer(10));
        }
        assert_eq!((answered.find(key(9)), answered.find(key(10)).is_some()), (None, true));
        answered.keep(key(999), answer(BYTES));
        let (kept, bytes) = {
            let results = answered.lock();
            (results.kept.len(), results.bytes)
        };
        assert_eq!((kept, bytes), (1, BYTES));
        answered.keep(key(1_000), answer(BYTES + 1));
        assert_eq!(answered.find(key(1_000)), None);
    }
}
