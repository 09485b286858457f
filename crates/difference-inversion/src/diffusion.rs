//! Frozen diffusion models of any family: their parts, and how they are opened, conditioned and sampled.

pub mod draw;
pub mod family;
pub mod frozen;
pub mod guide;
pub mod joint_space;
pub mod memory;
pub mod model_files;
pub mod pipeline;
mod preview;
pub mod sample;
pub mod text_encoder;
pub(crate) mod textual_inversion;
pub mod words;
