//! Argument filters: calls that are only partly safe. A filter sees registers, never memory, so what hides
//! behind a pointer (clone3, the address of connect) cannot be told apart here.

mod sockets;

use super::rules::{Cond, Denial, Filter, Test};
pub(super) use sockets::*;

const fn is(arg: u8, value: u32) -> Cond {
    Cond { arg, test: Test::Is(value) }
}

const fn not(arg: u8, value: u32) -> Cond {
    Cond { arg, test: Test::Not(value) }
}

const fn masked(arg: u8, mask: u32, value: u32) -> Cond {
    Cond { arg, test: Test::Masked(mask, value) }
}

const fn within(arg: u8, first: u32, last: u32) -> Cond {
    Cond { arg, test: Test::Within(first, last) }
}

const fn null(arg: u8) -> Cond {
    Cond { arg, test: Test::Null }
}

/// Flags that lead out of the job: every `CLONE_NEW*` that clone itself takes (`CLONE_NEWTIME` needs clone3:
/// its bit means a signal here), and the one that makes a child of the job's parent, which waits for the job
/// alone.
const OUTWARD: u32 = 0x0000_8000 // CLONE_PARENT
    | 0x0002_0000 // CLONE_NEWNS
    | 0x0200_0000 // CLONE_NEWCGROUP
    | 0x0400_0000 // CLONE_NEWUTS
    | 0x0800_0000 // CLONE_NEWIPC
    | 0x1000_0000 // CLONE_NEWUSER
    | 0x2000_0000 // CLONE_NEWPID
    | 0x4000_0000; // CLONE_NEWNET

pub(super) static CLONE: Filter = Filter {
    allow: &[&[masked(0, OUTWARD, 0)]],
    kill: &[],
    quiet: &[],
    otherwise: Denial::Kill,
    detail: "without namespace flags and CLONE_PARENT",
};

/// Options of prctl that change or show the calling process only.
pub(super) static PRCTL: Filter = Filter {
    allow: &[
        &[is(0, 15)],           // PR_SET_NAME: threads name themselves
        &[is(0, 16)],           // PR_GET_NAME
        &[is(0, 0x5356_4d41)],  // PR_SET_VMA: names for mappings (glibc, jemalloc)
        &[is(0, 1)],            // PR_SET_PDEATHSIG
        &[is(0, 2)],            // PR_GET_PDEATHSIG
        &[is(0, 3)],            // PR_GET_DUMPABLE
        &[is(0, 4), is(1, 0)],  // PR_SET_DUMPABLE, downwards: upwards hands core dumps to the host
        &[is(0, 7)],            // PR_GET_KEEPCAPS
        &[is(0, 13)],           // PR_GET_TIMING
        &[is(0, 21)],           // PR_GET_SECCOMP
        &[is(0, 23)],           // PR_CAPBSET_READ
        &[is(0, 25)],           // PR_GET_TSC
        &[is(0, 27)],           // PR_GET_SECUREBITS
        &[is(0, 29)],           // PR_SET_TIMERSLACK
        &[is(0, 30)],           // PR_GET_TIMERSLACK
        &[is(0, 36)],           // PR_SET_CHILD_SUBREAPER: its orphans still end with the job
        &[is(0, 37)],           // PR_GET_CHILD_SUBREAPER
        &[is(0, 38)],           // PR_SET_NO_NEW_PRIVS: on already
        &[is(0, 39)],           // PR_GET_NO_NEW_PRIVS
        &[is(0, 40)],           // PR_GET_TID_ADDRESS
        &[is(0, 41)],           // PR_SET_THP_DISABLE (jemalloc, redis)
        &[is(0, 42)],           // PR_GET_THP_DISABLE
        &[is(0, 47), is(1, 1)], // PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET
        &[is(0, 50)],           // PR_SVE_SET_VL
        &[is(0, 51)],           // PR_SVE_GET_VL
        &[is(0, 52)],           // PR_GET_SPECULATION_CTRL
        &[is(0, 55)],           // PR_SET_TAGGED_ADDR_CTRL: memory tagging of glibc
        &[is(0, 56)],           // PR_GET_TAGGED_ADDR_CTRL
        &[is(0, 64)],           // PR_SME_GET_VL
        &[is(0, 0x4155_5856)],  // PR_GET_AUXV
    ],
    kill: &[
        &[is(0, 22)], // PR_SET_SECCOMP: the same as seccomp
    ],
    quiet: &[],
    // What a kernel answers that does not know an option.
    otherwise: Denial::Refuse(libc::EINVAL),
    detail: "settings of the calling process; PR_SET_SECCOMP ends the job",
};

