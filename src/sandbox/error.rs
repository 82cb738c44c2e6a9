//! Why a sandbox does not start, each with what to do about it.

use std::io;
use std::path::PathBuf;

use super::policy;
use super::root::RootError;

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
    /// The policy does not compile.
    #[error("compile the system call policy: {0}")]
    Policy(#[from] policy::PolicyError),
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
    /// A descriptor or a thread could not be had.
    #[error("set up the sandbox: {0}")]
    Io(#[from] io::Error),
}
