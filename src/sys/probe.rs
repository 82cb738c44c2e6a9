//! Tries what the sandbox needs of the kernel, each thing for real and in a child that is thrown away.
//!
//! Nothing of this touches the caller: every attempt forks, does its system calls and exits, reporting the
//! step that failed and its errno over a pipe. Forking is only sound here while the process has one thread,
//! because the child goes on to allocate; that is checked, not assumed.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, fork, getegid, geteuid, pipe, pivot_root};

/// The step that failed and what the kernel said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failed {
    /// A fragment such as `mount proc`.
    pub step: String,
    /// The kernel's answer; 0 where it was something else, which the step then tells.
    pub errno: i32,
}

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.errno {
            0 => f.write_str(&self.step),
            errno => write!(f, "{}: {}", self.step, Errno::from_raw(errno)),
        }
    }
}

impl std::error::Error for Failed {}

type Tried = Result<(), Failed>;

/// Names the step that a call was made for.
trait Step<T> {
    fn step(self, step: &str) -> Result<T, Failed>;
}

impl<T> Step<T> for nix::Result<T> {
    fn step(self, step: &str) -> Result<T, Failed> {
        self.map_err(|errno| Failed { step: step.into(), errno: errno as i32 })
    }
}

impl<T> Step<T> for io::Result<T> {
    fn step(self, step: &str) -> Result<T, Failed> {
        self.map_err(|error| match error.raw_os_error() {
            Some(errno) => Failed { step: step.into(), errno },
            None => Failed { step: format!("{step}: {error}"), errno: 0 },
        })
    }
}

/// A namespace that can be tried on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Namespace {
    /// Mounts.
    Mount,
    /// Process ids.
    Pid,
    /// System V IPC and message queues.
    Ipc,
    /// Host name.
    Uts,
    /// Network.
    Network,
    /// Control groups.
    Cgroup,
}

impl Namespace {
    fn flag(self) -> CloneFlags {
        match self {
            Self::Mount => CloneFlags::CLONE_NEWNS,
            Self::Pid => CloneFlags::CLONE_NEWPID,
            Self::Ipc => CloneFlags::CLONE_NEWIPC,
            Self::Uts => CloneFlags::CLONE_NEWUTS,
            Self::Network => CloneFlags::CLONE_NEWNET,
            Self::Cgroup => CloneFlags::CLONE_NEWCGROUP,
        }
    }
}

/// A user namespace of our own, with one user in it.
pub fn user_namespace() -> Tried {
    in_child(become_root_of_a_new_user_namespace)
}

/// A further namespace, inside a new user namespace where `with_user`.
pub fn namespace(kind: Namespace, with_user: bool) -> Tried {
    in_child(|| isolate(kind.flag(), with_user, "create the namespace"))
}

/// A size- and inode-capped tmpfs.
pub fn tmpfs(with_user: bool) -> Tried {
    in_child(|| {
        isolate(CloneFlags::CLONE_NEWNS, with_user, "create a mount namespace")?;
        mount_tmpfs()
    })
}

/// A root of our own, with the old one gone.
pub fn new_root(with_user: bool) -> Tried {
    in_child(|| {
        isolate(CloneFlags::CLONE_NEWNS, with_user, "create a mount namespace")?;
        mount_tmpfs()?;
        std::env::set_current_dir(SCRATCH).step("enter the tmpfs")?;
        pivot_root(".", ".").step("pivot_root")?;
        nix::mount::umount2(".", nix::mount::MntFlags::MNT_DETACH).step("detach the old root")
    })
}

/// An overlay of two directories that nobody writes to.
pub fn overlay(with_user: bool) -> Tried {
    in_child(|| {
        isolate(CloneFlags::CLONE_NEWNS, with_user, "create a mount namespace")?;
        mount_tmpfs()?;
        let [empty, over] = ["empty", "over"].map(|name| format!("{SCRATCH}/{name}"));
        std::fs::create_dir(&empty).and_then(|()| std::fs::create_dir(&over)).step("make directories")?;
        let layers = format!("lowerdir=/usr:{empty}");
        mount(Some("overlay"), over.as_str(), Some("overlay"), MsFlags::MS_NOSUID, Some(layers.as_str()))
            .step("mount overlay")
    })
}

/// A /proc of our own that shows only processes.
pub fn proc(with_user: bool) -> Tried {
    in_child(|| {
        let flags = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID;
        isolate(flags, with_user, "create mount and pid namespaces")?;
        // Only a member of the new pid namespace may mount its proc.
        in_child(|| {
            mount_private()?;
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
            mount(Some("proc"), "/proc", Some("proc"), flags, Some("subset=pid")).step("mount proc")
        })
    })
}