pub(super) static IOCTL: Filter = Filter {
    allow: &[
        &[is(1, 0x5401)],      // TCGETS: isatty
        &[is(1, 0x802c_542a)], // TCGETS2: isatty of newer C libraries
        &[is(1, 0x5413)],      // TIOCGWINSZ: os.get_terminal_size
        &[is(1, 0x540f)],      // TIOCGPGRP
        &[is(1, 0x541b)],      // FIONREAD
        &[is(1, 0x5411)],      // TIOCOUTQ
        &[is(1, 0x5421)],      // FIONBIO: socket.setblocking
        &[is(1, 0x5450)],      // FIONCLEX
        &[is(1, 0x5451)],      // FIOCLEX: os.set_inheritable
        &[is(1, 0x5452)],      // FIOASYNC
        &[is(1, 0x4004_9409)], // FICLONE: pathlib copies by itself where the file system says that it cannot
        &[is(1, 0x8905)],      // SIOCATMARK
        &[is(1, 0x8910)],      // SIOCGIFNAME: socket.if_indextoname
        &[is(1, 0x8912)],      // SIOCGIFCONF
        &[is(1, 0x8913)],      // SIOCGIFFLAGS
        &[is(1, 0x8915)],      // SIOCGIFADDR
        &[is(1, 0x8919)],      // SIOCGIFBRDADDR
        &[is(1, 0x891b)],      // SIOCGIFNETMASK
        &[is(1, 0x8921)],      // SIOCGIFMTU
        &[is(1, 0x8933)],      // SIOCGIFINDEX: socket.if_nametoindex
    ],
    kill: &[],
    quiet: &[],
    // What a file answers that has no such control.
    otherwise: Denial::Refuse(libc::ENOTTY),
    detail: "terminal and queue sizes, non-blocking, close-on-exec, clones of files, interface queries",
};

/// Reads and writes past the page cache: of a file of the host's that means its disk each time, in nobody's account,
/// and of a pipe a packet for each write. A bit of its own on each machine.
const O_DIRECT: [u32; 2] = [0o40_000, 0o200_000];

