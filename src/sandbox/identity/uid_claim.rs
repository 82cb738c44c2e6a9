//! Tells where two workers of one machine give their jobs the same uids.
//!
//! Such jobs are apart all the same: each worker has user, pid and mount namespaces of its own, and most limits are
//! counted within those. But some things the kernel counts for a uid of the host, whatever the namespace:
//! descriptors under way in sockets, memory of pipes, descriptors that an epoll watches. There one worker's jobs feel
//! those of the other.
//!
//! A uid is claimed by a name in the abstract socket namespace, which goes when the process does. Workers that do not
//! share a network namespace do not see each other's claims, and anybody can make one: so this warns and refuses
//! nothing.

use std::io::ErrorKind;
use std::ops::Range;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// The uids that are claimed for as long as this lives.
#[derive(Debug)]
pub(in crate::sandbox) struct UidRangeClaim(
    #[expect(dead_code, reason = "open sockets are what a claim is")] Vec<UnixDatagram>,
);

impl UidRangeClaim {
    pub(in crate::sandbox) fn acquire(uids: Range<u32>) -> Self {
        let mut held = Vec::new();
        let mut taken = Vec::new();
        for uid in uids {
            let name = format!("sandpiper-uid-{uid}");
            match SocketAddr::from_abstract_name(name).and_then(|name| UnixDatagram::bind_addr(&name)) {
                Ok(socket) => held.push(socket),
                Err(error) if error.kind() == ErrorKind::AddrInUse => taken.push(uid),
                Err(error) => tracing::debug!(uid, %error, "a uid could not be claimed"),
            }
        }
        if let Some(first) = taken.first() {
            tracing::warn!(
                first,
                count = taken.len(),
                "another worker on this machine gives its jobs the same uids, and some limits of the kernel hold for \
                 both together: give each worker a sandbox.uid_base of its own"
            );
        }
        Self(held)
    }
}
