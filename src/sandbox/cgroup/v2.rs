//! Control groups, version 2: one hierarchy, of which a part must have been delegated to the worker.
//!
//! A group that hands controllers on to others may hold no processes itself. So a worker that is alone in its
//! group steps aside into one below it, and back when the sandbox ends.

use std::ffi::CStr;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::home::{self, Home};
use super::{CPU, CgroupError, Homes, SHARE, Setting, Version, WORKERS_SHARE, place, quota};
use crate::job::Limits;
use crate::sys::xattr;

/// CPU time is counted without a controller.
const CONTROLLERS: [&str; 2] = ["memory", "pids"];

const OFFERED: &str = "cgroup.controllers";
const HANDED_ON: &str = "cgroup.subtree_control";
/// The group that a worker steps aside into.
const WORKER: &str = "worker";

pub(super) fn start(mounts: &str, own: &str, count: usize) -> Result<Homes, CgroupError> {
    let base = place::version_2(mounts, own)?;
    if is_kept_by_systemd(&base) {
        let missing = "what it has to others: systemd keeps it for itself without Delegate=yes".to_owned();
        return Err(CgroupError::NotOffered { path: base, missing });
    }
    let with_cpu = [&CONTROLLERS[..], &[CPU]].concat();
    // A kernel hands it on only where no process of real-time priority is in the way.
    let homes = start_at(&base, &with_cpu)
        .inspect_err(|error| tracing::debug!(%error, "jobs have no control group for the processor"))
        .or_else(|_| start_at(&base, &CONTROLLERS))?;
    if let Ok(home) = homes.of(CPU) {
        share_the_processor(home, count)?;
    }
    Ok(homes)
}

/// Root may write to any group. But systemd takes controllers back from a unit whose groups it has not handed over, and
/// ends the unit where the kernel has killed a job in it. It marks the others.
fn is_kept_by_systemd(group: &Path) -> bool {
    const MARKS: [&CStr; 2] = [c"trusted.delegate", c"user.delegate"];
    let is_unit = group.extension().is_some_and(|kind| kind == "service" || kind == "scope");
    is_unit && nix::unistd::geteuid().is_root() && !MARKS.iter().any(|mark| xattr::is_set(group, mark))
}

