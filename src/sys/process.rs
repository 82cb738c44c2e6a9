//! A child process: killed and waited for by its pidfd, so that a reused pid is never meant.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::sys::time::TimeValLike;

/// A child that has not been waited for yet.
#[derive(Debug)]
pub struct Child {
    pid: libc::pid_t,
    pidfd: OwnedFd,
}

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It exited with this code.
    Code(i32),
    /// It died of this signal.
    Signal(i32),
}

/// What a child and the children that it waited for have used.
#[derive(Clone, Copy, Debug, Default)]
pub struct Resources {
    /// CPU time in user mode.
    pub user: Duration,
    /// CPU time in the kernel.
    pub system: Duration,
    /// The largest resident set of one process, in bytes.
    pub peak_resident: u64,
}

impl Child {
    /// Takes over a child of this process, by its number.
    ///
    /// The number still means that child: it stays a zombie until it is waited for, and only this does.
    pub(super) fn adopt(pid: libc::pid_t) -> io::Result<Self> {
        // SAFETY: the call takes numbers.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let number = RawFd::try_from(fd).unwrap_or(-1);
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call has just made this descriptor, and nobody else knows of it.
        Ok(Self { pid, pidfd: unsafe { OwnedFd::from_raw_fd(number) } })
    }

    /// Sends SIGKILL. A child that is gone already is fine.
    pub fn kill(&self) {
        let no_info = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: without an info structure the call takes numbers.
        let _ = unsafe {
            libc::syscall(libc::SYS_pidfd_send_signal, self.pidfd.as_raw_fd(), libc::SIGKILL, no_info, 0)
        };
    }

    /// Lowers how many descriptors the child may have open.
    pub fn limit_open_files(&self, count: u64) -> io::Result<()> {
        let limit = libc::rlimit64 { rlim_cur: count, rlim_max: count };
        // SAFETY: the structure outlives the call, which only reads it; the old limit is not asked for.
        let result =
            unsafe { libc::prlimit64(self.pid, libc::RLIMIT_NOFILE, &raw const limit, std::ptr::null_mut()) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// CPU time of the child itself so far, all its threads together; none once it has ended.
    pub fn cpu_time(&self) -> Option<Duration> {
        let pid = nix::unistd::Pid::from_raw(self.pid);
        let clock = nix::time::clock_getcpuclockid(pid).ok()?;
        let time = nix::time::clock_gettime(clock).ok()?;
        Some(Duration::from_nanos(time.num_nanoseconds().cast_unsigned()))
    }

    /// Collects the child where it has ended; `None` where it still runs.
    pub fn try_wait(&self) -> io::Result<Option<(Exit, Resources)>> {
        let mut status = 0;
        // SAFETY: `rusage` is plain numbers: all zero is a value of it.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: both structures are live and writable.
        let waited = unsafe { libc::wait4(self.pid, &raw mut status, libc::WNOHANG, &raw mut usage) };
        match waited {
            0 => Ok(None),
            pid if pid == self.pid => {
                let exit = if libc::WIFSIGNALED(status) {
                    Exit::Signal(libc::WTERMSIG(status))
                } else {
                    Exit::Code(libc::WEXITSTATUS(status))
                };
                Ok(Some((exit, Resources::from(&usage))))
            }
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl AsFd for Child {
    /// Readable when the child has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl AsRawFd for Child {
    fn as_raw_fd(&self) -> RawFd {
        self.pidfd.as_raw_fd()
    }
}

impl From<&libc::rusage> for Resources {
    fn from(usage: &libc::rusage) -> Self {
        let duration = |time: libc::timeval| {
            Duration::from_secs(time.tv_sec.cast_unsigned())
                + Duration::from_micros(time.tv_usec.cast_unsigned())
        };
        Self {
            user: duration(usage.ru_utime),
            system: duration(usage.ru_stime),
            // Linux counts it in KiB.
            peak_resident: usage.ru_maxrss.cast_unsigned().saturating_mul(1024),
        }
    }
}
