//! A publisher's JSON as text: where it is broken, in words that its author can use, and what can be had of it
//! all the same.
//!
//! serde_json says what it missed and where, never in which field; and it stops at the first fault, behind which the
//! job's id may stand. Nothing here follows brackets with the stack.

use std::ops::Range;

use super::explain::quote;

/// Objects and lists within each other; serde_json reads as many.
const DEPTH_MAX: usize = 127;
/// Bytes of a word that is repeated in a message.
const WORD_MAX: usize = 32;

/// The first place at which a text is no JSON that everybody can read.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Fault {
    /// The field, as `limits.cpu_ms` or `args[1]`; empty outside of any.
    path: String,
    /// Bytes before it.
    at: usize,
    flaw: Flaw,
}

#[derive(Debug, PartialEq, Eq)]
enum Flaw {
    /// A word that JSON does not have, such as `NaN`.
    Word(String),
    /// One half of a surrogate pair, as it is written. RFC 8259 has it in its grammar, and no meaning for it.
    HalfPair(String),
    /// Nested deeper than [`DEPTH_MAX`].
    Depth,
    /// Something else within a value.
    Within,
    /// Something else behind a value.
    After,
}

impl Fault {
    /// Finds it, if there is one.
    pub(super) fn find(text: &str) -> Option<Self> {
        let mut walk = Walk { text: text.as_bytes(), at: 0, levels: Vec::new() };
        walk.value().err().map(|(at, flaw)| Self { path: walk.path(), at, flaw })
    }

    /// The sentence for it; `reason` is what serde_json says of a fault without words of its own.
    pub(super) fn sentence(&self, text: &str, reason: &str) -> String {
        let field = if self.path.is_empty() { "the body".to_owned() } else { quote(&self.path) };
        let place = place(text, self.at);
        match &self.flaw {
            Flaw::Word(_) if self.path.is_empty() => format!("the body is not valid JSON: {reason}"),
            Flaw::Word(word) => format!(
                "the body is not valid JSON: {field} is {}{place}, which JSON does not have; write null, true, \
                 false, a number or text",
                quote(word)
            ),
            Flaw::HalfPair(escape) => format!(
                "{field} holds `{escape}`{place}, half of a surrogate pair, which is no character; cut text \
                 between characters only, and send bytes as base64"
            ),
            Flaw::Depth => format!("{field} is nested more than {DEPTH_MAX} levels deep"),
            Flaw::Within if self.path.is_empty() => format!("the body is not valid JSON: {reason}"),
            Flaw::Within => format!("the body is not valid JSON: {reason}, in {field}"),
            Flaw::After => format!("the body is not valid JSON: {reason}, after {field}"),
        }
    }
}

/// ` at line 1 column 2`, counted in characters from 1.
fn place(text: &str, at: usize) -> String {
    let before = text.get(..at).unwrap_or(text);
    let line = before.bytes().filter(|byte| *byte == b'\n').count() + 1;
    let column = before.rsplit('\n').next().map_or(0, |line| line.chars().count()) + 1;
    format!(" at line {line} column {column}")
}

#[derive(Debug)]
enum Level {
    /// The name as it is written, quotes included; empty while it is read. Whether its value has ended.
    Object(Range<usize>, bool),
    /// The number of the entry. Whether it has ended.
    List(usize, bool),
}

struct Walk<'a> {
    text: &'a [u8],
    at: usize,
    levels: Vec<Level>,
}

type Step = Result<(), (usize, Flaw)>;

