//! Turns what serde says of a bad value into one sentence for the person who wrote it.
//!
//! serde names its errors only as text, so the text is taken apart here, in this one place; the sentences in
//! `tests/fixtures/contract/refused.txt` hold its wording. Used for jobs and for configuration files alike.

/// The longest part of someone else's input that is repeated in a message, in characters.
const QUOTED_MAX: usize = 64;

/// Quotes a name from outside: in backticks, control characters escaped, cut to a readable length.
pub(crate) fn quote(text: &str) -> String {
    let mut quoted: String = text.chars().take(QUOTED_MAX).flat_map(char::escape_debug).collect();
    if text.chars().nth(QUOTED_MAX).is_some() {
        quoted.push('…');
    }
    format!("`{quoted}`")
}

/// `limits` and `cpu_ms` make `limits.cpu_ms`.
pub(crate) fn join(path: &str, name: &str) -> String {
    if path.is_empty() || path == "." { name.to_owned() } else { format!("{path}.{name}") }
}

/// `limits` of `limits.cpu_ms` and of `limits`, for `cpu_ms`.
fn parent<'a>(path: &'a str, name: &str) -> &'a str {
    match path.strip_suffix(name) {
        Some("") => "",
        Some(parent) => parent.strip_suffix('.').unwrap_or(path),
        None => path,
    }
}

/// Explains a serde error on the value at `path`.
///
/// `elsewhere` holds full paths that may have been meant where a field is unknown at its level.
pub(crate) fn explain(path: &str, message: &str, elsewhere: &[&str]) -> String {
    if let Some(rest) = message.strip_prefix("unknown field `")
        && let Some(end) = rest.rfind("`, expected ")
    {
        let (name, known) = (&rest[..end], &rest[end + 1..]);
        // The path of an unknown field may or may not already end in its name.
        let parent = parent(path, name);
        let known = known.split('`').skip(1).step_by(2).map(|field| join(parent, field));
        return unknown(&join(parent, name), known.chain(elsewhere.iter().map(|field| (*field).to_owned())));
    }
    if let Some(name) = message.strip_prefix("missing field `").and_then(|rest| rest.strip_suffix('`')) {
        return format!("{} is missing and must be given", quote(&join(path, name)));
    }
    if let Some(name) = message.strip_prefix("duplicate field `").and_then(|rest| rest.strip_suffix('`')) {
        return format!("{} is given twice; give it once", quote(&join(parent(path, name), name)));
    }
    let subject = if path.is_empty() || path == "." { "the document".to_owned() } else { quote(path) };
    let mismatch = message.strip_prefix("invalid type: ").or_else(|| message.strip_prefix("invalid value: "));
    match mismatch.and_then(|rest| rest.rfind(", expected ").map(|at| rest.split_at(at))) {
        Some((got, want)) => {
            format!("{subject} must be {}, not {}", wanted(&want[", expected ".len()..]), found(got))
        }
        None => format!("{subject} is not valid: {message}"),
    }
}

/// Says that `path` is unknown, and what was probably meant.
pub(crate) fn unknown(path: &str, known: impl Iterator<Item = String>) -> String {
    let mut sentence = format!("unknown field {}", quote(path));
    if let Some((nearest, likeness)) = nearest(path, known) {
        let remedy = if likeness > 0.75 { "did you mean" } else { "the nearest known name is" };
        let end = if likeness > 0.75 { "?" } else { "" };
        sentence.push_str(&format!("; {remedy} `{nearest}`{end}"));
    }
    sentence
}

/// The known name that is most like `path`, judged by its last part, and how like it is, from 0 to 1.
pub(crate) fn nearest(path: &str, known: impl Iterator<Item = String>) -> Option<(String, f64)> {
    // Cut, because the comparison takes the product of both lengths.
    let name: String = last(path).chars().take(QUOTED_MAX).collect::<String>().to_lowercase();
    known
        .map(|candidate| {
            let score = likeness(&name, last(&candidate));
            (candidate, score)
        })
        // The first of equals, so that a field of the same level wins.
        .reduce(|best, next| if next.1 > best.1 { next } else { best })
}

fn last(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

fn likeness(name: &str, candidate: &str) -> f64 {
    let edits = strsim::normalized_damerau_levenshtein(name, candidate);
    // `network` for `enable_network`, `memory` for `memory_bytes`.
    let part = name.len() >= 3 && (candidate.contains(name) || name.contains(candidate));
    if part { edits.max(0.8 + edits / 10.0) } else { edits.max(strsim::jaro_winkler(name, candidate) - 0.1) }
}

/// serde's names for what it wanted, in the words of a JSON author.
fn wanted(want: &str) -> &str {
    match want {
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number, 0 or more",
        "i32" | "i64" => "a whole number",
        "f64" => "a number",
        "a string" | "a borrowed string" => "text",
        "a boolean" => "true or false",
        "a sequence" => "a list",
        "a map" => "an object",
        other if other.starts_with("struct ") => "an object",
        other => other,
    }
}

/// serde's words for what it found, without repeating long input.
fn found(got: &str) -> String {
    let kind = got.split([' ', '`']).next().unwrap_or(got);
    let inner =
        || got.split('`').nth(1).map_or_else(|| got.to_owned(), |inner| inner.chars().take(32).collect());
    match kind {
        "string" | "character" => "text".into(),
        "integer" | "floating" | "boolean" => inner(),
        "null" | "unit" => "null".into(),
        "sequence" => "a list".into(),
        "map" => "an object".into(),
        _ => got.chars().take(QUOTED_MAX).collect(),
    }
}
