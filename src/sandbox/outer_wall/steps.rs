//! Steps that cold and warm starts share: namespaces, identities, and what the kernel is told of a process.

use std::os::fd::BorrowedFd;

use sandpiper_shim::abi;
use sandpiper_shim::plan::Step;

use super::plan::{Plan, flag, number};
use super::{ConfinedJob, Descriptors};
use crate::sandbox::host::{Host, Privilege};

/// What the namespace helper does: an identity to make namespaces with, and the pid namespace. An ordinary user is
/// `inside` in it.
pub(super) fn origin_as(host: &Host, inside: u32, score: &[u8]) -> Plan {
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
pub(in crate::sandbox) const JOB_GOES: &[u8] = b"1000";
/// A zygote, with which its children's first processes share their memory and would go, goes after every job: they all
/// count as if they had half of the machine's memory more.
pub(in crate::sandbox) const ZYGOTE_GOES: &[u8] = b"500";

pub(super) fn goes_first(plan: &mut Plan, score: &[u8]) {
    // What it says of itself is another user's to a process that is not dumpable.
    plan.push(&Step::Dumpable { value: 1 });
    plan.push(&Step::WriteFile { path: c"/proc/self/oom_score_adj", content: score });
}

/// Inotify instances are counted for a user of the host, up through the owners of user namespaces: without a
/// limit of its own a job uses up the 128 that the worker's user has, root's too.
pub(super) fn watches(plan: &mut Plan) {
    plan.push(&Step::WriteFile { path: c"/proc/sys/user/max_inotify_instances", content: b"4" });
    plan.push(&Step::WriteFile { path: c"/proc/sys/user/max_inotify_watches", content: b"1024" });
}

pub(super) fn wait_for_ever(plan: &mut Plan) {
    plan.push(&Step::Setsid {});
    plan.push(&Step::DefaultSignals {});
    plan.push(&Step::IgnoreChildren {});
    plan.push(&Step::DieWithParent {});
}

pub(super) fn enter_cgroups(plan: &mut Plan, job: &ConfinedJob<'_>) {
    for &fd in job.cgroups {
        plan.push(&Step::WriteFd { fd, content: b"0" });
    }
}

pub(super) fn namespaces(plan: &mut Plan, network: bool, cgroup: bool) {
    let network = if network { 0 } else { libc::CLONE_NEWNET };
    let cgroup = if cgroup { libc::CLONE_NEWCGROUP } else { 0 };
    let namespaces = libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    plan.push(&Step::Unshare { flags: flag(namespaces | network | cgroup) });
    plan.push(&Step::Hostname { name: c"sandpiper" });
}

/// Joins a namespace, where there is one.
pub(super) fn join(plan: &mut Plan, namespace: Option<BorrowedFd<'_>>, kind: i32) {
    if let Some(namespace) = namespace {
        plan.push(&Step::Setns { fd: number(namespace), kind: flag(kind) });
    }
}

/// A user namespace in which the worker's own user is `inside`.
pub(super) fn worker_as(plan: &mut Plan, inside: u32) {
    let ids = [nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw()];
    plan.push(&Step::Chdir { path: c"/proc" });
    own_user_namespace(plan, inside, ids);
}

/// A user namespace of the process's own with one user in it, `inside`, who is `uid` and `gid` outside. The
/// working directory must be a `/proc`.
pub(super) fn own_user_namespace(plan: &mut Plan, inside: u32, [uid, gid]: [u32; 2]) {
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

pub(super) fn start_python(plan: &mut Plan, descriptors: &Descriptors<'_>, first_closed: i32) {
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
