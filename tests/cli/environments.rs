//! Environments whose packages lie elsewhere: jobs find them where the interpreter does, and nothing beside them.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use crate::support::run_with_stdin;

/// As setuptools writes it for `pip install --editable` of a project without `src`.
const FINDER: &str = r#"
import sys
from importlib.machinery import all_suffixes
from importlib.util import spec_from_file_location
from pathlib import Path

MAPPING = {mapping}

class _EditableFinder:
    @classmethod
    def find_spec(cls, fullname, _path=None, _target=None):
        place = MAPPING.get(fullname)
        candidates = [Path(place, '__init__.py'), *(Path(place + end) for end in all_suffixes())] if place else []
        for candidate in candidates:
            if candidate.exists():
                return spec_from_file_location(fullname, candidate)

def install():
    sys.meta_path.append(_EditableFinder)
"#;

fn write(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

#[test]
fn packages_that_lie_elsewhere_are_found() {
    // Every job has a /tmp of its own.
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let base = dir.path();
    let made = Command::new("python3")
        .args(["-m", "venv", "--without-pip"])
        .arg(base.join("venv"))
        .status()
        .unwrap();
    assert!(made.success(), "python3 cannot make a virtual environment: is python3-venv installed?");
    let lib = std::fs::read_dir(base.join("venv/lib")).unwrap().next().unwrap().unwrap().path();
    let site = lib.join("site-packages");

    write(&base.join("project/src/by_path/__init__.py"), "N = 1\n");
    write(&site.join("by_path.pth"), &format!("{}\n", base.join("project/src").display()));

    let flat = base.join("flat");
    write(&flat.join("by_hook/__init__.py"), "from .inner import N\n");
    write(&flat.join("by_hook/inner.py"), "N = 2\n");
    write(&flat.join("single.py"), "N = 3\n");
    write(&flat.join("secret.txt"), "not a module\n");
    let mapping = serde_json::json!({ "by_hook": flat.join("by_hook"), "single": flat.join("single") });
    write(&site.join("__editable___flat_1_0_finder.py"), &FINDER.replace("{mapping}", &mapping.to_string()));
    write(
        &site.join("__editable__.flat-1.0.pth"),
        "import __editable___flat_1_0_finder; __editable___flat_1_0_finder.install()\n",
    );

    write(&base.join("store/by_link/__init__.py"), "N = 4\n");
    symlink(base.join("store/by_link"), site.join("by_link")).unwrap();
    write(&base.join("store/secret.txt"), "not a module\n");

    for file in ["__init__.py", "deep/__init__.py", "deep/inner.py"] {
        write(&base.join("cache/0123/by_files").join(file), "N = 5\n");
        let link = site.join("by_files").join(file);
        std::fs::create_dir_all(link.parent().unwrap()).unwrap();
        symlink(base.join("cache/0123/by_files").join(file), link).unwrap();
    }

    let code = format!(
        "import os\nimport by_path, by_hook, single, by_link, by_files.deep.inner\n\
         print(by_path.N, by_hook.N, single.N, by_link.N, by_files.deep.inner.N)\n\
         print([path for path in ('flat/secret.txt', 'store/secret.txt', 'venv/..') if os.path.exists('{0}/' + path)],\n    \
         sorted(os.listdir('{0}/flat')))\n",
        base.display()
    );
    let python = format!("environments.default.python={}", base.join("venv/bin/python").display());
    let imports = "environments.default.imports=[\"by_hook\", \"by_link\"]";
    for warm in [&[][..], &["--warm", "--set", imports]] {
        let args = ["exec", "-", "--set", &python].into_iter().chain(warm.iter().copied());
        let ran = run_with_stdin(args, code.as_bytes());
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{ran:?}");
        assert_eq!(ran.stdout, "1 2 3 4 5\n['venv/..'] ['by_hook', 'single.py']\n");
    }
}
