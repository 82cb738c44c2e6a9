//! Calls that the operator allows on top of the policy. They extend the list and replace nothing: what
//! would take a wall down, or is open as far as is safe, stays as it is.

use super::PolicyError;
use super::rules::{Arch, Class};
use super::table;

/// What no configuration can allow.
const FORBIDDEN: &[(&str, &str)] = &[
    ("seccomp", "a filter of the job's own would hide its calls from the worker"),
    ("clone3", "its flags lie in memory, where a filter cannot tell namespaces from threads"),
    ("io_uring_setup", "it runs calls where no filter sees them"),
    ("io_uring_enter", "it runs calls where no filter sees them"),
    ("io_uring_register", "it runs calls where no filter sees them"),
    ("unshare", "new namespaces come with capabilities that undo the outer wall"),
    ("setns", "it enters namespaces outside the outer wall"),
    ("mount", "it changes the root that the outer wall is made of"),
    ("umount2", "it changes the root that the outer wall is made of"),
    ("pivot_root", "it changes the root that the outer wall is made of"),
    ("chroot", "it changes the root that the outer wall is made of"),
    ("open_tree", "it changes the root that the outer wall is made of"),
    ("open_tree_attr", "it changes the root that the outer wall is made of"),
    ("move_mount", "it changes the root that the outer wall is made of"),
    ("fsopen", "it changes the root that the outer wall is made of"),
    ("fsconfig", "it changes the root that the outer wall is made of"),
    ("fsmount", "it changes the root that the outer wall is made of"),
    ("fspick", "it changes the root that the outer wall is made of"),
    ("mount_setattr", "it changes the root that the outer wall is made of"),
    ("open_by_handle_at", "it opens files outside the root"),
    ("ptrace", "a tracer controls what other processes call"),
    ("bpf", "it loads code into the kernel"),
    ("init_module", "it loads code into the kernel"),
    ("finit_module", "it loads code into the kernel"),
    ("delete_module", "it changes the kernel of the host"),
    ("kexec_load", "it replaces the kernel of the host"),
    ("kexec_file_load", "it replaces the kernel of the host"),
    ("reboot", "it stops the host"),
    ("iopl", "it opens the ports of the host"),
    ("ioperm", "it opens the ports of the host"),
    ("socket", "the network is given by enable_network, TCP and UDP only"),
];

/// The number of a call that may be added.
pub(super) fn number(arch: Arch, name: &str) -> Result<u32, PolicyError> {
    if let Some((_, reason)) = FORBIDDEN.iter().find(|(forbidden, _)| *forbidden == name) {
        return Err(PolicyError::Forbidden { name: name.to_owned(), reason });
    }
    match table::calls(arch).find(|(_, known, _)| *known == name) {
        Some((_, _, group))
            if matches!(
                group.class,
                Class::Partly(_) | Class::PartlyOn(_) | Class::ByMemoryGroup([_, Class::Partly(_)])
            ) =>
        {
            Err(PolicyError::Forbidden {
                name: name.to_owned(),
                reason: "it is allowed already, with the arguments that are safe",
            })
        }
        Some((number, ..)) => Ok(number),
        None => Err(PolicyError::Unknown { name: name.to_owned(), nearest: nearest(arch, name) }),
    }
}

fn nearest(arch: Arch, name: &str) -> &'static str {
    table::calls(arch)
        .map(|(_, known, _)| known)
        .min_by_key(|known| strsim::damerau_levenshtein(known, name))
        .unwrap_or("read")
}
