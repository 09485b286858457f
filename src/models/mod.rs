//! The frozen networks, each driven by its `config.json`.

pub mod layers;
pub mod unet;
mod unet_blocks;
mod unet_config;
pub mod vae;
