//! Collects the files that a job asked to have returned, once everything of it is dead.
//!
//! Regular files only, found beneath the working directory without following a link. The names, the number, the
//! depth and the sizes are the job's choice, so each has a bound here, and what is left out is said.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};

use crate::job::{Artifact, Outcome, Status};
use crate::sys::place::{Folder, Kind, Place, part};

/// Files in one result.
const MOST: usize = 256;
/// Bytes of a path, as of an input file's.
const PATH_MAX: usize = 1_024;
/// Directories within directories that are searched; each holds a descriptor open meanwhile.
const DEPTH_MAX: usize = 64;
/// For search and reading together. All of it lies in memory, so this is far more than an honest job takes.
const TIME: Duration = Duration::from_secs(5);
/// Read between two looks at the clock.
const CHUNK: usize = 1 << 20;

/// What to return, compiled.
#[derive(Clone, Debug)]
pub(in crate::sandbox) struct Patterns {
    set: GlobSet,
    /// For each, the parts that write a dot at their beginning: only they match a part that has one.
    dotted: Vec<Dotted>,
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

    fn compile_now(patterns: &[String]) -> Result<Self, globset::Error> {
        let mut set = GlobSetBuilder::new();
        let mut dotted = Vec::new();
        let mut reach = 0;
        for pattern in patterns {
            // As in a path, a leading `./` means nothing.
            let plain = pattern.trim_start_matches("./");
            set.add(GlobBuilder::new(plain).literal_separator(true).build()?);
            dotted.push(Dotted::of(plain));
            let separators = plain.bytes().filter(|byte| *byte == b'/').count();
            reach = reach.max(if plain.contains("**") { DEPTH_MAX } else { separators });
        }
        Ok(Self { set: set.build()?, dotted, reach: reach.min(DEPTH_MAX) })
    }

    fn match_path(&self, path: &Path) -> bool {
        let hidden: Vec<&OsStr> = path.iter().filter(|part| part.as_bytes().starts_with(b".")).collect();
        if hidden.is_empty() {
            return self.set.is_match(path);
        }
        self.set.matches(path).into_iter().any(|at| self.dotted[at].write_all(&hidden))
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

/// Puts what the job asked for into its outcome, and lets go of its files: they are gone before its seat is free
/// again.
pub(in crate::sandbox) async fn take(
    place: Place,
    patterns: Option<Patterns>,
    room: u64,
    outcome: &mut Outcome,
) -> io::Result<()> {
    let wanted =
        outcome.started_at.is_some() && !matches!(outcome.status, Status::WorkerError | Status::Cancelled);
    let Some(patterns) = patterns.filter(|_| wanted) else {
        if !place.is_small() {
            tokio::task::spawn_blocking(move || drop(place)).await?;
        }
        return Ok(());
    };
    let collected = tokio::task::spawn_blocking(move || collect(&place, &patterns, room)).await?;
    outcome.artifacts = collected.artifacts;
    if let Some(note) = collected.left_out {
        outcome.error = Some(match outcome.error.take() {
            Some(error) => format!("{error}; {note}"),
            None => note,
        });
    }
    Ok(())
}

/// The files, and in one sentence what is missing of them.
#[derive(Debug, Default, PartialEq, Eq)]
struct Collected {
    /// In the order of their paths.
    artifacts: Vec<Artifact>,
    left_out: Option<String>,
}

/// Reads every matching file, `room` bytes in all, as the job's user. Blocks, so it is for a thread that may.
fn collect(place: &Place, patterns: &Patterns, room: u64) -> Collected {
    let until = Instant::now() + TIME;
    place.as_owner(|| collect_until(until, place, patterns, room)).unwrap_or_else(|error| Collected {
        artifacts: Vec::new(),
        left_out: Some(format!("the artifacts could not be read: become the job's user: {error}")),
    })
}

fn collect_until(until: Instant, place: &Place, patterns: &Patterns, room: u64) -> Collected {
    let mut search = Search {
        patterns,
        until,
        found: BTreeMap::new(),
        matching: 0,
        nameless: 0,
        too_deep: false,
        unread: None,
        over_time: false,
    };
    match place.read() {
        Ok(folder) => search.folder(folder, &mut Vec::new(), 0),
        Err(error) => search.unread = Some(error),
    }
    let artifacts = search.read(place, room);
    Collected { left_out: search.left_out(artifacts.len(), room), artifacts }
}

#[derive(Debug)]
struct Search<'a> {
    patterns: &'a Patterns,
    until: Instant,
    /// Matching files with their sizes: the first [`MOST`] paths, so that their number costs no memory.
    found: BTreeMap<String, u64>,
    /// All that match, under names that can be returned.
    matching: usize,
    /// Matching files with names that cannot be returned.
    nameless: usize,
    too_deep: bool,
    /// Why something could not be looked at.
    unread: Option<io::Error>,
    over_time: bool,
}

impl Search<'_> {
    /// Searches a directory whose path, `/` at its end, is in `path`, and which is that deep.
    fn folder(&mut self, mut folder: Folder, path: &mut Vec<u8>, depth: usize) {
        let names = match folder.names() {
            Ok(names) => names,
            Err(error) => return self.unread = Some(error),
        };
        let length = path.len();
        for name in names {
            if self.is_over_time() {
                return;
            }
            path.truncate(length);
            path.extend_from_slice(part(&name).as_bytes());
            match folder.look(&name) {
                Ok(Kind::File(size)) => self.file(path, size),
                Ok(Kind::Directory) if depth < self.patterns.reach => match folder.enter(&name) {
                    Ok(inner) => {
                        path.push(b'/');
                        self.folder(inner, path, depth + 1);
                    }
                    Err(error) => self.unread = Some(error),
                },
                Ok(Kind::Directory) => self.too_deep |= depth == DEPTH_MAX,
                Ok(Kind::Other) => {}
                Err(error) => self.unread = Some(error),
            }
        }
        path.truncate(length);
    }

