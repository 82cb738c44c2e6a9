//! A warm start, from the zygote's side: an order comes in, a process that python goes on in comes out.
//!
//! The zygote is one thread of a python process that has done its imports. For every order it makes two
//! children *of its own parent*, the worker, who therefore watches and collects them exactly as it does those
//! that it started itself: the first process of a new pid namespace, which shares the zygote's memory, touches
//! none of it and only waits; and the job's process, which returns from [`Zygote::fork`] as its child, with the
//! interpreter as it is, and raises the outer wall of its order around itself.
//!
//! The fork is a raw one, since libc's cannot make a sibling. What libc's would do for a process of one thread
//! is done here: the kernel writes the child's thread id where libc keeps it. Python's own part is left to the
//! caller.

use core::arch::asm;
use core::ffi::c_int;

use crate::abi::{CONTROL_FD, MAX_ORDER, ORDER_FD, ORDER_FDS, Report, Stage};
use crate::pages;
use crate::report;
use crate::sys::{self, Errno, syscall};
use crate::wall::{self, StepFailure};

/// What a zygote keeps between its calls. Python calls in with one thread, and each call is over before the
/// next.
#[derive(Debug)]
pub struct Zygote {
    plan: [u8; MAX_ORDER],
    length: usize,
    /// Where libc keeps this thread's id.
    thread_id: usize,
    /// The zygote's own pid namespace, to come back to.
    own_pids: c_int,
}

impl Zygote {
    /// Before anything else was called.
    #[must_use]
    pub const fn new() -> Self {
        Self { plan: [0; MAX_ORDER], length: 0, thread_id: 0, own_pids: -1 }
    }

    /// Finds what forking needs, takes the process out of its children's reach, moves its memory into huge pages if it
    /// shall, and tells the worker that the zygote is ready.
    ///
    /// # Errors
    /// This system cannot start jobs warm; the worker has been told why.
    pub fn ready(&mut self, huge_pages: bool) -> Result<(), Errno> {
        let prepared = self.prepare(huge_pages);
        let report = match prepared {
            Ok(huge_pages) => Report::Ready { huge_pages },
            Err(errno) => Report::Failed { stage: Stage::Zygote, step: 0, errno },
        };
        report::send(CONTROL_FD, report, &[])?;
        prepared.map(drop)
    }

    /// Returns what kept the memory from huge pages, 0 if nothing did.
    fn prepare(&mut self, huge_pages: bool) -> Result<Errno, Errno> {
        // From here on no handler runs in this process: pages are moved while nothing writes to them, and the first
        // processes of jobs share this memory. The jobs themselves unblock their signals.
        sys::block_signals()?;
        // Makes jobs faster and nothing else.
        let kept = match huge_pages.then(pages::gather) {
            Some(Ok(())) => 0,
            Some(Err(error)) => error.raw_os_error().unwrap_or(libc::ENOTSUP),
            None => libc::ECANCELED,
        };
        // SAFETY: the call takes nothing.
        let pid = unsafe { syscall(libc::SYS_getpid, [0; 5]) }?;
        // SAFETY: the call takes numbers.
        let pidfd = unsafe { syscall(libc::SYS_pidfd_open, [pid, 0, 0, 0, 0]) }?;
        self.own_pids = c_int::try_from(pidfd).map_err(|_| libc::EBADF)?;
        self.thread_id = thread_id_address()?;
        // Becoming python has kept what it needs for its children; nothing that comes after may gain more.
        wall::drop_bounding()?;
        sys::prctl(libc::PR_SET_DUMPABLE, [0; 4]).map(|_| kept)
    }

