//! The policy on the kernel of this machine: the programs are installed for real and calls are made under
//! them. Needs no privilege. Each test installs filters on a child or a thread of its own.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]
#![allow(unsafe_code, reason = "filters are installed and calls made by number, which nothing safe offers")]

use std::ffi::c_long;
use std::fs;
use std::io::Write as _;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use sandpiper::sandbox::inner_wall::{Arch, FilterProgram, Judgement, Options, Policy, describe};

const STRICT: Options<'_> = Options::CLOSED;

/// Exit code of a child that could not install its filters.
const NO_FILTER: i32 = 99;

fn strict() -> Policy {
    Policy::compile(&STRICT).unwrap()
}

/// Installs a program on the calling thread. With a listener, returns it. Only system calls.
fn install(program: &FilterProgram, listener: bool) -> Result<c_long, i32> {
    let code = program.instructions();
    let program = libc::sock_fprog {
        len: u16::try_from(code.len()).unwrap_or(0),
        filter: code.as_ptr().cast_mut().cast(),
    };
    // SAFETY: takes plain numbers.
    unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    let flags = if listener { libc::SECCOMP_FILTER_FLAG_NEW_LISTENER } else { 0 };
    // SAFETY: the kernel copies `len` instructions from `filter`, both of which describe `code`.
    let answer =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    if answer < 0 { Err(errno()) } else { Ok(answer) }
}

fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// The errno of a call, 0 if it succeeded.
fn call(number: c_long, args: [c_long; 4]) -> i32 {
    // SAFETY: the tests pass numbers and null pointers only; the calls either have no effect or are refused.
    let answer = unsafe { libc::syscall(number, args[0], args[1], args[2], args[3]) };
    if answer < 0 { errno() } else { 0 }
}

/// Runs `body` in a child of its own and returns its wait status. `body` must only make system calls.
fn in_child(body: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the child makes system calls only and leaves by _exit.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let code = body();
        // SAFETY: ends the child.
        unsafe { libc::_exit(code) };
    }
    let mut status = 0;
    // SAFETY: `status` is ours.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    status
}

/// Errno of a call under the fallback, as the child's exit code; or its death.
fn under_fallback(policy: &Policy, number: c_long, args: [c_long; 4]) -> Result<i32, i32> {
    let status = in_child(|| {
        if policy.fallback().iter().any(|program| install(program, false).is_err()) {
            return NO_FILTER;
        }
        call(number, args)
    });
    if libc::WIFSIGNALED(status) { Err(libc::WTERMSIG(status)) } else { Ok(libc::WEXITSTATUS(status)) }
}

#[test]
fn fallback_allows_refuses_and_kills() {
    let policy = strict();
    let clone_newuser = c_long::from(libc::CLONE_NEWUSER | libc::SIGCHLD);
    let cases: &[(c_long, [c_long; 4], Result<i32, i32>)] = &[
        (libc::SYS_getpid, [0; 4], Ok(0)),
        (libc::SYS_socketpair, [1, 1, 0, 0], Ok(libc::EFAULT)), // past the filter, the null pointer counts
        (libc::SYS_socketpair, [1, 2, 0, 0], Ok(libc::EACCES)),
        (libc::SYS_socket, [2, 1, 0, 0], Ok(libc::EACCES)),
        (libc::SYS_socket, [1, 1, 0, 0], Ok(libc::EACCES)),
        (libc::SYS_execve, [0; 4], Ok(libc::EPERM)),
        (libc::SYS_setuid, [0; 4], Ok(libc::EPERM)),
        (libc::SYS_clone3, [0; 4], Ok(libc::ENOSYS)),
        (libc::SYS_io_uring_setup, [1, 0, 0, 0], Ok(libc::EPERM)),
        (libc::SYS_ioctl, [0, 0x5412, 0, 0], Ok(libc::ENOTTY)), // TIOCSTI
        (libc::SYS_prctl, [28, 0, 0, 0], Ok(libc::EINVAL)),     // PR_SET_SECUREBITS
        (472, [0; 4], Ok(libc::ENOSYS)),
        (9999, [0; 4], Ok(libc::ENOSYS)),
        (-1, [0; 4], Ok(libc::ENOSYS)),
        (libc::SYS_prctl, [22, 2, 0, 0], Err(libc::SIGSYS)), // PR_SET_SECCOMP
        (libc::SYS_seccomp, [0; 4], Err(libc::SIGSYS)),
        (libc::SYS_ptrace, [0; 4], Err(libc::SIGSYS)),
        (libc::SYS_unshare, [0; 4], Err(libc::SIGSYS)),
        (libc::SYS_mount, [0; 4], Err(libc::SIGSYS)),
        (libc::SYS_bpf, [0; 4], Err(libc::SIGSYS)),
        (libc::SYS_clone, [clone_newuser, 0, 0, 0], Err(libc::SIGSYS)),
        #[cfg(target_arch = "x86_64")]
        (0x4000_0000 + 39, [0; 4], Err(libc::SIGSYS)), // getpid of x32
    ];
    for &(number, args, expected) in cases {
        assert_eq!(under_fallback(&policy, number, args), expected, "call {number} {args:x?}");
    }
}

