//! Holds what a job did against what its fixture says, and against what is true of every job.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::Value;

use crate::case::{Assert, Case, OneOrMany, slowness};
use crate::run::{Ran, SECRET};

/// The fields of a result: one that does not apply is null, none is ever missing.
const FIELDS: [&str; 24] = [
    "version",
    "id",
    "status",
    "exit_code",
    "signal",
    "syscall",
    "error",
    "stdout",
    "stderr",
    "stdout_encoding",
    "stderr_encoding",
    "stdout_truncated",
    "stderr_truncated",
    "artifacts",
    "blocked_syscalls",
    "limits",
    "usage",
    "timing",
    "attempt",
    "redelivered",
    "worker",
    "started_at",
    "finished_at",
    "metadata",
];

/// Every expectation that the run does not meet, in words.
pub(crate) fn unmet(case: &Case, ran: &Ran) -> Vec<String> {
    let mut unmet = Vec::new();
    if ran.report.hung {
        unmet.push("the worker did not end, and was killed".to_owned());
    }
    if !ran.report.survivors.is_empty() {
        unmet.push(format!("processes outlived the worker: {:?}", ran.report.survivors));
    }
    if ran.report.unreaped > 0 {
        unmet.push(format!("the worker did not wait for {} of its processes", ran.report.unreaped));
    }
    if !ran.files.is_empty() {
        unmet.push(format!("files were left behind: {:?}", ran.files));
    }
    match &ran.result {
        Err(e) => unmet.push(format!("standard output is not one JSON document: {e}")),
        Ok(result) => {
            if ran.report.exit_code != Some(0) {
                unmet.push("exec --json ends with 0 where there is a result".into());
            }
            unmet.extend(result_of(case, result));
        }
    }
    unmet
}

/// The same of a result alone.
pub(crate) fn result_of(case: &Case, result: &Value) -> Vec<String> {
    let mut unmet = always(case, result);
    unmet.extend(asserted(&case.assert, result));
    unmet
}

/// What holds for any result of any program.
fn always(case: &Case, result: &Value) -> Vec<String> {
    let mut unmet = Vec::new();
    let mut must = |holds: bool, what: &str| {
        if !holds {
            unmet.push(what.to_owned());
        }
    };
    let text = |field: &str| result[field].as_str().unwrap_or_default();
    for field in FIELDS {
        must(result.get(field).is_some(), &format!("the result has no field {field}"));
    }
    must(text("id") == case.name, "the result names another job");
    for word in ["ESCAPED", "REACHED"] {
        must(!text("stdout").contains(word), &format!("the job printed {word}"));
    }
    must(!result.to_string().contains(SECRET), "the worker's secret is in the result");

    let (exit_code, signal) = (&result["exit_code"], &result["signal"]);
    match text("status") {
        "succeeded" => {
            must(*exit_code == 0 && signal.is_null(), "succeeded means exit code 0 and no signal");
            let note = text("error");
            must(
                result["error"].is_null() || note.contains("artifacts"),
                "succeeded has no error, but what artifacts are missing",
            );
        }
        "failed" => {
            must(exit_code.as_i64().is_some_and(|c| c != 0) && signal.is_null(), "failed has an exit code")
        }
        "signaled" => {
            must(signal.is_string() && exit_code.is_null(), "signaled has a signal and no exit code")
        }
        "worker_error" => must(false, "worker_error: our fault, whatever the program does"),
        _ => must(exit_code.is_null(), "a job that was ended from outside has no exit code"),
    }
    must(text("status") == "succeeded" || result["error"].is_string(), "all but succeeded have an error");
    must(
        result["syscall"].is_null() || text("status") == "syscall_killed",
        "only syscall_killed names a call",
    );
    must(result["usage"].is_object() || text("status") == "rejected", "a job that ran has usage");
    unmet
}

/// Path and content of every artifact, in their order. Content is as many bytes as the result claims.
fn artifacts(result: &Value) -> Vec<(String, String)> {
    let artifact = |artifact: &Value| {
        let content = BASE64.decode(artifact["base64"].as_str().unwrap()).unwrap();
        assert_eq!(artifact["bytes"], content.len(), "bytes of {}", artifact["path"]);
        (artifact["path"].as_str().unwrap().to_owned(), String::from_utf8_lossy(&content).into_owned())
    };
    result["artifacts"].as_array().unwrap().iter().map(artifact).collect()
}

/// Path, width and height of every artifact; of one that is no whole PNG file, 0.
fn pictures(result: &Value) -> Vec<(String, u32, u32)> {
    let picture = |artifact: &Value| {
        let png = BASE64.decode(artifact["base64"].as_str().unwrap()).unwrap();
        let whole = png.starts_with(b"\x89PNG\r\n\x1a\n") && png.ends_with(b"IEND\xae\x42\x60\x82");
        let number = |at: usize| png.get(at..at + 4).map_or(0, |n| u32::from_be_bytes(n.try_into().unwrap()));
        let (width, height) = if whole { (number(16), number(20)) } else { (0, 0) };
        (artifact["path"].as_str().unwrap().to_owned(), width, height)
    };
    result["artifacts"].as_array().unwrap().iter().map(picture).collect()
}

