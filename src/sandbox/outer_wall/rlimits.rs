//! Limits of each single process. What holds for all of a job's processes together, a control group keeps.

use std::sync::LazyLock;

use nix::sys::resource::{Resource, getrlimit};
use sandpiper_shim::plan::Step;

use super::ConfinedJob;
use super::plan::Plan;
use crate::sandbox::host::PROCESSORS;

/// The worker's own hard limits, of those that a job may raise: nobody without privilege exceeds them.
static OWN: LazyLock<[(u32, u64); 6]> = LazyLock::new(|| {
    [
        (libc::RLIMIT_AS, Resource::RLIMIT_AS),
        (libc::RLIMIT_CPU, Resource::RLIMIT_CPU),
        (libc::RLIMIT_DATA, Resource::RLIMIT_DATA),
        (libc::RLIMIT_FSIZE, Resource::RLIMIT_FSIZE),
        (libc::RLIMIT_NPROC, Resource::RLIMIT_NPROC),
        (libc::RLIMIT_STACK, Resource::RLIMIT_STACK),
    ]
    .map(|(number, resource)| (number, getrlimit(resource).map_or(NONE, |(_, hard)| hard)))
});

/// Descriptors that may be under way in a user's sockets while one of its jobs starts: far more than jobs have.
const ROOM_TO_SEND: u64 = 1 << 16;

/// Larger than any page: a file system of a size has whole ones.
const PAGES: u64 = 64 << 10;

/// No limit, as `setrlimit` takes it.
const NONE: u64 = libc::RLIM_INFINITY;

/// One limit: the one in force, and how far the job may raise it.
struct Limit {
    resource: u32,
    soft: u64,
    hard: u64,
}

impl Limit {
    /// For good.
    const fn fixed(resource: u32, value: u64) -> Self {
        Self { resource, soft: value, hard: value }
    }

    /// One that a job may raise because something else holds it.
    const fn raised_to(hard: u64, resource: u32, soft: u64) -> Self {
        Self { resource, soft, hard }
    }
}

/// Address space of each process, and what of it is private and can be written to. Allocators and WebAssembly reserve
/// gigabytes that they never touch, and test harnesses set gigabytes as their own limits. Address space is promised, not
/// used: the group counts what is used. Where the kernel keeps its promises, there is an end to it all the same.
fn reserved(job: &ConfinedJob<'_>) -> [Limit; 2] {
    let value = job.limits.memory_bytes.saturating_mul(64).max(16 << 30);
    let hard = if job.host.keeps_promises { value } else { NONE };
    [libc::RLIMIT_AS, libc::RLIMIT_DATA].map(|resource| Limit::raised_to(hard, resource, value))
}

/// Where nothing but a look now and then keeps the limit: stacks of threads and buffers of BLAS are private and
/// writable, mostly not touched, and more of them where there are more processors. A job that raises this gets no more
/// than one with many processes, and page tables, of which address space costs a part in 512, are counted.
fn reserved_without_cgroup(job: &ConfinedJob<'_>) -> [Limit; 2] {
    let memory_bytes = job.limits.memory_bytes;
    let all = memory_bytes.saturating_mul(32).max(1 << 30);
    let most = if job.host.keeps_promises { all } else { all.max(32 << 30) };
    let buffers = u64::from(*PROCESSORS) * (64 << 20);
    let writable = memory_bytes.saturating_mul(2).saturating_add(buffers);
    [Limit::raised_to(most, libc::RLIMIT_AS, all), Limit::raised_to(most, libc::RLIMIT_DATA, writable)]
}

pub(super) fn resources(plan: &mut Plan, job: &ConfinedJob<'_>, besides: u64) {
    let limits = job.limits;
    // What a control group keeps for all processes together, no process need have a limit of its own for.
    let most = |value| if job.memory_by_cgroup { NONE } else { value };
    // In whole seconds, and only a backstop: the worker itself looks at the clock.
    let cpu = limits.cpu_ms.div_ceil(1000).saturating_add(1);
    // The control group is asked last, and counts whom it refuses.
    let processes = limits.processes + besides + u64::from(job.memory_by_cgroup);
    // The file system is full before, which is the error that programs know.
    let file = limits.disk_bytes.saturating_mul(2).saturating_add(PAGES);
    let reserved = if job.memory_by_cgroup { reserved } else { reserved_without_cgroup };
    let values = [
        Limit::fixed(libc::RLIMIT_CORE, job.host.core),
        Limit::raised_to(most(cpu), libc::RLIMIT_CPU, cpu),
        Limit::raised_to(most(file), libc::RLIMIT_FSIZE, file),
        Limit::fixed(libc::RLIMIT_MEMLOCK, 64 << 10),
        Limit::fixed(libc::RLIMIT_MSGQUEUE, 0),
        Limit::fixed(libc::RLIMIT_NICE, 0),
        Limit::raised_to(most(processes), libc::RLIMIT_NPROC, processes),
        Limit::fixed(libc::RLIMIT_RTPRIO, 0),
        Limit::fixed(libc::RLIMIT_SIGPENDING, 1024),
        // It is memory as any other, and programs that recurse deeply raise it.
        Limit::raised_to(NONE, libc::RLIMIT_STACK, 8 << 20),
    ];
    for Limit { resource, soft, hard } in values.into_iter().chain(reserved(job)) {
        let own = OWN.iter().find(|(number, _)| *number == resource).map_or(NONE, |(_, own)| *own);
        let hard = hard.min(own);
        plan.push(&Step::Rlimit { resource: resource.into(), soft: soft.min(hard), hard });
    }
}

/// Lets a process open so many files: the last limit, as until its last step it has the worker's own open as well.
pub(super) fn open_files(plan: &mut Plan, limit: u64) {
    let resource = libc::RLIMIT_NOFILE.into();
    // The lockdown takes the difference away once its descriptors are sent; see there.
    let room = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(_, hard)| hard.min(ROOM_TO_SEND));
    plan.push(&Step::Rlimit { resource, soft: limit, hard: limit.max(room) });
}
