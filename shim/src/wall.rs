//! Raises the outer wall: carries out a plan, step by step, with system calls and nothing else.
//!
//! Runs in a process that a threaded worker has just forked (cold) or that a zygote has (warm). Whatever fails
//! stops it there; the caller then ends the process before any code that is not ours has run.

use core::ffi::{CStr, c_int};

use crate::plan::{Step, Steps};
use crate::sys::{self, Errno, syscall};

/// The step that failed, counted from 0, and what the kernel said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepFailure {
    /// Its place in the plan.
    pub step: u32,
    /// As the kernel gave it.
    pub errno: i32,
}

/// Carries out every step of `plan` in order.
///
/// # Errors
/// The first step that fails. The process is then in no defined state and must end.
pub fn raise(plan: &[u8]) -> Result<(), StepFailure> {
    let mut ruleset = Ruleset(None);
    for (at, step) in Steps::new(plan).enumerate() {
        let failed = |errno| StepFailure { step: u32::try_from(at).unwrap_or(u32::MAX), errno };
        let step = step.map_err(|_| failed(libc::EBADMSG))?;
        carry_out(&step, &mut ruleset).map_err(failed)?;
    }
    Ok(())
}

fn carry_out(step: &Step<'_>, ruleset: &mut Ruleset) -> Result<(), Errno> {
    match *step {
        Step::Unshare { flags } => numeric(libc::SYS_unshare, [flags, 0]),
        Step::Setns { fd, kind } => numeric(libc::SYS_setns, [fd, kind]),
        Step::Mount { flags, source, target, fstype, options } => {
            mount([source, target, fstype], number(flags), options)
        }
        Step::MountAttributes { set, target } => mount_attributes(target, set),
        Step::Mkdir { mode, path } => at_path(libc::SYS_mkdirat, path, [mode, 0]),
        Step::Symlink { target, path } => symlink(target, path),
        Step::CreateFile { mode, path, content } => {
            write_file(path, libc::O_CREAT | libc::O_EXCL, narrow(mode)?, content)
        }
        Step::WriteFile { path, content } => write_file(path, 0, 0, content),
        Step::WriteFd { fd, content } => sys::write_once(descriptor(fd)?, content),
        Step::Chown { uid, gid, path } => at_path(libc::SYS_fchownat, path, [uid, gid]),
        Step::PivotRoot { new, old } => {
            pivot_root(new, old)?;
            chdir(c"/")
        }
        Step::EnterRoot { new } => enter_root(new),
        Step::Hostname { name } => hostname(name),
        Step::DropBounding {} => drop_bounding(),
        Step::Identity { uid, gid, keeps_groups } => {
            sys::become_identity(narrow(uid)?, narrow(gid)?, keeps_groups != 0)
        }
        Step::DropCapabilities {} => {
            sys::clear_capabilities()?;
            if sys::has_no_capabilities()? { Ok(()) } else { Err(libc::EPERM) }
        }
        Step::Rlimit { resource, soft, hard } => rlimit(resource, soft, hard),
        Step::Setsid {} => numeric(libc::SYS_setsid, [0, 0]),
        Step::Umask { mask } => numeric(libc::SYS_umask, [mask, 0]),
        Step::DefaultSignals {} => default_signals(),
        Step::IgnoreChildren {} => signal(libc::SIGCHLD, libc::SIG_IGN),
        Step::DieWithParent {} => {
            sys::prctl(libc::PR_SET_PDEATHSIG, [libc::SIGKILL.cast_unsigned() as usize, 0, 0, 0]).map(drop)
        }
        Step::Dumpable { value } => sys::prctl(libc::PR_SET_DUMPABLE, [number(value), 0, 0, 0]).map(drop),
        Step::NoNewPrivileges {} => sys::set_no_new_privileges(),
        Step::LandlockBegin { filesystem, network, scoped } => ruleset.begin([filesystem, network, scoped]),
        Step::LandlockAllow { access, path } => ruleset.allow(path, access),
        Step::LandlockEnforce {} => ruleset.enforce(),
        Step::Filter { instructions } => sys::install_filter(instructions, 0).map(drop),
        Step::Duplicate { from, to } => numeric(libc::SYS_dup3, [from, to]),
        Step::CloseFrom { first } => numeric(libc::SYS_close_range, [first, u32::MAX.into()]),
        Step::Chdir { path } => chdir(path),
        Step::ChdirTo { fd } => numeric(libc::SYS_fchdir, [fd, 0]),
        Step::OpenDirectory { to, path } => open_directory(path, to),
        Step::UnblockSignals {} => sys::unblock_signals(),
        Step::Nice { value } => nice(value),
    }
}

