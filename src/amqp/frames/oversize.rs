//! Bodies of deliveries that are larger than the worker reads: which frames they are, and how large they were.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use crate::amqp::frames::sanitize;

/// Bodies that were larger than they may be, and did not come through. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(in crate::amqp) struct Dropped(Arc<Mutex<VecDeque<(Of, u64)>>>);

/// Names a delivery: its channel and its number.
type Of = (u16, u64);

impl Dropped {
    /// More than any prefetch. What nobody asks for, as the delivery was given back unseen, goes first.
    const MOST: usize = 70_000;

    fn note(&self, of: Of, bytes: u64) {
        let mut notes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if notes.len() == Self::MOST {
            notes.pop_front();
        }
        notes.push_back((of, bytes));
    }

    /// How large the body of this delivery was, if it was dropped.
    pub(in crate::amqp) fn take(&self, channel: u16, delivery: u64) -> Option<u64> {
        let mut notes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = notes.iter().position(|(of, _)| *of == (channel, delivery))?;
        notes.remove(at).map(|(_, bytes)| bytes)
    }
}

/// Which bodies do not come through.
#[derive(Debug)]
pub(in crate::amqp) struct Limit {
    /// The largest that does.
    most: u64,
    dropped: Dropped,
    /// What the last method on each channel delivers.
    delivered: HashMap<u16, u64>,
    /// How much of a body that is dropped is still to come, by channel.
    dropping: HashMap<u16, u64>,
}

impl Limit {
    pub(in crate::amqp) fn new(most: usize, dropped: Dropped) -> Self {
        let most = u64::try_from(most).unwrap_or(u64::MAX);
        Self { most, dropped, delivered: HashMap::new(), dropping: HashMap::new() }
    }

    /// A method came: what follows is the content of a delivery, or of nothing that is limited.
    pub(in crate::amqp) fn method(&mut self, channel: u16, payload: &[u8]) {
        self.dropping.remove(&channel);
        match sanitize::delivered(payload) {
            Some(number) => self.delivered.insert(channel, number),
            None => self.delivered.remove(&channel),
        };
    }

    /// The header of a content came: one that is too large is made to say that no body follows.
    pub(in crate::amqp) fn header(&mut self, channel: u16, payload: &mut [u8]) {
        let Some(number) = self.delivered.remove(&channel) else { return };
        let Some(size) = payload.get_mut(4..12).and_then(|size| size.first_chunk_mut::<8>()) else { return };
        let bytes = u64::from_be_bytes(*size);
        if bytes > self.most {
            *size = [0; 8];
            self.dropping.insert(channel, bytes);
            self.dropped.note((channel, number), bytes);
        }
    }

    /// Whether a part of a body, of so many bytes, is dropped.
    pub(in crate::amqp) fn drops(&mut self, channel: u16, bytes: u32) -> bool {
        let Some(left) = self.dropping.get_mut(&channel) else { return false };
        *left = left.saturating_sub(bytes.into());
        if *left == 0 {
            self.dropping.remove(&channel);
        }
        true
    }
}
