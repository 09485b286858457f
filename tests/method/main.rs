//! The method on a tiny pipeline with random weights.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may fail where it stands, and shows its figures"
)]

mod checkpoints;
mod families;
mod learning;
mod misfits;
mod paper_map;
mod regeneration;
mod tiny;
mod two_encoders;
