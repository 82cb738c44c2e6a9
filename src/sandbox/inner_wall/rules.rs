//! The vocabulary of the policy: classes of calls, argument filters, architectures.
//! What is in each class stands in `table/`, the argument filters in `args.rs`.

use super::Options;

/// A machine the policy is written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arch {
    /// 64-bit x86.
    X86_64,
    /// 64-bit Arm.
    Aarch64,
}

impl Arch {
    /// The machine this build is for, if the policy knows it.
    pub const fn host() -> Option<Self> {
        if cfg!(target_arch = "x86_64") {
            Some(Self::X86_64)
        } else if cfg!(target_arch = "aarch64") {
            Some(Self::Aarch64)
        } else {
            None
        }
    }

    /// The `AUDIT_ARCH_*` value of linux/audit.h, as seccomp reports it.
    pub const fn audit(self) -> u32 {
        match self {
            Self::X86_64 => 0xC000_003E,
            Self::Aarch64 => 0xC000_00B7,
        }
    }
}

/// In place of an errno: the call succeeds without having been made.
pub(super) const NOTHING: i32 = 0;

/// What happens to a call, before the options of the environment are known.
#[derive(Debug, Clone, Copy)]
pub(super) enum Class {
    Allow,
    /// An errno from inside the filter, of which nobody is told.
    Quiet(i32),
    /// An honest errno, counted.
    Refuse(i32),
    /// Ends the job.
    Kill,
    /// Allowed with some arguments only.
    Partly(&'static Filter),
    /// The same where flags have other bits on each machine: x86_64, aarch64.
    PartlyOn(&'static [Filter; 2]),
    /// The first for jobs with network, the second for all others.
    WithNetwork(&'static [Class; 2]),
    /// For environments that allow exec; refused in all others.
    WithExec,
    /// The second where exec is of some programs alone.
    UnlessListed(&'static [Class; 2]),
    /// The second where no control group counts memory, so that it is bounded by how much of it there can be.
    ByMemoryGroup(&'static [Class; 2]),
    /// For environments that allow exec, where a control group gives each job its share of the processor. In all
    /// others it succeeds and does nothing.
    Sessions,
}

/// What happens to a call under given options.
#[derive(Debug, Clone, Copy)]
pub(super) enum Verdict {
    Allow,
    Quiet(i32),
    Refuse(i32),
    Kill,
    Partly(&'static Filter),
}

impl Class {
    pub(super) const fn under(self, arch: Arch, options: &Options<'_>) -> Verdict {
        match self {
            Self::Allow => Verdict::Allow,
            Self::Quiet(errno) => Verdict::Quiet(errno),
            Self::Refuse(errno) => Verdict::Refuse(errno),
            Self::Kill => Verdict::Kill,
            Self::Partly(filter) => Verdict::Partly(filter),
            Self::PartlyOn([filter, _]) if matches!(arch, Arch::X86_64) => Verdict::Partly(filter),
            Self::PartlyOn([_, filter]) => Verdict::Partly(filter),
            Self::WithNetwork([with, _]) if options.network => with.under(arch, options),
            Self::WithNetwork([_, without]) => without.under(arch, options),
            Self::WithExec if options.exec => Verdict::Allow,
            Self::UnlessListed([without, _]) if !options.exec_listed => without.under(arch, options),
            Self::UnlessListed([_, with]) => with.under(arch, options),
            Self::ByMemoryGroup([with, _]) if options.memory_group => with.under(arch, options),
            Self::ByMemoryGroup([_, without]) => without.under(arch, options),
            Self::Sessions if options.exec && options.cpu_group => Verdict::Allow,
            // An errno would end programs that want nothing but to be left alone by a terminal, which there is none of.
            Self::Sessions => Verdict::Quiet(NOTHING),
            // Not EACCES: that reads as if the file were at fault, and makes execvp try the next one.
            Self::WithExec => Verdict::Refuse(libc::EPERM),
        }
    }
}

/// How long the start of a job still needs a call that its filter will forbid. The coarse filter forbids
/// it from then on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Until {
    /// Nothing needs it: forbidden before the first import.
    Never,
    /// Needed to raise the outer wall.
    OuterWall,
    /// Needed, or left alone, until the inner wall is set.
    InnerWall,
}

/// Calls that share a class and the reason for it.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) class: Class,
    pub(super) until: Until,
    pub(super) reason: &'static str,
    pub(super) calls: &'static [Call],
}

/// A name and its numbers on x86_64 and aarch64.
pub(super) type Call = (&'static str, i16, i16);

/// In place of a number: the architecture has no such call.
pub(super) const NONE: i16 = -1;

/// An argument filter: allowed if one rule of `allow` holds.
#[derive(Debug)]
pub(super) struct Filter {
    pub(super) allow: &'static [Rule],
    /// Ends the job if one of these holds; they are disjoint from `allow`.
    pub(super) kill: &'static [Rule],
    /// Gets the errno of `otherwise` from inside the filter, of which nobody is told, if one of these holds; disjoint
    /// from the others.
    pub(super) quiet: &'static [Rule],
    /// What happens with any other arguments.
    pub(super) otherwise: Denial,
    /// For people: what is allowed.
    pub(super) detail: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Denial {
    Refuse(i32),
    Kill,
}

/// Holds if each of its conditions does.
pub(super) type Rule = &'static [Cond];

/// One condition on one argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cond {
    pub(super) arg: u8,
    pub(super) test: Test,
}

/// The kernel takes most arguments as 32 bits and ignores what stands above; a test that looked there would
/// refuse innocent calls (a sign-extended int) and, the other way round, could be walked past.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Test {
    /// The low 32 bits equal the value.
    Is(u32),
    /// The low 32 bits differ from the value.
    Not(u32),
    /// The low 32 bits under the mask equal the value.
    Masked(u32, u32),
    /// The low 32 bits are one of these or between them.
    Within(u32, u32),
    /// The whole register is zero: a null pointer.
    Null,
}

impl Filter {
    /// What a call with these arguments meets; `None` if it is allowed.
    pub(super) fn judge(&self, args: &[u64; 6]) -> Option<Denial> {
        if holds(self.kill, args) {
            Some(Denial::Kill)
        } else if holds(self.allow, args) {
            None
        } else {
            Some(self.otherwise)
        }
    }

    /// Nobody is told of a call with these arguments.
    pub(super) fn is_quiet(&self, args: &[u64; 6]) -> bool {
        holds(self.quiet, args)
    }
}

fn holds(rules: &[Rule], args: &[u64; 6]) -> bool {
    rules.iter().any(|rule| rule.iter().all(|cond| cond.holds(args)))
}

impl Cond {
    fn holds(&self, args: &[u64; 6]) -> bool {
        let whole = args[usize::from(self.arg)];
        let low = whole & u64::from(u32::MAX);
        match self.test {
            Test::Is(value) => low == u64::from(value),
            Test::Not(value) => low != u64::from(value),
            Test::Masked(mask, value) => low & u64::from(mask) == u64::from(value),
            Test::Within(first, last) => (u64::from(first)..=u64::from(last)).contains(&low),
            Test::Null => whole == 0,
        }
    }
}