/// Several uids in one user namespace, by our own right.
pub fn several_uids(first: u32) -> Tried {
    let (mut entered, enter) = io_pipe()?;
    let (leave, left) = io_pipe()?;
    only_thread()?;
    // SAFETY: this process has one thread (checked above), so the child may allocate and use std; it leaves
    // by _exit below, without running anything of the parent's.
    match unsafe { fork() }.step("fork")? {
        ForkResult::Child => {
            drop((entered, left));
            let made = unshare(CloneFlags::CLONE_NEWUSER).is_ok();
            drop((&enter).write_all(&[u8::from(made)]));
            drop((&leave).read(&mut [0]));
            exit();
        }
        ForkResult::Parent { child } => {
            drop((enter, leave));
            let mut made = [0];
            let tried = match entered.read(&mut made) {
                Ok(1) if made == [1] => map_several(child.as_raw(), first),
                _ => Err(Failed { step: "create a user namespace".into(), errno: 0 }),
            };
            drop(left);
            waitpid(child, None).step("wait for the probe")?;
            tried
        }
    }
}

fn map_several(pid: i32, first: u32) -> Tried {
    let map = format!("0 {} 1\n1 {first} 2\n", geteuid());
    std::fs::write(format!("/proc/{pid}/uid_map"), map).step("map uids")
}

/// Entering control groups by their `cgroup.procs` files.
pub fn entering(doors: &[BorrowedFd<'_>]) -> Tried {
    in_child(|| {
        doors
            .iter()
            .try_for_each(|door| nix::unistd::write(door, b"0").map(drop))
            .step("write to cgroup.procs")
    })
}

/// A seccomp filter.
pub fn seccomp() -> Tried {
    in_child(|| install_filter(0).map(drop))
}

/// A seccomp filter whose verdicts another process gives.
pub fn seccomp_notify() -> Tried {
    in_child(|| install_filter(libc::SECCOMP_FILTER_FLAG_NEW_LISTENER).map(drop))
}

/// The Landlock version that the kernel speaks; 0 where it has none.
pub fn landlock_abi() -> u32 {
    const VERSION: libc::c_long = 1;
    // SAFETY: with the version flag the kernel takes a null attribute of size 0 and only returns a number.
    let abi = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0, VERSION) };
    u32::try_from(abi).unwrap_or(0)
}

/// Whether there is `mount_setattr`, or a container's filter says that there is.
pub fn mount_setattr() -> bool {
    let nothing = std::ptr::null::<libc::c_void>();
    // SAFETY: a structure of no bytes is refused before anything is read.
    let asked = unsafe { libc::syscall(libc::SYS_mount_setattr, -1, nothing, 0, nothing, 0) };
    Errno::result(asked) == Err(Errno::EINVAL)
}

/// Closing a range of descriptors: here one that nobody can have.
pub fn close_range() -> Tried {
    // SAFETY: the call takes numbers; no descriptor has this one.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, u32::MAX, u32::MAX, 0) };
    Errno::result(closed).map(drop).step("close_range")
}

/// A process by descriptor, and a signal through it.
pub fn pidfd() -> Tried {
    // SAFETY: two integers go in, a new descriptor or an error comes out.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, std::process::id(), 0) };
    let fd = owned(fd).step("pidfd_open")?;
    let none = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: signal 0 is delivered to nobody, and a null siginfo is allowed.
    let sent = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd.as_raw_fd(), 0, none, 0) };
    Errno::result(sent).map(drop).step("pidfd_send_signal")
}

/// Opening a path that may neither leave its directory nor follow a link.
pub fn openat2_beneath() -> Tried {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    openat2(AT_FDCWD, ".", how).map(drop).step("openat2")
}

/// A filter around us refuses `unshare` even where it is asked for nothing.
pub fn unshare_is_filtered() -> bool {
    unshare(CloneFlags::empty()).is_err()
}

/// A filter around us refuses `mount`: the kernel would first have missed the place, before it asks for rights.
pub fn mount_is_filtered() -> bool {
    mount(None::<&str>, "", None::<&str>, MsFlags::empty(), None::<&str>) != Err(Errno::ENOENT)
}

