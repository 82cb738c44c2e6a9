//! How an interpreter is started, for jobs and to be asked something; and the shim that it loads.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::PrepareError;
use crate::config;
use crate::script::{Prescript, TemplateError};
use crate::sys::fd;
use crate::sys::launch::Program;

/// Python reads the prescript as its standard input: no path that another could see, and an empty command line.
pub(super) fn program(environment: &config::Environment, zygote: bool) -> Program {
    let string = |bytes: &[u8]| CString::new(bytes).unwrap_or_default();
    let python = string(environment.python.as_os_str().as_bytes());
    // Isolated: neither variables nor the working directory nor a user's own packages have a say.
    let arguments = vec![python.clone(), c"-I".into(), c"-".into()];
    let mut variables: Vec<CString> =
        vec![c"HOME=/tmp".into(), c"PATH=/usr/local/bin:/usr/bin:/bin".into(), c"LANG=C.UTF-8".into()];
    if zygote {
        // A library that starts threads when it is imported would lose them in every fork.
        let pools = ["MKL", "NUMEXPR", "OMP", "OPENBLAS", "VECLIB"];
        variables.extend(pools.iter().map(|pool| string(format!("{pool}_NUM_THREADS=1").as_bytes())));
    }
    Program::new(python, arguments, variables)
}

/// As the interpreter compiles it.
pub(super) fn prescript(name: &str, python: &Path) -> Result<Prescript, TemplateError> {
    let mut prescript = Prescript::plain()?;
    let compiled = ask(python, Prescript::COMPILER, prescript.source());
    let compiled = compiled.ok().filter(|output| output.status.success());
    let line = compiled.and_then(|output| String::from_utf8(output.stdout).ok());
    if !line.is_some_and(|line| prescript.take_compiled(&line)) {
        tracing::warn!(
            environment = name,
            "the prescript could not be compiled; each cold job does it, which takes longer"
        );
    }
    Ok(prescript)
}

/// What the interpreter prints that runs `program` and reads `input`.
pub(super) fn ask(python: &Path, program: &str, input: &str) -> std::io::Result<Output> {
    let input = fd::sealed_file(c"input", input.as_bytes())?;
    Command::new(python)
        .args(["-I", "-c", program])
        .env_clear()
        .env("LANG", "C.UTF-8")
        .stdin(std::fs::File::from(input))
        .output()
}

/// The shim as configured, or beside the worker's own binary.
pub(super) fn find_shim(configured: Option<&Path>) -> Result<PathBuf, PrepareError> {
    let path = match configured {
        Some(path) => path.to_owned(),
        None => {
            let binary = std::env::current_exe().map_err(PrepareError::Io)?;
            binary.with_file_name("libsandpiper_shim.so")
        }
    };
    path.canonicalize().map_err(|source| PrepareError::Shim { path, source })
}
