//! Memory and ways to share it. The cgroup counts what is touched; anonymous memory and files shared after
//! a fork are all that python libraries use.

use super::super::args;
use super::super::rules::{Class, Group, Until};

pub(super) const GROUPS: &[Group] = &[
    Group {
        class: Class::Allow,
        until: Until::InnerWall,
        reason: "own memory; writable and executable too, which ctypes callbacks need",
        calls: &[
            ("munmap", 11, 215),
            ("mremap", 25, 216),
            ("mprotect", 10, 226),
            ("brk", 12, 214),
            ("msync", 26, 227),
            ("mincore", 27, 232),
            ("pkey_mprotect", 329, 288),
            ("pkey_alloc", 330, 289),
            ("pkey_free", 331, 290),
            ("mseal", 462, 462),
            ("map_shadow_stack", 453, 453),
        ],
    },
    Group {
        class: Class::Partly(&args::MMAP),
        until: Until::InnerWall,
        reason: "own memory, and files that the job may read",
        calls: &[("mmap", 9, 222)],
    },
    Group {
        class: Class::Partly(&args::MADVISE),
        until: Until::InnerWall,
        reason: "how own memory will be used: allocators give it back this way",
        calls: &[("madvise", 28, 233)],
    },
    Group {
        class: Class::Allow,
        until: Until::InnerWall,
        reason: "locked memory for secrets, within RLIMIT_MEMLOCK",
        calls: &[
            ("mlock", 149, 228),
            ("mlock2", 325, 284),
            ("munlock", 150, 229),
            ("mlockall", 151, 230),
            ("munlockall", 152, 231),
        ],
    },
    Group {
        class: Class::Allow,
        until: Until::InnerWall,
        reason: "where own memory lies among the nodes (numpy, OpenBLAS)",
        calls: &[("get_mempolicy", 239, 236)],
    },
    Group {
        class: Class::Quiet(libc::ENOSYS),
        until: Until::InnerWall,
        reason: "the kernel keeps a policy for each page of a file, which no account has; libraries know kernels without",
        calls: &[("set_mempolicy", 238, 237), ("mbind", 237, 235), ("set_mempolicy_home_node", 450, 450)],
    },
    Group {
        class: Class::Refuse(libc::EPERM),
        until: Until::InnerWall,
        reason: "moves pages or advises on the memory of other processes",
        calls: &[("migrate_pages", 256, 238), ("move_pages", 279, 239), ("process_madvise", 440, 440)],
    },
    Group {
        class: Class::UnlessListed(&[
            Class::ByMemoryGroup(&[Class::Partly(&args::MEMFD), Class::Quiet(libc::ENOSYS)]),
            Class::Quiet(libc::ENOSYS),
        ]),
        until: Until::InnerWall,
        reason: "memory as a file, which only a control group counts, and which Landlock lets everybody execute; \
                 libraries know kernels without",
        calls: &[("memfd_create", 319, 279)],
    },
    Group {
        class: Class::Refuse(libc::ENOSYS),
        until: Until::InnerWall,
        reason: "memory the host cannot see, rarely built in",
        calls: &[("memfd_secret", 447, 447)],
    },
    Group {
        class: Class::Refuse(libc::ENOSYS),
        until: Until::InnerWall,
        reason: "long deprecated and a source of bugs",
        calls: &[("remap_file_pages", 216, 234)],
    },
    Group {
        class: Class::Refuse(libc::ENOSYS),
        until: Until::InnerWall,
        reason: "tells what other jobs read of the files that all share",
        calls: &[("cachestat", 451, 451)],
    },
    Group {
        class: Class::Kill,
        until: Until::Never,
        reason: "stops the kernel in the middle of an access: the tool of kernel exploits",
        calls: &[("userfaultfd", 323, 282)],
    },
    Group {
        class: Class::Refuse(libc::ENOSYS),
        until: Until::InnerWall,
        reason: "System V memory, semaphores and queues outlive the process that made them; libraries know kernels without",
        calls: &[
            ("shmget", 29, 194),
            ("shmat", 30, 196),
            ("shmdt", 67, 197),
            ("shmctl", 31, 195),
            ("semget", 64, 190),
            ("semop", 65, 193),
            ("semtimedop", 220, 192),
            ("semctl", 66, 191),
            ("msgget", 68, 186),
            ("msgsnd", 69, 189),
            ("msgrcv", 70, 188),
            ("msgctl", 71, 187),
        ],
    },
    Group {
        class: Class::Refuse(libc::ENOSYS),
        until: Until::InnerWall,
        reason: "message queues outlive the process that made them; libraries know kernels without",
        calls: &[
            ("mq_open", 240, 180),
            ("mq_unlink", 241, 181),
            ("mq_timedsend", 242, 182),
            ("mq_timedreceive", 243, 183),
            ("mq_notify", 244, 184),
            ("mq_getsetattr", 245, 185),
        ],
    },
];
