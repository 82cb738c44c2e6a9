//! Runs every fixture of tests/fixtures/{behaviour,files,program}.jsonl and tests/fixtures/hostile/ through
//! `sandpiper exec --json`: the real binary, no broker; those of tests/fixtures/twin.jsonl through a plain python3
//! as well, those with a companion in one worker as well as in two. Each line is a test of its own, named after the file and the case.
//!
//! Which processes there are: this binary (one test), itself again as a supervisor (see `supervise`), and under
//! that the worker with whatever it starts. The supervisor sees what the worker left behind.
#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]
#![expect(clippy::print_stderr, reason = "a skip is said aloud")]

mod case;
mod check;
mod ends;
mod fuzz;
mod libraries;
mod run;
mod supervise;
mod together;
mod twin;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};

use crate::case::{Case, Fixtures};

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    match args.next() {
        Some(first) if first == supervise::FLAG => return supervise::supervise(args),
        Some(first) if first == together::FLAG => return together::run_both(),
        _ => {}
    }
    let fixtures = Fixtures::load();
    let trials = fixtures.cases().map(|(name, case)| trial(name, case, fixtures.before(case)));
    let trials = trials.chain(fuzz::trials()).chain(ends::trials()).collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn trial(name: String, case: &Case, before: Option<&Case>) -> Trial {
    let elsewhere = case.arch.as_ref().is_some_and(|arch| arch != std::env::consts::ARCH);
    let ignored = case.requires.is_some() || elsewhere;
    let title = match &case.requires {
        Some(what) => format!("{name} (requires {what})"),
        None => name,
    };
    if title.starts_with("twin::") {
        let case = case.clone();
        return Trial::test(title, move || twin::verify(&case)).with_ignored_flag(ignored);
    }
    if title.starts_with("libraries::") {
        let case = case.clone();
        return Trial::test(title, move || libraries::verify(&case)).with_ignored_flag(ignored);
    }
    let cases: Vec<Case> = before.into_iter().chain([case]).cloned().collect();
    Trial::test(title, move || cases.iter().try_for_each(verify)).with_ignored_flag(ignored)
}

/// Runs one case as often as it says, and reports every expectation that was not met.
fn verify(case: &Case) -> Result<(), Failed> {
    if let Some(layer) = case.needs.as_ref().filter(|layer| !run::has(layer)) {
        return skip(case, &format!("there is no {layer} here"));
    }
    let mut outputs = Vec::new();
    for turn in 1..=case.repeat {
        let beside = case.beside.clone().map(|job| std::thread::spawn(move || run::exec(&job)));
        let ran = run::exec(case);
        let mut unmet = check::unmet(case, &ran);
        if let (Some(handle), Some(companion)) = (beside, &case.beside) {
            let other = handle.join().unwrap();
            unmet.extend(check::unmet(companion, &other).iter().map(|u| format!("beside: {u}")));
            unmet.extend(together::unmet(case, companion).iter().map(|u| format!("in one worker: {u}")));
        }
        if !unmet.is_empty() {
            return Err(format!(
                "{}, run {turn} of {}\n  unmet:\n    {}\n  job: {}\n  {ran}",
                case.name,
                case.repeat,
                unmet.join("\n    "),
                case.job()
            )
            .into());
        }
        outputs.push(ran.stdout_of_job());
    }
    check::differing(case, &outputs).map_err(Failed::from)
}

fn skip(case: &Case, why: &str) -> Result<(), Failed> {
    let skipped = format!("SKIPPED: {}: {why}", case.name);
    if std::env::var("CI").is_ok_and(|ci| ci == "true") {
        return Err(skipped.into());
    }
    eprintln!("{skipped}");
    Ok(())
}