impl Walk<'_> {
    /// One value, with all that is in it.
    fn value(&mut self) -> Step {
        loop {
            self.space();
            match self.peek() {
                Some(b'{') => {
                    self.open(Level::Object(0..0, false))?;
                    if !self.closes(b'}') {
                        self.name()?;
                        continue;
                    }
                }
                Some(b'[') => {
                    self.open(Level::List(0, false))?;
                    if !self.closes(b']') {
                        continue;
                    }
                }
                Some(b'"') => self.string()?,
                _ => self.word()?,
            }
            if self.ended()? {
                return Ok(());
            }
        }
    }

    /// A value has ended. True where the whole has, else another value is next.
    fn ended(&mut self) -> Result<bool, (usize, Flaw)> {
        loop {
            self.space();
            let next = self.peek();
            let at = self.at;
            match (self.levels.last_mut(), next) {
                (None, _) => return Ok(true),
                (Some(Level::Object(..)), Some(b',')) => {
                    self.at += 1;
                    self.name()?;
                    return Ok(false);
                }
                (Some(Level::List(entry, _)), Some(b',')) => {
                    *entry += 1;
                    self.at += 1;
                    return Ok(false);
                }
                (Some(Level::Object(..)), Some(b'}')) | (Some(Level::List(..)), Some(b']')) => {
                    self.levels.pop();
                    self.at += 1;
                }
                (Some(Level::Object(_, ended) | Level::List(_, ended)), _) => {
                    *ended = true;
                    return Err((at, Flaw::After));
                }
            }
        }
    }

    fn open(&mut self, level: Level) -> Step {
        if self.levels.len() == DEPTH_MAX {
            return Err((self.at, Flaw::Depth));
        }
        self.levels.push(level);
        self.at += 1;
        Ok(())
    }

    /// Whether what was just opened ends at once.
    fn closes(&mut self, end: u8) -> bool {
        self.space();
        let closes = self.peek() == Some(end);
        if closes {
            self.levels.pop();
            self.at += 1;
        }
        closes
    }

    /// The name of an object's next value, and the colon behind it.
    fn name(&mut self) -> Step {
        self.space();
        let begin = self.at;
        self.set_name(0..0);
        if self.peek() != Some(b'"') {
            return Err((self.at, Flaw::Within));
        }
        self.string()?;
        self.set_name(begin..self.at);
        self.space();
        if self.peek() != Some(b':') {
            return Err((self.at, Flaw::Within));
        }
        self.at += 1;
        Ok(())
    }

    fn set_name(&mut self, written: Range<usize>) {
        if let Some(Level::Object(name, _)) = self.levels.last_mut() {
            *name = written;
        }
    }

    fn string(&mut self) -> Step {
        self.at += 1;
        loop {
            match self.peek() {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(());
                }
                Some(b'\\') => self.escape()?,
                Some(0x20..) => self.at += 1,
                _ => return Err((self.at, Flaw::Within)),
            }
        }
    }

    fn escape(&mut self) -> Step {
        let begin = self.at;
        self.at += match self.text.get(begin + 1) {
            Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => 2,
            Some(b'u') => match self.code_unit(begin) {
                Some(0xd800..=0xdbff) if matches!(self.code_unit(begin + 6), Some(0xdc00..=0xdfff)) => 12,
                Some(0xd800..=0xdfff) => {
                    let written = String::from_utf8_lossy(&self.text[begin..begin + 6]).into_owned();
                    return Err((begin, Flaw::HalfPair(written)));
                }
                Some(_) => 6,
                None => return Err((begin, Flaw::Within)),
            },
            _ => return Err((begin, Flaw::Within)),
        };
        Ok(())
    }

    /// What `\uXXXX` at this place says, if that is there.
    fn code_unit(&self, at: usize) -> Option<u32> {
        code_unit(self.text.get(at..at + 6)?)
    }

    /// A number or one of the three words, or what stands in their place.
    fn word(&mut self) -> Step {
        let rest = self.text.get(self.at..).unwrap_or_default();
        let length =
            rest.iter().take_while(|byte| byte.is_ascii_alphanumeric() || b"+-._".contains(byte)).count();
        let word = &rest[..length];
        // Numbers may be longer than any that serde_json keeps; their form is all that counts here.
        if matches!(word, b"true" | b"false" | b"null") || is_number(word) {
            self.at += length;
            return Ok(());
        }
        if word.is_empty() {
            return Err((self.at, Flaw::Within));
        }
        let shown = String::from_utf8_lossy(&word[..length.min(WORD_MAX)]).into_owned();
        Err((self.at, Flaw::Word(shown)))
    }

    fn space(&mut self) {
        self.at = after_space(self.text, self.at);
    }

    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    /// Where it stands, as `files[0].path`.
    fn path(&self) -> String {
        let mut path = String::new();
        for level in &self.levels {
            match level {
                Level::Object(name, _) if name.is_empty() => {}
                Level::Object(name, _) => {
                    let written = &self.text[name.clone()];
                    let name: String = serde_json::from_slice(written).unwrap_or_default();
                    path = super::explain::join(&path, &name);
                }
                Level::List(entry, _) => path.push_str(&format!("[{entry}]")),
            }
        }
        path
    }
}

/// What `\uXXXX` says.
pub(super) fn code_unit(escape: &[u8]) -> Option<u32> {
    let digits = escape.strip_prefix(b"\\u")?;
    let all = digits.len() == 4 && digits.iter().all(u8::is_ascii_hexdigit);
    let digits = str::from_utf8(digits).ok().filter(|_| all)?;
    u32::from_str_radix(digits, 16).ok()
}

