//! The memory that learning needs, estimated before anything is loaded.

use std::path::Path;

use burn::tensor::{Device, FloatDType};

use crate::Result;
use crate::diffusion::family::Family;
use crate::diffusion::frozen::ModelPaths;
use crate::diffusion::model_files::layout::Layout;
use crate::diffusion::pipeline::{resolution, with_shorter_side};
use crate::models::denoiser::Memory;
use crate::models::text::clip_text::shared_bytes;
use crate::models::text::t5::T5EncoderModel;
use crate::models::text::tower::TowerKind;
use crate::models::vae::AutoencoderConfig;
use crate::weights::Weights;

/// The program itself: code, tokenizers, pictures.
const PROGRAM: u64 = 64 << 20;

/// The image tower among the weights of a `CLIPModel`.
const IMAGE_TOWER: [&str; 2] = ["vision_model", "visual_projection"];

/// What determines the memory of learning.
#[derive(Debug, Clone, Copy)]
pub struct LearningMemory {
    /// The type of the weights.
    pub dtype: FloatDType,
    /// Whether large networks are held in [8 bits](crate::diffusion::model_files::FileOptions::q8).
    pub q8: bool,
    /// Whether to save time or memory.
    pub memory: Memory,
    /// Latents per call of the denoiser, 0 for none: [`LearnConfig::rows`](crate::method::learn::LearnConfig::rows).
    pub rows: usize,
    /// The shorter side of the pictures while learning, if it is not that of the pictures that are drawn:
    /// [`LearnConfig::learn_resolution`](crate::method::learn::LearnConfig::learn_resolution).
    pub side: Option<u32>,
    /// Whether the captioner has to be opened.
    pub captions: bool,
}

impl LearningMemory {
    /// The approximate peak of bytes that learning on the CPU holds, from headers and configurations only:
    /// the weights that are open at the same time, and the activations of a step.
    ///
    /// # Errors
    /// If a file is invalid (the error names it); [`Error::Missing`](crate::Error::Missing) if the size of the pictures is
    /// unknown.
    pub fn peak(&self, paths: &ModelPaths) -> Result<u64> {
        let mut paths = paths.clone();
        (paths.options.q8, paths.options.memory) = (self.q8, self.memory);
        let files = paths.files()?;
        let family = Family::of(&files)?;
        let denoiser = family.denoiser.config(&files)?;
        let autoencoder = &family.autoencoder;
        let vae = files.autoencoder(autoencoder.part)?;
        let device = Device::flex();
        let open = |part: &str, dtype| files.weights(part, &device, dtype);
        let vae_dtype = autoencoder.dtype(&vae, self.dtype);
        let parts = family.encoders_in(&files)?;
        let encoders = (parts.iter())
            .map(|encoder| open(encoder.part, self.dtype))
            .collect::<Result<Vec<_>>>()?;
        let of_encoders = parts.iter().zip(&encoders);
        let of_encoders: u64 = of_encoders
            .map(|(part, weights)| match part.kind {
                TowerKind::T5 => T5EncoderModel::bytes_in_memory(weights, part.memory(self.memory)),
                TowerKind::Clip | TowerKind::Qwen3 => weights.bytes_in_memory_of(part.needs),
            })
            .sum();
        let mut weights = open(family.denoiser.part, self.dtype)?.bytes_in_memory()
            + open(autoencoder.part, vae_dtype)?.bytes_in_memory()
            + of_encoders;
        let folder = |folder: &Path| match folder.is_dir() {
            true => Weights::open(folder, &device, self.dtype).map(Some),
            false => Ok(None),
        };
        // The networks that read pictures, which are closed before the first step if memory is saved.
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
            let captioner = paths.captioner_folder();
            let captioner =
                captioner.map(|captioner| Weights::open(&captioner, &device, self.dtype));
            viewers += captioner
                .transpose()?
                .map_or(0, |captioner| captioner.bytes_in_memory());
        }
        let factor = vae.pixels();
        let drawn = resolution(&files, family, &*denoiser, &vae)?;
        let learned = self
            .side
            .map_or(drawn, |side| with_shorter_side(drawn, side));
        let latents = learned.map(|side| (side as usize).checked_div(factor).unwrap_or(0));
        let step = match self.rows {
            0 => 0, // learning without the denoiser
            rows => denoiser.step_bytes(rows, latents, self.memory)?,
        };
        Ok(self.total(weights, viewers, step))
    }
}

