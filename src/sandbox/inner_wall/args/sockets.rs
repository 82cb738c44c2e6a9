//! Sockets: their kinds, their options, and the flags of what goes over them.

use super::super::rules::{Cond, Denial, Filter};
use super::{is, masked, within};

const AF_UNIX: u32 = 1;
const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;
const AF_NETLINK: u32 = 16;
/// The type without `SOCK_CLOEXEC` and `SOCK_NONBLOCK`, which are or-ed in.
const TYPE: u32 = !(CLOEXEC | NONBLOCK);
const STREAM: u32 = 1;
const DGRAM: u32 = 2;
const RAW: u32 = 3;
const NONBLOCK: u32 = 0o4_000;
const CLOEXEC: u32 = 0o2_000_000;
const SEQPACKET: u32 = 5;
const TCP: u32 = 6;
const UDP: u32 = 17;

/// What C libraries ask for by the way, and do without: no program has asked for these sockets. Python's own have
/// `SOCK_CLOEXEC` and nothing else, so a program's are told from them.
const BY_THE_WAY: &[&[Cond]] = &[
    &[is(0, AF_UNIX), is(1, STREAM | CLOEXEC | NONBLOCK), is(2, 0)], // glibc: nscd knows users, groups and hosts
    &[is(0, AF_UNIX), is(1, STREAM), is(2, 0)],                      // libuuid: uuidd makes UUIDs
    &[is(0, AF_INET), is(1, DGRAM), is(2, 0)],                       // libuuid: an address of this machine
    &[is(0, AF_NETLINK), is(1, RAW | CLOEXEC), is(2, 0)],            // getaddrinfo: which addresses there are
];

/// Without the network no socket but a pair.
pub(in crate::sandbox::inner_wall) static NO_SOCKET: Filter = Filter {
    allow: &[],
    kill: &[],
    quiet: BY_THE_WAY,
    // What socket(2) documents for "not permitted"; python raises PermissionError.
    otherwise: Denial::Refuse(libc::EACCES),
    detail: "none",
};

/// No `AF_UNIX`: where a job shares the host's network namespace, abstract names lead to the host's own
/// daemons (CVE-2020-15257 left a container that way).
pub(in crate::sandbox::inner_wall) static SOCKET: Filter = Filter {
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
    quiet: &[BY_THE_WAY[0], BY_THE_WAY[1]],
    otherwise: Denial::Refuse(libc::EACCES),
    detail: "TCP and UDP over IPv4 and IPv6, and route queries",
};

/// A datagram pair can be taken apart again (`connect` to `AF_UNSPEC`), bound to an abstract name and used
/// to meet another job; a raw one becomes a datagram pair. Connected kinds cannot.
pub(in crate::sandbox::inner_wall) static SOCKETPAIR: Filter = Filter {
    allow: &[&[is(0, AF_UNIX), masked(1, TYPE, STREAM)], &[is(0, AF_UNIX), masked(1, TYPE, SEQPACKET)]],
    kill: &[],
    quiet: &[],
    otherwise: Denial::Refuse(libc::EACCES),
    detail: "connected kinds of AF_UNIX",
};

const SOL_SOCKET: u32 = 1;
const SOL_IP: u32 = 0;
const SOL_IPV6: u32 = 41;

