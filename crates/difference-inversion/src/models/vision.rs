//! Networks that look at pictures.

pub mod clip_image;
pub mod dinov2;
pub mod lpips;
