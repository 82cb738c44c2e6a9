//! The programs of a policy: the same verdicts, each time with other actions.

use std::collections::BTreeMap;

use seccompiler::{BackendError, SeccompAction};

use super::Decided;
use super::bpf::{Leaf, Plan, Program, Section};
use super::rules::{Arch, Denial, Filter, Rule, Until, Verdict};

type Calls = BTreeMap<u32, Decided>;

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const NOTIFY: u32 = libc::SECCOMP_RET_USER_NOTIF;
const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;
const TRACE: u32 = libc::SECCOMP_RET_TRACE;
const ENOSYS: u32 = errno(libc::ENOSYS);

const fn errno(errno: i32) -> u32 {
    libc::SECCOMP_RET_ERRNO | errno.cast_unsigned()
}

/// Refuse and kill both go to the listener.
pub(super) fn notifying(arch: Arch, calls: &Calls) -> Result<Program, BackendError> {
    let rules = partly(calls).map(|(number, filter)| (number, filter.allow)).collect();
    let section = Section::new(arch, rules, SeccompAction::Allow, Leaf::Return(NOTIFY))?;
    let leaf = |number| match calls.get(&number).map(|call| call.verdict) {
        Some(Verdict::Allow) => Leaf::Return(ALLOW),
        Some(Verdict::Quiet(number)) => Leaf::Return(errno(number)),
        Some(Verdict::Refuse(_) | Verdict::Kill) => Leaf::Return(NOTIFY),
        Some(Verdict::Partly(_)) => Leaf::Section(0),
        None => Leaf::Return(ENOSYS),
    };
    Ok(Plan { arch, foreign: NOTIFY, newer: ENOSYS, leaf, sections: vec![section] }.assemble())
}

/// Everything that is not allowed goes to the listener, what is otherwise answered inside the filter as well: for a
/// listener that lets it all through.
pub(super) fn tracing(arch: Arch, calls: &Calls) -> Result<Program, BackendError> {
    let rules = partly(calls).map(|(number, filter)| (number, filter.allow)).collect();
    let section = Section::new(arch, rules, SeccompAction::Allow, Leaf::Return(NOTIFY))?;
    let leaf = |number| match calls.get(&number).map(|call| call.verdict) {
        Some(Verdict::Allow) => Leaf::Return(ALLOW),
        Some(Verdict::Partly(_)) => Leaf::Section(0),
        _ => Leaf::Return(NOTIFY),
    };
    Ok(Plan { arch, foreign: NOTIFY, newer: NOTIFY, leaf, sections: vec![section] }.assemble())
}

/// Refuse is a plain errno, kill ends the whole process.
pub(super) fn fallback(arch: Arch, calls: &Calls) -> Result<Program, BackendError> {
    // One section for each answer to arguments that are not allowed.
    let mut answers: BTreeMap<Denial, BTreeMap<u32, &[Rule]>> = BTreeMap::new();
    // In front of them, for each answer, the calls that have arguments to die of as well.
    let mut deadly: BTreeMap<Denial, BTreeMap<u32, &[Rule]>> = BTreeMap::new();
    for (number, filter) in partly(calls) {
        answers.entry(filter.otherwise).or_default().insert(number, filter.allow);
        if !filter.kill.is_empty() {
            deadly.entry(filter.otherwise).or_default().insert(number, filter.kill);
        }
    }

    let ahead = deadly.len();
    let position = |among: &BTreeMap<Denial, _>, denial| among.range(..denial).count();
    let mut sections = Vec::with_capacity(ahead + answers.len());
    for (&denial, rules) in &deadly {
        let next = Leaf::Section(ahead + position(&answers, denial));
        sections.push(Section::new(arch, rules.clone(), SeccompAction::KillProcess, next)?);
    }
    for (&denial, rules) in &answers {
        let action = match denial {
            Denial::Refuse(number) => errno(number),
            Denial::Kill => KILL,
        };
        sections.push(Section::new(arch, rules.clone(), SeccompAction::Allow, Leaf::Return(action))?);
    }

    let leaf = |number| match calls.get(&number).map(|call| call.verdict) {
        Some(Verdict::Allow) => Leaf::Return(ALLOW),
        Some(Verdict::Quiet(number) | Verdict::Refuse(number)) => Leaf::Return(errno(number)),
        Some(Verdict::Kill) => Leaf::Return(KILL),
        Some(Verdict::Partly(filter)) if filter.kill.is_empty() => {
            Leaf::Section(ahead + position(&answers, filter.otherwise))
        }
        Some(Verdict::Partly(filter)) => Leaf::Section(position(&deadly, filter.otherwise)),
        None => Leaf::Return(ENOSYS),
    };
    Ok(Plan { arch, foreign: KILL, newer: ENOSYS, leaf, sections }.assemble())
}

/// Forbids what is forbidden later and needed by nobody before; `walled` if the outer wall stands.
pub(super) fn coarse(arch: Arch, calls: &Calls, walled: bool) -> Result<Program, BackendError> {
    let closed = |until| match until {
        Until::Never => true,
        Until::OuterWall => walled,
        Until::InnerWall => false,
    };
    let early: BTreeMap<u32, Verdict> = calls
        .iter()
        .filter(|(_, call)| closed(call.until))
        .map(|(&number, call)| (number, call.verdict))
        .collect();
    let rules: BTreeMap<u32, &[Rule]> = early
        .iter()
        .filter_map(|(&number, verdict)| match verdict {
            Verdict::Partly(filter) => Some((number, filter.allow)),
            _ => None,
        })
        .collect();
    let section = Section::new(arch, rules, SeccompAction::Allow, Leaf::Return(TRACE))?;
    let leaf = |number| match early.get(&number) {
        Some(Verdict::Partly(_)) => Leaf::Section(0),
        Some(Verdict::Quiet(_) | Verdict::Refuse(_) | Verdict::Kill) => Leaf::Return(TRACE),
        Some(Verdict::Allow) | None => Leaf::Return(ALLOW),
    };
    Ok(Plan { arch, foreign: TRACE, newer: TRACE, leaf, sections: vec![section] }.assemble())
}

fn partly(calls: &Calls) -> impl Iterator<Item = (u32, &'static Filter)> {
    calls.iter().filter_map(|(&number, call)| match call.verdict {
        Verdict::Partly(filter) => Some((number, filter)),
        _ => None,
    })
}
