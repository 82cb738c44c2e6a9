//! Who a job is: one seat a slot, each with its own uid and gid, handed from job to job.
//!
//! A worker that may choose uids gives every seat one of its own and a user namespace around it, in which that
//! uid is [`INSIDE`] and init's is 0; on the host both are nobody. An ordinary user has only its own uid: each
//! of its jobs makes a user namespace for itself.

pub(super) mod uid_claim;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::sandbox::cgroup::Cgroup;
use crate::sandbox::error::StartError;
use crate::sandbox::host::Privilege;
use crate::sandbox::outer_wall::{INSIDE, trials};
use crate::sys::userns::{self, Mapping};

/// Insists that a worker that may choose ids has those from `first` on, so many: in a container with a user
/// namespace of its own there are only the ones that were mapped into it.
pub(super) fn range_exists(first: u32, count: u32) -> Result<(), StartError> {
    let last = first.saturating_add(count);
    for path in ["/proc/self/uid_map", "/proc/self/gid_map"] {
        // Where the map cannot be read, the first attempt to use the ids has to tell.
        let Ok(map) = std::fs::read_to_string(path) else { continue };
        if !covers(&map, first, last) {
            return Err(StartError::Ids { first, last, path });
        }
    }
    Ok(())
}

/// One line of a uid or gid map has all of these ids.
fn covers(map: &str, first: u32, last: u32) -> bool {
    map.lines().any(|line| {
        let mut numbers = line.split_ascii_whitespace().map(str::parse::<u64>);
        let (Some(Ok(inside)), Some(Ok(_)), Some(Ok(count))) =
            (numbers.next(), numbers.next(), numbers.next())
        else {
            return false;
        };
        inside <= first.into() && u64::from(last) < inside.saturating_add(count)
    })
}

/// One job's identity while it runs.
#[derive(Debug)]
pub(super) struct Identity {
    /// The job's uid and gid on the host.
    pub(super) outside: u32,
    /// Init's, and that of nobody else.
    pub(super) init_outside: u32,
    /// The user namespace to join; none where the job makes its own, or where there are none.
    pub(super) namespace: Option<OwnedFd>,
    /// What limits all of the job's processes together; none where there are no control groups.
    pub(super) group: Option<Cgroup>,
}

impl Identity {
    /// The uid and gid that a job sees that a zygote started: all jobs of a zygote share its namespace.
    pub(super) fn inside_warm(&self, privilege: Privilege) -> u32 {
        match privilege {
            Privilege::Full => INSIDE + (self.outside - self.init_outside - 1),
            Privilege::None => INSIDE,
        }
    }

    /// Whom the worker has to give what is to be the job's; none where that is itself.
    pub(super) fn owner(&self, privilege: Privilege) -> Option<u32> {
        (privilege == Privilege::Full).then_some(self.outside)
    }

    /// The uid and gid that the job sees.
    pub(super) fn inside(&self, privilege: Privilege) -> u32 {
        match (privilege, &self.namespace) {
            (Privilege::Full, None) => self.outside,
            _ => INSIDE,
        }
    }
}

/// All seats.
#[derive(Debug)]
pub(super) struct IdentityPool {
    free: Mutex<Vec<Identity>>,
    count: Arc<Semaphore>,
}

/// A seat on loan; it returns by itself.
#[derive(Debug)]
pub(super) struct IdentityLease {
    seat: Option<Identity>,
    seats: Arc<IdentityPool>,
    _permit: OwnedSemaphorePermit,
}

impl IdentityPool {
    /// Prepares one seat for every job that may run at one time.
    pub(super) fn prepare(
        count: usize,
        privilege: Privilege,
        uid_base: u32,
        groups: Vec<Cgroup>,
    ) -> Arc<Self> {
        let mut groups = groups.into_iter();
        let seats = (0..count).map(|at| {
            let group = groups.next();
            // The first id of the range is that of every init; each is alone in its own namespaces.
            let number = u32::try_from(at).unwrap_or(u32::MAX).saturating_add(1);
            match privilege {
                Privilege::Full => {
                    let outside = uid_base.saturating_add(number);
                    let mappings = [
                        Mapping { inside: 0, outside: uid_base, count: 1 },
                        Mapping { inside: INSIDE, outside, count: 1 },
                    ];
                    let namespace = userns::make(&mappings)
                        .inspect_err(|error| {
                            tracing::warn!(%error, "jobs run without a user namespace: it cannot be made");
                        })
                        .inspect(|namespace| trials::limit_watches(namespace.as_fd()))
                        .ok();
                    Identity { outside, init_outside: uid_base, namespace, group }
                }
                Privilege::None => {
                    let own = nix::unistd::getuid().as_raw();
                    Identity { outside: own, init_outside: own, namespace: None, group }
                }
            }
        });
        Arc::new(Self { free: Mutex::new(seats.collect()), count: Arc::new(Semaphore::new(count)) })
    }

    /// A seat, where one is free.
    pub(super) fn try_take(self: &Arc<Self>) -> Option<IdentityLease> {
        let permit = Arc::clone(&self.count).try_acquire_owned().ok()?;
        self.lease(permit)
    }

    /// Waits for a free seat.
    pub(super) async fn take(self: &Arc<Self>) -> Option<IdentityLease> {
        let permit = Arc::clone(&self.count).acquire_owned().await.ok()?;
        self.lease(permit)
    }

    fn lease(self: &Arc<Self>, permit: OwnedSemaphorePermit) -> Option<IdentityLease> {
        let seat = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop()?;
        Some(IdentityLease { seat: Some(seat), seats: Arc::clone(self), _permit: permit })
    }
}

impl std::ops::Deref for IdentityLease {
    type Target = Identity;

    fn deref(&self) -> &Identity {
        self.seat.as_ref().expect("a lease has its seat until it is dropped")
    }
}

impl std::ops::DerefMut for IdentityLease {
    fn deref_mut(&mut self) -> &mut Identity {
        self.seat.as_mut().expect("a lease has its seat until it is dropped")
    }
}

impl Drop for IdentityLease {
    fn drop(&mut self) {
        self.seats.free.lock().unwrap_or_else(PoisonError::into_inner).extend(self.seat.take());
    }
}

#[cfg(test)]
mod tests {
    use super::covers;

    #[test]
    fn a_range_lies_within_one_line_of_a_map() {
        let host = "         0          0 4294967295\n";
        let pod = "         0    1000000      65536\n";
        assert!(covers(host, 2_000_000, 2_000_130));
        assert!(covers(pod, 20_000, 65_535));
        assert!(!covers(pod, 20_000, 65_536));
        assert!(!covers(pod, 2_000_000, 2_000_004));
        assert!(covers("0 0 1\n100000 100000 65536\n", 100_000, 100_004));
        assert!(!covers("0 0 1\n", 0, 1));
        assert!(!covers("", 0, 0));
    }
}
