//! Figures for people and for scripts.

use crate::support::run;

#[test]
fn the_json_holds_the_figures_and_every_status() {
    let bench = run(["bench", "--local", "-n", "4", "--concurrency", "2", "--json"]);
    assert_eq!(bench.code, 0, "{bench:?}");
    let figures = bench.json();
    let names: Vec<&String> = figures.as_object().unwrap().keys().collect();
    assert_eq!(names, ["jobs", "jobs_per_s", "max_ms", "p50_ms", "p90_ms", "p99_ms", "statuses"]);
    assert_eq!(figures["jobs"], 4);
    assert_eq!(figures["statuses"], serde_json::json!({ "succeeded": 4 }));
    let time = |name: &str| figures[name].as_f64().unwrap();
    assert!(time("jobs_per_s") > 0.0 && time("p50_ms") > 0.0, "{figures}");
    assert!(time("p50_ms") <= time("p90_ms") && time("p90_ms") <= time("p99_ms"), "{figures}");
    assert!(time("p99_ms") <= time("max_ms"), "{figures}");
}

#[test]
fn a_program_that_fails_makes_the_figures_worthless() {
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("fails.py");
    std::fs::write(&program, "raise SystemExit(3)").unwrap();
    let bench = run(["bench", "--local", "-n", "2", program.to_str().unwrap()]);
    assert_eq!(bench.code, 1, "{bench:?}");
    assert!(bench.stdout.contains("2 failed"), "{bench:?}");
    assert!(bench.complaint().contains("not every job succeeded"), "{bench:?}");
}
