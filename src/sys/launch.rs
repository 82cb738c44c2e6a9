//! Starts a job's processes behind the outer wall.
//!
//! Three processes come of one launch. The *origin*, a plain fork of the worker, makes the pid namespace,
//! starts the other two as its siblings and ends. *Init* is the namespace's first process: it becomes a
//! program of a few instructions that only waits, and whose death takes the namespace with it. The *job*
//! raises the outer wall around itself and becomes python. Both are children of the worker (`CLONE_PARENT`),
//! which therefore sees the job's exit itself, and neither has a parent that a job could reach.
//!
//! All three run on a copy of a threaded process's memory: from the fork on they only make system calls, on
//! what was prepared before.
//!
//! Every child of this file begins by closing what it was not made for ([`Kept`]). Without that it would hold the
//! ends of other children's pipes, and two children that each wait for the end of the other's pipe wait for ever.

use std::ffi::{CStr, CString};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use sandpiper_shim::abi::{CONTROL_FD, Report, Stage};
use sandpiper_shim::plan::Steps;
use sandpiper_shim::wall::{self, StepFailure};

use super::fd;
use super::process::{Child, Exit};

/// All that a launch needs. Descriptors named in the plans must be out of the way of the numbers that they
/// become, and `control` must be open until the job's plan closes it.
#[derive(Debug)]
pub struct Launch<'a> {
    /// What the origin does before it starts the others; ends in a new pid namespace.
    pub origin: &'a [u8],
    /// What init does before it becomes `init_program`.
    pub init: &'a [u8],
    /// The job's outer wall. Its last step closes every descriptor that python must not see.
    pub wall: &'a [u8],
    /// The program that init becomes.
    pub init_program: BorrowedFd<'a>,
    /// What the job becomes, with its arguments and its whole environment.
    pub program: &'a Program,
    /// Where a step that fails is reported.
    pub control: BorrowedFd<'a>,
    /// The directory of a control group of version 2 that the job is born in.
    pub group: Option<BorrowedFd<'a>>,
}

/// A program to execute, with its strings in the form that the kernel takes.
#[derive(Debug)]
pub struct Program {
    path: CString,
    // The strings that the pointers below point into.
    _strings: Vec<CString>,
    arguments: Vec<*const libc::c_char>,
    environment: Vec<*const libc::c_char>,
}

// SAFETY: the pointers lead into strings that the same value owns and never changes.
unsafe impl Send for Program {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for Program {}

impl Program {
    /// Prepares a program.
    pub fn new(path: CString, arguments: Vec<CString>, environment: Vec<CString>) -> Self {
        let pointers = |strings: &[CString]| {
            strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect::<Vec<_>>()
        };
        let (argument_pointers, environment_pointers) = (pointers(&arguments), pointers(&environment));
        let strings = arguments.into_iter().chain(environment).collect();
        Self { path, _strings: strings, arguments: argument_pointers, environment: environment_pointers }
    }
}

/// Both children of a launch. The job may not have raised its wall yet; it reports on the control socket.
#[derive(Debug)]
pub struct Launched {
    /// The pid namespace's first process.
    pub init: Child,
    /// The job's main process.
    pub job: Child,
}

/// The descriptors that a child keeps of those that its maker has open; found before it is forked.
#[derive(Debug)]
pub(super) struct Kept(Vec<RawFd>);

impl Kept {
    /// Those that the steps of `plans` use, and `more`.
    fn of(plans: &[&[u8]], more: &[RawFd]) -> Self {
        let steps = plans.iter().flat_map(|plan| Steps::new(plan)).flatten();
        let named = steps.filter_map(|step| RawFd::try_from(step.descriptor()?).ok());
        Self::only(&named.chain(more.iter().copied()).collect::<Vec<_>>())
    }

    /// These and no others.
    pub(super) fn only(kept: &[RawFd]) -> Self {
        let mut kept = kept.to_vec();
        kept.sort_unstable();
        kept.dedup();
        Self(kept)
    }

