//! Sockets. Without the network a job has only `socketpair`, and only kinds of it that can meet nobody else:
//! jobs without network share one empty network namespace, where abstract socket names would be common.

use super::super::args;
use super::super::rules::{Class, Group, Until};

pub(super) const GROUPS: &[Group] = &[
    Group {
        class: Class::WithNetwork(&[Class::Partly(&args::SOCKET), Class::Partly(&args::NO_SOCKET)]),
        until: Until::InnerWall,
        reason: "the door to the network; what C libraries ask for by the way is refused without a word",
        calls: &[("socket", 41, 198)],
    },
    Group {
        class: Class::Partly(&args::SOCKETPAIR),
        until: Until::InnerWall,
        reason: "the self-pipe of asyncio, and multiprocessing.Pipe",
        calls: &[("socketpair", 53, 199)],
    },
    Group {
        class: Class::WithNetwork(&[Class::Allow, Class::Refuse(libc::EACCES)]),
        until: Until::InnerWall,
        reason: "naming, calling and answering; a socket pair needs none of it",
        calls: &[
            ("bind", 49, 200),
            ("connect", 42, 203),
            ("listen", 50, 201),
            ("accept", 43, 202),
            ("accept4", 288, 242),
        ],
    },
    Group {
        class: Class::Allow,
        until: Until::InnerWall,
        reason: "traffic on sockets the job already holds",
        calls: &[("shutdown", 48, 210), ("getsockname", 51, 204), ("getpeername", 52, 205)],
    },
    Group {
        class: Class::Partly(&args::SENDTO),
        until: Until::InnerWall,
        reason: "sending on sockets the job already holds",
        calls: &[("sendto", 44, 206), ("sendmmsg", 307, 269)],
    },
    Group {
        class: Class::Partly(&args::SENDMSG),
        until: Until::InnerWall,
        reason: "sending on sockets the job already holds",
        calls: &[("sendmsg", 46, 211)],
    },
    Group {
        class: Class::Partly(&args::RECVFROM),
        until: Until::InnerWall,
        reason: "receiving on sockets the job already holds",
        calls: &[("recvfrom", 45, 207), ("recvmmsg", 299, 243)],
    },
    Group {
        class: Class::Partly(&args::RECVMSG),
        until: Until::InnerWall,
        reason: "receiving on sockets the job already holds",
        calls: &[("recvmsg", 47, 212)],
    },
    Group {
        class: Class::Partly(&args::SOCKET_OPTIONS),
        until: Until::InnerWall,
        reason: "what a socket of the job is and does",
        calls: &[("getsockopt", 55, 209)],
    },
    Group {
        class: Class::ByMemoryGroup(&[
            Class::Partly(&args::SOCKET_OPTIONS),
            Class::Partly(&args::SOCKET_OPTIONS_NO_BUFFERS),
        ]),
        until: Until::InnerWall,
        reason: "what a socket of the job does; the size of its buffers only where a control group counts them",
        calls: &[("setsockopt", 54, 208)],
    },
];