    /// Waits for an order and takes its descriptors to their places. `false` when the worker has gone.
    ///
    /// # Errors
    /// The order cannot be read.
    pub fn next_order(&mut self) -> Result<bool, Errno> {
        let mut part = libc::iovec { iov_base: self.plan.as_mut_ptr().cast(), iov_len: MAX_ORDER };
        // Room for the descriptors, in the alignment that a control message needs.
        let mut control = [0_u64; 2 + ORDER_FDS];
        // SAFETY: `msghdr` is plain numbers and pointers: all zero is a value of it.
        let mut message: libc::msghdr = unsafe { core::mem::zeroed() };
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control) as _;
        // SAFETY: every pointer in the message is live until the call returns.
        let length = unsafe { libc::recvmsg(CONTROL_FD, &raw mut message, libc::MSG_CMSG_CLOEXEC) };
        if length < 0 {
            return Err(sys::errno());
        }
        self.length = length.cast_unsigned();
        if message.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
            return Err(libc::EMSGSIZE);
        }
        // SAFETY: the kernel has filled the buffer that the message names.
        let head = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
        if !head.is_null() {
            // SAFETY: the header is inside of the live control buffer.
            let (data, bytes) = unsafe { (libc::CMSG_DATA(head).cast::<c_int>(), (*head).cmsg_len as usize) };
            // SAFETY: pure arithmetic.
            let count = (bytes - unsafe { libc::CMSG_LEN(0) } as usize) / size_of::<c_int>();
            for at in 0..count {
                // SAFETY: the kernel wrote `count` descriptors there.
                let fd = unsafe { data.add(at).read_unaligned() };
                move_to(fd, ORDER_FD + c_int::try_from(at).map_err(|_| libc::EBADF)?)?;
            }
        }
        Ok(self.length > 0)
    }

    /// Makes both processes of the order. Returns twice: `true` in the job's process, `false` in the zygote,
    /// which has then told the worker.
    ///
    /// # Errors
    /// Only in the zygote: the worker cannot be told any more.
    pub fn fork(&mut self) -> Result<bool, Errno> {
        let made = self.make();
        let told = match made {
            Ok(Some([init, job])) => {
                let told = report::send(CONTROL_FD, Report::Forked, &[init, job]);
                sys::close(init);
                sys::close(job);
                told
            }
            Ok(None) => return Ok(true),
            Err(errno) => {
                let report = Report::Failed { stage: Stage::Zygote, step: 1, errno };
                report::send(CONTROL_FD, report, &[])
            }
        };
        for at in 0..ORDER_FDS {
            sys::close(ORDER_FD + c_int::try_from(at).unwrap_or_default());
        }
        told.map(|()| false)
    }

    /// Both pidfds; nothing in the job's process.
    fn make(&self) -> Result<Option<[c_int; 2]>, Errno> {
        let (own, new_pids) =
            (self.own_pids.cast_unsigned() as usize, libc::CLONE_NEWPID.cast_unsigned() as usize);
        // A process may not make a pid namespace while it stands before another: back to the own one first.
        // SAFETY: the call takes numbers.
        unsafe { syscall(libc::SYS_setns, [own, new_pids, 0, 0, 0]) }?;
        // SAFETY: the call takes numbers.
        unsafe { syscall(libc::SYS_unshare, [new_pids, 0, 0, 0, 0]) }?;
        let init = make_init()?;
        match self.make_job() {
            Ok(Some(job)) => Ok(Some([init, job])),
            Ok(None) => Ok(None),
            Err(errno) => {
                let kill = libc::SIGKILL.cast_unsigned() as usize;
                // SAFETY: without an info structure the call takes numbers.
                let _ = unsafe {
                    syscall(libc::SYS_pidfd_send_signal, [init.cast_unsigned() as usize, kill, 0, 0, 0])
                };
                sys::close(init);
                Err(errno)
            }
        }
    }

    /// The job's pidfd; nothing in the job's process.
    fn make_job(&self) -> Result<Option<c_int>, Errno> {
        let mut pidfd: c_int = -1;
        let flags = libc::CLONE_PARENT
            | libc::CLONE_PIDFD
            | libc::CLONE_CHILD_SETTID
            | libc::CLONE_CHILD_CLEARTID
            | libc::SIGCHLD;
        let flags = flags.cast_unsigned() as usize;
        let (parent_field, child_field) = (&raw mut pidfd as usize, self.thread_id);
        // The order of the last two differs between architectures.
        #[cfg(target_arch = "x86_64")]
        let arguments = [flags, 0, parent_field, child_field, 0];
        #[cfg(target_arch = "aarch64")]
        let arguments = [flags, 0, parent_field, 0, child_field];
        // SAFETY: with no stack given and no memory shared this is a fork. The kernel writes the pidfd to a
        // live variable, and the child's id to where libc keeps it, as libc's own fork has it do.
        let pid = unsafe { syscall(libc::SYS_clone, arguments) }?;
        Ok((pid != 0).then_some(pidfd))
    }

    /// Raises the outer wall of the order around the job's process.
    ///
    /// # Errors
    /// The step that failed; the worker has been told, and the process must end.
    pub fn enter(&self) -> Result<(), StepFailure> {
        wall::raise(&self.plan[..self.length]).inspect_err(|failure| {
            let report = Report::Failed { stage: Stage::Wall, step: failure.step, errno: failure.errno };
            // The job's own control socket is still at its first place. Where this fails, the worker sees the
            // process end without a report.
            let _ = report::send(ORDER_FD, report, &[]);
        })
    }
}

