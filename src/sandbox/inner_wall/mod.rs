//! The inner wall as data: which system calls a job may make, and why.
//!
//! Every call of Linux is in one of four classes. *Allow* runs. *Quiet* gets an errno from inside the
//! filter, so that libraries fall back. *Refuse* gets an honest errno and is counted. *Kill* ends the job.
//! The last two go to the worker by user notification, which is how it learns the name of the call.
//!
//! `table/` says what is in which class, `args.rs` what is only partly safe, `bpf.rs` makes programs of it.
//! Installing them is left to the shim, answering notifications to the supervisor.

mod args;
mod bpf;
mod compile;
mod describe;
mod extra;
mod rules;
mod table;
#[cfg(test)]
mod tests;
mod trace;

use std::borrow::Cow;
use std::collections::BTreeMap;

pub use bpf::FilterProgram;
pub use describe::{PolicyEntry, describe};
pub use rules::Arch;
use rules::{Denial, NOTHING, Until, Verdict};
pub use trace::{Denied, Remedy};

/// What an environment and a job decide about the policy.
#[derive(Debug, Clone, Copy)]
pub struct Options<'a> {
    /// The job has the network.
    pub network: bool,
    /// The environment allows exec.
    pub exec: bool,
    /// Of some programs alone.
    pub exec_listed: bool,
    /// A control group counts the job's memory, whatever kind it is of.
    pub memory_group: bool,
    /// A control group gives the job its share of the processor, however many sessions it has.
    pub cpu_group: bool,
    /// Calls that the operator allows on top, by name (`allow_syscalls`).
    pub extra: &'a [String],
}

impl Options<'_> {
    /// No network, no exec, no call on top, and no control groups.
    pub const CLOSED: Options<'static> = Options {
        network: false,
        exec: false,
        exec_listed: false,
        memory_group: false,
        cpu_group: false,
        extra: &[],
    };
}

/// Why a policy could not be compiled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// No policy is written for this machine.
    #[error("there is no policy for {0}: use x86_64 or aarch64")]
    Machine(&'static str),
    /// An operator's name that is no system call.
    #[error("allow_syscalls: `{name}` is not a system call; the nearest name is `{nearest}`")]
    Unknown {
        /// As written.
        name: String,
        /// A call of this architecture.
        nearest: &'static str,
    },
    /// An operator's name that would take a wall down.
    #[error("allow_syscalls: `{name}` cannot be allowed: {reason}")]
    Forbidden {
        /// As written.
        name: String,
        /// What it would do.
        reason: &'static str,
    },
}

/// The policy under given options: compiled programs, and the verdicts behind them.
#[derive(Debug, Clone)]
pub struct Policy {
    arch: Arch,
    calls: BTreeMap<u32, Decided>,
    coarse: FilterProgram,
    coarse_before_wall: FilterProgram,
    notifying: [FilterProgram; 1],
    /// None where the policy is only traced: without a listener there is nobody to tell.
    fallback: Option<FilterProgram>,
}

/// What a notified call meets. Names are bounded in number, so that they can label a metric.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Judgement {
    /// Answer with the errno, and count it.
    Refuse {
        /// The call.
        name: Cow<'static, str>,
        /// Never 0.
        errno: i32,
    },
    /// End the job.
    Kill {
        /// The call.
        name: Cow<'static, str>,
    },
}

/// A call of this architecture, under the options.
#[derive(Debug, Clone, Copy)]
struct Decided {
    name: &'static str,
    verdict: Verdict,
    until: Until,
}

impl Policy {
    /// Compiles the policy for the machine this runs on.
    pub fn compile(options: &Options<'_>) -> Result<Self, PolicyError> {
        let arch = Arch::host().ok_or(PolicyError::Machine(std::env::consts::ARCH))?;
        Self::compile_for(arch, options)
    }

    /// Compiles the policy for any machine it is written for.
    pub fn compile_for(arch: Arch, options: &Options<'_>) -> Result<Self, PolicyError> {
        let calls = decide(arch, options)?;
        Ok(Self {
            arch,
            coarse: compile::coarse(arch, &calls, true),
            coarse_before_wall: compile::coarse(arch, &calls, false),
            notifying: [compile::notifying(arch, &calls)],
            fallback: Some(compile::fallback(arch, &calls)),
            calls,
        })
    }

