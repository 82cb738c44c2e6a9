//! Limits of each single process. What holds for all of a job's processes together, a control group keeps.

use nix::sys::resource::{Resource, getrlimit};
use sandpiper_shim::plan::Step;

use super::ConfinedJob;
use super::plan::Plan;
use crate::sandbox::host::PROCESSORS;

/// Descriptors that may be under way in a user's sockets while one of its jobs starts: far more than jobs have.
const ROOM_TO_SEND: u64 = 1 << 16;

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

pub(super) fn resources(plan: &mut Plan, job: &ConfinedJob<'_>, besides: u64) {
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

/// Lets a process open so many files: the last limit, as until its last step it has the worker's own open as well.
pub(super) fn open_files(plan: &mut Plan, limit: u64) {
    let resource = libc::RLIMIT_NOFILE.into();
    // The lockdown takes the difference away once its descriptors are sent; see there.
    let room = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(_, hard)| hard.min(ROOM_TO_SEND));
    plan.push(&Step::Rlimit { resource, soft: limit, hard: limit.max(room) });
}
