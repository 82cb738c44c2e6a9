//! What a job sees of the file system, as steps of a plan: a root of its own, and the little that it may write.

use std::ffi::{CStr, CString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use sandpiper_shim::plan::Step;

use super::plan::Plan;
use super::root::{Entry, Root};

const READ_ONLY: u64 = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
const PRIVATE: u64 = libc::MS_REC | libc::MS_PRIVATE;
const BIND: u64 = libc::MS_BIND | libc::MS_REC;
const NO_SUID: u64 = libc::MS_NOSUID | libc::MS_NODEV;
const NOTHING: &CStr = c"";

/// The new root while it is being built, and the host's own meanwhile.
const NEW: &str = "/new";
const OLD: &str = "/old";

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
pub(super) fn file_system(plan: &mut Plan, root: &Root, proc: Option<bool>) {
    // Nothing that is mounted from here on reaches the host.
    mount(plan, [c"none", c"/", NOTHING], PRIVATE, NOTHING);
    // A place to stand while both roots are needed: every path of the host stays reachable below /old.
    mount(plan, [c"tmpfs", c"/tmp", c"tmpfs"], NO_SUID, c"size=64k,mode=0755");
    for path in [c"/tmp/old", c"/tmp/new"] {
        plan.push(&Step::Mkdir { mode: 0o755, path });
    }
    plan.push(&Step::PivotRoot { new: c"/tmp", old: c"/tmp/old" });

    mount(plan, [c"tmpfs", c"/new", c"tmpfs"], NO_SUID, c"size=1m,mode=0755");
    for (path, entry) in &root.entries {
        let (new, old) = (below(NEW, path), below(OLD, path));
        match entry {
            Entry::Directory => plan.push(&Step::Mkdir { mode: 0o755, path: &new }),
            Entry::Link(target) => plan.push(&Step::Symlink { target: &c_path(target), path: &new }),
            Entry::File(content) => {
                plan.push(&Step::CreateFile { mode: 0o644, path: &new, content: content.as_bytes() });
            }
            Entry::HostDirectory => {
                plan.push(&Step::Mkdir { mode: 0o755, path: &new });
                bind(plan, &old, &new);
            }
            Entry::HostFile => {
                plan.push(&Step::CreateFile { mode: 0o644, path: &new, content: b"" });
                bind(plan, &old, &new);
            }
            Entry::HostFileFrom(file) => {
                plan.push(&Step::CreateFile { mode: 0o644, path: &new, content: b"" });
                bind(plan, &below(OLD, file), &new);
            }
            Entry::Proc => plan.push(&Step::Mkdir { mode: 0o555, path: &new }),
        }
    }
    for device in DEVICES {
        plan.push(&Step::CreateFile { mode: 0o644, path: &below(NEW, as_path(device)), content: b"" });
    }
    // Everything so far, with whatever the host has mounted inside of it.
    plan.push(&Step::MountAttributes { set: READ_ONLY, target: c"/new" });
    for device in DEVICES {
        bind(plan, &below(OLD, as_path(device)), &below(NEW, as_path(device)));
    }
    if let Some(read_only) = proc.filter(|_| root.has_proc()) {
        mount_proc(plan, c"/new/proc", read_only);
    }
    plan.push(&Step::EnterRoot { new: c"/new" });
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
