//! A job's working directory, held by descriptor: files go in before the job runs and come out when it is dead.
//!
//! The job chooses every name and every kind of file in it, and may have bent it into anything. So nothing here
//! leaves the directory, follows a link or waits: each path is resolved by the kernel beneath the descriptor.

use std::ffi::{CStr, CString, OsStr};
use std::fs::{File, Permissions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;

use nix::NixPath;
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{FchmodatFlags, Mode, fchmod, fchmodat, fstat, fstatat, mkdirat};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use nix::unistd::{Gid, Uid, geteuid, setfsgid, setfsuid};

const FILE_MODE: Mode = Mode::from_bits_truncate(0o644);
const DIRECTORY_MODE: Mode = Mode::from_bits_truncate(0o755);
/// What the owner needs to read a file, and to search a directory.
const READ: u32 = 0o400;
const READ_AND_SEARCH: u32 = 0o500;
/// Up to so many blocks, of 4 KiB mostly, a file system is gone in no time.
const FEW_BLOCKS: u64 = 256;

/// The directory.
#[derive(Debug)]
pub struct JobDir {
    directory: OwnedFd,
    owner: Uid,
}

/// What lies under a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file of so many bytes.
    File(u64),
    /// A directory.
    Directory,
    /// A link, a pipe, a socket, a device: nothing that is ever opened here.
    Other,
}

/// An open directory, in the job's directory or below it.
#[derive(Debug)]
pub struct Folder(Dir);