    fn file(&mut self, path: &[u8], size: u64) {
        if !self.patterns.match_path(Path::new(OsStr::from_bytes(path))) {
            return;
        }
        match str::from_utf8(path) {
            Ok(path) if path.len() <= PATH_MAX => {
                self.matching += 1;
                self.found.insert(path.to_owned(), size);
                if self.found.len() > MOST {
                    self.found.pop_last();
                }
            }
            _ => self.nameless += 1,
        }
    }

    /// The files that fit into `room` together; the largest give way.
    fn read(&mut self, place: &Place, room: u64) -> Vec<Artifact> {
        let mut by_size: Vec<(u64, String)> =
            std::mem::take(&mut self.found).into_iter().map(|(path, size)| (size, path)).collect();
        by_size.sort_unstable();
        let mut left = room;
        let mut artifacts = Vec::new();
        for (size, path) in by_size {
            let Some(rest) = left.checked_sub(size) else { break };
            match self.content(place, &path, size) {
                Ok(Some(content)) => artifacts.push(Artifact { path, content }),
                Ok(None) => break,
                Err(error) => self.unread = Some(error),
            }
            left = rest;
        }
        artifacts.sort_unstable_by(|a, b| a.path.cmp(&b.path));
        artifacts
    }

    /// A file's content, at most as much as was seen of it; none where the time is over.
    fn content(&mut self, place: &Place, path: &str, size: u64) -> io::Result<Option<Vec<u8>>> {
        let mut file = place.open(path)?.take(size);
        let mut content = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
        loop {
            if self.is_over_time() {
                return Ok(None);
            }
            if file.by_ref().take(CHUNK as u64).read_to_end(&mut content)? == 0 {
                return Ok(Some(content));
            }
        }
    }

    fn is_over_time(&mut self) -> bool {
        self.over_time = self.over_time || Instant::now() > self.until;
        self.over_time
    }

