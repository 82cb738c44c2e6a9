//! The inner wall, raised from inside python after the imports and before any code of the job arrives.
//!
//! Identity, capabilities and `no_new_privs` are dropped where that is still to be done, and verified; then the
//! filter goes on and its listener is sent to the worker. The worker hands over the code only when that has
//! arrived, so a process that comes here another way gets nothing to run.

use core::ffi::c_int;

use crate::abi::{
    CONTROL_FD, MAX_INSTRUCTIONS, POLICY_FD, POLICY_HEADER_LEN, POLICY_MAGIC, PolicyHeader, Report, Stage,
    WORK_FD,
};
use crate::report;
use crate::sys::{self, Errno};
use crate::wall;

/// The steps of the lockdown, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum LockdownStep {
    /// Groups, gid and uid.
    Identity = 1,
    /// The capability sets.
    Capabilities = 2,
    /// `no_new_privs`.
    NoNewPrivileges = 3,
    /// Mapping and reading the compiled policy.
    Policy = 4,
    /// Installing the filter.
    Filter = 5,
    /// Sending the report with its descriptors to the worker.
    Report = 6,
    /// Limiting what can be executed.
    Programs = 7,
}

impl LockdownStep {
    /// A name for messages, from the number in a report.
    #[must_use]
    pub fn name(number: u32) -> &'static str {
        match number {
            1 => "drop groups, gid and uid",
            2 => "drop capabilities",
            3 => "set no_new_privs",
            4 => "read policy",
            5 => "install filter",
            6 => "send report",
            7 => "limit programs",
            _ => "unknown step",
        }
    }
}

/// Locks the calling process down, and tells the worker how that ended.
///
/// # Errors
/// The step that failed, and its errno. The caller must end the process.
pub fn lockdown(uid: u32, gid: u32, enable_network: bool) -> Result<(), (LockdownStep, Errno)> {
    let result = lock(uid, gid, enable_network);
    if let Err((step, errno)) = result {
        let report = Report::Failed { stage: Stage::Lockdown, step: step as u32, errno };
        // Where even this fails, the worker sees the process end without a report.
        let _ = report::send(CONTROL_FD, report, &[]);
    }
    result
}

fn lock(uid: u32, gid: u32, enable_network: bool) -> Result<(), (LockdownStep, Errno)> {
    let at = |step| move |errno| (step, errno);
    let policy = Policy::map().map_err(at(LockdownStep::Policy))?;
    if policy.header.network != u32::from(enable_network) {
        return Err((LockdownStep::Policy, libc::EINVAL));
    }

    drop_identity(uid, gid, policy.header.keeps_groups != 0).map_err(at(LockdownStep::Identity))?;
    drop_capabilities().map_err(at(LockdownStep::Capabilities))?;
    sys::set_no_new_privileges().map_err(at(LockdownStep::NoNewPrivileges))?;
    // Python itself has been started by now.
    let limits = policy.limits().map_err(at(LockdownStep::Policy))?;
    wall::raise(limits).map_err(|failure| (LockdownStep::Programs, failure.errno))?;
    let listener = policy.install().map_err(at(LockdownStep::Filter))?;

    let report = if listener.is_some() { Report::Locked } else { Report::LockedWithoutListener };
    // The filter is on: this is the first call that it lets through.
    let sent = with_room_to_send(|| match listener {
        Some(listener) => report::send(CONTROL_FD, report, &[listener, WORK_FD]),
        None => report::send(CONTROL_FD, report, &[WORK_FD]),
    });
    let sent = sent.map_err(at(LockdownStep::Report));
    if let Some(listener) = listener {
        sys::close(listener);
    }
    sys::close(POLICY_FD);
    sys::close(WORK_FD);
    sent
}

/// A cold process comes here with its final identity and only has it verified.
fn drop_identity(uid: u32, gid: u32, keeps_groups: bool) -> Result<(), Errno> {
    if uid == 0 || gid == 0 {
        return Err(libc::EINVAL);
    }
    let groups_dropped = keeps_groups || {
        // SAFETY: with size 0 the call only counts.
        let count = unsafe { sys::syscall(libc::SYS_getgroups, [0; 5]) }?;
        count == 0
    };
    if groups_dropped && sys::identity()? == ([uid; 3], [gid; 3]) {
        return Ok(());
    }
    sys::become_identity(uid, gid, keeps_groups)
}

fn drop_capabilities() -> Result<(), Errno> {
    if !sys::has_no_capabilities()? {
        sys::clear_capabilities()?;
    }
    if sys::has_no_capabilities()? { Ok(()) } else { Err(libc::EPERM) }
}

/// The compiled policy, mapped read-only for the rest of the process's life.
struct Policy {
    header: PolicyHeader,
    /// What follows the header.
    programs: &'static [u8],
}

