//! The frozen networks, each driven by its `config.json`.

pub mod attention;
pub mod attention_control;
mod bert;
mod blip;
mod blip2;
mod blip2_vision;
pub mod captioner;
pub mod clip;
pub mod clip_image;
pub mod clip_text;
pub mod conditions;
pub mod denoiser;
pub mod dinov2;
pub mod feature_map;
pub mod generate;
pub mod layers;
pub mod lpips;
mod opt;
mod qformer;
mod reader;
pub mod tokenizer;
pub mod tower;
pub mod unet;
mod unet_blocks;
mod unet_config;
pub mod unet_denoiser;
mod unet_memory;
pub mod vae;
mod vae_config;
mod vae_tiles;
mod word_pieces;

#[cfg(test)]
mod kernel_tests;