impl Default for Zygote {
    fn default() -> Self {
        Self::new()
    }
}

fn move_to(fd: c_int, place: c_int) -> Result<(), Errno> {
    if fd == place {
        return Ok(());
    }
    let (from, to) = (fd.cast_unsigned() as usize, place.cast_unsigned() as usize);
    let flags = libc::O_CLOEXEC.cast_unsigned() as usize;
    // SAFETY: the call takes numbers; nothing else of the process lies at these places.
    unsafe { syscall(libc::SYS_dup3, [from, to, flags, 0, 0]) }?;
    sys::close(fd);
    Ok(())
}

/// Where libc keeps the id of this thread.
fn thread_id_address() -> Result<usize, Errno> {
    // SAFETY: the call takes nothing.
    let id = c_int::try_from(unsafe { syscall(libc::SYS_gettid, [0; 5]) }?).map_err(|_| libc::EOVERFLOW)?;
    let given = address_given_to_the_kernel().filter(|at| is_thread_id(*at, id));
    given.or_else(|| search_thread_id(id)).ok_or(libc::ENOTSUP)
}

/// The address that libc had the kernel clear at the thread's end, which is that of its id. Kernels without
/// `CONFIG_CHECKPOINT_RESTORE` do not tell.
fn address_given_to_the_kernel() -> Option<usize> {
    let mut address: *mut c_int = core::ptr::null_mut();
    let option = libc::PR_GET_TID_ADDRESS.cast_unsigned() as usize;
    // SAFETY: the call writes one pointer to a live variable.
    let told = unsafe { syscall(libc::SYS_prctl, [option, &raw mut address as usize, 0, 0, 0]) };
    told.ok().filter(|_| !address.is_null()).map(|_| address as usize)
}

/// Looks for it in libc's structure of the thread, whose beginning is what `pthread_self` gives.
fn search_thread_id(id: c_int) -> Option<usize> {
    /// Less than the structure has on any architecture, and more than lies before the id.
    const SEARCHED: usize = 1024;
    // SAFETY: the call takes nothing.
    #[allow(clippy::cast_possible_truncation, reason = "an address")]
    let thread = unsafe { libc::pthread_self() } as usize;
    (thread..thread + SEARCHED).step_by(size_of::<c_int>()).find(|at| is_thread_id(*at, id))
}

/// Whether libc takes what is at this place of its own memory for the thread's id: with another number there, it
/// names another clock as the thread's.
fn is_thread_id(place: usize, id: c_int) -> bool {
    let at = place as *mut c_int;
    let clock = || {
        let mut clock: libc::clockid_t = 0;
        // SAFETY: the thread is this one, and the variable is live.
        (unsafe { libc::pthread_getcpuclockid(libc::pthread_self(), &raw mut clock) } == 0).then_some(clock)
    };
    // SAFETY: the callers name aligned places within libc's structure of this thread, which lives as long as it.
    if unsafe { at.read_volatile() } != id {
        return false;
    }
    let before = clock();
    // SAFETY: as above; there is no other thread, and nothing but the call between reads it before it is back.
    unsafe { at.write_volatile(id.wrapping_add(1)) };
    let changed = clock() != before;
    // SAFETY: as above.
    unsafe { at.write_volatile(id) };
    changed
}

/// As the kernel takes it; only the first field matters here.
#[repr(C)]
struct SignalAction {
    handler: usize,
    flags: u64,
    restorer: usize,
    mask: u64,
}

static IGNORE_CHILDREN: SignalAction =
    SignalAction { handler: libc::SIG_IGN, flags: 0, restorer: 0, mask: 0 };

