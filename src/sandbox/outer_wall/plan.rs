//! A plan: the steps that a new process takes, as bytes that the shim reads.

use std::os::fd::{AsRawFd, BorrowedFd};

use sandpiper_shim::abi;
use sandpiper_shim::plan::Step;

/// A plan in the making.
#[derive(Clone, Debug, Default)]
pub(in crate::sandbox) struct Plan(Vec<u8>);

impl Plan {
    pub(in crate::sandbox) fn push(&mut self, step: &Step<'_>) {
        step.encode(&mut self.0);
    }

    pub(in crate::sandbox) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// The number that a descriptor of an order has in the zygote, by its place in the order.
pub(in crate::sandbox) fn place(at: u64) -> u64 {
    flag(abi::ORDER_FD) + at
}

pub(in crate::sandbox) fn number(fd: BorrowedFd<'_>) -> u64 {
    fd.as_raw_fd().unsigned_abs().into()
}

/// Flags and descriptor numbers, which libc has as signed numbers and which are never negative.
pub(super) fn flag(value: i32) -> u64 {
    value.unsigned_abs().into()
}
