//! The frozen networks, each driven by its `config.json`.

pub mod attention;
pub mod clip;
pub mod clip_image;
pub mod clip_text;
pub mod layers;
pub mod tokenizer;
pub mod unet;
mod unet_blocks;
mod unet_config;
pub mod vae;
