//! System calls as functions that return an errno. No allocation, no lock, no libc state but `errno`.

use core::ffi::{CStr, c_int, c_long};

/// What the kernel said when it refused.
pub(crate) type Errno = i32;

/// The errno of the call that has just failed.
pub(crate) fn errno() -> Errno {
    // SAFETY: glibc's errno is a live thread-local of this thread for as long as the thread lives.
    unsafe { *libc::__errno_location() }
}

/// A system call by number. Its own wrapper in libc is avoided where that would do more than the call, such as
/// telling other threads about a new uid.
///
/// # Safety
/// As for the call: every pointer among `arguments` must be good for what the kernel does with it.
pub(crate) unsafe fn syscall(number: c_long, arguments: [usize; 5]) -> Result<usize, Errno> {
    let [a, b, c, d, e] = arguments;
    // SAFETY: handed on to the caller.
    let result = unsafe { libc::syscall(number, a, b, c, d, e) };
    usize::try_from(result).map_err(|_| errno())
}

/// `prctl` with plain numbers.
pub(crate) fn prctl(option: c_int, arguments: [usize; 4]) -> Result<usize, Errno> {
    let [a, b, c, d] = arguments;
    // SAFETY: used below only with options that take numbers; the kernel checks their values.
    unsafe { syscall(libc::SYS_prctl, [option.cast_unsigned() as usize, a, b, c, d]) }
}

/// `open` with `O_CLOEXEC` added.
pub(crate) fn open(path: &CStr, flags: c_int, mode: u32) -> Result<c_int, Errno> {
    let flags = (flags | libc::O_CLOEXEC).cast_unsigned() as usize;
    let at = libc::AT_FDCWD.cast_unsigned() as usize;
    // SAFETY: the path ends in NUL and outlives the call.
    let fd = unsafe { syscall(libc::SYS_openat, [at, path.as_ptr() as usize, flags, mode as usize, 0]) }?;
    c_int::try_from(fd).map_err(|_| libc::EBADF)
}

/// `close`. An error leaves nothing to do: the descriptor is gone either way.
pub(crate) fn close(fd: c_int) {
    // SAFETY: closing a number that is not open is an error, not undefined behaviour; the callers own it.
    let _ = unsafe { libc::close(fd) };
}

/// `write` of all of `bytes` in one call, as files that take a record want it.
pub(crate) fn write_once(fd: c_int, bytes: &[u8]) -> Result<(), Errno> {
    // SAFETY: the buffer is live and its length is right.
    let written = unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) };
    if written < 0 {
        return Err(errno());
    }
    if written.cast_unsigned() == bytes.len() { Ok(()) } else { Err(libc::EIO) }
}

/// This process's limit on a resource, and sets a new one where one is given.
pub(crate) fn limit(resource: u64, new: Option<&libc::rlimit64>) -> Result<libc::rlimit64, Errno> {
    let mut old = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    let new = new.map_or(core::ptr::null(), core::ptr::from_ref);
    #[allow(clippy::cast_possible_truncation, reason = "usize has 64 bits on every supported architecture")]
    let resource = resource as usize;
    // SAFETY: both structures are live; the call reads the one, if there is one, and writes the other.
    unsafe { syscall(libc::SYS_prlimit64, [0, resource, new as usize, &raw mut old as usize, 0]) }?;
    Ok(old)
}

const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: c_int,
}

/// Permitted, effective and inheritable sets of two 32-bit words, as version 3 lays them out.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct CapabilityWord {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Empties this thread's capability sets.
pub(crate) fn clear_capabilities() -> Result<(), Errno> {
    let header = CapabilityHeader { version: CAPABILITY_VERSION_3, pid: 0 };
    let words = [CapabilityWord::default(); 2];
    // SAFETY: both structures have the layout of version 3 and outlive the call, which only reads them.
    unsafe { syscall(libc::SYS_capset, [&raw const header as usize, words.as_ptr() as usize, 0, 0, 0]) }
        .map(|_| ())
}

