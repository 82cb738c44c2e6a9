//! From verdicts to a BPF program. The number of a call is found by a binary search over ranges, so that
//! one program of a few hundred instructions does; where arguments decide, the search jumps into a section
//! that seccompiler wrote. Jumps in BPF are relative and go forward, so programs can be put in a row.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, sock_filter,
};

use super::rules::{Arch, Cond, Rule, Test};
use super::table::NEWEST;

/// Instructions of linux/bpf_common.h.
const LD_W_ABS: u16 = 0x20;
const JMP_JA: u16 = 0x05;
const JMP_JEQ_K: u16 = 0x15;
const JMP_JGE_K: u16 = 0x35;
const RET_K: u16 = 0x06;

/// Offsets in `struct seccomp_data`.
const OFFSET_NR: u32 = 0;
const OFFSET_ARCH: u32 = 4;

/// Numbers of the x32 ABI carry bit 30. From bit 31 on they are negative and name nothing on any ABI.
pub(super) const X32: u32 = 0x4000_0000;
pub(super) const NEGATIVE: u32 = 0x8000_0000;

/// Stands for "no rule matched" in what seccompiler writes, until the real action takes its place: it has
/// no word for a user notification, nor for going on elsewhere.
const UNMATCHED: u16 = 0x5a5a;

/// A left branch of so many ranges is at most 2 x 100 instructions long: within the 255 of a conditional
/// jump.
const SHORT: usize = 100;

/// A seccomp program, ready to be installed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program(Vec<sock_filter>);

impl Program {
    /// The instructions, laid out as `struct sock_filter`.
    pub fn instructions(&self) -> &[sock_filter] {
        &self.0
    }

    /// The instructions in memory order, 8 bytes each.
    pub fn bytes(&self) -> Vec<u8> {
        self.0
            .iter()
            .flat_map(|one| {
                let ([c0, c1], [k0, k1, k2, k3]) = (one.code.to_ne_bytes(), one.k.to_ne_bytes());
                [c0, c1, one.jt, one.jf, k0, k1, k2, k3]
            })
            .collect()
    }
}

/// What follows once the number is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Leaf {
    /// An action of linux/seccomp.h, with its data.
    Return(u32),
    /// The arguments decide, in the section of that index.
    Section(usize),
}

/// A program of seccompiler that decides some numbers by their arguments.
#[derive(Debug)]
pub(super) struct Section {
    code: BpfProgram,
    unmatched: Leaf,
}

impl Section {
    /// If a rule holds for a number: `matched`; else: `unmatched`, which may be a later section.
    pub(super) fn new(
        arch: Arch,
        rules: BTreeMap<u32, &[Rule]>,
        matched: SeccompAction,
        unmatched: Leaf,
    ) -> Result<Self, BackendError> {
        let rules = rules
            .into_iter()
            .map(|(number, rules)| {
                Ok((i64::from(number), rules.iter().map(translate).collect::<Result<_, _>>()?))
            })
            .collect::<Result<_, BackendError>>()?;
        let target = match arch {
            Arch::X86_64 => TargetArch::x86_64,
            Arch::Aarch64 => TargetArch::aarch64,
        };
        let filter = SeccompFilter::new(rules, SeccompAction::Trace(UNMATCHED.into()), matched, target)?;
        Ok(Self { code: filter.try_into()?, unmatched })
    }
}

fn translate(rule: &Rule) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(rule.iter().map(condition).collect::<Result<_, _>>()?)
}

fn condition(&Cond { arg, test }: &Cond) -> Result<SeccompCondition, BackendError> {
    use SeccompCmpArgLen::{Dword, Qword};
    let (length, operator, value) = match test {
        Test::Is(value) => (Dword, SeccompCmpOp::Eq, value.into()),
        Test::Not(value) => (Dword, SeccompCmpOp::Ne, value.into()),
        Test::Masked(mask, value) => (Dword, SeccompCmpOp::MaskedEq(mask.into()), value.into()),
        Test::Null => (Qword, SeccompCmpOp::Eq, 0),
    };
    SeccompCondition::new(arg, length, operator, value)
}

