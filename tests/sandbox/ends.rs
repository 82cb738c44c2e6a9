//! Every way for a process to end: all exit codes, and every signal, each reported as what it was.

use libtest_mimic::{Failed, Trial};
use serde_json::{Value, json};

use crate::case::Case;
use crate::{check, run};

/// Tests that share the ends among them.
const PARTS: usize = 4;

pub(crate) fn trials() -> impl Iterator<Item = Trial> {
    (0..PARTS).map(|part| {
        Trial::test(format!("ends::codes_and_signals_{part}"), move || {
            ends().skip(part).step_by(PARTS).try_for_each(verify)
        })
    })
}

/// A name, the last line of a program, and what the result must say.
fn ends() -> impl Iterator<Item = (String, String, Value)> {
    let codes = (0..=255).map(|code| {
        let status = if code == 0 { "succeeded" } else { "failed" };
        let assert = json!({"status": status, "exit_code": code, "signal": null, "syscall": null});
        (format!("code_{code}"), format!("os._exit({code})"), assert)
    });
    let signals = (1..=64).filter_map(|number| {
        use nix::sys::signal::Signal;
        let name = Signal::try_from(number).map(Signal::as_str);
        // The rest either does nothing by default or stops the process, which has fixtures of its own.
        let ends = !matches!(number, 17..=23 | 28);
        let signal = match name {
            Ok(name) => json!({"signal": name}),
            Err(_) => json!({}),
        };
        let mut assert = json!({"status": "signaled", "exit_code": null, "syscall": null});
        assert.as_object_mut()?.extend(signal.as_object()?.clone());
        let raise = format!("send({number})");
        ends.then(|| (format!("signal_{number}"), raise, assert))
    });
    codes.chain(signals)
}

/// Past python and glibc, which keep some signals for themselves.
const PRELUDE: &str = "
import ctypes, os
libc = ctypes.CDLL(None)
numbers = {'x86_64': (13, 62), 'aarch64': (134, 129)}[os.uname().machine]
def send(number):
    libc.syscall(numbers[0], number, bytes(32), None, 8)
    libc.syscall(numbers[1], os.getpid(), number)
";

fn verify((name, line, assert): (String, String, Value)) -> Result<(), Failed> {
    let case = json!({"name": name, "code": format!("{PRELUDE}{line}\n"), "assert": assert});
    let case: Case = serde_json::from_value(case).unwrap();
    let ran = run::exec(&case);
    let unmet = check::unmet(&case, &ran);
    if unmet.is_empty() { Ok(()) } else { Err(format!("{name}\n  {}\n  {ran}", unmet.join("\n  ")).into()) }
}
