//! The outer wall of one job, written down before any of its processes exists.
//!
//! Read the steps of [`wall`] from top to bottom: that is what happens around a job, in that order.

use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use sandpiper_shim::abi;
use sandpiper_shim::plan::Step;

use super::identity::{INSIDE, Privilege, Seat};
use super::landlock;
use super::root::{Entry, Root};
use crate::job::Limits;
use crate::sys::launch;

/// A plan in the making.
#[derive(Clone, Debug, Default)]
pub(super) struct Plan(Vec<u8>);

impl Plan {
    fn push(&mut self, step: &Step<'_>) {
        step.encode(&mut self.0);
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Descriptors that python starts with, as they are numbered in the worker.
#[derive(Debug)]
pub(super) struct Descriptors<'a> {
    pub(super) script: BorrowedFd<'a>,
    pub(super) stdin: BorrowedFd<'a>,
    pub(super) stdout: BorrowedFd<'a>,
    pub(super) stderr: BorrowedFd<'a>,
    pub(super) control: BorrowedFd<'a>,
    pub(super) policy: BorrowedFd<'a>,
}

/// What a job's wall depends on.
#[derive(Debug)]
pub(super) struct Job<'a> {
    pub(super) privilege: Privilege,
    pub(super) seat: &'a Seat,
    pub(super) root: &'a Root,
    pub(super) network: bool,
    pub(super) limits: &'a Limits,
    /// The memory limit is kept by a cgroup; else by the size of each process's address space.
    pub(super) memory_by_cgroup: bool,
    /// Open `cgroup.procs` files to enter.
    pub(super) cgroups: &'a [BorrowedFd<'a>],
    pub(super) coarse: &'a [u8],
    pub(super) landlock: landlock::Support,
    pub(super) descriptors: Descriptors<'a>,
}

const READ_ONLY: u64 = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
const PRIVATE: u64 = libc::MS_REC | libc::MS_PRIVATE;
const BIND: u64 = libc::MS_BIND | libc::MS_REC;
const NOTHING: &CStr = c"";

/// The job's own processes and nothing about the machine.
const PROC: u64 = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC | libc::MS_RDONLY;
const PROC_OPTIONS: &CStr = c"subset=pid,hidepid=invisible";

/// The new root while it is being built, and the host's own meanwhile.
const NEW: &str = "/new";
const OLD: &str = "/old";

/// Where a job may write; all three lie in one small file system.
const WRITABLE: [&CStr; 3] = [c"/work", c"/tmp", c"/dev/shm"];
/// The devices that there are.
const DEVICES: [&CStr; 5] = [c"/dev/null", c"/dev/zero", c"/dev/full", c"/dev/random", c"/dev/urandom"];
/// Files of any kind in the writable file system: an inode costs the kernel about a KiB.
const INODES: u64 = 16_384;

/// Whether an own `/proc` can be mounted here: containers that mask theirs do not allow it.
pub(super) fn can_mount_proc(privilege: Privilege) -> bool {
    let mut plan = Plan::default();
    for step in [
        Step::Mount { flags: PRIVATE, source: c"none", target: c"/", fstype: NOTHING, options: NOTHING },
        Step::Mount {
            flags: PROC,
            source: c"proc",
            target: c"/proc",
            fstype: c"proc",
            options: PROC_OPTIONS,
        },
    ] {
        plan.push(&step);
    }
    let user = if privilege == Privilege::None { libc::CLONE_NEWUSER } else { 0 };
    launch::can(user | libc::CLONE_NEWNS | libc::CLONE_NEWPID, plan.bytes())
}

