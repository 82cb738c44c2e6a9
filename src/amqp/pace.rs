//! How long a confirm for a stranger's address may take.
//!
//! A delivery keeps its place in the prefetch until its result is confirmed. As long as few wait longer than is usual,
//! the others have room, and a slow queue gets its time. Where more do than there are places to spare, they keep other
//! jobs from the worker, and none of them is waited for any longer.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use crate::amqp::connection::link::Link;

/// So many times what a confirm usually takes is late.
const LATE: u32 = 10;

/// How often it is asked whether a late confirm keeps others waiting.
const LOOK: Duration = Duration::from_millis(10);

/// What confirms usually take, and how many are late.
#[derive(Debug)]
pub(super) struct Pace {
    /// Places beyond those of the slots.
    spare: usize,
    late: AtomicUsize,
    /// In microseconds, as a moving average.
    usual: AtomicU64,
}

/// One that is late, until it is dropped.
struct Late<'a>(&'a AtomicUsize);

impl<'a> Late<'a> {
    fn new(late: &'a AtomicUsize) -> Self {
        late.fetch_add(1, Ordering::Relaxed);
        Self(late)
    }
}

impl Drop for Late<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Pace {
    pub(super) fn new(spare: usize) -> Self {
        Self { spare, late: AtomicUsize::default(), usual: AtomicU64::default() }
    }

    /// A confirm came after so long.
    pub(super) fn confirmed(&self, took: Duration) {
        let took = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let usual = self.usual.load(Ordering::Relaxed);
        // Two that write at one time lose one of many figures.
        self.usual.store(usual - usual / 8 + took / 8, Ordering::Relaxed);
    }

    /// Ends when an answer of the broker's is not to be waited for any longer: after `longest`, or when it is late, at
    /// `least` after so long, and others wait or `enough` says so. While the broker blocks the connection no time
    /// passes: it owes us nothing then.
    pub(super) async fn late(
        &self,
        link: &Link,
        least: Duration,
        longest: Duration,
        enough: impl Fn() -> bool,
    ) {
        let usual = Duration::from_micros(self.usual.load(Ordering::Relaxed));
        // Ten times the usual where that is worth waiting for, and else in proportion.
        let patience = (usual * LATE).min(5 * least).max(least).min(longest);
        let mut waited = wait(link, patience).await;
        let _late = Late::new(&self.late);
        while waited < longest && !enough() && self.late.load(Ordering::Relaxed) <= self.spare {
            waited += wait(link, LOOK.min(longest - waited)).await;
        }
    }
}

/// Lets so much time pass in which the broker takes messages.
async fn wait(link: &Link, time: Duration) -> Duration {
    let mut blocked = link.blocked();
    loop {
        // Gone with its connection, which its user sees.
        let _ = blocked.wait_for(|blocked| !blocked).await;
        tokio::time::sleep(time).await;
        if !*blocked.borrow() {
            return time;
        }
    }
}
