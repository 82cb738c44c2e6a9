//! What must hold for any input where a hostile or damaged one could come: the rendered script and the assignment,
//! the report of a starting process, the plan of a wall, and what the kernel asks of a job's system calls.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::sync::LazyLock;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use proptest::prelude::*;
use sandpiper::config::Config;
use sandpiper::job::{self, Job};
use sandpiper::sandbox::inner_wall::{Arch, Judgement, Options, Policy};
use sandpiper::script::{Payload, Prescript};
use sandpiper_shim::abi::{REPORT_LEN, Report, Stage};
use sandpiper_shim::plan::{Step, Steps};

fn job(code: &str, args: &[String]) -> Job {
    let body = serde_json::json!({"code": code, "args": args}).to_string();
    job::parse(body.as_bytes(), None, &Config::default().admission()).unwrap()
}

/// What prescript.py does with both halves.
fn decode(script: &str, assignment: &[u8]) -> Vec<u8> {
    // The last of the values that the prescript's last statement gives it.
    let (_, code) = script.rsplit_once(", b\"").unwrap();
    let (code, _) = code.split_once('"').unwrap();
    let key = BASE64.decode(assignment.split(|byte| *byte == 0).next().unwrap()).unwrap();
    assert_eq!(key.len(), 64, "512 bits");
    BASE64.decode(code).unwrap().iter().zip(key.iter().cycle()).map(|(byte, key)| byte ^ key).collect()
}

fn arbitrary_code() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        any::<String>(),
        Just("{{code}}".to_owned()),
        Just("{{uid}}{{".to_owned()),
        Just("\"\"\"')\n".to_owned()),
        "[ -~\n\r\t]{0,200}",
    ];
    prop::collection::vec(part, 0..8).prop_map(|parts| parts.concat())
}

static POLICY: LazyLock<Policy> = LazyLock::new(|| Policy::compile(&Options::CLOSED).unwrap());

proptest! {
    #[test]
    fn any_question_has_an_answer(
        arch in prop_oneof![any::<u32>(), Just(Arch::host().unwrap().audit())],
        number in prop_oneof![any::<i32>(), 0..600_i32],
        arguments in any::<[u64; 6]>(),
    ) {
        match POLICY.judge(arch, number, &arguments) {
            Judgement::Kill { name } => prop_assert!(!name.is_empty()),
            // An errno of 0 would lie: the call would seem to have succeeded.
            Judgement::Refuse { name, errno } => prop_assert!(!name.is_empty() && (1..4096).contains(&errno)),
        }
    }

    #[test]
    fn code_comes_back_from_script_and_key(code in arbitrary_code(), args in prop::collection::vec("[^\0]{0,20}", 0..4)) {
        let payload = Payload::encode(job(&code, &args));
        let (script, assignment) = (payload.render(&Prescript::plain(), 1000, 1000), payload.assignment(false, &[]));
        prop_assert_eq!(decode(&script, &assignment), code.as_bytes());
        prop_assert!(!script.contains("{{"), "a placeholder was left or came in");
        let fields: Vec<&[u8]> = assignment.split(|byte| *byte == 0).collect();
        let count = args.len().to_string();
        prop_assert_eq!(fields[2], count.as_bytes());
        for (field, argument) in fields[3..].iter().zip(&args) {
            prop_assert_eq!(*field, argument.as_bytes());
        }
    }

    #[test]
    fn keys_are_never_the_same(code in "[a-z]{16,80}") {
        // Long enough that two keys cannot meet by chance in what they make of it: one byte in 256 would.
        let script = || Payload::encode(job(&code, &[])).render(&Prescript::plain(), 1000, 1000);
        prop_assert_ne!(script(), script());
    }

    #[test]
    fn a_report_is_itself_or_none(bytes in any::<[u8; REPORT_LEN]>()) {
        if let Some(report) = Report::decode(&bytes) {
            prop_assert_eq!(Report::decode(&report.encode()), Some(report));
        }
    }

    /// Random bytes seldom get past the first number; these do.
    #[test]
    fn a_damaged_report_is_itself_or_none(at in 0..REPORT_LEN, byte in any::<u8>(), step in any::<u32>(), errno in any::<i32>()) {
        let mut bytes = Report::Failed { stage: Stage::Wall, step, errno }.encode();
        bytes[at] = byte;
        if let Some(report) = Report::decode(&bytes) {
            prop_assert_eq!(report.encode(), bytes);
        }
    }

    #[test]
    fn any_bytes_are_read_as_a_plan_to_an_end(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        // Every step takes at least a byte, and the first damage ends it.
        let steps: Vec<_> = Steps::new(&bytes).take(bytes.len() + 2).collect();
        prop_assert!(steps.len() <= bytes.len() + 1);
        prop_assert!(steps.iter().rev().skip(1).all(Result::is_ok), "it went on after the damage");
    }

    #[test]
    fn a_plan_comes_back(number in any::<u64>(), path in "[^\0]{0,40}", data in prop::collection::vec(any::<u8>(), 0..100)) {
        let path = std::ffi::CString::new(path).unwrap();
        let steps = [
            Step::Mount { flags: number, source: &path, target: &path, fstype: &path, options: &path },
            Step::CreateFile { mode: number, path: &path, content: &data },
            Step::Setsid {},
            Step::Filter { instructions: &data },
            Step::Rlimit { resource: number, soft: number, hard: !number },
        ];
        let mut plan = Vec::new();
        steps.iter().for_each(|step| step.encode(&mut plan));
        let read: Vec<Step<'_>> = Steps::new(&plan).map(Result::unwrap).collect();
        prop_assert_eq!(&read[..], &steps[..]);

        // Cut short anywhere, it is never read as something else.
        for length in 0..plan.len() {
            let cut: Vec<_> = Steps::new(&plan[..length]).collect();
            let whole = cut.iter().take_while(|step| step.is_ok()).count();
            prop_assert!(cut.iter().take(whole).zip(&steps).all(|(cut, step)| cut.as_ref() == Ok(step)));
        }
    }
}
