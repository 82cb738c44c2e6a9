//! `exec --trace-syscalls`: what a program asks of the kernel beyond the policy, for an operator who has a program
//! that is trusted and wants to know what it needs.
//!
//! The same walls are raised around the same start, but the filter sends every call that the policy does not allow
//! to the listener, and the listener lets all of them through and takes notes. That is the one way that shows
//! everything: a call that is refused or killed hides those that would follow it, `SECCOMP_RET_LOG` tells the
//! kernel's log, which a container cannot read, and `SECCOMP_RET_TRACE` needs a debugger on every thread.
//!
//! So there is no inner wall meanwhile, and that is why it cannot happen to a job: no configuration, job or
//! environment variable names it. A [`Sandbox`](crate::sandbox::Sandbox) either traces or holds back from its making on;
//! `exec` alone makes one that traces, and here alone [`Listener::let_through`] is called. A test of the layers holds
//! both.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::sandbox::inner_wall::{Denied, Policy};
use crate::sys::notify::{Listener, Notification};

/// Different calls that are told apart. Names are few; arguments are the program's to choose.
const MOST: usize = 512;

/// What has been let through so far. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Trace(Arc<Mutex<BTreeMap<Denied, u64>>>);

impl Trace {
    /// Notes the call, and lets it happen.
    pub(in crate::sandbox) fn pass(&self, policy: &Policy, listener: &Listener, question: Notification) {
        let mut denied = policy.denied(question.arch, question.number, &question.arguments);
        let mut notes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if notes.len() >= MOST && !notes.contains_key(&denied) {
            denied.arguments = "others".into();
        }
        *notes.entry(denied).or_default() += 1;
        drop(notes);
        listener.let_through(question);
    }

    /// Each call outside the policy, and how often it was made.
    pub fn seen(&self) -> Vec<(Denied, u64)> {
        let notes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        notes.iter().map(|(denied, count)| (denied.clone(), *count)).collect()
    }
}
