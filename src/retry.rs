//! How long to wait before the next attempt: exponential, jittered, capped, for ever.
//!
//! The only place that names the back-off crate, which works but is no longer maintained. Waiting itself, and
//! giving up where somebody must, are left to the callers.

use std::time::Duration;

use backoff::ExponentialBackoff;
use backoff::backoff::Backoff;

/// Delays that grow from one attempt to the next.
#[derive(Debug)]
pub struct Delays {
    schedule: ExponentialBackoff,
    longest: Duration,
}

impl Delays {
    /// Delays from about `first` up to `longest`, each off by up to half so that many workers that lost one
    /// broker do not come back in step.
    pub fn new(first: Duration, longest: Duration) -> Self {
        let first = first.min(longest);
        let schedule = ExponentialBackoff {
            initial_interval: first,
            current_interval: first,
            multiplier: 2.0,
            randomization_factor: 0.5,
            max_interval: longest,
            max_elapsed_time: None,
            ..ExponentialBackoff::default()
        };
        Self { schedule, longest }
    }

    /// The next delay; never more than the longest.
    pub fn next_delay(&mut self) -> Duration {
        // It ends only by an elapsed-time limit, and none is set.
        self.schedule.next_backoff().unwrap_or(self.longest).min(self.longest)
    }

    /// Starts over, after something worked.
    pub fn reset(&mut self) {
        self.schedule.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_to_the_longest_and_never_end() {
        let longest = Duration::from_secs(2);
        let mut delays = Delays::new(Duration::from_millis(100), longest);
        let first = delays.next_delay();
        assert!(first >= Duration::from_millis(50) && first <= Duration::from_millis(151), "{first:?}");
        for _ in 0..10_000 {
            assert!(delays.next_delay() <= longest);
        }
        assert!(delays.next_delay() >= longest / 2);
        delays.reset();
        assert!(delays.next_delay() <= Duration::from_millis(151));
    }

    #[test]
    fn delays_are_jittered() {
        let delays: Vec<_> = (0..20)
            .map(|_| Delays::new(Duration::from_secs(1), Duration::from_secs(9)).next_delay())
            .collect();
        assert!(delays.iter().any(|delay| *delay != delays[0]));
    }
}
