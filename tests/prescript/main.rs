//! Runs the unit tests of `prescript.py`, which are in python, with the interpreter that jobs run under by default.
#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::path::Path;
use std::process::Command;

/// As the configuration has it by default.
const PYTHON: &str = "/usr/bin/python3";

#[test]
fn the_template_passes_its_own_tests() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/prescript");
    let shim = Path::new(env!("CARGO_BIN_EXE_sandpiper")).with_file_name("libsandpiper_shim.so");
    let ran = Command::new(PYTHON)
        .args(["-B", "-m", "unittest", "discover", "-s"])
        .arg(&tests)
        .env("SP_TEST_SHIM", &shim)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success() && !said.contains("skipped"), "{said}");
}
