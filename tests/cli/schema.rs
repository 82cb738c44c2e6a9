//! The schemas that `schema` prints are valid, and hold for what the binary reads and writes.

use serde_json::{Value, json};

use crate::support::run;

fn schema(what: &str) -> jsonschema::Validator {
    let ran = run(["schema", what]);
    assert_eq!(ran.code, 0, "{ran:?}");
    let schema = ran.json();
    jsonschema::meta::validate(&schema).unwrap();
    jsonschema::validator_for(&schema).unwrap()
}

#[test]
fn a_result_that_exec_prints_is_of_the_results_schema() {
    let schema = schema("result");
    for job in [r#"{"code": "print(1)", "metadata": {"a": [1]}}"#, "{}", r#"{"code": "1/0"}"#] {
        let result = run(["exec", "--json", "--job", job]).json();
        let errors: Vec<String> = schema.iter_errors(&result).map(|error| error.to_string()).collect();
        assert!(errors.is_empty(), "{errors:?} in {result}");
    }
    assert!(!schema.is_valid(&json!({ "status": "succeeded" })));
}

#[test]
fn the_jobs_schema_accepts_what_exec_accepts() {
    let schema = schema("job");
    for (job, good) in [
        (json!({ "code": "print(1)" }), true),
        (json!({ "code": "print(1)", "timeout_ms": 100, "limits": { "cpu_ms": 100 } }), true),
        (json!({}), false),
        (json!({ "code": 1 }), false),
        (json!({ "code": "", "colour": "blue" }), false),
    ] {
        assert_eq!(schema.is_valid(&job), good, "{job}");
        let result: Value = run(["exec", "--json", "--job", &job.to_string()]).json();
        assert_eq!(result["status"] != "rejected", good, "{job}: {result}");
    }
}

/// That the document is AsyncAPI says its own parser, in tests/clients.
#[test]
fn asyncapi_has_the_queues_as_configured_and_schemas_that_hold() {
    let ran = run(["schema", "asyncapi", "--set", "amqp.jobs_queue=eu.jobs"]);
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    let document = ran.json();
    for (channel, address) in [
        ("jobs", "eu.jobs"),
        ("results", "sandpiper.results"),
        ("dead", "sandpiper.dead"),
        ("control", "sandpiper.control"),
    ] {
        assert_eq!(document["channels"][channel]["address"], address);
    }
    let fixture = |name: &str| -> Value {
        let path = format!("{}/tests/fixtures/contract/{name}.json", env!("CARGO_MANIFEST_DIR"));
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    };
    let (job, mut result) = (fixture("example_job"), fixture("example_result"));
    let output = json!({"id": "a", "seq": 0, "stream": "stdout", "data": "x", "encoding": "utf-8"});
    for (message, good) in [
        ("job", &job),
        ("result", &result),
        ("output", &output),
        ("command", &json!({"cancel": "a"})),
        ("command", &json!({"ping": {}})),
    ] {
        assert!(payload(&document, message).is_valid(good), "{message}: {good}");
    }
    result["status"] = "done".into();
    for (message, bad) in [
        ("job", json!({"code": "1", "colour": "blue"})),
        ("job", json!({"code": "1", "limits": {"cpu_ms": 0}})),
        ("result", result),
        ("output", json!({"id": "a"})),
        ("command", json!({"reboot": "now"})),
        ("pong", json!({})),
    ] {
        assert!(!payload(&document, message).is_valid(&bad), "{message}: {bad}");
    }
}

#[test]
fn asyncapi_has_every_queue_of_jobs() {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("config.toml");
    let text =
        "[amqp]\njobs_queue = \"b\"\nqueues = [{ name = \"a\" }, { name = \"b\" }, { name = \"c\" }]\n";
    std::fs::write(&config, text).unwrap();
    let ran = run(["schema", "asyncapi", "--config", config.to_str().unwrap()]);
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    let jobs = &ran.json()["channels"]["jobs"];
    assert_eq!(jobs["address"], "{queue}");
    assert_eq!(jobs["parameters"]["queue"]["enum"], json!(["b", "a", "c"]));
    assert_eq!(jobs["parameters"]["queue"]["default"], "b");
    assert!(jobs["bindings"]["amqp"]["queue"].get("name").is_none(), "{jobs}");
}

fn payload(document: &Value, message: &str) -> jsonschema::Validator {
    let components = &document["components"];
    let mut schema = components["messages"][message]["payload"].clone();
    schema["components"] = components.clone();
    jsonschema::draft7::new(&schema).unwrap()
}

#[test]
fn a_configuration_that_is_wrong_concerns_asyncapi_only() {
    let wrong = ["--set", "amqp.no_such_key=1"];
    let asyncapi = run(["schema", "asyncapi"].into_iter().chain(wrong));
    assert!(asyncapi.code != 0 && asyncapi.complaint().contains("no_such_key"), "{asyncapi:?}");
    assert_eq!(run(["schema", "job"].into_iter().chain(wrong)).code, 0);
}

#[test]
fn another_word_is_refused_with_the_two_that_there_are() {
    let ran = run(["schema", "jobs"]);
    assert_eq!(ran.code, 2, "{ran:?}");
    assert!(ran.stderr.contains("job") && ran.stderr.contains("result"), "{ran:?}");
}
