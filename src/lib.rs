//! Difference Inversion: given three pictures A, A′ and B, make B′ so that A is to A′ as B is
//! to B′, with any frozen text-to-image diffusion model.

pub mod error;
pub mod models;
pub mod weights;

pub use error::{Error, Result};
