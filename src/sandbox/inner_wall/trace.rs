//! What the policy has against a call, and what would allow it: for a run that is traced instead of held back.

use std::borrow::Cow;
use std::fmt::Write as _;

use super::describe::name_of;
use super::rules::{Class, Denial, Filter, Test, Verdict};
use super::{Policy, PolicyError, extra, foreign, nameless, table};

/// A call that is outside the policy.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Denied {
    /// Its name.
    pub syscall: Cow<'static, str>,
    /// The arguments that decided, where others are allowed: `arg1=0x5412`. Counted from 0.
    pub arguments: String,
    /// `kill`, `refuse` or `quiet`, as in [`PolicyEntry`](super::PolicyEntry).
    pub class: &'static str,
    /// What a job would get.
    pub errno: Option<String>,
    /// What would allow it.
    pub remedy: Remedy,
}

/// How an operator allows a call.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Remedy {
    /// By its name in `sandbox.allow_syscalls`.
    Name,
    /// By `allow_exec` of the environment.
    Exec,
    /// By `sandbox.allow_network` and the job's own `enable_network`.
    Network,
    /// In no way, and why.
    Nothing(Cow<'static, str>),
}

impl Policy {
    /// Why a call is outside the policy; arguments as for [`judge`](Policy::judge).
    pub fn denied(&self, arch: u32, nr: i32, args: &[u64; 6]) -> Denied {
        let never = |syscall, class, errno: Option<i32>, why: &'static str| Denied {
            syscall,
            arguments: String::new(),
            class,
            errno: errno.map(name_of),
            remedy: Remedy::Nothing(why.into()),
        };
        if arch != self.arch.audit() {
            return never(
                foreign(arch, nr),
                "kill",
                None,
                "it came through an ABI that is not this machine's own",
            );
        }
        let known = u32::try_from(nr).ok().and_then(|number| Some((number, self.calls.get(&number)?)));
        let Some((number, call)) = known else {
            let syscall = nameless(self.arch, nr);
            return if syscall.starts_with("x32") {
                never(syscall, "kill", None, "it came through an ABI that is not this machine's own")
            } else {
                never(
                    syscall,
                    "quiet",
                    Some(libc::ENOSYS),
                    "it is newer than the policy; libraries do without",
                )
            };
        };
        let (class, errno, arguments) = match call.verdict {
            Verdict::Quiet(errno) => ("quiet", Some(errno), String::new()),
            Verdict::Refuse(errno) => ("refuse", Some(errno), String::new()),
            Verdict::Allow | Verdict::Kill => ("kill", None, String::new()),
            Verdict::Partly(filter) if filter.is_quiet(args) => match filter.otherwise {
                Denial::Refuse(errno) => ("quiet", Some(errno), deciding(filter, args)),
                Denial::Kill => ("kill", None, deciding(filter, args)),
            },
            Verdict::Partly(filter) => match filter.judge(args).unwrap_or(filter.otherwise) {
                Denial::Refuse(errno) => ("refuse", Some(errno), deciding(filter, args)),
                Denial::Kill => ("kill", None, deciding(filter, args)),
            },
        };
        let written =
            table::calls(self.arch).find(|entry| entry.0 == number).map(|(_, _, group)| group.class);
        let remedy = match (written, call.verdict) {
            (Some(Class::WithExec), _) => Remedy::Exec,
            (Some(Class::WithNetwork(_)), Verdict::Refuse(_)) => Remedy::Network,
            (Some(Class::WithNetwork(_)), Verdict::Partly(filter)) if filter.allow.is_empty() => {
                Remedy::Network
            }
            (_, Verdict::Partly(filter)) => {
                Remedy::Nothing(format!("only some arguments are allowed: {}", filter.detail).into())
            }
            _ => match extra::number(self.arch, call.name) {
                Err(PolicyError::Forbidden { reason, .. }) => Remedy::Nothing(reason.into()),
                _ => Remedy::Name,
            },
        };
        Denied { syscall: call.name.into(), arguments, class, errno: errno.map(name_of), remedy }
    }
}

/// The arguments that a filter looks at, with their values as it sees them.
fn deciding(filter: &Filter, args: &[u64; 6]) -> String {
    let mut text = String::new();
    for (at, value) in args.iter().enumerate() {
        let conditions = filter.allow.iter().chain(filter.kill).chain(filter.quiet).flat_map(|rule| *rule);
        let gap = if text.is_empty() { "" } else { " " };
        // Writing to a string cannot fail.
        let _ = match conditions.filter(|cond| usize::from(cond.arg) == at).map(|cond| cond.test).next() {
            Some(Test::Null) => write!(text, "{gap}arg{at}={}", if *value == 0 { "null" } else { "pointer" }),
            Some(_) => write!(text, "{gap}arg{at}={:#x}", value & u64::from(u32::MAX)),
            None => Ok(()),
        };
    }
    text
}
