//! Deduplication: a cache of recent results, so that a redelivered job whose ack was lost is answered and not run
//! again, and a registry of unsettled messages, so that one that is redelivered while it still runs here does not run
//! twice at one time.
//!
//! Small and bounded: it serves the moments after a lost connection. A result is found only by the very message that it
//! answered, with its body, its reply address and its ids: nobody gets at another's result by choosing an id.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::amqp::Delivery;

/// Most results that are kept.
const RESULTS: usize = 256;

/// Most bytes of all of them together.
const BYTES: usize = 4 << 20;

/// Namespace of the fingerprints: a random UUID, chosen once.
const FINGERPRINTS: Uuid = Uuid::from_u128(0x7d21_0c94_e35b_4f68_8a1e_6b90_d4c7_253f);

/// What names a message. A name-based UUID is a hash of 122 bits, and finding a second message for the first
/// one's hash takes all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MessageFingerprint(Uuid);

/// A result as it was published.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct CachedResult {
    pub(super) message_id: String,
    pub(super) body: Vec<u8>,
}

/// Results by the fingerprints of their messages. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct RecentResults(Arc<Mutex<Results>>);

#[derive(Debug, Default)]
struct Results {
    /// The oldest first.
    kept: VecDeque<(MessageFingerprint, Arc<CachedResult>)>,
    bytes: usize,
    /// Numbered, because nothing keeps two of one fingerprint from being unsettled.
    unsettled: Vec<(u64, MessageFingerprint, CancellationToken)>,
    next: u64,
}

/// A message counts as unsettled as long as this lives.
#[derive(Debug)]
#[must_use = "the message counts as unsettled only while this lives"]
pub(super) struct UnsettledGuard {
    recent: RecentResults,
    number: u64,
    over: CancellationToken,
}

impl CachedResult {
    /// A larger body is not kept.
    pub(super) const LARGEST: usize = BYTES;
}

impl MessageFingerprint {
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
        Self(Uuid::new_v5(&FINGERPRINTS, &all))
    }
}

impl RecentResults {
    /// Keeps a result that the broker has confirmed.
    pub(super) fn keep(&self, fingerprint: MessageFingerprint, result: CachedResult) {
        let mut results = self.lock();
        if result.body.len() > BYTES || results.kept.iter().any(|(kept, _)| *kept == fingerprint) {
            return;
        }
        results.bytes += result.body.len();
        results.kept.push_back((fingerprint, Arc::new(result)));
        while results.kept.len() > RESULTS || results.bytes > BYTES {
            let Some((_, oldest)) = results.kept.pop_front() else { break };
            results.bytes -= oldest.body.len();
        }
    }

    /// The result that this message got before.
    pub(super) fn find(&self, fingerprint: MessageFingerprint) -> Option<Arc<CachedResult>> {
        self.lock()
            .kept
            .iter()
            .rev()
            .find(|(kept, _)| *kept == fingerprint)
            .map(|(_, result)| Arc::clone(result))
    }

    /// Counts the message as unsettled from here on.
    pub(super) fn begin(&self, fingerprint: MessageFingerprint) -> UnsettledGuard {
        let over = CancellationToken::new();
        let mut results = self.lock();
        let number = results.next;
        results.next += 1;
        results.unsettled.push((number, fingerprint, over.clone()));
        UnsettledGuard { recent: self.clone(), number, over }
    }

    /// Waits until the same message, delivered before, is settled.
    pub(super) async fn wait_until_settled(&self, fingerprint: MessageFingerprint) {
        loop {
            let duplicate = self
                .lock()
                .unsettled
                .iter()
                .find(|(_, other, _)| *other == fingerprint)
                .map(|(_, _, over)| over.clone());
            match duplicate {
                Some(over) => over.cancelled().await,
                None => return,
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Results> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for UnsettledGuard {
    fn drop(&mut self) {
        self.recent.lock().unsettled.retain(|(number, ..)| *number != self.number);
        self.over.cancel();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(bytes: usize) -> CachedResult {
        CachedResult { message_id: "m".into(), body: vec![0; bytes] }
    }

    #[test]
    fn only_the_very_message_finds_its_result() {
        let recent = RecentResults::default();
        let fingerprint = MessageFingerprint::new(b"body", [Some("id"), Some("replies"), None, None]);
        recent.keep(fingerprint, result(7));
        assert_eq!(recent.find(fingerprint).as_deref(), Some(&result(7)));
        for other in [
            MessageFingerprint::new(b"bodY", [Some("id"), Some("replies"), None, None]),
            MessageFingerprint::new(b"body", [Some("id"), Some("mine"), None, None]),
            MessageFingerprint::new(b"body", [Some("id"), Some("replies"), Some(""), None]),
            MessageFingerprint::new(b"body", [Some("idreplies"), Some(""), None, None]),
            MessageFingerprint::new(b"sbody", [Some("id"), Some("replie"), None, None]),
        ] {
            assert_eq!(recent.find(other), None);
        }
    }

    #[tokio::test]
    async fn a_duplicate_waits_for_the_unsettled_one_and_for_no_other() {
        let recent = RecentResults::default();
        let (fingerprint, other) =
            (MessageFingerprint::new(b"body", [None; 4]), MessageFingerprint::new(b"other", [None; 4]));
        let _other = recent.begin(other);
        recent.wait_until_settled(fingerprint).await;
        let (one, two) = (recent.begin(fingerprint), recent.begin(fingerprint));
        let waiting = recent.clone();
        let duplicate = tokio::spawn(async move { waiting.wait_until_settled(fingerprint).await });
        drop(one);
        tokio::task::yield_now().await;
        assert!(!duplicate.is_finished());
        drop(two);
        assert!(duplicate.await.is_ok());
    }

    #[test]
    fn the_oldest_give_way() {
        let recent = RecentResults::default();
        let fingerprint = |at: usize| MessageFingerprint::new(&at.to_be_bytes(), [None; 4]);
        for at in 0..RESULTS + 10 {
            recent.keep(fingerprint(at), result(10));
        }
        assert_eq!((recent.find(fingerprint(9)), recent.find(fingerprint(10)).is_some()), (None, true));
        recent.keep(fingerprint(999), result(BYTES));
        let (kept, bytes) = {
            let results = recent.lock();
            (results.kept.len(), results.bytes)
        };
        assert_eq!((kept, bytes), (1, BYTES));
        recent.keep(fingerprint(1_000), result(BYTES + 1));
        assert_eq!(recent.find(fingerprint(1_000)), None);
    }
}
