//! Opening a pipeline: every part read, and held against the others.

use std::path::Path;

use burn::tensor::{Device, FloatDType};

use super::Pipeline;
use super::kind::{ModelIndex, PipelineKind};
use crate::models::clip_text::ClipTextModel;
use crate::models::tokenizer::ClipTokenizer;
use crate::models::unet::{Memory, UNet2DConditionModel, UNetConfig};
use crate::models::vae::{AutoencoderKL, AutoencoderKLConfig};
use crate::sample::{AlphaSchedule, Noising, SchedulerConfig};
use crate::text_encoder::TextEncoder;
use crate::weights::{ModelFiles, compute_dtype};
use crate::{Error, Result};

/// SDXL's `time_ids`: original height and width, crop top and left, target height and width.
pub(super) const TIME_IDS: usize = 6;

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
        let unet_config: UNetConfig = files.config("unet")?;
        let vae_config: AutoencoderKLConfig = files.config("vae")?;
        if files.other_unet().is_some() {
            let latents = vae_config.latent_channels;
            index.kind = index.kind.with_unet(unet_config.in_channels, latents);
        }
        let text_encoders = (index.kind.text_encoders().iter())
            .map(|name| {
                let tokenizer = ClipTokenizer::of(&files.vocabulary(name)?)?;
                let (config, weights) = (files.config(name)?, files.weights(name, device, dtype)?);
                TextEncoder::new(tokenizer, ClipTextModel::load_alone(&weights, &config)?)
            })
            .collect::<Result<Vec<_>>>()?;
        check_vocabularies(files.path(), &text_encoders)?;
        Fit {
            path: &files.config_path("unet"),
            unet: &unet_config,
            vae: &vae_config,
        }
        .check(index.kind, &text_encoders)?;

        // SDXL's autoencoder overflows in half precision.
        let upcast = index.kind == PipelineKind::StableDiffusionXl
            && vae_config.force_upcast.unwrap_or(false);
        let vae_dtype = if upcast { FloatDType::F32 } else { dtype };
        let vae = files.weights("vae", device, vae_dtype)?;
        let vae = AutoencoderKL::load(&vae, &vae_config)?;
        let unet = files.weights("unet", device, dtype)?;
        let unet = UNet2DConditionModel::load(&unet, &unet_config)?;
        let resolution = resolution(files, &unet_config, &vae_config)?;
        let pipeline = Self {
            kind: index.kind,
            force_zeros_for_empty_prompt: index.force_zeros_for_empty_prompt,
            text_encoders,
            unet,
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
        let factor =
            self.vae.config().downsampling_factor() * self.unet.config().downsampling_factor();
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

/// A U-Net that is to be held against the other parts of its pipeline.
struct Fit<'a> {
    /// The file of the U-Net's configuration, for errors.
    path: &'a Path,
    unet: &'a UNetConfig,
    vae: &'a AutoencoderKLConfig,
}

impl Fit<'_> {
    fn check(&self, kind: PipelineKind, text_encoders: &[TextEncoder]) -> Result<()> {
        let width: usize = text_encoders.iter().map(TextEncoder::hidden_size).sum();
        if width != self.unet.context_dim() {
            let expected = format!("{width}, the width of the text encoders");
            return self.wrong("cross_attention_dim", &expected, self.unet.context_dim());
        }
        let latents = self.vae.latent_channels;
        let latents = [
            (
                "in_channels",
                self.unet.in_channels,
                kind.in_channels(latents),
            ),
            ("out_channels", self.unet.out_channels, latents),
        ];
        for (field, found, expected) in latents {
            if found != expected {
                let expected = format!("{expected}, as a {} has", kind.class_name());
                return self.wrong(field, &expected, found);
            }
        }
        match (kind, text_encoders.last()) {
            (PipelineKind::StableDiffusionXl, Some(last)) => self.check_added(last),
            _ if self.unet.needs_added_conditions() => self.wrong(
                "addition_embed_type",
                &format!("null, as a {} has", kind.class_name()),
                &self.unet.addition_embed_type,
            ),
            _ => Ok(()),
        }
    }

    /// Checks SDXL's pooled prompt and `time_ids`.
    fn check_added(&self, last: &TextEncoder) -> Result<()> {
        let Some(pooled) = last.projection_dim() else {
            let reason = "the second text encoder has no `text_projection`, which SDXL needs";
            return Err(Error::WrongBase {
                reason: reason.to_owned(),
            });
        };
        if !self.unet.needs_added_conditions() {
            let found = &self.unet.addition_embed_type;
            return self.wrong("addition_embed_type", "text_time", found);
        }
        let field = "projection_class_embeddings_input_dim";
        let sizes = TIME_IDS * self.unet.addition_time_embed_dim.unwrap_or(0);
        match self.unet.projection_class_embeddings_input_dim {
            Some(width) if width == pooled + sizes => Ok(()),
            found => {
                let expected = format!(
                    "{}: {pooled} of the pooled prompt and {sizes} of the sizes",
                    pooled + sizes
                );
                self.wrong(field, &expected, found)
            }
        }
    }

    fn wrong(&self, field: &str, expected: &str, found: impl std::fmt::Debug) -> Result<()> {
        Err(Error::unsupported(self.path, field, expected, found))
    }
}

/// Height and width of the pictures.
///
/// # Errors
/// [`Error::Missing`] if neither the options nor the U-Net's configuration tell.
pub(crate) fn resolution(
    files: &ModelFiles,
    unet: &UNetConfig,
    vae: &AutoencoderKLConfig,
) -> Result<[u32; 2]> {
    let resolution = files.resolution().or_else(|| trained_on(unet, vae));
    resolution.ok_or_else(|| Error::Missing {
        what: "the size of the pictures".to_owned(),
        reason: "unet/config.json has no `sample_size`".to_owned(),
    })
}

/// Height and width of the pictures the U-Net was trained on, from its `sample_size`.
fn trained_on(unet: &UNetConfig, vae: &AutoencoderKLConfig) -> Option<[u32; 2]> {
    let side = |value: &serde_json::Value| {
        let side = value.as_u64()? * u64::try_from(vae.downsampling_factor()).ok()?;
        u32::try_from(side).ok()
    };
    let size = unet.other.get("sample_size")?;
    match size.as_array() {
        Some(sides) => Some([side(sides.first()?)?, side(sides.get(1)?)?]),
        None => Some([side(size)?; 2]),
    }
}
