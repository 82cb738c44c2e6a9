//! What this machine gives the sandbox: every layer tried for real, and in words what is lost without it.
//!
//! Nothing here decides how a job is run; it answers the question of an operator before the first one is.

mod apparmor;
mod container;
mod interpreter;

use std::path::PathBuf;

use serde::Serialize;

use crate::config::Config;
use crate::sandbox::host::Privilege;
use crate::sandbox::identity::range_exists;
use crate::sandbox::{StartError, cgroup};
use crate::sys::probe::{self, Failed, Namespace};

/// The oldest Landlock that the sandbox gains something by.
const LANDLOCK_FILES: u32 = 1;
/// The Landlock that also keeps abstract sockets and signals inside.
const LANDLOCK_SCOPES: u32 = 6;

/// One layer, tried.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// The name that `sandbox.require` knows it by, or what else was looked at.
    pub name: String,
    /// It is there.
    pub ok: bool,
    /// The worker does not start without it.
    pub required: bool,
    /// What was found, or which step failed with what.
    pub detail: String,
    /// What is lost without it.
    pub without: String,
    /// How to get it; empty where it is there.
    pub remedy: String,
}

/// What a layer is for, and how to get it.
struct Layer {
    name: &'static str,
    required: bool,
    without: &'static str,
    remedy: &'static str,
}

impl Layer {
    const fn needed(name: &'static str, without: &'static str, remedy: &'static str) -> Self {
        Self { name, required: true, without, remedy }
    }

    const fn welcome(name: &'static str, without: &'static str, remedy: &'static str) -> Self {
        Self { name, required: false, without, remedy }
    }

    fn check(&self, config: &Config, tried: Result<String, String>) -> Check {
        let ok = tried.is_ok();
        let (Ok(detail) | Err(detail)) = tried;
        Check {
            name: self.name.into(),
            ok,
            required: self.required || config.sandbox.require.iter().any(|name| name == self.name),
            detail,
            without: self.without.into(),
            remedy: if ok { String::new() } else { self.remedy.into() },
        }
    }
}

const USER: Layer = Layer::needed(
    "user_namespaces",
    "jobs would need a worker that is root, and an operator's imports would run as root of the host",
    "sysctl kernel.unprivileged_userns_clone=1 and user.max_user_namespaces=15000; in a container, a seccomp profile \
     that allows unshare and clone with CLONE_NEWUSER; as root in a container also CAP_SETFCAP",
);
const IN_A_CONTAINER: &str = "allow it in the container: a seccomp profile that permits unshare and mount \
     (Docker: --security-opt seccomp=PROFILE), or CAP_SYS_ADMIN; the kernel must be built with this namespace";
