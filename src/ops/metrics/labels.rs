//! The labels: closed sets, whose every value shows from the start, and open ones that stay bounded.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

/// A closed set of label values.
pub(super) trait Label: Copy + 'static {
    const ALL: &'static [Self];
    fn label(self) -> &'static str;
}

macro_rules! label {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident => $label:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($(#[$variant_doc])* $variant,)+ }
        impl $name {
            /// The label's value.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $label,)+ }
            }
        }
        impl Label for $name {
            const ALL: &'static [Self] = &[$(Self::$variant,)+];
            fn label(self) -> &'static str {
                self.as_str()
            }
        }
    };
}

label! {
    /// How a delivery was given back to the broker.
    Settled {
        /// Acked after its reply was confirmed.
        Acked => "acked",
        /// Given back, to be delivered again.
        Requeued => "requeued",
        /// Stored in the dead queue, then acked.
        DeadLettered => "dead_lettered",
        /// Replaced by a copy that says how often it was delivered, where the queue does not.
        Counted => "counted",
        /// The channel was gone: the broker delivers it again.
        Lost => "lost",
    }
}

label! {
    /// Why a message went to the dead queue.
    DeadReason {
        /// Not a job at all.
        Malformed => "malformed",
        /// Larger than the worker reads.
        TooLarge => "too_large",
        /// Delivered so often that the broker would drop it next.
        Poison => "poison",
    }
}

label! {
    /// What became of one attempt to publish.
    Published {
        /// The broker took it on.
        Confirmed => "confirmed",
        /// Its queue does not exist.
        Returned => "returned",
        /// The broker refused it.
        Nacked => "nacked",
        /// The broker closed the channel over it.
        Refused => "refused",
        /// No confirm in time.
        TimedOut => "timed_out",
        /// Its requester no longer listens, and nobody else could read it.
        Dropped => "dropped",
        /// The channel or connection broke.
        Failed => "failed",
    }
}

label! {
    /// What a broker connection is for.
    Role {
        /// Takes jobs on and acks them.
        Consume => "consume",
        /// Publishes results.
        Publish => "publish",
    }
}

label! {
    /// Where a job's process came from.
    Start {
        /// A new interpreter.
        Cold => "cold",
        /// A fork of one that has done its imports.
        Warm => "warm",
    }
}

label! {
    /// Which way a body goes.
    Body {
        /// A job.
        Job => "job",
        /// A result.
        Result => "result",
    }
}

/// A label whose values are not known here: names of the configuration, or of system calls. The first so many
/// are taken as they are; all further ones share one value, so that nobody can make the worker forget its limits.
#[derive(Debug)]
pub(super) struct BoundedLabel {
    most: usize,
    rest: &'static str,
    seen: Mutex<BTreeSet<String>>,
}

impl BoundedLabel {
    pub(super) fn new(most: usize, rest: &'static str) -> Self {
        Self { most, rest, seen: Mutex::default() }
    }

    /// The value to count `name` under.
    pub(super) fn bounded<'a>(&self, name: &'a str) -> &'a str {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.contains(name) {
            return name;
        }
        if seen.len() == self.most {
            return self.rest;
        }
        seen.insert(name.to_owned());
        name
    }
}

/// A system call's name as the kernel's table has it. A number without a name (`syscall_999`, `i386:11`) is for
/// the job to choose, a thousand of them an ABI: as a label they are all one.
pub(super) fn syscall<'a>(names: &BoundedLabel, name: &'a str) -> &'a str {
    let nameless = name.contains(':') || name.starts_with("syscall_");
    if nameless { names.rest } else { names.bounded(name) }
}
