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

use super::brought::Brought;
use super::patterns::{DEPTH_MAX, Patterns};
use crate::job::{Artifact, Outcome, Status};
use crate::sys::job_dir::{Folder, JobDir, Kind, part};

/// Files in one result.
const MOST: usize = 256;
/// Bytes of a path, as of an input file's.
const PATH_MAX: usize = 1_024;
/// For search and reading together. All of it lies in memory, so this is far more than an honest job takes.
const TIME: Duration = Duration::from_secs(5);
/// Read between two looks at the clock.
const CHUNK: usize = 1 << 20;

/// Patterns without a match that are named in a result.
const UNMATCHED_NAMED: usize = 5;

/// What a job wants to have returned of its files.
#[derive(Debug)]
pub(in crate::sandbox) struct Wanted {
    pub(in crate::sandbox) patterns: Patterns,
    /// What was in its directory before it ran.
    pub(in crate::sandbox) brought: Brought,
}

/// Puts what the job asked for into its outcome, and lets go of its files: they are gone before its seat is free
/// again.
pub(in crate::sandbox) async fn take(
    job_dir: JobDir,
    wanted: Option<Wanted>,
    room: u64,
    outcome: &mut Outcome,
) -> io::Result<()> {
    let returned =
        outcome.started_at.is_some() && !matches!(outcome.status, Status::WorkerError | Status::Cancelled);
    let Some(wanted) = wanted.filter(|_| returned) else {
        if !job_dir.is_small() {
            tokio::task::spawn_blocking(move || drop(job_dir)).await?;
        }
        return Ok(());
    };
    let collected = tokio::task::spawn_blocking(move || collect(&job_dir, &wanted, room)).await?;
    outcome.artifacts = collected.artifacts;
    // A job that failed has not come as far as its files, maybe, and has something else to say.
    let unmatched = collected.unmatched.filter(|_| outcome.status == Status::Succeeded);
    for note in collected.left_out.into_iter().chain(unmatched) {
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
    /// And which patterns matched nothing.
    unmatched: Option<String>,
}

/// Reads every matching file, `room` bytes in all, as the job's user. Blocks, so it is for a thread that may.
fn collect(job_dir: &JobDir, wanted: &Wanted, room: u64) -> Collected {
    let until = Instant::now() + TIME;
    job_dir.as_owner(|| collect_until(until, job_dir, wanted, room)).unwrap_or_else(|error| Collected {
        left_out: Some(format!("the artifacts could not be read: become the job's user: {error}")),
        ..Collected::default()
    })
}

fn collect_until(until: Instant, job_dir: &JobDir, wanted: &Wanted, room: u64) -> Collected {
    let mut search = Search {
        job_dir,
        wanted,
        matched: vec![false; wanted.patterns.written().len()],
        until,
        found: BTreeMap::new(),
        matching: 0,
        nameless: 0,
        too_deep: false,
        unread: None,
        over_time: false,
    };
    match job_dir.read() {
        Ok(folder) => search.folder(folder, &mut Vec::new(), 0),
        Err(error) => search.unread = Some(error),
    }
    let artifacts = search.read(room);
    Collected { left_out: search.left_out(artifacts.len(), room), unmatched: search.unmatched(), artifacts }
}

#[derive(Debug)]
struct Search<'a> {
    job_dir: &'a JobDir,
    wanted: &'a Wanted,
    /// Whether anything is returned, or would be, for each of the patterns.
    matched: Vec<bool>,
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
                Ok(Kind::Directory) if depth < self.wanted.patterns.reach() => match folder.enter(&name) {
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
        let matching = self.wanted.patterns.matching(Path::new(OsStr::from_bytes(path)));
        if matching.is_empty() || self.is_as_it_came(path, size, &matching) {
            return;
        }
        matching.into_iter().for_each(|at| self.matched[at] = true);
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

    /// Whether it is the program or an input file, no pattern names it, and the job has not changed it.
    fn is_as_it_came(&mut self, path: &[u8], size: u64, matching: &[usize]) -> bool {
        let Ok(path) = str::from_utf8(path) else { return false };
        if !self.wanted.brought.may_be(path, size) || self.wanted.patterns.name(matching, path) {
            return false;
        }
        match self.content(path, size) {
            Ok(Some(content)) => self.wanted.brought.is(path, &content),
            Ok(None) => true,
            Err(error) => {
                self.unread = Some(error);
                true
            }
        }
    }

    /// The files that fit into `room` together; the largest give way.
    fn read(&mut self, room: u64) -> Vec<Artifact> {
        let mut by_size: Vec<(u64, String)> =
            std::mem::take(&mut self.found).into_iter().map(|(path, size)| (size, path)).collect();
        by_size.sort_unstable();
        let mut left = room;
        let mut artifacts = Vec::new();
        for (size, path) in by_size {
            let Some(rest) = left.checked_sub(size) else { break };
            match self.content(&path, size) {
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
    fn content(&mut self, path: &str, size: u64) -> io::Result<Option<Vec<u8>>> {
        let mut file = self.job_dir.open(path)?.take(size);
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

    /// Nothing where not all of the directory was seen.
    fn unmatched(&self) -> Option<String> {
        if self.too_deep || self.unread.is_some() || self.over_time {
            return None;
        }
        let patterns = self.wanted.patterns.written().iter().zip(&self.matched);
        let unmatched: Vec<String> =
            patterns.filter(|(_, matched)| !**matched).map(|(pattern, _)| format!("{pattern:?}")).collect();
        let named = unmatched.get(..UNMATCHED_NAMED).unwrap_or(&unmatched).join(", ");
        let more = match unmatched.len().saturating_sub(UNMATCHED_NAMED) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        (!unmatched.is_empty()).then(|| {
            format!(
                "no new or changed file in the working directory, /work, matches {named}{more} of `artifacts`"
            )
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use std::fs::File;

    use super::*;

    fn job_dir(files: &[(&str, usize)]) -> (tempfile::TempDir, JobDir) {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let job_dir =
            JobDir::new(File::open(dir.path()).unwrap().into(), nix::unistd::geteuid().as_raw()).unwrap();
        for (path, size) in files {
            io::Write::write_all(&mut job_dir.create(path).unwrap(), &vec![b'x'; *size]).unwrap();
        }
        (dir, job_dir)
    }

    fn wanted(patterns: &[&str]) -> Wanted {
        let patterns = patterns.iter().map(|&pattern| pattern.to_owned()).collect::<Vec<_>>();
        Wanted { patterns: Patterns::compile_now(&patterns).unwrap(), brought: Brought::default() }
    }

    fn paths(collected: &Collected) -> Vec<&str> {
        collected.artifacts.iter().map(|artifact| artifact.path.as_str()).collect()
    }

    #[test]
    fn the_largest_give_way_until_the_rest_fits() {
        let (_dir, job_dir) = job_dir(&[("a", 50), ("b/c", 100), ("d", 49), ("e", 0)]);
        let all = wanted(&["**"]);
        let collected = collect(&job_dir, &all, 99);
        assert_eq!(paths(&collected), ["a", "d", "e"]);
        assert!(collected.left_out.unwrap().starts_with("1 of 4 artifacts were left out"));
        assert_eq!(collect(&job_dir, &all, 199).left_out, None);
        assert_eq!(paths(&collect(&job_dir, &all, 0)), ["e"]);
    }

    #[test]
    fn a_wildcard_matches_no_leading_dot() {
        let all = [(".env", 1), ("a", 1), ("b/.c", 1), (".git/config", 1), (".git/.x", 1), ("b/d.e", 1)];
        let (_dir, job_dir) = job_dir(&all);
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
            let collected = collect(&job_dir, &wanted(&[pattern]), 100);
            assert_eq!(paths(&collected), found, "{pattern}");
        }
    }

    #[test]
    fn what_a_job_was_given_comes_back_if_it_changed_it_or_if_it_is_named() {
        let (_dir, job_dir) = job_dir(&[("main.py", 3), ("in/a", 3), ("in/b", 3), ("in/c", 4), ("in/d", 3)]);
        let given = |path: &str, content: &[u8]| (path.to_owned(), content.to_vec());
        let given =
            [given("main.py", b"xxx"), given("in/a", b"xxx"), given("in/b", b"xxy"), given("in/c", b"xxx")];
        for (patterns, found, unmatched) in [
            (&["**"][..], &["in/b", "in/c", "in/d"][..], ""),
            (&["main.py", "./in/a"], &["in/a", "main.py"], ""),
            (&["*.py", "in/[b]"], &["in/b"], "\"*.py\""),
            (
                &["1", "2", "3", "4", "5", "6", "in/*"],
                &["in/b", "in/c", "in/d"],
                "\"1\", \"2\", \"3\", \"4\", \"5\" and 1 more",
            ),
        ] {
            let mut wanted = wanted(patterns);
            wanted.brought =
                Brought::of(given.iter().map(|(path, content)| (path.as_str(), content.as_slice())));
            let collected = collect(&job_dir, &wanted, 100);
            assert_eq!(paths(&collected), found, "{patterns:?}");
            let says = collected.unmatched.unwrap_or_default();
            assert!(
                says.contains(unmatched) && says.is_empty() == unmatched.is_empty(),
                "{patterns:?}: {says}"
            );
        }
    }

    #[test]
    fn a_search_past_its_time_ends_and_says_so() {
        let (_dir, job_dir) = job_dir(&[("a", 1), ("b/c", 1)]);
        let past = Instant::now().checked_sub(Duration::from_millis(1)).unwrap();
        let collected = collect_until(past, &job_dir, &wanted(&["**"]), 100);
        assert_eq!(paths(&collected), [""; 0]);
        assert!(collected.left_out.unwrap().contains("was ended after 5000 ms"));
    }

    #[test]
    fn only_a_directory_in_memory_of_the_jobs_own_is_taken() {
        let (dir, _place) = job_dir(&[("file", 1)]);
        let own = nix::unistd::geteuid().as_raw();
        let open = |path: &Path| File::open(path).unwrap().into();
        assert!(JobDir::new(open(dir.path()), own + 1).is_err());
        assert!(JobDir::new(open(&dir.path().join("file")), own).is_err());
        assert!(JobDir::new(open(Path::new(env!("CARGO_MANIFEST_DIR"))), own).is_err());
    }
}
