//! The outer wall of one job, written down before any of its processes exists.
//!
//! Read the steps of [`cold::wall`] or [`warm::wall`] from top to bottom: that is what happens around a job, in that
//! order. Both end in the same [`confine`]; they differ in where the process comes from. A plan is data: what it depends
//! on is in [`Host`], in [`ConfinedJob`] and in the [`Root`](rootfs::Root).

pub(super) mod cold;
mod host_mounts;
pub(super) mod landlock;
pub(super) mod layers;
pub(super) mod mounts;
pub(super) mod plan;
mod rlimits;
pub(super) mod rootfs;
mod steps;
pub(super) mod trials;
pub(super) mod warm;

use std::os::fd::BorrowedFd;

use sandpiper_shim::abi;
use sandpiper_shim::plan::Step;

use crate::job::Limits;
use crate::sandbox::host::{Host, Privilege};
use mounts::{DEVICES, WORK, WRITABLE};
use plan::{Plan, flag};

pub(super) use steps::JOB_GOES;

/// A job's uid and gid as itself sees them, wherever there is a user namespace around it.
pub(super) const INSIDE: u32 = 1000;

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
pub(super) struct ConfinedJob<'a> {
    pub(super) host: &'a Host,
    /// Its uid and gid, as itself sees them.
    pub(super) inside: u32,
    /// The same as the host sees them.
    pub(super) outside: u32,
    /// The user namespace to join; none if the job makes its own, or if there are none.
    pub(super) namespace: Option<BorrowedFd<'a>>,
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

/// What a job's processes stand behind the worker by, where no cgroup shares the processor: about a third of its share.
const BEHIND_THE_WORKER: u64 = 5;

/// Nobody, with nothing: what every job's process is from here on. `besides` processes of ours count as the job's.
fn confine(plan: &mut Plan, job: &ConfinedJob<'_>, besides: u64) {
    let keeps_groups = (job.host.privilege == Privilege::None).into();
    plan.push(&Step::Identity { uid: job.inside.into(), gid: job.inside.into(), keeps_groups });
    plan.push(&Step::DropCapabilities {});
    rlimits::resources(plan, job, besides);
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
    // After everything that opens files.
    rlimits::open_files(plan, job.limits.open_files);
}