/// Published numbers of parameters, in millions, of a model with a short name: known before its download.
#[derive(Debug)]
struct Published {
    name: &'static str,
    /// The layout with its configurations.
    layout: &'static str,
    denoiser: u64,
    autoencoder: u64,
    text_encoders: u64,
    /// The image towers of its joint spaces.
    image_towers: u64,
}

const PUBLISHED: [Published; 3] = [
    Published {
        name: "sd15",
        layout: "sd1",
        denoiser: 860,
        autoencoder: 84,
        text_encoders: 123,
        image_towers: 304,
    },
    Published {
        name: "sd21",
        layout: "sd2",
        denoiser: 866,
        autoencoder: 84,
        text_encoders: 340,
        image_towers: 632,
    },
    Published {
        name: "sdxl",
        layout: "sdxl",
        denoiser: 2567,
        autoencoder: 84,
        text_encoders: 123 + 695,
        image_towers: 304 + 1845,
    },
];

impl LearningMemory {
    /// As [`peak`](Self::peak), without the captioner, for a model that is known by this name but not on this disk.
    /// `None` if its sizes are not known, and for [`q8`](Self::q8), since its linear layers are not known either.
    /// `resolution` is height and width in pixels, by default those the model draws.
    pub fn peak_of_known(&self, name: &str, resolution: Option<[u32; 2]>) -> Option<u64> {
        let mut published = PUBLISHED.iter().filter(|_| !self.q8);
        let published = published.find(|published| published.name == name)?;
        let layout = Layout::by_name(published.layout).ok()?;
        let part = &layout.family.denoiser;
        let denoiser = (part.open)(layout.denoiser.clone(), Path::new(part.part)).ok()?;
        let vae = AutoencoderConfig::open(layout.vae.clone(), Path::new("vae")).ok()?;
        let bytes = |millions: u64, dtype: FloatDType| match dtype {
            FloatDType::F16 | FloatDType::BF16 => 2 * millions * 1_000_000,
            _ => 4 * millions * 1_000_000,
        };
        let vae_dtype = layout.family.autoencoder.dtype(&vae, self.dtype);
        let weights = bytes(published.denoiser + published.text_encoders, self.dtype)
            + bytes(published.autoencoder, vae_dtype);
        let viewers = bytes(published.image_towers, self.dtype);
        let latents = match resolution {
            Some(size) => size.map(|side| side as usize / vae.pixels()),
            None => (denoiser.trained_on()?).map(|side| usize::try_from(side).unwrap_or(0)),
        };
        let step = denoiser.step_bytes(self.rows, latents, self.memory).ok()?;
        Some(self.total(weights, viewers, step))
    }

    /// The memory in use at once: weights, image networks, and a step.
    fn total(&self, weights: u64, viewers: u64, step: u64) -> u64 {
        PROGRAM
            + weights
            + match self.memory {
                Memory::Normal => viewers + step,
                Memory::Low => viewers.max(step),
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The memory of a model with a short name is known before its download.
    #[test]
    fn the_memory_of_known_models_is_known() {
        for model in crate::diffusion::family::known_models() {
            let learning = |dtype, memory| LearningMemory {
                dtype,
                q8: false,
                memory,
                rows: 2,
                side: None,
                captions: false,
            };
            let normal = learning(FloatDType::F32, Memory::Normal).peak_of_known(model.name, None);
            let smaller = learning(FloatDType::F32, Memory::Normal)
                .peak_of_known(model.name, Some([256, 256]));
            let saved = learning(FloatDType::F16, Memory::Low).peak_of_known(model.name, None);
            let (Some(normal), Some(smaller), Some(saved)) = (normal, smaller, saved) else {
                continue; // a model whose layout is no single file's
            };
            assert!(
                (4 << 30..60 << 30).contains(&normal),
                "{}: {normal}",
                model.name
            );
            assert!(smaller < normal, "{}: {smaller}", model.name);
            assert!(saved < normal / 2 + (2 << 30), "{}: {saved}", model.name);
        }
        assert!(
            PUBLISHED
                .iter()
                .all(|published| Layout::by_name(published.layout).is_ok())
        );
    }
}