/// The first process of the new pid namespace. It shares this process's memory, so it is a few instructions
/// that use neither stack nor memory: it ignores `SIGCHLD`, so that what is left to it vanishes; it asks to die
/// with the worker; it closes its copies of all descriptors; and it waits. Returns its pidfd.
#[cfg(target_arch = "x86_64")]
fn make_init() -> Result<c_int, Errno> {
    let mut pidfd: c_int = -1;
    let flags = libc::CLONE_VM | libc::CLONE_PARENT | libc::CLONE_PIDFD | libc::SIGCHLD;
    let mut result = libc::SYS_clone;
    // SAFETY: the child goes on behind `clone` with this very stack and never writes to it: it makes four
    // calls with numbers, and the address of a structure that lives for ever, and then waits for ever. The
    // parent sees one system call.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 3f",
            "mov eax, {sigaction}",
            "mov edi, {sigchld}",
            "mov rsi, r12",
            "xor edx, edx",
            "mov r10d, 8",
            "syscall",
            "mov eax, {prctl}",
            "mov edi, {pdeathsig}",
            "mov esi, {sigkill}",
            "syscall",
            "mov eax, {close_range}",
            "xor edi, edi",
            "mov esi, 0xffffffff",
            "xor edx, edx",
            "syscall",
            "2:",
            "mov eax, {pause}",
            "syscall",
            "jmp 2b",
            "3:",
            sigaction = const libc::SYS_rt_sigaction,
            sigchld = const libc::SIGCHLD,
            prctl = const libc::SYS_prctl,
            pdeathsig = const libc::PR_SET_PDEATHSIG,
            sigkill = const libc::SIGKILL,
            close_range = const libc::SYS_close_range,
            pause = const libc::SYS_pause,
            inout("rax") result,
            in("rdi") i64::from(flags),
            in("rsi") 0,
            in("rdx") &raw mut pidfd,
            in("r10") 0,
            in("r8") 0,
            in("r12") &raw const IGNORE_CHILDREN,
            out("rcx") _,
            out("r11") _,
        );
    }
    if result < 0 { Err(i32::try_from(-result).unwrap_or(libc::EIO)) } else { Ok(pidfd) }
}

