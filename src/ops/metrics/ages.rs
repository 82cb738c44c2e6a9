//! How long the oldest of some things under way has been there.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// All that are under way. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Ages(Arc<Mutex<Begun>>);

#[derive(Debug, Default)]
struct Begun {
    next: u64,
    /// By the order in which they began.
    when: BTreeMap<u64, Instant>,
}

/// One of them, until it is dropped.
#[derive(Debug)]
pub(super) struct Age {
    ages: Ages,
    key: u64,
}

impl Ages {
    pub(super) fn begin(&self) -> Age {
        let mut begun = self.lock();
        let key = begun.next;
        begun.next += 1;
        begun.when.insert(key, Instant::now());
        Age { ages: self.clone(), key }
    }

    /// Since the first of those that are still under way began; zero where none is.
    pub(super) fn oldest(&self) -> Duration {
        self.lock().when.first_key_value().map(|(_, began)| began.elapsed()).unwrap_or_default()
    }

    fn lock(&self) -> MutexGuard<'_, Begun> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Age {
    fn drop(&mut self) {
        self.ages.lock().when.remove(&self.key);
    }
}
