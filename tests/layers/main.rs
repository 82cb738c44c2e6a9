//! Holds who may know whom: reads the sources, and refuses a path that crosses a layer.
//!
//! Reading text is enough here. Comments, literals and test modules are taken out first; what is left names other
//! modules as `crate::module`, the way this crate writes its paths.
#![expect(clippy::unwrap_used, reason = "a test that cannot read the sources has failed")]

mod circles;
mod names;
mod source;

use std::collections::BTreeSet;

use source::{Source, sources};

/// Each module of the worker, and the modules it may name. `cli` may name all of them.
const MAY_KNOW: &[(&str, &[&str])] = &[
    ("job", &[]),
    ("retry", &[]),
    ("sys", &[]),
    ("config", &["job"]),
    ("script", &["job"]),
    ("ops", &["job", "config"]),
    ("sandbox", &["job", "config", "script", "sys", "ops", "retry"]),
    ("amqp", &["job", "config", "retry", "ops"]),
    ("worker", &["job", "config", "script", "sys", "ops", "retry", "sandbox", "amqp"]),
];

/// Crates that one place fences in, so that replacing them touches that place only.
const FENCED: &[(&str, &str)] = &[("lapin", "src/amqp/"), ("backoff", "src/retry.rs")];

/// What the pure modules may not name: they do no I/O.
const IO: &[&str] = &["std::fs", "std::net", "std::process", "std::io", "tokio", "nix", "libc"];

#[track_caller]
fn none(what: &str, found: Vec<String>) {
    assert!(found.is_empty(), "{what}:\n  {}", found.join("\n  "));
}

#[test]
fn modules_name_only_the_layers_below_them() {
    let mut found = Vec::new();
    let mut seen = BTreeSet::new();
    for file in sources("src") {
        let module = file.module();
        let Some((_, allowed)) = MAY_KNOW.iter().find(|(name, _)| *name == module) else {
            assert!(["cli", "main", "lib"].contains(&module), "{}: add this module to the table", file.path);
            continue;
        };
        seen.insert(module.to_owned());
        for (line, named) in file.modules_named() {
            if named != module && !allowed.contains(&named.as_str()) {
                found.push(format!("{}:{line}: {module} names {named}", file.path));
            }
        }
    }
    none("these paths cross a layer", found);
    assert_eq!(seen.len(), MAY_KNOW.len(), "a module of the table has no file: {seen:?}");
}

#[test]
fn fenced_crates_stay_behind_their_fence() {
    let mut found = Vec::new();
    for (name, fence) in FENCED {
        let files = sources("src");
        let (inside, outside): (Vec<_>, Vec<_>) = files.iter().partition(|f| f.path.starts_with(fence));
        assert!(
            inside.iter().any(|f| f.line_with(name).is_some()),
            "{name} is not used behind {fence} any more"
        );
        found.extend(outside.iter().filter_map(|f| f.line_with(name)));
    }
    none("only their fence may name these crates", found);
}

#[test]
fn unsafe_code_lives_in_sys_and_the_shim() {
    let outside = sources("src").into_iter().filter(|f| !f.path.starts_with("src/sys"));
    none("unsafe outside src/sys", outside.filter_map(|f| f.line_with("unsafe")).collect());
}

#[test]
fn only_main_knows_exit_codes() {
    let others = sources("src").into_iter().filter(|f| f.path != "src/main.rs");
    let found = others.flat_map(|f| [f.line_with("ExitCode"), f.line_with("process::exit")]).flatten();
    none("only src/main.rs turns a result into an exit code", found.collect());
}

#[test]
fn only_exec_can_take_the_inner_wall_away() {
    // Each name, and the files that may say it.
    let fences: [(&str, &[&str]); 4] = [
        ("let_through", &["src/sys/notify.rs", "src/sandbox/supervise/syscall_trace.rs"]),
        ("compile_for_tracing", &["src/sandbox/inner_wall/mod.rs", "src/sandbox/environment/mod.rs"]),
        ("start_tracing", &["src/sandbox/mod.rs", "src/cli/exec.rs"]),
        ("CONTINUE", &["src/sys/notify.rs"]),
    ];
    let mut found = Vec::new();
    for (name, allowed) in fences {
        let files = sources("src");
        let code = files.iter().filter(|file| !file.path.contains("/tests/"));
        let (inside, outside): (Vec<_>, Vec<_>) =
            code.partition(|file| allowed.contains(&file.path.as_str()));
        assert_eq!(
            inside.iter().filter(|file| file.line_with(name).is_some()).count(),
            allowed.len(),
            "{name} is not said any more where it belongs"
        );
        found.extend(outside.iter().filter_map(|file| file.line_with(name)));
    }
    none("a job must never come here", found);
}

