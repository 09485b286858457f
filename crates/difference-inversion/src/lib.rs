//! Difference Inversion: given three pictures A, A′ and B, make B′ so that A is to A′ as B is
//! to B′, with any frozen text-to-image diffusion model.
//!
//! The method is in [`method`], in the order of the paper; the frozen models it uses are in
//! [`diffusion`]; their networks are in [`models`].
//!
//! ```
//! use std::{ops::ControlFlow, path::Path};
//!
//! use burn::tensor::{Device, FloatDType};
//! use difference_inversion::diffusion::frozen::{ModelPaths, Models};
//! use difference_inversion::image::load_image;
//! use difference_inversion::method::analogy::{self, Example, Target};
//! use difference_inversion::method::generate_config::AnalogyConfig;
//! use difference_inversion::method::learn::Records;
//!
//! # fn main() -> difference_inversion::Result<()> {
//! # std::env::set_current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).unwrap();
//! let paths = ModelPaths {
//!     model: "demo/model".into(),
//!     ..ModelPaths::default()
//! };
//! let models = Models::open(&paths, &Device::flex(), FloatDType::F32)?;
//! let picture = |name| load_image(&Path::new("demo/images").join(name));
//!
//! let mut config = AnalogyConfig::default().with_seed(7);
//! config.learn.steps = 2; // by default 100; the demo model needs 25
//! config.learn.clip_first = 2; // by default 200
//! config.generate.num_inference_steps = 4;
//!
//! let example = Example {
//!     a: picture("a.png")?,
//!     a_prime: picture("a_prime.png")?,
//!     caption_a: None, // the captioner's
//!     caption_a_prime: None,
//! };
//! let mut watch = |_: &_| ControlFlow::Continue(()); // or show progress, or break off
//! let records = Records::default();
//! let learned = analogy::learn(&models, &[example], &config, &records, &mut watch)?;
//!
//! let target = Target {
//!     b: picture("b.png")?,
//!     caption_b: Some("a blue boat on water by day".to_owned()),
//! };
//! let applied = analogy::apply(&models, &learned.tokens, &target, &config, &mut watch)?;
//! assert_eq!(applied.b_prime.dimensions(), (128, 128));
//! # Ok(())
//! # }
//! ```

#[macro_use] // before the modules that use its texts of settings
pub mod util;

pub mod diffusion;
pub mod hub;
pub mod image;
pub mod job;
pub mod method;
pub mod models;
pub mod weights;

pub use dinv_kernels::vector_instructions;
pub use util::error::{Error, Result};
pub use util::settings::Unread;

/// Runs `work` on one of the threads that execute tensor operations on the CPU.
///
/// From any other thread, each operation has to be handed over to these threads and waited for,
/// hundreds of times per call of a network. Here, the thread itself does its share of the work.
pub fn on_workers<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    rayon::scope(|_| work())
}