const NAMESPACES: [(Namespace, Layer); 6] = [
    (
        Namespace::Mount,
        Layer::needed("mount_namespace", "a job would see the worker's files", IN_A_CONTAINER),
    ),
    (
        Namespace::Pid,
        Layer::needed(
            "pid_namespace",
            "a job would see other processes and could leave some behind",
            IN_A_CONTAINER,
        ),
    ),
    (Namespace::Ipc, Layer::needed("ipc_namespace", "jobs could meet through System V IPC", IN_A_CONTAINER)),
    (Namespace::Uts, Layer::needed("uts_namespace", "a job would see the host's name", IN_A_CONTAINER)),
    (Namespace::Network, Layer::needed("network_namespace", "a job could reach the network", IN_A_CONTAINER)),
    (
        Namespace::Cgroup,
        Layer::needed(
            "cgroup_namespace",
            "a job would see where in the host's cgroups it runs",
            IN_A_CONTAINER,
        ),
    ),
];
const MOUNT_REMEDY: &str = "allow mount and pivot_root in the container (seccomp and AppArmor profile)";
const TMPFS: Layer = Layer::needed("tmpfs", "disk_bytes could not be enforced", MOUNT_REMEDY);
const ROOT: Layer = Layer::needed("pivot_root", "a job would see the host's files", MOUNT_REMEDY);
const OVERLAY: Layer = Layer::welcome(
    "overlay",
    "jobs can put record locks on files of the host, which slows all who use them, and flush its disks",
    "Linux 5.11 or later (as root any) with the module overlay, which must be loaded where the worker cannot load it; in \
     a container, an AppArmor profile that allows to mount one",
);
const PROC: Layer = Layer::welcome(
    "proc",
    "jobs run without /proc: multiprocessing's CPU count, psutil and the like do not work",
    "in a container, unmask /proc (Docker: --security-opt systempaths=unconfined; Kubernetes: procMount: Unmasked)",
);
const UIDS: Layer = Layer::welcome(
    "several_uids",
    "jobs and their pid 1 share one uid of the host: the worker's own",
    "run the worker as root (or with CAP_SYS_ADMIN, CAP_SETUID, CAP_SETGID and CAP_CHOWN); in a container with a user \
     namespace of its own, set sandbox.uid_base to where /proc/self/uid_map has ids",
);
const SECCOMP: Layer = Layer::needed(
    "seccomp",
    "there is no inner wall",
    "a kernel with CONFIG_SECCOMP_FILTER; in a container, a seccomp profile that allows the call seccomp",
);
const NOTIFY: Layer = Layer::welcome(
    "seccomp_notify",
    "forbidden calls still kill, but results cannot name them, and refused ones are not counted",
    "Linux 5.0 or later; a surrounding filter that has a listener itself denies ours (EBUSY): run without it",
);
const LANDLOCK: Layer = Layer::welcome(
    "landlock",
    "one wall less around files: mounts and modes alone keep a job from them",
    "Linux 5.13 or later with CONFIG_SECURITY_LANDLOCK and landlock in the lsm= boot parameter",
);
const LANDLOCK_NEWER: Layer = Layer::welcome(
    "landlock_scopes",
    "abstract sockets and signals are kept inside by namespaces alone",
    "Linux 6.12 or later",
);
const PIDFD: Layer =
    Layer::needed("pidfd", "a kill could hit a stranger who got a dead job's pid", "Linux 5.3 or later");
const CLOSE_RANGE: Layer = Layer::needed(
    "close_range",
    "jobs would inherit what the worker has open",
    "Linux 5.9 or later; in a container, a seccomp profile that allows close_range",
);
const OPENAT2: Layer = Layer::needed(
    "openat2",
    "artifacts could not be collected safely",
    "Linux 5.6 or later; in a container, a seccomp profile that allows openat2",
);

const CGROUPS: Layer = Layer::welcome(
    "cgroups",
    "a job's memory is counted twenty times a second instead of held: in between each process can have twice the \
     limit, and what lies in pipes and sockets (up to 416 KiB for each open file) is not counted; CPU time is limited \
     for each process alone, and jobs with many processes get more of the processor",
    "version 2: a group with memory and pids that is delegated to the worker, in which it is alone. From a shell: \
     systemd-run --scope -p Delegate=yes sandpiper … (as an ordinary user: systemd-run --user --scope …); a service: \
     Delegate=yes; a container: a cgroup namespace of its own, writable. Version 1: run as root with the memory, pids \
     and cpuacct hierarchies mounted writable",
);

