//! Limits over all processes of a job together, kept by the kernel: one control group a seat.
//!
//! Version 2 is tried first, then version 1; where neither can be had, the caller is left with rlimits. The groups
//! are made once, below the worker's own, and handed from job to job with their seat: making one for every job
//! would cost more than the job. How a job gets in is its group's [`EnterBy`]; the first process of its pid namespace
//! stays outside, so that it outlives a kill for memory.

mod counters;
mod home;
mod place;
mod v1;
mod v2;

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use counters::{Counters, Reading};
use home::Home;

use crate::job::Limits;
use crate::sandbox::outer_wall::{cold, trials};
use crate::sys::{fd, launch, probe};

/// Why there are no control groups to be had.
#[derive(Debug, thiserror::Error)]
pub(super) enum CgroupError {
    #[error("{0} is not mounted")]
    NotMounted(&'static str),
    #[error("this process is in no cgroup of {0} that is in sight")]
    OutOfSight(&'static str),
    #[error("{path} does not offer {missing}")]
    NotOffered { path: PathBuf, missing: String },
    #[error("{action} {path}: {source}")]
    File { action: &'static str, path: PathBuf, source: io::Error },
    #[error("enter a new cgroup: {0}")]
    Enter(#[from] probe::Failed),
    #[error("version 2: {two}; version 1: {one}")]
    Neither { two: Box<Self>, one: Box<Self> },
}

impl CgroupError {
    fn file(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { action, path, source }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// The controller that shares the processor. Jobs run without it.
const CPU: &str = "cpu";
/// The share of a process that is in no group, on version 1.
const SHARE: u64 = 1024;
/// Processor time for a group is dealt out for each period of so many microseconds, the kernel's default.
const PERIOD_US: u64 = 100_000;

/// Microseconds of each [period](PERIOD_US) for a group; none without a cap.
fn quota(limits: &Limits) -> Option<u64> {
    limits.cpus.map(|cpus| u64::from(cpus.thousandths()) * (PERIOD_US / 1000))
}

/// So that the worker is heard whatever its jobs do: it keeps their time.
const WORKERS_SHARE: u64 = 10 * SHARE;

/// The worker in a group beside those of its jobs, until this is dropped.
#[derive(Debug)]
enum Aside {
    One(#[expect(dead_code, reason = "what counts is that it is dropped")] v1::Stepped),
    Two(#[expect(dead_code, reason = "what counts is that it is dropped")] v2::Aside),
}

/// Where the groups of one sandbox live; removed with the last of them.
#[derive(Debug)]
struct Homes {
    version: Version,
    /// Where the worker went to make room; it goes back before the homes are removed.
    _aside: Option<Aside>,
    /// One a hierarchy.
    list: Vec<Home>,
    /// Whether processes get in without walking through the doors; tried with the first group.
    entered_quickly: OnceLock<bool>,
}

impl Homes {
    fn of(&self, controller: &str) -> Result<&Path, CgroupError> {
        let home = self.list.iter().find(|home| home.controllers.contains(&controller));
        home.map(Home::path).ok_or_else(|| CgroupError::NotOffered {
            path: PathBuf::from("the hierarchy"),
            missing: controller.to_owned(),
        })
    }

    /// How a process gets into a group of these directories, without a trial but for the first of them.
    fn entry(&self, directories: &[PathBuf], doors: &[OwnedFd]) -> EnterBy {
        let quickly = |trial: &dyn Fn() -> bool| *self.entered_quickly.get_or_init(trial);
        let entry = match self.version {
            Version::One => launch::namespace("cgroup", cold::cgroup_namespace(doors).bytes())
                .and_then(fd::out_of_the_way)
                .map(|namespace| {
                    let join = trials::joining(&namespace, libc::CLONE_NEWCGROUP);
                    quickly(&|| launch::can(0, join.bytes())).then_some(EnterBy::ParentWrite(namespace))
                }),
            Version::Two => fs::File::open(&directories[0]).and_then(fd::out_of_the_way).map(|directory| {
                let born = || launch::born_into(directory.as_fd()).and_then(|child| child.wait());
                quickly(&|| born().is_ok()).then_some(EnterBy::CloneIntoCgroup(directory))
            }),
        };
        entry.ok().flatten().unwrap_or(EnterBy::SelfWrite)
    }

    /// Writes the limits of the group `name`.
    fn limit(&self, name: &str, limits: &Limits) -> Result<(), CgroupError> {
        let mut settings = match self.version {
            Version::One => v1::settings(limits),
            Version::Two => v2::settings(limits),
        };
        settings.retain(|setting| setting.controller != CPU || self.of(CPU).is_ok());
        for setting in settings {
            let path = self.of(setting.controller)?.join(name).join(setting.file);
            let written = home::write(&path, &setting.value);
            let written = if setting.optional { unless(io::ErrorKind::NotFound, written) } else { written };
            written.map_err(CgroupError::file("write to", path))?;
        }
        Ok(())
    }
}

/// Makes `count` groups, with `limits` set for a start.
///
/// To be called while the process has one thread: whether a group can be entered is tried in a child.
///
/// # Errors
/// What each version lacks here.
pub(super) fn start(count: usize, limits: &Limits) -> Result<Vec<Cgroup>, CgroupError> {
    let attempt = |homes: Result<Homes, CgroupError>| {
        let groups = make(homes?, count, limits)?;
        let doors: Vec<BorrowedFd<'_>> = groups.iter().take(1).flat_map(Cgroup::doors).collect();
        probe::entering(&doors)?;
        Ok::<_, CgroupError>(groups)
    };
    let (mounts, own) = (place::mounts()?, place::own()?);
    attempt(v2::start(&mounts, &own, count)).or_else(|two| {
        attempt(v1::start(&mounts, &own, count))
            .map_err(|one| CgroupError::Neither { two: Box::new(two), one: Box::new(one) })
    })
}

/// Files that count kills in the group that the worker is in.
pub(super) fn own_oom_counters() -> Vec<PathBuf> {
    let (Ok(mounts), Ok(own)) = (place::mounts(), place::own()) else { return Vec::new() };
    let two = place::version_2(&mounts, &own).map(|group| group.join("memory.events"));
    let one = place::version_1(&mounts, &own, "memory").map(|group| group.join("memory.oom_control"));
    two.into_iter().chain(one).collect()
}

fn make(homes: Homes, count: usize, limits: &Limits) -> Result<Vec<Cgroup>, CgroupError> {
    let homes = Arc::new(homes);
    (0..count).map(|number| Cgroup::make(&homes, format!("slot-{number}"), limits)).collect()
}

/// A huge page that did not fit leaves as much of a limit unused, and some more is on its way in other hands.
const UNUSED: u64 = 4 << 20;

/// One seat's control group, version 1 or 2: the same directory in every hierarchy.
#[derive(Debug)]
pub(super) struct Cgroup {
    homes: Arc<Homes>,
    name: String,
    /// `cgroup.procs`, open for writing.
    doors: Arc<[OwnedFd]>,
    entry: EnterBy,
    counters: Counters,
    /// Memory, processes and processors, as the kernel has them.
    set: Option<[u64; 3]>,
    /// The counters when the present job began.
    began: Reading,
}

/// How a new process gets in. Walking through the [doors](Cgroup::doors) can take the kernel ten milliseconds.
#[derive(Debug)]
pub(super) enum EnterBy {
    /// It is born inside, by the directory of version 2.
    CloneIntoCgroup(OwnedFd),
    /// It is [admitted](Cgroup::admit) while it does something else, and joins the namespace of the group, in which
    /// this is the root, before.
    ParentWrite(OwnedFd),
    /// Only through the doors, by itself.
    SelfWrite,
}

/// What the processes of a group have used together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Used {
    /// CPU time in user mode.
    pub(super) user: Duration,
    /// CPU time in the kernel.
    pub(super) system: Duration,
}

impl Cgroup {
    /// Waits for the kernel, and on version 1 for a child.
    fn make(homes: &Arc<Homes>, name: String, limits: &Limits) -> Result<Self, CgroupError> {
        let (mut doors, mut directories) = (Vec::new(), Vec::new());
        for home in &homes.list {
            let directory = home.path().join(&name);
            unless(io::ErrorKind::AlreadyExists, fs::create_dir(&directory))
                .map_err(CgroupError::file("make", &directory))?;
            let door = directory.join(home::PROCESSES);
            let opened = fs::OpenOptions::new().write(true).open(&door).and_then(fd::out_of_the_way);
            doors.push(opened.map_err(CgroupError::file("open", &door))?);
            directories.push(directory);
        }
        let entry = homes.entry(&directories, &doors);
        let counters = Counters::open(homes, &name)?;
        homes.limit(&name, limits)?;
        let (began, set) = (counters.read(), Some(Self::kept_by_the_kernel(limits)));
        Ok(Self { homes: Arc::clone(homes), name, doors: doors.into(), entry, counters, set, began })
    }

    /// Sets the limits of the next job, and counts anew from here.
    ///
    /// # Errors
    /// The kernel refused a limit.
    pub(super) async fn begin(&mut self, limits: &Limits) -> Result<(), CgroupError> {
        // Where the kernel cannot forget a peak, only a new group can. And somebody may have tidied up.
        if self.counters.is_stale() || self.counters.kills().is_none() {
            self.renew(limits).await?;
        } else if self.apply(limits).await.is_err() {
            // What an earlier job left, such as cached files, can stand in the way of a lower limit.
            self.renew(limits).await?;
        }
        self.count_anew();
        Ok(())
    }

    /// The same for a group whose process is in it already, and has waited for its job.
    ///
    /// # Errors
    /// The kernel refused a limit.
    pub(super) async fn go_on(&mut self, limits: &Limits) -> Result<(), CgroupError> {
        self.apply(limits).await?;
        self.count_anew();
        Ok(())
    }

    fn count_anew(&mut self) {
        self.counters.forget_peak();
        self.began = self.counters.read();
    }

    fn kept_by_the_kernel(limits: &Limits) -> [u64; 3] {
        let cpus = limits.cpus.map_or(u64::MAX, |cpus| cpus.thousandths().into());
        [limits.memory_bytes, limits.processes, cpus]
    }

    async fn apply(&mut self, limits: &Limits) -> Result<(), CgroupError> {
        let wanted = Some(Self::kept_by_the_kernel(limits));
        if self.set != wanted {
            self.set = None;
            // A lower limit can take as long as the kernel needs to free memory.
            self.blocking(*limits, |homes, name, limits| homes.limit(name, limits)).await?;
            self.set = wanted;
        }
        Ok(())
    }

    /// The same group with nothing of the past. Only an empty one can be renewed.
    async fn renew(&mut self, limits: &Limits) -> Result<(), CgroupError> {
        let renew = |homes: &Arc<Homes>, name: &str, limits: &Limits| {
            for home in &homes.list {
                let directory = home.path().join(name);
                unless(io::ErrorKind::NotFound, fs::remove_dir(&directory))
                    .map_err(CgroupError::file("remove", &directory))?;
            }
            Self::make(homes, name.to_owned(), limits)
        };
        *self = self.blocking(*limits, renew).await?;
        Ok(())
    }

    /// Does what waits for the kernel on a thread for such things: no other job waits meanwhile.
    async fn blocking<T: Send + 'static>(
        &self,
        limits: Limits,
        work: impl FnOnce(&Arc<Homes>, &str, &Limits) -> Result<T, CgroupError> + Send + 'static,
    ) -> Result<T, CgroupError> {
        let (homes, name) = (Arc::clone(&self.homes), self.name.clone());
        let done = tokio::task::spawn_blocking(move || work(&homes, &name, &limits)).await;
        done.map_err(|error| CgroupError::file("work on", &self.name)(io::Error::other(error)))?
    }

    /// Open `cgroup.procs` files: a process that writes `0` to each of them is in, and whatever it forks.
    pub(super) fn doors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.doors.iter().map(AsFd::as_fd)
    }

    /// How a new process gets in that needs no time for it.
    pub(super) fn entry(&self) -> &EnterBy {
        &self.entry
    }

    /// Lets a process in, beside whatever it is doing. That can take the kernel ten milliseconds.
    ///
    /// The number must not mean another process before this is done. Numbers are handed out in turn: one that has
    /// just become free comes back last.
    pub(super) async fn admit(&self, pid: i32) -> io::Result<()> {
        let doors = Arc::clone(&self.doors);
        let entered = tokio::task::spawn_blocking(move || {
            doors.iter().try_for_each(|door| match nix::unistd::write(door, pid.to_string().as_bytes()) {
                // It has ended meanwhile, which its watch sees, too.
                Ok(_) | Err(nix::errno::Errno::ESRCH) => Ok(()),
                Err(errno) => Err(errno.into()),
            })
        });
        entered.await.map_err(io::Error::other)?
    }

    /// CPU time of all processes since [`begin`](Self::begin), those that have ended too.
    pub(super) fn cpu_time(&self) -> Option<Duration> {
        Some(self.counters.cpu_time()?.saturating_sub(self.began.cpu))
    }

    /// The kernel has killed a process since [`begin`](Self::begin) because memory was over.
    pub(super) fn killed_for_memory(&self) -> bool {
        self.counters.kills().is_some_and(|kills| kills > self.began.kills)
    }

    /// The kernel has refused a process or a thread since [`begin`](Self::begin) because there were as many as may be.
    pub(super) fn ran_out_of_processes(&self) -> bool {
        self.counters.forks() > self.began.forks
    }

    /// It has had about as much memory as this at one time, as far as the kernel tells. One that is killed with less
    /// had to die for others.
    pub(super) fn came_near(&self, limit: u64) -> bool {
        self.counters.peak().is_none_or(|peak| peak.saturating_add(UNUSED) >= limit)
    }

    /// All that was used since [`begin`](Self::begin).
    pub(super) fn used(&self) -> Used {
        let ([user, system], [user_before, system_before]) = (self.counters.times(), self.began.times);
        Used { user: user.saturating_sub(user_before), system: system.saturating_sub(system_before) }
    }

    /// The most bytes that its processes had at one time since [`begin`](Self::begin), without page cache. `resident` is
    /// what is known of one of them.
    ///
    /// The kernel keeps the peak of all memory together, and tells of page cache only how much there is now, which may
    /// have been less at the peak.
    pub(super) fn memory_peak(&self, resident: u64) -> u64 {
        let Some(peak) = self.counters.peak() else { return resident };
        // What was there before is not the job's, such as look-ups that an earlier one made the kernel cache.
        self.counters.without_page_cache(peak).max(resident.min(peak)).saturating_sub(self.began.memory)
    }

    /// Bytes that its processes have now, without page cache.
    pub(super) fn memory(&self) -> u64 {
        self.counters.without_page_cache(self.counters.memory()).saturating_sub(self.began.memory)
    }

    /// The job has its share of the processor, however many processes and sessions it has.
    pub(super) fn shares_the_processor(&self) -> bool {
        self.homes.of(CPU).is_ok()
    }

    /// For a person.
    pub(super) fn describe(&self) -> String {
        let place = self.homes.list.first().and_then(|home| home.path().parent()).unwrap_or(Path::new(""));
        let cpu = if self.shares_the_processor() { "" } else { "; without cpu: limits.cpus caps nothing" };
        match self.homes.version {
            Version::One => format!("version 1, memory at {}{cpu}", place.display()),
            Version::Two => format!("version 2 at {}{cpu}", place.display()),
        }
    }
}

/// An error of this kind is none: what it says was wanted.
fn unless(kind: io::ErrorKind, done: io::Result<()>) -> io::Result<()> {
    done.or_else(|error| if error.kind() == kind { Ok(()) } else { Err(error) })
}

/// A limit, as a file takes it.
#[derive(Debug, PartialEq, Eq)]
struct Setting {
    controller: &'static str,
    file: &'static str,
    value: String,
    /// Not every kernel has it; then there is nothing to limit.
    optional: bool,
}

impl Setting {
    fn new(controller: &'static str, file: &'static str, value: impl ToString) -> Self {
        Self { controller, file, value: value.to_string(), optional: false }
    }

    fn optional(self) -> Self {
        Self { optional: true, ..self }
    }
}

#[cfg(test)]
mod tests;
