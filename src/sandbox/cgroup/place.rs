//! Where the worker's own control groups are, from what the kernel says of its mounts and memberships.

use std::fs;
use std::path::{Path, PathBuf};

use super::CgroupError;

pub(super) fn mounts() -> Result<String, CgroupError> {
    read("/proc/self/mountinfo")
}

pub(super) fn own() -> Result<String, CgroupError> {
    read("/proc/self/cgroup")
}

pub(super) fn read(path: impl AsRef<Path>) -> Result<String, CgroupError> {
    fs::read_to_string(&path).map_err(CgroupError::file("read", path.as_ref()))
}

/// The directory of our cgroup in the one hierarchy of version 2.
pub(super) fn version_2(mounts: &str, own: &str) -> Result<PathBuf, CgroupError> {
    const NAME: &str = "cgroup2";
    let mount = mounted(mounts, |kind, _| kind == NAME).ok_or(CgroupError::NotMounted(NAME))?;
    let path = own.lines().find_map(|line| line.strip_prefix("0::"));
    below(&mount, path.unwrap_or_default()).ok_or(CgroupError::OutOfSight(NAME))
}

/// The directory of our cgroup in the hierarchy of a controller of version 1.
pub(super) fn version_1(mounts: &str, own: &str, controller: &'static str) -> Result<PathBuf, CgroupError> {
    let has = |list: &str| list.split(',').any(|name| name == controller);
    let mount = mounted(mounts, |kind, options| kind == "cgroup" && has(options))
        .ok_or(CgroupError::NotMounted(controller))?;
    let path = own.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':');
        let controllers = fields.nth(1)?;
        has(controllers).then(|| fields.next())?
    });
    below(&mount, path.unwrap_or_default()).ok_or(CgroupError::OutOfSight(controller))
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
fn below((root, point): &(String, PathBuf), path: &str) -> Option<PathBuf> {
    let inside = Path::new(path).strip_prefix(root).ok()?;
    // Seen from inside a cgroup namespace, what is outside begins with "..".
    let hidden = inside.components().any(|part| part == std::path::Component::ParentDir);
    (!hidden).then(|| if inside.as_os_str().is_empty() { point.clone() } else { point.join(inside) })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
24 1 0:22 / /proc rw,relatime - proc proc rw
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
34 31 0:31 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
39 31 0:36 /box /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";
    const OWN: &str = "\
8:pids:/box/two
4:memory:/one
2:cpu,cpuacct:/
0::/user.slice/a:b
";

    fn found(place: Result<PathBuf, CgroupError>) -> Option<String> {
        place.ok().map(|path| path.display().to_string())
    }

    #[test]
    fn every_controller_has_a_path_of_its_own() {
        let place = |controller| found(version_1(HYBRID, OWN, controller));
        assert_eq!(place("memory").as_deref(), Some("/sys/fs/cgroup/memory/one"));
        assert_eq!(place("cpuacct").as_deref(), Some("/sys/fs/cgroup/cpu,cpuacct"));
        assert_eq!(place("pids").as_deref(), Some("/sys/fs/cgroup/pids/two"));
        assert_eq!(place("freezer"), None);
        let unified = found(version_2(HYBRID, OWN));
        assert_eq!(unified.as_deref(), Some("/sys/fs/cgroup/unified/user.slice/a:b"));
    }

    #[test]
    fn a_cgroup_that_is_out_of_sight_is_not_taken_for_another() {
        assert_eq!(found(version_1(HYBRID, "8:pids:/elsewhere\n", "pids")), None);
        assert_eq!(found(version_2(HYBRID, "0::/../other\n")), None);
        assert_eq!(found(version_2("", OWN)), None);
    }
}
