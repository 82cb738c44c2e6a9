//! Control groups, version 1: a hierarchy for each controller, or for several.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::home::{self, Home};
use super::{Aside, CPU, CgroupError, Homes, SHARE, Setting, Version, WORKERS_SHARE, place, quota};
use crate::job::Limits;

const CONTROLLERS: [&str; 3] = ["memory", "pids", "cpuacct"];

pub(super) fn start(mounts: &str, own: &str, count: usize) -> Result<Homes, CgroupError> {
    let mut bases: Vec<(PathBuf, Vec<&'static str>)> = Vec::new();
    for controller in CONTROLLERS {
        let base = place::version_1(mounts, own, controller)?;
        match bases.iter_mut().find(|(other, _)| *other == base) {
            Some((_, controllers)) => controllers.push(controller),
            None => bases.push((base, vec![controller])),
        }
    }
    let mut list = Vec::new();
    for (base, controllers) in bases {
        home::sweep(&base);
        list.push(Home::make(&base, controllers)?);
    }
    let aside = share_the_processor(mounts, own, count, &mut list)
        .inspect_err(|error| tracing::debug!(%error, "jobs have no control group for the processor"))
        .ok();
    Ok(Homes { version: Version::One, _aside: aside.map(Aside::One), list, entered_quickly: OnceLock::new() })
}

/// Each job has the share of one ordinary process, whatever it starts, and the worker itself that of ten.
fn share_the_processor(
    mounts: &str,
    own: &str,
    count: usize,
    list: &mut Vec<Home>,
) -> Result<Stepped, CgroupError> {
    let base = place::version_1(mounts, own, CPU)?;
    let at = match list.iter().position(|home| home.path().parent() == Some(base.as_path())) {
        Some(at) => at,
        None => {
            home::sweep(&base);
            list.push(Home::make(&base, Vec::new())?);
            list.len() - 1
        }
    };
    let home = list[at].path();
    set_share(home, SHARE.saturating_mul(count as u64))?;
    let group = home.join("worker");
    std::fs::create_dir(&group).map_err(CgroupError::file("make", &group))?;
    set_share(&group, WORKERS_SHARE)?;
    home::enter(&group)?;
    list[at].controllers.push(CPU);
    Ok(Stepped { base })
}

fn set_share(group: &Path, share: u64) -> Result<(), CgroupError> {
    let path = group.join("cpu.shares");
    // The kernel's range.
    home::write(&path, &share.clamp(2, 1 << 18).to_string()).map_err(CgroupError::file("write to", path))
}

/// The worker in a group of its own for the processor.
#[derive(Debug)]
pub(super) struct Stepped {
    base: PathBuf,
}

impl Drop for Stepped {
    fn drop(&mut self) {
        if let Err(error) = home::enter(&self.base) {
            tracing::debug!(%error, "the worker stays in its own cgroup");
        }
    }
}

/// In this order: the kernel keeps memory with swap no lower than memory alone.
pub(super) fn settings(limits: &Limits) -> Vec<Setting> {
    vec![
        Setting::new("memory", "memory.memsw.limit_in_bytes", "-1").optional(),
        Setting::new("memory", "memory.limit_in_bytes", limits.memory_bytes),
        Setting::new("memory", "memory.memsw.limit_in_bytes", limits.memory_bytes).optional(),
        Setting::new("pids", "pids.max", limits.processes),
        Setting::new(
            CPU,
            "cpu.cfs_quota_us",
            quota(limits).map_or("-1".to_owned(), |quota| quota.to_string()),
        )
        .optional(),
    ]
}
