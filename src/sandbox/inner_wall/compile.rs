//! The programs of a policy: the same verdicts, each time with other actions.

use std::collections::BTreeMap;

use super::Decided;
use super::bpf::{FilterPlan, FilterProgram, Leaf, Section};
use super::rules::{Arch, Denial, Filter, Until, Verdict};

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
pub(super) fn notifying(arch: Arch, calls: &Calls) -> FilterProgram {
    let filters = filters(calls.values(), |filter| !filter.allow.is_empty());
    // Behind what may be allowed, the arguments of which nobody is told.
    let quiet = self::filters(calls.values(), |filter| !filter.quiet.is_empty());
    let rest = |filter: &Filter| match quiet.iter().position(|known| std::ptr::eq(*known, filter)) {
        Some(at) => Leaf::Section(filters.len() + at),
        None => Leaf::Return(NOTIFY),
    };
    let mut sections: Vec<Section> =
        filters.iter().map(|filter| Section::new(filter.allow, ALLOW, rest(filter))).collect();
    sections.extend(
        quiet
            .iter()
            .map(|filter| Section::new(filter.quiet, plainly(filter.otherwise), Leaf::Return(NOTIFY))),
    );
    let leaf = |number| match calls.get(&number).map(|call| call.verdict) {
        Some(Verdict::Allow) => Leaf::Return(ALLOW),
        Some(Verdict::Quiet(number)) => Leaf::Return(errno(number)),
        Some(Verdict::Refuse(_) | Verdict::Kill) => Leaf::Return(NOTIFY),
        Some(Verdict::Partly(filter)) if filter.allow.is_empty() => rest(filter),
        Some(Verdict::Partly(filter)) => Leaf::Section(position(&filters, filter)),
        None => Leaf::Return(ENOSYS),
    };
    FilterPlan { arch, foreign: NOTIFY, newer: ENOSYS, leaf, sections }.assemble()
}

/// Everything that is not allowed goes to the listener, what is otherwise answered inside the filter as well: for a
/// listener that lets it all through.
pub(super) fn tracing(arch: Arch, calls: &Calls) -> FilterProgram {
    let filters = filters(calls.values(), |filter| !filter.allow.is_empty());
    let sections =
        filters.iter().map(|filter| Section::new(filter.allow, ALLOW, Leaf::Return(NOTIFY))).collect();
    let leaf = |number| match calls.get(&number).map(|call| call.verdict) {
        Some(Verdict::Allow) => Leaf::Return(ALLOW),
        Some(Verdict::Partly(filter)) if !filter.allow.is_empty() => {
            Leaf::Section(position(&filters, filter))
        }
        _ => Leaf::Return(NOTIFY),
    };
    FilterPlan { arch, foreign: NOTIFY, newer: NOTIFY, leaf, sections }.assemble()
}

/// A denial of which nobody is told.
const fn plainly(denial: Denial) -> u32 {
    match denial {
        Denial::Refuse(number) => errno(number),
        Denial::Kill => KILL,
    }
}

/// Refuse is a plain errno, kill ends the whole process.
pub(super) fn fallback(arch: Arch, calls: &Calls) -> FilterProgram {
    let filters = filters(calls.values(), |filter| !filter.allow.is_empty());
    // In front of what may be allowed, the arguments that a call has to die of.
    let deadly: Vec<&Filter> = filters.iter().copied().filter(|filter| !filter.kill.is_empty()).collect();
    let allowing = |filter| Leaf::Section(deadly.len() + position(&filters, filter));
    let mut sections: Vec<Section> =
        deadly.iter().map(|&filter| Section::new(filter.kill, KILL, allowing(filter))).collect();
    sections.extend(
        filters
            .iter()
            .map(|filter| Section::new(filter.allow, ALLOW, Leaf::Return(plainly(filter.otherwise)))),
    );
    let leaf = |number| match calls.get(&number).map(|call| call.verdict) {
        Some(Verdict::Allow) => Leaf::Return(ALLOW),
        Some(Verdict::Quiet(number) | Verdict::Refuse(number)) => Leaf::Return(errno(number)),
        Some(Verdict::Kill) => Leaf::Return(KILL),
        Some(Verdict::Partly(filter)) if filter.allow.is_empty() && filter.kill.is_empty() => {
            Leaf::Return(plainly(filter.otherwise))
        }
        Some(Verdict::Partly(filter)) if filter.kill.is_empty() => allowing(filter),
        Some(Verdict::Partly(filter)) => Leaf::Section(position(&deadly, filter)),
        None => Leaf::Return(ENOSYS),
    };
    FilterPlan { arch, foreign: KILL, newer: ENOSYS, leaf, sections }.assemble()
}

/// Forbids what is forbidden later and needed by nobody before; `walled` if the outer wall stands.
pub(super) fn coarse(arch: Arch, calls: &Calls, walled: bool) -> FilterProgram {
    let closed = |until| match until {
        Until::Never => true,
        Until::OuterWall => walled,
        Until::InnerWall => false,
    };
    let early: BTreeMap<u32, &Decided> =
        calls.iter().filter(|(_, call)| closed(call.until)).map(|(&number, call)| (number, call)).collect();
    let filters = filters(early.values().copied(), |filter| !filter.allow.is_empty());
    let sections =
        filters.iter().map(|filter| Section::new(filter.allow, ALLOW, Leaf::Return(TRACE))).collect();
    let leaf = |number| match early.get(&number).map(|call| call.verdict) {
        Some(Verdict::Partly(filter)) if !filter.allow.is_empty() => {
            Leaf::Section(position(&filters, filter))
        }
        Some(Verdict::Partly(_) | Verdict::Quiet(_) | Verdict::Refuse(_) | Verdict::Kill) => {
            Leaf::Return(TRACE)
        }
        Some(Verdict::Allow) | None => Leaf::Return(ALLOW),
    };
    FilterPlan { arch, foreign: TRACE, newer: TRACE, leaf, sections }.assemble()
}

/// The filters of these calls, each once, of a kind.
fn filters<'a>(
    calls: impl Iterator<Item = &'a Decided>,
    kind: impl Fn(&Filter) -> bool,
) -> Vec<&'static Filter> {
    let mut filters: Vec<&'static Filter> = Vec::new();
    for call in calls {
        if let Verdict::Partly(filter) = call.verdict
            && kind(filter)
            && !filters.iter().any(|known| std::ptr::eq(*known, filter))
        {
            filters.push(filter);
        }
    }
    filters
}

/// Of a filter that is among them.
fn position(filters: &[&Filter], filter: &Filter) -> usize {
    filters.iter().position(|known| std::ptr::eq(*known, filter)).unwrap_or_default()
}