/// What the fixture says.
fn asserted(assert: &Assert, result: &Value) -> Vec<String> {
    let mut unmet = Vec::new();
    let mut must = |holds: bool, what: String| {
        if !holds {
            unmet.push(what);
        }
    };
    let text = |field: &str| result[field].as_str().unwrap_or_default();
    let all = |words: &OneOrMany, test: &dyn Fn(&str) -> bool| words.as_slice().iter().all(|w| test(w));

    if let Some(status) = &assert.status {
        must(
            status.as_slice().iter().any(|s| s == text("status")),
            format!("status is one of {:?}", status.as_slice()),
        );
    }
    let exact = [("exit_code", &assert.exit_code), ("signal", &assert.signal), ("syscall", &assert.syscall)];
    for (field, wanted) in exact {
        if let Some(wanted) = wanted {
            must(result[field] == *wanted, format!("{field} is {wanted}"));
        }
    }
    if let Some(part) = &assert.error_contains {
        must(text("error").contains(part), format!("error contains {part:?}"));
    }
    for (field, wanted) in [("stdout", &assert.stdout), ("stderr", &assert.stderr)] {
        if let Some(wanted) = wanted {
            must(text(field) == wanted, format!("{field} is {wanted:?}"));
        }
    }
    if let Some(base64) = &assert.stdout_base64 {
        must(
            text("stdout_encoding") == "base64" && text("stdout") == base64,
            format!("stdout is {base64} in base64"),
        );
    }
    for (field, words) in [("stdout", &assert.stdout_contains), ("stderr", &assert.stderr_contains)] {
        if let Some(words) = words {
            must(
                all(words, &|w| text(field).contains(w)),
                format!("{field} contains {:?}", words.as_slice()),
            );
        }
    }
    if let Some(words) = &assert.stdout_not_contains {
        must(
            all(words, &|w| !text("stdout").contains(w)),
            format!("stdout has none of {:?}", words.as_slice()),
        );
    }
    for (field, len) in [("stdout", assert.stdout_len), ("stderr", assert.stderr_len)] {
        if let Some(len) = len {
            must(text(field).len() == len, format!("{field} has {len} bytes, not {}", text(field).len()));
        }
    }
    let encodings =
        [("stdout_encoding", &assert.stdout_encoding), ("stderr_encoding", &assert.stderr_encoding)];
    for (field, wanted) in encodings {
        if let Some(wanted) = wanted {
            must(text(field) == wanted, format!("{field} is {wanted}"));
        }
    }
    if let Some(calls) = &assert.blocked {
        let blocked: Vec<&Value> = result["blocked_syscalls"].as_array().into_iter().flatten().collect();
        must(
            all(calls, &|call| blocked.iter().any(|entry| entry["syscall"] == call)),
            format!("blocked_syscalls names {:?}", calls.as_slice()),
        );
    }
    if let Some(calls) = &assert.blocked_exactly {
        let blocked = result["blocked_syscalls"].as_array().into_iter().flatten();
        let blocked: Vec<&str> = blocked.filter_map(|entry| entry["syscall"].as_str()).collect();
        must(blocked == *calls, format!("blocked_syscalls are {calls:?}, not {blocked:?}"));
    }
    if let Some(most) = assert.stderr_len_max {
        must(
            text("stderr").len() <= most,
            format!("stderr has at most {most} bytes, not {}", text("stderr").len()),
        );
    }
    let truncated =
        [("stdout_truncated", assert.stdout_truncated), ("stderr_truncated", assert.stderr_truncated)];
    for (field, wanted) in truncated {
        if let Some(wanted) = wanted {
            must(result[field] == wanted, format!("{field} is {wanted}"));
        }
    }
    let artifacts = artifacts(result);
    if let Some(part) = &assert.artifacts_not_contain {
        must(
            artifacts.iter().all(|(_, text)| !text.contains(part)),
            format!("no artifact contains {part:?}"),
        );
    }
    if let Some(wanted) = &assert.artifacts {
        let seen: Vec<String> =
            artifacts.iter().map(|(path, text)| format!("{path:?} {text:.40?}")).collect();
        must(artifacts == *wanted, format!("the artifacts are the expected ones, not {seen:?}"));
    }
    if let Some(count) = assert.artifacts_count {
        must(artifacts.len() == count, format!("{count} artifacts come back, not {}", artifacts.len()));
    }
    if let Some(wanted) = &assert.artifacts_png {
        let seen = pictures(result);
        must(seen == *wanted, format!("the pictures are {wanted:?}, not {seen:?}"));
    }
    let wall_ms = result["usage"]["wall_ms"].as_u64();
    if let Some(least) = assert.wall_ms_min {
        must(wall_ms.is_some_and(|ms| ms >= least), format!("usage.wall_ms is at least {least}"));
    }
    if let Some(most) = assert.wall_ms_max {
        let most = most * slowness();
        must(wall_ms.is_some_and(|ms| ms <= most), format!("usage.wall_ms is at most {most}"));
    }
    if !assert.any.is_empty() {
        let tries: Vec<Vec<String>> = assert.any.iter().map(|a| asserted(a, result)).collect();
        if tries.iter().all(|unmet| !unmet.is_empty()) {
            unmet.push(format!(
                "one of these: {}",
                tries.iter().map(|t| t.join(" and ")).collect::<Vec<_>>().join("; or ")
            ));
        }
    }
    unmet
}

/// That the runs of a case printed different words, where it says so.
pub(crate) fn differing(case: &Case, outputs: &[String]) -> Result<(), String> {
    let Some(count) = case.assert.words_differ else { return Ok(()) };
    for n in 0..count {
        let mut words: Vec<&str> = outputs.iter().filter_map(|o| o.split_whitespace().nth(n)).collect();
        words.sort_unstable();
        words.dedup();
        if words.len() != outputs.len() {
            return Err(format!("{}: word {n} is not different in each of {outputs:?}", case.name));
        }
    }
    Ok(())
}
