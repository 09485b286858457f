//! The library against diffusers and transformers, and the method on tiny pipelines with random weights.

#![allow(
    clippy::panic,
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may fail where it stands, and shows its figures"
)]

#[path = "../../../../tests/common/mod.rs"]
mod common;

mod another_family;
mod checkpoints;
mod chroma;
mod families;
mod flux;
mod fuzz;
mod golden_captioner;
mod golden_clip;
mod golden_diffusion;
mod golden_samplers;
#[cfg(feature = "webgpu")]
mod gpu;
mod half_precision;
mod klein;
mod learning;
mod lora;
mod misfits;
mod model_folders;
mod paper_map;
mod parts;
mod regeneration;
mod rooms;
mod sd3;
mod single_file;
mod tiny;
mod transformer_files;
mod two_encoders;
mod z_image;
