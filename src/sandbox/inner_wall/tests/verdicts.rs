//! The policy itself, written down a second time where it matters most: what must work, and what must not.

use super::{ARCHES, Arch, Data, KILL, NOTIFY, errno, run};
use super::{Judgement, Options, Policy, PolicyError, table};

const ALLOW: u32 = super::ALLOW;

fn number(arch: Arch, name: &str) -> u32 {
    table::calls(arch).find(|call| call.1 == name).unwrap_or_else(|| panic!("{name}")).0
}

/// The plain action on a call, which names the errno.
fn action(arch: Arch, options: &Options<'_>, name: &str, args: [u64; 6]) -> u32 {
    let policy = Policy::compile_for(arch, options).unwrap();
    run(&policy.fallback()[0], &Data { nr: number(arch, name), arch: arch.audit(), args }).0
}

const STRICT: Options<'_> = Options::CLOSED;
const COUNTED: Options<'_> = Options { memory_group: true, cpu_group: true, ..Options::CLOSED };
/// Flags that every filter knows.
const ARGUMENTS: [u64; 6] = [1; 6];
const OPEN: Options<'_> = Options { network: true, exec: true, extra: &[], ..Options::CLOSED };

#[test]
fn what_python_lives_on_is_allowed() {
    for arch in ARCHES {
        for name in [
            "read",
            "write",
            "openat",
            "close",
            "fstat",
            "newfstatat",
            "statx",
            "mmap",
            "mprotect",
            "munmap",
            "brk",
            "futex",
            "rt_sigaction",
            "rt_sigreturn",
            "exit_group",
            "wait4",
            "waitid",
            "getrandom",
            "rseq",
            "set_robust_list",
            "membarrier",
            "sched_getaffinity",
            "sched_setaffinity",
            "get_mempolicy",
            "epoll_pwait",
            "eventfd2",
            "pipe2",
            "dup3",
            "memfd_create",
            "sendfile",
            "copy_file_range",
            "flock",
            "fallocate",
            "close_range",
            "pidfd_open",
            "pidfd_send_signal",
            "timerfd_create",
            "kill",
            "tgkill",
            "sendmsg",
            "recvmsg",
            "mkdirat",
            "unlinkat",
            "renameat2",
            "ftruncate",
            "utimensat",
            "fchmodat",
            "getdents64",
            "clock_nanosleep",
            "mseal",
        ] {
            assert_eq!(action(arch, &COUNTED, name, ARGUMENTS), ALLOW, "{name}");
        }
    }
    for name in ["fork", "vfork", "open", "stat", "arch_prctl", "epoll_wait", "uretprobe"] {
        assert_eq!(action(Arch::X86_64, &STRICT, name, ARGUMENTS), ALLOW, "{name}");
    }
}

#[test]
fn what_attacks_the_host_ends_the_job() {
    for arch in ARCHES {
        for options in [STRICT, OPEN] {
            for name in [
                "ptrace",
                "process_vm_readv",
                "process_vm_writev",
                "pidfd_getfd",
                "bpf",
                "perf_event_open",
                "keyctl",
                "add_key",
                "request_key",
                "userfaultfd",
                "mount",
                "umount2",
                "unshare",
                "setns",
                "pivot_root",
                "open_tree",
                "move_mount",
                "fsopen",
                "fsmount",
                "mount_setattr",
                "kexec_load",
                "kexec_file_load",
                "init_module",
                "finit_module",
                "delete_module",
                "reboot",
                "swapon",
                "open_by_handle_at",
                "seccomp",
                "syslog",
                "kcmp",
                "acct",
                "quotactl",
            ] {
                assert_eq!(action(arch, &options, name, [0; 6]), KILL, "{name}");
            }
        }
    }
}