#[test]
fn the_contract_and_the_script_do_no_io() {
    let pure = sources("src").into_iter().filter(|f| ["job", "script", "retry"].contains(&f.module()));
    let found = pure.flat_map(|f| IO.iter().filter_map(|name| f.line_with(name)).collect::<Vec<_>>());
    none("these modules are pure", found.collect());
}

#[test]
fn the_shim_stands_alone() {
    let found: Vec<String> = sources("shim/src").iter().filter_map(|f| f.line_with("sandpiper")).collect();
    none("the shim names the worker", found);
    let manifest = std::fs::read_to_string(source::root().join("shim/Cargo.toml")).unwrap();
    let manifest: toml::Table = manifest.parse().unwrap();
    let dependencies: Vec<&String> = manifest["dependencies"].as_table().unwrap().keys().collect();
    assert_eq!(
        dependencies,
        ["libc"],
        "the shim is loaded into every job's process and depends on libc only"
    );
}

#[test]
fn the_reader_sees_through_comments_literals_and_tests() {
    let text = r##"
        //! crate::worker in a comment
        use crate::{job::Job, config::{Config, Amqp}};
        /* crate::amqp */
        fn f<'a>(s: &'a str) -> &'a str { "crate::cli"; r#"unsafe "quoted" crate::sys"#; 'x'; '"'; s }
        const HERE: &str = "unsafe";
        #[cfg(test)]
        mod tests { use crate::worker::Worker; fn g() { let _ = "}"; } }
        fn h() { crate::ops::metrics::f() }
    "##;
    let file = Source::new("src/amqp/x.rs", text);
    let named: Vec<_> = file.modules_named().into_iter().collect();
    assert_eq!(named, [(3, "job".to_owned()), (3, "config".to_owned()), (9, "ops".to_owned())]);
    assert_eq!(file.line_with("unsafe"), None);
    assert_eq!(file.line_with("h"), Some("src/amqp/x.rs:9: h".to_owned()));
    assert_eq!(file.module(), "amqp");
    assert_eq!(Source::new("src/retry.rs", "").module(), "retry");
}

#[test]
fn the_readme_shows_the_fixtures_as_they_are() {
    let read = |path: &str| std::fs::read_to_string(source::root().join(path)).unwrap();
    let readme = read("README.md");
    for name in ["example_job", "example_result"] {
        let fixture = read(&format!("tests/fixtures/contract/{name}.json"));
        assert!(
            readme.contains(fixture.trim()),
            "README.md differs from tests/fixtures/contract/{name}.json"
        );
    }
}

#[test]
fn the_architecture_names_what_is_there() {
    let page = std::fs::read_to_string(source::root().join("src/ARCHITECTURE.md")).unwrap();
    let tests: String = ["src", "tests"].into_iter().flat_map(read_all).collect();
    let quoted: Vec<&str> = page.split('`').skip(1).step_by(2).collect();
    let invariants: Vec<&str> =
        page.split("# Invariants").nth(1).unwrap().split('`').skip(1).step_by(2).collect();
    let mut missing = Vec::new();
    for name in &quoted {
        let path = name.starts_with("src/") || name.starts_with("tests/") || name.starts_with("deploy/");
        if path && !name.contains('{') && !source::root().join(name).exists() {
            missing.push((*name).to_owned());
        }
    }
    for name in invariants {
        let (kind, fixture) = name.split_once("::").unwrap_or_default();
        let said = match name {
            _ if matches!(kind, "behaviour" | "hostile") => tests.contains(&format!("\"{fixture}\"")),
            _ if name.contains('/') => true,
            test => tests.contains(&format!("fn {test}(")),
        };
        if !said {
            missing.push(name.to_owned());
        }
    }
    none("src/ARCHITECTURE.md names what is not there", missing);
}

/// The text of all sources and fixtures below a folder.
fn read_all(folder: &str) -> Vec<String> {
    let mut texts: Vec<String> = Vec::new();
    let mut folders = vec![source::root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|end| end == "rs" || end == "jsonl") {
                texts.push(std::fs::read_to_string(path).unwrap());
            }
        }
    }
    texts
}
