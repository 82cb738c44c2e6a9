//! The only unsafe code of the worker: safe functions and owned descriptors around system calls.
//!
//! - [`fd`]: pipes, sockets, sealed memory files, and descriptors that travel over a socket.
//! - [`launch`]: starts a job's first process and its python process behind the outer wall.
//! - [`process`]: a child that is waited for by its pidfd.
//! - [`notify`]: the kernel's questions about system calls.
//! - [`job_dir`]: files in a directory that a hostile process wrote.
//! - [`ready`]: descriptors that tokio watches.
//! - [`userns`]: user namespaces with chosen maps.
//! - [`probe`]: tries what a sandbox needs, for the doctor.
//! - [`input`], [`signal`]: small things that the command line needs.
#![allow(unsafe_code, reason = "this is the fence: everything outside it denies unsafe code")]

pub mod fd;
pub mod input;
pub mod job_dir;
pub mod launch;
pub mod notify;
pub mod probe;
pub mod process;
pub mod ready;
pub mod signal;
pub mod userns;
pub mod xattr;
