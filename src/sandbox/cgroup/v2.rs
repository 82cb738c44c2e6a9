//! Control groups, version 2: one hierarchy, of which a part must have been delegated to the worker.
//!
//! A group that hands controllers on to others may hold no processes itself. So a worker that is alone in its
//! group steps aside into one below it, and back when the sandbox ends.

use std::io;
use std::path::{Path, PathBuf};

use super::home::{self, Home};
use super::{CgroupError, Homes, Setting, Version, place};
use crate::job::Limits;

/// CPU time is counted without a controller.
const CONTROLLERS: [&str; 2] = ["memory", "pids"];

const OFFERED: &str = "cgroup.controllers";
const HANDED_ON: &str = "cgroup.subtree_control";
const PROCESSES: &str = "cgroup.procs";

pub(super) fn start(mounts: &str, own: &str) -> Result<Homes, CgroupError> {
    start_at(&place::version_2(mounts, own)?, &CONTROLLERS)
}

pub(super) fn start_at(base: &Path, controllers: &[&'static str]) -> Result<Homes, CgroupError> {
    let missing = lacking(&place::read(base.join(OFFERED))?, controllers);
    if !missing.is_empty() {
        return Err(CgroupError::NotOffered { path: base.to_owned(), missing: missing.join(", ") });
    }
    home::sweep(base);
    let home = Home::make(base, controllers.to_vec())?;
    let mut aside = None;
    if !lacking(&place::read(base.join(HANDED_ON))?, controllers).is_empty() {
        match hand_on(base, '+', controllers) {
            Err(CgroupError::File { source, .. }) if source.kind() == io::ErrorKind::ResourceBusy => {
                let stepped = aside.insert(Aside::step(base, home.path(), controllers)?);
                hand_on(base, '+', controllers)?;
                stepped.handed_on = true;
            }
            other => other?,
        }
    }
    hand_on(home.path(), '+', controllers)?;
    Ok(Homes { version: Version::Two, _aside: aside, list: vec![home] })
}

fn lacking(list: &str, wanted: &[&'static str]) -> Vec<&'static str> {
    wanted.iter().copied().filter(|name| list.split_whitespace().all(|there| there != *name)).collect()
}

fn hand_on(group: &Path, sign: char, controllers: &[&str]) -> Result<(), CgroupError> {
    let path = group.join(HANDED_ON);
    let list: Vec<String> = controllers.iter().map(|name| format!("{sign}{name}")).collect();
    home::write(&path, &list.join(" ")).map_err(CgroupError::file("write to", path))
}

/// The worker, out of the way in a group below the one that it started in.
#[derive(Debug)]
pub(super) struct Aside {
    base: PathBuf,
    home: PathBuf,
    controllers: Vec<&'static str>,
    /// The base hands its controllers on only because of us.
    handed_on: bool,
}

impl Aside {
    fn step(base: &Path, home: &Path, controllers: &[&'static str]) -> Result<Self, CgroupError> {
        let group = home.join("worker");
        std::fs::create_dir(&group).map_err(CgroupError::file("make", &group))?;
        let path = group.join(PROCESSES);
        home::write(&path, "0").map_err(CgroupError::file("write to", path))?;
        let (base, home) = (base.to_owned(), home.to_owned());
        Ok(Self { base, home, controllers: controllers.to_vec(), handed_on: false })
    }
}

impl Drop for Aside {
    /// Back to the base, which must hand nothing on before it may hold a process again. Where others need what it
    /// hands on, the worker stays aside, and the next one's sweep removes what is left.
    fn drop(&mut self) {
        let below = std::fs::read_dir(&self.home).into_iter().flatten().flatten();
        // The jobs' groups are empty by now; the worker's own is not, and stays.
        below.filter(|entry| entry.path().is_dir()).for_each(|entry| drop(std::fs::remove_dir(entry.path())));
        let mut done = hand_on(&self.home, '-', &self.controllers);
        if self.handed_on {
            done = done.and_then(|()| hand_on(&self.base, '-', &self.controllers));
        }
        let path = self.base.join(PROCESSES);
        let done = done.and_then(|()| home::write(&path, "0").map_err(CgroupError::file("write to", path)));
        if let Err(error) = done {
            tracing::debug!(%error, "the worker stays in its own cgroup");
        }
    }
}

pub(super) fn settings(limits: &Limits) -> Vec<Setting> {
    vec![
        Setting::new("memory", "memory.max", limits.memory_bytes),
        Setting::new("memory", "memory.swap.max", "0").optional(),
        // One process that is killed for memory takes the whole job with it.
        Setting::new("memory", "memory.oom.group", "1").optional(),
        Setting::new("pids", "pids.max", limits.processes),
    ]
}
