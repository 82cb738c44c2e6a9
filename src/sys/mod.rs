//! The only unsafe code of the worker, behind safe functions and owned descriptors.
#![allow(unsafe_code, reason = "this is the fence: everything outside it denies unsafe code")]

pub mod input;
pub mod probe;
pub mod signal;
