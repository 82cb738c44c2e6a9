//! Sandpiper runs untrusted Python from a message queue.
//!
//! # A job's way
//! ```text
//! delivery -> parse, check -> template, encode -> slot -> sandboxed process -> outcome -> reply -> ack
//!             job             script              worker  sandbox              job        amqp     amqp
//! ```
//! In its process the shim locks python down first; only then is the code handed over, decoded and run, while
//! the worker watches time, output, memory and refused system calls. The reply is published with a confirm,
//! and the delivery is acked only when the broker confirmed it. Every delivery is settled exactly once: acked,
//! put into the dead queue, or given back. What a job does wrong is a result, never a fault of the worker; what
//! the worker does wrong is a `worker_error`, never shown as the job's.
//!
//! # The process tree
//! ```text
//! worker                     one, long-lived: the queue, the slots, the watch over every job
//! └─ pid 1 of a job          tiny, ours; holds the job's pid namespace and reaps in it
//!    └─ python               the shim, then the job; with it dies everything that it started
//! ```
//! A job is over when its python is. Whatever it left behind dies with its pid namespace before the reply is
//! sent.
//!
//! # The trust zones
//! 1. **The worker** is trusted. It alone knows the broker, its credentials and other jobs.
//! 2. **Behind the outer wall** (namespaces, a root of its own, uid, limits, Landlock, a coarse filter) runs
//!    python with what the operator lets it import, and a job's `preload`.
//! 3. **Behind the inner wall** (the seccomp filter, set by the shim from inside python) runs the job. Nothing
//!    that comes out of here is believed: what became of a job is what the worker saw, and its output, its
//!    files and its exit code are data.
//!
//! # Where things are
//! [`job`] is the contract as pure values; [`config`] what an operator sets; [`script`] makes code a payload;
//! [`sandbox`] has one door, [`sandbox::Sandbox::run`]; [`amqp`] is the only one to know the broker;
//! [`worker`] puts them together; [`ops`] shows it to operators; [`sys`] holds all unsafe code; [`cli`] is the
//! command line.

pub mod amqp;
pub mod cli;
pub mod config;
pub mod job;
#[expect(
    unreachable_pub,
    reason = "`pub` there is for the rest of the crate; so the compiler finds what nothing uses"
)]
mod ops;
#[expect(unreachable_pub, reason = "as of `ops`")]
mod retry;
pub mod sandbox;
pub mod script;
#[expect(unreachable_pub, reason = "as of `ops`")]
mod sys;
#[expect(unreachable_pub, reason = "as of `ops`")]
mod worker;
