//! Difference Inversion: given three pictures A, A′ and B, make B′ so that A is to A′ as B is
//! to B′, with any frozen text-to-image diffusion model.

pub mod analogy;
pub mod delta;
pub mod error;
pub mod files;
pub mod image;
pub mod learn;
pub mod loss;
pub mod models;
pub mod noise;
pub mod pez;
pub mod pipeline;
pub mod progress;
pub mod prompt;
mod random;
pub mod sample;
pub mod text_encoder;
pub mod tokens;
pub mod weights;

pub use error::{Error, Result};