/// Whether this thread has no capability at all.
pub(crate) fn has_no_capabilities() -> Result<bool, Errno> {
    let header = CapabilityHeader { version: CAPABILITY_VERSION_3, pid: 0 };
    let mut words = [CapabilityWord { effective: 1, permitted: 1, inheritable: 1 }; 2];
    // SAFETY: as above, and the call writes exactly two words.
    unsafe { syscall(libc::SYS_capget, [&raw const header as usize, words.as_mut_ptr() as usize, 0, 0, 0]) }?;
    Ok(words == [CapabilityWord::default(); 2])
}

/// Real, effective and saved uid, and gid.
pub(crate) fn identity() -> Result<([u32; 3], [u32; 3]), Errno> {
    let mut uids = [u32::MAX; 3];
    let mut gids = [u32::MAX; 3];
    for (number, ids) in [(libc::SYS_getresuid, &mut uids), (libc::SYS_getresgid, &mut gids)] {
        let at = ids.as_mut_ptr();
        // SAFETY: three live `u32`s, one for each of the call's pointers.
        unsafe { syscall(number, [at as usize, at.add(1) as usize, at.add(2) as usize, 0, 0]) }?;
    }
    Ok((uids, gids))
}

/// Drops groups, gid and uid in that order, for this thread, and reads each back.
///
/// The order matters: without its uid the process could no longer change the others. The raw calls are used
/// because libc's would signal every thread that it knows of, and here there is one.
pub(crate) fn become_identity(uid: u32, gid: u32, keeps_groups: bool) -> Result<(), Errno> {
    if !keeps_groups {
        // SAFETY: an empty list is not read.
        unsafe { syscall(libc::SYS_setgroups, [0; 5]) }?;
        // SAFETY: with size 0 the call only counts.
        if unsafe { syscall(libc::SYS_getgroups, [0; 5]) }? != 0 {
            return Err(libc::EPERM);
        }
    }
    let (u, g) = (uid as usize, gid as usize);
    // SAFETY: the call takes numbers.
    unsafe { syscall(libc::SYS_setresgid, [g, g, g, 0, 0]) }?;
    // SAFETY: the call takes numbers.
    unsafe { syscall(libc::SYS_setresuid, [u, u, u, 0, 0]) }?;
    if identity()? == ([uid; 3], [gid; 3]) { Ok(()) } else { Err(libc::EPERM) }
}

/// `no_new_privs`, set and read back.
pub(crate) fn set_no_new_privileges() -> Result<(), Errno> {
    prctl(libc::PR_SET_NO_NEW_PRIVS, [1, 0, 0, 0])?;
    if prctl(libc::PR_GET_NO_NEW_PRIVS, [0; 4])? == 1 { Ok(()) } else { Err(libc::EPERM) }
}

/// Installs a filter of raw instructions. Returns what the kernel gives: 0, or the listener.
pub(crate) fn install_filter(instructions: &[u8], flags: usize) -> Result<usize, Errno> {
    const SECCOMP_SET_MODE_FILTER: usize = 1;
    if !instructions.len().is_multiple_of(size_of::<libc::sock_filter>()) {
        return Err(libc::EINVAL);
    }
    let Ok(count) = u16::try_from(instructions.len() / size_of::<libc::sock_filter>()) else {
        return Err(libc::E2BIG);
    };
    let program = libc::sock_fprog { len: count, filter: instructions.as_ptr().cast_mut().cast() };
    // SAFETY: the kernel copies `count` instructions out of the live slice, which needs no alignment for that,
    // and checks every one of them.
    unsafe { syscall(libc::SYS_seccomp, [SECCOMP_SET_MODE_FILTER, flags, &raw const program as usize, 0, 0]) }
}

/// Blocks every signal that can be.
pub(crate) fn block_signals() -> Result<(), Errno> {
    set_signal_mask(u64::MAX)
}

/// Blocks no signal.
pub(crate) fn unblock_signals() -> Result<(), Errno> {
    set_signal_mask(0)
}

fn set_signal_mask(mask: u64) -> Result<(), Errno> {
    let set = libc::SIG_SETMASK.cast_unsigned() as usize;
    // SAFETY: the kernel's signal set is 64 bits; the call reads it.
    unsafe { syscall(libc::SYS_rt_sigprocmask, [set, &raw const mask as usize, 0, 8, 0]) }.map(drop)
}