/// One of the calls above that take only numbers. The process has just been forked and is about to become
/// another: no code in it relies on a descriptor or an attribute that they change.
fn numeric(call: libc::c_long, [a, b]: [u64; 2]) -> Result<(), Errno> {
    // SAFETY: the callers above name only calls that take numbers.
    unsafe { syscall(call, [number(a), number(b), 0, 0, 0]) }.map(drop)
}

/// `AT_FDCWD`, as an argument.
const HERE: usize = libc::AT_FDCWD.cast_unsigned() as usize;

/// Numbers in a plan come from this architecture's own worker: 64 bits on both sides.
#[allow(clippy::cast_possible_truncation, reason = "usize has 64 bits on every supported architecture")]
fn number(value: u64) -> usize {
    value as usize
}

fn nice(value: u64) -> Result<(), Errno> {
    const PRIO_PROCESS: usize = 0;
    // SAFETY: the call takes numbers.
    unsafe { syscall(libc::SYS_setpriority, [PRIO_PROCESS, 0, number(value), 0, 0]) }.map(drop)
}

fn narrow(value: u64) -> Result<u32, Errno> {
    u32::try_from(value).map_err(|_| libc::EINVAL)
}

fn descriptor(value: u64) -> Result<c_int, Errno> {
    c_int::try_from(value).map_err(|_| libc::EBADF)
}

fn address(string: &CStr) -> usize {
    string.as_ptr() as usize
}

fn at_path(call: libc::c_long, path: &CStr, [a, b]: [u64; 2]) -> Result<(), Errno> {
    // SAFETY: the path ends in NUL and outlives the call.
    unsafe { syscall(call, [HERE, address(path), number(a), number(b), 0]) }.map(drop)
}

fn symlink(target: &CStr, path: &CStr) -> Result<(), Errno> {
    // SAFETY: both paths end in NUL and outlive the call.
    unsafe { syscall(libc::SYS_symlinkat, [address(target), HERE, address(path), 0, 0]) }.map(drop)
}

fn hostname(name: &CStr) -> Result<(), Errno> {
    // SAFETY: the name outlives the call; its length is without the NUL.
    unsafe { syscall(libc::SYS_sethostname, [address(name), name.count_bytes(), 0, 0, 0]) }.map(drop)
}

fn chdir(path: &CStr) -> Result<(), Errno> {
    // SAFETY: the path ends in NUL and outlives the call.
    unsafe { syscall(libc::SYS_chdir, [address(path), 0, 0, 0, 0]) }.map(drop)
}

fn open_directory(path: &CStr, to: u64) -> Result<(), Errno> {
    let fd = sys::open(path, libc::O_PATH | libc::O_DIRECTORY, 0)?;
    if u64::from(fd.unsigned_abs()) == to {
        // Already the right number, but it would not outlive the exec.
        const KEEP: u64 = 0;
        return fcntl(fd, libc::F_SETFD, KEEP);
    }
    let moved = numeric(libc::SYS_dup3, [fd.unsigned_abs().into(), to]);
    sys::close(fd);
    moved
}

/// A command of `fcntl` that takes a number.
fn fcntl(fd: c_int, command: c_int, value: u64) -> Result<(), Errno> {
    let (fd, command) = (fd.unsigned_abs() as usize, command.unsigned_abs() as usize);
    // SAFETY: the callers name only commands that take a number.
    unsafe { syscall(libc::SYS_fcntl, [fd, command, number(value), 0, 0]) }.map(drop)
}

fn mount(paths: [&CStr; 3], flags: usize, options: &CStr) -> Result<(), Errno> {
    let [source, target, fstype] = paths.map(address);
    // SAFETY: all four strings end in NUL and outlive the call.
    unsafe { syscall(libc::SYS_mount, [source, target, fstype, flags, address(options)]) }.map(drop)
}

fn mount_attributes(target: &CStr, set: u64) -> Result<(), Errno> {
    let attributes = libc::mount_attr { attr_set: set, attr_clr: 0, propagation: 0, userns_fd: 0 };
    let flags = libc::AT_RECURSIVE.cast_unsigned() as usize;
    let (at, size) = (&raw const attributes as usize, size_of::<libc::mount_attr>());
    // SAFETY: the path and the structure outlive the call, which only reads them; the size is right.
    unsafe { syscall(libc::SYS_mount_setattr, [HERE, address(target), flags, at, size]) }.map(drop)
}

fn write_file(path: &CStr, flags: c_int, mode: u32, content: &[u8]) -> Result<(), Errno> {
    let fd = sys::open(path, libc::O_WRONLY | flags, mode)?;
    let written = if content.is_empty() { Ok(()) } else { sys::write_once(fd, content) };
    sys::close(fd);
    written
}

