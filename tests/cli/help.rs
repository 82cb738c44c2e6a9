//! Help that a newcomer can work from.

use crate::support::run;

const VERBS: [&str; 10] =
    ["bench", "cancel", "dead", "doctor", "exec", "ping", "policy", "schema", "serve", "submit"];

#[test]
fn the_top_level_names_every_verb_and_gives_a_tour() {
    let help = run(["--help"]);
    assert_eq!(help.code, 0, "{help:?}");
    for verb in VERBS {
        assert!(help.stdout.contains(&format!("\n  {verb} ")), "{verb} is missing in {}", help.stdout);
    }
    assert!(help.stdout.contains("sandpiper exec -"), "no tour in {}", help.stdout);
    assert_eq!(help.stderr, "");
}

#[test]
fn every_verb_explains_itself_by_example() {
    for verb in VERBS {
        let help = run([verb, "--help"]);
        assert_eq!(help.code, 0, "{help:?}");
        assert!(help.stdout.contains(&format!("sandpiper {verb}")), "{}", help.stdout);
        assert!(help.stdout.contains("Example"), "no example for {verb} in {}", help.stdout);
    }
}

#[test]
fn help_fits_a_terminal_of_100_columns() {
    for verb in VERBS {
        for line in run([verb, "--help"]).stdout.lines() {
            assert!(line.chars().count() <= 100, "{verb}: {line}");
        }
    }
}

#[test]
fn the_version_is_the_packages() {
    let version = run(["--version"]);
    assert_eq!((version.code, version.stdout), (0, format!("sandpiper {}\n", env!("CARGO_PKG_VERSION"))));
}

#[test]
fn wrong_usage_is_told_apart_from_a_jobs_exit_code() {
    let bench = run(["bench", "--local", "--jobs", "many"]);
    assert_eq!(bench.code, 2, "{bench:?}");
    assert!(bench.stderr.contains("--jobs"), "{bench:?}");
    let exec = run(["exec", "--no-such-flag"]);
    assert_eq!(exec.code, 125, "{exec:?}");
    assert!(exec.stderr.contains("--no-such-flag"), "{exec:?}");
    assert_eq!(run::<&str>([]).code, 2);
}
