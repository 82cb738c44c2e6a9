//! A directory that holds one sandbox's control groups in one hierarchy, and goes when the sandbox does.
//!
//! Its owner keeps a lock on it. What a dead worker left behind is known by its lock being free: a pid would be
//! somebody else's after a while, or mean nothing in another pid namespace.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use super::CgroupError;

const PREFIX: &str = "sandpiper-";
/// That it happens once is unlikely.
const ATTEMPTS: usize = 3;

#[derive(Debug)]
pub(super) struct Home {
    pub(super) controllers: Vec<&'static str>,
    path: PathBuf,
    _lock: Flock<File>,
}

impl Home {
    /// Makes one below `base`.
    pub(super) fn make(base: &Path, controllers: Vec<&'static str>) -> Result<Self, CgroupError> {
        for _ in 0..ATTEMPTS {
            let name = format!("{PREFIX}{}-{:08x}", std::process::id(), rand::random::<u32>());
            let path = base.join(name);
            fs::create_dir(&path).map_err(CgroupError::file("make", &path))?;
            // Another worker that sweeps may have found it before it was locked, and removed it.
            match lock(&path) {
                Ok(lock) if path.exists() => return Ok(Self { controllers, path, _lock: lock }),
                _ => remove(&path),
            }
        }
        let lost = io::Error::other("others keep removing what is made there");
        Err(CgroupError::file("keep a cgroup in", base)(lost))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

fn lock(path: &Path) -> io::Result<Flock<File>> {
    Flock::lock(File::open(path)?, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno.into())
}

/// Removes what dead workers left below `base`.
pub(super) fn sweep(base: &Path) {
    let Ok(entries) = fs::read_dir(base) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        let ours = entry.file_name().to_string_lossy().starts_with(PREFIX) && path.is_dir();
        if ours && let Ok(_held) = lock(&path) {
            remove(&path);
        }
    }
}

/// A control group's directory and those below it. The files in it go with it; one that has processes stays.
fn remove(path: &Path) {
    let below = fs::read_dir(path).into_iter().flatten().flatten();
    below.map(|entry| entry.path()).filter(|path| path.is_dir()).for_each(|path| remove(&path));
    if let Err(error) = fs::remove_dir(path) {
        tracing::debug!(%error, path = %path.display(), "a cgroup stays");
    }
}

/// The processes of a group, one number a line; what writes `0` to it is in.
pub(super) const PROCESSES: &str = "cgroup.procs";

/// Moves this process into a group.
pub(super) fn enter(group: &Path) -> Result<(), CgroupError> {
    let path = group.join(PROCESSES);
    write(&path, "0").map_err(CgroupError::file("write to", path))
}

/// Writes to a file that the kernel made. Never makes one.
pub(super) fn write(path: &Path, value: &str) -> io::Result<()> {
    fs::OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

    use super::*;

    #[test]
    fn what_the_dead_left_is_swept_and_what_lives_is_not() {
        let base = tempfile::tempdir().unwrap();
        let stale = base.path().join("sandpiper-1-dead");
        fs::create_dir_all(stale.join("slot-0")).unwrap();
        let foreign = base.path().join("somebody");
        fs::create_dir(&foreign).unwrap();
        let home = Home::make(base.path(), vec!["memory"]).unwrap();
        let own = home.path().to_owned();
        fs::create_dir(own.join("slot-0")).unwrap();

        sweep(base.path());
        assert!(!stale.exists());
        assert!(own.join("slot-0").exists() && foreign.exists());

        drop(home);
        assert!(!own.exists() && foreign.exists());
    }
}
