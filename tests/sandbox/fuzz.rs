//! Random system calls with random arguments, made by jobs: whatever they do, the worker gives a result that is not
//! its own fault, nothing outlives them, and nothing outside changes.
//!
//! The programs follow from a seed. `SP_FUZZ_SEED` gives another one, `SP_FUZZ_PROGRAMS` and `SP_FUZZ_CALLS` more or
//! longer programs; what failed prints its seed.

use std::fmt::Write as _;
use std::time::{Instant, SystemTime};

use libtest_mimic::{Failed, Trial};
use sandpiper::sandbox::inner_wall::{Arch, Options, describe};
use serde_json::json;

use crate::case::Case;
use crate::{check, run};

/// Tests that share the programs among them, so that they can run side by side.
const PARTS: u64 = 6;
const SEED: u64 = 1;
const PROGRAMS: u64 = 150;
const CALLS: u64 = 50;

pub(crate) fn trials() -> impl Iterator<Item = Trial> {
    let (seed, programs) = (setting("SP_FUZZ_SEED", SEED), setting("SP_FUZZ_PROGRAMS", PROGRAMS));
    (0..PARTS).map(move |part| {
        Trial::test(format!("fuzz::system_calls_{part}"), move || {
            (0..programs).filter(|number| number % PARTS == part).try_for_each(|number| verify(seed + number))
        })
    })
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .map_or(default, |value| value.parse().unwrap_or_else(|_| panic!("{name}: not a number")))
}

fn verify(seed: u64) -> Result<(), Failed> {
    let before = Outside::now();
    let job = json!({"timeout_ms": 1000, "limits": {"cpu_ms": 1000}});
    let case = json!({"name": format!("fuzz_{seed}"), "code": program(seed), "job": job});
    let case: Case = serde_json::from_value(case).unwrap();
    let ran = run::exec(&case);
    let mut unmet = check::unmet(&case, &ran);
    unmet.extend(before.changed());
    if unmet.is_empty() {
        return Ok(());
    }
    Err(format!("SP_FUZZ_SEED={seed} SP_FUZZ_PROGRAMS=1\n  unmet:\n    {}\n  {ran}", unmet.join("\n    "))
        .into())
}

/// What no job may change. That its own processes and files are gone is seen by the supervisor.
struct Outside {
    files: Vec<(&'static str, String)>,
    clock: (Instant, SystemTime),
}

impl Outside {
    fn now() -> Self {
        let files = [
            "/proc/self/mountinfo",
            "/proc/sys/kernel/hostname",
            "/proc/sys/kernel/domainname",
            "/proc/swaps",
        ];
        let read = |path| (path, std::fs::read_to_string(path).unwrap_or_default());
        Self { files: files.map(read).into(), clock: (Instant::now(), SystemTime::now()) }
    }

    fn changed(&self) -> Vec<String> {
        let now = Self::now();
        let differ = self.files.iter().zip(&now.files).filter(|(before, after)| before != after);
        let mut changed: Vec<String> =
            differ.map(|(before, after)| format!("{} changed to {}", before.0, after.1)).collect();
        let steady = now.clock.0 - self.clock.0;
        let wall = now.clock.1.duration_since(self.clock.1).unwrap_or_default();
        // A clock that is being disciplined moves by less.
        if wall.abs_diff(steady).as_secs() > 1 {
            changed.push(format!("the clock went on by {wall:?} in {steady:?}"));
        }
        changed
    }
}

/// Numbers are mostly of calls that do not end the job at once: else few programs would come far.
fn program(seed: u64) -> String {
    let mut random = Random(seed);
    let arch = Arch::host().unwrap();
    let options = Options::CLOSED;
    let survivable: Vec<u32> = describe(arch, &options)
        .unwrap()
        .filter(|call| {
            call.class != "kill" && !matches!(call.name, "exit" | "exit_group" | "pause" | "vfork")
        })
        .map(|call| call.number)
        .collect();
    let mut code = String::from(PRELUDE);
    for _ in 0..setting("SP_FUZZ_CALLS", CALLS) {
        let number = match random.below(40) {
            0 => random.below(600),
            1 => random.next(),
            _ => survivable[usize::try_from(random.below(survivable.len() as u64)).unwrap()].into(),
        };
        let arguments: Vec<String> = (0..6).map(|_| argument(&mut random)).collect();
        writeln!(code, "call({number}, {})", arguments.join(", ")).unwrap();
    }
    code.push_str(EPILOGUE);
    code
}

/// Some children block for ever.
const EPILOGUE: &str = "
import time
end = time.monotonic() + 0.2
while time.monotonic() < end:
    try: os.waitpid(-1, os.WNOHANG)
    except OSError: break
    time.sleep(0.005)
";

/// In children now and then, so that a call that ends or blocks its process does not end the program.
const PRELUDE: &str = "
import ctypes, os, random, sys
libc = ctypes.CDLL(None, use_errno=True)
keep = []
def buffer(seed, size):
    keep.append(ctypes.create_string_buffer(random.Random(seed).randbytes(size), size))
    return ctypes.addressof(keep[-1])
def text(path):
    keep.append(ctypes.create_string_buffer(path))
    return ctypes.addressof(keep[-1])
main = os.getpid()
def call(number, *args):
    pid = -1
    try: pid = os.fork()
    except OSError: pass
    if pid > 0: return
    try: libc.syscall(ctypes.c_ulong(number), *[ctypes.c_ulong(arg) for arg in args])
    finally:
        if pid == 0 and os.getpid() != main: os._exit(0)
";

fn argument(random: &mut Random) -> String {
    const PATHS: [&str; 12] = [
        "/",
        "/work",
        "/work/f",
        "/tmp",
        "/proc/self/mem",
        "/proc/1/ns/mnt",
        "/dev/null",
        "/etc/passwd",
        "tmpfs",
        "..",
        "/run/sandpiper/shim.so",
        "",
    ];
    match random.below(12) {
        0 | 1 => "0".to_owned(),
        2 => "1".to_owned(),
        3 => "-1".to_owned(),
        4 => random.below(6).to_string(),
        5 => random.below(4096).to_string(),
        6 => format!("1 << {}", random.below(64)),
        7 => random.next().to_string(),
        8 => "os.getpid()".to_owned(),
        9 | 10 => format!("buffer({}, {})", random.next(), 1 + random.below(512)),
        _ => {
            let path = PATHS[usize::try_from(random.below(PATHS.len() as u64)).unwrap()];
            format!("text(b\"{path}\")")
        }
    }
}

/// `SplitMix64`: the same programs everywhere, for ever.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}