/// What the origin does: an identity to make namespaces with, and the pid namespace.
///
/// `limits_watches`: the kernel lets the job's user namespace have limits of its own.
pub(super) fn origin(privilege: Privilege, limits_watches: bool) -> Plan {
    let mut plan = Plan::default();
    plan.push(&Step::DieWithParent {});
    if privilege == Privilege::None {
        let map = |id: u32| format!("{INSIDE} {id} 1\n");
        let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        // Its own maps are another user's files to a process that is not dumpable.
        plan.push(&Step::Dumpable { value: 1 });
        plan.push(&Step::Unshare { flags: flag(libc::CLONE_NEWUSER) });
        for (path, content) in [
            (c"/proc/self/setgroups", "deny".to_owned()),
            (c"/proc/self/gid_map", map(gid)),
            (c"/proc/self/uid_map", map(uid)),
        ] {
            plan.push(&Step::WriteFile { path, content: content.as_bytes() });
        }
    }
    if privilege == Privilege::None && limits_watches {
        watches(&mut plan);
    }
    plan.push(&Step::Unshare { flags: flag(libc::CLONE_NEWPID) });
    plan
}

/// Inotify instances are counted for a user of the host, up through the owners of user namespaces: without a limit
/// of its own a job uses up the 128 that the worker's user has, root's too.
fn watches(plan: &mut Plan) {
    plan.push(&Step::WriteFile { path: c"/proc/sys/user/max_inotify_instances", content: b"4" });
    plan.push(&Step::WriteFile { path: c"/proc/sys/user/max_inotify_watches", content: b"1024" });
}

/// Limits the watches of whoever is in this user namespace; false where `/proc/sys` cannot be written.
pub(super) fn limit_watches(namespace: BorrowedFd<'_>) -> bool {
    let mut plan = Plan::default();
    plan.push(&Step::Setns { fd: number(namespace), kind: flag(libc::CLONE_NEWUSER) });
    watches(&mut plan);
    launch::can(0, plan.bytes())
}

/// Whether an ordinary user's jobs can have such limits.
pub(super) fn can_limit_watches() -> bool {
    let mut plan = Plan::default();
    plan.push(&Step::Dumpable { value: 1 });
    watches(&mut plan);
    launch::can(libc::CLONE_NEWUSER, plan.bytes())
}

/// What init does before it becomes its program.
pub(super) fn init(privilege: Privilege, seat: &Seat) -> Plan {
    let mut plan = Plan::default();
    if privilege == Privilege::Full {
        let mut id = seat.init_outside;
        if let Some(namespace) = &seat.namespace {
            let fd = namespace.as_raw_fd().unsigned_abs().into();
            plan.push(&Step::Setns { fd, kind: flag(libc::CLONE_NEWUSER) });
            id = 0;
        }
        plan.push(&Step::Identity { uid: id.into(), gid: id.into(), keeps_groups: 0 });
    }
    plan.push(&Step::Setsid {});
    plan.push(&Step::DefaultSignals {});
    plan.push(&Step::IgnoreChildren {});
    plan.push(&Step::DieWithParent {});
    plan
}

/// The job's outer wall.
pub(super) fn wall(job: &Job<'_>) -> Plan {
    let mut plan = Plan::default();
    for cgroup in job.cgroups {
        plan.push(&Step::WriteFd { fd: number(*cgroup), content: b"0" });
    }
    let network = if job.network { 0 } else { libc::CLONE_NEWNET };
    let namespaces = libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::CLONE_NEWCGROUP;
    plan.push(&Step::Unshare { flags: flag(namespaces | network) });
    plan.push(&Step::Hostname { name: c"sandpiper" });
    file_system(&mut plan, job);
    identity(&mut plan, job);
    resources(&mut plan, job);
    plan.push(&Step::Setsid {});
    plan.push(&Step::Umask { mask: 0o022 });
    plan.push(&Step::NoNewPrivileges {});
    landlock::steps(job.landlock, job.network, &WRITABLE, &DEVICES).iter().for_each(|step| plan.push(step));
    plan.push(&Step::Filter { instructions: job.coarse });
    plan.push(&Step::DefaultSignals {});
    plan.push(&Step::DieWithParent {});
    let descriptors = &job.descriptors;
    for (from, to) in [
        (descriptors.script, abi::SCRIPT_FD),
        (descriptors.stdout, 1),
        (descriptors.stderr, 2),
        (descriptors.control, abi::CONTROL_FD),
        (descriptors.stdin, abi::STDIN_FD),
        (descriptors.policy, abi::POLICY_FD),
    ] {
        plan.push(&Step::Duplicate { from: number(from), to: flag(to) });
    }
    plan.push(&Step::CloseFrom { first: flag(abi::FIRST_CLOSED_FD) });
    plan
}

