//! What every room uses: errors, settings, random numbers, progress, files.

pub mod arrays;
pub mod error;
pub mod files;
pub mod hub_problem;
pub mod progress;
pub mod random;
pub mod settings;
pub mod tensors;
