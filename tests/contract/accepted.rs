//! Bodies that are run: defaults, bounds that just hold, and what any input may do to the reader.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use sandpiper::job::{Admission, Bounds, InputFile, Job, Limits, Metadata, RefusalKind, parse};
use serde_json::{Value, json};

use crate::support::bodies;

fn job(body: &Value) -> Job {
    parse(&serde_json::to_vec(body).unwrap(), None, &Admission::default()).unwrap()
}

fn fixture(name: &str) -> Job {
    let (_, body) = bodies("accepted").into_iter().find(|(found, _)| found == name).unwrap();
    parse(&body, Some("m-1"), &Admission::default()).unwrap()
}

fn metadata(written: &str) -> Option<Metadata> {
    Some(serde_json::from_str(written).unwrap())
}

fn minimal() -> Job {
    Job {
        id: "m-1".into(),
        named: true,
        code: "print(1)".into(),
        preload: String::new(),
        enable_network: false,
        environment: "default".into(),
        stdin: Vec::new(),
        args: Vec::new(),
        env: BTreeMap::new(),
        files: Vec::new(),
        artifacts: Vec::new(),
        limits: Bounds::default().default,
        deadline: None,
        stream: false,
        metadata: None,
    }
}

#[test]
fn defaults_fill_what_is_absent_or_null() {
    assert_eq!(fixture("minimal"), minimal());
    assert_eq!(fixture("nulls"), minimal());
    assert_eq!(fixture("empties"), Job { metadata: metadata("{}"), ..minimal() });
}

#[test]
fn every_bound_is_inclusive() {
    let most = fixture("at_maximum");
    assert_eq!(most.limits, Bounds::default().maximum);
    assert_eq!((most.id.len(), most.args.len()), (128, 1024));
    let least = fixture("at_minimum");
    assert_eq!(least.limits, Limits::MINIMUM);
    let code = "#".repeat(1 << 20);
    assert_eq!(job(&json!({"code": code})).code, code);
    let over = json!({"code": format!("{code}#"), "id": "long"}).to_string();
    let refusal = parse(over.as_bytes(), None, &Admission::default()).unwrap_err();
    assert_eq!(refusal.reason, "`code` has 1048577 bytes; the maximum is 1048576");
    // {"k":"…"} is 8 bytes around the text.
    let metadata = json!({"k": "x".repeat(4096 - 8)});
    let echoed = job(&json!({"code": "", "metadata": metadata})).metadata.unwrap();
    assert_eq!(serde_json::from_str::<Value>(echoed.as_json()).unwrap(), metadata);
    let too_large = json!({"code": "", "metadata": {"k": "x".repeat(4096 - 7)}}).to_string();
    assert!(parse(too_large.as_bytes(), None, &Admission::default()).is_err());
}

#[test]
fn text_and_bytes_arrive_unchanged() {
    let job = fixture("unicode");
    assert_eq!(job.stdin, "a\0b 😀".as_bytes());
    assert_eq!(job.args, ["", "ä b"]);
    assert_eq!(job.env["LD_PRELOAD"], "x");
    assert_eq!(job.env["a b"], "=");
    let echoed: Value = serde_json::from_str(job.metadata.unwrap().as_json()).unwrap();
    assert_eq!(echoed["nested"], json!({"a": [1, 2.5, null, true, "😀"]}));
    let encoded = fixture("stdin_base64");
    assert_eq!((encoded.id.as_str(), encoded.stdin), ("A-z.0:_9", vec![0xff, 0]));
}

#[test]
fn files_and_patterns_are_taken_in_plain_form() {
    let job = job(&json!({
        "code": "",
        "files": [{"path": "./a//b.txt", "content": "x"}, {"path": "c", "base64": "/w=="}],
        "artifacts": ["out/**/*.png", "[ab].{csv,txt}"],
        "stream": true,
        "deadline": "2030-01-31T12:00:00.5+01:00",
    }));
    let file = |path: &str, content: &[u8]| InputFile { path: path.into(), content: content.into() };
    assert_eq!(job.files, [file("a/b.txt", b"x"), file("c", b"\xff")]);
    assert_eq!(job.artifacts, ["out/**/*.png", "[ab].{csv,txt}"]);
    assert!(job.stream);
    assert_eq!(job.deadline.unwrap().to_string(), "2030-01-31T11:00:00.5Z");
}

#[test]
fn the_operator_opens_doors() {
    let body = json!({"code": "", "preload": "import math", "enable_network": true, "environment": "data"});
    let admission = Admission {
        allow_preload: true,
        allow_network: true,
        environments: BTreeSet::from(["data".into(), "default".into()]),
        ..Admission::default()
    };
    let job = parse(body.to_string().as_bytes(), None, &admission).unwrap();
    assert_eq!(
        (job.preload.as_str(), job.enable_network, job.environment.as_str()),
        ("import math", true, "data")
    );
}

