//! Opening a pipeline: every part read, and held against the others.

use std::path::Path;

use burn::tensor::{Device, FloatDType};

use crate::diffusion::family::Family;
use crate::diffusion::model_files::ModelFiles;
use crate::diffusion::pipeline::Pipeline;
use crate::diffusion::pipeline::index::ModelIndex;
use crate::diffusion::text_encoder::TextEncoder;
use crate::models::denoiser::{DenoiserConfig, Memory, Surroundings};
use crate::models::vae::{AutoencoderKL, AutoencoderKLConfig};
use crate::weights::compute_dtype;
use crate::{Error, Result};

impl Pipeline {
    /// Opens the parts of a pipeline that its [family](crate::diffusion::family::Family) has, which
    /// `model_index.json` names. With [another U-Net](crate::diffusion::model_files::FileOptions::unet), its input
    /// channels decide the family. Pictures have the size the denoiser was trained on unless [`ModelFiles::resolution`] says
    /// otherwise.
    ///
    /// # Errors
    /// Whatever is wrong with a file, naming it; [`Error::Config`] for a pipeline class that is not
    /// supported and for parts that do not fit each other; [`Error::Setting`] for a resolution the
    /// networks cannot halve often enough.
    pub fn open(files: &ModelFiles, device: &Device, dtype: FloatDType) -> Result<Self> {
        let index = ModelIndex::open(files)?;
        let mut family = index.family;
        let noising = (family.noising)(files)?;
        let denoiser = family.denoiser.config(files)?;
        let vae_config: AutoencoderKLConfig = files.config(family.autoencoder.part)?;
        let latent_channels = vae_config.latent_channels;
        if let Some(unet) = files.other_unet() {
            family.denoiser.check_replaced(unet)?;
            family = family.with_channels(denoiser.in_channels(), latent_channels);
        }
        let text_encoders = (family.text_encoders.iter())
            .map(|encoder| (encoder.open)(files, encoder.part, device, dtype))
            .collect::<Result<Vec<_>>>()?;
        check_vocabularies(files.path(), family, &text_encoders)?;
        let widths: Vec<usize> = text_encoders.iter().map(TextEncoder::hidden_size).collect();
        let projections: Vec<Option<usize>> = (text_encoders.iter())
            .map(TextEncoder::projection_dim)
            .collect();
        let around = Surroundings {
            class: family.class,
            encoder_widths: &widths,
            projections: &projections,
            latent_channels,
            image_channels: family.image_channels(latent_channels),
            pixels: vae_config.downsampling_factor(),
        };
        denoiser.check(&around)?;

        let vae_dtype = family.autoencoder.dtype(&vae_config, dtype);
        let vae = files.weights(family.autoencoder.part, device, vae_dtype)?;
        let vae = AutoencoderKL::load(&vae, &vae_config)?;
        let resolution = resolution(files, family, &*denoiser, &vae_config)?;
        let weights = files.weights(family.denoiser.part, device, dtype)?;
        let denoiser = denoiser.load(&weights, &around)?;
        let mut pipeline = Self {
            family,
            force_zeros_for_empty_prompt: index.force_zeros_for_empty_prompt,
            text_encoders,
            denoiser,
            vae,
            noising,
            resolution,
            device: device.clone(),
            dtype: compute_dtype(device, dtype),
            vae_dtype: compute_dtype(device, vae_dtype),
            memory: Memory::default(),
        };
        pipeline.fit_resolution()?;
        Ok(pipeline)
    }

    /// The same for pictures of another height and width.
    ///
    /// # Errors
    /// [`Error::Setting`] if the networks cannot halve them often enough.
    pub fn with_resolution(mut self, resolution: [u32; 2]) -> Result<Self> {
        self.resolution = resolution;
        self.fit_resolution()?;
        Ok(self)
    }

    /// Checks that the networks can draw at its resolution, which noising may depend on.
    fn fit_resolution(&mut self) -> Result<()> {
        let factor = self.vae.config().downsampling_factor() * self.denoiser.multiple();
        let fits = |side: u32| side > 0 && (side as usize).is_multiple_of(factor);
        if !self.resolution.into_iter().all(fits) {
            let [height, width] = self.resolution;
            return Err(Error::Setting {
                name: "resolution",
                expected: format!("multiples of {factor}"),
                found: format!("{width}×{height}"),
            });
        }
        let tokens = self.resolution.map(|side| side as usize / factor);
        self.noising = (self.noising.clone()).for_tokens(tokens.iter().product());
        Ok(())
    }
}

/// Refuses text encoders with joint spaces whose ids do not mean the same words: those of an optimised
/// prompt are read by all of them.
fn check_vocabularies(path: &Path, family: &Family, text_encoders: &[TextEncoder]) -> Result<()> {
    let encoders = family.text_encoders.iter().zip(text_encoders);
    let mut joint = encoders.filter(|(part, _)| part.joint).map(|(_, one)| one);
    let Some(first) = joint.next() else {
        return Ok(());
    };
    let vocabulary = |encoder: &TextEncoder| {
        let tokenizer = encoder.tokenizer();
        let ids = 0..u32::try_from(tokenizer.vocab_size()).unwrap_or(u32::MAX);
        ids.map(|id| tokenizer.token(id)).collect::<Vec<_>>()
    };
    let expected = vocabulary(first);
    match joint.all(|other| vocabulary(other) == expected) {
        true => Ok(()),
        false => Err(Error::invalid_file(
            path,
            "its tokenizers have different vocabularies, so that they read different words",
        )),
    }
}

/// Height and width of the pictures.
///
/// # Errors
/// [`Error::Missing`] if neither the options nor the denoiser's configuration say so.
pub(crate) fn resolution(
    files: &ModelFiles,
    family: &Family,
    denoiser: &dyn DenoiserConfig,
    vae: &AutoencoderKLConfig,
) -> Result<[u32; 2]> {
    let trained_on = || {
        let factor = u64::try_from(vae.downsampling_factor()).ok()?;
        let side = |latents: u64| u32::try_from(latents.checked_mul(factor)?).ok();
        let [height, width] = denoiser.trained_on()?;
        Some([side(height)?, side(width)?])
    };
    let resolution = files.resolution().or_else(trained_on);
    resolution.ok_or_else(|| Error::Missing {
        what: "the size of the pictures".to_owned(),
        reason: format!("{}/config.json has no `sample_size`", family.denoiser.part),
    })
}
