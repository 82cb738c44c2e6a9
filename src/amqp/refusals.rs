//! Reply addresses that did not take a result lately, so that the next ones for them hold up nobody.
//!
//! For a minute theirs go to the results queue at once. Then one result probes the address while the others still do;
//! a confirm, even a late one, clears it. What an address that is only slow would take is published there as well, and
//! nobody waits for it.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// How long an address is avoided.
const AVOIDED: Duration = Duration::from_secs(60);

/// Most addresses that are remembered: publishers choose them. The oldest goes first.
const MOST: usize = 1_024;

/// Results for a slow address that may be under way there without a confirm. Each holds a channel.
const UNCONFIRMED: usize = 8;

/// What is to be done with a result for an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Try {
    /// Publish it there, and wait for the confirm.
    Usual,
    /// Publish it there, and do not wait.
    Unawaited,
    /// Publish it elsewhere.
    Not,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Refusals(Mutex<HashMap<String, Refused>>);

#[derive(Clone, Copy, Debug)]
struct Refused {
    /// When it last refused.
    at: Instant,
    /// When a result last began to probe it, after its time was over.
    probed: Option<Instant>,
    /// It refused nothing, and confirms nothing: so many results are under way.
    slow: Option<usize>,
}

impl Refusals {
    /// Whether a result may be published to this address. After its time that is said to one of those that ask.
    pub(super) fn may_try(&self, address: &str) -> Try {
        let mut known = self.lock();
        let Some(refused) = known.get_mut(address) else { return Try::Usual };
        // A probe whose end nobody reported, as its job was killed, is forgotten in its turn.
        let since = refused.probed.unwrap_or(refused.at);
        if since.elapsed() >= AVOIDED {
            refused.probed = Some(Instant::now());
            return Try::Usual;
        }
        match &mut refused.slow {
            Some(unconfirmed) if *unconfirmed < UNCONFIRMED => {
                *unconfirmed += 1;
                Try::Unawaited
            }
            _ => Try::Not,
        }
    }

    /// It has not confirmed a result so far, though others were.
    pub(super) fn slow(&self, address: &str) {
        self.insert(address, Refused { at: Instant::now(), probed: None, slow: Some(0) });
    }

    /// One that was not waited for has no confirm, and will have none.
    pub(super) fn given_up(&self, address: &str) {
        if let Some(Refused { slow: Some(unconfirmed), .. }) = self.lock().get_mut(address) {
            *unconfirmed = unconfirmed.saturating_sub(1);
        }
    }

    /// Whether it refused lately; asking does not probe.
    pub(super) fn has_refused(&self, address: &str) -> bool {
        self.lock().contains_key(address)
    }

    /// It took nothing just now.
    pub(super) fn refused(&self, address: &str) {
        self.insert(address, Refused { at: Instant::now(), probed: None, slow: None });
    }

    fn insert(&self, address: &str, refused: Refused) {
        let mut known = self.lock();
        if known.len() >= MOST && !known.contains_key(address) {
            let oldest = known.iter().min_by_key(|(_, refused)| refused.at).map(|(name, _)| name.clone());
            oldest.and_then(|oldest| known.remove(&oldest));
        }
        known.insert(address.to_owned(), refused);
    }

    /// The same for an address that is known already, and nothing for any other.
    pub(super) fn refused_again(&self, address: &str) {
        if let Some(refused) = self.lock().get_mut(address) {
            *refused = Refused { at: Instant::now(), probed: None, slow: refused.slow };
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
        assert_eq!(refusals.may_try("evil"), Try::Usual);
        refusals.refused("evil");
        assert_eq!([refusals.may_try("evil"), refusals.may_try("other")], [Try::Not, Try::Usual]);
        tokio::time::advance(AVOIDED).await;
        assert_eq!(refusals.may_try("evil"), Try::Usual, "one probes it");
        assert_eq!(refusals.may_try("evil"), Try::Not, "and no other meanwhile");
        refusals.refused("evil");
        tokio::time::advance(AVOIDED).await;
        assert_eq!(refusals.may_try("evil"), Try::Usual);
        tokio::time::advance(AVOIDED).await;
        assert_eq!(refusals.may_try("evil"), Try::Usual, "the first probe came to no end");
        refusals.forget("evil");
        assert_eq!([refusals.may_try("evil"), refusals.may_try("evil")], [Try::Usual; 2]);
        refusals.refused_again("evil");
        assert!(!refusals.has_refused("evil"), "it was not known");
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_address_gets_its_results_as_well_up_to_a_bound() {
        let refusals = Refusals::default();
        refusals.slow("slow");
        let tries: Vec<Try> = (0..=UNCONFIRMED).map(|_| refusals.may_try("slow")).collect();
        assert!(tries[..UNCONFIRMED].iter().all(|one| *one == Try::Unawaited));
        assert_eq!(tries[UNCONFIRMED], Try::Not);
        refusals.given_up("slow");
        assert_eq!([refusals.may_try("slow"), refusals.may_try("slow")], [Try::Unawaited, Try::Not]);
        refusals.forget("slow");
        assert_eq!(refusals.may_try("slow"), Try::Usual);
        tokio::time::advance(AVOIDED).await;
        refusals.slow("slow");
        tokio::time::advance(AVOIDED).await;
        assert_eq!(refusals.may_try("slow"), Try::Usual, "and is waited for after its time");
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_are_remembered_than_a_bound_and_the_oldest_goes_first() {
        let refusals = Refusals::default();
        for at in 0..=MOST {
            refusals.refused(&at.to_string());
            tokio::time::advance(Duration::from_millis(1)).await;
        }
        assert_eq!(refusals.lock().len(), MOST);
        assert_eq!([refusals.may_try("0"), refusals.may_try("1")], [Try::Usual, Try::Not]);
    }
}
