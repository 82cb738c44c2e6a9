//! Whether a cgroup of our own can be made: version 2, else 1, tried by making one and removing it.

use std::fs;
use std::path::{Path, PathBuf};

use super::Layer;

pub(super) const LAYER: Layer = Layer::welcome(
    "cgroups",
    "memory, CPU time and processes are limited by rlimits, one process at a time instead of the job as a whole",
    "version 2: delegate a subtree with memory, pids and cpu (systemd: Delegate=yes; a container: its own cgroup \
     namespace, writable); version 1: run as root with the memory, pids and cpuacct hierarchies mounted writable",
);

/// The controllers that limits need, by version.
const V2: [&str; 3] = ["memory", "pids", "cpu"];
const V1: [&str; 3] = ["memory", "pids", "cpuacct"];

pub(super) fn examine() -> Result<String, String> {
    let mounts = read("/proc/self/mountinfo")?;
    let ours = read("/proc/self/cgroup")?;
    let v2 = version_2(&mounts, &ours);
    if v2.is_ok() {
        return v2;
    }
    let v1 = version_1(&mounts, &ours);
    match (v2, v1) {
        (_, Ok(found)) => Ok(found),
        (Err(v2), Err(v1)) => Err(format!("version 2: {v2}; version 1: {v1}")),
        (Ok(found), _) => Ok(found),
    }
}

fn version_2(mounts: &str, ours: &str) -> Result<String, String> {
    let mount = mounted(mounts, |kind, _| kind == "cgroup2").ok_or("not mounted")?;
    let path = ours.lines().find_map(|line| line.strip_prefix("0::")).ok_or("this process is in none")?;
    let group = below(&mount, path);
    let offered = read(group.join("cgroup.controllers"))?;
    let missing: Vec<&str> =
        V2.into_iter().filter(|name| !offered.split_whitespace().any(|o| o == *name)).collect();
    if !missing.is_empty() {
        return Err(format!("{} lacks the controllers {}", group.display(), missing.join(", ")));
    }
    make_one(&group)?;
    Ok(format!("version 2 at {}", group.display()))
}

fn version_1(mounts: &str, ours: &str) -> Result<String, String> {
    for controller in V1 {
        let mount =
            mounted(mounts, |kind, options| kind == "cgroup" && options.split(',').any(|o| o == controller))
                .ok_or_else(|| format!("{controller} is not mounted"))?;
        let path = ours
            .lines()
            .find_map(|line| {
                let mut fields = line.splitn(3, ':');
                let controllers = fields.nth(1)?;
                controllers.split(',').any(|name| name == controller).then(|| fields.next())?
            })
            .ok_or_else(|| format!("this process is in no cgroup of {controller}"))?;
        make_one(&below(&mount, path))?;
    }
    Ok("version 1".into())
}

/// Where the first file system that `wanted` accepts (type, super options) is mounted, and its root.
fn mounted(mounts: &str, wanted: impl Fn(&str, &str) -> bool) -> Option<(String, PathBuf)> {
    mounts.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(3);
        let (root, point) = (mount.next()?, mount.next()?);
        let mut filesystem = filesystem.split(' ');
        let (kind, options) = (filesystem.next()?, filesystem.nth(1)?);
        wanted(kind, options).then(|| (root.to_owned(), PathBuf::from(point)))
    })
}

/// A cgroup's directory. In a container the mount may show only a part of the hierarchy: its root says which.
fn below((root, point): &(String, PathBuf), path: &str) -> PathBuf {
    let inside = Path::new(path).strip_prefix(root).unwrap_or_else(|_| Path::new(""));
    if inside.as_os_str().is_empty() {
        point.clone()
    } else {
        point.join(inside.strip_prefix("/").unwrap_or(inside))
    }
}

fn make_one(parent: &Path) -> Result<(), String> {
    let probe = parent.join(format!("sandpiper-doctor-{}", std::process::id()));
    let told = |error: std::io::Error| format!("cannot make a cgroup in {}: {error}", parent.display());
    fs::create_dir(&probe).map_err(told)?;
    fs::remove_dir(&probe).map_err(told)
}

fn read(path: impl AsRef<Path>) -> Result<String, String> {
    fs::read_to_string(&path).map_err(|error| format!("cannot read {}: {error}", path.as_ref().display()))
}