fn pivot_root(new: &CStr, old: &CStr) -> Result<(), Errno> {
    // SAFETY: both paths end in NUL and outlive the call.
    unsafe { syscall(libc::SYS_pivot_root, [address(new), address(old), 0, 0, 0]) }.map(drop)
}

/// With `pivot_root(".", ".")` the old root comes to lie on top of the new one, where it can be detached
/// without a directory for it.
fn enter_root(new: &CStr) -> Result<(), Errno> {
    chdir(new)?;
    pivot_root(c".", c".")?;
    let detach = libc::MNT_DETACH.cast_unsigned() as usize;
    // SAFETY: the path ends in NUL and outlives the call.
    unsafe { syscall(libc::SYS_umount2, [address(c"."), detach, 0, 0, 0]) }?;
    chdir(c"/")
}

pub(crate) fn drop_bounding() -> Result<(), Errno> {
    sys::prctl(libc::PR_CAP_AMBIENT, [libc::PR_CAP_AMBIENT_CLEAR_ALL.cast_unsigned() as usize, 0, 0, 0])?;
    for capability in 0.. {
        match sys::prctl(libc::PR_CAPBSET_DROP, [capability, 0, 0, 0]) {
            Ok(_) => {}
            // The first number that this kernel does not know.
            Err(libc::EINVAL) if capability > 0 => break,
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

fn rlimit(resource: u64, soft: u64, hard: u64) -> Result<(), Errno> {
    sys::limit(resource, Some(&libc::rlimit64 { rlim_cur: soft, rlim_max: hard })).map(drop)
}

fn signal(number: c_int, action: libc::sighandler_t) -> Result<(), Errno> {
    // SAFETY: the action is SIG_DFL or SIG_IGN: no code of ours will run in a handler.
    if unsafe { libc::signal(number, action) } == libc::SIG_ERR { Err(sys::errno()) } else { Ok(()) }
}

/// Ignored signals stay ignored over exec, and Rust's runtime ignores SIGPIPE.
fn default_signals() -> Result<(), Errno> {
    const LAST_SIGNAL: usize = 64;
    // The kernel's `sigaction`: SIG_DFL, no flags, no restorer, an empty mask.
    let default = [0_u64; 4];
    for number in 1..=LAST_SIGNAL {
        // Past glibc, which keeps 32 and 33 for itself. SIGKILL and SIGSTOP cannot be set.
        // SAFETY: the call reads the structure, which is live; no code of ours will run in a handler.
        let _ = unsafe { syscall(libc::SYS_rt_sigaction, [number, &raw const default as usize, 0, 8, 0]) };
    }
    sys::unblock_signals()
}

/// A Landlock ruleset in the making. The calls are made raw: the ruleset names directories that exist only in
/// this process's own mounts, so it cannot be prepared outside.
struct Ruleset(Option<c_int>);

#[repr(C)]
struct RulesetAttributes {
    filesystem: u64,
    network: u64,
    scoped: u64,
}

#[repr(C, packed)]
struct PathBeneath {
    access: u64,
    parent: i32,
}

impl Ruleset {
    fn begin(&mut self, handled: [u64; 3]) -> Result<(), Errno> {
        let [filesystem, network, scoped] = handled;
        let attributes = RulesetAttributes { filesystem, network, scoped };
        // An older kernel knows a shorter structure, and takes a longer one only where the rest is zero.
        let (at, size) = (&raw const attributes as usize, size_of::<RulesetAttributes>());
        // SAFETY: the structure outlives the call, which only reads it; the size is right.
        let fd = unsafe { syscall(libc::SYS_landlock_create_ruleset, [at, size, 0, 0, 0]) }?;
        self.0 = Some(c_int::try_from(fd).map_err(|_| libc::EBADF)?);
        Ok(())
    }

    fn allow(&self, path: &CStr, access: u64) -> Result<(), Errno> {
        const RULE_PATH_BENEATH: usize = 1;
        let ruleset = self.0.ok_or(libc::EBADF)?.cast_unsigned() as usize;
        let parent = sys::open(path, libc::O_PATH, 0)?;
        let rule = PathBeneath { access, parent };
        // SAFETY: the structure outlives the call, which only reads it.
        let added = unsafe {
            syscall(libc::SYS_landlock_add_rule, [ruleset, RULE_PATH_BENEATH, &raw const rule as usize, 0, 0])
        };
        sys::close(parent);
        added.map(drop)
    }

    fn enforce(&mut self) -> Result<(), Errno> {
        let ruleset = self.0.take().ok_or(libc::EBADF)?;
        let fd = ruleset.cast_unsigned() as usize;
        // SAFETY: the call takes numbers.
        let enforced = unsafe { syscall(libc::SYS_landlock_restrict_self, [fd, 0, 0, 0, 0]) };
        sys::close(ruleset);
        enforced.map(drop)
    }
}
