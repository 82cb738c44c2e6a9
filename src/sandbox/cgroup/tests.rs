//! Against this machine's own control groups, where it gives any.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use super::*;
