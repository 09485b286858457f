//! Shared parts: errors, settings, random numbers, progress, files.

#[macro_use]
pub mod settings;

pub mod arrays;
pub mod caption_problem;
pub mod digest;
pub mod error;
pub mod files;
pub(crate) mod foreign;
pub mod hub_problem;
pub mod machine;
pub mod progress;
pub mod random;
pub mod tensors;
pub mod vector;
