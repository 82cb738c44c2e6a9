//! Landlock: the file system rules once more, held by another part of the kernel than mounts and modes.

use std::ffi::{CStr, CString};

use sandpiper_shim::plan::Step;

use super::plan::Plan;

// linux/landlock.h
const EXECUTE: u64 = 1 << 0;
const WRITE_FILE: u64 = 1 << 1;
const READ_FILE: u64 = 1 << 2;
const READ_DIR: u64 = 1 << 3;
/// Up to and including `MAKE_SYM`: everything that the first version handles.
const FIRST: u64 = (1 << 13) - 1;
const MAKE_CHAR: u64 = 1 << 6;
const MAKE_BLOCK: u64 = 1 << 11;
const REFER: u64 = 1 << 13;
const TRUNCATE: u64 = 1 << 14;
const IOCTL_DEV: u64 = 1 << 15;
const BIND_AND_CONNECT_TCP: u64 = 0b11;
const ABSTRACT_SOCKETS_AND_SIGNALS: u64 = 0b11;

/// Every right over the file system that this version can take away.
fn filesystem_rights(version: u32) -> u64 {
    FIRST
        | if version >= 2 { REFER } else { 0 }
        | if version >= 3 { TRUNCATE } else { 0 }
        | if version >= 5 { IOCTL_DEV } else { 0 }
}

/// Lets only these files, and what is in these directories, be executed: a second layer, for when python runs.
pub(in crate::sandbox) fn programs(version: u32, paths: &[CString]) -> Plan {
    let mut plan = Plan::default();
    // Of all rights this is the one that a layer takes away without naming it: files move from directory to directory.
    let moves = if version >= 2 { REFER } else { 0 };
    plan.push(&Step::LandlockBegin { filesystem: EXECUTE | moves, network: 0, scoped: 0 });
    if moves != 0 {
        plan.push(&Step::LandlockAllow { access: moves, path: c"/" });
    }
    paths.iter().for_each(|path| plan.push(&Step::LandlockAllow { access: EXECUTE, path }));
    plan.push(&Step::LandlockEnforce {});
    plan
}

/// The steps that confine a job, inside its own root.
/// `version` is that of the kernel's Landlock, 0 for none.
pub(super) fn steps(
    version: u32,
    network: bool,
    writable: &[&'static CStr],
    devices: &[&'static CStr],
) -> Vec<Step<'static>> {
    if version == 0 {
        return Vec::new();
    }
    let filesystem = filesystem_rights(version);
    let tcp = if version >= 4 && !network { BIND_AND_CONNECT_TCP } else { 0 };
    let scoped = if version >= 6 { ABSTRACT_SOCKETS_AND_SIGNALS } else { 0 };
    let mut steps = vec![
        Step::LandlockBegin { filesystem, network: tcp, scoped },
        Step::LandlockAllow { access: EXECUTE | READ_FILE | READ_DIR, path: c"/" },
    ];
    let own = filesystem & !(MAKE_CHAR | MAKE_BLOCK | IOCTL_DEV);
    steps.extend(writable.iter().map(|path| Step::LandlockAllow { access: own, path }));
    let device = filesystem & (READ_FILE | WRITE_FILE | TRUNCATE);
    steps.extend(devices.iter().map(|path| Step::LandlockAllow { access: device, path }));
    steps.push(Step::LandlockEnforce {});
    steps
}