/// RFC 8259's `number`.
fn is_number(word: &[u8]) -> bool {
    let digits = |text: &[u8]| text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let rest = word.strip_prefix(b"-").unwrap_or(word);
    let whole = digits(rest);
    if whole == 0 || (whole > 1 && rest[0] == b'0') {
        return false;
    }
    let mut rest = &rest[whole..];
    if let Some(fraction) = rest.strip_prefix(b".") {
        let count = digits(fraction);
        if count == 0 {
            return false;
        }
        rest = &fraction[count..];
    }
    if let Some(exponent) = rest.strip_prefix(b"e").or_else(|| rest.strip_prefix(b"E")) {
        let exponent =
            exponent.strip_prefix(b"+").or_else(|| exponent.strip_prefix(b"-")).unwrap_or(exponent);
        return !exponent.is_empty() && digits(exponent) == exponent.len();
    }
    rest.is_empty()
}

fn after_space(text: &[u8], at: usize) -> usize {
    let rest = text.get(at..).unwrap_or_default();
    at + rest.iter().take_while(|byte| matches!(byte, b' ' | b'\t' | b'\n' | b'\r')).count()
}

/// The names and values of a body that should be an object, as the places where they stand, whatever is wrong
/// inside of them: as far as names, values and what separates them can be told apart.
#[derive(Debug)]
pub(crate) struct Members<'a> {
    body: &'a [u8],
    at: usize,
}

impl<'a> Members<'a> {
    pub(crate) fn of(body: &'a [u8]) -> Self {
        let mark = if body.starts_with(b"\xef\xbb\xbf") { 3 } else { 0 };
        let open = after_space(body, mark);
        let at = if body.get(open) == Some(&b'{') { open + 1 } else { body.len() };
        Self { body, at }
    }

    /// Where the string ends that begins at `at`.
    fn string_end(&self, at: usize) -> Option<usize> {
        let mut at = at + 1;
        loop {
            match self.body.get(at)? {
                b'"' => return Some(at + 1),
                b'\\' => at += 2,
                _ => at += 1,
            }
        }
    }

    /// Where the value ends that begins at `at`: at a comma or bracket of the object's own, or with the body.
    fn value_end(&self, mut at: usize) -> usize {
        let mut depth = 0_usize;
        while let Some(byte) = self.body.get(at) {
            match byte {
                b'"' => match self.string_end(at) {
                    Some(end) => {
                        at = end;
                        continue;
                    }
                    None => return self.body.len(),
                },
                b',' | b'}' | b']' if depth == 0 => break,
                b'[' | b'{' => depth += 1,
                b']' | b'}' => depth -= 1,
                _ => {}
            }
            at += 1;
        }
        at
    }
}

impl Iterator for Members<'_> {
    /// The name, quotes included, and the value.
    type Item = (Range<usize>, Range<usize>);

    fn next(&mut self) -> Option<Self::Item> {
        let name = after_space(self.body, self.at);
        if self.body.get(name) != Some(&b'"') {
            return None;
        }
        let name_end = self.string_end(name)?;
        let colon = after_space(self.body, name_end);
        if self.body.get(colon) != Some(&b':') {
            return None;
        }
        let value = after_space(self.body, colon + 1);
        let value_end = self.value_end(value);
        self.at = if self.body.get(value_end) == Some(&b',') { value_end + 1 } else { self.body.len() };
        Some((name..name_end, value..value_end))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::de::IgnoredAny;

    use super::*;

    fn pieces() -> impl Strategy<Value = String> {
        let pieces = vec![
            "{",
            "}",
            "[",
            "]",
            ",",
            ":",
            " ",
            "\n",
            "\"a\"",
            "\"a\":",
            "\"",
            "\\",
            "\\u00e9",
            "\\ud83d",
            "\\ude00",
            "é",
            "1",
            "-",
            "0",
            ".5",
            "e3",
            "true",
            "nul",
            "null",
            "NaN",
            "\t",
            "{\"k\":1}",
            "[[]]",
        ];
        prop::collection::vec(prop::sample::select(pieces), 0..12).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// It finds a fault where serde_json does, and else only what that passes over unread.
        #[test]
        fn it_finds_what_serde_json_finds(text in pieces()) {
            let read = serde_json::from_str::<IgnoredAny>(&text);
            let fault = Fault::find(&text);
            let half = matches!(&fault, Some(Fault { flaw: Flaw::HalfPair(_), .. }));
            // What comes behind the value is not looked at.
            let trailing = read.as_ref().is_err_and(|error| error.to_string().starts_with("trailing characters"));
            let agree = read.is_err() == fault.is_some();
            prop_assert!(half || trailing || agree, "{text:?}: {read:?}, {fault:?}");
        }

        /// Members are never outside of the text, and end.
        #[test]
        fn members_are_parts_of_any_text(text in pieces()) {
            for (name, value) in Members::of(text.as_bytes()) {
                prop_assert!(name.end <= value.start && value.start <= value.end && value.end <= text.len());
            }
        }
    }
}