#[test]
fn what_libraries_survive_is_refused() {
    for arch in ARCHES {
        for (name, number) in [
            ("clone3", libc::ENOSYS),
            ("io_uring_setup", libc::EPERM),
            ("chroot", libc::EPERM),
            ("setuid", libc::EPERM),
            ("setresgid", libc::EPERM),
            ("setgroups", libc::EPERM),
            ("fchown", libc::EPERM),
            ("fchownat", libc::EPERM),
            ("capset", libc::EPERM),
            ("sched_setscheduler", libc::EPERM),
            ("sync", libc::EPERM),
            ("mq_open", libc::ENOSYS),
            ("shmget", libc::ENOSYS),
            ("inotify_init1", libc::ENOSYS),
            ("inotify_add_watch", libc::ENOSYS),
            ("setxattr", libc::ENOTSUP),
            ("landlock_restrict_self", libc::EOPNOTSUPP),
        ] {
            assert_eq!(action(arch, &OPEN, name, [0; 6]), errno(number), "{name}");
        }
    }
}

#[test]
fn options_open_exactly_their_calls() {
    for arch in ARCHES {
        let with = |network, exec| Options { network, exec, extra: &[], ..Options::CLOSED };
        for name in ["execve", "execveat"] {
            assert_eq!(action(arch, &with(true, false), name, [0; 6]), errno(libc::EPERM));
            assert_eq!(action(arch, &with(false, true), name, [0; 6]), ALLOW);
        }
        for name in ["bind", "connect", "listen", "accept4"] {
            assert_eq!(action(arch, &with(false, true), name, [0; 6]), errno(libc::EACCES));
            assert_eq!(action(arch, &with(true, false), name, [0; 6]), ALLOW);
        }
    }
}

#[test]
fn where_programs_are_listed_there_are_none_in_memory() {
    let listed = Options { exec: true, exec_listed: true, ..COUNTED };
    for arch in ARCHES {
        assert_eq!(action(arch, &listed, "execve", [0; 6]), ALLOW);
        assert_eq!(action(arch, &listed, "memfd_create", ARGUMENTS), errno(libc::ENOSYS));
        let extra = ["memfd_create".to_owned()];
        let error = Policy::compile_for(arch, &Options { extra: &extra, ..listed }).unwrap_err();
        assert!(matches!(error, PolicyError::Forbidden { .. }), "{error}");
    }
}

