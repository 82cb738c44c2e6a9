//! What a job sees of the file system, as steps of a plan: a root of its own, and the little that it may write.

use std::ffi::{CStr, CString, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use sandpiper_shim::plan::Step;

use super::host::Host;
use super::plan::{self, Plan};
use super::root::{Entry, Root};
use crate::sys::launch;

const READ_ONLY: u64 = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
const DEVICE: u64 = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;
const PRIVATE: u64 = libc::MS_REC | libc::MS_PRIVATE;
/// The same for one mount, on kernels that have no call for a tree of them.
const REMOUNT: u64 = libc::MS_REMOUNT | libc::MS_BIND | libc::MS_RDONLY | NO_SUID;
const BIND: u64 = libc::MS_BIND | libc::MS_REC;
const NO_SUID: u64 = libc::MS_NOSUID | libc::MS_NODEV;
const NOTHING: &CStr = c"";

/// The new root while it is being built, the host's own meanwhile, and the layers over parts of it.
const NEW: &str = "/new";
const OLD: &str = "/old";
const LAYERS: &str = "/layers";
/// What has no file in it.
const EMPTY: &CStr = c"/empty";
/// What cannot stand in a list of layers as it is.
const SPECIAL: [u8; 3] = *b":,\\";

/// The working directory.
pub(super) const WORK: &CStr = c"/work";
/// Where a job may write, and the part of one small file system that lies there. `/tmp` comes last.
pub(super) const WRITABLE: [(&CStr, &CStr); 3] =
    [(WORK, c"/tmp/work"), (c"/dev/shm", c"/tmp/shm"), (c"/tmp", c"/tmp/tmp")];
/// The devices that there are.
pub(super) const DEVICES: [&CStr; 5] =
    [c"/dev/null", c"/dev/zero", c"/dev/full", c"/dev/random", c"/dev/urandom"];
/// Files of any kind in the writable file system: an inode costs the kernel about a KiB.
pub(super) const INODES: u64 = 16_384;

fn mount(plan: &mut Plan, [source, target, fstype]: [&CStr; 3], flags: u64, options: &CStr) {
    plan.push(&Step::Mount { flags, source, target, fstype, options });
}

fn bind(plan: &mut Plan, source: &CStr, target: &CStr) {
    mount(plan, [source, target, NOTHING], BIND, NOTHING);
}

/// `/proc` as a process sees it that may see only its own user's. A job cannot write to it; a zygote's children
/// have maps to write.
pub(super) fn mount_proc(plan: &mut Plan, target: &CStr, read_only: bool) {
    let flags = NO_SUID | libc::MS_NOEXEC | if read_only { libc::MS_RDONLY } else { 0 };
    mount(plan, [c"proc", target, c"proc"], flags, c"subset=pid,hidepid=invisible");
}

/// Where what a zygote imports may write: some libraries keep what they found out, or fail without a temporary
/// file. A job's own `/tmp` comes to lie on it. No `/dev/shm`: semaphores there would be shared by all jobs.
pub(super) fn scratch(plan: &mut Plan) {
    mount(
        plan,
        [c"tmpfs", c"/tmp", c"tmpfs"],
        NO_SUID | libc::MS_NOEXEC,
        c"size=16m,nr_inodes=1024,mode=0700",
    );
}

/// A root of the interpreter's own, read-only. Where `proc` is some, with a `/proc`: read-only, or not.
pub(super) fn file_system(plan: &mut Plan, host: &Host, root: &Root, proc: Option<bool>) {
    // Nothing that is mounted from here on reaches the host.
    mount(plan, [c"none", c"/", NOTHING], PRIVATE, NOTHING);
    // A place to stand while both roots are needed: every path of the host stays reachable below /old.
    mount(plan, [c"tmpfs", c"/tmp", c"tmpfs"], NO_SUID, c"size=64k,mode=0755");
    for path in [c"/tmp/old", c"/tmp/new", c"/tmp/empty", c"/tmp/layers"] {
        plan.push(&Step::Mkdir { mode: 0o755, path });
    }
    plan.push(&Step::PivotRoot { new: c"/tmp", old: c"/tmp/old" });
    for (at, layer) in root.layers.iter().enumerate() {
        let target = c_string(format!("{LAYERS}/{at}"));
        plan.push(&Step::Mkdir { mode: 0o755, path: &target });
        // One that nobody writes to has two layers at least.
        let options =
            [b"lowerdir=", below(OLD, &layer.directory).as_bytes(), b":", EMPTY.to_bytes()].concat();
        mount(plan, [c"overlay", &target, c"overlay"], NO_SUID | layer.kept, &c_string(options));
    }
    let host_path = |path: &Path| match root
        .layers
        .iter()
        .enumerate()
        .find_map(|(at, layer)| path.strip_prefix(&layer.directory).ok().map(|inside| (at, inside)))
    {
        Some((at, inside)) => below(&format!("{LAYERS}/{at}"), &Path::new("/").join(inside)),
        None => below(OLD, path),
    };

    mount(plan, [c"tmpfs", c"/new", c"tmpfs"], NO_SUID, c"size=1m,mode=0755");
    for (path, entry) in &root.entries {
        let new = below(NEW, path);
        match entry {
            Entry::Directory => plan.push(&Step::Mkdir { mode: 0o755, path: &new }),
            Entry::Link(target) => plan.push(&Step::Symlink { target: &c_path(target), path: &new }),
            Entry::File(content) => {
                plan.push(&Step::CreateFile { mode: 0o644, path: &new, content: content.as_bytes() });
            }
            Entry::HostDirectory => {
                plan.push(&Step::Mkdir { mode: 0o755, path: &new });
                bind(plan, &host_path(path), &new);
            }
            Entry::HostFile => {
                plan.push(&Step::CreateFile { mode: 0o644, path: &new, content: b"" });
                bind(plan, &host_path(path), &new);
            }
            Entry::HostFileFrom(file) => {
                plan.push(&Step::CreateFile { mode: 0o644, path: &new, content: b"" });
                bind(plan, &host_path(file), &new);
            }
            Entry::Proc => plan.push(&Step::Mkdir { mode: 0o555, path: &new }),
        }
    }
    for device in DEVICES {
        plan.push(&Step::CreateFile { mode: 0o644, path: &below(NEW, as_path(device)), content: b"" });
    }
    // Everything so far, with whatever the host has mounted inside of it.
    if host.mount_setattr {
        plan.push(&Step::MountAttributes { set: READ_ONLY, target: c"/new" });
    } else {
        let mounts = Mounts::of_this_process();
        mount(plan, [c"none", c"/new", NOTHING], REMOUNT, NOTHING);
        for (target, kept) in root.entries.iter().flat_map(|(path, entry)| mounts.made_by(path, entry)) {
            mount(plan, [c"none", &below(NEW, &target), NOTHING], REMOUNT | kept, NOTHING);
        }
    }
    for device in DEVICES {
        let new = below(NEW, as_path(device));
        bind(plan, &below(OLD, as_path(device)), &new);
        // What can be written to the device still can; its times are the host's.
        if host.mount_setattr {
            plan.push(&Step::MountAttributes { set: DEVICE, target: &new });
        } else {
            mount(plan, [c"none", &new, NOTHING], REMOUNT & !libc::MS_NODEV | libc::MS_NOEXEC, NOTHING);
        }
    }
    if let Some(read_only) = proc.filter(|_| root.has_proc()) {
        mount_proc(plan, c"/new/proc", read_only);
    }
    plan.push(&Step::EnterRoot { new: c"/new" });
}

/// A layer between a directory of the host and the jobs: a read-only overlay, whose files are other ones to the kernel
/// where it keeps locks, and where it flushes disks, while their pages are the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layer {
    directory: PathBuf,
    /// Flags of the mount that it lies on, which hold on.
    kept: u64,
}