/// Filters of flags without [`O_DIRECT`], on x86_64 and aarch64.
macro_rules! without_o_direct {
    ($(#[$doc:meta])* $name:ident, $arg:literal) => {
        $(#[$doc])*
        pub(super) static $name: [Filter; 2] = [
            Filter { allow: &[&[masked($arg, O_DIRECT[0], 0)]], ..WITHOUT_O_DIRECT },
            Filter { allow: &[&[masked($arg, O_DIRECT[1], 0)]], ..WITHOUT_O_DIRECT },
        ];
    };
}

const WITHOUT_O_DIRECT: Filter = Filter {
    allow: &[],
    kill: &[],
    quiet: &[],
    // What a file system answers that has no such access.
    otherwise: Denial::Refuse(libc::EINVAL),
    detail: "without O_DIRECT",
};

without_o_direct!(OPEN, 1);
without_o_direct!(OPENAT, 2);
without_o_direct!(PIPE2, 1);

/// What is not in these lists reaches further than the job: leases make others wait who open the file, the worker
/// too; F_NOTIFY tells what others do in a directory that all share, as inotify; locks of open files are kernel memory
/// in no account.
macro_rules! fcntl {
    ($o_direct:expr) => {
        Filter {
            allow: &[
                &[within(1, 0, 3)],                     // F_DUPFD, descriptor flags, F_GETFL
                &[is(1, 4), masked(2, $o_direct, 0)],   // F_SETFL
                &[within(1, 5, 11)],                    // record locks, F_SETOWN, F_SETSIG and what asks for them
                &[within(1, 15, 16)],                   // F_SETOWN_EX, F_GETOWN_EX
                &[is(1, 1025)],                         // F_GETLEASE
                &[within(1, 1030, 1034)],               // F_DUPFD_CLOEXEC, sizes of pipes, seals
            ],
            kill: &[],
            quiet: &[],
            otherwise: Denial::Refuse(libc::EINVAL),
            detail: "descriptor flags without O_DIRECT, record locks, signals of descriptors, pipe sizes, seals",
        }
    };
}

pub(super) static FCNTL: [Filter; 2] = [fcntl!(O_DIRECT[0]), fcntl!(O_DIRECT[1])];

pub(super) static RENAMEAT2: Filter = Filter {
    allow: &[&[masked(4, !3, 0)]], // RENAME_NOREPLACE, RENAME_EXCHANGE
    kill: &[],
    quiet: &[],
    // What a file system answers that has no whiteouts.
    otherwise: Denial::Refuse(libc::EINVAL),
    detail: "without RENAME_WHITEOUT, which leaves a device behind",
};

const MAP_HUGETLB: u32 = 0x40000;

pub(super) static MMAP: Filter = Filter {
    allow: &[&[masked(3, MAP_HUGETLB, 0)]],
    kill: &[],
    quiet: &[],
    // What the kernel answers where there is no pool.
    otherwise: Denial::Refuse(libc::ENOMEM),
    detail: "without MAP_HUGETLB: the operator's pool of huge pages is in no account",
};

const MFD_HUGETLB: u32 = 4;

pub(super) static MEMFD: Filter = Filter {
    allow: &[&[masked(1, MFD_HUGETLB, 0)]],
    kill: &[],
    quiet: &[],
    otherwise: Denial::Refuse(libc::EINVAL),
    detail: "without MFD_HUGETLB: the operator's pool of huge pages is in no account",
};

/// What is missing here merges pages with those of others (MADV_MERGEABLE: how long a write takes then tells what is
/// in their memory), moves out or puts together pages of files that all share (MADV_COLD, MADV_PAGEOUT,
/// MADV_COLLAPSE), or is for tests of the kernel.
pub(super) static MADVISE: Filter = Filter {
    allow: &[
        &[within(2, 0, 4)],     // MADV_NORMAL to MADV_DONTNEED
        &[within(2, 8, 11)],    // MADV_FREE, MADV_REMOVE, MADV_DONTFORK, MADV_DOFORK
        &[within(2, 14, 19)],   // huge pages, dumps, MADV_WIPEONFORK, MADV_KEEPONFORK
        &[within(2, 22, 23)],   // MADV_POPULATE_READ, MADV_POPULATE_WRITE
        &[within(2, 102, 103)], // MADV_GUARD_INSTALL, MADV_GUARD_REMOVE: stacks of newer C libraries
    ],
    kill: &[],
    quiet: &[],
    otherwise: Denial::Refuse(libc::EINVAL),
    detail: "advice on own memory that tells nothing of others'",
};

/// Reads only what is in the page cache already (`RWF_NOWAIT`), or leaves it as it was found (`RWF_DONTCACHE`). Of a
/// file that all jobs share, both tell what another job has read of late.
const ASKS_THE_CACHE: u32 = 0x08 | 0x80;

pub(super) static PREADV2: Filter = Filter {
    allow: &[&[masked(5, ASKS_THE_CACHE, 0)]],
    kill: &[],
    quiet: &[],
    // What a file system answers that cannot do it.
    otherwise: Denial::Refuse(libc::EOPNOTSUPP),
    detail: "without RWF_NOWAIT and RWF_DONTCACHE",
};

/// Empties the page cache of any file that can be read: what is there again a moment later was read by another.
const POSIX_FADV_DONTNEED: u32 = 4;

pub(super) static FADVISE: Filter = Filter {
    allow: &[&[not(3, POSIX_FADV_DONTNEED)]],
    kill: &[],
    quiet: &[],
    otherwise: Denial::Refuse(libc::EPERM),
    detail: "all advice but POSIX_FADV_DONTNEED",
};

/// The file type in a mode.
const S_IFMT: u32 = 0o170_000;

const S_IFIFO: u32 = 0o010_000;
const S_IFREG: u32 = 0o100_000;

pub(super) static MKNOD: Filter = Filter {
    allow: &[
        &[masked(1, S_IFMT, S_IFIFO)],
        &[masked(1, S_IFMT, S_IFREG)],
        &[masked(1, S_IFMT, 0)], // means a regular file
    ],
    kill: &[],
    quiet: &[],
    otherwise: Denial::Refuse(libc::EPERM),
    detail: "fifos and regular files",
};

pub(super) static MKNODAT: Filter = Filter {
    allow: &[
        &[masked(2, S_IFMT, S_IFIFO)],
        &[masked(2, S_IFMT, S_IFREG)],
        &[masked(2, S_IFMT, 0)], // means a regular file
    ],
    kill: &[],
    quiet: &[],
    otherwise: Denial::Refuse(libc::EPERM),
    detail: "fifos and regular files",
};

/// Ids that can be a job's own, or -1 for none: the kernel itself refuses all of them that are not. For ids of the
/// system it would say that there are none in the job's user namespace, and no program expects that.
const fn own(arg: u8) -> Cond {
    within(arg, 1000, u32::MAX)
}

const OWN_IDS: Filter = Filter {
    allow: &[],
    kill: &[],
    quiet: &[],
    otherwise: Denial::Refuse(libc::EPERM),
    detail: "to the job's own ids",
};

pub(super) static SET_ID: Filter = Filter { allow: &[&[own(0)]], ..OWN_IDS };
/// The third, of those that have one, is left to the kernel.
pub(super) static SET_IDS: Filter = Filter { allow: &[&[own(0), own(1)]], ..OWN_IDS };
pub(super) static CHOWN: Filter = Filter { allow: &[&[own(1), own(2)]], ..OWN_IDS };
pub(super) static CHOWN_AT: Filter = Filter { allow: &[&[own(2), own(3)]], ..OWN_IDS };

const PRIO_PROCESS: u32 = 0;

/// The job has no right to be less nice than it is, and sees no process but its own.
pub(super) static SETPRIORITY: Filter = Filter {
    allow: &[&[is(0, PRIO_PROCESS)]],
    kill: &[],
    quiet: &[],
    otherwise: Denial::Refuse(libc::EPERM),
    detail: "of a process, and only to be nicer: os.nice",
};

pub(super) static PERSONALITY: Filter = Filter {
    allow: &[&[is(0, 0xffff_ffff)]],
    kill: &[],
    quiet: &[],
    otherwise: Denial::Refuse(libc::EPERM),
    detail: "query only",
};

/// The limit that every job is born with keeps its memory from the program that a host may pipe core dumps to.
/// Any other value would not, not even a lower one: see where it is set, in `plan`.
const RLIMIT_CORE: u32 = 4;

pub(super) static PRLIMIT: Filter = Filter {
    allow: &[
        &[is(0, 0), not(1, RLIMIT_CORE)], // the caller itself
        &[null(2)],                       // no new limit: a query
    ],
    kill: &[],
    quiet: &[],
    otherwise: Denial::Refuse(libc::EPERM),
    detail: "the caller's own limits but that of core dumps, and queries",
};

pub(super) static SETRLIMIT: Filter = Filter {
    allow: &[&[not(0, RLIMIT_CORE)]],
    kill: &[],
    quiet: &[],
    otherwise: Denial::Refuse(libc::EPERM),
    detail: "all limits but that of core dumps",
};
