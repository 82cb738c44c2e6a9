//! The outer wall of one job, written down before any of its processes exists.
//!
//! Read the steps of [`cold`] or [`zygote::warm`] from top to bottom: that is what happens around a job, in that
//! order. Both end in the same [`confine`]; they differ in where the process comes from.

pub(super) mod zygote;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::resource::{Resource, getrlimit};
use sandpiper_shim::abi;
use sandpiper_shim::plan::Step;

use super::host::{Host, PROCESSORS};
use super::identity::{INSIDE, Privilege, Seat};
use super::landlock;
use super::mounts::{DEVICES, Layer, WORK, WRITABLE, file_system, layers_of, mount_proc, writable};
use super::root::Root;
use crate::job::Limits;
use crate::sys::launch;

/// A plan in the making.
#[derive(Clone, Debug, Default)]
pub(super) struct Plan(Vec<u8>);

impl Plan {
    pub(super) fn push(&mut self, step: &Step<'_>) {
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
    pub(super) host: &'a Host,
    pub(super) seat: &'a Seat,
    pub(super) network: bool,
    pub(super) limits: &'a Limits,
    /// The memory limit is kept by a cgroup; else by counting, now and then, what all processes hold.
    pub(super) memory_by_cgroup: bool,
    /// A cgroup gives the job its share of the processor.
    pub(super) processor_by_cgroup: bool,
    /// Open `cgroup.procs` files to enter, as they are numbered in the process that enters.
    pub(super) cgroups: &'a [u64],
    /// The namespace of its control groups, for a process that is let into them later; else it makes its own.
    pub(super) cgroup_namespace: Option<BorrowedFd<'a>>,
}

/// Descriptors that may be under way in a user's sockets while one of its jobs starts: far more than jobs have.
const ROOM_TO_SEND: u64 = 1 << 16;

/// What the origin does: an identity to make namespaces with, and the pid namespace.
pub(super) fn origin(host: &Host) -> Plan {
    origin_as(host, INSIDE, JOB_GOES)
}

fn origin_as(host: &Host, inside: u32, score: &[u8]) -> Plan {
    let mut plan = Plan::default();
    plan.push(&Step::DieWithParent {});
    if host.oom_score {
        goes_first(&mut plan, score);
    }
    if host.privilege == Privilege::None {
        worker_as(&mut plan, inside);
        if host.watches {
            watches(&mut plan);
        }
        plan.push(&Step::Chdir { path: c"/" });
    }
    plan.push(&Step::Unshare { flags: flag(libc::CLONE_NEWPID) });
    plan
}

/// Where the worker's own memory is over, or this machine's, the kernel takes what has this number before all
/// else: a job, with what it started, and never the worker, with every other job. All children have it too.
pub(super) const JOB_GOES: &[u8] = b"1000";
/// A zygote, with which its children's first processes share their memory and would go, goes after every job: they all
/// count as if they had half of the machine's memory more.
pub(super) const ZYGOTE_GOES: &[u8] = b"500";

fn goes_first(plan: &mut Plan, score: &[u8]) {
    // What it says of itself is another user's to a process that is not dumpable.
    plan.push(&Step::Dumpable { value: 1 });
    plan.push(&Step::WriteFile { path: c"/proc/self/oom_score_adj", content: score });
}

/// Whether it can be said.
pub(super) fn oom_trial() -> Plan {
    let mut plan = Plan::default();
    goes_first(&mut plan, JOB_GOES);
    plan
}

/// Inotify instances are counted for a user of the host, up through the owners of user namespaces: without a
/// limit of its own a job uses up the 128 that the worker's user has, root's too.
fn watches(plan: &mut Plan) {
    plan.push(&Step::WriteFile { path: c"/proc/sys/user/max_inotify_instances", content: b"4" });
    plan.push(&Step::WriteFile { path: c"/proc/sys/user/max_inotify_watches", content: b"1024" });
}

/// Whether a new user namespace can have such limits.
pub(super) fn watches_trial() -> Plan {
    let mut plan = Plan::default();
    plan.push(&Step::Dumpable { value: 1 });
    watches(&mut plan);
    plan
}

/// Limits the watches of whoever is in this user namespace, where that can be done.
pub(super) fn limit_watches(namespace: BorrowedFd<'_>) {
    let mut plan = Plan::default();
    plan.push(&Step::Setns { fd: number(namespace), kind: flag(libc::CLONE_NEWUSER) });
    watches(&mut plan);
    if !launch::can(0, plan.bytes()) {
        tracing::warn!("jobs share the inotify instances of the worker's user: /proc/sys cannot be written");
    }
}

/// What init does before it becomes its program: with full privilege it becomes `outside`, which is 0 in the
/// namespace.
pub(super) fn init(privilege: Privilege, namespace: Option<&OwnedFd>, outside: u32) -> Plan {
    let mut plan = Plan::default();
    if privilege == Privilege::Full {
        join(&mut plan, namespace.map(AsFd::as_fd), libc::CLONE_NEWUSER);
        let id = if namespace.is_some() { 0 } else { outside.into() };
        plan.push(&Step::Identity { uid: id, gid: id, keeps_groups: 0 });
    }
    wait_for_ever(&mut plan);
    plan
}

fn wait_for_ever(plan: &mut Plan) {
    plan.push(&Step::Setsid {});
    plan.push(&Step::DefaultSignals {});
    plan.push(&Step::IgnoreChildren {});
    plan.push(&Step::DieWithParent {});
}

/// Prepares a root in a mount namespace that cold jobs join and then copy: what takes some hundred calls is done
/// once. Without its `/proc`, which belongs to a job's own pid namespace.
pub(super) fn prepared_root(host: &Host, root: &Root) -> Plan {
    let mut plan = Plan::default();
    plan.push(&Step::DieWithParent {});
    plan.push(&Step::Unshare { flags: flag(libc::CLONE_NEWNS) });
    file_system(&mut plan, host, root, None);
    plan
}

/// Whether a root with these layers can be built.
pub(super) fn layers_trial(host: &Host, layers: &[Layer]) -> Plan {
    let mut plan = Plan::default();
    if host.privilege == Privilege::None {
        worker_as(&mut plan, INSIDE);
    }
    plan.push(&Step::Unshare { flags: flag(libc::CLONE_NEWNS) });
    file_system(&mut plan, host, &layers_of(layers), None);
    plan
}

/// Joins a namespace and no more, for a trial whether that can be done here.
pub(super) fn joining(namespace: &OwnedFd, kind: i32) -> Plan {
    let mut plan = Plan::default();
    join(&mut plan, Some(namespace.as_fd()), kind);
    plan
}

/// The outer wall of a job that starts cold, on its prepared root where there is one.
pub(super) fn cold(
    job: &Job<'_>,
    root: &Root,
    prepared: Option<&OwnedFd>,
    coarse: &[u8],
    descriptors: &Descriptors<'_>,
) -> Plan {
    let mut plan = Plan::default();
    enter_cgroups(&mut plan, job);
    join(&mut plan, prepared.map(AsFd::as_fd), libc::CLONE_NEWNS);
    join(&mut plan, job.cgroup_namespace, libc::CLONE_NEWCGROUP);
    namespaces(&mut plan, job.network, job.cgroup_namespace.is_none());
    if prepared.is_none() {
        file_system(&mut plan, job.host, root, Some(true));
    } else if root.has_proc() {
        mount_proc(&mut plan, c"/proc", true);
    }
    let owner = match job.host.privilege {
        Privilege::Full => job.seat.outside,
        Privilege::None => INSIDE,
    };
    writable(&mut plan, owner, job.limits.disk_bytes);
    join(&mut plan, job.seat.namespace.as_ref().map(AsFd::as_fd), libc::CLONE_NEWUSER);
    plan.push(&Step::DropBounding {});
    // An ordinary user's init has the job's own uid, and counts.
    let besides = u64::from(job.host.privilege == Privilege::None);
    confine(&mut plan, job, job.seat.inside(job.host.privilege), besides);
    plan.push(&Step::Filter { instructions: coarse });
    plan.push(&Step::DefaultSignals {});
    plan.push(&Step::DieWithParent {});
    start_python(&mut plan, descriptors, abi::FIRST_CLOSED_FD);
    plan
}

/// Makes a namespace of the control groups behind these doors.
pub(super) fn cgroup_namespace(doors: &[OwnedFd]) -> Plan {
    let mut plan = Plan::default();
    plan.push(&Step::DieWithParent {});
    doors.iter().for_each(|door| plan.push(&Step::WriteFd { fd: number(door.as_fd()), content: b"0" }));
    plan.push(&Step::Unshare { flags: flag(libc::CLONE_NEWCGROUP) });
    plan
}

fn enter_cgroups(plan: &mut Plan, job: &Job<'_>) {
    for &fd in job.cgroups {
        plan.push(&Step::WriteFd { fd, content: b"0" });
    }
}

fn namespaces(plan: &mut Plan, network: bool, cgroup: bool) {
    let network = if network { 0 } else { libc::CLONE_NEWNET };
    let cgroup = if cgroup { libc::CLONE_NEWCGROUP } else { 0 };
    let namespaces = libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    plan.push(&Step::Unshare { flags: flag(namespaces | network | cgroup) });
    plan.push(&Step::Hostname { name: c"sandpiper" });
}

/// Joins a namespace, where there is one.
fn join(plan: &mut Plan, namespace: Option<BorrowedFd<'_>>, kind: i32) {
    if let Some(namespace) = namespace {
        plan.push(&Step::Setns { fd: number(namespace), kind: flag(kind) });
    }
}

/// A user namespace in which the worker's own user is `inside`.
fn worker_as(plan: &mut Plan, inside: u32) {
    let ids = [nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw()];
    plan.push(&Step::Chdir { path: c"/proc" });
    own_user_namespace(plan, inside, ids);
}

/// A user namespace of the process's own with one user in it, `inside`, who is `uid` and `gid` outside. The
/// working directory must be a `/proc`.
fn own_user_namespace(plan: &mut Plan, inside: u32, [uid, gid]: [u32; 2]) {
    let map = |id: u32| format!("{inside} {id} 1\n");
    // Its own maps are another user's files to a process that is not dumpable.
    plan.push(&Step::Dumpable { value: 1 });
    plan.push(&Step::Unshare { flags: flag(libc::CLONE_NEWUSER) });
    for (path, content) in
        [(c"self/setgroups", "deny".to_owned()), (c"self/gid_map", map(gid)), (c"self/uid_map", map(uid))]
    {
        plan.push(&Step::WriteFile { path, content: content.as_bytes() });
    }
}

/// Nobody, with nothing: what every job's process is from here on. `besides` processes of ours count as the job's.
fn confine(plan: &mut Plan, job: &Job<'_>, id: u32, besides: u64) {
    let keeps_groups = (job.host.privilege == Privilege::None).into();
    plan.push(&Step::Identity { uid: id.into(), gid: id.into(), keeps_groups });
    plan.push(&Step::DropCapabilities {});
    resources(plan, job, besides);
    if !job.processor_by_cgroup {
        plan.push(&Step::Nice { value: BEHIND_THE_WORKER });
    }
    plan.push(&Step::Setsid {});
    plan.push(&Step::Umask { mask: 0o022 });
    plan.push(&Step::NoNewPrivileges {});
    landlock::steps(job.host.landlock, job.network, &WRITABLE.map(|(path, _)| path), &DEVICES)
        .iter()
        .for_each(|step| plan.push(step));
    plan.push(&Step::OpenDirectory { to: flag(abi::WORK_FD), path: WORK });
    // After everything that opens files: until its last step the process has the worker's own open as well.
    let (resource, limit) = (libc::RLIMIT_NOFILE.into(), job.limits.open_files);
    // The lockdown takes the difference away once its descriptors are sent; see there.
    let room = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(_, hard)| hard.min(ROOM_TO_SEND));
    plan.push(&Step::Rlimit { resource, soft: limit, hard: limit.max(room) });
}