#[test]
fn arguments_decide() {
    const GARBAGE: u64 = 0xffff_ffff_0000_0000;
    let eacces = errno(libc::EACCES);
    let eperm = errno(libc::EPERM);
    let cases: &[(&str, [u64; 3], u32)] = &[
        ("clone", [0x3d0f00, 0, 0], ALLOW),             // pthread_create
        ("clone", [0x0120_0011, 0, 0], ALLOW),          // fork of glibc
        ("clone", [0x4111, 0, 0], ALLOW),               // vfork
        ("clone", [0x1000_0011, 0, 0], KILL),           // CLONE_NEWUSER
        ("clone", [0x4000_0011 | GARBAGE, 0, 0], KILL), // CLONE_NEWNET
        ("clone", [0x8011, 0, 0], KILL),                // CLONE_PARENT
        ("clone", [0x0002_0000, 0, 0], KILL),
        ("clone", [0x0200_0000, 0, 0], KILL),
        ("clone", [0x0400_0000, 0, 0], KILL),
        ("clone", [0x0800_0000, 0, 0], KILL),
        ("clone", [0x2000_0000, 0, 0], KILL),
        ("prctl", [15, 0, 0], ALLOW), // PR_SET_NAME
        ("prctl", [22, 2, 0], KILL),  // PR_SET_SECCOMP
        ("prctl", [22 | GARBAGE, 2, 0], KILL),
        ("prctl", [4, 0, 0], ALLOW), // PR_SET_DUMPABLE
        ("prctl", [4, 1, 0], errno(libc::EINVAL)),
        ("prctl", [0x5961_6d61, 0, 0], errno(libc::EINVAL)), // PR_SET_PTRACER
        ("prctl", [28, 0, 0], errno(libc::EINVAL)),          // PR_SET_SECUREBITS
        ("ioctl", [0, 0x5401, 0], ALLOW),                    // TCGETS
        ("ioctl", [0, 0x541b | GARBAGE, 0], ALLOW),          // FIONREAD
        ("ioctl", [0, 0x5412, 0], errno(libc::ENOTTY)),      // TIOCSTI
        ("ioctl", [0, 0x5412 | GARBAGE, 0], errno(libc::ENOTTY)),
        ("ioctl", [0, 0x541c, 0], errno(libc::ENOTTY)), // TIOCLINUX
        ("fcntl", [0, 3, 0], ALLOW),                    // F_GETFL
        ("fcntl", [0, 1024, 1], errno(libc::EINVAL)),   // F_SETLEASE
        ("mknodat", [0, 0, 0o010_600], ALLOW),          // a fifo
        ("mknodat", [0, 0, 0o020_600], eperm),          // a character device
        ("mknodat", [0, 0, 0o060_600], eperm),          // a block device
        ("setuid", [1000, 0, 0], ALLOW),
        ("setuid", [999, 0, 0], eperm),
        ("setreuid", [u64::MAX, 1003, 0], ALLOW),
        ("setregid", [1000, 0, 0], eperm),
        ("setresuid", [1000, 1000, u64::MAX], ALLOW),
        ("setresgid", [1000, 0, 1000], eperm),
        ("fchown", [3, u64::MAX, 1000], ALLOW),
        ("fchown", [3, 0, 1000], eperm),
        ("fchown", [3, 1000, 65 | GARBAGE], eperm),
        ("setpriority", [0, 0, 19], ALLOW),   // PRIO_PROCESS
        ("setpriority", [1, 0, 19], eperm),   // PRIO_PGRP
        ("setpriority", [2, 1000, 1], eperm), // PRIO_USER
        ("personality", [0xffff_ffff, 0, 0], ALLOW),
        ("personality", [0x0040_0000, 0, 0], eperm), // READ_IMPLIES_EXEC
        ("prlimit64", [0, 7, 0xbeef], ALLOW),
        ("prlimit64", [0, 4, 0xbeef], eperm), // RLIMIT_CORE
        ("prlimit64", [0, 4 | GARBAGE, 0xbeef], eperm),
        ("prlimit64", [0, 4, 0], ALLOW),
        ("setrlimit", [7, 0xbeef, 0], ALLOW),
        ("setrlimit", [4, 0xbeef, 0], eperm),
        ("prlimit64", [5, 7, 0], ALLOW),
        ("prlimit64", [5, 7, 0xbeef], eperm),
        ("prlimit64", [5, 7, 0x7fff_0000_0000], eperm), // a pointer whose low half is zero
        ("socketpair", [1, 1, 0], ALLOW),
        ("socketpair", [1, 0o2_004_001, 0], ALLOW), // SOCK_CLOEXEC, SOCK_NONBLOCK
        ("socketpair", [1, 5, 0], ALLOW),           // SOCK_SEQPACKET
        ("socketpair", [1, 2, 0], eacces),          // SOCK_DGRAM
        ("socketpair", [1, 3, 0], eacces),          // SOCK_RAW, which becomes SOCK_DGRAM
        ("socketpair", [30, 1, 0], eacces),         // AF_TIPC
    ];
    let sockets: &[([u64; 3], u32)] = &[
        ([2, 1, 0], ALLOW),
        ([2, 0o2_004_001, 6], ALLOW),
        ([10, 2, 17], ALLOW),
        ([16, 0o2_000_003, 0], ALLOW), // NETLINK_ROUTE, as getaddrinfo asks
        ([16, 3, 4], eacces),          // NETLINK_SOCK_DIAG
        ([16, 3, 12], eacces),         // NETLINK_NETFILTER
        ([1, 1, 0], eacces),           // AF_UNIX
        ([2, 3, 1], eacces),           // a raw socket
        ([2, 2, 1], eacces),           // ICMP
        ([2, 1, 132], eacces),         // SCTP
        ([17, 3, 0], eacces),          // AF_PACKET
        ([38, 5, 0], eacces),          // AF_ALG
        ([40, 1, 0], eacces),          // AF_VSOCK
        ([2 | GARBAGE, 1, 0], ALLOW),  // the kernel takes an int
    ];
    for arch in ARCHES {
        for &(name, [a, b, c], expected) in cases {
            assert_eq!(
                action(arch, &STRICT, name, [a, b, c, 0, 0, 0]),
                expected,
                "{name} {a:#x} {b:#x} {c:#x}"
            );
        }
        for &([a, b, c], expected) in sockets {
            assert_eq!(action(arch, &OPEN, "socket", [a, b, c, 0, 0, 0]), expected, "socket {a} {b} {c}");
            assert_eq!(action(arch, &STRICT, "socket", [a, b, c, 0, 0, 0]), eacces);
        }
    }
}

