//! The log where standard error is systemd's journal, and where it only looks so.

use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::os::linux::fs::MetadataExt;
use std::process::Stdio;

use crate::support::command;

/// What a worker without a broker logs until it has said that it cannot connect. `told` is what `JOURNAL_STREAM`
/// says, made from the device and inode of standard error.
fn logged(format: &str, told: impl Fn(u64, u64) -> String) -> Vec<String> {
    let (ours, its) = std::io::pipe().unwrap();
    let ours = std::fs::File::from(OwnedFd::from(ours));
    let it = ours.metadata().unwrap();
    let format = format!("log.format={format}");
    let mut worker =
        command(["serve", "--url", "amqp://127.0.0.1:1", "--listen", "127.0.0.1:0", "--set", &format])
            .env("JOURNAL_STREAM", told(it.st_dev(), it.st_ino()))
            .stderr(Stdio::from(its))
            .spawn()
            .unwrap();
    let mut lines = Vec::new();
    for line in BufReader::new(ours).lines() {
        lines.push(line.unwrap());
        if lines.last().unwrap().contains("WARN") {
            break;
        }
    }
    worker.kill().unwrap();
    worker.wait().unwrap();
    assert!(lines.iter().any(|line| line.contains("WARN")), "it never warned: {lines:?}");
    lines
}

#[test]
fn lines_for_the_journal_carry_their_priority_and_leave_it_the_time() {
    let lines = logged("text", |device, inode| format!("{device}:{inode}"));
    for line in &lines {
        let known = ["<3>ERROR ", "<4> WARN ", "<6> INFO "];
        assert!(known.iter().any(|start| line.starts_with(start)), "{line}");
    }
    assert!(lines.iter().any(|line| line.starts_with("<4>")), "{lines:?}");
}

#[test]
fn json_for_the_journal_is_json_behind_the_priority() {
    for line in logged("json", |device, inode| format!("{device}:{inode}")) {
        let (priority, rest) = line.split_at(3);
        let event: serde_json::Value = serde_json::from_str(rest).unwrap_or_else(|e| panic!("{e}: {line}"));
        let wanted = match event["level"].as_str().unwrap() {
            "ERROR" => "<3>",
            "WARN" => "<4>",
            _ => "<6>",
        };
        assert_eq!(priority, wanted, "{line}");
    }
}

#[test]
fn an_inherited_variable_makes_no_journal_of_a_file() {
    for line in logged("text", |device, inode| format!("{device}:{}", inode + 1)) {
        assert!(line.starts_with("20"), "a line begins with its time: {line}");
    }
}
