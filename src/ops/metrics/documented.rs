//! Holds the values of labels equal in what a worker exports and in what operators read: the page about monitoring,
//! the dashboards and the alert rules.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::Metrics;

/// Labels with a closed set of values.
type Labels = BTreeMap<String, BTreeSet<String>>;

fn deploy(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy").join(file)
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The dashboards by their file names.
fn dashboards() -> Vec<(String, Value)> {
    let files = std::fs::read_dir(deploy("grafana/dashboards")).unwrap().map(|entry| entry.unwrap().path());
    let boards = files.map(|file| {
        (file.file_name().unwrap().display().to_string(), serde_json::from_str(&read(&file)).unwrap())
    });
    let boards: Vec<_> = boards.collect();
    assert!(boards.len() >= 6, "only {} dashboards", boards.len());
    boards
}

/// `name="value"` and the like of one line in Prometheus's notation: label, operator, value.
fn pairs(line: &str) -> Vec<(&str, &str, &str)> {
    let word = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
    let mut found = Vec::new();
    let mut parts = line.split('"');
    while let (Some(before), Some(value)) = (parts.next(), parts.next()) {
        let name = before.trim_end_matches(['=', '!', '~']);
        let operator = &before[name.len()..];
        let name = name.rsplit(word).next().unwrap_or_default();
        if !operator.is_empty() {
            found.push((name, operator, value));
        }
    }
    found
}

/// The labels whose values all show at 0 before anything has happened, as a new worker exports them.
fn exported() -> Labels {
    /// Names of the configuration or the kernel, or not a set at all.
    const OPEN: [&str; 5] = ["environment", "le", "queue", "syscall", "version"];
    let text = Metrics::new().unwrap().render();
    let mut labels = Labels::new();
    for (name, _, value) in text.lines().filter(|line| !line.starts_with('#')).flat_map(pairs) {
        if !OPEN.contains(&name) {
            labels.entry(name.into()).or_default().insert(value.into());
        }
    }
    labels
}

#[test]
fn the_page_lists_each_value_of_each_label() {
    let page = read(&deploy("MONITORING.md"));
    let table = page.split_once("| label | values |\n|---|---|\n").expect("the table of labels").1;
    let mut written = Labels::new();
    for row in table.lines().take_while(|line| line.starts_with('|')) {
        let mut cells = row.trim_matches('|').split(" | ");
        let (label, values) = (cells.next().unwrap(), cells.next().unwrap());
        // Configuration keys have a dot.
        let quoted = values.split('`').skip(1).step_by(2).filter(|word| !word.contains('.'));
        let values: BTreeSet<String> = quoted.map(str::to_owned).collect();
        if !values.is_empty() {
            written.insert(label.trim().trim_matches('`').into(), values);
        }
    }
    assert_eq!(written, exported(), "deploy/MONITORING.md on the left, the worker on the right");
}

#[test]
fn a_panel_with_colours_by_label_has_one_for_each_value() {
    let labels = exported();
    let mut coloured = BTreeSet::new();
    for (file, board) in dashboards() {
        for panel in board["panels"].as_array().unwrap() {
            let targets = panel["targets"].as_array().map(Vec::as_slice).unwrap_or_default();
            let legends = targets.iter().filter_map(|target| target["legendFormat"].as_str());
            let overrides =
                panel["fieldConfig"]["overrides"].as_array().map(Vec::as_slice).unwrap_or_default();
            let names: BTreeSet<String> =
                overrides.iter().map(|one| one["matcher"]["options"].as_str().unwrap().to_owned()).collect();
            for label in legends.filter_map(|legend| legend.strip_prefix("{{")?.strip_suffix("}}")) {
                if let (Some(values), false) = (labels.get(label), names.is_empty()) {
                    assert_eq!(&names, values, "{file}, {}: colours on the left", panel["title"]);
                    coloured.insert(label.to_owned());
                }
            }
        }
    }
    let expected = ["action", "outcome", "reason", "start", "status"].map(str::to_owned);
    assert_eq!(coloured, BTreeSet::from(expected), "the labels that have colours");
}

#[test]
fn queries_and_rules_ask_for_values_that_exist() {
    fn strings(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::String(text) => found.push(text.clone()),
            Value::Array(values) => values.iter().for_each(|value| strings(value, found)),
            Value::Object(fields) => fields.values().for_each(|value| strings(value, found)),
            _ => {}
        }
    }
    let labels = exported();
    let rules = deploy("prometheus/rules/sandpiper.yml");
    let mut texts = vec![(rules.display().to_string(), read(&rules))];
    for (file, board) in dashboards() {
        let mut found = Vec::new();
        strings(&board, &mut found);
        texts.extend(found.into_iter().map(|text| (file.clone(), text)));
    }
    let mut checked = 0;
    for (file, text) in &texts {
        for (name, operator, value) in text.lines().flat_map(pairs) {
            let Some(values) = labels.get(name) else { continue };
            let wanted = if operator.ends_with('~') { value.split('|').collect() } else { vec![value] };
            for one in wanted {
                let (begin, end) = one.split_once(".*").unwrap_or((one, ""));
                let fits = |value: &String| value.starts_with(begin) && value.ends_with(end);
                assert!(
                    values.contains(one) || (one.contains(".*") && values.iter().any(fits)),
                    "{file}: {name}{operator}\"{value}\"; there are {values:?}"
                );
                checked += 1;
            }
        }
    }
    assert!(checked > 10, "only {checked} values were found in queries and rules");
}
