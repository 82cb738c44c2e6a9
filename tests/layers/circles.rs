//! No two files of a module import each other, however long the way around.
//!
//! The children of a module, files or folders, are compared with each other. A module and its own children may name one
//! another: it is what they are parts of. What a module hands on with `pub use` counts as its source.

use std::collections::{BTreeMap, BTreeSet};

use crate::source::{Source, sources};

type Path = Vec<String>;

/// Rooms of the sandbox; each may name those before it.
const ROOMS: [&str; 13] = [
    "host",
    "inner_wall",
    "outer_wall",
    "environment",
    "error",
    "cgroup",
    "identity",
    "workdir",
    "supervise",
    "start",
    "run",
    "setup",
    "doctor",
];

/// Which file names which, and from where the names come that a file hands on.
struct Imports {
    files: BTreeMap<Path, Source>,
    handed_on: BTreeMap<Path, BTreeMap<String, Path>>,
}

impl Imports {
    fn read(folder: &str) -> Self {
        let tests = |file: &Source| file.path.contains("/tests/") || file.path.ends_with("/tests.rs");
        let kept = sources(folder).into_iter().filter(|file| !tests(file));
        let files: BTreeMap<Path, Source> = kept.map(|file| (module(folder, &file.path), file)).collect();
        let mut this = Self { files, handed_on: BTreeMap::new() };
        for (path, file) in &this.files {
            let used = uses(&file.code).into_iter().filter(|(public, _)| *public);
            let sources = used.filter_map(|(_, parts)| {
                let name = parts.last()?.clone();
                this.module_of(path, &parts).filter(|source| source != path).map(|source| (name, source))
            });
            let sources: BTreeMap<String, Path> = sources.collect();
            this.handed_on.insert(path.clone(), sources);
        }
        this
    }

    /// The file that a path leads to, as seen from another.
    fn module_of(&self, from: &Path, parts: &[String]) -> Option<Path> {
        let (mut at, mut parts) = (from.clone(), parts);
        match parts.first()?.as_str() {
            "crate" => (at, parts) = (Path::new(), &parts[1..]),
            "self" => parts = &parts[1..],
            "super" => {
                while parts.first().is_some_and(|part| part == "super") {
                    (_, parts) = (at.pop(), &parts[1..]);
                }
            }
            child if self.files.contains_key(&[&at[..], &[child.to_owned()]].concat()) => {}
            _ => return None,
        }
        while let Some((part, rest)) = parts.split_first() {
            let below = [&at[..], std::slice::from_ref(part)].concat();
            if !self.files.contains_key(&below) {
                break;
            }
            (at, parts) = (below, rest);
        }
        let source = parts.first().and_then(|name| self.handed_on.get(&at)?.get(name));
        Some(source.cloned().unwrap_or(at))
    }

    /// Of the children of `parent`: which names which, with the two files.
    fn between_children(&self, parent: &[String]) -> BTreeMap<String, BTreeMap<String, String>> {
        let mut named: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
        let child = |path: &Path| path.strip_prefix(parent).and_then(|rest| rest.first()).cloned();
        for (path, file) in &self.files {
            let Some(from) = child(path) else { continue };
            let paths = uses(&file.code).into_iter().map(|(_, parts)| parts).chain(inline(&file.code));
            for target in paths.filter_map(|parts| self.module_of(path, &parts)) {
                if let Some(to) = child(&target).filter(|to| *to != from) {
                    let who = format!("{} names {}", file.path, target.join("::"));
                    named.entry(from.clone()).or_default().entry(to).or_insert(who);
                }
            }
        }
        named
    }

    fn parents(&self) -> BTreeSet<Path> {
        self.files.keys().filter_map(|path| path.split_last()).map(|(_, parent)| parent.to_vec()).collect()
    }
}

fn module(folder: &str, path: &str) -> Path {
    let inside = path.strip_prefix(folder).unwrap().trim_start_matches('/').trim_end_matches(".rs");
    let inside = inside.strip_suffix("/mod").unwrap_or(inside);
    inside.split('/').map(str::to_owned).collect()
}