    fn left_out(&self, returned: usize, room: u64) -> Option<String> {
        let mut notes = Vec::new();
        let matching = self.matching;
        if returned < matching {
            notes.push(format!(
                "{} of {matching} artifacts were left out, as a result has room for {MOST} files and {room} bytes",
                matching - returned
            ));
        }
        if self.nameless > 0 {
            notes.push(format!(
                "{} artifacts have names that are not UTF-8 or longer than {PATH_MAX} bytes and were left out",
                self.nameless
            ));
        }
        if self.too_deep {
            notes.push(format!("directories more than {DEPTH_MAX} deep were not searched for artifacts"));
        }
        if let Some(error) = &self.unread {
            notes.push(format!("some files could not be read: {error}"));
        }
        if self.over_time {
            notes.push(format!("the search for artifacts was ended after {} ms", TIME.as_millis()));
        }
        (!notes.is_empty()).then(|| notes.join("; "))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use std::fs::File;

    use super::*;

    fn place(files: &[(&str, usize)]) -> (tempfile::TempDir, Place) {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let place =
            Place::new(File::open(dir.path()).unwrap().into(), nix::unistd::geteuid().as_raw()).unwrap();
        for (path, size) in files {
            io::Write::write_all(&mut place.create(path).unwrap(), &vec![b'x'; *size]).unwrap();
        }
        (dir, place)
    }

    fn patterns(patterns: &[&str]) -> Patterns {
        Patterns::compile_now(&patterns.iter().map(|&pattern| pattern.to_owned()).collect::<Vec<_>>())
            .unwrap()
    }

    fn paths(collected: &Collected) -> Vec<&str> {
        collected.artifacts.iter().map(|artifact| artifact.path.as_str()).collect()
    }

    #[test]
    fn the_largest_give_way_until_the_rest_fits() {
        let (_dir, place) = place(&[("a", 50), ("b/c", 100), ("d", 49), ("e", 0)]);
        let all = patterns(&["**"]);
        let collected = collect(&place, &all, 99);
        assert_eq!(paths(&collected), ["a", "d", "e"]);
        assert!(collected.left_out.unwrap().starts_with("1 of 4 artifacts were left out"));
        assert_eq!(collect(&place, &all, 199).left_out, None);
        assert_eq!(paths(&collect(&place, &all, 0)), ["e"]);
    }

    #[test]
    fn a_wildcard_matches_no_leading_dot() {
        let all = [(".env", 1), ("a", 1), ("b/.c", 1), (".git/config", 1), (".git/.x", 1), ("b/d.e", 1)];
        let (_dir, place) = place(&all);
        for (pattern, found) in [
            ("**", &["a", "b/d.e"][..]),
            ("*", &["a"]),
            ("?env", &[]),
            ("[.]env", &[]),
            (".*", &[".env"]),
            ("**/.*", &[".env", ".git/.x", "b/.c"]),
            ("{.env,a}", &[".env", "a"]),
            (".git/*", &[".git/config"]),
            ("*/.c", &["b/.c"]),
            ("{b/.c,a}", &["a", "b/.c"]),
            ("b/*", &["b/d.e"]),
        ] {
            let collected = collect(&place, &patterns(&[pattern]), 100);
            assert_eq!(paths(&collected), found, "{pattern}");
        }
    }

    #[test]
    fn a_search_past_its_time_ends_and_says_so() {
        let (_dir, place) = place(&[("a", 1), ("b/c", 1)]);
        let past = Instant::now().checked_sub(Duration::from_millis(1)).unwrap();
        let collected = collect_until(past, &place, &patterns(&["**"]), 100);
        assert_eq!(paths(&collected), [""; 0]);
        assert!(collected.left_out.unwrap().contains("was ended after 5000 ms"));
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
    fn only_a_directory_in_memory_of_the_jobs_own_is_taken() {
        let (dir, _place) = place(&[("file", 1)]);
        let own = nix::unistd::geteuid().as_raw();
        let open = |path: &Path| File::open(path).unwrap().into();
        assert!(Place::new(open(dir.path()), own + 1).is_err());
        assert!(Place::new(open(&dir.path().join("file")), own).is_err());
        assert!(Place::new(open(Path::new(env!("CARGO_MANIFEST_DIR"))), own).is_err());
    }
}
