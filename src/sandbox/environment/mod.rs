//! A named interpreter, prepared: its root, its policies, and how it is started.

mod interpreter;
mod programs;
mod rootfs;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sandpiper_shim::abi::{POLICY_MAGIC, SHIM_PATH};

use crate::config;
use crate::sandbox::host::{Host, Privilege};
use crate::sandbox::inner_wall::{FilterProgram, Options, Policy, PolicyError};
use crate::sandbox::outer_wall::plan::Plan;
use crate::sandbox::outer_wall::rootfs::Root;
use crate::sandbox::outer_wall::{INSIDE, cold, landlock, layers, trials};
use crate::script::{Prescript, TemplateError};
use crate::sys::fd;
use crate::sys::launch::{self, Program};
use interpreter::{find_shim, prescript, program};

pub use rootfs::RootError;

/// Everything of an environment that its jobs share.
#[derive(Debug)]
pub(super) struct Environment {
    pub(super) name: String,
    pub(super) program: Arc<Program>,
    pub(super) zygote_program: Arc<Program>,
    /// What its cold processes read.
    pub(super) prescript: Prescript,
    /// What a zygote imports.
    pub(super) imports: Vec<String>,
    /// Forks of it need not take themselves apart.
    pub(super) fast_exit: bool,
    /// The zygote moves its memory into huge pages.
    pub(super) huge_pages: bool,
    /// Children that are to stand by.
    pub(super) standby: usize,
    offline: Variant,
    online: Variant,
}

/// What differs with the network.
#[derive(Debug)]
pub(super) struct Variant {
    pub(super) root: Root,
    /// The root as it stands, for cold jobs to join; none where they have to build their own.
    pub(super) prepared: Option<OwnedFd>,
    pub(super) policy: Policy,
    /// The compiled policy as the shim maps it.
    pub(super) policy_file: OwnedFd,
    pub(super) coarse: Vec<u8>,
    pub(super) coarse_zygote: Vec<u8>,
}

/// Why an environment could not be prepared.
#[derive(Debug)]
pub(super) enum PrepareError {
    Root(RootError),
    Policy(PolicyError),
    Shim {
        path: PathBuf,
        source: io::Error,
    },
    /// A list of programs takes a Landlock.
    Unlistable,
    Template(TemplateError),
    Io(io::Error),
}

impl Environment {
    pub(super) fn prepare(
        name: &str,
        environment: &config::Environment,
        sandbox: &config::Sandbox,
        machine: &Machine,
    ) -> Result<Self, PrepareError> {
        let shim = find_shim(sandbox.shim.as_deref())?;
        let variant = |network| {
            let mut root =
                Root::of(environment, network, INSIDE..INSIDE + machine.seats).map_err(PrepareError::Root)?;
            root.place(Path::new(SHIM_PATH), &shim);
            let programs = programs::expose(&mut root, environment, machine.host.landlock)?;
            if !machine.host.proc || environment.proc == config::Proc::None {
                root.without_proc();
            }
            let open = layers::add(&mut root, &machine.host);
            if !network && !open.is_empty() {
                let paths: Vec<String> = open.iter().map(|path| path.display().to_string()).collect();
                tracing::warn!(
                    environment = name,
                    paths = paths.join(" "),
                    "jobs can put locks on files of the host and flush its disks there: no overlay lies between"
                );
            }
            let options = Options {
                network,
                exec: environment.allow_exec != config::Exec::Nothing,
                exec_listed: programs.is_some(),
                memory_group: machine.memory_group,
                cpu_group: machine.cpu_group,
                extra: &sandbox.allow_syscalls,
            };
            let compile = if machine.traces { Policy::compile_for_tracing } else { Policy::compile };
            let policy = compile(&options).map_err(PrepareError::Policy)?;
            let programs =
                programs.map(|paths| landlock::programs(machine.host.landlock, &paths)).unwrap_or_default();
            let file =
                policy_file(&policy, network, machine.host.privilege, &programs).map_err(PrepareError::Io)?;
            let coarse = policy.coarse().bytes();
            let coarse_zygote = policy.coarse_before_wall().bytes();
            let prepared = prepare(&root, &machine.host);
            Ok(Variant { root, prepared, policy, policy_file: file, coarse, coarse_zygote })
        };
        Ok(Self {
            name: name.to_owned(),
            program: Arc::new(program(environment, false)),
            zygote_program: Arc::new(program(environment, true)),
            prescript: prescript(name, &environment.python).map_err(PrepareError::Template)?,
            imports: environment.imports.clone(),
            fast_exit: environment.fast_exit,
            huge_pages: environment.huge_pages,
            standby: environment.standby,
            offline: variant(false)?,
            online: variant(true)?,
        })
    }

    pub(super) fn variant(&self, network: bool) -> &Variant {
        if network { &self.online } else { &self.offline }
    }
}

/// What an environment needs to know of the machine and the worker.
#[derive(Clone, Copy, Debug)]
pub(super) struct Machine {
    pub(super) host: Host,
    /// Jobs that there may be at one time, those that stand by included.
    pub(super) seats: u32,
    /// Control groups count the memory of each job.
    pub(super) memory_group: bool,
    /// Control groups give each job its share of the processor.
    pub(super) cpu_group: bool,
    /// The policy is traced and keeps nothing back.
    pub(super) traces: bool,
}

/// An ordinary user has no namespace of mounts before a job's own user namespace is there.
fn prepare(root: &Root, host: &Host) -> Option<OwnedFd> {
    if host.privilege == Privilege::None {
        return None;
    }
    launch::namespace("mnt", cold::prepared_root(host, root).bytes())
        .and_then(fd::out_of_the_way)
        .and_then(|prepared| {
            // Joining takes a capability more than making: that of `chroot`.
            let joins = launch::can(0, trials::joining(&prepared, libc::CLONE_NEWNS).bytes());
            joins.then_some(prepared).ok_or_else(|| io::Error::other("a mount namespace cannot be joined"))
        })
        .inspect_err(|error| tracing::warn!(%error, "each cold job builds its own root, which takes longer"))
        .ok()
}

/// As [`PolicyHeader`](sandpiper_shim::abi::PolicyHeader) lays it out, in a file that cannot change.
fn policy_file(policy: &Policy, network: bool, privilege: Privilege, programs: &Plan) -> io::Result<OwnedFd> {
    let count = |filters: &[FilterProgram]| u32::try_from(filters.len()).unwrap_or(u32::MAX);
    let header = [
        POLICY_MAGIC,
        network.into(),
        count(policy.notifying()),
        count(policy.fallback()),
        (privilege == Privilege::None).into(),
    ];
    let mut bytes: Vec<u8> = header.iter().flat_map(|number| number.to_ne_bytes()).collect();
    for filter in policy.notifying().iter().chain(policy.fallback()) {
        let length = u32::try_from(filter.instructions().len()).unwrap_or(u32::MAX);
        bytes.extend_from_slice(&length.to_ne_bytes());
        bytes.extend_from_slice(&filter.bytes());
    }
    bytes.extend_from_slice(programs.bytes());
    fd::sealed_file(c"policy", &bytes)
}
