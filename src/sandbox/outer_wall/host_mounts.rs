//! The mounts of the host: what a root that is built from its directories has to know of them.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use super::rootfs::{Entry, Layer};

/// What cannot stand in a list of layers as it is.
const SPECIAL: [u8; 3] = *b":,\\";

/// The mounts of the host, as `/proc/self/mountinfo` lists them: the later of two lies on top.
#[derive(Debug)]
pub(super) struct Mounts(Vec<(PathBuf, u64)>);

impl Mounts {
    /// The largest directory around a path that is all of one mount: an overlay sees none that lie inside.
    pub(super) fn layer_for(&self, source: &Path) -> Option<Layer> {
        let whole = |directory: &Path| {
            let inside = |(point, _): &(PathBuf, u64)| point != directory && point.starts_with(directory);
            directory.parent().is_some() && !self.0.iter().any(inside)
        };
        let first = if source.is_dir() { source } else { source.parent()? };
        let directory = first.ancestors().take_while(|directory| whole(directory)).last()?;
        let plain = !directory.as_os_str().as_bytes().iter().any(|byte| SPECIAL.contains(byte));
        plain.then(|| Layer { directory: directory.to_owned(), kept: self.kept_around(directory) })
    }

    /// Flags that what lies at this path must keep.
    pub(super) fn kept_around(&self, source: &Path) -> u64 {
        let around = self.0.iter().rev().find(|(point, _)| source.starts_with(point));
        around.map_or(0, |(_, kept)| *kept)
    }

    pub(super) fn of_this_process() -> Self {
        Self::parse(&std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
    }

    fn parse(mountinfo: &str) -> Self {
        let mount = |line: &str| {
            let mut fields = line.split(' ').skip(4);
            let (point, options) = (fields.next()?, fields.next()?);
            // The one option that the walls do not set anyway; whoever is not root must keep it.
            let kept = if options.split(',').any(|option| option == "noexec") { libc::MS_NOEXEC } else { 0 };
            Some((unescaped(point), kept))
        };
        Self(mountinfo.lines().filter_map(mount).collect())
    }

    /// The mounts in the new root that an entry makes, with the flags that each must keep.
    pub(super) fn made_by(&self, path: &Path, entry: &Entry) -> Vec<(PathBuf, u64)> {
        let Some(source) = entry.source(path) else { return Vec::new() };
        let source = source.canonicalize().unwrap_or(source);
        let inside = self.0.iter().filter_map(|(point, kept)| {
            let inside = point.strip_prefix(&source).ok()?;
            (!inside.as_os_str().is_empty()).then(|| (path.join(inside), *kept))
        });
        std::iter::once((path.to_owned(), self.kept_around(&source))).chain(inside).collect()
    }
}

/// `mountinfo` writes spaces and the like as three octal digits behind a backslash.
fn unescaped(point: &str) -> PathBuf {
    let mut parts = point.split('\\');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let code = part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(code) => {
                bytes.push(code);
                bytes.extend_from_slice(&part.as_bytes()[3..]);
            }
            None => bytes.extend_from_slice(part.as_bytes()),
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
22 1 259:1 / / rw,relatime shared:1 - ext4 /dev/root rw
30 22 0:30 / /opt rw,nosuid,noexec - tmpfs none rw
31 30 0:31 / /opt/a\\040python rw,relatime - tmpfs none rw
32 31 0:32 / /opt/a\\040python/lib ro,noexec - tmpfs none ro
33 22 0:33 / /optional rw - tmpfs none rw
";

    #[test]
    fn every_mount_below_an_entry_is_found_with_what_it_must_keep() {
        let mounts = Mounts::parse(MOUNTS);
        let made = |path: &str, entry: &Entry| -> Vec<(String, u64)> {
            let made = mounts.made_by(Path::new(path), entry);
            made.into_iter().map(|(path, kept)| (path.display().to_string(), kept)).collect()
        };
        let noexec = libc::MS_NOEXEC;
        let inside = [("/opt/a python".to_owned(), 0), ("/opt/a python/lib".to_owned(), noexec)];
        assert_eq!(made("/opt/a python", &Entry::HostDirectory), inside);
        assert_eq!(made("/opt", &Entry::HostDirectory)[1..], inside);
        assert_eq!(made("/opt/b", &Entry::HostDirectory), [("/opt/b".to_owned(), noexec)]);
        let from = Entry::HostFileFrom("/opt/a python/lib/file".into());
        assert_eq!(made("/run/shim", &from), [("/run/shim".to_owned(), noexec)]);
        assert_eq!(made("/etc", &Entry::Directory), []);
    }
}
