//! What a job can see of the file system: an interpreter, its libraries, a handful of files in `/etc`.
//!
//! Everything else of the host is not hidden but absent. What is there keeps its host path, so that an
//! interpreter finds itself; symbolic links on the way are made again.

use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use super::interpreter::ask;
use crate::config::Environment;
use crate::sandbox::outer_wall::rootfs::{Entry, Root};

/// Why an environment cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RootError {
    /// The interpreter cannot be run at all.
    #[error("run {python}: {source}")]
    Run {
        /// As configured.
        python: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The interpreter ran and failed.
    #[error("ask {python} for its paths: it ended with {status}: {stderr}")]
    Probe {
        /// As configured.
        python: PathBuf,
        /// How it ended.
        status: std::process::ExitStatus,
        /// The last line of what it said.
        stderr: String,
    },
    /// A path that must be there is not.
    #[error("look at {path}: {source}")]
    Path {
        /// The path.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// What would be hidden from the jobs that it is for.
    #[error("show {path} to jobs: each has {by} to itself, empty; keep it in another directory")]
    Covered {
        /// The path.
        path: PathBuf,
        /// A directory that every job has for itself.
        by: &'static str,
    },
    /// Links that lead nowhere.
    #[error("follow the links of {0}: there are too many")]
    Links(PathBuf),
}

/// What every job has for itself.
const OF_EACH_JOB: [&str; 3] = ["/dev/shm", "/tmp", "/work"];

/// Printed by the interpreter itself: the only one who knows where it looks.
const PROBE: &str = include_str!("probe.py");

#[derive(Deserialize)]
struct Probe {
    executable: PathBuf,
    paths: Vec<PathBuf>,
    /// Where packages lie that are installed by a link, or by a hook that knows the place.
    elsewhere: Vec<PathBuf>,
}

/// Libraries that no interpreter names: the loader finds them by itself.
const LIBRARIES: [&str; 7] =
    ["/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/local/lib"];

/// Data that Python's own library reads, and what the loader needs.
const DATA: [&str; 9] = [
    "/etc/alternatives",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/mime.types",
    "/etc/protocols",
    "/etc/services",
    "/etc/ssl/certs",
    "/etc/ssl/openssl.cnf",
    "/usr/share/zoneinfo",
];

/// Only where the host's network is.
const NETWORK_DATA: [&str; 2] = ["/etc/resolv.conf", "/etc/gai.conf"];

/// The streams of a process as files; they are pipes of the job's user.
const STREAMS: [(&str, &str); 4] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
];

/// Besides the job's own user, whom all that is not the job's belongs to.
const USERS: &str = "nobody:x:65534:65534:nobody:/nonexistent:/bin/false\n";
const GROUPS: &str = "root:x:0:\nnogroup:x:65534:\n";

const HOSTS: &str = "127.0.0.1 localhost\n127.0.1.1 sandpiper\n::1 localhost\n";

/// What programs look up by name, where the host has no such files.
const PROTOCOLS: &str = "ip 0 IP\nicmp 1 ICMP\ntcp 6 TCP\nudp 17 UDP\nipv6 41 IPv6\nipv6-icmp 58 IPv6-ICMP\n\
    sctp 132 SCTP\nudplite 136 UDPLite\n";
const SERVICES: &str = "echo 7/tcp\ndiscard 9/tcp\nftp 21/tcp\nssh 22/tcp\ntelnet 23/tcp\nsmtp 25/tcp mail\n\
    domain 53/tcp\ndomain 53/udp\nhttp 80/tcp www\nkerberos 88/tcp\npop3 110/tcp\nntp 123/udp\nimap2 143/tcp imap\n\
    snmp 161/udp\nldap 389/tcp\nhttps 443/tcp\nhttps 443/udp\nsubmissions 465/tcp\nsyslog 514/udp\nsubmission 587/tcp\n\
    ldaps 636/tcp\nimaps 993/tcp\npop3s 995/tcp\nmysql 3306/tcp\npostgresql 5432/tcp\namqp 5672/tcp\nredis 6379/tcp\n";

