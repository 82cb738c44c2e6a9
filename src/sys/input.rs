//! Waiting for a descriptor without reading from it.

use std::os::fd::AsFd;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Whether a read from `fd` would return at once, with bytes or with the end, before `patience` is over.
pub fn readable_within(fd: &impl AsFd, patience: Duration) -> std::io::Result<bool> {
    let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
    let mut watched = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    Ok(poll(&mut watched, timeout)? > 0)
}
