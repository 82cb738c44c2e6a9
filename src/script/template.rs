//! The template `prescript.py`: sections that are kept or left out, and the placeholders in its last statement.

use std::fmt::Write as _;

/// What runs in every python process.
pub(super) const TEMPLATE: &str = include_str!("../../prescript.py");

/// The section with the call that has every placeholder in it. It comes last.
const START: &str = "start";
/// The function that is called there.
const MAIN: &str = "main";
/// The sections that a rendering may leave out. There must be each of them, for a rendering without it to mean
/// anything.
const OPTIONAL: [&str; 3] = ["zygote", "fast_exit", "huge_pages"];

/// Why the template cannot be rendered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// There is no such section.
    #[error("the template has no section {0:?}")]
    Missing(String),
    /// A section has no end, or an end no beginning, or it is none that is known.
    #[error("line {line} of the template opens or closes the section {name:?} in the wrong place")]
    Unbalanced {
        /// Counted from 1.
        line: usize,
        /// As it is written there.
        name: String,
    },
    /// The last section is something else than the call with its values.
    #[error("the template does not end in a call of {MAIN} with its placeholders, but in {0:?}")]
    NoCall(String),
}

/// The template with some of its sections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Template {
    /// All of it but the call.
    pub(super) head: String,
    /// The arguments of the call, in parentheses, with the placeholders in them.
    arguments: String,
}

/// What the placeholders stand for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Values<'a> {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) network: bool,
    pub(super) preload: &'a str,
    pub(super) code: &'a str,
}

impl Template {
    /// Leaves out every optional section but those in `kept`. The lines that mark sections are gone.
    pub(super) fn cut(template: &str, kept: &[&str]) -> Result<Self, TemplateError> {
        let (mut head, mut call) = (String::with_capacity(template.len()), String::new());
        let mut open: Vec<&str> = Vec::new();
        let mut seen: Vec<&str> = Vec::new();
        for (at, line) in template.lines().enumerate() {
            let unbalanced = |name: &str| TemplateError::Unbalanced { line: at + 1, name: name.to_owned() };
            match mark(line) {
                Some(Mark::Open(name)) if name == START || OPTIONAL.contains(&name) => {
                    if open.contains(&name) || seen.contains(&START) {
                        return Err(unbalanced(name));
                    }
                    open.push(name);
                    seen.push(name);
                }
                Some(Mark::Close(name)) if open.last() == Some(&name) => drop(open.pop()),
                Some(Mark::Open(name) | Mark::Close(name)) => return Err(unbalanced(name)),
                None if open == [START] => call.extend([line, "\n"]),
                None if seen.contains(&START) && !line.is_empty() => {
                    return Err(TemplateError::NoCall(line.to_owned()));
                }
                None if open.iter().all(|name| kept.contains(name)) => head.extend([line, "\n"]),
                None => {}
            }
        }
        if let Some(name) = open.pop() {
            return Err(TemplateError::Unbalanced { line: template.lines().count(), name: name.to_owned() });
        }
        if let Some(missing) = OPTIONAL.iter().chain([&START]).find(|name| !seen.contains(name)) {
            return Err(TemplateError::Missing((*missing).to_owned()));
        }
        let arguments = call.trim_end().strip_prefix(MAIN).filter(|call| holds_all(call));
        let arguments = arguments.ok_or_else(|| TemplateError::NoCall(call.clone()))?.to_owned();
        Ok(Self { head, arguments })
    }

    /// An expression for the head's code object.
    pub(super) fn head_expression(&self) -> String {
        let mut source = String::with_capacity(2 * self.head.len());
        for byte in self.head.bytes() {
            // Writing to a string cannot fail.
            let _ = write!(source, "{byte:02x}");
        }
        format!("compile(bytes.fromhex('{source}'), '<sandpiper>', 'exec')")
    }

    /// The script for a process: one statement, which leaves no name behind. The head, an expression for its code
    /// object, runs with globals of its own, and so does the call.
    pub(super) fn launcher(&self, head: &str, values: &Values<'_>) -> String {
        let [before, after] = [
            format!("(lambda space: exec({head}, space) or space['{MAIN}']"),
            ")({'__builtins__': __builtins__, '__name__': 'sandpiper'})\n".to_owned(),
        ];
        [before, self.call(values), after].concat()
    }

    fn call(&self, values: &Values<'_>) -> String {
        let (uid, gid) = (values.uid.to_string(), values.gid.to_string());
        let network = if values.network { "1" } else { "0" };
        fill(&self.arguments, |name| match name {
            "uid" => Some(&uid),
            "gid" => Some(&gid),
            "enable_network" => Some(network),
            "preload" => Some(values.preload),
            "code" => Some(values.code),
            _ => None,
        })
    }
}

/// Each placeholder once, inside parentheses.
fn holds_all(call: &str) -> bool {
    let names = ["uid", "gid", "enable_network", "preload", "code"];
    let once = |name: &&str| call.matches(&format!("{{{{{name}}}}}")).count() == 1;
    call.starts_with('(') && call.ends_with(')') && names.iter().all(once)
}

