//! Difference Inversion: given three pictures A, A′ and B, make B′ so that A is to A′ as B is
//! to B′, with any frozen text-to-image diffusion model.

pub mod analogy;
pub mod delta;
pub mod error;
pub mod eval;
pub mod files;
pub mod hub;
pub mod image;
pub mod joint_space;
mod kernels;
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

/// Runs `work` on one of the threads that tensor operations on the CPU are shared among.
///
/// Elsewhere, each operation has to be handed over to these threads and waited for, hundreds of
/// times for one call of a network; here, the thread itself does its part of them.
pub fn on_workers<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    rayon::scope(|_| work())
}