/// Paths of all `use` items, and whether they are handed on.
fn uses(code: &str) -> Vec<(bool, Path)> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("use ") {
        let before = &code[..at];
        if before.ends_with(|c: char| c.is_alphanumeric() || c == '_') {
            continue;
        }
        let line = before.rsplit('\n').next().unwrap().trim();
        let Some(end) = code[at..].find(';') else { continue };
        let mut paths = Vec::new();
        expand("", code[at + 4..at + end].trim(), &mut paths);
        found.extend(paths.into_iter().map(|path| (line.starts_with("pub"), parts(&path))));
    }
    found
}

/// Writes out `a::{b, c::d}` as its single paths.
fn expand(prefix: &str, tree: &str, into: &mut Vec<String>) {
    let Some((head, group)) = tree.split_once('{') else {
        into.push(format!("{prefix}{tree}"));
        return;
    };
    let (mut depth, mut member) = (0, String::new());
    for c in group[..group.rfind('}').unwrap()].chars().chain([',']) {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if c == ',' && depth == 0 {
            if !member.trim().is_empty() {
                expand(&format!("{prefix}{}", head.trim()), member.trim(), into);
            }
            member.clear();
        } else {
            member.push(c);
        }
    }
}

fn parts(path: &str) -> Path {
    path.split("::").map(|part| part.split(" as ").next().unwrap().trim().to_owned()).collect()
}

/// Paths that are written out where they are used.
fn inline(code: &str) -> Vec<Path> {
    let mut found = Vec::new();
    for start in ["crate::", "super::"] {
        for (at, _) in code.match_indices(start) {
            let whole = !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':');
            let path: String =
                code[at..].chars().take_while(|c| c.is_alphanumeric() || *c == '_' || *c == ':').collect();
            // The head of a group says nothing yet; `uses` has its members.
            if whole && !path.ends_with(':') {
                found.push(parts(&path));
            }
        }
    }
    found
}

/// A way from a child back to itself.
fn circle(named: &BTreeMap<String, BTreeMap<String, String>>) -> Option<Vec<String>> {
    named.keys().find_map(|start| {
        let (mut seen, mut ways) = (BTreeSet::new(), vec![(start.clone(), Vec::new())]);
        while let Some((at, way)) = ways.pop() {
            for (to, who) in named.get(&at).into_iter().flatten() {
                let way = [&way[..], std::slice::from_ref(who)].concat();
                if to == start {
                    return Some(way);
                }
                if seen.insert(to.clone()) {
                    ways.push((to.clone(), way));
                }
            }
        }
        None
    })
}

#[test]
fn no_files_of_a_module_import_each_other_in_a_circle() {
    for folder in ["src", "shim/src"] {
        let imports = Imports::read(folder);
        for parent in imports.parents() {
            let found = circle(&imports.between_children(&parent));
            assert!(found.is_none(), "a circle in {}:\n  {}", parent.join("::"), found.unwrap().join("\n  "));
        }
    }
}

#[test]
fn rooms_of_the_sandbox_name_only_those_before_them() {
    let named = Imports::read("src").between_children(&["sandbox".to_owned()]);
    let place = |room: &str| {
        ROOMS.iter().position(|name| *name == room).unwrap_or_else(|| panic!("{room}: add it to the order"))
    };
    for (from, targets) in &named {
        for (to, who) in targets {
            assert!(place(to) < place(from), "{who}");
        }
    }
}

#[test]
fn a_circle_is_found_through_what_is_handed_on() {
    let file = |path: &str, text: &str| (module("src", path), Source::new(path, text));
    let mut imports = Imports {
        files: BTreeMap::from([
            file("src/m/mod.rs", "mod a; mod b; mod c; pub use a::{X, Y as Z};"),
            file("src/m/a.rs", "use super::c::{self, W}; pub struct X; pub struct Y;"),
            file("src/m/b.rs", "use crate::m::X;"),
            file("src/m/c.rs", "fn f() { super::b::g() } // crate::m::a"),
        ]),
        handed_on: BTreeMap::new(),
    };
    assert!(circle(&imports.between_children(&["m".to_owned()])).is_none(), "nothing is handed on yet");
    let source = vec!["m".to_owned(), "a".to_owned()];
    imports.handed_on.insert(vec!["m".to_owned()], BTreeMap::from([("X".to_owned(), source)]));
    let found = circle(&imports.between_children(&["m".to_owned()])).unwrap();
    assert_eq!(
        found,
        ["src/m/a.rs names m::c", "src/m/c.rs names m::b", "src/m/b.rs names m::a"],
        "{found:?}"
    );
}
