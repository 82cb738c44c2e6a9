//! What a job was given as files, so that only what it made or changed comes back.
//!
//! A digest each and not the content, which may be megabytes. Its key is random: a job that wants a changed file
//! taken for an unchanged one could only guess, and would only miss its own file.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};

/// Size and digest of each file, by path.
#[derive(Debug, Default)]
pub(in crate::sandbox) struct Brought {
    files: BTreeMap<String, (u64, u64)>,
    key: RandomState,
}

impl Brought {
    /// Of paths and contents.
    pub(in crate::sandbox) fn of<'a>(files: impl Iterator<Item = (&'a str, &'a [u8])>) -> Self {
        let key = RandomState::new();
        let entry =
            |(path, content): (&str, &[u8])| (path.to_owned(), (size(content), key.hash_one(content)));
        Self { files: files.map(entry).collect(), key }
    }

    /// Whether a file of this size can be the one that was given.
    pub(super) fn may_be(&self, path: &str, bytes: u64) -> bool {
        self.files.get(path).is_some_and(|(given, _)| *given == bytes)
    }

    /// Whether a file of this content is the one that was given.
    pub(super) fn is(&self, path: &str, content: &[u8]) -> bool {
        self.files.get(path) == Some(&(size(content), self.key.hash_one(content)))
    }
}

fn size(content: &[u8]) -> u64 {
    u64::try_from(content.len()).unwrap_or(u64::MAX)
}
