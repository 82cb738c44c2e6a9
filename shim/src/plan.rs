//! The outer wall as data: a list of steps, written by the worker, carried out by [`crate::wall`].
//!
//! A plan is one flat string of bytes, so that it crosses a `fork` or a descriptor alike, and so that carrying
//! it out needs neither allocation nor pointers.

use core::ffi::CStr;

/// Defines [`Step`] and both directions of its encoding from one list: number, name for messages, variant,
/// and its fields by kind.
macro_rules! steps {
    ($(
        $(#[$doc:meta])*
        $kind:literal $name:literal $variant:ident {
            $(numbers: $($number:ident),+;)?
            $(strings: $($string:ident),+;)?
            $(data: $data:ident;)?
        }
    )+) => {
        /// One step: a system call, or a few that belong together.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[allow(missing_docs, reason = "a field is the argument of the call that the variant names")]
        pub enum Step<'a> {
            $(
                $(#[$doc])*
                $variant { $($($number: u64,)+)? $($($string: &'a CStr,)+)? $($data: &'a [u8],)? },
            )+
        }

        impl<'a> Step<'a> {
            /// A name for messages.
            #[must_use]
            pub fn name(&self) -> &'static str {
                match self { $(Self::$variant { .. } => $name,)+ }
            }

            /// Appends the step to a plan.
            pub fn encode(&self, plan: &mut Vec<u8>) {
                match *self {
                    $(
                        Self::$variant { $($($number,)+)? $($($string,)+)? $($data,)? } => {
                            plan.push($kind);
                            $($(plan.extend_from_slice(&u64::to_le_bytes($number));)+)?
                            $($(put(plan, CStr::to_bytes_with_nul($string));)+)?
                            $(put(plan, $data);)?
                        }
                    )+
                }
            }

            fn decode(reader: &mut Reader<'a>) -> Option<Self> {
                match reader.byte()? {
                    $(
                        $kind => Some(Self::$variant {
                            $($($number: reader.number()?,)+)?
                            $($($string: reader.string()?,)+)?
                            $($data: reader.data()?,)?
                        }),
                    )+
                    _ => None,
                }
            }
        }
    };
}

steps! {
    /// `unshare(flags)`.
    1 "unshare" Unshare { numbers: flags; }
    /// `setns(fd, kind)`.
    2 "setns" Setns { numbers: fd, kind; }
    /// `mount(source, target, fstype, flags, data)`.
    3 "mount" Mount { numbers: flags; strings: source, target, fstype, options; }
    /// `mount_setattr(target, AT_RECURSIVE, set)`.
    4 "mount_setattr" MountAttributes { numbers: set; strings: target; }
    /// `mkdir(path, mode)`.
    5 "mkdir" Mkdir { numbers: mode; strings: path; }
    /// `symlink(target, path)`.
    6 "symlink" Symlink { strings: target, path; }
    /// Creates a file with this content.
    7 "create file" CreateFile { numbers: mode; strings: path; data: content; }
    /// Writes to a file that exists, in one `write`.
    8 "write file" WriteFile { strings: path; data: content; }
    /// Writes to a cgroup's open `cgroup.procs`, in one `write`.
    9 "enter cgroup" WriteFd { numbers: fd; data: content; }
    /// `chown(path, uid, gid)`.
    10 "chown" Chown { numbers: uid, gid; strings: path; }
    /// `pivot_root(new, old)`, then `chdir("/")`.
    11 "pivot_root" PivotRoot { strings: new, old; }
    /// Makes `new` the root and drops every mount outside it.
    12 "enter root" EnterRoot { strings: new; }
    /// `sethostname(name)`.
    13 "sethostname" Hostname { strings: name; }
    /// Empties the capability bounding and ambient sets.
    14 "drop bounding set" DropBounding {}
    /// Groups (unless they cannot be dropped), gid, uid: in that order, each read back.
    15 "drop groups, gid and uid" Identity { numbers: uid, gid, keeps_groups; }
    /// Empties the permitted, effective and inheritable sets, and reads them back.
    16 "drop capabilities" DropCapabilities {}
    /// `setrlimit(resource, {soft, hard})`.
    17 "setrlimit" Rlimit { numbers: resource, soft, hard; }
    /// `setsid()`.
    18 "setsid" Setsid {}
    /// `umask(mask)`.
    19 "umask" Umask { numbers: mask; }
    /// Every signal to its default action, none blocked.
    20 "reset signals" DefaultSignals {}
    /// `SIGCHLD` ignored, so that children vanish without being waited for.
    21 "ignore children" IgnoreChildren {}
    /// Killed when the thread that started it ends.
    22 "set parent-death signal" DieWithParent {}
    /// `prctl(PR_SET_DUMPABLE, value)`.
    23 "set dumpable" Dumpable { numbers: value; }
    /// No exec gains privileges from here on.
    24 "set no_new_privs" NoNewPrivileges {}
    /// Begins a Landlock ruleset that handles these accesses and scopes.
    25 "landlock_create_ruleset" LandlockBegin { numbers: filesystem, network, scoped; }
    /// Allows accesses beneath a path.
    26 "landlock_add_rule" LandlockAllow { numbers: access; strings: path; }
    /// Puts the ruleset in force.
    27 "landlock_restrict_self" LandlockEnforce {}
    /// Installs a filter: the instructions, 8 bytes each.
    28 "install coarse filter" Filter { data: instructions; }
    /// `dup2(from, to)`.
    29 "dup2" Duplicate { numbers: from, to; }
    /// `close_range(first, ~0)`.
    30 "close_range" CloseFrom { numbers: first; }
    /// `chdir(path)`.
    31 "chdir" Chdir { strings: path; }
    /// No signal blocked; their actions stay.
    32 "unblock signals" UnblockSignals {}
    /// Opens a directory as a place (`O_PATH`), under this number, which no later step may read.
    33 "open directory" OpenDirectory { numbers: to; strings: path; }
    /// `fchdir(fd)`.
    34 "fchdir" ChdirTo { numbers: fd; }
    /// `setpriority(PRIO_PROCESS, 0, value)`.
    35 "setpriority" Nice { numbers: value; }
}

impl<'a> Step<'a> {
    /// The descriptor that the step uses, which whoever carries it out must have.
    #[must_use]
    pub fn descriptor(&self) -> Option<u64> {
        match *self {
            Self::Setns { fd, .. } | Self::WriteFd { fd, .. } | Self::ChdirTo { fd } => Some(fd),
            Self::Duplicate { from, .. } => Some(from),
            _ => None,
        }
    }

    /// The path that the step is about, for messages.
    #[must_use]
    pub fn path(&self) -> Option<&'a CStr> {
        match *self {
            Self::Mount { target, .. } | Self::MountAttributes { target, .. } => Some(target),
            Self::Mkdir { path, .. }
            | Self::Symlink { path, .. }
            | Self::CreateFile { path, .. }
            | Self::WriteFile { path, .. }
            | Self::Chown { path, .. }
            | Self::Chdir { path }
            | Self::OpenDirectory { path, .. }
            | Self::LandlockAllow { path, .. } => Some(path),
            Self::PivotRoot { new, .. } | Self::EnterRoot { new } => Some(new),
            _ => None,
        }
    }
}

