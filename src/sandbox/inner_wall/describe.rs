//! The policy for people: what `sandpiper policy` prints.

use serde::Serialize;

use super::rules::{Arch, Denial, Filter, NOTHING, Verdict};
use super::{Options, PolicyError, decide, table};

/// One call, its class and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct PolicyEntry {
    /// As in the kernel's table.
    pub name: &'static str,
    /// On the architecture asked for.
    pub number: u32,
    /// `allow`, `partly`, `quiet`, `refuse` or `kill`.
    pub class: &'static str,
    /// The errno, the arguments that are allowed, or nothing.
    pub detail: String,
    /// Why it is in that class.
    pub reason: &'static str,
}

/// Every call of an architecture under the options, by theme.
pub fn describe(arch: Arch, options: &Options<'_>) -> Result<impl Iterator<Item = PolicyEntry>, PolicyError> {
    let calls = decide(arch, options)?;
    Ok(table::calls(arch).filter_map(move |(number, name, group)| {
        let (class, detail) = match calls.get(&number)?.verdict {
            Verdict::Allow => ("allow", String::new()),
            Verdict::Quiet(errno) => ("quiet", name_of(errno)),
            Verdict::Refuse(errno) => ("refuse", name_of(errno)),
            Verdict::Kill => ("kill", String::new()),
            Verdict::Partly(Filter { allow: [], otherwise: Denial::Refuse(errno), .. }) => {
                ("refuse", name_of(*errno))
            }
            Verdict::Partly(filter) => ("partly", arguments(filter)),
        };
        Some(PolicyEntry { name, number, class, detail, reason: group.reason })
    }))
}

fn arguments(filter: &Filter) -> String {
    let otherwise = match filter.otherwise {
        Denial::Refuse(errno) => name_of(errno),
        Denial::Kill => "kill".to_owned(),
    };
    format!("{}; otherwise {otherwise}", filter.detail)
}

/// `EPERM` rather than 1.
pub(super) fn name_of(errno: i32) -> String {
    if errno == NOTHING {
        return "success, with no effect".to_owned();
    }
    format!("{:?}", nix::errno::Errno::from_raw(errno))
}