impl Policy {
    fn map() -> Result<Self, Errno> {
        let size = size_of_file(POLICY_FD)?;
        if size < POLICY_HEADER_LEN {
            return Err(libc::EBADMSG);
        }
        // SAFETY: a new private mapping, nowhere in particular.
        let at = unsafe {
            libc::mmap(core::ptr::null_mut(), size, libc::PROT_READ, libc::MAP_PRIVATE, POLICY_FD, 0)
        };
        if at == libc::MAP_FAILED {
            return Err(sys::errno());
        }
        // SAFETY: `size` readable bytes that are never unmapped; the worker sealed the file, so that it neither
        // shrinks nor changes below the mapping.
        let bytes: &'static [u8] = unsafe { core::slice::from_raw_parts(at.cast(), size) };
        let (head, programs) = bytes.split_at(POLICY_HEADER_LEN);
        // SAFETY: the slice has the header's length, and every bit pattern is a header; a read without
        // alignment needs none.
        let header: PolicyHeader = unsafe { head.as_ptr().cast::<PolicyHeader>().read_unaligned() };
        if header.magic == POLICY_MAGIC { Ok(Self { header, programs }) } else { Err(libc::EBADMSG) }
    }

    /// The steps behind the programs, which limit what can be executed.
    fn limits(&self) -> Result<&'static [u8], Errno> {
        let mut rest = self.programs;
        for _ in 0..self.header.notifying.saturating_add(self.header.fallback) {
            next_program(&mut rest)?;
        }
        Ok(rest)
    }

    /// Installs the programs; the listener comes from the last one of those that ask for it.
    fn install(&self) -> Result<Option<c_int>, Errno> {
        let mut rest = self.programs;
        let mut listener = Err(libc::EBUSY);
        for remaining in (0..self.header.notifying).rev() {
            let program = next_program(&mut rest)?;
            if remaining == 0 {
                listener = install_with_listener(program);
            } else {
                sys::install_filter(program, 0)?;
            }
        }
        match listener {
            Ok(fd) => return Ok(Some(fd)),
            // Another listener is there already, as around some containers, or the kernel knows none.
            Err(libc::EBUSY | libc::EINVAL) => {}
            Err(errno) => return Err(errno),
        }
        if self.header.fallback == 0 {
            return Err(libc::EBUSY);
        }
        for _ in 0..self.header.fallback {
            sys::install_filter(next_program(&mut rest)?, 0)?;
        }
        Ok(None)
    }
}

fn next_program<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8], Errno> {
    let (count, after) = rest.split_first_chunk::<4>().ok_or(libc::EBADMSG)?;
    let count = u32::from_ne_bytes(*count) as usize;
    if count > MAX_INSTRUCTIONS {
        return Err(libc::E2BIG);
    }
    let (program, after) =
        after.split_at_checked(count * size_of::<libc::sock_filter>()).ok_or(libc::EBADMSG)?;
    *rest = after;
    Ok(program)
}

fn install_with_listener(program: &[u8]) -> Result<c_int, Errno> {
    const NEW_LISTENER: usize = 1 << 3;
    // From Linux 5.19: a signal does not make a call that the worker has already judged come a second time.
    const WAIT_KILLABLE: usize = 1 << 5;
    let listener = match sys::install_filter(program, NEW_LISTENER | WAIT_KILLABLE) {
        Err(libc::EINVAL) => sys::install_filter(program, NEW_LISTENER),
        other => other,
    }?;
    c_int::try_from(listener).map_err(|_| libc::EBADF)
}

fn size_of_file(fd: c_int) -> Result<usize, Errno> {
    // SAFETY: `stat` is plain numbers: all zero is a value of it.
    let mut stat: libc::stat = unsafe { core::mem::zeroed() };
    // SAFETY: the structure is live and writable.
    if unsafe { libc::fstat(fd, &raw mut stat) } != 0 {
        return Err(sys::errno());
    }
    usize::try_from(stat.st_size).map_err(|_| libc::EFBIG)
}

/// Nothing can be sent while descriptors of this user are under way in larger number than this process may have
/// open. Another job may be of the same user and flood its own sockets. So the wall leaves more room than any
/// job gets, and here it is taken away.
fn with_room_to_send(send: impl FnOnce() -> Result<(), Errno>) -> Result<(), Errno> {
    let resource = libc::RLIMIT_NOFILE.into();
    let libc::rlimit64 { rlim_cur: own, rlim_max: room } = sys::limit(resource, None)?;
    sys::limit(resource, Some(&libc::rlimit64 { rlim_cur: room, rlim_max: room }))?;
    let sent = send();
    sys::limit(resource, Some(&libc::rlimit64 { rlim_cur: own, rlim_max: own }))?;
    sent
}