/// Length first, as a little-endian `u32`.
fn put(plan: &mut Vec<u8>, bytes: &[u8]) {
    // A plan's strings are paths and programs of at most 32 KiB; a longer one would be cut here and refused by
    // the reader, never misread.
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    plan.extend_from_slice(&length.to_le_bytes());
    plan.extend_from_slice(bytes);
}

/// Reads a plan step by step. Ends at its end, or with one `Err` where it is damaged.
#[derive(Clone, Debug)]
pub struct Steps<'a> {
    reader: Reader<'a>,
    damaged: bool,
}

/// The plan cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Damaged;

impl<'a> Steps<'a> {
    /// Starts at the first step.
    #[must_use]
    pub fn new(plan: &'a [u8]) -> Self {
        Self { reader: Reader(plan), damaged: false }
    }
}

impl<'a> Iterator for Steps<'a> {
    type Item = Result<Step<'a>, Damaged>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.damaged || self.reader.0.is_empty() {
            return None;
        }
        let step = Step::decode(&mut self.reader);
        self.damaged = step.is_none();
        Some(step.ok_or(Damaged))
    }
}

/// The rest of a plan.
#[derive(Clone, Debug)]
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1).map(|bytes| bytes[0])
    }

    fn number(&mut self) -> Option<u64> {
        self.take(8)?.try_into().ok().map(u64::from_le_bytes)
    }

    fn data(&mut self) -> Option<&'a [u8]> {
        let length = u32::from_le_bytes(self.take(4)?.try_into().ok()?);
        self.take(length as usize)
    }

    fn string(&mut self) -> Option<&'a CStr> {
        CStr::from_bytes_with_nul(self.data()?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_survive_encoding() {
        let steps = [
            Step::Mount { flags: 7, source: c"/a", target: c"/b", fstype: c"tmpfs", options: c"size=1" },
            Step::Setsid {},
            Step::CreateFile { mode: 0o644, path: c"/etc/x", content: b"a\0b\xff" },
            Step::Identity { uid: 1000, gid: 1001, keeps_groups: 1 },
            Step::Filter { instructions: &[0; 16] },
        ];
        let mut plan = Vec::new();
        for step in &steps {
            step.encode(&mut plan);
        }
        let read: Result<Vec<_>, _> = Steps::new(&plan).collect();
        assert_eq!(read.as_deref(), Ok(&steps[..]));
    }

    #[test]
    fn every_truncation_is_noticed() {
        let mut plan = Vec::new();
        Step::Mkdir { mode: 0o755, path: c"/usr" }.encode(&mut plan);
        for length in 1..plan.len() {
            assert_eq!(Steps::new(&plan[..length]).collect::<Vec<_>>(), [Err(Damaged)], "cut at {length}");
        }
    }
}
