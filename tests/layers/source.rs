//! A source file as far as the layers are concerned: its code without comments, literals and test modules, line by
//! line as it was.

use std::path::{Path, PathBuf};

pub(crate) struct Source {
    /// Relative to the repository.
    pub(crate) path: String,
    pub(crate) code: String,
}

pub(crate) fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// All Rust files below `folder`.
pub(crate) fn sources(folder: &str) -> Vec<Source> {
    fn walk(folder: &Path, into: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, into);
            } else if path.extension().is_some_and(|e| e == "rs") {
                into.push(path);
            }
        }
    }
    let mut paths = Vec::new();
    walk(&root().join(folder), &mut paths);
    assert!(!paths.is_empty(), "no sources in {folder}");
    let read = |path: PathBuf| {
        let name = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
        Source::new(&name, &std::fs::read_to_string(&path).unwrap())
    };
    paths.into_iter().map(read).collect()
}

impl Source {
    pub(crate) fn new(path: &str, text: &str) -> Self {
        Self { path: path.to_owned(), code: without_tests(&without_literals(text)) }
    }

    /// The module of the worker that this file belongs to.
    pub(crate) fn module(&self) -> &str {
        let below = self.path.trim_start_matches("src/");
        below.split('/').next().unwrap().trim_end_matches(".rs")
    }

    /// Where `word` stands in the code as a path or identifier of its own.
    pub(crate) fn line_with(&self, word: &str) -> Option<String> {
        let part = |c: char| c.is_alphanumeric() || c == '_';
        let alone = |line: &str| {
            line.match_indices(word)
                .any(|(at, _)| !line[..at].ends_with(part) && !line[at + word.len()..].starts_with(part))
        };
        let (n, _) = self.code.lines().enumerate().find(|(_, line)| alone(line))?;
        Some(format!("{}:{}: {word}", self.path, n + 1))
    }

    /// Every `crate::module` in the code, groups included, with its line.
    pub(crate) fn modules_named(&self) -> Vec<(usize, String)> {
        let mut named = Vec::new();
        for (at, _) in self.code.match_indices("crate::") {
            let line = 1 + self.code[..at].matches('\n').count();
            let rest = &self.code[at + "crate::".len()..];
            let Some(group) = rest.strip_prefix('{') else {
                named.push((line, first_word(rest)));
                continue;
            };
            // The first word of each member, at the depth of this group only.
            let (mut depth, mut member) = (1, true);
            for (n, c) in group.char_indices() {
                match c {
                    '{' => depth += 1,
                    '}' => depth -= 1,
                    ',' if depth == 1 => member = true,
                    c if member && !c.is_whitespace() => {
                        named.push((line + group[..n].matches('\n').count(), first_word(&group[n..])));
                        member = false;
                    }
                    _ => {}
                }
                if depth == 0 {
                    break;
                }
            }
        }
        // A macro's `$crate` or an item of lib.rs itself names no module.
        named.retain(|(_, word)| word.starts_with(|c: char| c.is_ascii_lowercase()));
        named
    }
}

fn first_word(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// Blanks comments and literals; lines stay where they are.
fn without_literals(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let at = |n: usize| chars.get(n).copied().unwrap_or('\0');
    let mut code = String::with_capacity(text.len());
    let mut i = 0;
    while i < chars.len() {
        let end = match at(i) {
            '/' if at(i + 1) == '/' => find(&chars, i, |n| at(n) == '\n'),
            '/' if at(i + 1) == '*' => find(&chars, i + 2, |n| at(n) == '*' && at(n + 1) == '/') + 2,
            '"' => string_end(&chars, i),
            'r' if matches!(at(i + 1), '"' | '#')
                && !code.ends_with(|c: char| c.is_alphanumeric() || c == '_') =>
            {
                let hashes = find(&chars, i + 1, |n| at(n) != '#') - i - 1;
                if at(i + 1 + hashes) == '"' {
                    let closed = |n: usize| at(n) == '"' && (1..=hashes).all(|h| at(n + h) == '#');
                    find(&chars, i + 2 + hashes, closed) + 1 + hashes
                } else {
                    i
                }
            }
            // A character, not a lifetime.
            '\'' if at(i + 1) == '\\' => find(&chars, i + 3, |n| at(n) == '\'') + 1,
            '\'' if at(i + 2) == '\'' => i + 3,
            _ => i,
        };
        if end == i {
            code.push(at(i));
            i += 1;
        } else {
            code.extend(chars[i..end.min(chars.len())].iter().map(|c| if *c == '\n' { '\n' } else { ' ' }));
            i = end;
        }
    }
    code
}

fn find(chars: &[char], from: usize, end: impl Fn(usize) -> bool) -> usize {
    (from..chars.len()).find(|n| end(*n)).unwrap_or(chars.len())
}

fn string_end(chars: &[char], start: usize) -> usize {
    let mut n = start + 1;
    while n < chars.len() && chars[n] != '"' {
        n += if chars[n] == '\\' { 2 } else { 1 };
    }
    n + 1
}

/// Blanks every item under `#[cfg(test)]`, up to its closing brace or semicolon.
fn without_tests(code: &str) -> String {
    const MARK: &str = "#[cfg(test)]";
    let mut rest = code;
    let mut kept = String::with_capacity(code.len());
    while let Some(start) = rest.find(MARK) {
        kept.push_str(&rest[..start]);
        let item = &rest[start + MARK.len()..];
        let mut depth = 0_i32;
        let end = item.char_indices().find(|(_, c)| {
            depth += match c {
                '{' => 1,
                '}' => -1,
                _ => 0,
            };
            depth == 0 && (*c == '}' || *c == ';')
        });
        let end = end.map_or(item.len(), |(n, _)| n + 1);
        kept.extend(item[..end].chars().filter(|c| *c == '\n'));
        rest = &item[end..];
    }
    kept + rest
}
