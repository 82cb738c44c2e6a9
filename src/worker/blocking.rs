//! Work that would keep a thread of the runtime from other jobs.

/// Less is done in a fraction of a millisecond.
const LONG_BYTES: usize = 256 << 10;

/// Does work that takes as long as `bytes` are many. While a long one runs, another thread takes over what waits for
/// this one.
pub(super) fn blocking<T>(bytes: usize, work: impl FnOnce() -> T) -> T {
    if bytes < LONG_BYTES { work() } else { tokio::task::block_in_place(work) }
}
