// A flow-matching transformer by itself, for `step.rs` and `examples/parity.rs`.

use std::path::Path;
use std::sync::Arc;

use difference_inversion::Result;
use difference_inversion::models::denoiser::{
    Denoiser, Surroundings, chroma_denoiser, flux_denoiser, flux2_denoiser, sd3_denoiser,
    z_image_denoiser,
};
use difference_inversion::weights::{Weights, read_config};
use serde_json::Value;

/// The network in `folder`, which its configuration names, built from `weights`.
///
/// # Errors
/// If a file is invalid; the error names it.
pub(crate) fn open(folder: &Path, weights: &Weights) -> Result<Arc<dyn Denoiser>> {
    let path = folder.join("config.json");
    let config: Value = read_config(&path)?;
    let open = match config["_class_name"].as_str() {
        Some("FluxTransformer2DModel") => flux_denoiser::open,
        Some("ChromaTransformer2DModel") => chroma_denoiser::open,
        Some("Flux2Transformer2DModel") => flux2_denoiser::open,
        Some("ZImageTransformer2DModel") => z_image_denoiser::open,
        _ => sd3_denoiser::open,
    };
    // With T5 among the text encoders, nothing is put in its place.
    let around = Surroundings {
        class: "",
        encoder_widths: &[0; 3],
        projections: &[None; 3],
        latent_channels: 16,
        image_channels: 0,
        pixels: 8,
        is_distilled: false,
    };
    open(config, &path)?.load(weights, &around)
}
