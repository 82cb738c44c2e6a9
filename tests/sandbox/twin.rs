//! Twins: the same program as a job and as a plain `python3 file.py`. What the two print, on both streams, and how
//! they end must be the same, but for the name of the file in tracebacks.

use std::io::Write as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use libtest_mimic::Failed;
use serde_json::Value;

use crate::case::Case;
use crate::{check, run};

/// The interpreter that jobs run under by default.
const PYTHON: &str = "/usr/bin/python3";

pub(crate) fn verify(case: &Case) -> Result<(), Failed> {
    let plain = plain(&case.job());
    agree(case, &plain)?;
    if run::is_warm() {
        // A fork ends by python's own way, or by the fast exit where nothing of its would notice; and its memory is in
        // huge pages or not.
        let mut slow = case.clone();
        slow.set.push("environments.default.fast_exit=false".into());
        slow.set.push("environments.default.huge_pages=false".into());
        agree(&slow, &plain)?;
    }
    Ok(())
}

fn agree(case: &Case, plain: &Output) -> Result<(), Failed> {
    let ran = run::exec(case);
    let mut unmet = check::unmet(case, &ran);
    if let Ok(result) = &ran.result {
        let text = |field: &str| result[field].as_str().unwrap_or_default().to_owned();
        let mut same = |what: &str, job: String, plain: String| {
            if job != plain {
                unmet.push(format!(
                    "{what} is that of {PYTHON}\n--- as a job\n{job}\n--- plain\n{plain}\n---"
                ));
            }
        };
        same("stdout", text("stdout"), lossless(&plain.stdout));
        same("stderr", text("stderr"), lossless(&plain.stderr));
        same("exit code", result["exit_code"].to_string(), Value::from(plain.status.code()).to_string());
        let signal = plain.status.signal().map(|number| {
            nix::sys::signal::Signal::try_from(number).map_or("?", nix::sys::signal::Signal::as_str)
        });
        same("signal", result["signal"].to_string(), Value::from(signal).to_string());
    }
    if unmet.is_empty() {
        Ok(())
    } else {
        Err(format!("{} {:?}\n  unmet:\n    {}", case.name, case.set, unmet.join("\n    ")).into())
    }
}

/// As results hold output.
fn lossless(bytes: &[u8]) -> String {
    use base64::Engine as _;
    String::from_utf8(bytes.to_vec())
        .unwrap_or_else(|_| base64::engine::general_purpose::STANDARD.encode(bytes))
}

/// The program in a file of its own, in a directory of its own, with the variables that a job has.
fn plain(job: &Value) -> Output {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("main.py");
    std::fs::write(&file, job["code"].as_str().unwrap()).unwrap();
    let mut command = Command::new(PYTHON);
    command.env_clear().envs([
        ("HOME", "/tmp"),
        ("PATH", "/usr/local/bin:/usr/bin:/bin"),
        ("LANG", "C.UTF-8"),
    ]);
    for (name, value) in job["env"].as_object().into_iter().flatten() {
        command.env(name, value.as_str().unwrap());
    }
    command.arg(&file).args(job["args"].as_array().into_iter().flatten().map(|arg| arg.as_str().unwrap()));
    command.current_dir(place.path());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = job["stdin"].as_str().unwrap_or_default().to_owned();
    let feeder = std::thread::spawn(move || {
        // A program that does not read it is a program as well.
        let _ = stdin.write_all(input.as_bytes());
    });
    let output = child.wait_with_output().unwrap();
    feeder.join().unwrap();
    Output {
        stderr: renamed(&output.stderr, place.path()),
        stdout: renamed(&output.stdout, place.path()),
        ..output
    }
}

/// With the place that the program has as a job.
fn renamed(output: &[u8], place: &Path) -> Vec<u8> {
    match std::str::from_utf8(output) {
        Ok(text) => text.replace(place.to_str().unwrap(), "/work").into_bytes(),
        Err(_) => output.to_vec(),
    }
}
