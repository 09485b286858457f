//! Vision networks.

pub mod clip_image;
pub mod dinov2;
pub mod lpips;
