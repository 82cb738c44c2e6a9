//! A job's working directory: its input files on the way in, its artifacts on the way out.

pub(super) mod artifacts;
pub(super) mod brought;
pub(super) mod inputs;
pub(super) mod patterns;
