//! The outer wall of a job that starts cold, in processes that the worker starts itself.

use std::os::fd::{AsFd, OwnedFd};

use sandpiper_shim::abi;
use sandpiper_shim::plan::Step;

use super::mounts::{file_system, mount_proc, writable};
use super::plan::{Plan, flag, number};
use super::rootfs::Root;
use super::steps::{JOB_GOES, enter_cgroups, join, namespaces, origin_as, start_python, wait_for_ever};
use super::{ConfinedJob, Descriptors, INSIDE, confine};
use crate::sandbox::host::{Host, Privilege};

/// What the origin does: an identity to make namespaces with, and the pid namespace.
pub(in crate::sandbox) fn origin(host: &Host) -> Plan {
    origin_as(host, INSIDE, JOB_GOES)
}

/// What init does before it becomes its program: with full privilege it becomes `outside`, which is 0 in the
/// namespace.
pub(in crate::sandbox) fn init(privilege: Privilege, namespace: Option<&OwnedFd>, outside: u32) -> Plan {
    let mut plan = Plan::default();
    if privilege == Privilege::Full {
        join(&mut plan, namespace.map(AsFd::as_fd), libc::CLONE_NEWUSER);
        let id = if namespace.is_some() { 0 } else { outside.into() };
        plan.push(&Step::Identity { uid: id, gid: id, keeps_groups: 0 });
    }
    wait_for_ever(&mut plan);
    plan
}

/// Prepares a root in a mount namespace that cold jobs join and then copy: what takes some hundred calls is done
/// once. Without its `/proc`, which belongs to a job's own pid namespace.
pub(in crate::sandbox) fn prepared_root(host: &Host, root: &Root) -> Plan {
    let mut plan = Plan::default();
    plan.push(&Step::DieWithParent {});
    plan.push(&Step::Unshare { flags: flag(libc::CLONE_NEWNS) });
    file_system(&mut plan, host, root, None);
    plan
}

/// The outer wall of a job that starts cold, on its prepared root where there is one.
pub(in crate::sandbox) fn wall(
    job: &ConfinedJob<'_>,
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
        Privilege::Full => job.outside,
        Privilege::None => INSIDE,
    };
    writable(&mut plan, owner, job.limits.disk_bytes);
    join(&mut plan, job.namespace, libc::CLONE_NEWUSER);
    plan.push(&Step::DropBounding {});
    // An ordinary user's init has the job's own uid, and counts.
    let besides = u64::from(job.host.privilege == Privilege::None);
    confine(&mut plan, job, besides);
    plan.push(&Step::Filter { instructions: coarse });
    plan.push(&Step::DefaultSignals {});
    plan.push(&Step::DieWithParent {});
    start_python(&mut plan, descriptors, abi::FIRST_CLOSED_FD);
    plan
}

/// Makes a namespace of the control groups behind these doors.
pub(in crate::sandbox) fn cgroup_namespace(doors: &[OwnedFd]) -> Plan {
    let mut plan = Plan::default();
    plan.push(&Step::DieWithParent {});
    doors.iter().for_each(|door| plan.push(&Step::WriteFd { fd: number(door.as_fd()), content: b"0" }));
    plan.push(&Step::Unshare { flags: flag(libc::CLONE_NEWCGROUP) });
    plan
}