/// A root of the interpreter's own, read-only, with one small writable file system in it.
fn file_system(plan: &mut Plan, job: &Job<'_>) {
    let mount = |plan: &mut Plan, source: &CStr, target: &CStr, fstype: &CStr, flags: u64, options: &CStr| {
        plan.push(&Step::Mount { flags, source, target, fstype, options });
    };
    let no_suid = libc::MS_NOSUID | libc::MS_NODEV;
    // Nothing that is mounted from here on reaches the host.
    mount(plan, c"none", c"/", NOTHING, PRIVATE, NOTHING);
    // A place to stand while both roots are needed: every path of the host stays reachable below /old.
    mount(plan, c"tmpfs", c"/tmp", c"tmpfs", no_suid, c"size=64k,mode=0755");
    for path in [c"/tmp/old", c"/tmp/new", c"/tmp/write"] {
        plan.push(&Step::Mkdir { mode: 0o755, path });
    }
    plan.push(&Step::PivotRoot { new: c"/tmp", old: c"/tmp/old" });

    mount(plan, c"tmpfs", c"/new", c"tmpfs", no_suid, c"size=1m,mode=0755");
    for (path, entry) in &job.root.entries {
        let (new, old) = (below(NEW, path), below(OLD, path));
        match entry {
            Entry::Directory => plan.push(&Step::Mkdir { mode: 0o755, path: &new }),
            Entry::Link(target) => plan.push(&Step::Symlink { target: &c_path(target), path: &new }),
            Entry::File(content) => {
                plan.push(&Step::CreateFile { mode: 0o644, path: &new, content: content.as_bytes() });
            }
            Entry::HostDirectory => {
                plan.push(&Step::Mkdir { mode: 0o755, path: &new });
                mount(plan, &old, &new, NOTHING, BIND, NOTHING);
            }
            Entry::HostFile => {
                plan.push(&Step::CreateFile { mode: 0o644, path: &new, content: b"" });
                mount(plan, &old, &new, NOTHING, BIND, NOTHING);
            }
            Entry::HostFileFrom(file) => {
                plan.push(&Step::CreateFile { mode: 0o644, path: &new, content: b"" });
                mount(plan, &below(OLD, file), &new, NOTHING, BIND, NOTHING);
            }
            Entry::Proc => plan.push(&Step::Mkdir { mode: 0o555, path: &new }),
        }
    }
    for device in DEVICES {
        plan.push(&Step::CreateFile { mode: 0o644, path: &below(NEW, as_path(device)), content: b"" });
    }
    // Everything so far, with whatever the host has mounted inside of it.
    plan.push(&Step::MountAttributes { set: READ_ONLY, target: c"/new" });
    for device in DEVICES {
        let (new, old) = (below(NEW, as_path(device)), below(OLD, as_path(device)));
        mount(plan, &old, &new, NOTHING, BIND, NOTHING);
    }
    if job.root.entries.contains_key(Path::new("/proc")) {
        mount(plan, c"proc", c"/new/proc", c"proc", PROC, PROC_OPTIONS);
    }

    // One file system for all that the job writes, so that one size holds for it all.
    let owner = match job.privilege {
        Privilege::Full => job.seat.outside,
        Privilege::None => INSIDE,
    };
    let options = format!("size={},nr_inodes={INODES},mode=0755", job.limits.disk_bytes);
    mount(plan, c"tmpfs", c"/write", c"tmpfs", no_suid, &c_string(options));
    for (at, target) in WRITABLE.iter().enumerate() {
        let part = c_string(format!("/write/{at}"));
        plan.push(&Step::Mkdir { mode: 0o700, path: &part });
        plan.push(&Step::Chown { uid: owner.into(), gid: owner.into(), path: &part });
        mount(plan, &part, &below(NEW, as_path(target)), NOTHING, BIND, NOTHING);
    }
    plan.push(&Step::EnterRoot { new: c"/new" });
}

