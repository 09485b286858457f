//! Opening a pipeline: every part read, and held against the others.

use std::path::Path;

use burn::tensor::{Device, FloatDType};

use super::Pipeline;
use super::kind::{ModelIndex, PipelineKind};
use crate::models::clip_text::ClipTextModel;
use crate::models::denoiser::{DenoiserConfig, Memory, Surroundings};
use crate::models::tokenizer::ClipTokenizer;
use crate::models::unet_denoiser::{self, PART as UNET};
use crate::models::vae::{AutoencoderKL, AutoencoderKLConfig};
use crate::sample::{AlphaSchedule, Noising, SchedulerConfig};
use crate::text_encoder::TextEncoder;
use crate::weights::{ModelFiles, compute_dtype};
use crate::{Error, Result};

impl Pipeline {
    /// Opens the parts of a pipeline: `model_index.json`, `unet`, `vae`, `text_encoder`, its
    /// vocabulary, `scheduler`, and `text_encoder_2` where the [kind](PipelineKind) of pipeline has
    /// it. With [another U-Net](crate::weights::FileOptions::unet), its input channels decide the kind.
    /// Pictures have the size the U-Net was trained on unless [`ModelFiles::resolution`] says
    /// otherwise.
    ///
    /// # Errors
    /// Whatever is wrong with a file, naming it; [`Error::Config`] for a pipeline class that is not
    /// supported and for parts that do not fit each other; [`Error::Setting`] for a resolution the
    /// networks cannot halve often enough.
    pub fn open(files: &ModelFiles, device: &Device, dtype: FloatDType) -> Result<Self> {
        let mut index = ModelIndex::open(files)?;
        let mut scheduler: SchedulerConfig = files.config("scheduler")?;
        correct(&mut scheduler, index.kind);
        let schedule = AlphaSchedule::new(&scheduler, &files.config_path("scheduler"))?;
        let denoiser = match index.kind {
            PipelineKind::StableDiffusionXl => unet_denoiser::open_xl(files)?,
            _ => unet_denoiser::open(files)?,
        };
        let vae_config: AutoencoderKLConfig = files.config("vae")?;
        if files.other_unet().is_some() {
            let latents = vae_config.latent_channels;
            index.kind = index.kind.with_unet(denoiser.in_channels(), latents);
        }
        let text_encoders = (index.kind.text_encoders().iter())
            .map(|name| {
                let tokenizer = ClipTokenizer::of(&files.vocabulary(name)?)?;
                let (config, weights) = (files.config(name)?, files.weights(name, device, dtype)?);
                TextEncoder::new(tokenizer, ClipTextModel::load_alone(&weights, &config)?)
            })
            .collect::<Result<Vec<_>>>()?;
        check_vocabularies(files.path(), &text_encoders)?;
        let latent_channels = vae_config.latent_channels;
        let widths: Vec<usize> = text_encoders.iter().map(TextEncoder::hidden_size).collect();
        let around = Surroundings {
            class: index.kind.class_name(),
            encoder_widths: &widths,
            pooled: text_encoders.last().and_then(TextEncoder::projection_dim),
            latent_channels,
            image_channels: index.kind.in_channels(latent_channels) - latent_channels,
            pixels: vae_config.downsampling_factor(),
        };
        denoiser.check(&around)?;

        // SDXL's autoencoder overflows in half precision.
        let upcast = index.kind == PipelineKind::StableDiffusionXl
            && vae_config.force_upcast.unwrap_or(false);
        let vae_dtype = if upcast { FloatDType::F32 } else { dtype };
        let vae = files.weights("vae", device, vae_dtype)?;
        let vae = AutoencoderKL::load(&vae, &vae_config)?;
        let resolution = resolution(files, &*denoiser, &vae_config)?;
        let denoiser = denoiser.load(&files.weights(UNET, device, dtype)?, &around)?;
        let pipeline = Self {
            kind: index.kind,
            force_zeros_for_empty_prompt: index.force_zeros_for_empty_prompt,
            text_encoders,
            denoiser,
            vae,
            noising: Noising::Discrete(schedule),
            resolution,
            device: device.clone(),
            dtype: compute_dtype(device, dtype),
            vae_dtype: compute_dtype(device, vae_dtype),
            memory: Memory::default(),
        };
        pipeline.check_resolution()?;
        Ok(pipeline)
    }

    /// The same for pictures of another height and width.
    ///
    /// # Errors
    /// [`Error::Setting`] if the networks cannot halve them often enough.
    pub fn with_resolution(mut self, resolution: [u32; 2]) -> Result<Self> {
        self.resolution = resolution;
        self.check_resolution()?;
        Ok(self)
    }

    fn check_resolution(&self) -> Result<()> {
        let factor = self.vae.config().downsampling_factor() * self.denoiser.multiple();
        let fits = |side: u32| side > 0 && (side as usize).is_multiple_of(factor);
        if self.resolution.into_iter().all(fits) {
            return Ok(());
        }
        let [height, width] = self.resolution;
        Err(Error::Setting {
            name: "resolution",
            expected: format!("multiples of {factor}"),
            found: format!("{width}×{height}"),
        })
    }
}

/// Corrects what outdated configurations leave out, as diffusers' pipelines do: latents reach beyond ±1
/// and are not clamped, and Stable Diffusion was trained with an offset of 1.
fn correct(scheduler: &mut SchedulerConfig, kind: PipelineKind) {
    scheduler.clip_sample = false;
    if matches!(kind, PipelineKind::StableDiffusion | PipelineKind::Inpaint) {
        scheduler.steps_offset = 1;
    }
}

/// Refuses text encoders whose ids do not mean the same words: those of an optimised prompt are read
/// by all of them.
fn check_vocabularies(path: &Path, text_encoders: &[TextEncoder]) -> Result<()> {
    let Some((first, others)) = text_encoders.split_first() else {
        return Ok(());
    };
    let vocabulary = |encoder: &TextEncoder| {
        let tokenizer = encoder.tokenizer();
        let ids = 0..u32::try_from(tokenizer.vocab_size()).unwrap_or(u32::MAX);
        ids.map(|id| tokenizer.token(id)).collect::<Vec<_>>()
    };
    let expected = vocabulary(first);
    match others.iter().all(|other| vocabulary(other) == expected) {
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
/// [`Error::Missing`] if neither the options nor the U-Net's configuration tell.
pub(crate) fn resolution(
    files: &ModelFiles,
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
        reason: format!("{UNET}/config.json has no `sample_size`"),
    })
}