/// Tries everything. To be called from a process that has one thread: probes fork.
pub fn examine(config: &Config) -> Vec<Check> {
    let user = probe::user_namespace();
    // Without user namespaces a worker that is root can still make the others.
    let with_user = user.is_ok();
    let mut checks = vec![USER.check(config, told(user))];
    checks.extend(
        NAMESPACES.iter().map(|(kind, layer)| layer.check(config, told(probe::namespace(*kind, with_user)))),
    );
    checks.extend([
        TMPFS.check(config, told(probe::tmpfs(with_user))),
        ROOT.check(config, told(probe::new_root(with_user))),
        OVERLAY.check(config, told(probe::overlay(with_user))),
        PROC.check(config, told(probe::proc(with_user))),
        uids(config),
        SECCOMP.check(config, told(probe::seccomp())),
        NOTIFY.check(config, told(probe::seccomp_notify())),
    ]);
    let abi = probe::landlock_abi();
    checks.extend([
        LANDLOCK.check(config, at_least(abi, LANDLOCK_FILES)),
        LANDLOCK_NEWER.check(config, at_least(abi, LANDLOCK_SCOPES)),
        PIDFD.check(config, told(probe::pidfd())),
        CLOSE_RANGE.check(config, told(probe::close_range())),
        OPENAT2.check(config, told(probe::openat2_beneath())),
        CGROUPS.check(config, cgroups(config)),
    ]);
    checks.push(shim(config));
    for (name, environment) in &config.environments {
        checks.push(interpreter::examine(name, environment, abi));
    }
    apparmor::name_profile(&mut checks);
    container::name_options(&mut checks);
    checks
}

/// Insists on those of the examined layers that `wanted` picks.
///
/// # Errors
/// The first of them that is not there, or a name in `sandbox.require` that no layer has.
pub fn demand(config: &Config, checks: &[Check], wanted: impl Fn(&Check) -> bool) -> Result<(), StartError> {
    let known = |name: &&String| checks.iter().any(|check| check.name == **name);
    if let Some(name) = config.sandbox.require.iter().find(|name| !known(name)) {
        let names: Vec<&str> = checks.iter().map(|check| check.name.as_str()).collect();
        return Err(StartError::UnknownLayer { name: name.clone(), known: names.join(", ") });
    }
    match checks.iter().find(|check| !check.ok && wanted(check)) {
        Some(Check { name, detail, .. }) => {
            Err(StartError::Required { name: name.clone(), detail: detail.clone() })
        }
        None => Ok(()),
    }
}

/// A worker that may choose uids does choose them, and without the ones it is configured for no job starts.
fn uids(config: &Config) -> Check {
    let first = config.sandbox.uid_base;
    let slots = u32::try_from(config.worker.slots).unwrap_or(u32::MAX);
    match (Privilege::of_this_process(), range_exists(first, slots)) {
        (Privilege::Full, Err(error)) => {
            Check { required: true, ..UIDS.check(config, Err(error.to_string())) }
        }
        _ => UIDS.check(config, told(probe::several_uids(first))),
    }
}

/// Makes control groups as the sandbox does, and removes them.
fn cgroups(config: &Config) -> Result<String, String> {
    let groups = cgroup::start(1, &config.limits.default).map_err(|error| error.to_string())?;
    Ok(groups.first().map(cgroup::Cgroup::describe).unwrap_or_default())
}

fn told(tried: Result<(), Failed>) -> Result<String, String> {
    match tried {
        Ok(()) => Ok("works".into()),
        Err(failed) => Err(failed.to_string()),
    }
}

fn at_least(abi: u32, wanted: u32) -> Result<String, String> {
    match abi {
        0 => Err("the kernel has no Landlock".into()),
        abi if abi < wanted => Err(format!("the kernel speaks version {abi}, this takes {wanted}")),
        abi => Ok(format!("version {abi}")),
    }
}

fn shim(config: &Config) -> Check {
    let layer = Layer::needed(
        "shim",
        "no job can be locked down",
        "put libsandpiper_shim.so beside the sandpiper binary, or name it in sandbox.shim",
    );
    let path = config.sandbox.shim.clone().map_or_else(beside_us, Ok);
    let tried = path.and_then(|path| {
        std::fs::File::open(&path)
            .map(|_| path.display().to_string())
            .map_err(|error| format!("{}: {error}", path.display()))
    });
    layer.check(config, tried)
}

fn beside_us() -> Result<PathBuf, String> {
    std::env::current_exe()
        .map(|exe| exe.with_file_name("libsandpiper_shim.so"))
        .map_err(|error| format!("our own path is not known: {error}"))
}