/// What a program does.
pub(super) struct Plan<L> {
    pub(super) arch: Arch,
    /// For calls through another ABI: int 0x80, x32.
    pub(super) foreign: u32,
    /// For numbers above the table.
    pub(super) newer: u32,
    /// For numbers up to [`NEWEST`].
    pub(super) leaf: L,
    /// In the order of their jumps: forward.
    pub(super) sections: Vec<Section>,
}

impl<L: Fn(u32) -> Leaf> Plan<L> {
    pub(super) fn assemble(self) -> Program {
        let mut code = vec![
            statement(LD_W_ABS, OFFSET_ARCH),
            sock_filter { code: JMP_JEQ_K, jt: 1, jf: 0, k: self.arch.audit() },
            statement(RET_K, self.foreign),
            statement(LD_W_ABS, OFFSET_NR),
        ];
        let mut jumps = Vec::new();
        search(&self.ranges(), &mut code, &mut jumps);

        let mut starts = Vec::with_capacity(self.sections.len());
        for section in self.sections {
            starts.push(code.len());
            for mut one in section.code {
                if one.code == RET_K && one.k == libc::SECCOMP_RET_TRACE | u32::from(UNMATCHED) {
                    one = leaf(section.unmatched, code.len(), &mut jumps);
                } else if one.code == RET_K
                    && one.k == libc::SECCOMP_RET_KILL_PROCESS
                    && code.len() == starts[starts.len() - 1] + 2
                {
                    // seccompiler checks the architecture again and kills: never reached, but no reader
                    // should have to work that out.
                    one.k = self.foreign;
                }
                code.push(one);
            }
        }
        for (at, section) in jumps {
            code[at].k = distance(at, starts[section]);
        }
        Program(code)
    }

    /// The first number of each range, in ascending order, and what it meets.
    fn ranges(&self) -> Vec<(u32, Leaf)> {
        let mut ranges: Vec<(u32, Leaf)> = (0..=NEWEST).map(|number| (number, (self.leaf)(number))).collect();
        ranges.push((NEWEST + 1, Leaf::Return(self.newer)));
        if self.arch == Arch::X86_64 {
            ranges.push((X32, Leaf::Return(self.foreign)));
            ranges.push((NEGATIVE, Leaf::Return(self.newer)));
        }
        ranges.dedup_by_key(|&mut (_, leaf)| leaf);
        ranges
    }
}

/// Binary search: the number is in the accumulator.
fn search(ranges: &[(u32, Leaf)], code: &mut Vec<sock_filter>, jumps: &mut Vec<(usize, usize)>) {
    if let [(_, only)] = *ranges {
        let one = leaf(only, code.len(), jumps);
        code.push(one);
        return;
    }
    let (left, right) = ranges.split_at(ranges.len() / 2);
    let pivot = right[0].0;
    let at = code.len();
    if left.len() <= SHORT {
        code.push(sock_filter { code: JMP_JGE_K, jt: 0, jf: 0, k: pivot });
        search(left, code, jumps);
        code[at].jt = u8::try_from(code.len() - at - 1).unwrap_or(u8::MAX);
    } else {
        code.push(sock_filter { code: JMP_JGE_K, jt: 0, jf: 1, k: pivot });
        code.push(statement(JMP_JA, 0));
        search(left, code, jumps);
        code[at + 1].k = distance(at + 1, code.len());
    }
    search(right, code, jumps);
}

/// The instruction of a leaf; a jump gets its distance once the sections are laid out.
fn leaf(leaf: Leaf, at: usize, jumps: &mut Vec<(usize, usize)>) -> sock_filter {
    match leaf {
        Leaf::Return(action) => statement(RET_K, action),
        Leaf::Section(section) => {
            jumps.push((at, section));
            statement(JMP_JA, 0)
        }
    }
}

fn distance(from: usize, to: usize) -> u32 {
    u32::try_from(to.saturating_sub(from + 1)).unwrap_or(u32::MAX)
}

const fn statement(code: u16, k: u32) -> sock_filter {
    sock_filter { code, jt: 0, jf: 0, k }
}