/// What libraries set and ask, among it all that glibc's resolver and asyncio do. What is missing compiles programs
/// into the kernel (SO_ATTACH_FILTER and its kin), pins pages, loads modules (TCP_ULP), or tells of other sockets.
macro_rules! socket_options {
    ($($buffers:expr),*) => {
        Filter {
            allow: &[
                &[is(1, SOL_SOCKET), within(2, 2, 6)], // SO_REUSEADDR, SO_TYPE, SO_ERROR, SO_DONTROUTE, SO_BROADCAST
                $($buffers,)*
                &[is(1, SOL_SOCKET), within(2, 9, 10)],  // SO_KEEPALIVE, SO_OOBINLINE
                &[is(1, SOL_SOCKET), is(2, 13)],         // SO_LINGER
                &[is(1, SOL_SOCKET), within(2, 15, 21)], // SO_REUSEPORT, credentials, marks and times to wait
                &[is(1, SOL_SOCKET), within(2, 29, 30)], // SO_TIMESTAMP, SO_ACCEPTCONN
                &[is(1, SOL_SOCKET), is(2, 35)],         // SO_TIMESTAMPNS
                &[is(1, SOL_SOCKET), within(2, 38, 40)], // SO_PROTOCOL, SO_DOMAIN, SO_RXQ_OVFL
                &[is(1, SOL_SOCKET), within(2, 66, 67)], // times to wait, of programs with longer ones
                &[is(1, TCP), within(2, 1, 12)],         // TCP_NODELAY to TCP_QUICKACK
                &[is(1, TCP), is(2, 18)],                // TCP_USER_TIMEOUT
                &[is(1, TCP), is(2, 23)],                // TCP_FASTOPEN
                &[is(1, TCP), is(2, 25)],                // TCP_NOTSENT_LOWAT
                &[is(1, TCP), is(2, 30)],                // TCP_FASTOPEN_CONNECT
                &[is(1, SOL_IP), within(2, 1, 2)],       // IP_TOS, IP_TTL
                &[is(1, SOL_IP), is(2, 8)],              // IP_PKTINFO
                &[is(1, SOL_IP), within(2, 10, 14)],     // IP_MTU_DISCOVER, IP_RECVERR, IP_RECVTTL, IP_RECVTOS, IP_MTU
                &[is(1, SOL_IP), is(2, 24)],             // IP_BIND_ADDRESS_NO_PORT
                &[is(1, SOL_IP), within(2, 32, 36)],     // multicast
                &[is(1, SOL_IPV6), within(2, 16, 21)],   // IPV6_UNICAST_HOPS, multicast
                &[is(1, SOL_IPV6), within(2, 23, 26)],   // IPV6_MTU_DISCOVER, IPV6_MTU, IPV6_RECVERR, IPV6_V6ONLY
                &[is(1, SOL_IPV6), is(2, 49)],           // IPV6_RECVPKTINFO
                &[is(1, SOL_IPV6), is(2, 51)],           // IPV6_RECVHOPLIMIT
                &[is(1, SOL_IPV6), within(2, 66, 67)],   // IPV6_RECVTCLASS, IPV6_TCLASS
            ],
            kill: &[],
            quiet: &[],
            // What the kernel answers that does not know an option.
            otherwise: Denial::Refuse(libc::ENOPROTOOPT),
            detail: "what libraries set: times, buffers, keep-alive, TCP, IP",
        }
    };
}

/// SO_SNDBUF and SO_RCVBUF, which let one socket hold megabytes of kernel memory.
pub(in crate::sandbox::inner_wall) static SOCKET_OPTIONS: Filter =
    socket_options!(&[is(1, SOL_SOCKET), within(2, 7, 8)]);
pub(in crate::sandbox::inner_wall) static SOCKET_OPTIONS_NO_BUFFERS: Filter = socket_options!();

/// Without MSG_ZEROCOPY, which pins pages, and without what the kernel tells itself.
const SEND: u32 = 0x1 // MSG_OOB
    | 0x4 // MSG_DONTROUTE
    | 0x40 // MSG_DONTWAIT
    | 0x80 // MSG_EOR
    | 0x800 // MSG_CONFIRM
    | 0x4000 // MSG_NOSIGNAL
    | 0x8000 // MSG_MORE
    | 0x2000_0000; // MSG_FASTOPEN

const RECEIVE: u32 = 0x1 // MSG_OOB
    | 0x2 // MSG_PEEK
    | 0x8 // MSG_CTRUNC
    | 0x20 // MSG_TRUNC
    | 0x40 // MSG_DONTWAIT
    | 0x80 // MSG_EOR
    | 0x100 // MSG_WAITALL
    | 0x2000 // MSG_ERRQUEUE
    | 0x4000 // MSG_NOSIGNAL
    | 0x1_0000 // MSG_WAITFORONE
    | 0x4000_0000; // MSG_CMSG_CLOEXEC

const MESSAGE: Filter = Filter {
    allow: &[],
    kill: &[],
    quiet: &[],
    otherwise: Denial::Refuse(libc::EINVAL),
    detail: "flags that libraries use",
};

/// The flags are the third argument of these, and the fourth of the others.
pub(in crate::sandbox::inner_wall) static SENDMSG: Filter =
    Filter { allow: &[&[masked(2, !SEND, 0)]], ..MESSAGE };
pub(in crate::sandbox::inner_wall) static SENDTO: Filter =
    Filter { allow: &[&[masked(3, !SEND, 0)]], ..MESSAGE };
pub(in crate::sandbox::inner_wall) static RECVMSG: Filter =
    Filter { allow: &[&[masked(2, !RECEIVE, 0)]], ..MESSAGE };
pub(in crate::sandbox::inner_wall) static RECVFROM: Filter =
    Filter { allow: &[&[masked(3, !RECEIVE, 0)]], ..MESSAGE };
