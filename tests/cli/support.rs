//! Runs the binary with an environment of its own and nothing on standard input, unless told otherwise.

use std::ffi::OsStr;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What a run left.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    /// Standard output, which must be one JSON document.
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error} in {self:?}"))
    }

    /// Standard error, which must be one line of ours.
    pub(crate) fn complaint(&self) -> &str {
        let line = self.stderr.strip_suffix('\n').unwrap_or_else(|| panic!("no line in {self:?}"));
        assert!(!line.contains('\n'), "more than one line in {self:?}");
        line.strip_prefix("sandpiper: ").unwrap_or_else(|| panic!("not our line in {self:?}"))
    }
}

/// The binary, ready to run.
pub(crate) fn command<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sandpiper"));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("SANDPIPER_") {
            command.env_remove(name);
        }
    }
    command
}

/// Runs it to its end.
pub(crate) fn run<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Ran {
    finish(command(args), b"")
}

/// Runs it to its end, with bytes on standard input.
pub(crate) fn run_with_stdin<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>, stdin: &[u8]) -> Ran {
    let mut command = command(args);
    command.stdin(Stdio::piped());
    finish(command, stdin)
}

/// Runs a prepared command to its end.
pub(crate) fn finish(mut command: Command, stdin: &[u8]) -> Ran {
    let mut child = command.spawn().unwrap();
    if let Some(mut pipe) = child.stdin.take() {
        // A binary that does not want its input may be gone already.
        drop(pipe.write_all(stdin));
    }
    let out = child.wait_with_output().unwrap();
    Ran {
        code: out.status.code().unwrap_or_else(|| panic!("killed: {:?}", out.status)),
        stdout: String::from_utf8(out.stdout).unwrap(),
        stderr: String::from_utf8(out.stderr).unwrap(),
    }
}

/// So long a test waits for what will come: minutes, because a busy machine gives jobs, which stand behind
/// everything else, little of itself.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// Waits for what tells nobody of itself: asks again and again, but not for ever.
pub(crate) fn eventually(what: &str, holds: impl FnMut() -> bool) {
    eventually_within(PATIENCE, what, holds);
}

/// The same for what takes its time.
#[expect(clippy::disallowed_methods, reason = "the one place where another process's state is asked for")]
pub(crate) fn eventually_within(time: Duration, what: &str, mut holds: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < time, "it never came to pass that {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
