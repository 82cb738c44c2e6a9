//! What stands between a python process and the code that it will run.
//!
//! The worker links this crate for its types; python loads the same crate as a C library through ctypes.
//! It has no runtime, starts no thread, and neither allocates nor takes a lock on the way through a wall:
//! its functions run between `fork` and `exec` of a threaded process, and inside an interpreter.
//!
//! - [`plan`]: the outer wall as data, a list of system calls prepared before the process exists.
//! - [`wall`]: carries a plan out. One piece of code for a process that the worker starts (cold) and for one
//!   that a zygote forks (warm).
//! - [`lockdown`]: the inner wall, raised from inside python: identity and capabilities verified, then the
//!   filter.
//! - `program`: has python run the job's program.
//! - [`zygote`]: makes a job's processes out of a python that has done its imports, and has first moved its
//!   memory into large pages.
//! - [`abi`]: what both sides agree on: descriptor numbers, the report, the layout of a policy.

pub mod abi;
pub mod ffi;
pub mod lockdown;
mod pages;
pub mod plan;
mod program;
mod report;
mod sys;
pub mod wall;
pub mod zygote;
