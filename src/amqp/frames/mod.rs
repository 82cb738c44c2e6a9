//! The filter of incoming frames under lapin: [`filter`] finds them in the stream, [`sanitize`] makes what a stranger wrote
//! readable for lapin, [`oversize`] knows the bodies that are dropped, and [`reactor`] puts the filter under lapin.

pub(super) mod filter;
pub(super) mod oversize;
pub(super) mod reactor;
pub(super) mod sanitize;