/// Puts layers between the host and the root, as far as the kernel has them here. What stays as it is on the host, and
/// can be locked and flushed by jobs: files and directories with mounts of their own, or inside.
pub(super) fn add_layers(root: &mut Root, host: &Host) -> Vec<PathBuf> {
    let mounts = Mounts::of_this_process();
    let sources: Vec<PathBuf> = root.entries.iter().filter_map(|(path, entry)| entry.source(path)).collect();
    let mut layers: Vec<Layer> = Vec::new();
    for layer in sources.iter().filter_map(|source| mounts.layer_for(source)) {
        if !layers.contains(&layer) {
            layers.push(layer);
        }
    }
    let works = |layers: &[Layer]| launch::can(0, plan::layers_trial(host, layers).bytes());
    if !works(&layers) {
        layers.retain(|layer| works(std::slice::from_ref(layer)));
    }
    root.layers = layers;
    let layered = |source: &&PathBuf| !root.layers.iter().any(|layer| source.starts_with(&layer.directory));
    sources.iter().filter(layered).cloned().collect()
}

/// A root of these directories alone.
pub(super) fn layers_of(layers: &[Layer]) -> Root {
    let entries = [(PathBuf::from("/dev"), Entry::Directory)].into();
    Root { layers: layers.to_vec(), entries }
}

/// One file system for all that the job writes, so that one size holds for it all.
pub(super) fn writable(plan: &mut Plan, owner: u32, bytes: u64) {
    let options = c_string(format!("size={bytes},nr_inodes={INODES},mode=0755"));
    mount(plan, [c"tmpfs", c"/tmp", c"tmpfs"], NO_SUID, &options);
    for (target, part) in WRITABLE {
        plan.push(&Step::Mkdir { mode: 0o700, path: part });
        plan.push(&Step::Chown { uid: owner.into(), gid: owner.into(), path: part });
        // The last of them hides the whole from sight.
        bind(plan, part, target);
    }
}

/// The mounts of the host, as `/proc/self/mountinfo` lists them: the later of two lies on top.
#[derive(Debug)]
struct Mounts(Vec<(PathBuf, u64)>);

impl Mounts {
    /// The largest directory around a path that is all of one mount: an overlay sees none that lie inside.
    fn layer_for(&self, source: &Path) -> Option<Layer> {
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
    fn kept_around(&self, source: &Path) -> u64 {
        let around = self.0.iter().rev().find(|(point, _)| source.starts_with(point));
        around.map_or(0, |(_, kept)| *kept)
    }

    fn of_this_process() -> Self {
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
    fn made_by(&self, path: &Path, entry: &Entry) -> Vec<(PathBuf, u64)> {
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

fn as_path(path: &CStr) -> &Path {
    Path::new(std::ffi::OsStr::from_bytes(path.to_bytes()))
}

fn below(root: &str, path: &Path) -> CString {
    let mut joined = root.as_bytes().to_vec();
    joined.extend_from_slice(path.as_os_str().as_bytes());
    c_string(joined)
}

fn c_path(path: &Path) -> CString {
    c_string(path.as_os_str().as_bytes())
}

/// Paths come from the file system or from a checked configuration: none holds a NUL.
fn c_string(bytes: impl Into<Vec<u8>>) -> CString {
    CString::new(bytes).unwrap_or_default()
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
