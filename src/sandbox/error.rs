//! Why a sandbox does not start, and what the worker itself ran short of, each with what to do about it.

use std::error::Error;
use std::io;
use std::path::PathBuf;

use super::environment::{PrepareError, RootError};
use super::inner_wall;
use crate::script::TemplateError;

/// Why the sandbox could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The shim is not where it should be.
    #[error("find the shim at {path}: {source}; build it beside the worker or set sandbox.shim")]
    Shim {
        /// Where it was looked for.
        path: PathBuf,
        /// Why it was not found.
        source: io::Error,
    },
    /// An interpreter cannot be used.
    #[error("prepare environment {name}: {source}")]
    Environment {
        /// Its name in the configuration.
        name: String,
        /// Why.
        source: RootError,
    },
    /// A list of programs cannot be kept.
    #[error(
        "environments.{name}.allow_exec: a list of programs is kept by Landlock, which this kernel does not have: boot \
         Linux 5.13 or later with landlock in the lsm= parameter, or set it to false, or to true for all programs"
    )]
    Unlistable {
        /// The environment's name in the configuration.
        name: String,
    },
    /// The policy does not compile.
    #[error("compile the system call policy: {0}")]
    Policy(#[from] inner_wall::PolicyError),
    /// A layer that the operator requires is not there.
    #[error("sandbox.require: {name} is not there: {detail}; `sandpiper doctor` says how to get it")]
    Required {
        /// The layer.
        name: String,
        /// What was found.
        detail: String,
    },
    /// The ids of jobs do not exist in the worker's own user namespace.
    #[error(
        "sandbox.uid_base: the ids {first} to {last} do not exist here; set it to where {path} has that many"
    )]
    Ids {
        /// The first of them.
        first: u32,
        /// And the last.
        last: u32,
        /// The map that lacks them.
        path: &'static str,
    },
    /// `sandbox.require` names something that there is not.
    #[error("sandbox.require: there is no layer {name}; the layers are {known}")]
    UnknownLayer {
        /// As it was written.
        name: String,
        /// Every name that there is.
        known: String,
    },
    /// The template of what runs in python is broken.
    #[error("render the prescript: {0}")]
    Template(#[from] TemplateError),
    /// A descriptor or a thread could not be had.
    #[error("set up the sandbox: {0}")]
    Io(#[from] io::Error),
}

impl StartError {
    /// Why the environment of this name could not be prepared.
    pub(super) fn preparing(name: &str, error: PrepareError) -> Self {
        match error {
            PrepareError::Root(source) => Self::Environment { name: name.to_owned(), source },
            PrepareError::Policy(source) => source.into(),
            PrepareError::Unlistable => Self::Unlistable { name: name.to_owned() },
            PrepareError::Shim { path, source } => Self::Shim { path, source },
            PrepareError::Template(source) => source.into(),
            PrepareError::Io(source) => source.into(),
        }
    }
}

/// What went wrong, and where the worker itself ran short of something, what to do about it.
pub(super) fn explained(error: &io::Error) -> String {
    let remedy = match errno(error) {
        Some(libc::EMFILE) => {
            "the worker has no descriptors left: raise its limit of open files (LimitNOFILE=, ulimit -n), or lower \
             worker.slots"
        }
        Some(libc::ENFILE) => "this machine has no descriptors left: raise fs.file-max",
        Some(libc::EAGAIN) => {
            "the worker may start no more processes: raise its limit (TasksMax=, pids.max, ulimit -u), or lower \
             worker.slots"
        }
        Some(libc::ENOMEM) => {
            "the worker has no memory left: raise its limit (MemoryMax=), or lower worker.slots"
        }
        _ => return error.to_string(),
    };
    format!("{error}; {remedy}")
}

/// The same for whoever sent the job: files of this machine by their names, without where they lie.
pub(super) fn without_places(text: &str) -> String {
    let shown = |word: &str| match word.trim_start_matches(['(', '"', '`', '\'']).strip_prefix('/') {
        Some(path) => path.trim_end_matches('/').rsplit('/').next().unwrap_or_default().to_owned(),
        None => word.to_owned(),
    };
    text.split(' ').map(shown).collect::<Vec<_>>().join(" ")
}

/// The kernel's number, which may stand behind words of ours.
fn errno(error: &io::Error) -> Option<i32> {
    let mut error: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(this) = error {
        if let Some(number) = this.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
            return Some(number);
        }
        error = this.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_publisher_learns_nothing_of_where_files_lie() {
        for (said, told) in [
            (
                "write to /sys/fs/cgroup/a/slot-0/memory.max: Invalid argument",
                "write to memory.max: Invalid argument",
            ),
            ("mount (/opt/python/lib): 1/2 of it", "mount lib): 1/2 of it"),
            ("no path", "no path"),
        ] {
            assert_eq!(without_places(said), told);
        }
    }

    #[test]
    fn what_ran_short_is_told_with_its_remedy_however_it_is_wrapped() {
        let kernel = || io::Error::from_raw_os_error(libc::EMFILE);
        let said = explained(&kernel());
        assert!(said.starts_with("Too many open files") && said.contains("LimitNOFILE"), "{said}");
        assert!(explained(&io::Error::other(StartError::Io(kernel()))).contains("LimitNOFILE"));
        assert_eq!(explained(&io::Error::other("a reason")), "a reason");
        let denied = io::Error::from_raw_os_error(libc::EACCES);
        assert_eq!(explained(&denied), denied.to_string());
    }
}