/// int 0x80 reaches the 32-bit table, where 20 is getpid.
#[cfg(target_arch = "x86_64")]
#[test]
fn int_0x80_is_a_foreign_call() {
    fn getpid_i386() -> i32 {
        let answer: i32;
        // SAFETY: getpid takes and changes nothing; int 0x80 clobbers r8 to r11 at most.
        unsafe {
            std::arch::asm!("int 0x80", inlateout("eax") 20 => answer,
                out("r8") _, out("r9") _, out("r10") _, out("r11") _);
        }
        answer
    }
    let open = in_child(|| i32::from(getpid_i386() <= 0));
    if libc::WIFSIGNALED(open) {
        assert_eq!(libc::WTERMSIG(open), libc::SIGSEGV, "what a kernel without 32-bit calls raises");
        return;
    }
    let policy = strict();
    let status = in_child(|| match install(&policy.fallback()[0], false) {
        Ok(_) => i32::from(getpid_i386() <= 0),
        Err(_) => NO_FILTER,
    });
    assert!(libc::WIFSIGNALED(status), "{status:#x}");
    assert_eq!(libc::WTERMSIG(status), libc::SIGSYS);
    for coarse in [false, true] {
        assert_eq!(notified(getpid_i386, coarse, 1), (vec![kill("i386:20")], -libc::EDOM));
    }
}

/// Makes calls on a thread under the notifying filter and answers `count` notifications: refusals with
/// their errno, deaths with EDOM, which no filter of ours uses. Returns what was told and what `body` saw.
fn notified(
    body: impl FnOnce() -> i32 + Send + 'static,
    coarse: bool,
    count: usize,
) -> (Vec<Judgement>, i32) {
    let policy = strict();
    let theirs = policy.clone();
    let (sender, receiver) = mpsc::channel();
    let thread = thread::spawn(move || {
        if coarse {
            install(theirs.coarse(), false).unwrap();
        }
        let (last, others) = theirs.notifying().split_last().unwrap();
        for program in others {
            install(program, false).unwrap();
        }
        sender.send(install(last, true).unwrap()).unwrap();
        body()
    });
    let raw = i32::try_from(receiver.recv().unwrap()).unwrap();
    // SAFETY: the listener was just made and is known here only.
    let listener = unsafe { OwnedFd::from_raw_fd(raw) };
    let told = (0..count).map(|_| answer(&policy, &listener)).collect();
    (told, thread.join().unwrap())
}