    /// Closes all others, the standard streams too. For a child that was just forked, whose descriptors nothing
    /// else uses.
    pub(super) fn close_others(&self) -> Result<(), i32> {
        let mut first = 0;
        for kept in self.0.iter().map(|fd| fd.unsigned_abs()) {
            if first < kept {
                close_range(first, kept - 1)?;
            }
            first = kept + 1;
        }
        close_range(first, u32::MAX)
    }
}

fn close_range(first: u32, last: u32) -> Result<(), i32> {
    // SAFETY: the call takes numbers; no code of this process relies on a descriptor that it closes.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    if closed < 0 { Err(errno()) } else { Ok(()) }
}

/// Blocks every signal for this thread, for ever: a forked child must not run the worker's handlers.
///
/// For the thread that launches, and nothing else.
pub fn block_signals() -> io::Result<()> {
    Ok(nix::sys::signal::SigSet::all().thread_block()?)
}

/// Starts both processes. Must be called on a thread that lives as long as the worker, since they die with it.
///
/// # Errors
/// The fork itself failed, or the origin ended early; why is then to be read from the control socket.
pub fn launch(launch: &Launch<'_>) -> io::Result<Launched> {
    let (pids_in, pids_out) = fd::pipe()?;
    let worker = nix::unistd::getpid().as_raw();
    let own = [&launch.init_program, &launch.control].map(AsRawFd::as_raw_fd);
    let more: Vec<RawFd> =
        own.into_iter().chain([pids_out.as_raw_fd()]).chain(launch.group.map(|fd| fd.as_raw_fd())).collect();
    let kept = Kept::of(&[launch.origin, launch.init, launch.wall], &more);
    // SAFETY: the child only makes system calls on prepared memory, and never returns from `origin`.
    let origin = match unsafe { fork(0) }? {
        0 => run_origin(launch, &kept, pids_out.as_raw_fd(), worker),
        pid => Child::adopt(pid)?,
    };
    drop(pids_out);
    let started = read_pids(pids_in);
    origin.wait()?;
    match started? {
        (Some(init), Some(job)) => Ok(Launched { init: Child::adopt(init)?, job: Child::adopt(job)? }),
        (init, _) => {
            if let Some(init) = init {
                let init = Child::adopt(init)?;
                init.kill();
                init.wait()?;
            }
            Err(io::Error::other("the process that makes a job's namespaces ended early"))
        }
    }
}

/// Whether a plan can be carried out in new namespaces: a child does, and ends.
///
/// May be called from a process with threads, unlike the probes of the doctor. Waits for the child: not for a
/// thread that others wait for.
pub fn can(namespaces: libc::c_int, plan: &[u8]) -> bool {
    let kept = Kept::of(&[plan], &[]);
    // SAFETY: the child only makes system calls on prepared memory, and never returns.
    let child = match unsafe { fork(namespaces) } {
        Ok(0) => end(i32::from(kept.close_others().is_err() || wall::raise(plan).is_err())),
        Ok(pid) => Child::adopt(pid),
        Err(error) => Err(error),
    };
    child.and_then(|child| child.wait()).is_ok_and(|(exit, _)| exit == Exit::Code(0))
}

/// Carries out a plan in a process of its own, and keeps the namespace that it is in then for others to join:
/// `mnt` or `cgroup`, as `/proc` names them. Waits for the process: not for a thread that others wait for.
///
/// # Errors
/// The plan, or one of the calls around it, failed.
pub fn namespace(kind: &str, plan: &[u8]) -> io::Result<OwnedFd> {
    let (hold, release) = fd::pipe()?;
    let (mut done, doing) = fd::pipe().map(|(read, write)| (std::fs::File::from(read), write))?;
    let kept = Kept::of(&[plan], &[hold.as_raw_fd(), doing.as_raw_fd()]);
    // SAFETY: the child only makes system calls on prepared memory, and never returns.
    let (holder, pid) = match unsafe { fork(0) }? {
        0 => {
            let byte = 0_u8;
            let raised = kept.close_others().is_ok() && wall::raise(plan).is_ok();
            // SAFETY: the number is this process's own copy; the buffer is live.
            if raised && unsafe { libc::write(doing.as_raw_fd(), (&raw const byte).cast(), 1) } == 1 {
                // Holds the namespace until it has been opened.
                wait_and_end(&hold);
            }
            end(1)
        }
        pid => (Child::adopt(pid)?, pid),
    };
    drop(doing);
    let namespace = match done.read(&mut [0])? {
        0 => Err(io::Error::other(format!("a {kind} namespace cannot be prepared"))),
        _ => std::fs::File::open(format!("/proc/{pid}/ns/{kind}")),
    };
    drop(release);
    holder.wait()?;
    Ok(namespace?.into())
}

fn read_pids(pipe: OwnedFd) -> io::Result<(Option<i32>, Option<i32>)> {
    const BOTH: usize = 2 * size_of::<libc::pid_t>();
    let mut bytes = Vec::with_capacity(BOTH);
    // Not to the end of the pipe, which comes when the job has become python.
    std::fs::File::from(pipe).take(BOTH as u64).read_to_end(&mut bytes)?;
    let mut pids = bytes.chunks_exact(4).map(|four| i32::from_ne_bytes([four[0], four[1], four[2], four[3]]));
    Ok((pids.next(), pids.next()))
}

/// `fork`, with further clone flags, and without libc's own: no handlers run and no lock is taken.
///
/// # Safety
/// In the child, memory is a copy in which other threads' locks may be held: it must only make system calls
/// and must not return to code that does more.
pub(super) unsafe fn fork(flags: libc::c_int) -> io::Result<libc::pid_t> {
    let flags = libc::c_long::from(flags | libc::SIGCHLD);
    // SAFETY: with no stack given the child goes on with a copy of this one, as after fork.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0_usize, 0_usize, 0_usize, 0_usize) };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    libc::pid_t::try_from(pid).map_err(io::Error::other)
}

/// [`fork`] into a control group of version 2, by its directory: nothing has to be moved there.
///
/// # Safety
/// As for [`fork`].
unsafe fn fork_into(group: RawFd, flags: libc::c_int) -> io::Result<libc::pid_t> {
    const CLONE_INTO_CGROUP: u64 = 1 << 33;
    // A sibling's signal is its maker's.
    let signal = if flags & libc::CLONE_PARENT == 0 { libc::SIGCHLD } else { 0 };
    // SAFETY: the structure is plain numbers: all zero is a value of it.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = CLONE_INTO_CGROUP | u64::from(flags.cast_unsigned());
    arguments.exit_signal = u64::from(signal.cast_unsigned());
    arguments.cgroup = u64::from(group.cast_unsigned());
    // SAFETY: the structure is live, and its size is right; with no stack given the child goes on with a copy of
    // this one.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut arguments, size_of::<libc::clone_args>()) };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    libc::pid_t::try_from(pid).map_err(io::Error::other)
}

/// A child that was born in a control group of version 2, and ends at once.
///
/// # Errors
/// The kernel lets no process be born there.
pub fn born_into(group: BorrowedFd<'_>) -> io::Result<Child> {
    // SAFETY: the child only makes a system call, and never returns.
    match unsafe { fork_into(group.as_raw_fd(), 0) }? {
        0 => end(0),
        pid => Child::adopt(pid),
    }
}

/// For a child that only has to be there: ends when its maker closes the other end of the pipe, of which it must
/// have no copy.
pub(super) fn wait_and_end(hold: &OwnedFd) -> ! {
    let mut byte = 0_u8;
    // SAFETY: the number is this process's own copy; the buffer is live.
    unsafe { libc::read(hold.as_raw_fd(), (&raw mut byte).cast(), 1) };
    end(0)
}

/// `_exit`: no handler of the worker's runs in its copy.
pub(super) fn end(code: libc::c_int) -> ! {
    // SAFETY: ends the process; nothing runs after it.
    unsafe { libc::_exit(code) }
}

fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

fn report(fd: RawFd, stage: Stage, failure: StepFailure) -> ! {
    let bytes = Report::Failed { stage, step: failure.step, errno: failure.errno }.encode();
    // SAFETY: the buffer is live. Where the write fails, the worker sees the process end without a report.
    let _ = unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) };
    end(1)
}

