//! `doctor`: whether this machine has what the worker needs, and how to get what it lacks.

use serde::Serialize;

use crate::cli::args::ConfigArgs;
use crate::cli::rehearsal::rehearse;
use crate::cli::{End, output};
use crate::sandbox::doctor::{Check, examine};

const EXAMPLES: &str = "\
Examples:
  sandpiper doctor                        what is there, what is not, and how to get it
  sandpiper doctor --json | jq '.checks[] | select(.ok | not)'
  sandpiper doctor --layers               the layers alone: no sandbox is started, no broker is asked

Exit code: 0 when serve would start here, 1 when something that it requires is missing.";

/// Try every layer of the sandbox on this machine and say what is missing
///
/// Each layer is tried for real, in child processes that are thrown away. If none is missing that the worker needs, the
/// sandbox is started with its environments, a job runs in each, the port of metrics is tried and the broker is asked.
/// Nothing is left of it. Run it as the user, and in the container, that the worker will run in.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// Print the findings as one JSON document
    #[arg(long)]
    json: bool,

    /// Try the layers alone
    #[arg(long)]
    layers: bool,

    #[command(flatten)]
    config: ConfigArgs,
}

#[derive(Serialize)]
struct Findings {
    /// Everything that is required is there.
    ready: bool,
    checks: Vec<Check>,
}

pub(super) fn run(args: &Args) -> anyhow::Result<End> {
    let config = args.config.load()?;
    let mut checks = examine(&config);
    let are_ready = |checks: &[Check]| checks.iter().all(|check| check.ok || !check.required);
    if !args.layers && are_ready(&checks) {
        checks.extend(rehearse(&config, &checks)?);
    }
    let findings = Findings { ready: are_ready(&checks), checks };
    if args.json {
        output::print_json(&findings)?;
    } else {
        output::print(page(&findings).as_bytes())?;
    }
    Ok(if findings.ready { End::Done } else { End::Unsatisfied })
}

fn page(findings: &Findings) -> String {
    let width = findings.checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
    let indent = " ".repeat(width + 11);
    let mut page = String::new();
    for check in &findings.checks {
        let mark = match (check.ok, check.required) {
            (true, _) => "ok",
            (false, true) => "MISSING",
            (false, false) => "without",
        };
        page.push_str(&format!("{mark:<8} {:<width$}  {}\n", check.name, check.detail));
        if !check.ok {
            page.push_str(&format!("{indent}lost: {}\n", check.without));
            page.push_str(&format!("{indent}remedy: {}\n", check.remedy));
        }
    }
    let count = |required: bool| findings.checks.iter().filter(|c| !c.ok && c.required == required).count();
    let verdict = match (count(true), count(false)) {
        (0, 0) => "everything is there".to_owned(),
        (0, lesser) => format!("serve would start; {lesser} that it can do without {} missing", are(lesser)),
        (missing, _) => format!("serve would not start: {missing} required {} missing", are(missing)),
    };
    page.push_str(&format!("\n{verdict}\n"));
    page
}

fn are(count: usize) -> &'static str {
    if count == 1 { "is" } else { "are" }
}