/// A line that begins or ends a section.
enum Mark<'a> {
    Open(&'a str),
    Close(&'a str),
}

fn mark(line: &str) -> Option<Mark<'_>> {
    let name = line.trim_start().strip_prefix("# {{")?.strip_suffix("}}")?;
    match (name.strip_prefix('#'), name.strip_prefix('/')) {
        (Some(name), _) => Some(Mark::Open(name)),
        (_, Some(name)) => Some(Mark::Close(name)),
        _ => None,
    }
}

/// Replaces each `{{name}}` that has a value, in one pass: what a value holds is never looked at again.
fn fill<'a>(template: &'a str, value: impl Fn(&str) -> Option<&'a str>) -> String {
    let mut filled = String::with_capacity(template.len());
    let mut rest = template;
    while let Some((before, after)) = rest.split_once("{{") {
        filled.push_str(before);
        let placeholder = after.split_once("}}").and_then(|(name, after)| Some((value(name)?, after)));
        match placeholder {
            Some((value, after)) => {
                filled.push_str(value);
                rest = after;
            }
            None => {
                filled.push_str("{{");
                rest = after;
            }
        }
    }
    filled.push_str(rest);
    filled
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;

    const CALL: &str = "# {{#start}}\nmain({{uid}}, {{gid}}, {{enable_network}}, b\"{{preload}}\", b\"{{code}}\")\n# {{/start}}\n";

    fn cut(text: &str, kept: &[&str]) -> Result<String, TemplateError> {
        Template::cut(&[text, CALL].concat(), kept).map(|template| template.head)
    }

    #[test]
    fn sections_are_kept_whole_or_left_out_whole() {
        let text = "a\n# {{#zygote}}\nb\n    # {{#fast_exit}}\nc\n    # {{/fast_exit}}\n# {{/zygote}}\nd\n\
                    # {{#zygote}}\n# {{#huge_pages}}\n# {{/huge_pages}}\ne\n# {{/zygote}}\n";
        for (kept, head) in [
            (&[][..], "a\nd\n"),
            (&["zygote"], "a\nb\nd\ne\n"),
            (&["zygote", "fast_exit"], "a\nb\nc\nd\ne\n"),
            (&["fast_exit"], "a\nd\n"),
        ] {
            assert_eq!(cut(text, kept).unwrap(), head, "{kept:?}");
        }
    }

    #[test]
    fn a_missing_or_broken_section_is_an_error() {
        let sound = "# {{#zygote}}\n# {{#fast_exit}}\n# {{/fast_exit}}\n# {{/zygote}}\n# {{#huge_pages}}\n# {{/huge_pages}}\n";
        cut(sound, &[]).unwrap();
        assert_eq!(
            cut("# {{#zygote}}\n# {{/zygote}}\n", &[]),
            Err(TemplateError::Missing("fast_exit".into()))
        );
        assert_eq!(Template::cut(sound, &[]), Err(TemplateError::Missing("start".into())));
        for (at, broken) in [
            (1, sound.replacen("zygote", "zygot", 1)),
            (3, sound.replacen("/fast_exit", "/zygote", 1)),
            (4, sound.replacen("/zygote", "/fast_exit", 1)),
            (1, format!("# {{{{/zygote}}}}\n{sound}")),
        ] {
            let unbalanced =
                matches!(cut(&broken, &[]), Err(TemplateError::Unbalanced { line, .. }) if line == at);
            assert!(unbalanced, "{broken}: {:?}", cut(&broken, &[]));
        }
        for call in [CALL.replace("main", "mine"), CALL.replace("{{gid}}", "0"), format!("{CALL}more()\n")] {
            let template = [sound, &call].concat();
            assert!(matches!(Template::cut(&template, &[]), Err(TemplateError::NoCall(_))), "{call}");
        }
    }

    #[test]
    fn every_placeholder_of_the_template_is_filled() {
        for name in ["uid", "gid", "enable_network", "preload", "code"] {
            assert_eq!(TEMPLATE.matches(&format!("{{{{{name}}}}}")).count(), 1, "{name}");
        }
        let template = Template::cut(TEMPLATE, &OPTIONAL).unwrap();
        let values = Values { uid: 7, gid: 8, network: true, preload: "cA==", code: "Yw==" };
        let script = template.launcher("HEAD", &values);
        assert!(script.contains("space['main'](7, 8, 1, b\"cA==\", b\"Yw==\")"), "{script}");
        assert!(!script.contains("{{") && !template.head.contains("{{"));
        assert_eq!(script.lines().count(), 1);
    }

    #[test]
    fn a_placeholder_inside_a_value_stays_text() {
        let value = |name: &str| match name {
            "a" => Some("{{b}}"),
            "b" => Some("never"),
            _ => None,
        };
        assert_eq!(fill("<{{a}}>{{c}}{{", value), "<{{b}}>{{c}}{{");
    }
}
