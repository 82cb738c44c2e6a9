//! Which paths a job asked to have returned: glob patterns, compiled.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};

/// Directories within directories that are searched; each holds a descriptor open meanwhile.
pub(super) const DEPTH_MAX: usize = 64;
/// Where python puts what it compiled.
const COMPILED: &str = "__pycache__";

/// What to return, compiled.
#[derive(Clone, Debug)]
pub(in crate::sandbox) struct Patterns {
    set: GlobSet,
    /// For each, the parts that write a dot at their beginning: only they match a part that has one.
    dotted: Vec<Dotted>,
    /// As they were written, without a leading `./`.
    written: Vec<String>,
    /// Separators that a matching path can have.
    reach: usize,
}

impl Patterns {
    /// None where nothing is asked for. On a thread that may block: a few KiB of stars take their time.
    pub(in crate::sandbox) async fn compile(
        patterns: Vec<String>,
    ) -> io::Result<Result<Option<Self>, globset::Error>> {
        if patterns.is_empty() {
            return Ok(Ok(None));
        }
        let compiled = tokio::task::spawn_blocking(move || Self::compile_now(&patterns).map(Some));
        compiled.await.map_err(io::Error::other)
    }

    pub(super) fn compile_now(patterns: &[String]) -> Result<Self, globset::Error> {
        let mut set = GlobSetBuilder::new();
        let (mut dotted, mut written) = (Vec::new(), Vec::new());
        let mut reach = 0;
        for pattern in patterns {
            // As in a path, a leading `./` means nothing.
            let plain = pattern.trim_start_matches("./");
            set.add(GlobBuilder::new(plain).literal_separator(true).build()?);
            dotted.push(Dotted::of(plain));
            written.push(plain.to_owned());
            let separators = plain.bytes().filter(|byte| *byte == b'/').count();
            reach = reach.max(if plain.contains("**") { DEPTH_MAX } else { separators });
        }
        Ok(Self { set: set.build()?, dotted, written, reach: reach.min(DEPTH_MAX) })
    }

    /// The places, in the order in which they were given, of the patterns that match a path.
    pub(super) fn matching(&self, path: &Path) -> Vec<usize> {
        let mut places = self.set.matches(path);
        let hidden: Vec<&OsStr> = path.iter().filter(|part| part.as_bytes().starts_with(b".")).collect();
        if !hidden.is_empty() {
            places.retain(|at| self.dotted[*at].write_all(&hidden));
        }
        // What python compiled is of no use to a requester, unless it says so.
        if path.iter().any(|part| part == COMPILED) {
            places.retain(|at| self.written[*at].contains(COMPILED));
        }
        places
    }

    /// Whether one of these names this path and no other.
    pub(super) fn name(&self, places: &[usize], path: &str) -> bool {
        places.iter().any(|at| self.written[*at] == path && !path.contains(['*', '?', '[', '{', '\\']))
    }

    /// As they were written.
    pub(super) fn written(&self) -> &[String] {
        &self.written
    }

    /// How deep a search for them goes.
    pub(super) fn reach(&self) -> usize {
        self.reach
    }
}

/// The parts of one pattern that write a dot at their beginning.
#[derive(Clone, Debug)]
enum Dotted {
    Parts(GlobSet),
    /// Alternatives go across separators: then any dot counts.
    Anywhere,
}

impl Dotted {
    fn of(pattern: &str) -> Self {
        let mut parts = GlobSetBuilder::new();
        for part in pattern.split('/') {
            if part.starts_with('.') || part.contains("{.") || part.contains(",.") {
                match GlobBuilder::new(part).literal_separator(true).build() {
                    Ok(part) => drop(parts.add(part)),
                    Err(_) => return Self::Anywhere,
                }
            }
        }
        parts.build().map_or(Self::Anywhere, Self::Parts)
    }

    /// Whether each of these parts of a path is one of them.
    fn write_all(&self, hidden: &[&OsStr]) -> bool {
        match self {
            Self::Parts(parts) => hidden.iter().all(|part| parts.is_match(Path::new(part))),
            Self::Anywhere => true,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;

    fn patterns(patterns: &[&str]) -> Patterns {
        Patterns::compile_now(&patterns.iter().map(|&pattern| pattern.to_owned()).collect::<Vec<_>>())
            .unwrap()
    }

    #[test]
    fn a_pattern_reaches_as_deep_as_it_has_separators() {
        for (pattern, reach) in
            [("*", 0), ("./a", 0), ("a/*/b", 2), ("{a/b,c}", 1), ("a**", 64), ("**/a", 64)]
        {
            assert_eq!(patterns(&[pattern]).reach, reach, "{pattern}");
        }
        assert_eq!(patterns(&["a", "b/c"]).reach, 1);
        assert_eq!(patterns(&[&"a/".repeat(100)]).reach, 64);
    }

    #[test]
    fn compiled_files_match_where_their_directory_is_written() {
        let path = Path::new("lib/__pycache__/a.pyc");
        for (pattern, matches) in [
            ("**", false),
            ("**/*.pyc", false),
            ("lib/*/a.pyc", false),
            ("**/__pycache__/*", true),
            ("lib/__pycache__/a.pyc", true),
        ] {
            assert_eq!(!patterns(&[pattern]).matching(path).is_empty(), matches, "{pattern}");
        }
        assert_eq!(patterns(&["*", "a*", "b"]).matching(Path::new("ab")), [0, 1]);
    }

    #[test]
    fn only_a_pattern_without_wildcards_names_a_path() {
        for (pattern, path, names) in [
            ("main.py", "main.py", true),
            ("./main.py", "main.py", true),
            ("*.py", "main.py", false),
            ("[m]ain.py", "main.py", false),
            ("*", "*", false),
        ] {
            let patterns = patterns(&[pattern]);
            let matching = patterns.matching(Path::new(path));
            assert_eq!((matching.len(), patterns.name(&matching, path)), (1, names), "{pattern}");
        }
    }
}
