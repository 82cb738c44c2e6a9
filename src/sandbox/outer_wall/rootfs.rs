//! The root that a job sees, as data: what lies at each path, and where that is on the host.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What lies at a path of the new root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::sandbox) enum Entry {
    /// A directory of ours, to hold others.
    Directory,
    /// A symbolic link, as on the host.
    Link(PathBuf),
    /// The host's directory, with all that is in it.
    HostDirectory,
    /// The host's file of the same path.
    HostFile,
    /// A file of the host's from another path.
    HostFileFrom(PathBuf),
    /// The process file system.
    Proc,
    /// A file that we write.
    File(String),
}

/// The tree, by path; a directory comes before what is in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::sandbox) struct Root {
    pub(in crate::sandbox) entries: BTreeMap<PathBuf, Entry>,
    /// What lies between directories of the host and what the root shows of them.
    pub(in crate::sandbox) layers: Vec<Layer>,
    /// Programs of ours that lie over those of the host.
    pub(in crate::sandbox) covers: Vec<(PathBuf, Vec<u8>)>,
}

/// A layer between a directory of the host and the jobs: a read-only overlay, whose files are other ones to the kernel
/// where it keeps locks, and where it flushes disks, while their pages are the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::sandbox) struct Layer {
    pub(in crate::sandbox) directory: PathBuf,
    /// Flags of the mount that it lies on, which hold on.
    pub(in crate::sandbox) kept: u64,
}

impl Entry {
    /// Where it is on the host.
    pub(in crate::sandbox) fn source(&self, path: &Path) -> Option<PathBuf> {
        match self {
            Self::HostDirectory | Self::HostFile => Some(path.to_owned()),
            Self::HostFileFrom(file) => Some(file.clone()),
            Self::Directory | Self::Link(_) | Self::File(_) | Self::Proc => None,
        }
    }
}

impl Root {
    /// A root of these directories alone.
    pub(in crate::sandbox) fn of_layers(layers: &[Layer]) -> Self {
        let entries = [(PathBuf::from("/dev"), Entry::Directory)].into();
        Self { layers: layers.to_vec(), entries, covers: Vec::new() }
    }

    /// Shows a file of the host's under another path.
    pub(in crate::sandbox) fn place(&mut self, path: &Path, file: &Path) {
        self.add(path, Entry::HostFileFrom(file.to_owned()));
    }

    pub(in crate::sandbox) fn has_proc(&self) -> bool {
        self.entries.contains_key(Path::new("/proc"))
    }

    /// For a machine where an own `/proc` cannot be mounted, nor anything that leads there.
    pub(in crate::sandbox) fn without_proc(&mut self) {
        let leads_there = |entry: &Entry| matches!(entry, Entry::Link(to) if to.starts_with("/proc"));
        self.entries.retain(|path, entry| path != Path::new("/proc") && !leads_there(entry));
    }

    pub(in crate::sandbox) fn add(&mut self, path: &Path, entry: Entry) {
        for above in path.ancestors().skip(1).filter(|above| *above != Path::new("/")) {
            self.entries.entry(above.to_owned()).or_insert(Entry::Directory);
        }
        if entry == Entry::HostDirectory {
            // What was shown piece by piece now comes with the whole.
            self.entries.retain(|known, _| known == path || !known.starts_with(path));
        }
        let known = self.entries.entry(path.to_owned()).or_insert_with(|| entry.clone());
        if *known == Entry::Directory {
            *known = entry;
        }
    }
}