    /// The same policy for a run that is only traced: its filter keeps nothing back by itself, so whoever holds the
    /// listener has to.
    pub fn compile_for_tracing(options: &Options<'_>) -> Result<Self, PolicyError> {
        let mut policy = Self::compile(options)?;
        policy.notifying = [compile::tracing(policy.arch, &policy.calls)];
        policy.fallback = None;
        Ok(policy)
    }

    /// What no import ever needs, to be installed behind the outer wall and before any code that is not
    /// ours. A forbidden call gets ENOSYS there (`SECCOMP_RET_TRACE` without a tracer), the weakest action
    /// that forbids: once the filter proper is stacked on it, that one's verdict counts.
    pub fn coarse(&self) -> &FilterProgram {
        &self.coarse
    }

    /// The same for a process that has yet to raise the outer wall for its children: namespaces and mounts
    /// are left open.
    pub fn coarse_before_wall(&self) -> &FilterProgram {
        &self.coarse_before_wall
    }

    /// The filter, to be installed in order; only the last with a listener.
    pub fn notifying(&self) -> &[FilterProgram] {
        &self.notifying
    }

    /// The filter where no listener can be had: the same verdicts, with nobody to tell the name.
    pub fn fallback(&self) -> &[FilterProgram] {
        self.fallback.as_slice()
    }

    /// What a notified call meets: `arch`, `nr` and `args` as in `struct seccomp_data`.
    ///
    /// Arguments are register values. What they point to can change at any time and is never looked at.
    pub fn judge(&self, arch: u32, nr: i32, args: &[u64; 6]) -> Judgement {
        if arch != self.arch.audit() {
            return Judgement::Kill { name: foreign(arch, nr) };
        }
        let known = u32::try_from(nr).ok().and_then(|number| self.calls.get(&number));
        let Some(&Decided { name, verdict, .. }) = known else {
            return Judgement::Kill { name: nameless(self.arch, nr) };
        };
        let denial = match verdict {
            // The filter does not notify a call that succeeds: whoever reports one is not our filter.
            Verdict::Allow | Verdict::Quiet(NOTHING) | Verdict::Kill => Denial::Kill,
            Verdict::Refuse(errno) | Verdict::Quiet(errno) => Denial::Refuse(errno),
            Verdict::Partly(filter) => filter.judge(args).unwrap_or(Denial::Kill),
        };
        match denial {
            Denial::Refuse(errno) => Judgement::Refuse { name: name.into(), errno },
            Denial::Kill => Judgement::Kill { name: name.into() },
        }
    }
}

/// The verdict on every call of an architecture.
fn decide(arch: Arch, options: &Options<'_>) -> Result<BTreeMap<u32, Decided>, PolicyError> {
    let mut calls: BTreeMap<u32, Decided> = table::calls(arch)
        .map(|(number, name, group)| {
            (number, Decided { name, verdict: group.class.under(arch, options), until: group.until })
        })
        .collect();
    for name in options.extra {
        let number = extra::number(arch, name)?;
        if options.exec_listed && name == "memfd_create" {
            return Err(PolicyError::Forbidden {
                name: name.clone(),
                reason: "an environment lists the programs that its jobs may execute, and the kernel executes what is in \
                         memory without asking",
            });
        }
        if let Some(call) = calls.get_mut(&number) {
            call.verdict = Verdict::Allow;
        }
    }
    Ok(calls)
}

/// Above this no table of any ABI reaches: further numbers share one label.
const BOUND: u32 = 1024;

/// A call through an ABI that is not this machine's own.
fn foreign(arch: u32, nr: i32) -> Cow<'static, str> {
    let abi = match arch {
        0x4000_0003 => "i386",
        0x4000_0028 => "arm",
        _ => "foreign",
    };
    label(abi, ":", nr.cast_unsigned())
}

/// A number of this machine's own ABI that is not in the table.
fn nameless(arch: Arch, nr: i32) -> Cow<'static, str> {
    let number = nr.cast_unsigned();
    match (arch, number.checked_sub(bpf::X32)) {
        (Arch::X86_64, Some(x32)) if nr > 0 => label("x32", ":", x32),
        _ => label("syscall", "_", number),
    }
}

fn label(prefix: &str, separator: &str, number: u32) -> Cow<'static, str> {
    if number < BOUND {
        format!("{prefix}{separator}{number}").into()
    } else {
        format!("{prefix}{separator}other").into()
    }
}