impl Root {
    /// Asks the interpreter where it looks, and lays out the root for it.
    ///
    /// Jobs have one of the ids in `uids`, and all of them the same name.
    pub(in crate::sandbox) fn of(
        environment: &Environment,
        network: bool,
        uids: std::ops::Range<u32>,
    ) -> Result<Self, RootError> {
        let users = uids.clone().map(|uid| format!("job:x:{uid}:{uid}:job:/tmp:/bin/false\n"));
        let groups = uids.map(|uid| format!("job:x:{uid}:\n"));
        let probe = probe(&environment.python)?;
        let mut root = Self::default();
        for path in LIBRARIES.iter().map(Path::new).filter(|path| path.symlink_metadata().is_ok()) {
            root.expose(path)?;
        }
        root.expose(&environment.python)?;
        root.expose(&probe.executable)?;
        for path in probe.paths.iter().filter(|path| path.exists()) {
            // A system interpreter's prefix is `/usr`: its libraries are there already, and its programs and
            // documents are nobody's business.
            if !matches!(path.to_str(), Some("/" | "/usr" | "/usr/local")) {
                root.expose(path)?;
            }
        }
        for path in &probe.elsewhere {
            let real = path.canonicalize().unwrap_or_else(|_| path.clone());
            let hidden = OF_EACH_JOB.iter().find(|own| real.starts_with(own));
            let shown = match hidden {
                Some(by) => Err(RootError::Covered { path: real, by }),
                None => root.expose(path),
            };
            if let Err(error) = shown {
                tracing::warn!(%error, "a package of the environment is not there for jobs");
            }
        }
        let data = DATA.iter().chain(NETWORK_DATA.iter().filter(|_| network));
        for path in data.map(Path::new).filter(|path| path.exists()) {
            root.expose(path)?;
        }
        for path in &environment.mounts {
            root.expose(path)?;
        }
        for (path, content) in [
            ("/etc/passwd", users.chain([USERS.to_owned()]).collect()),
            ("/etc/group", groups.chain([GROUPS.to_owned()]).collect()),
            ("/etc/hosts", HOSTS.to_owned()),
            (
                "/etc/nsswitch.conf",
                format!(
                    "passwd: files\ngroup: files\nhosts: files{}\nservices: files\nprotocols: files\n",
                    if network { " dns" } else { "" }
                ),
            ),
            // Where the host has its own, those are there already.
            ("/etc/protocols", PROTOCOLS.to_owned()),
            ("/etc/services", SERVICES.to_owned()),
        ] {
            root.add(Path::new(path), Entry::File(content));
        }
        for (path, target) in STREAMS {
            root.add(Path::new(path), Entry::Link(target.into()));
        }
        for by in OF_EACH_JOB {
            if let Some(path) = root.entries.keys().rfind(|path| path.starts_with(by)) {
                return Err(RootError::Covered { path: path.clone(), by });
            }
            root.add(Path::new(by), Entry::Directory);
        }
        root.add(Path::new("/proc"), Entry::Proc);
        Ok(root)
    }

    /// Makes a path of the host visible, with every link on the way to it.
    pub(super) fn expose(&mut self, path: &Path) -> Result<(), RootError> {
        // As the kernel: more links than this are a loop.
        let mut links = 40;
        let mut todo: Vec<PathBuf> = vec![path.to_owned()];
        while let Some(path) = todo.pop() {
            let mut seen = PathBuf::from("/");
            let mut components = path.components().peekable();
            while let Some(component) = components.next() {
                match component {
                    Component::Normal(name) => seen.push(name),
                    Component::ParentDir => {
                        seen.pop();
                    }
                    _ => continue,
                }
                let error = |source| RootError::Path { path: seen.clone(), source };
                let kind = seen.symlink_metadata().map_err(error)?.file_type();
                if kind.is_symlink() {
                    links -= 1;
                    if links == 0 {
                        return Err(RootError::Links(path));
                    }
                    let target = std::fs::read_link(&seen).map_err(error)?;
                    if !self.covers(&seen) {
                        self.add(&seen, Entry::Link(target.clone()));
                    }
                    let parent = seen.parent().unwrap_or(Path::new("/"));
                    todo.push(parent.join(target).join(components.collect::<PathBuf>()));
                    break;
                }
                if components.peek().is_none() && !self.covers(&seen) {
                    let entry = if kind.is_dir() { Entry::HostDirectory } else { Entry::HostFile };
                    self.add(&seen, entry);
                }
            }
        }
        Ok(())
    }

    /// Whether the path is, or lies in, a directory of the host's that is there already.
    fn covers(&self, path: &Path) -> bool {
        path.ancestors().any(|above| self.entries.get(above) == Some(&Entry::HostDirectory))
    }
}

fn probe(python: &Path) -> Result<Probe, RootError> {
    let output =
        ask(python, PROBE, "").map_err(|source| RootError::Run { python: python.to_owned(), source })?;
    let answer = output.status.success().then(|| serde_json::from_slice(&output.stdout).ok()).flatten();
    answer.ok_or_else(|| {
        let stderr = String::from_utf8_lossy(&output.stderr);
        RootError::Probe {
            python: python.to_owned(),
            status: output.status,
            stderr: stderr.trim_end().lines().next_back().unwrap_or_default().to_owned(),
        }
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    #[test]
    fn links_are_made_again_and_followed() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().canonicalize().unwrap();
        std::fs::create_dir(base.join("real")).unwrap();
        std::fs::write(base.join("real/python3.11"), "").unwrap();
        std::os::unix::fs::symlink("python3.11", base.join("real/python3")).unwrap();
        std::os::unix::fs::symlink("real", base.join("link")).unwrap();
        let mut root = Root::default();
        root.expose(&base.join("link/python3")).unwrap();
        assert_eq!(root.entries[&base.join("link")], Entry::Link("real".into()));
        assert_eq!(root.entries[&base.join("real/python3")], Entry::Link("python3.11".into()));
        assert_eq!(root.entries[&base.join("real/python3.11")], Entry::HostFile);
        assert_eq!(root.entries[&base.join("real")], Entry::Directory);
    }

    #[test]
    fn a_whole_directory_replaces_its_pieces() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().canonicalize().unwrap();
        std::fs::write(base.join("file"), "").unwrap();
        let mut root = Root::default();
        root.expose(&base.join("file")).unwrap();
        root.expose(&base).unwrap();
        root.expose(&base.join("file")).unwrap();
        assert_eq!(root.entries[&base], Entry::HostDirectory);
        assert!(!root.entries.contains_key(&base.join("file")));
    }

    #[test]
    fn a_loop_of_links_ends() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().canonicalize().unwrap();
        std::os::unix::fs::symlink("b", base.join("a")).unwrap();
        std::os::unix::fs::symlink("a", base.join("b")).unwrap();
        assert!(matches!(Root::default().expose(&base.join("a")), Err(RootError::Links(_))));
    }
}
