//! Reply addresses that did not take a result lately, so that the next ones for them hold up nobody.
//!
//! For a minute theirs go to the results queue at once. Then one result probes the address while the others still do;
//! a confirm, even a late one, clears it.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// How long an address is avoided.
const AVOIDED: Duration = Duration::from_secs(60);

/// Most addresses that are remembered: publishers choose them. The oldest goes first.
const MOST: usize = 1_024;

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Refusals(Mutex<HashMap<String, Refused>>);

#[derive(Clone, Copy, Debug)]
struct Refused {
    /// When it last refused.
    at: Instant,
    /// When a result last began to probe it, after its time was over.
    probed: Option<Instant>,
}

impl Refusals {
    /// Whether a result may be published to this address. After its time that is said to one of those that ask.
    pub(super) fn may_try(&self, address: &str) -> bool {
        let mut known = self.lock();
        let Some(refused) = known.get_mut(address) else { return true };
        // A probe whose end nobody reported, as its job was killed, is forgotten in its turn.
        let since = refused.probed.unwrap_or(refused.at);
        if since.elapsed() < AVOIDED {
            return false;
        }
        refused.probed = Some(Instant::now());
        true
    }

    /// Whether it refused lately; asking does not probe.
    pub(super) fn has_refused(&self, address: &str) -> bool {
        self.lock().contains_key(address)
    }

    /// It took nothing just now.
    pub(super) fn refused(&self, address: &str) {
        let mut known = self.lock();
        if known.len() >= MOST && !known.contains_key(address) {
            let oldest = known.iter().min_by_key(|(_, refused)| refused.at).map(|(name, _)| name.clone());
            oldest.and_then(|oldest| known.remove(&oldest));
        }
        known.insert(address.to_owned(), Refused { at: Instant::now(), probed: None });
    }

    /// The same for an address that is known already, and nothing for any other.
    pub(super) fn refused_again(&self, address: &str) {
        if let Some(refused) = self.lock().get_mut(address) {
            *refused = Refused { at: Instant::now(), probed: None };
        }
    }

    /// It takes results.
    pub(super) fn forget(&self, address: &str) {
        self.lock().remove(address);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Refused>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_address_is_avoided_for_a_minute_then_probed_by_one() {
        let refusals = Refusals::default();
        assert!(refusals.may_try("evil"));
        refusals.refused("evil");
        assert!(!refusals.may_try("evil") && refusals.may_try("other"));
        tokio::time::advance(AVOIDED).await;
        assert!(refusals.may_try("evil"), "one probes it");
        assert!(!refusals.may_try("evil"), "and no other meanwhile");
        refusals.refused("evil");
        tokio::time::advance(AVOIDED).await;
        assert!(refusals.may_try("evil"));
        tokio::time::advance(AVOIDED).await;
        assert!(refusals.may_try("evil"), "the first probe came to no end");
        refusals.forget("evil");
        assert!(refusals.may_try("evil") && refusals.may_try("evil"));
        refusals.refused_again("evil");
        assert!(!refusals.has_refused("evil"), "it was not known");
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_are_remembered_than_a_bound_and_the_oldest_goes_first() {
        let refusals = Refusals::default();
        for at in 0..=MOST {
            refusals.refused(&at.to_string());
            tokio::time::advance(Duration::from_millis(1)).await;
        }
        assert_eq!(refusals.lock().len(), MOST);
        assert!(refusals.may_try("0") && !refusals.may_try("1"));
    }
}
