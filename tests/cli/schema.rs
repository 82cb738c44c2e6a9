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

#[test]
fn another_word_is_refused_with_the_two_that_there_are() {
    let ran = run(["schema", "jobs"]);
    assert_eq!(ran.code, 2, "{ran:?}");
    assert!(ran.stderr.contains("job") && ran.stderr.contains("result"), "{ran:?}");
}
