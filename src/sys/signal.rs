//! Signals by name, and sent to a process that cannot be mistaken.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::str::FromStr;

use nix::errno::Errno;
use nix::sys::signal::Signal;

/// The number behind `SIGSEGV` or `SIGRTMIN+3`, where there is such a signal.
pub fn number(name: &str) -> Option<i32> {
    if let Some(real_time) = name.strip_prefix("SIGRTMIN") {
        let offset: i32 = if real_time.is_empty() { 0 } else { real_time.parse().ok()? };
        let number = libc::SIGRTMIN().checked_add(offset)?;
        return (libc::SIGRTMIN()..=libc::SIGRTMAX()).contains(&number).then_some(number);
    }
    Signal::from_str(name).ok().map(|signal| signal as i32)
}

/// A process by descriptor, so that a kill never meets a stranger under the same id.
#[derive(Debug)]
pub struct Process(OwnedFd);

impl Process {
    /// A child that was not waited for yet.
    pub fn of(child: &std::process::Child) -> std::io::Result<Self> {
        // SAFETY: two integers go in, a new descriptor or an error comes out.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, child.id(), 0) };
        let fd = i32::try_from(Errno::result(fd)?).map_err(std::io::Error::other)?;
        // SAFETY: the kernel just made this descriptor for us, and nobody else knows it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Kills it.
    pub fn kill(&self) -> std::io::Result<()> {
        let none = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: a null siginfo is allowed; the descriptor is ours and open.
        let sent =
            unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.0.as_raw_fd(), libc::SIGKILL, none, 0) };
        Ok(Errno::result(sent).map(drop)?)
    }
}
