//! User namespaces with chosen maps, made once and joined by every job that runs in them.

use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};

use super::fd;
use super::launch::{Kept, end, fork, wait_and_end};
use super::process::Child;

/// A run of ids inside, and the host's ids behind them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// As the namespace's processes see it.
    pub inside: u32,
    /// As everyone else does.
    pub outside: u32,
    /// How many, one after the other.
    pub count: u32,
}

/// Makes a user namespace in which exactly these ids exist, as uids and as gids.
///
/// Needs CAP_SETUID and CAP_SETGID. The namespace lives as long as the descriptor.
pub fn make(mappings: &[Mapping]) -> io::Result<OwnedFd> {
    let map: String = mappings
        .iter()
        .map(|mapping| format!("{} {} {}\n", mapping.inside, mapping.outside, mapping.count))
        .collect();
    let (hold, release) = fd::pipe()?;
    let kept = Kept::only(&[hold.as_raw_fd()]);
    // SAFETY: the child only makes system calls on prepared memory, and never returns.
    let (holder, pid) = match unsafe { fork(libc::CLONE_NEWUSER) }? {
        // Holds the namespace until its maps are written and it has been opened.
        0 if kept.close_others().is_err() => end(1),
        0 => wait_and_end(&hold),
        pid => (Child::adopt(pid)?, pid),
    };
    let directory = format!("/proc/{pid}");
    for name in ["uid_map", "gid_map"] {
        // The kernel takes a map in one write.
        fs::OpenOptions::new().write(true).open(format!("{directory}/{name}"))?.write_all(map.as_bytes())?;
    }
    let namespace = fs::File::open(format!("{directory}/ns/user"))?;
    drop(release);
    holder.wait()?;
    Ok(namespace.into())
}
