//! The published schemas accept what the worker accepts and writes, and refuse what it refuses by form.

use sandpiper::job::{Bounds, Limits, schema};
use serde_json::{Value, json};

use crate::support::{bodies, fixtures};

/// Broken in ways that a schema can express.
const BY_FORM: [&str; 4] = ["_type", "_zero", "unknown_", "_field"];

fn errors(schema: &Value, document: &Value) -> Vec<String> {
    let validator = jsonschema::draft202012::new(schema).unwrap();
    validator.iter_errors(document).map(|error| error.to_string()).collect()
}

#[test]
fn the_schemas_are_sound_and_closed() {
    for schema in [schema::job(), schema::result()] {
        jsonschema::draft202012::meta::validate(&schema).unwrap();
        assert_eq!(schema["additionalProperties"], json!(false));
        for (name, property) in schema["properties"].as_object().unwrap() {
            assert!(property["description"].is_string(), "{name} has no description");
        }
    }
    assert_eq!(schema::job()["required"], json!(["code"]));
}

/// The schema is of every worker, so it states the default configuration's limits and no maxima.
#[test]
fn the_defaults_are_those_of_the_configuration() {
    let schema = schema::job();
    let bounds = Bounds::default().default;
    assert_eq!(schema["properties"]["timeout_ms"]["default"], json!(bounds.timeout_ms));
    let limits = schema["$defs"]["JobLimits"]["properties"].as_object().unwrap();
    let Value::Object(mut expected) = serde_json::to_value(bounds).unwrap() else {
        panic!("limits are an object")
    };
    expected.remove("timeout_ms");
    let least = serde_json::to_value(Limits::MINIMUM).unwrap();
    // Processors are capped by nobody unless somebody says so.
    assert!(limits["cpus"].get("default").is_none());
    assert_eq!(limits.len(), expected.len() + 1);
    for (name, value) in expected {
        assert_eq!(limits[&name]["default"], value, "{name}");
        assert_eq!(limits[&name]["minimum"], least[&name], "{name}");
    }
}

#[test]
fn accepted_jobs_keep_the_schema() {
    for (name, body) in bodies("accepted") {
        let mut job: Value = serde_json::from_slice(&body).unwrap();
        let found = errors(&schema::job(), &job);
        assert!(found.is_empty(), "{name}: {found:?}");
        job["surprise"] = json!(1);
        assert!(!errors(&schema::job(), &job).is_empty(), "{name} with an unknown field");
    }
}

#[test]
fn jobs_refused_by_form_break_the_schema() {
    let mut checked = 0;
    for (name, body) in bodies("refused") {
        if !BY_FORM.iter().any(|part| name.contains(part)) {
            continue;
        }
        let Ok(job) = serde_json::from_slice::<Value>(&body) else { continue };
        assert!(!errors(&schema::job(), &job).is_empty(), "{name} keeps the schema");
        checked += 1;
    }
    assert!(checked > 30, "only {checked} fixtures were checked");
}

#[test]
fn a_result_has_every_field_and_no_other() {
    let example: Value =
        serde_json::from_slice(&std::fs::read(fixtures().join("example_result.json")).unwrap()).unwrap();
    assert_eq!(errors(&schema::result(), &example), Vec::<String>::new());
    for field in example.as_object().unwrap().keys() {
        let mut without = example.clone();
        without.as_object_mut().unwrap().remove(field);
        assert!(!errors(&schema::result(), &without).is_empty(), "{field} may be missing");
        let mut wrong = example.clone();
        wrong[field] = json!([[]]);
        assert!(!errors(&schema::result(), &wrong).is_empty(), "{field} may be anything");
    }
}