fn start_python(plan: &mut Plan, descriptors: &Descriptors<'_>, first_closed: i32) {
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
    plan.push(&Step::CloseFrom { first: flag(first_closed) });
}

/// Address space of each process, and what of it is private and can be written to. Allocators and WebAssembly reserve
/// gigabytes that they never touch.
fn reserved(memory_bytes: u64) -> [u64; 2] {
    [memory_bytes.saturating_mul(64).max(16 << 30); 2]
}

/// Where nothing but a look now and then keeps the limit: stacks of threads and buffers of BLAS are private and
/// writable, mostly not touched, and more of them where there are more processors.
fn reserved_without_cgroup(memory_bytes: u64) -> [u64; 2] {
    let buffers = u64::from(*PROCESSORS) * (64 << 20);
    [memory_bytes.saturating_mul(32).max(1 << 30), memory_bytes.saturating_mul(2).saturating_add(buffers)]
}

/// What a job's processes stand behind the worker by, where no cgroup shares the processor: about a third of its share.
const BEHIND_THE_WORKER: u64 = 5;

fn resources(plan: &mut Plan, job: &Job<'_>, besides: u64) {
    let limits = job.limits;
    // In whole seconds, and only a backstop: the worker itself looks at the clock.
    let cpu = limits.cpu_ms.div_ceil(1000).saturating_add(1);
    let processes = limits.processes + besides;
    let mut values = vec![
        (libc::RLIMIT_CORE, job.host.core),
        (libc::RLIMIT_CPU, cpu),
        (libc::RLIMIT_FSIZE, limits.disk_bytes),
        (libc::RLIMIT_MEMLOCK, 64 << 10),
        (libc::RLIMIT_MSGQUEUE, 0),
        (libc::RLIMIT_NICE, 0),
        (libc::RLIMIT_NPROC, processes),
        (libc::RLIMIT_RTPRIO, 0),
        (libc::RLIMIT_SIGPENDING, 1024),
        (libc::RLIMIT_STACK, 8 << 20),
    ];
    // Address space is promised, not used. Where the kernel keeps its promises (`vm.overcommit_memory` of 2), or where
    // nothing but a look now and then keeps the limit, there is an end to it all the same.
    let reserved = if job.memory_by_cgroup { reserved } else { reserved_without_cgroup };
    let [all, writable] = reserved(limits.memory_bytes);
    values.push((libc::RLIMIT_AS, all));
    values.push((libc::RLIMIT_DATA, writable));
    for (resource, value) in values {
        plan.push(&Step::Rlimit { resource: resource.into(), soft: value, hard: value });
    }
}

/// The number that a descriptor of an order has in the zygote, by its place in the order.
pub(super) fn place(at: u64) -> u64 {
    flag(abi::ORDER_FD) + at
}

pub(super) fn number(fd: BorrowedFd<'_>) -> u64 {
    fd.as_raw_fd().unsigned_abs().into()
}

/// Flags and descriptor numbers, which libc has as signed numbers and which are never negative.
fn flag(value: i32) -> u64 {
    value.unsigned_abs().into()
}