fn answer(policy: &Policy, listener: &OwnedFd) -> Judgement {
    const RECEIVE: libc::c_ulong = 0xc050_2100;
    const SEND: libc::c_ulong = 0xc018_2101;
    // SAFETY: all zero is a valid value, and what the kernel wants to see.
    let mut heard: libc::seccomp_notif = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one `seccomp_notif`.
    assert_eq!(unsafe { libc::ioctl(listener.as_raw_fd(), RECEIVE, &raw mut heard) }, 0);
    let judged = policy.judge(heard.data.arch, heard.data.nr, &heard.data.args);
    let error = match judged {
        Judgement::Refuse { errno, .. } => errno,
        Judgement::Kill { .. } => libc::EDOM,
    };
    let mut reply = libc::seccomp_notif_resp { id: heard.id, val: 0, error: -error, flags: 0 };
    // SAFETY: the kernel reads one `seccomp_notif_resp`.
    assert_eq!(unsafe { libc::ioctl(listener.as_raw_fd(), SEND, &raw mut reply) }, 0);
    judged
}

fn refuse(name: &'static str, errno: i32) -> Judgement {
    Judgement::Refuse { name: name.into(), errno }
}

fn kill(name: &'static str) -> Judgement {
    Judgement::Kill { name: name.into() }
}

#[test]
fn refusals_and_deaths_are_told() {
    for coarse in [false, true] {
        for (number, args, expected) in [
            (libc::SYS_socket, [2, 1, 0, 0], refuse("socket", libc::EACCES)),
            (libc::SYS_chroot, [0; 4], refuse("chroot", libc::EPERM)),
            (libc::SYS_prctl, [28, 0, 0, 0], refuse("prctl", libc::EINVAL)),
            (libc::SYS_io_uring_setup, [0; 4], refuse("io_uring_setup", libc::EPERM)),
            (libc::SYS_prctl, [22, 2, 0, 0], kill("prctl")),
            (libc::SYS_seccomp, [0; 4], kill("seccomp")),
            (libc::SYS_ptrace, [0; 4], kill("ptrace")),
            (libc::SYS_mount, [0; 4], kill("mount")),
            (libc::SYS_clone, [c_long::from(libc::CLONE_NEWUSER | libc::SIGCHLD), 0, 0, 0], kill("clone")),
            #[cfg(target_arch = "x86_64")]
            (0x4000_0000 + 39, [0; 4], kill("x32:39")),
        ] {
            let errno = if let Judgement::Refuse { errno, .. } = expected { errno } else { libc::EDOM };
            assert_eq!(notified(move || call(number, args), coarse, 1), (vec![expected], errno));
        }
    }
}

#[test]
fn allowed_and_quiet_calls_are_not_told() {
    for coarse in [false, true] {
        assert_eq!(notified(|| call(libc::SYS_clone3, [0; 4]), coarse, 0), (vec![], libc::ENOSYS));
        assert_eq!(notified(|| call(472, [0; 4]), coarse, 0), (vec![], libc::ENOSYS));
        assert_eq!(notified(|| call(libc::SYS_getpid, [0; 4]), coarse, 0), (vec![], 0));
        assert_eq!(notified(|| thread::spawn(|| 5).join().unwrap(), coarse, 0), (vec![], 5));
    }
}

#[test]
fn the_coarse_filter_answers_enosys_alone() {
    let policy = strict();
    for (number, args, expected) in [
        (libc::SYS_ptrace, [0; 4], libc::ENOSYS),
        (libc::SYS_unshare, [0; 4], libc::ENOSYS),
        (libc::SYS_clone, [c_long::from(libc::CLONE_NEWUSER | libc::SIGCHLD), 0, 0, 0], libc::ENOSYS),
        (libc::SYS_execve, [0; 4], libc::EFAULT),
        (libc::SYS_getpid, [0; 4], 0),
    ] {
        let status =
            in_child(|| if install(policy.coarse(), false).is_ok() { call(number, args) } else { NO_FILTER });
        assert!(libc::WIFEXITED(status));
        assert_eq!(libc::WEXITSTATUS(status), expected, "call {number}");
    }
}

/// The call's name on a machine.
fn name(arch: Arch, number: u32) -> Option<&'static str> {
    describe(arch, &STRICT).unwrap().find(|call| call.number == number).map(|call| call.name)
}

