//! The frozen networks, each driven by its `config.json`.

pub mod attention;
pub mod captioner;
pub mod denoiser;
pub mod feature_map;
pub mod layers;
mod rotation;
pub mod text;
pub mod vae;
pub mod vision;

#[cfg(test)]
mod kernel_tests;
