//! What the jobs of an environment may execute.
//!
//! Landlock keeps a list of programs. The kernel starts a program through its dynamic loader, which has to be executable
//! itself, and which starts any other file that it is given: `/lib64/ld-linux-x86-64.so.2 /work/program`. So jobs see a
//! copy of it that names a loader of its own, and there is none: the kernel does not look at that where it loads the
//! loader for a program, and cannot start it as one.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::{PrepareError, RootError};
use crate::config::{Environment, Exec};
use crate::sandbox::outer_wall::rootfs::Root;

/// What `system()` and `popen()` of the C library start.
const SHELL: &str = "/bin/sh";

/// No file of any root.
const NO_LOADER: &[u8] = b"/nonexistent\0";

/// Puts what may be executed into the root. If that is a list: all paths that have to be executable for it.
pub(super) fn expose(
    root: &mut Root,
    environment: &Environment,
    landlock: u32,
) -> Result<Option<Vec<CString>>, PrepareError> {
    let listed = match &environment.allow_exec {
        Exec::Nothing => return Ok(None),
        Exec::Anything => {
            if Path::new(SHELL).exists() {
                root.expose(Path::new(SHELL)).map_err(PrepareError::Root)?;
            }
            return Ok(None);
        }
        Exec::Programs(_) if landlock == 0 => return Err(PrepareError::Unlistable),
        Exec::Programs(listed) => listed,
    };
    let mut loaders: Vec<PathBuf> = Vec::new();
    for path in listed.iter().chain([&environment.python, &PathBuf::from(SHELL)]) {
        if let Ok(Some(loader)) = loader(path)
            && !loaders.contains(&loader)
        {
            loaders.push(loader);
        }
    }
    for path in listed.iter().chain(&loaders) {
        root.expose(path).map_err(PrepareError::Root)?;
    }
    for loader in &loaders {
        let unreadable = |source| PrepareError::Root(RootError::Path { path: loader.clone(), source });
        let patched = std::fs::read(loader).and_then(|bytes| {
            without_programs(bytes)
                .ok_or_else(|| io::Error::other("it is no dynamic loader that is known here"))
        });
        root.covers.push((loader.clone(), patched.map_err(unreadable)?));
    }
    let path = |path: &PathBuf| CString::new(path.as_os_str().as_bytes()).unwrap_or_default();
    Ok(Some(listed.iter().chain(&loaders).map(path).collect()))
}

/// The dynamic loader of a program, by its real path; none for scripts, directories and static programs.
fn loader(program: &Path) -> io::Result<Option<PathBuf>> {
    let file = File::open(program)?;
    let mut head = vec![0; 4096];
    let length = file.read_at(&mut head, 0)?;
    head.truncate(length);
    let Some(header) = Headers::of(&head).find(|header| header.kind == PT_INTERP) else { return Ok(None) };
    let mut name = vec![0; usize::from(u16::try_from(header.size).unwrap_or(u16::MAX))];
    file.read_exact_at(&mut name, header.offset)?;
    name.retain(|byte| *byte != 0);
    PathBuf::from(std::ffi::OsString::from_vec(name)).canonicalize().map(Some)
}

/// The same loader, which cannot be started as a program. A note about how it was built gives its place for that.
fn without_programs(mut loader: Vec<u8>) -> Option<Vec<u8>> {
    let note = Headers::of(&loader).find(|header| header.kind == PT_NOTE)?;
    let (offset, size) = (loader.len() as u64, NO_LOADER.len() as u64);
    for (at, value) in [(OFFSET, offset), (SIZE, size), (SIZE_IN_MEMORY, size)] {
        loader[note.at + at..][..8].copy_from_slice(&value.to_le_bytes());
    }
    loader[note.at..][..4].copy_from_slice(&PT_INTERP.to_le_bytes());
    loader.extend_from_slice(NO_LOADER);
    Some(loader)
}

// elf.h: program headers of 64-bit files, little-endian as both machines are.
const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;
const HEADER: usize = 56;
const OFFSET: usize = 8;
const SIZE: usize = 32;
const SIZE_IN_MEMORY: usize = 40;

struct Header {
    /// Where it lies in the file.
    at: usize,
    kind: u32,
    offset: u64,
    size: u64,
}

/// The program headers of a file, or what of them is in its first bytes; none if it is no program.
struct Headers<'a> {
    bytes: &'a [u8],
    next: usize,
    left: u16,
}

impl<'a> Headers<'a> {
    fn of(bytes: &'a [u8]) -> Self {
        const CLASS_64_LITTLE: &[u8] = b"\x7fELF\x02\x01";
        let first = number(bytes, 32).and_then(|at| usize::try_from(at).ok());
        let count = bytes.get(56..58).map(|bytes| u16::from_le_bytes([bytes[0], bytes[1]]));
        match (first, count) {
            (Some(next), Some(left)) if bytes.starts_with(CLASS_64_LITTLE) => Self { bytes, next, left },
            _ => Self { bytes, next: 0, left: 0 },
        }
    }
}

impl Iterator for Headers<'_> {
    type Item = Header;

    fn next(&mut self) -> Option<Header> {
        self.left = self.left.checked_sub(1)?;
        let at = self.next;
        self.next = at.checked_add(HEADER)?;
        let kind = self.bytes.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_le_bytes)?;
        let (offset, size) = (number(self.bytes, at + OFFSET)?, number(self.bytes, at + SIZE)?);
        number(self.bytes, at + SIZE_IN_MEMORY)?;
        Some(Header { at, kind, offset, size })
    }
}

fn number(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at.checked_add(8)?)?.try_into().ok().map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    use super::*;

    #[test]
    fn a_loader_without_programs_starts_none() {
        let loader = loader(Path::new("/bin/sh")).unwrap().unwrap();
        let runs = |loader: &Path| Command::new(loader).args(["/bin/sh", "-c", "exit 7"]).status();
        assert_eq!(runs(&loader).unwrap().code(), Some(7));
        let place = tempfile::tempdir().unwrap();
        let patched = place.path().join("ld.so");
        std::fs::write(&patched, without_programs(std::fs::read(&loader).unwrap()).unwrap()).unwrap();
        std::fs::set_permissions(&patched, PermissionsExt::from_mode(0o755)).unwrap();
        assert_eq!(runs(&patched).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn what_is_no_program_has_no_loader() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("file");
        for content in [&b""[..], b"#!/bin/sh\n", b"\x7fELF\x02\x01", &[0xff; 4096]] {
            std::fs::write(&path, content).unwrap();
            assert_eq!(loader(&path).unwrap(), None);
            assert_eq!(without_programs(content.to_vec()), None);
        }
        let mut cut = std::fs::read(loader(Path::new("/bin/sh")).unwrap().unwrap()).unwrap();
        for length in (0..1024).step_by(7) {
            cut.truncate(1024 - length);
            let _ = without_programs(cut.clone());
        }
        assert_eq!(loader(place.path()).ok().flatten(), None);
    }
}