/// A filter around us answers `clone3` as if it were forbidden, not as if there were none.
pub fn clone3_is_refused() -> bool {
    // SAFETY: arguments of size 0 are refused before they are read, and nothing is started.
    let tried = unsafe { libc::syscall(libc::SYS_clone3, std::ptr::null::<u8>(), 0) };
    Errno::result(tried) == Err(Errno::EPERM)
}

/// Where a probe mounts, in a mount namespace of its own.
const SCRATCH: &str = "/tmp";

fn isolate(flags: CloneFlags, with_user: bool, step: &str) -> Tried {
    if with_user {
        become_root_of_a_new_user_namespace()?;
    }
    unshare(flags).step(step)
}

fn become_root_of_a_new_user_namespace() -> Tried {
    let (uid, gid) = (geteuid(), getegid());
    unshare(CloneFlags::CLONE_NEWUSER).step("create a user namespace")?;
    // Without this an ordinary user may not map a gid at all.
    std::fs::write("/proc/self/setgroups", "deny").step("deny setgroups")?;
    std::fs::write("/proc/self/uid_map", format!("0 {uid} 1")).step("map our uid")?;
    std::fs::write("/proc/self/gid_map", format!("0 {gid} 1")).step("map our gid")
}

fn mount_private() -> Tried {
    let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, flags, None::<&str>).step("make mounts private")
}

fn mount_tmpfs() -> Tried {
    mount_private()?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), SCRATCH, Some("tmpfs"), flags, Some("size=1m,nr_inodes=64")).step("mount a tmpfs")
}

/// Sets a filter that allows everything; with the listener flag, returns the listener.
fn install_filter(flags: libc::c_ulong) -> Result<Option<OwnedFd>, Failed> {
    const RETURN: u16 = 0x06; // BPF_RET | BPF_K
    nix::sys::prctl::set_no_new_privs().step("set no_new_privs")?;
    let mut allow = libc::sock_filter { code: RETURN, jt: 0, jf: 0, k: libc::SECCOMP_RET_ALLOW };
    let program = libc::sock_fprog { len: 1, filter: &raw mut allow };
    // SAFETY: the program points at one instruction that outlives the call; the kernel copies and checks it.
    let set =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    if flags & libc::SECCOMP_FILTER_FLAG_NEW_LISTENER == 0 {
        return Errno::result(set).map(|_| None).step("set a filter");
    }
    owned(set).map(Some).step("set a filter with a listener")
}

fn owned(fd: libc::c_long) -> nix::Result<OwnedFd> {
    let fd = Errno::result(fd)?;
    let fd = i32::try_from(fd).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel just made this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn io_pipe() -> Result<(std::fs::File, std::fs::File), Failed> {
    let (read, write) = pipe().step("open a pipe")?;
    Ok((read.into(), write.into()))
}

fn only_thread() -> Tried {
    let threads = std::fs::read_dir("/proc/self/task").step("count our threads")?.count();
    if threads == 1 {
        return Ok(());
    }
    Err(Failed {
        step: format!("not tried: it needs a process with one thread, this one has {threads}"),
        errno: 0,
    })
}

fn exit() -> ! {
    // SAFETY: ends this process at once; nothing of the parent's (buffers, exit handlers) runs.
    unsafe { libc::_exit(0) }
}

/// Does `attempt` in a child and brings its answer back.
fn in_child(attempt: impl FnOnce() -> Tried) -> Tried {
    let (mut answer, tell) = io_pipe()?;
    only_thread()?;
    // SAFETY: this process has one thread (checked above), so the child may allocate and use std; it leaves
    // by _exit, without running anything of the parent's.
    match unsafe { fork() }.step("fork")? {
        ForkResult::Child => {
            drop(answer);
            let message = match attempt() {
                Ok(()) => vec![1],
                Err(failed) => [&[0][..], &failed.errno.to_le_bytes(), failed.step.as_bytes()].concat(),
            };
            drop((&tell).write_all(&message));
            exit();
        }
        ForkResult::Parent { child } => {
            drop(tell);
            let mut message = Vec::new();
            let read = answer.read_to_end(&mut message).step("hear from the probe");
            waitpid(child, None).step("wait for the probe")?;
            read?;
            understand(&message)
        }
    }
}

fn understand(message: &[u8]) -> Tried {
    match message {
        [1] => Ok(()),
        [0, a, b, c, d, step @ ..] => Err(Failed {
            step: String::from_utf8_lossy(step).into_owned(),
            errno: i32::from_le_bytes([*a, *b, *c, *d]),
        }),
        _ => Err(Failed { step: "the probe was killed".into(), errno: 0 }),
    }
}
