//! Whether an environment's python is there, starts, and can load the shim.

use std::process::{Command, Stdio};
use std::time::Duration;

use super::Check;
use crate::config::{Environment, Exec};
use crate::sys::input::readable_within;

/// A python that takes longer to say its version does not serve jobs either.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the prescript imports before any job, and the version. The start of every job.
const ASK: &str = "import _functools, binascii, ctypes, sys; print('.'.join(map(str, sys.version_info[:3])))";

pub(super) fn examine(name: &str, environment: &Environment, landlock: u32) -> Check {
    let python = environment.python.display();
    if landlock == 0 && matches!(environment.allow_exec, Exec::Programs(_)) {
        return Check {
            name: format!("environments.{name}"),
            ok: false,
            required: true,
            detail: "allow_exec lists programs, and the kernel has no Landlock to keep the list".into(),
            without: format!("jobs that ask for the environment {name:?} cannot run"),
            remedy: format!(
                "Linux 5.13 or later with landlock in the lsm= boot parameter, or environments.{name}.allow_exec as \
                 true or false"
            ),
        };
    }
    let tried = start(environment);
    let ok = tried.is_ok();
    Check {
        name: format!("environments.{name}"),
        ok,
        required: true,
        detail: match tried {
            Ok(version) => format!("{python} is Python {version}"),
            Err(error) => format!("{python}: {error}"),
        },
        without: format!("jobs that ask for the environment {name:?} cannot run"),
        remedy: if ok {
            String::new()
        } else {
            format!("install Python 3 with ctypes there, or name another in environments.{name}.python")
        },
    }
}

fn start(environment: &Environment) -> Result<String, String> {
    let mut child = Command::new(&environment.python)
        .args(["-I", "-c", ASK])
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| error.to_string())?;
    // It speaks or ends, and either makes its output readable.
    let spoke = child.stdout.as_ref().is_some_and(|out| readable_within(out, PATIENCE).unwrap_or(false));
    if !spoke {
        // That it is gone already is as good.
        drop(child.kill());
    }
    let out = child.wait_with_output().map_err(|error| error.to_string())?;
    if !spoke {
        return Err(format!("did not start within {} s", PATIENCE.as_secs()));
    }
    let last_line =
        |bytes: &[u8]| String::from_utf8_lossy(bytes).lines().last().unwrap_or_default().to_owned();
    if out.status.success() { Ok(last_line(&out.stdout)) } else { Err(last_line(&out.stderr)) }
}
