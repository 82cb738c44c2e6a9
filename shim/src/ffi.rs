//! The C ABI that `prescript.py` calls through ctypes.

use core::ffi::{c_int, c_uint};

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::lockdown;
use crate::program::{self, PyObject};
use crate::zygote::Zygote;

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

static ZYGOTE: Mutex<Zygote> = Mutex::new(Zygote::new());

/// Never waits: a zygote has one thread. The job's process inherits the lock as it was at the fork, held by
/// itself, and lets go of it when it returns.
fn zygote() -> MutexGuard<'static, Zygote> {
    ZYGOTE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes this process a zygote, with its memory in huge pages if `huge_pages` is not 0, and tells the worker that it is
/// one. Returns 0, or an errno; then the process must end.
#[unsafe(no_mangle)]
pub extern "C" fn zygote_ready(huge_pages: c_int) -> c_int {
    zygote().ready(huge_pages != 0).err().unwrap_or(0)
}

/// Waits for an order. Returns 1 when there is one, 0 when the worker has gone, and a negative errno when the
/// order cannot be read; then the process must end.
#[unsafe(no_mangle)]
pub extern "C" fn zygote_next() -> c_int {
    zygote().next_order().map_or_else(|errno| -errno, c_int::from)
}

/// Makes the order's processes. Returns 1 in the job's process, 0 in the zygote, and a negative errno in the
/// zygote when the worker cannot be told; then the process must end.
///
/// To be called with the interpreter's lock held, between `PyOS_BeforeFork` and the function for each side.
#[unsafe(no_mangle)]
pub extern "C" fn zygote_fork() -> c_int {
    zygote().fork().map_or_else(|errno| -errno, c_int::from)
}

/// Raises the outer wall of the order around this process. Returns 0; otherwise the process must end, and the
/// worker has been told.
#[unsafe(no_mangle)]
pub extern "C" fn zygote_enter() -> c_int {
    zygote().enter().map_or_else(|failure| failure.errno, |()| 0)
}

/// Finds in python what [`run_program`] needs. Returns 0; otherwise the process must end.
#[unsafe(no_mangle)]
pub extern "C" fn find_python() -> c_int {
    c_int::from(!program::find_python())
}

/// Runs the job's program; python calls it in the place of `sys.excepthook`, with the last three arguments. `begin` is
/// called before and returns the program's file, open for reading, and its path; `ended` is called after.
/// Returns 0, after which python exits as after any uncaught exception, or not at all.
///
/// # Safety
/// To be called with the interpreter's lock held and no exception set, after [`find_python`]. `begin` and `ended` are
/// callable objects that live for the whole call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn run_program(
    begin: *mut PyObject,
    ended: *mut PyObject,
    _kind: *mut PyObject,
    _value: *mut PyObject,
    _trace: *mut PyObject,
) -> c_int {
    // SAFETY: the caller says what `run` asks for.
    unsafe { program::run(begin, ended) };
    0
}