/// Nobody, with nothing.
fn identity(plan: &mut Plan, job: &Job<'_>) {
    if let Some(namespace) = &job.seat.namespace {
        let fd = namespace.as_raw_fd().unsigned_abs().into();
        plan.push(&Step::Setns { fd, kind: flag(libc::CLONE_NEWUSER) });
    }
    plan.push(&Step::DropBounding {});
    let id = job.seat.inside(job.privilege).into();
    let keeps_groups = (job.privilege == Privilege::None).into();
    plan.push(&Step::Identity { uid: id, gid: id, keeps_groups });
    plan.push(&Step::DropCapabilities {});
}

fn resources(plan: &mut Plan, job: &Job<'_>) {
    let limits = job.limits;
    // In whole seconds, and only a backstop: the worker itself looks at the clock.
    let cpu = limits.cpu_ms.div_ceil(1000).saturating_add(1);
    // An ordinary user's init has the job's own uid, and counts.
    let processes = limits.processes + u64::from(job.privilege == Privilege::None);
    let mut values = vec![
        (libc::RLIMIT_CORE, 0),
        (libc::RLIMIT_CPU, cpu),
        (libc::RLIMIT_FSIZE, limits.disk_bytes),
        (libc::RLIMIT_MEMLOCK, 64 << 10),
        (libc::RLIMIT_MSGQUEUE, 0),
        (libc::RLIMIT_NICE, 0),
        (libc::RLIMIT_NOFILE, open_files(job.privilege, job.seat).unwrap_or(limits.open_files)),
        (libc::RLIMIT_NPROC, processes),
        (libc::RLIMIT_RTPRIO, 0),
        (libc::RLIMIT_SIGPENDING, 1024),
        (libc::RLIMIT_STACK, 8 << 20),
    ];
    if !job.memory_by_cgroup {
        values.push((libc::RLIMIT_AS, limits.memory_bytes));
    }
    for (resource, value) in values {
        plan.push(&Step::Rlimit { resource: resource.into(), soft: value, hard: value });
    }
}

/// How many descriptors a process may have until it is locked down; none where that is the job's own limit.
///
/// The kernel lets nobody send a descriptor whose user has more of them in flight than this. A job can have as
/// many in flight as its limit, and where workers or jobs share a uid, the next one could not send its listener.
/// So the limit comes down afterwards, from outside, which takes power over the job's user namespace.
pub(super) fn open_files(privilege: Privilege, seat: &Seat) -> Option<u64> {
    let own_namespace = privilege == Privilege::None || seat.namespace.is_some();
    let (_, hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).ok()?;
    own_namespace.then_some(hard)
}

fn number(fd: BorrowedFd<'_>) -> u64 {
    fd.as_raw_fd().unsigned_abs().into()
}

/// Flags and descriptor numbers, which libc has as signed numbers and which are never negative.
fn flag(value: i32) -> u64 {
    value.unsigned_abs().into()
}

fn as_path(path: &CStr) -> &Path {
    Path::new(std::ffi::OsStr::from_bytes(path.to_bytes()))
}

fn below(root: &str, path: &Path) -> CString {
    let mut joined = root.as_bytes().to_vec();
    joined.extend_from_slice(path.as_os_str().as_bytes());
    c_string(joined)
}

fn c_path(path: &Path) -> CString {
    c_string(path.as_os_str().as_bytes())
}

/// Paths come from the file system or from a checked configuration: none holds a NUL.
fn c_string(bytes: impl Into<Vec<u8>>) -> CString {
    CString::new(bytes).unwrap_or_default()
}