impl JobDir {
    /// Takes over a descriptor that a job's process sent, if it is what it should be: a directory in a file
    /// system in memory, of the job's own user.
    pub fn new(directory: OwnedFd, owner: u32) -> io::Result<Self> {
        let owner = Uid::from_raw(owner);
        let stat = fstat(&directory)?;
        let is_directory = stat.st_mode & libc::S_IFMT == libc::S_IFDIR;
        if !is_directory
            || stat.st_uid != owner.as_raw()
            || fstatfs(&directory)?.filesystem_type() != TMPFS_MAGIC
        {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(Self { directory, owner })
    }

    /// Runs `action` with the job's rights to files instead of ours, on this thread alone: whatever the job has
    /// made of its files, they are touched by nobody who may do more than itself.
    pub fn as_owner<R>(&self, action: impl FnOnce() -> R) -> io::Result<R> {
        let _borrowed = Rights::borrow(self.owner)?;
        Ok(action())
    }

    /// Creates a file that is not there yet, and the directories on the way to it.
    pub fn create(&self, path: &str) -> io::Result<File> {
        create(&self.directory, path, OFlag::O_EXCL, |made, mode| Ok(fchmod(made, mode)?))
    }

    /// The directory itself, to be read. Only when nothing of the job is alive: modes may be changed for it.
    pub fn read(&self) -> io::Result<Folder> {
        if fstat(&self.directory)?.st_mode & READ_AND_SEARCH != READ_AND_SEARCH {
            // There is no name to change it by, other than this.
            let own = format!("/proc/self/fd/{}", self.directory.as_raw_fd());
            std::fs::set_permissions(own, Permissions::from_mode(0o700))?;
        }
        Folder::open(&self.directory, c".")
    }

    /// A regular file for reading, by a path that was found below [`JobDir::read`].
    pub fn open(&self, path: &str) -> io::Result<File> {
        let file = File::from(open(&self.directory, path, OFlag::O_RDONLY)?);
        if file.metadata()?.is_file() { Ok(file) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }

    /// Little was written: dropping the directory, and so its file system, takes no time to speak of.
    pub fn is_small(&self) -> bool {
        fstatfs(&self.directory)
            .is_ok_and(|stat| stat.blocks().saturating_sub(stat.blocks_free()) <= FEW_BLOCKS)
    }

    /// Bytes that its file system holds.
    pub fn used(&self) -> u64 {
        fstatfs(&self.directory).map_or(0, |stat| {
            let block = u64::try_from(stat.block_size()).unwrap_or_default();
            stat.blocks().saturating_sub(stat.blocks_free()).saturating_mul(block)
        })
    }
}

/// Another user's rights to files, for this thread, until they are given back.
#[derive(Debug)]
struct Rights {
    own: Option<(Uid, Gid)>,
}

impl Rights {
    fn borrow(user: Uid) -> io::Result<Self> {
        if user == geteuid() {
            return Ok(Self { own: None });
        }
        // In a job's directory, user and group have the same number. These calls cannot fail, only do nothing.
        let own_group = setfsgid(Gid::from_raw(user.as_raw()));
        let rights = Self { own: Some((setfsuid(user), own_group)) };
        let nobody = Uid::from_raw(u32::MAX);
        if setfsuid(nobody) == user { Ok(rights) } else { Err(io::ErrorKind::PermissionDenied.into()) }
    }
}

impl Drop for Rights {
    fn drop(&mut self) {
        if let Some((user, group)) = self.own {
            setfsuid(user);
            setfsgid(group);
        }
    }
}

impl Folder {
    fn open(parent: impl AsFd, name: &CStr) -> io::Result<Self> {
        Ok(Self(Dir::from_fd(open(parent, name, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?)?))
    }

    /// Every name in it but `.` and `..`, as many bytes as they are.
    pub fn names(&mut self) -> io::Result<Vec<CString>> {
        let mut names = Vec::new();
        for entry in self.0.iter() {
            let entry = entry?;
            if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                names.push(entry.file_name().to_owned());
            }
        }
        Ok(names)
    }

    /// What lies under a name of its own. A file or directory that its owner made unreadable becomes readable.
    pub fn look(&self, name: &CStr) -> io::Result<Kind> {
        let stat = fstatat(&self.0, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        let (kind, needed) = match stat.st_mode & libc::S_IFMT {
            libc::S_IFREG => (Kind::File(u64::try_from(stat.st_size).unwrap_or(0)), READ),
            libc::S_IFDIR => (Kind::Directory, READ_AND_SEARCH),
            _ => return Ok(Kind::Other),
        };
        if stat.st_mode & needed != needed {
            fchmodat(&self.0, name, Mode::S_IRWXU, FchmodatFlags::NoFollowSymlink)?;
        }
        Ok(kind)
    }

    /// A directory in it.
    pub fn enter(&self, name: &CStr) -> io::Result<Self> {
        Self::open(&self.0, name)
    }
}

/// Writes a file below a directory of ours, under a path that somebody else chose. What is there under that path is
/// left as it is, or replaced where `overwrite` says so, unless it is reached through a link.
pub fn write_below(directory: &File, path: &str, content: &[u8], overwrite: bool) -> io::Result<()> {
    let flags = if overwrite { OFlag::O_TRUNC } else { OFlag::O_EXCL };
    create(directory, path, flags, |_, _| Ok(()))?.write_all(content)
}

/// Opens a file for writing, with the directories on the way to it; `made` sees each thing that is new, to
/// give it the mode that our own umask may have taken away.
fn create(
    directory: impl AsFd,
    path: &str,
    flags: OFlag,
    made: impl Fn(&OwnedFd, Mode) -> io::Result<()>,
) -> io::Result<File> {
    let mut folder: Option<OwnedFd> = None;
    let (above, name) = path.rsplit_once('/').unwrap_or(("", path));
    for part in above.split('/').filter(|part| !part.is_empty()) {
        let here = folder.as_ref().map_or(directory.as_fd(), AsFd::as_fd);
        let is_new = match mkdirat(here, part, DIRECTORY_MODE) {
            Ok(()) => true,
            Err(Errno::EEXIST) => false,
            Err(errno) => return Err(errno.into()),
        };
        let next = open(here, part, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
        if is_new {
            made(&next, DIRECTORY_MODE)?;
        }
        folder = Some(next);
    }
    let here = folder.as_ref().map_or(directory.as_fd(), AsFd::as_fd);
    let file = openat2(here, name, how(OFlag::O_WRONLY | OFlag::O_CREAT | flags).mode(FILE_MODE))?;
    made(&file, FILE_MODE)?;
    Ok(file.into())
}

/// The bytes of a name as a path's part.
pub fn part(name: &CStr) -> &OsStr {
    OsStr::from_bytes(name.to_bytes())
}

fn open<P: ?Sized + NixPath>(parent: impl AsFd, path: &P, flags: OFlag) -> io::Result<OwnedFd> {
    Ok(openat2(parent, path, how(flags))?)
}

/// Never outside, never through a link, never waiting for the other end of a pipe.
fn how(flags: OFlag) -> OpenHow {
    let always = OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let resolve =
        ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    OpenHow::new().flags(flags | always).resolve(resolve)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    #![allow(clippy::print_stderr, reason = "a skip is said aloud")]
    use std::os::unix::fs::{MetadataExt, chown, symlink};

    use super::*;

    #[test]
    fn rights_are_the_owners_and_are_given_back() {
        const SOMEBODY: u32 = 54_321;
        if !geteuid().is_root() {
            assert!(std::env::var_os("CI").is_none(), "SKIPPED: needs root");
            return eprintln!("SKIPPED: only root can become somebody else");
        }
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        chown(dir.path(), Some(SOMEBODY), Some(SOMEBODY)).unwrap();
        let job_dir = JobDir::new(File::open(dir.path()).unwrap().into(), SOMEBODY).unwrap();
        let secret = tempfile::NamedTempFile::new().unwrap();
        let denied = job_dir.as_owner(|| {
            drop(job_dir.create("a/b").unwrap());
            File::open(secret.path()).map(drop).map_err(|error| error.kind())
        });
        assert_eq!(denied.unwrap(), Err(io::ErrorKind::PermissionDenied));
        for path in ["a", "a/b"] {
            let made = dir.path().join(path).metadata().unwrap();
            assert_eq!((made.uid(), made.gid()), (SOMEBODY, SOMEBODY), "{path}");
        }
        File::open(secret.path()).unwrap();
        let ours = tempfile::NamedTempFile::new().unwrap().as_file().metadata().unwrap();
        assert_eq!((ours.uid(), ours.gid()), (0, nix::unistd::getegid().as_raw()));
    }

    #[test]
    fn no_path_leads_out() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let job_dir = JobDir::new(File::open(dir.path()).unwrap().into(), geteuid().as_raw()).unwrap();
        drop(job_dir.create("in/file").unwrap());
        symlink("in", dir.path().join("link")).unwrap();
        symlink("in/file", dir.path().join("file")).unwrap();
        for path in
            ["link/file", "file", "..", "../x", "in/../in/file/..", "/etc/passwd", "in", "link/../in/file"]
        {
            assert!(job_dir.open(path).is_err(), "{path}");
        }
        for path in ["link/new", "file", "../new", "in/../../new", "in/file", "in"] {
            assert!(job_dir.create(path).is_err(), "{path}");
        }
        assert!(job_dir.open("in/file").is_ok());
        assert_eq!(std::fs::read_dir(dir.path().join("in")).unwrap().count(), 1);
    }
}
