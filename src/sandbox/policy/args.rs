//! Argument filters: calls that are only partly safe. A filter sees registers, never memory, so what hides
//! behind a pointer (clone3, the address of connect) cannot be told apart here.

use super::rules::{Cond, Denial, Filter, Test};

const fn is(arg: u8, value: u32) -> Cond {
    Cond { arg, test: Test::Is(value) }
}

const fn not(arg: u8, value: u32) -> Cond {
    Cond { arg, test: Test::Not(value) }
}

const fn masked(arg: u8, mask: u32, value: u32) -> Cond {
    Cond { arg, test: Test::Masked(mask, value) }
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
    // What a file answers that has no such control.
    otherwise: Denial::Refuse(libc::ENOTTY),
    detail: "terminal and queue sizes, non-blocking, close-on-exec, clones of files, interface queries",
};

pub(super) static FCNTL: Filter = Filter {
    allow: &[&[
        not(1, 1024), // F_SETLEASE: makes others wait who open the file, the worker too
        not(1, 1026), // F_NOTIFY: tells what others do in a directory that all share, as inotify
    ]],
    kill: &[],
    otherwise: Denial::Refuse(libc::EINVAL),
    detail: "all but leases and directory signals",
};

/// Reads only what is in the page cache already (`RWF_NOWAIT`), or leaves it as it was found (`RWF_DONTCACHE`). Of a
/// file that all jobs share, both tell what another job has read of late.
const ASKS_THE_CACHE: u32 = 0x08 | 0x80;

pub(super) static PREADV2: Filter = Filter {
    allow: &[&[masked(5, ASKS_THE_CACHE, 0)]],
    kill: &[],
    // What a file system answers that cannot do it.
    otherwise: Denial::Refuse(libc::EOPNOTSUPP),
    detail: "without RWF_NOWAIT and RWF_DONTCACHE",
};

/// Empties the page cache of any file that can be read: what is there again a moment later was read by another.
const POSIX_FADV_DONTNEED: u32 = 4;

pub(super) static FADVISE: Filter = Filter {
    allow: &[&[not(3, POSIX_FADV_DONTNEED)]],
    kill: &[],
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
    otherwise: Denial::Refuse(libc::EPERM),
    detail: "fifos and regular files",
};

pub(super) static PERSONALITY: Filter = Filter {
    allow: &[&[is(0, 0xffff_ffff)]],
    kill: &[],
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
    otherwise: Denial::Refuse(libc::EPERM),
    detail: "the caller's own limits but that of core dumps, and queries",
};

pub(super) static SETRLIMIT: Filter = Filter {
    allow: &[&[not(0, RLIMIT_CORE)]],
    kill: &[],
    otherwise: Denial::Refuse(libc::EPERM),
    detail: "all limits but that of core dumps",
};

const AF_UNIX: u32 = 1;
const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;
const AF_NETLINK: u32 = 16;
/// The type without `SOCK_CLOEXEC` and `SOCK_NONBLOCK`, which are or-ed in.
const TYPE: u32 = !(0o2_000_000 | 0o4_000);
const STREAM: u32 = 1;
const DGRAM: u32 = 2;
const RAW: u32 = 3;
const SEQPACKET: u32 = 5;
const TCP: u32 = 6;
const UDP: u32 = 17;

/// No `AF_UNIX`: where a job shares the host's network namespace, abstract names lead to the host's own
/// daemons (CVE-2020-15257 left a container that way).
pub(super) static SOCKET: Filter = Filter {
    allow: &[
        &[is(0, AF_INET), masked(1, TYPE, STREAM), is(2, 0)],
        &[is(0, AF_INET), masked(1, TYPE, STREAM), is(2, TCP)],
        &[is(0, AF_INET), masked(1, TYPE, DGRAM), is(2, 0)],
        &[is(0, AF_INET), masked(1, TYPE, DGRAM), is(2, UDP)],
        &[is(0, AF_INET6), masked(1, TYPE, STREAM), is(2, 0)],
        &[is(0, AF_INET6), masked(1, TYPE, STREAM), is(2, TCP)],
        &[is(0, AF_INET6), masked(1, TYPE, DGRAM), is(2, 0)],
        &[is(0, AF_INET6), masked(1, TYPE, DGRAM), is(2, UDP)],
        // NETLINK_ROUTE is 0: getaddrinfo asks it which addresses the machine has.
        &[is(0, AF_NETLINK), masked(1, TYPE, RAW), is(2, 0)],
        &[is(0, AF_NETLINK), masked(1, TYPE, DGRAM), is(2, 0)],
    ],
    kill: &[],
    otherwise: Denial::Refuse(libc::EACCES),
    detail: "TCP and UDP over IPv4 and IPv6, and route queries",
};

/// A datagram pair can be taken apart again (`connect` to `AF_UNSPEC`), bound to an abstract name and used
/// to meet another job; a raw one becomes a datagram pair. Connected kinds cannot.
pub(super) static SOCKETPAIR: Filter = Filter {
    allow: &[&[is(0, AF_UNIX), masked(1, TYPE, STREAM)], &[is(0, AF_UNIX), masked(1, TYPE, SEQPACKET)]],
    kill: &[],
    otherwise: Denial::Refuse(libc::EACCES),
    detail: "connected kinds of AF_UNIX",
};
