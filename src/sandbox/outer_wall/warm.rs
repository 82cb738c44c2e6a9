//! The walls of a zygote and of the jobs that it starts, which stand behind its own already.

use std::os::fd::{AsFd, OwnedFd};

use sandpiper_shim::abi;
use sandpiper_shim::plan::Step;

use super::mounts::{file_system, mount_proc, scratch, writable};
use super::plan::{Plan, flag, place};
use super::rootfs::Root;
use super::steps::{
    ZYGOTE_GOES, enter_cgroups, goes_first, join, namespaces, origin_as, own_user_namespace, start_python,
    wait_for_ever,
};
use super::{ConfinedJob, Descriptors, INSIDE, confine};
use crate::sandbox::host::{Host, Privilege};

/// The `/proc` in which a warm child writes its maps.
#[derive(Clone, Copy, Debug)]
pub(in crate::sandbox) enum ProcSource {
    /// The zygote's own; a new one comes to lie on it, which is the job's.
    Own,
    /// The worker's, whose descriptor comes with the order: the job has none.
    Lent(u64),
    /// The job has none, and no maps to write.
    None,
}

/// The outer wall of a job that a zygote starts, which stands behind one already.
pub(in crate::sandbox) fn wall(job: &ConfinedJob<'_>, proc: ProcSource) -> Plan {
    let mut plan = Plan::default();
    enter_cgroups(&mut plan, job);
    // The network is the zygote's own, which has none.
    let namespaces = libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWCGROUP;
    plan.push(&Step::Unshare { flags: flag(namespaces) });
    let owner = match job.host.privilege {
        Privilege::Full => job.inside,
        // The one user of the zygote's namespace, and soon of the job's own.
        Privilege::None => 0,
    };
    writable(&mut plan, owner, job.limits.disk_bytes);
    match proc {
        ProcSource::Own => {
            plan.push(&Step::Chdir { path: c"/proc" });
            mount_proc(&mut plan, c"/proc", true);
        }
        ProcSource::Lent(fd) => plan.push(&Step::ChdirTo { fd }),
        ProcSource::None => {}
    }
    if job.host.privilege == Privilege::None {
        own_user_namespace(&mut plan, INSIDE, [0; 2]);
        // A new namespace comes with a full set.
        plan.push(&Step::DropBounding {});
    }
    plan.push(&Step::Chdir { path: c"/" });
    confine(&mut plan, job, 0);
    // Changing its identity took the process out of its own reach.
    plan.push(&Step::Dumpable { value: 1 });
    plan.push(&Step::UnblockSignals {});
    plan.push(&Step::DieWithParent {});
    for (at, to) in [(0, abi::CONTROL_FD), (1, abi::STDIN_FD), (2, 1), (3, 2)] {
        plan.push(&Step::Duplicate { from: place(at), to: flag(to) });
    }
    plan.push(&Step::CloseFrom { first: flag(abi::FIRST_CLOSED_FD) });
    plan
}

/// What the origin of a zygote does. With full privilege it is the origin that builds the root: a zygote can
/// only come back to its own pid namespace if that belongs to its user namespace, so this has to be joined
/// before the one is made, and then there is no privilege left to build with.
pub(in crate::sandbox) fn zygote_origin(host: &Host, namespace: Option<&OwnedFd>, root: &Root) -> Plan {
    if namespace.is_none() {
        // As any other user it would lose its privilege over its namespaces when it becomes python.
        return origin_as(host, 0, ZYGOTE_GOES);
    }
    let mut plan = Plan::default();
    plan.push(&Step::DieWithParent {});
    if host.oom_score {
        goes_first(&mut plan, ZYGOTE_GOES);
    }
    namespaces(&mut plan, false, true);
    // Its `/proc` is the worker's, and hidden by the zygote's own; the kernel lets a process without privilege
    // mount one only where there is one already.
    file_system(&mut plan, host, root, Some(true));
    join(&mut plan, namespace.map(AsFd::as_fd), libc::CLONE_NEWUSER);
    plan.push(&Step::Identity { uid: 0, gid: 0, keeps_groups: 0 });
    plan.push(&Step::Unshare { flags: flag(libc::CLONE_NEWPID) });
    plan
}

/// What the first process of a zygote's pid namespace does before it becomes its program.
pub(in crate::sandbox) fn zygote_init() -> Plan {
    let mut plan = Plan::default();
    wait_for_ever(&mut plan);
    plan
}

/// The outer wall of a zygote: that of a job, but for what its children still have to do themselves.
pub(in crate::sandbox) fn zygote_wall(
    host: &Host,
    namespace: Option<&OwnedFd>,
    root: &Root,
    coarse: &[u8],
    descriptors: &Descriptors<'_>,
) -> Plan {
    let mut plan = Plan::default();
    if namespace.is_some() {
        plan.push(&Step::Unshare { flags: flag(libc::CLONE_NEWNS) });
        if root.has_proc() {
            mount_proc(&mut plan, c"/proc", true);
        }
    } else {
        namespaces(&mut plan, false, true);
        // Its children write their maps there.
        file_system(&mut plan, host, root, Some(false));
    }
    scratch(&mut plan);
    plan.push(&Step::Rlimit { resource: libc::RLIMIT_CORE.into(), soft: host.core, hard: host.core });
    plan.push(&Step::Setsid {});
    plan.push(&Step::Umask { mask: 0o022 });
    plan.push(&Step::NoNewPrivileges {});
    plan.push(&Step::Filter { instructions: coarse });
    plan.push(&Step::DefaultSignals {});
    plan.push(&Step::DieWithParent {});
    // It has no working directory.
    start_python(&mut plan, descriptors, abi::WORK_FD);
    plan
}
