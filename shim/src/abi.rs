//! What the worker and a python process agree on. Knows nobody.

/// The rendered prescript, where python expects its standard input.
pub const SCRIPT_FD: i32 = 0;
/// The stream socket to the worker: a [`Report`] goes out, the assignment comes in.
pub const CONTROL_FD: i32 = 3;
/// What becomes the job's standard input.
pub const STDIN_FD: i32 = 4;
/// The compiled policy, as [`PolicyHeader`] describes it.
pub const POLICY_FD: i32 = 5;
/// The working directory, as a place and nothing more (`O_PATH`). It goes to the worker beside the report, so
/// that files come and go without a path that the job could bend.
pub const WORK_FD: i32 = 6;
/// The first descriptor that must not be open when python starts.
pub const FIRST_CLOSED_FD: i32 = 7;

/// Where the first descriptor of an order lies in the zygote, the job's control socket; the others follow it.
pub const ORDER_FD: i32 = 32;
/// Most descriptors that come with an order.
pub const ORDER_FDS: usize = 12;
/// Longest plan in an order, in bytes.
pub const MAX_ORDER: usize = 16 << 10;

/// Where the shim is seen from inside the sandbox.
pub const SHIM_PATH: &str = "/run/sandpiper/shim.so";
/// The job's working directory.
pub const WORK_DIR: &str = "/work";

/// Length of an encoded [`Report`].
pub const REPORT_LEN: usize = 16;

/// What a starting process tells the worker, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    /// Every wall is up. Two descriptors travel with this report: the filter's listener, then [`WORK_FD`].
    Locked,
    /// Every wall is up, but the kernel gives no listener: forbidden calls kill without a name. [`WORK_FD`]
    /// travels alone.
    LockedWithoutListener,
    /// A zygote has done its imports and waits for orders.
    Ready {
        /// 0 if its memory is in huge pages, else why not, as the kernel gave it.
        huge_pages: i32,
    },
    /// A zygote has carried out an order. The pidfds of init and of the job travel with this report.
    Forked,
    /// A step failed; the process ends before it has seen any code.
    Failed {
        /// Which part of the start it was.
        stage: Stage,
        /// The number of the plan's step, or of the [`LockdownStep`](crate::lockdown::LockdownStep).
        step: u32,
        /// As the kernel gave it.
        errno: i32,
    },
}

/// The process, or the part of its way, that a failure belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Stage {
    /// The helper that makes the job's namespaces.
    Origin = 1,
    /// The pid namespace's first process.
    Init = 2,
    /// The outer wall around the job's process.
    Wall = 3,
    /// Starting the interpreter.
    Exec = 4,
    /// The inner wall.
    Lockdown = 5,
    /// What a zygote does for a warm start.
    Zygote = 6,
}

impl Stage {
    fn from_number(number: u32) -> Option<Self> {
        [Self::Origin, Self::Init, Self::Wall, Self::Exec, Self::Lockdown, Self::Zygote]
            .into_iter()
            .find(|stage| *stage as u32 == number)
    }
}

const LOCKED: u32 = 0x5350_0001;
const LOCKED_WITHOUT_LISTENER: u32 = 0x5350_0002;
const FAILED: u32 = 0x5350_0003;
const READY: u32 = 0x5350_0004;
const FORKED: u32 = 0x5350_0005;

impl Report {
    /// The bytes on the wire: four little-endian numbers (kind, stage, step, errno).
    #[must_use]
    pub fn encode(self) -> [u8; REPORT_LEN] {
        let (kind, stage, step, errno) = match self {
            Self::Locked => (LOCKED, 0, 0, 0),
            Self::LockedWithoutListener => (LOCKED_WITHOUT_LISTENER, 0, 0, 0),
            Self::Ready { huge_pages } => (READY, 0, 0, huge_pages),
            Self::Forked => (FORKED, 0, 0, 0),
            Self::Failed { stage, step, errno } => (FAILED, stage as u32, step, errno),
        };
        let mut bytes = [0; REPORT_LEN];
        bytes[0..4].copy_from_slice(&kind.to_le_bytes());
        bytes[4..8].copy_from_slice(&stage.to_le_bytes());
        bytes[8..12].copy_from_slice(&step.to_le_bytes());
        bytes[12..16].copy_from_slice(&errno.to_le_bytes());
        bytes
    }

    /// Reads a report; `None` for anything that is not one, for the peer may be hostile.
    #[must_use]
    pub fn decode(bytes: &[u8; REPORT_LEN]) -> Option<Self> {
        let number = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        // What is not used is zero; anything else is no report.
        let empty = bytes[4..].iter().all(|byte| *byte == 0);
        match number(0) {
            LOCKED if empty => Some(Self::Locked),
            LOCKED_WITHOUT_LISTENER if empty => Some(Self::LockedWithoutListener),
            READY if bytes[4..12].iter().all(|byte| *byte == 0) => {
                Some(Self::Ready { huge_pages: number(12).cast_signed() })
            }
            FORKED if empty => Some(Self::Forked),
            FAILED => Some(Self::Failed {
                stage: Stage::from_number(number(4))?,
                step: number(8),
                errno: number(12).cast_signed(),
            }),
            _ => None,
        }
    }
}

/// The head of a policy as the worker writes it once and every python process maps it.
///
/// After it come the programs, first those with a listener, then those without; each is its number of
/// instructions as a `u32` and the instructions, 8 bytes each, as the kernel takes them. What follows them is a
/// [plan](crate::plan) that limits what can be executed, in most cases an empty one.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct PolicyHeader {
    /// [`POLICY_MAGIC`].
    pub magic: u32,
    /// 1 where the programs allow sockets.
    pub network: u32,
    /// Programs to install, in order, the last one with a listener.
    pub notifying: u32,
    /// Programs to install where no listener can be had.
    pub fallback: u32,
    /// 1 where supplementary groups cannot be dropped, as in a user namespace made without privilege.
    pub keeps_groups: u32,
}

/// Marks a policy; changes with its layout.
pub const POLICY_MAGIC: u32 = 0x5350_5001;
/// Size of [`PolicyHeader`].
pub const POLICY_HEADER_LEN: usize = size_of::<PolicyHeader>();
/// Most instructions the kernel takes in one program (`BPF_MAXINSNS`).
pub const MAX_INSTRUCTIONS: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_survive_the_wire() {
        let all = [
            Report::Locked,
            Report::LockedWithoutListener,
            Report::Ready { huge_pages: 0 },
            Report::Ready { huge_pages: 22 },
            Report::Forked,
            Report::Failed { stage: Stage::Wall, step: 7, errno: 13 },
            Report::Failed { stage: Stage::Lockdown, step: u32::MAX, errno: -1 },
        ];
        for report in all {
            assert_eq!(Report::decode(&report.encode()), Some(report));
        }
    }

    #[test]
    fn what_is_not_a_report_is_refused() {
        assert_eq!(Report::decode(&[0; REPORT_LEN]), None);
        assert_eq!(Report::decode(&[0xff; REPORT_LEN]), None);
        let mut unknown_stage = Report::Failed { stage: Stage::Init, step: 1, errno: 1 }.encode();
        unknown_stage[4] = 99;
        assert_eq!(Report::decode(&unknown_stage), None);
    }
}