/// The programs of jobs that the sandbox is tested with make calls by number, as `calls.py` does: by one for each
/// machine. Else they would do something else, or nothing, on the machine that they were not written on.
#[test]
fn fixtures_make_the_same_calls_on_both_machines() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let (mut cases, mut calls) = (0, 0);
    for entry in fs::read_dir(&folder).unwrap().chain(fs::read_dir(folder.join("hostile")).unwrap()) {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|ending| ending != "jsonl") {
            continue;
        }
        for line in fs::read_to_string(path).unwrap().lines() {
            let case: serde_json::Value = serde_json::from_str(line).unwrap();
            if !case["arch"].is_null() {
                continue;
            }
            cases += 1;
            let (title, code) = (&case["name"], case["code"].as_str().unwrap());
            assert!(!code.contains(".syscall("), "{title} has numbers of its own: use calls.py");
            for (at, word) in ["call(", "attempt("].iter().flat_map(|word| code.match_indices(word)) {
                let arguments = code[at + word.len()..].split([',', ')']).map(str::trim);
                let mut numbers = arguments.skip(usize::from(word == "attempt(")).map(str::parse::<u32>);
                if let (Some(Ok(x86_64)), Some(Ok(aarch64))) = (numbers.next(), numbers.next()) {
                    let called = name(Arch::X86_64, x86_64);
                    assert_eq!(called, name(Arch::Aarch64, aarch64), "{title}: {x86_64} and {aarch64}");
                    calls += usize::from(called.is_some());
                }
            }
        }
    }
    assert!(cases > 100 && calls > 100, "{cases} cases, {calls} calls");
}

/// Inside a container whose runtime listens already, a second listener is EBUSY: the fallback still goes on.
#[test]
fn where_somebody_listens_already_the_fallback_holds() {
    let policy = strict();
    let status = in_child(|| {
        // The coarse filter stands in for the runtime's: it leaves `seccomp` open.
        if install(policy.coarse(), true).is_err() {
            return NO_FILTER;
        }
        if install(&policy.notifying()[0], true) != Err(libc::EBUSY) {
            return 2;
        }
        if install(&policy.fallback()[0], false).is_err() {
            return 3;
        }
        if call(libc::SYS_chroot, [0; 4]) != libc::EPERM {
            return 4;
        }
        call(libc::SYS_ptrace, [0; 4])
    });
    assert!(libc::WIFSIGNALED(status), "exit code {}", libc::WEXITSTATUS(status));
    assert_eq!(libc::WTERMSIG(status), libc::SIGSYS);
}

/// What the filters cost: `cargo nextest run --test policy --run-ignored only --no-capture`.
#[test]
#[ignore = "prints a measurement"]
fn measure_installing() {
    let policy = strict();
    let mut out = std::io::stderr();
    for (name, programs) in [
        ("coarse", vec![policy.coarse()]),
        ("notifying", policy.notifying().iter().collect()),
        ("fallback", policy.fallback().iter().collect()),
        ("coarse + notifying", [policy.coarse()].into_iter().chain(policy.notifying()).collect()),
    ] {
        let install_all = || {
            let start = Instant::now();
            let mut listeners = Vec::new();
            for (at, program) in programs.iter().enumerate() {
                let listener = name.contains("notifying") && at + 1 == programs.len();
                let fd = install(program, listener).unwrap();
                if listener {
                    // SAFETY: made just now.
                    listeners.push(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).unwrap()) });
                }
            }
            start.elapsed().as_micros()
        };
        let mut micros: Vec<u128> =
            (0..200).map(|_| thread::scope(|scope| scope.spawn(install_all).join().unwrap())).collect();
        micros.sort_unstable();
        let length: usize = programs.iter().map(|program| program.instructions().len()).sum();
        writeln!(out, "{name}: {length} instructions, p50 {} us, p90 {} us", micros[100], micros[180])
            .unwrap();
    }
}
