//! What must hold for any input where a hostile or damaged one could come: the body of a message, the rendered script
//! and the assignment, the report of a starting process, the plan of a wall, and what the kernel asks of a job's system
//! calls. Parsers that only their own module can call have theirs beside them: frames in `src/amqp/frames/filter/`, encodings
//! in `src/worker/coding/`, reply addresses in `src/amqp/address.rs`.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::sync::LazyLock;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use proptest::prelude::*;
use sandpiper::config::Config;
use sandpiper::job::{self, Admission, Job, Refusal, RefusalKind};
use sandpiper::sandbox::inner_wall::{Arch, Judgement, Options, Policy};
use sandpiper::script::{Payload, Prescript};
use sandpiper_shim::abi::{REPORT_LEN, Report, Stage};
use sandpiper_shim::plan::{Step, Steps};
use serde_json::{Map, Value, json};

fn job(code: &str, args: &[String]) -> Job {
    let body = json!({"code": code, "args": args}).to_string();
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

/// JSON of any kind. Some of its strings are longer than a sentence may quote.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
        (".", 0..4_000_usize).prop_map(|(text, count)| text.repeat(count).into()),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((".{0,12}", inner), 0..4)
                .prop_map(|members| members.into_iter().collect::<Map<_, _>>().into()),
        ]
    })
}

/// A job that may run, and its metadata.
fn any_job() -> impl Strategy<Value = Value> {
    let metadata = prop::collection::vec(
        (".{0,12}", prop_oneof![any::<i64>().prop_map(Value::from), ".{0,12}".prop_map(Value::from)]),
        0..4,
    );
    (
        "[A-Za-z0-9._:-]{1,40}",
        "[^\0]{0,60}",
        prop::collection::vec("[^\0]{0,12}", 0..4),
        "[^\0]{0,40}",
        metadata,
    )
        .prop_map(|(id, code, args, stdin, metadata)| {
            let metadata: Map<String, Value> = metadata.into_iter().collect();
            json!({"id": id, "code": code, "args": args, "stdin": stdin, "metadata": metadata})
        })
}

/// An object with the names that a job has, and with what does not belong there.
fn nearly_a_job() -> impl Strategy<Value = Value> {
    const NAMES: [&str; 17] = [
        "id",
        "language",
        "code",
        "preload",
        "enable_network",
        "environment",
        "stdin",
        "args",
        "env",
        "files",
        "artifacts",
        "timeout_ms",
        "limits",
        "deadline",
        "stream",
        "metadata",
        "unknown",
    ];
    let files = json!([{"path": "a", "content": "b"}]);
    let fitting = prop::sample::select(vec![
        json!("print(1)"),
        json!(["a"]),
        json!({"a": "b"}),
        json!(100),
        files,
        json!(true),
    ]);
    let member = (prop::sample::select(&NAMES[..]), prop_oneof![any_json(), fitting]);
    prop::collection::vec(member, 0..6).prop_map(|members| {
        members.into_iter().map(|(name, value)| (name.to_owned(), value)).collect::<Map<_, _>>().into()
    })
}

fn parsed(body: &[u8]) -> Result<Job, Refusal> {
    job::parse(body, None, &Admission::default())
}

/// Whatever a body was, its requester learns of it.
fn is_well_formed(parsed: &Result<Job, Refusal>) {
    let (id, metadata) = match parsed {
        Ok(job) => (&job.id, &job.metadata),
        Err(refusal) => {
            assert!(!refusal.reason.is_empty() && refusal.reason.len() < 1_000, "{}", refusal.reason);
            assert!(!refusal.reason.contains(char::is_control), "{:?}", refusal.reason);
            (&refusal.id, &refusal.metadata)
        }
    };
    assert!(job::is_id(id), "{id:?}");
    if let Some(metadata) = metadata {
        assert!(serde_json::from_str::<Map<String, Value>>(metadata.as_json()).is_ok(), "{metadata:?}");
    }
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
    fn a_job_is_read_as_it_was_written(written in any_job(), pretty in any::<bool>()) {
        let body = if pretty { format!("{written:#}") } else { written.to_string() };
        let job = parsed(body.as_bytes()).unwrap();
        prop_assert_eq!(&job.id, written["id"].as_str().unwrap());
        prop_assert_eq!(&job.code, written["code"].as_str().unwrap());
        prop_assert_eq!(&job.stdin, written["stdin"].as_str().unwrap().as_bytes());
        prop_assert_eq!(json!(job.args), written["args"].clone());
        let metadata = job.metadata.unwrap();
        prop_assert!(body.contains(metadata.as_json()), "not as its publisher wrote it");
        prop_assert_eq!(serde_json::from_str::<Value>(metadata.as_json()).unwrap(), written["metadata"].clone());
    }

    /// No half of an id or of metadata is taken for the whole.
    #[test]
    fn a_job_that_is_cut_short_is_refused(written in any_job(), at in any::<prop::sample::Index>()) {
        let body = written.to_string();
        let parsed = parsed(&body.as_bytes()[..at.index(body.len())]);
        is_well_formed(&parsed);
        let refusal = parsed.unwrap_err();
        prop_assert_eq!(refusal.kind, RefusalKind::Malformed);
        prop_assert!(written["id"] == *refusal.id || refusal.id.parse::<uuid::Uuid>().is_ok(), "{}", refusal.id);
        if let Some(metadata) = refusal.metadata {
            prop_assert_eq!(metadata.as_json(), written["metadata"].to_string());
        }
    }

    #[test]
    fn a_damaged_job_is_read_or_refused(
        written in any_job(), at in any::<prop::sample::Index>(), byte in any::<u8>(), how in 0..3_u8,
    ) {
        let mut body = written.to_string().into_bytes();
        let at = at.index(body.len());
        match how {
            0 => body[at] = byte,
            1 => drop(body.remove(at)),
            _ => body.insert(at, byte),
        }
        is_well_formed(&parsed(&body));
    }

    #[test]
    fn what_is_nearly_a_job_is_read_or_refused(written in nearly_a_job()) {
        is_well_formed(&parsed(written.to_string().as_bytes()));
    }

    #[test]
    fn any_bytes_are_refused(body in prop::collection::vec(any::<u8>(), 0..200)) {
        let parsed = parsed(&body);
        is_well_formed(&parsed);
        prop_assert!(parsed.is_err());
    }

    #[test]
    fn code_comes_back_from_script_and_key(code in arbitrary_code(), args in prop::collection::vec("[^\0]{0,20}", 0..4)) {
        let payload = Payload::encode(job(&code, &args));
        let (script, assignment) = (payload.render(&Prescript::plain().unwrap(), 1000, 1000), payload.assignment(false, &[]));
        prop_assert_eq!(decode(&script, &assignment), code.as_bytes());
        prop_assert!(!script.contains("{{"), "a placeholder was left or came in");
        let fields: Vec<&[u8]> = assignment.split(|byte| *byte == 0).collect();
        let count = args.len().to_string();
        prop_assert_eq!(fields[2], b"main.py");
        prop_assert_eq!(fields[3], count.as_bytes());
        for (field, argument) in fields[4..].iter().zip(&args) {
            prop_assert_eq!(*field, argument.as_bytes());
        }
    }

    #[test]
    fn keys_are_never_the_same(code in "[a-z]{16,80}") {
        // Long enough that two keys cannot meet by chance in what they make of it: one byte in 256 would.
        let script = || Payload::encode(job(&code, &[])).render(&Prescript::plain().unwrap(), 1000, 1000);
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
