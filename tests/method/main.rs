//! The method on a tiny pipeline with random weights.

#![allow(clippy::unwrap_used, reason = "a test may fail where it stands")]

mod learning;
mod regeneration;
mod tiny;
