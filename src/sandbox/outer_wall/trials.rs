//! Plans that are only tried, in a child: what a host lets the walls do.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use sandpiper_shim::plan::Step;

use super::INSIDE;
use super::mounts::file_system;
use super::plan::{Plan, flag, number};
use super::rootfs::{Layer, Root};
use super::steps::{self, JOB_GOES, goes_first, join, worker_as};
use crate::sandbox::host::{Host, Privilege};
use crate::sys::launch;

/// Whether it can be said.
pub(in crate::sandbox) fn oom() -> Plan {
    let mut plan = Plan::default();
    goes_first(&mut plan, JOB_GOES);
    plan
}

/// Whether a new user namespace can have such limits.
pub(in crate::sandbox) fn watches() -> Plan {
    let mut plan = Plan::default();
    plan.push(&Step::Dumpable { value: 1 });
    steps::watches(&mut plan);
    plan
}

/// Limits the watches of whoever is in this user namespace, where that can be done.
pub(in crate::sandbox) fn limit_watches(namespace: BorrowedFd<'_>) {
    let mut plan = Plan::default();
    plan.push(&Step::Setns { fd: number(namespace), kind: flag(libc::CLONE_NEWUSER) });
    steps::watches(&mut plan);
    if !launch::can(0, plan.bytes()) {
        tracing::warn!("jobs share the inotify instances of the worker's user: /proc/sys cannot be written");
    }
}

/// Whether a root with these layers can be built.
pub(in crate::sandbox) fn layers(host: &Host, layers: &[Layer]) -> Plan {
    let mut plan = Plan::default();
    if host.privilege == Privilege::None {
        worker_as(&mut plan, INSIDE);
    }
    plan.push(&Step::Unshare { flags: flag(libc::CLONE_NEWNS) });
    file_system(&mut plan, host, &Root::of_layers(layers), None);
    plan
}

/// Joins a namespace and no more, for a trial whether that can be done here.
pub(in crate::sandbox) fn joining(namespace: &OwnedFd, kind: i32) -> Plan {
    let mut plan = Plan::default();
    join(&mut plan, Some(namespace.as_fd()), kind);
    plan
}
