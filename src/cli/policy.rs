//! `policy`: every system call, what becomes of it, and why.

use anyhow::Context;
use clap::ValueEnum;
use serde::Serialize;

use crate::cli::args::ConfigArgs;
use crate::cli::{End, output};
use crate::sandbox::inner_wall::{Arch, Options, PolicyEntry, describe};

const EXAMPLES: &str = "\
Examples:
  sandpiper policy                      every call, by theme
  sandpiper policy --class refuse       only those that get an errno and are counted
  sandpiper policy --network --json     what a job with the network may do, as JSON

Classes: allow; partly (some arguments only); quiet (an errno, not counted); refuse (an errno,
counted in the result's blocked_syscalls); kill (the job ends with syscall_killed). A call that is
newer than the table gets ENOSYS.";

/// Print the system call policy, with the reason for every entry
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// Print it as one JSON document
    #[arg(long)]
    json: bool,

    /// As it is for a job with the network
    #[arg(long)]
    network: bool,

    /// As it is in an environment that allows exec
    #[arg(long)]
    exec: bool,

    /// As it is for a worker that has no control groups
    #[arg(long)]
    no_cgroups: bool,

    /// Only the calls of this class
    #[arg(long, value_name = "CLASS")]
    class: Option<Class>,

    /// For this architecture instead of the machine's own
    #[arg(long, value_name = "ARCH")]
    arch: Option<Machine>,

    #[command(flatten)]
    config: ConfigArgs,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Class {
    Allow,
    Partly,
    Quiet,
    Refuse,
    Kill,
}

impl Class {
    fn name(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Partly => "partly",
            Self::Quiet => "quiet",
            Self::Refuse => "refuse",
            Self::Kill => "kill",
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Machine {
    #[value(name = "x86_64")]
    X86_64,
    Aarch64,
}

#[derive(Serialize)]
struct Document {
    arch: String,
    network: bool,
    exec: bool,
    syscalls: Vec<PolicyEntry>,
}

pub(super) fn run(args: &Args) -> anyhow::Result<End> {
    let config = args.config.load()?;
    let arch = match args.arch {
        Some(Machine::X86_64) => Arch::X86_64,
        Some(Machine::Aarch64) => Arch::Aarch64,
        None => Arch::host().context("there is no policy for this machine; name one with --arch")?,
    };
    let options = Options {
        network: args.network,
        exec: args.exec,
        exec_listed: false,
        memory_group: !args.no_cgroups,
        cpu_group: !args.no_cgroups,
        extra: &config.sandbox.allow_syscalls,
    };
    let wanted = |entry: &PolicyEntry| args.class.is_none_or(|class| entry.class == class.name());
    let syscalls: Vec<PolicyEntry> = describe(arch, &options)?.filter(wanted).collect();
    if args.json {
        let arch = match arch {
            Arch::X86_64 => "x86_64",
            Arch::Aarch64 => "aarch64",
        };
        output::print_json(&Document {
            arch: arch.into(),
            network: args.network,
            exec: args.exec,
            syscalls,
        })?;
    } else {
        output::print(page(&syscalls).as_bytes())?;
    }
    Ok(End::Done)
}

/// The calls under the reason that they share, in the table's order.
fn page(syscalls: &[PolicyEntry]) -> String {
    let width = syscalls.iter().map(|entry| entry.name.len()).max().unwrap_or(0);
    let mut page = String::new();
    let mut reason = "";
    for entry in syscalls {
        if entry.reason != reason {
            reason = entry.reason;
            let gap = if page.is_empty() { "" } else { "\n" };
            page.push_str(&format!("{gap}# {reason}\n"));
        }
        let line = format!("{:<6}  {:<width$}  {}", entry.class, entry.name, entry.detail);
        page.push_str(line.trim_end());
        page.push('\n');
    }
    page
}