/// Each job has the share of one ordinary process, whatever it starts, and the worker itself, where it has stepped
/// aside, that of ten.
fn share_the_processor(home: &Path, count: usize) -> Result<(), CgroupError> {
    let set = |group: &Path, weight: u64| {
        let path = group.join("cpu.weight");
        // In percent of the default, within the kernel's range.
        let weight = (weight.saturating_mul(100) / SHARE).clamp(1, 10_000);
        home::write(&path, &weight.to_string()).map_err(CgroupError::file("write to", path))
    };
    set(home, SHARE.saturating_mul(count as u64))?;
    let worker = home.join(WORKER);
    if worker.exists() { set(&worker, WORKERS_SHARE) } else { Ok(()) }
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
    Ok(Homes {
        version: Version::Two,
        _aside: aside.map(super::Aside::Two),
        list: vec![home],
        entered_quickly: OnceLock::new(),
    })
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
        let group = home.join(WORKER);
        std::fs::create_dir(&group).map_err(CgroupError::file("make", &group))?;
        home::enter(&group)?;
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
        let done = done.and_then(|()| home::enter(&self.base));
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
        Setting::new(CPU, "cpu.max", quota(limits).map_or("max".to_owned(), |quota| quota.to_string()))
            .optional(),
    ]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]
    #![allow(clippy::print_stderr, reason = "a skip is said aloud")]

    use std::fs;
    use std::os::fd::AsFd;

    use super::*;
    use crate::sys::launch;

    #[test]
    fn what_is_lacking_is_told_by_whole_names() {
        assert_eq!(lacking("cpuset cpu io memory hugetlb pids\n", &CONTROLLERS), Vec::<&str>::new());
        assert_eq!(lacking("hugetlb\n", &CONTROLLERS), ["memory", "pids"]);
        assert_eq!(lacking("memory_recursive pids\n", &["memory"]), ["memory"]);
        assert_eq!(lacking("", &["memory"]), ["memory"]);
    }

    /// A delegated group with this process in it, of whatever controller this machine has in version 2. It lies
    /// directly below the root of the hierarchy, which hands controllers on though it has processes: the group that
    /// a test is started in could not.
    struct Delegated {
        parent: PathBuf,
        /// Where this process was before.
        before: PathBuf,
        base: PathBuf,
        controller: &'static str,
        /// The root hands it on only because of us.
        handed_on: bool,
    }

    impl Delegated {
        fn make() -> Result<Self, CgroupError> {
            let parent = place::version_2(&place::mounts()?, "0::/")?;
            let offered = place::read(parent.join(OFFERED))?;
            let known = ["memory", "pids", "hugetlb", "misc"];
            let controller = known.into_iter().find(|name| lacking(&offered, &[name]).is_empty());
            let Some(controller) = controller else {
                return Err(CgroupError::NotOffered { path: parent, missing: known.join(", ") });
            };
            let handed_on = !lacking(&place::read(parent.join(HANDED_ON))?, &[controller]).is_empty();
            hand_on(&parent, '+', &[controller])?;
            let base = parent.join(format!("test-sandpiper-{}", std::process::id()));
            fs::create_dir(&base).map_err(CgroupError::file("make", &base))?;
            let before = place::version_2(&place::mounts()?, &place::own()?)?;
            let delegated = Self { parent, before, base, controller, handed_on };
            delegated.enter(&delegated.base)?;
            Ok(delegated)
        }

        fn enter(&self, group: &Path) -> Result<(), CgroupError> {
            home::enter(group)
        }
    }

    impl Drop for Delegated {
        fn drop(&mut self) {
            drop(self.enter(&self.before));
            drop(fs::remove_dir(&self.base));
            if self.handed_on {
                // Others may use it as well by now.
                drop(hand_on(&self.parent, '-', &[self.controller]));
            }
        }
    }

    fn is_in(group: &Path) -> bool {
        let own = std::process::id().to_string();
        fs::read_to_string(group.join(home::PROCESSES)).unwrap().lines().any(|pid| pid == own)
    }

    #[test]
    fn a_worker_that_is_alone_steps_aside_and_back() {
        let delegated = match Delegated::make() {
            Ok(delegated) => delegated,
            Err(error) => {
                assert!(std::env::var("CI").as_deref() != Ok("true"), "SKIPPED: {error}");
                eprintln!("SKIPPED: {error}");
                return;
            }
        };
        let homes = start_at(&delegated.base, &[delegated.controller]).unwrap();
        let home = homes.list[0].path().to_owned();
        assert!(is_in(&home.join("worker")) && !is_in(&delegated.base));
        // What is made here now has the controller.
        let slot = home.join("slot-0");
        fs::create_dir(&slot).unwrap();
        let offered = fs::read_to_string(slot.join(OFFERED)).unwrap();
        assert_eq!(lacking(&offered, &[delegated.controller]), Vec::<&str>::new());
        // And a process can be born there.
        let directory = fs::File::open(&slot).unwrap();
        let child = launch::born_into(directory.as_fd()).unwrap();
        // Even where it has ended already: it was not waited for.
        let groups = fs::read_to_string(format!("/proc/{}/cgroup", child.pid().unwrap())).unwrap();
        assert!(groups.lines().any(|line| line.starts_with("0::") && line.ends_with("/slot-0")), "{groups}");
        child.wait().unwrap();

        drop(homes);
        assert!(is_in(&delegated.base) && !home.exists());
        let handed_on = fs::read_to_string(delegated.base.join(HANDED_ON)).unwrap();
        assert_eq!(handed_on.trim(), "");
    }
}
