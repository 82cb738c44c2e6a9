//! Every system call of Linux up to 7.0 on x86_64 and aarch64, by theme. The numbers are those of
//! syscall_64.tbl and asm-generic/unistd.h; a test holds that none is missing and none is there twice.

mod files;
mod memory;
mod network;
mod process;
mod system;

use super::rules::{Arch, Call, Group};

/// The highest number in the table, on both architectures (`rseq_slice_yield`). What is above is answered
/// with ENOSYS, as a kernel of that age would.
pub(super) const NEWEST: u32 = 471;

/// All groups, in the order they are shown.
pub(super) fn groups() -> impl Iterator<Item = &'static Group> {
    [files::GROUPS, process::GROUPS, memory::GROUPS, network::GROUPS, system::GROUPS].into_iter().flatten()
}

/// All calls of an architecture: number, name, group.
pub(super) fn calls(arch: Arch) -> impl Iterator<Item = (u32, &'static str, &'static Group)> {
    groups().flat_map(move |group| {
        group.calls.iter().filter_map(move |call| Some((number(arch, call)?, call.0, group)))
    })
}

fn number(arch: Arch, &(_, x86_64, aarch64): &Call) -> Option<u32> {
    let number = match arch {
        Arch::X86_64 => x86_64,
        Arch::Aarch64 => aarch64,
    };
    u32::try_from(number).ok()
}
