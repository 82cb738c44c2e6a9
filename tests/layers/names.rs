//! One name means one thing: no two types that others can see share a name without a reason.

use std::collections::BTreeMap;

use crate::none;
use crate::source::sources;

/// Names that several types share, each with the reason.
const SHARED: &[(&str, &str)] = &[
    ("Args", "each verb's own command line, used in its file alone"),
    ("Environment", "what the operator configured, and what the sandbox made of it"),
    ("Sandbox", "a section of the configuration, and what it configures"),
    ("Span", "OTLP's own word, with the exporter and without it"),
    ("Traces", "the exporter, and its stand-in where it is not compiled in"),
];

const KINDS: [&str; 5] = ["struct ", "enum ", "trait ", "type ", "union "];

/// The name of the type that a line of code declares for other files.
fn declared(line: &str) -> Option<&str> {
    let rest = line.trim_start().strip_prefix("pub")?;
    let rest = if rest.starts_with('(') { rest.split_once(')')?.1 } else { rest };
    let rest = rest.strip_prefix(' ')?.trim_start_matches("unsafe ");
    let name = KINDS.iter().find_map(|kind| rest.strip_prefix(kind))?;
    name.split(|c: char| !c.is_alphanumeric() && c != '_').next()
}

#[test]
fn types_that_others_see_share_a_name_only_for_a_reason() {
    let mut places: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for file in ["src", "shim/src"].into_iter().flat_map(sources) {
        for (n, line) in file.code.lines().enumerate() {
            // What belongs to a type, such as the `Item` of an iterator, is not public by itself.
            if let Some(name) = declared(line) {
                places.entry(name.to_owned()).or_default().push(format!("{}:{}", file.path, n + 1));
            }
        }
    }
    assert!(places.len() > 100, "the sources are not read: {places:?}");
    let shared = |name: &str| places.get(name).is_some_and(|places| places.len() > 1);
    let reason = |name: &str| SHARED.iter().any(|(known, _)| *known == name);
    let found = places.iter().filter(|(name, _)| shared(name) && !reason(name));
    none(
        "one name for several things; rename all but one, or give a reason",
        found.map(|(name, places)| format!("{name}: {}", places.join(", "))).collect(),
    );
    let stale = SHARED.iter().filter(|(name, _)| !shared(name));
    none("not shared any more", stale.map(|(name, _)| (*name).to_owned()).collect());
}

#[test]
fn declarations_are_recognized() {
    assert_eq!(declared("pub struct One;"), Some("One"));
    assert_eq!(declared("    pub(in crate::sandbox) enum Two<'a> {"), Some("Two"));
    assert_eq!(declared("pub(super) type Three = u8;"), Some("Three"));
    assert_eq!(declared("struct Private;"), None);
    assert_eq!(declared("pub fn structure()"), None);
}
