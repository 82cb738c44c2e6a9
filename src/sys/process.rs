//! A child process: killed and waited for by its pidfd, so that a reused pid is never meant.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::time::TimeValLike;

/// A child of this process. Dropped before it was collected, it is killed, and collected by a thread of its
/// own: one zombie keeps every pid namespace around it alive.
#[derive(Debug)]
pub struct Child {
    pidfd: OwnedFd,
    collected: AtomicBool,
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

/// `struct pidfd_info` of `linux/pidfd.h`, as long as in its first version.
#[repr(C)]
#[derive(Default)]
struct PidfdInfo {
    /// What is asked for, and then what is told.
    mask: u64,
    cgroup: u64,
    pid: u32,
    /// More ids, and the exit code.
    rest: [u32; 11],
}

/// `_IOWR(0xff, 11, struct pidfd_info)`
const PIDFD_GET_INFO: libc::Ioctl = 0xc040_ff0b_u32 as libc::Ioctl;
const PIDFD_INFO_PID: u64 = 1;

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
        Ok(Self::from_pidfd(unsafe { OwnedFd::from_raw_fd(number) }))
    }

    /// Takes over a child of this process that another made for it, by the pidfd that it sent.
    pub fn from_pidfd(pidfd: OwnedFd) -> Self {
        Self { pidfd, collected: AtomicBool::new(false) }
    }

    /// Sends SIGKILL. A child that is gone already is fine.
    pub fn kill(&self) {
        let no_info = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: without an info structure the call takes numbers.
        let _ = unsafe {
            libc::syscall(libc::SYS_pidfd_send_signal, self.pidfd.as_raw_fd(), libc::SIGKILL, no_info, 0)
        };
    }

    /// Its number; none once it was collected.
    pub fn pid(&self) -> Option<i32> {
        // Before Linux 6.13 only a file tells, at four times the system calls.
        self.pid_by_ioctl().or_else(|| self.pid_by_file())
    }

    fn pid_by_ioctl(&self) -> Option<i32> {
        let mut info = PidfdInfo { mask: PIDFD_INFO_PID, ..PidfdInfo::default() };
        // SAFETY: the structure is live, and as long as the number of the request says.
        let done = unsafe { libc::ioctl(self.pidfd.as_raw_fd(), PIDFD_GET_INFO, &raw mut info) };
        let told = done == 0 && info.mask & PIDFD_INFO_PID != 0 && info.pid > 0;
        told.then(|| i32::try_from(info.pid).ok())?
    }

    fn pid_by_file(&self) -> Option<i32> {
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", self.pidfd.as_raw_fd())).ok()?;
        let pid = info.lines().find_map(|line| line.strip_prefix("Pid:"))?.trim().parse().ok()?;
        (pid > 0).then_some(pid)
    }

    /// CPU time of the child itself so far, all its threads together; none once it has ended.
    pub fn cpu_time(&self) -> Option<Duration> {
        let pid = self.pid()?;
        let clock = nix::time::clock_getcpuclockid(nix::unistd::Pid::from_raw(pid)).ok()?;
        let time = nix::time::clock_gettime(clock).ok()?;
        Some(Duration::from_nanos(time.num_nanoseconds().cast_unsigned()))
    }

    /// Waits for a child that is about to end, on this thread.
    pub fn wait(&self) -> io::Result<(Exit, Resources)> {
        loop {
            match poll(&mut [PollFd::new(self.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            if let Some(ended) = self.try_wait()? {
                return Ok(ended);
            }
        }
    }

    /// Collects the child where it has ended; `None` where it still runs.
    pub fn try_wait(&self) -> io::Result<Option<(Exit, Resources)>> {
        // SAFETY: both are plain numbers: all zero is a value of each.
        let (mut info, mut usage): (libc::siginfo_t, libc::rusage) = unsafe { std::mem::zeroed() };
        // SAFETY: both structures are live and writable. The raw call also tells what was used, which libc's
        // does not.
        let waited = unsafe {
            libc::syscall(
                libc::SYS_waitid,
                libc::P_PIDFD,
                self.pidfd.as_raw_fd(),
                &raw mut info,
                libc::WEXITED | libc::WNOHANG,
                &raw mut usage,
            )
        };
        if waited < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: after a successful wait the structure has the layout for a child, or is still zero.
        let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
        if pid == 0 {
            return Ok(None);
        }
        self.collected.store(true, Ordering::Relaxed);
        let exit = if info.si_code == libc::CLD_EXITED { Exit::Code(status) } else { Exit::Signal(status) };
        Ok(Some((exit, Resources::from(&usage))))
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if *self.collected.get_mut() {
            return;
        }
        self.kill();
        if matches!(self.try_wait(), Ok(None))
            && let Ok(pidfd) = self.pidfd.try_clone()
        {
            // Where no thread can be had there are worse things than a zombie.
            let _ = std::thread::Builder::new().name("collect".into()).spawn(move || {
                let child = Self { pidfd, collected: AtomicBool::new(true) };
                let _ = child.wait();
            });
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

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::zombie_processes, reason = "it is collected by its pidfd")]
    fn a_child_has_a_number_until_it_was_collected() {
        const { assert!(size_of::<PidfdInfo>() == 64) };
        let spawned =
            std::process::Command::new("/bin/cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let number = i32::try_from(spawned.id()).unwrap();
        let child = Child::adopt(number).unwrap();
        assert_eq!((child.pid(), child.pid_by_file()), (Some(number), Some(number)));
        drop(spawned.stdin);
        assert_eq!(child.wait().unwrap().0, Exit::Code(0));
        assert_eq!(child.pid(), None);
    }
}
