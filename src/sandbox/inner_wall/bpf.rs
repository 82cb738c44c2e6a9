//! From verdicts to a BPF program. The number of a call is found by a binary search over ranges; where arguments
//! decide, the search jumps into a section for that call. Jumps in BPF are relative and go forward, so programs can be
//! put in a row.
//!
//! The kernel takes some 0.2 µs for each instruction of a program that it is given, in every job, so that what is
//! written here is short before all else.

use libc::sock_filter;

use super::rules::{Arch, Cond, Rule, Test};
use super::table::NEWEST;

/// Instructions of linux/bpf_common.h.
const LD_W_ABS: u16 = 0x20;
const JMP_JA: u16 = 0x05;
const JMP_JEQ_K: u16 = 0x15;
const JMP_JGT_K: u16 = 0x25;
const JMP_JGE_K: u16 = 0x35;
const JMP_JSET_K: u16 = 0x45;
const ALU_AND_K: u16 = 0x54;
const RET_K: u16 = 0x06;

/// Offsets in `struct seccomp_data`.
const OFFSET_NR: u32 = 0;
const OFFSET_ARCH: u32 = 4;
const OFFSET_ARGS: u32 = 16;

/// Numbers of the x32 ABI carry bit 30. From bit 31 on they are negative and name nothing on any ABI.
pub(super) const X32: u32 = 0x4000_0000;
pub(super) const NEGATIVE: u32 = 0x8000_0000;

/// A left branch of so many ranges is at most 2 x 100 instructions long: within the 255 of a conditional
/// jump.
const SHORT: usize = 100;

/// A seccomp program, ready to be installed.
#[derive(Debug, Clone)]
pub struct FilterProgram(Vec<sock_filter>);

impl FilterProgram {
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

/// Decides by the arguments of one call, or of several that are judged alike.
#[derive(Debug)]
pub(super) struct Section {
    rules: &'static [Rule],
    matched: u32,
    unmatched: Leaf,
}

impl Section {
    /// If one of the rules holds: the action `matched`; else: `unmatched`, which may be a later section.
    pub(super) fn new(rules: &'static [Rule], matched: u32, unmatched: Leaf) -> Self {
        Self { rules, matched, unmatched }
    }

    fn assemble(&self, code: &mut Vec<sock_filter>, jumps: &mut Vec<(usize, usize)>) {
        let mut tests = Tests { code, loaded: None, matches: Vec::new() };
        let mut rules = self.rules;
        while let Some(first) = rules.first().and_then(|rule| rule.first()) {
            // Rules that begin alike, such as those of one level of socket options, share that test.
            let alike = rules.iter().take_while(|rule| rule.len() > 1 && rule.first() == Some(first)).count();
            let (these, rest) = rules.split_at(alike.max(1));
            if alike > 1 {
                let missed = tests.test(first, false);
                these.iter().for_each(|rule| tests.rule(&rule[1..]));
                tests.land(missed);
            } else {
                tests.rule(these[0]);
            }
            rules = rest;
        }
        let matches = tests.matches;
        let one = leaf(self.unmatched, code.len(), jumps);
        code.push(one);
        let end = code.len();
        matches.into_iter().for_each(|jump| jump.to(end, code));
        code.push(statement(RET_K, self.matched));
    }
}

/// A way out of a conditional jump whose target is not known yet.
#[derive(Clone, Copy, Debug)]
struct Exit {
    at: usize,
    /// Taken if the condition holds.
    holds: bool,
    /// The argument whose low half is in the accumulator then.
    loaded: Option<u8>,
}

impl Exit {
    /// A section is far shorter than the 255 instructions that such a jump reaches; a test checks every jump.
    fn to(self, target: usize, code: &mut [sock_filter]) {
        let distance = u8::try_from(target - self.at - 1).unwrap_or(u8::MAX);
        let one = &mut code[self.at];
        *(if self.holds { &mut one.jt } else { &mut one.jf }) = distance;
    }
}

/// The tests of a section as they are written.
struct Tests<'a> {
    code: &'a mut Vec<sock_filter>,
    /// The argument whose low half is in the accumulator.
    loaded: Option<u8>,
    /// Where a rule was found to hold.
    matches: Vec<Exit>,
}

impl Tests<'_> {
    fn rule(&mut self, conditions: &[Cond]) {
        let mut missed = Vec::new();
        for (at, cond) in conditions.iter().enumerate() {
            missed.extend(self.test(cond, at + 1 == conditions.len()));
        }
        self.land(missed);
    }

    /// The ways out where the condition does not hold. Where it does it goes on, or, as the last of its rule, to where
    /// the section matches.
    fn test(&mut self, &Cond { arg, test }: &Cond, last: bool) -> Vec<Exit> {
        let low = OFFSET_ARGS + 8 * u32::from(arg);
        if self.loaded != Some(arg) {
            self.code.push(statement(LD_W_ABS, low));
            self.loaded = Some(arg);
        }
        let mut missed = Vec::new();
        let (operation, value, holds) = match test {
            Test::Is(value) => (JMP_JEQ_K, value, true),
            Test::Not(value) => (JMP_JEQ_K, value, false),
            Test::Masked(mask, 0) => (JMP_JSET_K, mask, false),
            Test::Masked(mask, value) => {
                self.code.push(statement(ALU_AND_K, mask));
                self.loaded = None;
                (JMP_JEQ_K, value, true)
            }
            Test::Within(first, u32::MAX) => (JMP_JGE_K, first, true),
            Test::Within(first, last) => {
                if first > 0 {
                    missed.push(self.jump(JMP_JGE_K, first, false));
                }
                (JMP_JGT_K, last, false)
            }
            Test::Null => {
                missed.push(self.jump(JMP_JEQ_K, 0, false));
                self.code.push(statement(LD_W_ABS, low + 4));
                self.loaded = None;
                (JMP_JEQ_K, 0, true)
            }
        };
        missed.push(self.jump(operation, value, !holds));
        if last {
            self.matches.push(Exit { at: self.code.len() - 1, holds, loaded: None });
        }
        missed
    }

    fn jump(&mut self, operation: u16, k: u32, holds: bool) -> Exit {
        self.code.push(sock_filter { code: operation, jt: 0, jf: 0, k });
        Exit { at: self.code.len() - 1, holds, loaded: self.loaded }
    }

    /// What was missed goes on here.
    fn land(&mut self, missed: Vec<Exit>) {
        let target = self.code.len();
        // From elsewhere the accumulator may come with something else in it.
        if missed.iter().any(|exit| exit.loaded != self.loaded) {
            self.loaded = None;
        }
        missed.into_iter().for_each(|exit| exit.to(target, self.code));
    }
}

/// What a program does.
pub(super) struct FilterPlan<L> {
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

impl<L: Fn(u32) -> Leaf> FilterPlan<L> {
    pub(super) fn assemble(self) -> FilterProgram {
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
            section.assemble(&mut code, &mut jumps);
        }
        for (at, section) in jumps {
            code[at].k = distance(at, starts[section]);
        }
        FilterProgram(code)
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
