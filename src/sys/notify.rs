//! The kernel's questions about system calls: seccomp user notification, from the supervisor's side.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// The listener of one job's filter.
#[derive(Debug)]
pub struct Listener(OwnedFd);

/// A call that waits for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Notification {
    id: u64,
    /// `AUDIT_ARCH_*` of the way by which the call came.
    pub arch: u32,
    /// The call's number, in that architecture's table.
    pub number: i32,
    /// Its arguments as register values. What a pointer among them leads to can change at any time and is never
    /// looked at.
    pub arguments: [u64; 6],
}

impl Listener {
    /// Takes over a descriptor that a job sent. Whether it is a listener shows at the first question.
    pub fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// The next question, without waiting.
    ///
    /// # Errors
    /// `WouldBlock` where there is none; `NotFound` where the one there was has died with its process;
    /// `BrokenPipe` where nobody is left to ask.
    pub fn receive(&self) -> io::Result<Notification> {
        // The receiving call itself always waits, so look first. One reader: nobody takes it in between.
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO)?;
        let events = fds[0].revents().unwrap_or(PollFlags::empty());
        if !events.contains(PollFlags::POLLIN) {
            let over = events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR);
            return Err(if over { io::ErrorKind::BrokenPipe } else { io::ErrorKind::WouldBlock }.into());
        }
        // SAFETY: `seccomp_notif` is plain numbers, and the kernel wants it zeroed.
        let mut question: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the structure is live, writable and of the size that the request's number names.
        let received =
            unsafe { libc::ioctl(self.0.as_raw_fd(), SECCOMP_IOCTL_NOTIF_RECV, &raw mut question) };
        if received < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Notification {
            id: question.id,
            arch: question.data.arch,
            number: question.data.nr,
            arguments: question.data.args,
        })
    }

    /// Answers with an errno. A process that died meanwhile needs no answer.
    pub fn refuse(&self, question: Notification, errno: i32) {
        // Nobody is left to be told of an error.
        drop(self.answer(question, -errno.abs(), 0));
    }

    /// Lets the call happen. Whoever calls this holds nothing back: the arguments that were looked at may be others
    /// by the time the kernel reads them, so no verdict on a job may ever end here. For tracing alone.
    pub fn let_through(&self, question: Notification) {
        let answered = self.answer(question, 0, CONTINUE);
        // Linux 5.0 to 5.4 have listeners, but no such answer.
        if answered.is_err_and(|error| error.raw_os_error() == Some(libc::EINVAL)) {
            self.refuse(question, libc::ENOSYS);
        }
    }

    fn answer(&self, question: Notification, error: i32, flags: u32) -> io::Result<()> {
        let mut answer = libc::seccomp_notif_resp { id: question.id, val: 0, error, flags };
        // SAFETY: the structure is live and of the size that the request's number names.
        let sent = unsafe { libc::ioctl(self.0.as_raw_fd(), SECCOMP_IOCTL_NOTIF_SEND, &raw mut answer) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// `_IOWR('!', number, type)`, as `linux/seccomp.h` builds its requests.
const fn request(number: u64, size: usize) -> u64 {
    const READ_AND_WRITE: u64 = 3;
    (READ_AND_WRITE << 30) | ((size as u64) << 16) | ((b'!' as u64) << 8) | number
}

/// `SECCOMP_USER_NOTIF_FLAG_CONTINUE`, with the width that the answer's field has.
const CONTINUE: u32 = 1;
const SECCOMP_IOCTL_NOTIF_RECV: u64 = request(0, size_of::<libc::seccomp_notif>());
const SECCOMP_IOCTL_NOTIF_SEND: u64 = request(1, size_of::<libc::seccomp_notif_resp>());
