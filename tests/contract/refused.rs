//! Bodies that are not run, one file each, and the sentence that each gets.

use std::collections::BTreeMap;
use std::fmt::Write;

use sandpiper::job::{Admission, RefusalKind, parse};

use crate::support::{bodies, fixtures};

/// `refused.txt` holds `NAME KIND: REASON`, one a line.
#[test]
fn every_refusal_has_its_sentence() {
    let mut report = String::new();
    for (name, body) in bodies("refused") {
        match parse(&body, Some("message"), &Admission::default()) {
            Ok(job) => panic!("{name} was taken on as {job:?}"),
            Err(refusal) => {
                let kind = match refusal.kind {
                    RefusalKind::Malformed => "malformed",
                    RefusalKind::Unacceptable => "unacceptable",
                };
                writeln!(report, "{name} {kind}: {}", refusal.reason).unwrap();
            }
        }
    }
    let golden = fixtures().join("refused.txt");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&golden, &report).unwrap();
    }
    let expected = std::fs::read_to_string(&golden).unwrap();
    let lines = |text: &str| -> BTreeMap<String, String> {
        text.lines().map(|line| line.split_once(' ').unwrap()).map(|(a, b)| (a.into(), b.into())).collect()
    };
    let (expected, report) = (lines(&expected), lines(&report));
    for (name, line) in &report {
        assert_eq!(expected.get(name), Some(line), "{name}; rerun with UPDATE_GOLDEN=1 and read the diff");
    }
    assert_eq!(expected.len(), report.len(), "refused.txt names a body that is not there");
}