/// Those of programs go to the worker.
#[test]
fn sockets_that_libraries_ask_for_by_the_way_are_refused_without_a_word() {
    const CLOEXEC: u64 = 0o2_000_000;
    const NONBLOCK: u64 = 0o4_000;
    for arch in ARCHES {
        let told = |options: &Options<'_>, args: [u64; 3]| {
            let policy = Policy::compile_for(arch, options).unwrap();
            let [family, kind, protocol] = args;
            let args = [family, kind, protocol, 0, 0, 0];
            run(&policy.notifying()[0], &Data { nr: number(arch, "socket"), arch: arch.audit(), args }).0
        };
        let (nscd, uuidd) = ([1, 1 | CLOEXEC | NONBLOCK, 0], [1, 1, 0]);
        for by_the_way in [nscd, uuidd, [2, 2, 0], [16, 3 | CLOEXEC, 0]] {
            assert_eq!(told(&STRICT, by_the_way), errno(libc::EACCES), "{by_the_way:?}");
        }
        for by_the_way in [nscd, uuidd] {
            assert_eq!(told(&OPEN, by_the_way), errno(libc::EACCES), "{by_the_way:?}");
        }
        for own in [[1, 1 | CLOEXEC, 0], [1, 2 | CLOEXEC, 0], [1, 5 | CLOEXEC, 0], [2, 3 | CLOEXEC, 1]] {
            assert_eq!([told(&STRICT, own), told(&OPEN, own)], [NOTIFY; 2], "{own:?}");
        }
        for own in [[2, 1 | CLOEXEC, 0], [2, 2 | CLOEXEC, 0], [10, 1 | CLOEXEC, 0]] {
            assert_eq!([told(&STRICT, own), told(&OPEN, own)], [NOTIFY, ALLOW], "{own:?}");
        }
    }
}

#[test]
fn coarse_leaves_open_what_starting_needs() {
    const TRACE: u32 = super::TRACE;
    for arch in ARCHES {
        let policy = Policy::compile_for(arch, &STRICT).unwrap();
        let on = |program, name, first| {
            run(program, &Data { nr: number(arch, name), arch: arch.audit(), args: [first, 0, 0, 0, 0, 0] }).0
        };
        for name in [
            "execve",
            "seccomp",
            "prctl",
            "setuid",
            "setgroups",
            "capset",
            "landlock_restrict_self",
            "socket",
        ] {
            assert_eq!(on(policy.coarse(), name, 22), ALLOW, "{name}");
        }
        for name in ["mount", "unshare", "setns", "pivot_root", "clone3"] {
            assert_eq!(on(policy.coarse(), name, 0), TRACE, "{name}");
            assert_eq!(on(policy.coarse_before_wall(), name, 0), ALLOW, "{name}");
        }
        assert_eq!(on(policy.coarse(), "clone", 0x1000_0011), TRACE);
        assert_eq!(on(policy.coarse(), "clone", 0x11), ALLOW);
        assert_eq!(on(policy.coarse_before_wall(), "clone", 0x1000_0011), ALLOW);
        for name in ["ptrace", "bpf", "keyctl", "io_uring_setup", "userfaultfd", "init_module"] {
            assert_eq!(on(policy.coarse(), name, 0), TRACE, "{name}");
            assert_eq!(on(policy.coarse_before_wall(), name, 0), TRACE, "{name}");
        }
    }
}

