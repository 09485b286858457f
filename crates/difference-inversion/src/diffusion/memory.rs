//! How much memory learning needs, before anything is loaded.

use std::path::Path;

use burn::tensor::{Device, FloatDType};

use crate::Result;
use crate::diffusion::family::Family;
use crate::diffusion::frozen::ModelPaths;
use crate::diffusion::pipeline::resolution;
use crate::models::denoiser::Memory;
use crate::models::text::clip_text::shared_bytes;
use crate::models::vae::AutoencoderKLConfig;
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
    /// Latents that go through the denoiser at once: [`LearnConfig::rows`](crate::method::learn::LearnConfig::rows).
    pub rows: usize,
    /// Whether the captioner has to be opened.
    pub captions: bool,
}

impl LearningMemory {
    /// About the most bytes that learning on the CPU holds, from headers and configurations only:
    /// the weights that are open at the same time, and the activations of a step.
    ///
    /// # Errors
    /// Whatever is wrong with a file, naming it; [`Error::Missing`](crate::Error::Missing) if the size of the pictures is
    /// not known.
    pub fn peak(&self, paths: &ModelPaths) -> Result<u64> {
        let files = paths.files()?;
        let family = Family::of(&files)?;
        let denoiser = family.denoiser.config(&files)?;
        let autoencoder = &family.autoencoder;
        let vae: AutoencoderKLConfig = files.config(autoencoder.part)?;
        let device = Device::flex();
        let open = |part: &str, dtype| files.weights(part, &device, dtype);
        let vae_dtype = autoencoder.dtype(&vae, self.dtype);
        let encoders = (family.encoders_in(&files)?.iter())
            .map(|encoder| open(encoder.part, self.dtype))
            .collect::<Result<Vec<_>>>()?;
        let mut weights = open(family.denoiser.part, self.dtype)?.bytes_in_memory()
            + open(autoencoder.part, vae_dtype)?.bytes_in_memory()
            + encoders.iter().map(Weights::bytes_in_memory).sum::<u64>();
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
        let latents = resolution(&files, family, &*denoiser, &vae)?
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
