//! How much memory learning needs, before anything is loaded.

use std::path::Path;

use burn::tensor::{Device, FloatDType};

use super::models::ModelPaths;
use crate::Result;
use crate::models::clip_text::shared_bytes;
use crate::models::denoiser::Memory;
use crate::models::unet_denoiser;
use crate::models::vae::AutoencoderKLConfig;
use crate::pipeline::resolution;
use crate::weights::Weights;

/// The program itself: code, tokenizers, pictures.
const PROGRAM: u64 = 64 << 20;

/// The image tower among the weights of a `CLIPModel`.
const IMAGE_TOWER: [&str; 2] = ["vision_model", "visual_projection"];

/// What decides how much memory learning takes.
#[derive(Debug, Clone, Copy)]
pub struct LearningMemory {
    /// The type of the weights.
    pub dtype: FloatDType,
    /// Whether time or memory is saved.
    pub memory: Memory,
    /// Latents that go through the denoiser at once: [`LearnConfig::rows`](crate::learn::LearnConfig::rows).
    pub rows: usize,
    /// Whether the captioner has to be opened.
    pub captions: bool,
}

impl LearningMemory {
    /// About the most bytes that learning on the CPU holds, from headers and configurations alone:
    /// the weights that are open at the same time, and the activations of a step.
    ///
    /// # Errors
    /// Whatever is wrong with a file, naming it; [`Error::Missing`](crate::Error::Missing) if the size of the pictures is
    /// not known.
    pub fn peak(&self, paths: &ModelPaths) -> Result<u64> {
        let files = paths.files()?;
        let denoiser = unet_denoiser::open(&files)?;
        let vae: AutoencoderKLConfig = files.config("vae")?;
        let two_encoders = files.has("text_encoder_2");
        let upcast = two_encoders && vae.force_upcast.unwrap_or(false);
        let device = Device::flex();
        let mut weights = 0;
        let mut encoders = Vec::new();
        for name in ["unet", "vae", "text_encoder", "text_encoder_2"] {
            let dtype = match upcast && name == "vae" {
                true => FloatDType::F32,
                false => self.dtype,
            };
            if name != "text_encoder_2" || two_encoders {
                let part = files.weights(name, &device, dtype)?;
                weights += part.bytes_in_memory();
                if name.starts_with("text_encoder") {
                    encoders.push(part);
                }
            }
        }
        let folder = |folder: &Path| match folder.is_dir() {
            true => Weights::open(folder, &device, self.dtype).map(Some),
            false => Ok(None),
        };
        // What looks at pictures, and is closed before the first step if memory is saved.
        let mut viewers = 0;
        for clip in paths.clip_folders() {
            if let Some(clip) = folder(&clip)? {
                let tower: u64 = IMAGE_TOWER
                    .map(|part| clip.scope(part).bytes_in_memory())
                    .iter()
                    .sum();
                viewers += tower;
                weights += clip.bytes_in_memory() - tower;
                for encoder in &encoders {
                    weights -= shared_bytes(&clip, encoder)?;
                }
            }
        }
        if self.captions {
            let captioner = folder(&paths.captioner_folder())?;
            viewers += captioner.map_or(0, |captioner| captioner.bytes_in_memory());
        }
        let factor = vae.downsampling_factor();
        let latents = resolution(&files, &*denoiser, &vae)?
            .map(|side| (side as usize).checked_div(factor).unwrap_or(0));
        let step = denoiser.step_bytes(self.rows, latents, self.memory)?;
        Ok(PROGRAM
            + weights
            + match self.memory {
                Memory::Normal => viewers + step,
                Memory::Low => viewers.max(step),
            })
    }
}