fn run_origin(launch: &Launch<'_>, kept: &Kept, pids: RawFd, worker: libc::pid_t) -> ! {
    let control = launch.control.as_raw_fd();
    let failed = |errno| report(control, Stage::Origin, StepFailure { step: u32::MAX, errno });
    if let Err(errno) = kept.close_others() {
        failed(errno);
    }
    if let Err(failure) = wall::raise(launch.origin) {
        report(control, Stage::Origin, failure);
    }
    // With CLONE_VFORK the origin goes on when init has become its program.
    // SAFETY: the child only makes system calls on prepared memory, and never returns.
    let init = match unsafe { fork(libc::CLONE_PARENT | libc::CLONE_VFORK) } {
        Ok(0) => run_init(launch),
        Ok(pid) => pid,
        Err(_) => failed(errno()),
    };
    announce(pids, init);
    // SAFETY: as above.
    let job = match unsafe {
        match launch.group {
            Some(group) => fork_into(group.as_raw_fd(), libc::CLONE_PARENT),
            None => fork(libc::CLONE_PARENT),
        }
    } {
        Ok(0) => run_job(launch),
        Ok(pid) => pid,
        Err(_) => failed(errno()),
    };
    announce(pids, job);
    // A worker that died before both had set their parent-death signal would leave them behind.
    // SAFETY: the calls take numbers.
    unsafe {
        if libc::getppid() != worker {
            libc::kill(job, libc::SIGKILL);
            libc::kill(init, libc::SIGKILL);
        }
    }
    end(0)
}

fn announce(pids: RawFd, pid: libc::pid_t) {
    let bytes = pid.to_ne_bytes();
    // SAFETY: the buffer is live. Where the write fails the worker is gone, and the caller looks for that.
    let _ = unsafe { libc::write(pids, bytes.as_ptr().cast(), bytes.len()) };
}

fn run_init(launch: &Launch<'_>) -> ! {
    const NAME: &CStr = c"init";
    let control = launch.control.as_raw_fd();
    if let Err(failure) = wall::raise(launch.init) {
        report(control, Stage::Init, failure);
    }
    let arguments = [NAME.as_ptr(), std::ptr::null()];
    // SAFETY: every string and both lists end in NUL and outlive the call.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            launch.init_program.as_raw_fd(),
            c"".as_ptr(),
            arguments.as_ptr(),
            arguments[1..].as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    report(control, Stage::Init, StepFailure { step: u32::MAX, errno: errno() })
}

fn run_job(launch: &Launch<'_>) -> ! {
    if let Err(failure) = wall::raise(launch.wall) {
        report(launch.control.as_raw_fd(), Stage::Wall, failure);
    }
    let program = launch.program;
    // SAFETY: every string and both lists end in NUL and outlive the call.
    unsafe { libc::execve(program.path.as_ptr(), program.arguments.as_ptr(), program.environment.as_ptr()) };
    // The wall's last step has closed the control socket under its old number.
    report(CONTROL_FD, Stage::Exec, StepFailure { step: 0, errno: errno() })
}
