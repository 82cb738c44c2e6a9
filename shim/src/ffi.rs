//! The C ABI that `prescript.py` calls through ctypes.

use core::ffi::{c_int, c_uint};

use crate::lockdown;

/// Locks this process down. Returns 0; or the step that failed in the upper 16 bits and its errno in the lower
/// ones, and then the process must end at once. The worker has been told either way.
///
/// - `uid`, `gid`: who the process must be afterwards; never 0.
/// - `enable_network`: 1 where the policy that the worker prepared is the one with sockets.
// Not unsafe to call: it takes numbers, and touches only the descriptors of the agreed numbers.
#[unsafe(no_mangle)]
pub extern "C" fn lockdown(uid: c_uint, gid: c_uint, enable_network: c_int) -> c_int {
    match lockdown::lockdown(uid, gid, enable_network != 0) {
        Ok(()) => 0,
        Err((step, errno)) => ((step as c_uint).cast_signed() << 16) | (errno & 0xffff),
    }
}