#[test]
fn the_operator_appends_names() {
    let extra = ["sched_setattr".to_owned(), "userfaultfd".to_owned(), "read".to_owned()];
    for arch in ARCHES {
        let options = Options { network: false, exec: false, extra: &extra, ..Options::CLOSED };
        let policy = Policy::compile_for(arch, &options).unwrap();
        for name in &extra {
            let data = Data { nr: number(arch, name), arch: arch.audit(), args: [0; 6] };
            assert_eq!(run(&policy.notifying()[0], &data).0, ALLOW, "{name}");
            // Allowed in the end is allowed from the start.
            assert_eq!(run(policy.coarse(), &data).0, ALLOW, "{name}");
        }
        let data = Data { nr: number(arch, "ptrace"), arch: arch.audit(), args: [0; 6] };
        assert_eq!(run(&policy.notifying()[0], &data).0, NOTIFY);
    }
}

#[test]
fn the_operator_takes_no_wall_down() {
    for arch in ARCHES {
        for name in
            ["seccomp", "clone3", "mount", "io_uring_setup", "bpf", "unshare", "socket", "prctl", "clone"]
        {
            let extra = [name.to_owned()];
            let error = Policy::compile_for(
                arch,
                &Options { network: true, exec: true, extra: &extra, ..Options::CLOSED },
            )
            .unwrap_err();
            assert!(matches!(error, PolicyError::Forbidden { .. }), "{error}");
            assert!(error.to_string().starts_with(&format!("allow_syscalls: `{name}` cannot be allowed: ")));
        }
        for (typo, meant) in [
            ("sched_setatr", "sched_setattr"),
            ("mlockk", "mlock"),
            ("sched_set_scheduler", "sched_setscheduler"),
        ] {
            let extra = [typo.to_owned()];
            let error = Policy::compile_for(
                arch,
                &Options { network: false, exec: false, extra: &extra, ..Options::CLOSED },
            )
            .unwrap_err();
            assert!(error.to_string().contains(&format!("`{meant}`")), "{error}");
        }
    }
    // A name of the other architecture only.
    let extra = ["iopl".to_owned(), "fork".to_owned()];
    let options = Options { network: false, exec: false, extra: &extra[1..], ..Options::CLOSED };
    assert!(matches!(Policy::compile_for(Arch::Aarch64, &options), Err(PolicyError::Unknown { .. })));
}

#[test]
fn an_allowed_call_is_never_judged_mildly() {
    let policy = Policy::compile_for(Arch::X86_64, &STRICT).unwrap();
    let judged = policy.judge(Arch::X86_64.audit(), 0, &[0; 6]);
    assert_eq!(judged, Judgement::Kill { name: "read".into() });
}

#[test]
fn nobody_asks_what_others_have_read() {
    for arch in ARCHES {
        let nowait = |flags| action(arch, &OPEN, "preadv2", [0, 0, 0, 0, 0, flags]);
        assert_eq!([0, 1, 2, 4, 16].map(nowait), [ALLOW; 5]);
        assert_eq!([8, 0x80, 0x88, 9, 8 | 1 << 40].map(nowait), [errno(libc::EOPNOTSUPP); 5]);
        let advice = |advice| action(arch, &OPEN, "fadvise64", [0, 0, 0, advice, 0, 0]);
        assert_eq!([0, 1, 2, 3, 5].map(advice), [ALLOW; 5]);
        assert_eq!(advice(4), errno(libc::EPERM));
    }
}
