//! What a job sees of the file system, as steps of a plan: a root of its own, and the little that it may write.

use std::ffi::{CStr, CString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use sandpiper_shim::plan::Step;

use super::host_mounts::Mounts;
use super::plan::Plan;
use super::rootfs::{Entry, Root};
use crate::sandbox::host::Host;

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
/// What lies over files of the host.
const COVERS: &str = "/covers";
/// What has no file in it.
const EMPTY: &CStr = c"/empty";

/// The working directory.
pub(in crate::sandbox) const WORK: &CStr = c"/work";
/// Where a job may write, and the part of one small file system that lies there. `/tmp` comes last.
pub(in crate::sandbox) const WRITABLE: [(&CStr, &CStr); 3] =
    [(WORK, c"/tmp/work"), (c"/dev/shm", c"/tmp/shm"), (c"/tmp", c"/tmp/tmp")];
/// The devices that there are.
pub(in crate::sandbox) const DEVICES: [&CStr; 5] =
    [c"/dev/null", c"/dev/zero", c"/dev/full", c"/dev/random", c"/dev/urandom"];
/// Files of any kind in the writable file system: an inode costs the kernel about a KiB.
pub(in crate::sandbox) const INODES: u64 = 16_384;

fn mount(plan: &mut Plan, [source, target, fstype]: [&CStr; 3], flags: u64, options: &CStr) {
    plan.push(&Step::Mount { flags, source, target, fstype, options });
}

fn bind(plan: &mut Plan, source: &CStr, target: &CStr) {
    mount(plan, [source, target, NOTHING], BIND, NOTHING);
}

/// `/proc` as a process sees it that may see only its own user's. A job cannot write to it; a zygote's children
/// have maps to write.
pub(in crate::sandbox) fn mount_proc(plan: &mut Plan, target: &CStr, read_only: bool) {
    let flags = NO_SUID | libc::MS_NOEXEC | if read_only { libc::MS_RDONLY } else { 0 };
    mount(plan, [c"proc", target, c"proc"], flags, c"subset=pid,hidepid=invisible");
}

/// Where what a zygote imports may write: some libraries keep what they found out, or fail without a temporary
/// file. A job's own `/tmp` comes to lie on it. No `/dev/shm`: semaphores there would be shared by all jobs.
pub(in crate::sandbox) fn scratch(plan: &mut Plan) {
    mount(
        plan,
        [c"tmpfs", c"/tmp", c"tmpfs"],
        NO_SUID | libc::MS_NOEXEC,
        c"size=16m,nr_inodes=1024,mode=0700",
    );
}

/// A root of the interpreter's own, read-only. Where `proc` is some, with a `/proc`: read-only, or not.
pub(in crate::sandbox) fn file_system(plan: &mut Plan, host: &Host, root: &Root, proc: Option<bool>) {
    // Nothing that is mounted from here on reaches the host.
    mount(plan, [c"none", c"/", NOTHING], PRIVATE, NOTHING);
    // A place to stand while both roots are needed: every path of the host stays reachable below /old.
    mount(plan, [c"tmpfs", c"/tmp", c"tmpfs"], NO_SUID, c"size=4m,mode=0755");
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
    for (at, (path, content)) in root.covers.iter().enumerate() {
        let file = c_string(format!("{COVERS}-{at}"));
        plan.push(&Step::CreateFile { mode: 0o755, path: &file, content });
        bind(plan, &file, &below(NEW, path));
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
        for (path, _) in &root.covers {
            mount(plan, [c"none", &below(NEW, path), NOTHING], REMOUNT, NOTHING);
        }
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

/// One file system for all that the job writes, so that one size holds for it all.
pub(in crate::sandbox) fn writable(plan: &mut Plan, owner: u32, bytes: u64) {
    let options = c_string(format!("size={bytes},nr_inodes={INODES},mode=0755"));
    mount(plan, [c"tmpfs", c"/tmp", c"tmpfs"], NO_SUID, &options);
    for (target, part) in WRITABLE {
        plan.push(&Step::Mkdir { mode: 0o700, path: part });
        plan.push(&Step::Chown { uid: owner.into(), gid: owner.into(), path: part });
        // The last of them hides the whole from sight.
        bind(plan, part, target);
    }
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
