//! A connection's life: [`dialer`] finds a broker, [`link`] is the connection while it is up, [`supervisor`] dials anew after
//! a loss, and [`signer`] signs what a worker writes on a job for the next one.

pub(super) mod dialer;
pub(super) mod link;
pub(super) mod signer;
pub(super) mod supervisor;
