//! The labels that are closed sets: every value is known here, and shows from the start.

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
    /// Which way a body goes.
    Body {
        /// A job.
        Job => "job",
        /// A result.
        Result => "result",
    }
}
