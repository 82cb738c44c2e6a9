//! Control groups, version 1: a hierarchy for each controller, or for several.

use std::path::PathBuf;
use std::sync::OnceLock;

use super::home::{self, Home};
use super::{CgroupError, Homes, Setting, Version, place};
use crate::job::Limits;

const CONTROLLERS: [&str; 3] = ["memory", "pids", "cpuacct"];

pub(super) fn start(mounts: &str, own: &str) -> Result<Homes, CgroupError> {
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
    Ok(Homes { version: Version::One, _aside: None, list, entered_quickly: OnceLock::new() })
}

/// In this order: the kernel keeps memory with swap no lower than memory alone.
pub(super) fn settings(limits: &Limits) -> Vec<Setting> {
    vec![
        Setting::new("memory", "memory.memsw.limit_in_bytes", "-1").optional(),
        Setting::new("memory", "memory.limit_in_bytes", limits.memory_bytes),
        Setting::new("memory", "memory.memsw.limit_in_bytes", limits.memory_bytes).optional(),
        Setting::new("pids", "pids.max", limits.processes),
    ]
}