#[cfg(target_arch = "aarch64")]
fn make_init() -> Result<c_int, Errno> {
    let mut pidfd: c_int = -1;
    let flags = libc::CLONE_VM | libc::CLONE_PARENT | libc::CLONE_PIDFD | libc::SIGCHLD;
    let mut result = i64::from(flags);
    // SAFETY: as on x86_64.
    unsafe {
        asm!(
            "svc 0",
            "cbnz x0, 3f",
            "mov x8, {sigaction}",
            "mov x0, {sigchld}",
            "mov x1, x12",
            "mov x2, 0",
            "mov x3, 8",
            "svc 0",
            "mov x8, {prctl}",
            "mov x0, {pdeathsig}",
            "mov x1, {sigkill}",
            "svc 0",
            "mov x8, {close_range}",
            "mov x0, 0",
            "mov w1, -1",
            "mov x2, 0",
            "svc 0",
            "2:",
            "mov x8, {ppoll}",
            "mov x0, 0",
            "mov x1, 0",
            "mov x2, 0",
            "mov x3, 0",
            "svc 0",
            "b 2b",
            "3:",
            sigaction = const libc::SYS_rt_sigaction,
            sigchld = const libc::SIGCHLD,
            prctl = const libc::SYS_prctl,
            pdeathsig = const libc::PR_SET_PDEATHSIG,
            sigkill = const libc::SIGKILL,
            close_range = const libc::SYS_close_range,
            ppoll = const libc::SYS_ppoll,
            inout("x0") result,
            in("x1") 0,
            in("x2") &raw mut pidfd,
            in("x3") 0,
            in("x4") 0,
            inout("x8") libc::SYS_clone => _,
            in("x12") &raw const IGNORE_CHILDREN,
        );
    }
    if result < 0 { Err(i32::try_from(-result).unwrap_or(libc::EIO)) } else { Ok(pidfd) }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{Read as _, pipe};
    use std::os::fd::AsRawFd as _;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::{Duration, Instant};

    use super::*;

    /// Runs it in a process with one thread.
    fn alone(body: impl FnOnce()) -> c_int {
        // SAFETY: the child runs the test and ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let passed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).is_ok();
            // SAFETY: the call takes a number.
            unsafe { libc::_exit(c_int::from(!passed)) };
        }
        child
    }

    fn ended(pid: c_int) -> c_int {
        let mut status = -1;
        // SAFETY: the variable is live.
        assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
        status
    }

    /// Whether it ignores the end of children, has no descriptor, and waits.
    fn has_settled(pid: c_int) -> bool {
        let read = |name| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap();
        let ignored =
            read("status").lines().find_map(|line| line.strip_prefix("SigIgn:\t").map(str::to_owned));
        let ignored = u64::from_str_radix(&ignored.unwrap(), 16).unwrap();
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
        #[cfg(target_arch = "x86_64")]
        let waits = libc::SYS_pause;
        #[cfg(target_arch = "aarch64")]
        let waits = libc::SYS_ppoll;
        let call = read("syscall");
        ignored & (1 << (libc::SIGCHLD - 1)) != 0
            && descriptors == 0
            && call.split(' ').next() == Some(waits.to_string().as_str())
    }

    /// The machine code of the first process, on the machine that this is.
    #[test]
    #[expect(clippy::disallowed_methods, reason = "the process tells nobody when it has settled")]
    fn the_first_process_of_a_job_settles_and_leaves_its_maker_as_it_was() {
        let (mut reader, writer) = pipe().unwrap();
        let maker = alone(|| {
            let before: Vec<u64> = (0..1000).collect();
            let pidfd = make_init().unwrap();
            let about = fs::read_to_string(format!("/proc/self/fdinfo/{pidfd}")).unwrap();
            let pid = about.lines().find_map(|line| line.strip_prefix("Pid:\t")).unwrap();
            sys::write_once(writer.as_raw_fd(), pid.as_bytes()).unwrap();
            assert!(before.iter().copied().eq(0..1000));
        });
        assert_eq!(ended(maker), 0, "its maker failed");
        drop(writer);
        let mut pid = String::new();
        // To the end, which is there when the first process has closed its copy.
        reader.read_to_string(&mut pid).unwrap();
        let pid: c_int = pid.parse().unwrap();
        let by = Instant::now() + Duration::from_secs(60);
        while !has_settled(pid) {
            assert!(Instant::now() < by, "the first process has not settled");
            std::thread::sleep(Duration::from_millis(1));
        }
        // SAFETY: the call takes numbers; the process is our child, not waited for yet.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGTERM) }, 0);
        let status = ended(pid);
        assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGTERM, "{status:#x}");
    }

    static HANDLED: AtomicUsize = AtomicUsize::new(0);

    extern "C" fn handle(_: c_int) {
        HANDLED.fetch_add(1, Ordering::Relaxed);
    }

    #[test]
    fn no_handler_runs_while_memory_is_moved() {
        /// Far fewer than come while so much memory is moved, and more than can come before signals are blocked.
        const FEW: usize = 10;
        let zygote = alone(|| {
            let memory = vec![1_u8; 128 << 20];
            let often = libc::timeval { tv_sec: 0, tv_usec: 100 };
            let often = libc::itimerval { it_interval: often, it_value: often };
            let handler = handle as *const () as libc::sighandler_t;
            // SAFETY: the handler only counts.
            assert_ne!(unsafe { libc::signal(libc::SIGALRM, handler) }, libc::SIG_ERR);
            // SAFETY: the structure is live; where the old value would go is left out.
            let set = unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const often, core::ptr::null_mut()) };
            assert_eq!(set, 0);
            while HANDLED.load(Ordering::Relaxed) < FEW {
                core::hint::spin_loop();
            }
            let before = HANDLED.load(Ordering::Relaxed);
            // That an ordinary user may drop no capabilities comes after what this is about.
            let prepared = Zygote::new().prepare(true);
            let during = HANDLED.load(Ordering::Relaxed) - before;
            assert!(during < FEW, "{during} handlers ran: {prepared:?}");
            assert!(memory.iter().all(|byte| *byte == 1));
        });
        assert_eq!(ended(zygote), 0, "the child failed");
    }

    #[test]
    fn the_thread_id_is_found_without_the_kernels_help() {
        // SAFETY: the call takes nothing.
        let id = unsafe { libc::gettid() };
        let found = search_thread_id(id);
        assert!(found.is_some());
        if let Some(told) = address_given_to_the_kernel() {
            assert_eq!(found, Some(told));
        }
        assert_eq!(search_thread_id(-1), None);
    }
}