#[test]
fn the_id_comes_from_the_body_then_the_message_then_time() {
    let id = |body: &str, message_id| match parse(body.as_bytes(), message_id, &Admission::default()) {
        Ok(job) => job.id,
        Err(refusal) => refusal.id,
    };
    assert_eq!(id(r#"{"code": "", "id": "a"}"#, Some("m")), "a");
    assert_eq!(id(r#"{"code": ""}"#, Some("m")), "m");
    assert_eq!(id(r#"{"code": "", "id": "not an id"}"#, Some("m")), "m");
    for message_id in [None, Some("")] {
        let made = uuid::Uuid::parse_str(&id(r#"{"code": ""}"#, message_id)).unwrap();
        assert_eq!(made.get_version_num(), 7);
    }
    assert_ne!(id(r#"{"code": ""}"#, None), id(r#"{"code": ""}"#, None));
    // A message id that cannot be a job id still gives every delivery of the message the same id.
    let odd = Some("<1234@host example>");
    assert_eq!(id(r#"{"code": ""}"#, odd), id(r#"{"code": ""}"#, odd));
    assert_ne!(id(r#"{"code": ""}"#, odd), id(r#"{"code": ""}"#, Some("<1235@host example>")));
}

#[test]
fn a_refusal_can_be_matched_to_its_job() {
    let refusal = |body: &[u8]| parse(body, None, &Admission::default()).unwrap_err();
    let metadata = metadata(r#"{"trace": 7}"#);
    for body in [
        &br#"{"id": "a", "metadata": {"trace": 7}, "code": 1}"#[..],
        br#"{"code": 1, "more": [[[{}]]], "id": "a", "metadata": {"trace": 7}}"#,
        br#"{"id": "a", "metadata": {"trace": 7}, "code": "cut sho"#,
        br#"{"id": "a", "metadata": {"trace": 7}, "code": ""} trailing"#,
        b"{\"code\": \"\xff\", \"id\": \"a\", \"metadata\": {\"trace\": 7}}",
        br#"{"id": "a", "metadata": {"trace": 7}, "code": "", "timeout_ms": 0}"#,
        // What is wrong stands before what names the job.
        br#"{"timeout_ms": NaN, "id": "a", "code": "}", "metadata": {"trace": 7}}"#,
        br#"{"stdin": "\ud83d", "args": ["]", Infinity, -Infinity], "id": "a", "metadata": {"trace": 7} }"#,
        br#"{"limits": {"cpu_ms": 01 "x"}, "code": None, "id": "a", "metadata": {"trace": 7}"#,
        b"\xef\xbb\xbf{\"id\": \"a\", \"metadata\": {\"trace\": 7}}",
    ] {
        let refusal = refusal(body);
        assert_eq!((refusal.id.as_str(), refusal.metadata), ("a", metadata.clone()), "{}", refusal.reason);
    }
    let nested = format!(
        "{{\"code\": \"\", \"odd\": {}1{}, \"id\": \"a\"}}",
        "[".repeat(100_000),
        "]".repeat(100_000)
    );
    let nested = refusal(nested.as_bytes());
    assert_eq!((nested.id.as_str(), nested.kind), ("a", RefusalKind::Malformed));
    assert_eq!(refusal(br#"{"id": 7, "metadata": {"trace": 7}}"#).metadata, metadata);
    // What cannot be echoed is not.
    for unfit in ["{\"a\": NaN}", "{\"a\": \"\\ud83d\"}", "[1]", "7", "\"\""] {
        let body = format!("{{\"id\": \"a\", \"metadata\": {unfit}, \"code\": 1}}");
        let refusal = refusal(body.as_bytes());
        assert_eq!((refusal.id.as_str(), refusal.metadata), ("a", None), "{unfit}");
    }
}

/// Whatever becomes of the job, its publisher gets the very text back.
#[test]
fn metadata_is_handed_through_as_it_is_written() {
    for written in [
        r#"{"z": 340282366920938463463374607431768211456, "a": -9223372036854775809}"#,
        r#"{"f": [123456789.123456789, 1e400, -0, -0.0, 1.50, 2E+3, 5e-324]}"#,
        r#"{"b": 1, "a": 2, "b": 3, "a": {"x": 1, "x": 2}}"#,
        r#"{"e": "\u00e9\/\ud83d\ude00 \u0000", "\u0061": 1}"#,
        "{ \"spaces\" :\n\t[ ] , \"x\":{ } }",
    ] {
        let echoed = |tail: &str| {
            let body = format!("{{\"code\": \"\", \"metadata\":  {written} {tail}}}");
            match parse(body.as_bytes(), None, &Admission::default()) {
                Ok(job) => job.metadata,
                Err(refusal) => refusal.metadata,
            }
        };
        for tail in ["", ", \"timeout_ms\": 0", ", \"stdin\": NaN", ", \"unknown\": 1"] {
            assert_eq!(echoed(tail).unwrap().as_json(), written, "{tail}");
        }
    }
}

#[test]
fn metadata_is_measured_without_spaces_and_escapes() {
    let fits = |written: &str| {
        let body = format!("{{\"code\": \"\", \"metadata\": {written}}}");
        parse(body.as_bytes(), None, &Admission::default()).is_ok()
    };
    let room = 4096 - "{\"k\":\"\"}".len();
    for (text, bytes) in [("\\u0041", 1), ("\\u00e9", 2), ("\\ud83d\\ude00", 4), ("\\/", 1)] {
        let most = room / bytes;
        assert!(fits(&format!("{{ \"k\" :\n \"{}\" }}", text.repeat(most))), "{text}");
        assert!(!fits(&format!("{{\"k\":\"{}\"}}", text.repeat(most + 1))), "{text}");
    }
    // No end of spaces is kept for it.
    assert!(!fits(&format!("{{{}}}", " ".repeat(33_000))));
}

#[test]
fn limits_may_be_written_as_floats() {
    for text in ["2000", "2000.0", "2e3", "20000E-1"] {
        let body = format!("{{\"code\": \"\", \"timeout_ms\": {text}, \"limits\": {{\"cpu_ms\": {text}}}}}");
        let limits = parse(body.as_bytes(), None, &Admission::default()).unwrap().limits;
        assert_eq!((limits.timeout_ms, limits.cpu_ms), (2_000, 2_000), "{text}");
    }
}

#[test]
fn large_and_deep_bodies_get_a_short_answer() {
    let brackets = "[".repeat(100_000);
    for body in [
        brackets.clone(),
        format!("{{\"metadata\": {{\"a\": {brackets}"),
        format!("{{\"code\": \"\", \"args\": [{}\"\"]}}", "\"\",".repeat(1_000_000)),
        format!("{{\"code\": \"\", \"metadata\": {{\"a\": [{}0]}}}}", "0,".repeat(3_000_000)),
        format!("{{\"{}\": 1}}", "a".repeat(7 << 20)),
        format!("{{\"code\": {{\"{}\": 1}}}}", "`, expected `".repeat(500_000)),
        format!("{{\"id\": \"{}\"}}", "\\u0000".repeat(1_000_000)),
    ] {
        let refusal = parse(body.as_bytes(), None, &Admission::default()).unwrap_err();
        assert!(refusal.reason.chars().count() < 400, "{}", refusal.reason);
    }
    let huge = vec![b' '; (8 << 20) + 1];
    let refusal = parse(&huge, None, &Admission::default()).unwrap_err();
    assert_eq!(refusal.reason, "the body has 8388609 bytes, above this worker's maximum of 8388608");
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".*".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 32, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::hash_map(field(), inner, 0..6)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

fn field() -> impl Strategy<Value = String> {
    prop_oneof![
        prop::sample::select(vec![
            "id",
            "code",
            "stdin",
            "args",
            "env",
            "files",
            "artifacts",
            "limits",
            "timeout_ms",
            "deadline",
            "metadata",
            "path",
            "content",
            "base64",
            "cpu_ms",
        ])
        .prop_map(String::from),
        ".{0,12}",
    ]
}

proptest! {
    #[test]
    fn any_bytes_are_answered(body in prop::collection::vec(any::<u8>(), 0..256), message_id in ".{0,10}") {
        let refusal = parse(&body, Some(&message_id), &Admission::default()).unwrap_err();
        prop_assert!(!refusal.id.is_empty() && !refusal.reason.is_empty());
    }

    #[test]
    fn any_json_is_answered(body in any_json()) {
        match parse(body.to_string().as_bytes(), None, &Admission::default()) {
            Ok(job) => prop_assert_eq!(Some(job.code.as_str()), body["code"].as_str()),
            Err(refusal) => {
                prop_assert!((1..=128).contains(&refusal.id.len()));
                prop_assert!(!refusal.reason.contains('\n'), "{}", refusal.reason);
            }
        }
    }

    #[test]
    fn what_is_written_is_read(
        code in ".*",
        stdin in ".*",
        args in prop::collection::vec("[^\0]*", 0..5),
        env in prop::collection::btree_map("[^=\0]{1,9}", "[^\0]*", 0..5),
        timeout in 1u64..=300_000,
    ) {
        let job = job(&json!({"code": code, "stdin": stdin, "args": args, "env": env, "timeout_ms": timeout}));
        prop_assert_eq!((job.code, job.args, job.env), (code, args, env));
        prop_assert_eq!((job.stdin, job.limits.timeout_ms), (stdin.into_bytes(), timeout));
    }
}
