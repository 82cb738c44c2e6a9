//! Descriptors that tokio tells the readiness of.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::notify::Listener;
use super::process::Child;

/// A type that owns one open descriptor, the same one for its whole life. Only this module says which do.
pub trait Owner: AsRawFd + sealed::Sealed {}

mod sealed {
    pub trait Sealed {}
}

macro_rules! owners {
    ($($owner:ty),+) => { $(impl sealed::Sealed for $owner {} impl Owner for $owner {})+ };
}

owners!(OwnedFd, File, Child, Listener);

/// To be woken when it can be read.
pub fn readable<T: Owner>(owner: T) -> io::Result<AsyncFd<T>> {
    register(owner, Interest::READABLE)
}

/// To be woken when it can be written.
pub fn writable<T: Owner>(owner: T) -> io::Result<AsyncFd<T>> {
    register(owner, Interest::WRITABLE)
}

fn register<T: Owner>(owner: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    // SAFETY: an owner names one descriptor that stays open until it is dropped, and `AsyncFd` drops it after
    // it has taken the descriptor out of the poller.
    Ok(unsafe { AsyncFd::register_with_interest(owner, interest) }?)
}
