//! The programs, run on a machine of our own against the table, for both architectures: what the kernel
//! of the other one would do cannot be tried here.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod machine;
mod numbers;
mod verdicts;

use std::collections::BTreeMap;

use super::bpf::{NEGATIVE, X32};
use super::rules::{Denial, Filter, Test, Verdict};
use super::table::NEWEST;
use super::*;
use machine::{Data, run, verify};

const ARCHES: [Arch; 2] = [Arch::X86_64, Arch::Aarch64];
const ALLOW: u32 = 0x7fff_0000;
const NOTIFY: u32 = 0x7fc0_0000;
const TRACE: u32 = 0x7ff0_0000;
const KILL: u32 = 0x8000_0000;
const I386: u32 = 0x4000_0003;
const ARM: u32 = 0x4000_0028;

const fn errno(number: i32) -> u32 {
    0x0005_0000 | number.cast_unsigned()
}

fn each(mut check: impl FnMut(Arch, &Options<'_>, &Policy)) {
    for arch in ARCHES {
        for (network, exec) in [(false, false), (false, true), (true, false), (true, true)] {
            for (extra, groups) in
                [(vec![], false), (vec!["syslog".to_owned(), "sched_setattr".to_owned()], true)]
            {
                let options = Options {
                    network,
                    exec,
                    exec_listed: exec && groups && network,
                    memory_group: groups,
                    cpu_group: groups,
                    extra: &extra,
                };
                check(arch, &options, &Policy::compile_for(arch, &options).unwrap());
            }
        }
    }
}

/// Arguments worth trying on a filter: each rule met exactly, met with garbage above 32 bits, missed by one
/// bit or one condition, and values that no rule names.
fn trials(filter: &Filter) -> Vec<[u64; 6]> {
    let mut trials = vec![[0; 6], [u64::MAX; 6], [1; 6], [0x1_0000_0000; 6]];
    for rule in filter.allow.iter().chain(filter.kill).chain(filter.quiet) {
        let mut met = [0x77; 6];
        for cond in *rule {
            met[usize::from(cond.arg)] = match cond.test {
                Test::Is(value) | Test::Masked(_, value) | Test::Within(value, _) => value.into(),
                Test::Not(value) => u64::from(value) + 1,
                Test::Null => 0,
            };
        }
        trials.push(met);
        trials.push(met.map(|value| value | 0xdead_beef_0000_0000));
        for cond in *rule {
            if let Test::Within(first, last) = cond.test {
                for edge in [first.wrapping_sub(1), last, last.wrapping_add(1)] {
                    let mut at = met;
                    at[usize::from(cond.arg)] = edge.into();
                    trials.push(at);
                }
            }
            for bit in 0..64 {
                let mut missed = met;
                missed[usize::from(cond.arg)] ^= 1 << bit;
                trials.push(missed);
            }
        }
    }
    trials
}

#[test]
fn programs_are_well_formed_and_small() {
    each(|_, _, policy| {
        for program in
            [policy.coarse(), policy.coarse_before_wall(), &policy.notifying()[0], &policy.fallback()[0]]
        {
            verify(program);
            assert_eq!(program.bytes().len(), 8 * program.instructions().len());
        }
        // A filter is emulated for every number when it is installed, so length is start-up time.
        let length = policy.notifying()[0].instructions().len();
        assert!(length < 700, "{length}");
        assert!(policy.coarse().instructions().len() < 150);
    });
}

#[test]
fn bytes_are_sock_filters_in_memory_order() {
    let options = Options::CLOSED;
    let policy = Policy::compile_for(Arch::X86_64, &options).unwrap();
    let arch = Arch::X86_64.audit().to_ne_bytes();
    let bytes = policy.coarse().bytes();
    assert_eq!(bytes[..8], [0x20_u16.to_ne_bytes().as_slice(), &[0, 0], &4_u32.to_ne_bytes()].concat());
    assert_eq!(bytes[8..16], [0x15_u16.to_ne_bytes().as_slice(), &[1, 0], &arch].concat());
}

#[test]
fn programs_do_what_the_table_says() {
    each(|arch, _, policy| {
        for number in 0..=NEWEST {
            let call = policy.calls.get(&number);
            let trials = match call.map(|call| call.verdict) {
                Some(Verdict::Partly(filter)) => trials(filter),
                _ => vec![[0; 6], [u64::MAX; 6]],
            };
            for args in trials {
                let data = Data { nr: number, arch: arch.audit(), args };
                let denial = match call.map(|call| call.verdict) {
                    None => Some(Outcome::Quiet(Denial::Refuse(libc::ENOSYS))),
                    Some(Verdict::Allow) => None,
                    Some(Verdict::Quiet(number)) => Some(Outcome::Quiet(Denial::Refuse(number))),
                    Some(Verdict::Refuse(number)) => Some(Outcome::Told(Denial::Refuse(number))),
                    Some(Verdict::Kill) => Some(Outcome::Told(Denial::Kill)),
                    Some(Verdict::Partly(filter)) if filter.is_quiet(&args) => {
                        Some(Outcome::Quiet(filter.otherwise))
                    }
                    Some(Verdict::Partly(filter)) => filter.judge(&args).map(Outcome::Told),
                };
                let plain = |denial| match denial {
                    Denial::Refuse(number) => errno(number),
                    Denial::Kill => KILL,
                };
                let (notifying, fallback) = match denial {
                    None => (ALLOW, ALLOW),
                    Some(Outcome::Quiet(denial)) => (plain(denial), plain(denial)),
                    Some(Outcome::Told(denial)) => (NOTIFY, plain(denial)),
                };
                assert_eq!(run(&policy.notifying()[0], &data).0, notifying, "{call:?} {data:x?}");
                assert_eq!(run(&policy.fallback()[0], &data).0, fallback, "{call:?} {data:x?}");
                if let Some(Outcome::Told(denial)) = denial {
                    let name = call.unwrap().name.into();
                    let expected = match denial {
                        Denial::Refuse(errno) => Judgement::Refuse { name, errno },
                        Denial::Kill => Judgement::Kill { name },
                    };
                    let nr = i32::try_from(number).unwrap();
                    assert_eq!(policy.judge(arch.audit(), nr, &args), expected);
                }
                // The coarse filter never forbids what the filter proper allows.
                for coarse in [policy.coarse(), policy.coarse_before_wall()] {
                    let action = run(coarse, &data).0;
                    assert!(action == ALLOW || (action == TRACE && notifying != ALLOW), "{call:?} {data:x?}");
                }
            }
        }
    });
}

#[test]
fn a_trace_sees_exactly_what_is_not_allowed() {
    let Some(arch) = Arch::host() else { return };
    for (network, exec) in [(false, false), (true, true)] {
        let options = Options { network, exec, extra: &[], ..Options::CLOSED };
        let (policy, traced) =
            (Policy::compile(&options).unwrap(), Policy::compile_for_tracing(&options).unwrap());
        assert!(traced.fallback().is_empty(), "without a listener there would be no wall and no trace");
        verify(&traced.notifying()[0]);
        for nr in (0..=NEWEST + 50).chain([X32 + 1, NEGATIVE, u32::MAX]) {
            let trials = match policy.calls.get(&nr).map(|call| call.verdict) {
                Some(Verdict::Partly(filter)) => trials(filter),
                _ => vec![[0; 6], [u64::MAX; 6]],
            };
            for args in trials {
                let data = Data { nr, arch: arch.audit(), args };
                let allowed = run(&policy.notifying()[0], &data).0 == ALLOW;
                let action = run(&traced.notifying()[0], &data).0;
                assert_eq!(action, if allowed { ALLOW } else { NOTIFY }, "{data:x?}");
                let denied = traced.denied(arch.audit(), nr.cast_signed(), &args);
                if !allowed {
                    let kills = run(&policy.fallback()[0], &data).0 == KILL;
                    assert_eq!(
                        (denied.class == "kill", denied.errno.is_none()),
                        (kills, kills),
                        "{denied:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_remedy_that_is_named_works() {
    let Some(arch) = Arch::host() else { return };
    let policy = Policy::compile(&Options::CLOSED).unwrap();
    for (number, name, _) in table::calls(arch) {
        let denied = policy.denied(arch.audit(), i32::try_from(number).unwrap(), &[0; 6]);
        assert_eq!(denied.syscall, name);
        let extra = [name.to_owned()];
        let with =
            |network, exec, extra| Policy::compile(&Options { network, exec, extra, ..Options::CLOSED });
        let opened = match denied.remedy {
            Remedy::Name => with(false, false, &extra[..]),
            Remedy::Exec => with(false, true, &[]),
            Remedy::Network => with(true, false, &[]),
            Remedy::Nothing(_) => continue,
        };
        let args = if name == "socket" { [2, 1, 0, 0, 0, 0] } else { [0; 6] };
        let data = Data { nr: number, arch: arch.audit(), args };
        assert_eq!(run(&opened.unwrap().fallback()[0], &data).0, ALLOW, "{name}");
    }
}

#[derive(Debug, Clone, Copy)]
enum Outcome {
    Quiet(Denial),
    Told(Denial),
}

#[test]
fn newer_numbers_do_not_exist() {
    each(|arch, _, policy| {
        let newer = [NEWEST + 1, 500, 512, 547, 600, 4096, X32 - 1, NEGATIVE, NEGATIVE + 39, u32::MAX];
        for nr in newer {
            let data = Data { nr, arch: arch.audit(), args: [0; 6] };
            assert_eq!(run(&policy.notifying()[0], &data).0, errno(libc::ENOSYS), "{nr:#x}");
            assert_eq!(run(&policy.fallback()[0], &data).0, errno(libc::ENOSYS), "{nr:#x}");
            assert_eq!(run(policy.coarse(), &data).0, TRACE, "{nr:#x}");
        }
    });
}

#[test]
fn foreign_abis_are_forbidden() {
    each(|arch, _, policy| {
        let other = if arch == Arch::X86_64 { Arch::Aarch64 } else { Arch::X86_64 };
        for audit in [I386, ARM, other.audit(), 0, arch.audit() & !0x4000_0000] {
            for nr in (0..600).chain([X32, X32 + 1, u32::MAX]) {
                foreign(policy, Data { nr, arch: audit, args: [0; 6] });
            }
        }
        for nr in (X32..X32 + 600).chain([NEGATIVE - 1]) {
            let data = Data { nr, arch: arch.audit(), args: [0; 6] };
            match arch {
                Arch::X86_64 => foreign(policy, data),
                Arch::Aarch64 => assert_eq!(run(&policy.notifying()[0], &data).0, errno(libc::ENOSYS)),
            }
        }
    });
}

#[track_caller]
fn foreign(policy: &Policy, data: Data) {
    assert_eq!(run(&policy.notifying()[0], &data).0, NOTIFY, "{data:x?}");
    assert_eq!(run(&policy.fallback()[0], &data).0, KILL, "{data:x?}");
    assert_eq!(run(policy.coarse(), &data).0, TRACE, "{data:x?}");
    let judged = policy.judge(data.arch, data.nr.cast_signed(), &data.args);
    assert!(matches!(judged, Judgement::Kill { .. }), "{judged:?}");
}

#[test]
fn the_search_is_short() {
    each(|arch, _, policy| {
        for (&nr, call) in &policy.calls {
            if !matches!(call.verdict, Verdict::Partly(_)) {
                let data = Data { nr, arch: arch.audit(), args: [0; 6] };
                assert!(run(&policy.notifying()[0], &data).1 < 16, "{}", call.name);
            }
        }
    });
}

#[test]
fn names_of_what_is_not_in_the_table_are_bounded() {
    let options = Options::CLOSED;
    let policy = Policy::compile_for(Arch::X86_64, &options).unwrap();
    let name = |arch, nr| match policy.judge(arch, nr, &[0; 6]) {
        Judgement::Kill { name } | Judgement::Refuse { name, .. } => name.into_owned(),
    };
    let native = Arch::X86_64.audit();
    assert_eq!(name(native, 101), "ptrace");
    assert_eq!(name(I386, 20), "i386:20");
    assert_eq!(name(I386, i32::MAX), "i386:other");
    assert_eq!(name(ARM, 3), "arm:3");
    assert_eq!(name(1, 3), "foreign:3");
    assert_eq!(name(native, 0x4000_0000 + 41), "x32:41");
    assert_eq!(name(native, i32::MAX), "x32:other");
    assert_eq!(name(native, 500), "syscall_500");
    assert_eq!(name(native, -1), "syscall_other");
    let mut labels = BTreeMap::new();
    for nr in (i32::MIN..i32::MAX).step_by(9973).chain(-2000..2000) {
        for arch in [native, I386, ARM, 7] {
            labels.insert(name(arch, nr), ());
        }
    }
    assert!(labels.len() < 6000);
}
