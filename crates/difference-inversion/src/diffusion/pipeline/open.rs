//! Opening a pipeline: every part is read and checked against the others.

use std::path::Path;
use std::sync::OnceLock;

use burn::tensor::{Device, FloatDType};

use crate::diffusion::family::{EncoderPart, Family};
use crate::diffusion::model_files::ModelFiles;
use crate::diffusion::pipeline::index::ModelIndex;
use crate::diffusion::pipeline::{Pipeline, PreviewVae};
use crate::diffusion::sample::Noising;
use crate::diffusion::text_encoder::TextEncoder;
use crate::diffusion::textual_inversion;
use crate::models::denoiser::{DenoiserConfig, Memory, Surroundings};
use crate::models::text::tower::TowerKind;
use crate::models::vae::{Autoencoder, AutoencoderConfig};
use crate::util::settings::Checks;
use crate::weights::{OtherFields, check_fixed_fields, compute_dtype};
use crate::{Error, Result};

impl Pipeline {
    /// Opens the parts of a pipeline that its [family](crate::diffusion::family::Family) has, which
    /// `model_index.json` names. With [another U-Net](crate::diffusion::model_files::FileOptions::unet), its input
    /// channels determine the family. Pictures have the size that the denoiser was trained on unless
    /// [`ModelFiles::resolution`] overrides it.
    ///
    /// # Errors
    /// If a file is invalid (the error names it); [`Error::Config`] for a pipeline class that is not
    /// supported and for parts that do not match; [`Error::Setting`] for a resolution that the networks
    /// cannot halve often enough.
    pub fn open(files: &ModelFiles, device: &Device, dtype: FloatDType) -> Result<Self> {
        let index = ModelIndex::open(files)?;
        let mut family = index.family;
        let noising = (family.noising)(files)?;
        files.check_denoiser(family.denoiser.part)?;
        let denoiser = family.denoiser.config(files)?;
        files.check_vae(family.autoencoder.part)?;
        let mut vae_config = files.autoencoder(family.autoencoder.part)?;
        if matches!(noising, Noising::Discrete(_)) {
            vae_config = vae_config.without_shift(); // diffusers' pipelines of these families do not look at it
        }
        let latent_channels = vae_config.denoised_channels();
        if files.other_denoiser().is_some() {
            family = family.with_channels(denoiser.in_channels(), latent_channels);
        }
        check_attention_mask(files, family)?;
        Self::check_adapters(files)?;
        let parts = family.encoders_in(files)?;
        let mut text_encoders = text_encoders(files, family, &parts, device, dtype)?;
        textual_inversion::add_all(files.embeddings(), &parts, &mut text_encoders)?;
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
            pixels: vae_config.pixels(),
            is_distilled: index.is_distilled,
        };
        denoiser.check(&around)?;

        let vae_dtype = family.autoencoder.dtype(&vae_config, dtype);
        let vae = files.weights(family.autoencoder.part, device, vae_dtype)?;
        let vae = vae_config.load(&vae)?;
        let preview_vae = preview_vae(files, family, &*vae, device)?;
        let resolution = resolution(files, family, &*denoiser, &vae_config)?;
        let weights = files.weights(family.denoiser.part, device, dtype)?;
        let denoiser = denoiser.load(&weights, &around)?;
        let adapters = weights.adapters()?.map(|adapters| adapters.digest);
        let mut pipeline = Self {
            family,
            parts,
            force_zeros_for_empty_prompt: index.force_zeros_for_empty_prompt,
            text_encoders,
            denoiser,
            adapters,
            vae,
            noising,
            resolution,
            device: device.clone(),
            dtype: compute_dtype(device, dtype),
            vae_dtype: compute_dtype(device, vae_dtype),
            memory: files.memory(),
            max_sequence_length: files.max_sequence_length(),
            preview_vae,
            colours: OnceLock::new(),
        };
        pipeline.fit_resolution()?;
        Ok(pipeline)
    }

    /// Refuses unsupported configurations before any weights are present.
    ///
    /// # Errors
    /// As [`open`](Self::open), except for errors that need weights or vocabularies.
    pub fn check_configs(files: &ModelFiles) -> Result<()> {
        let family = ModelIndex::open(files)?.family;
        (family.noising)(files)?;
        check_attention_mask(files, family)?;
        files.check_denoiser(family.denoiser.part)?;
        let denoiser = family.denoiser.config(files)?;
        denoiser.step_bytes(1, [64, 64], Memory::Normal)?;
        let vae = files.autoencoder(family.autoencoder.part)?;
        vae.check(&files.config_path(family.autoencoder.part))
    }

    /// Checks that the LoRAs change only layers that the model has.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] naming the first layer that it lacks, and the model that the file was made for.
    pub fn check_adapters(files: &ModelFiles) -> Result<()> {
        let family = Family::of(files)?;
        files.check_loras(&family.networks_in(files)?, family.class)
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

    /// The same for pictures with a shorter side of this many pixels. The other is in proportion, as far as the networks
    /// can draw it.
    ///
    /// # Errors
    /// As [`with_resolution`](Self::with_resolution).
    pub fn with_shorter_side(self, side: u32) -> Result<Self> {
        let factor = u32::try_from(self.factor()).unwrap_or(u32::MAX).max(1);
        let drawable = |length: u32| match length {
            shorter if shorter == side => shorter,
            longer => (longer.saturating_add(factor / 2) / factor).saturating_mul(factor),
        };
        let resolution = with_shorter_side(self.resolution, side).map(drawable);
        self.with_resolution(resolution)
    }

    /// The number that the sides of its pictures are multiples of.
    fn factor(&self) -> usize {
        self.vae.pixels() * self.denoiser.multiple()
    }

    /// Checks that the networks can draw at its resolution, and adapts the noising to it.
    fn fit_resolution(&mut self) -> Result<()> {
        let pixels = self.vae.pixels();
        let factor = self.factor();
        let most = self.denoiser.largest().map(|most| most * pixels);
        let fits = |side: u32| {
            let side = side as usize;
            side > 0 && side.is_multiple_of(factor) && most.is_none_or(|most| side <= most)
        };
        if !self.resolution.into_iter().all(fits) {
            let [height, width] = self.resolution;
            let most = most.map(|most| format!(", at most {most}"));
            return Err(Error::Setting {
                name: "resolution",
                expected: format!("multiples of {factor}{}", most.unwrap_or_default()),
                found: format!("{width}×{height}"),
            });
        }
        let tokens = self.resolution.map(|side| side as usize / factor);
        self.noising = (self.noising.clone()).for_tokens(tokens.iter().product());
        Ok(())
    }
}

/// Opens some of a family's text encoders, without the words of textual inversions.
///
/// # Errors
/// As [`Pipeline::open`].
pub(crate) fn text_encoders(
    files: &ModelFiles,
    family: &Family,
    parts: &[&'static EncoderPart],
    device: &Device,
    dtype: FloatDType,
) -> Result<Vec<TextEncoder>> {
    let all = family.encoders_in(files)?;
    let names: Vec<&str> = all.iter().map(|encoder| encoder.part).collect();
    files.check_text_encoders(&names)?;
    let mut encoders = (parts.iter())
        .map(|encoder| (encoder.open)(files, encoder.part, device, dtype))
        .collect::<Result<Vec<_>>>()?;
    check_vocabularies(files.path(), parts, &encoders)?;
    check_clip_skip(files.clip_skip(), family, parts, &encoders)?;
    if let Some(length) = files.max_sequence_length() {
        check_max_sequence_length(length, family, parts, &encoders)?;
    }
    for encoder in &mut encoders {
        encoder.set_clip_skip(files.clip_skip());
    }
    Ok(encoders)
}

/// Refuses a text encoder that masks padding, such as AltDiffusion's. Families with several encoders have no
/// such field in diffusers.
fn check_attention_mask(files: &ModelFiles, family: &Family) -> Result<()> {
    let [encoder] = family.text_encoders else {
        return Ok(());
    };
    let config: OtherFields = files.config(encoder.part)?;
    let fixed = [("use_attention_mask", "false")];
    check_fixed_fields(&config, &fixed, &files.config_path(encoder.part))
}

/// Refuses to skip layers that do not exist, or to skip them in a family that does not read them.
fn check_clip_skip(
    skip: usize,
    family: &Family,
    parts: &[&EncoderPart],
    text_encoders: &[TextEncoder],
) -> Result<()> {
    let wrong = |expected: String| {
        Err(Error::Setting {
            name: "clip_skip",
            expected,
            found: skip.to_string(),
        })
    };
    if skip == 0 {
        return Ok(());
    }
    if !family
        .text_encoders
        .iter()
        .all(|part| part.joint || part.optional)
    {
        return wrong(format!(
            "0, since a {} reads no hidden states of CLIP",
            family.class
        ));
    }
    let joint = parts
        .iter()
        .zip(text_encoders)
        .filter(|(part, _)| part.joint);
    match joint.map(|(_, encoder)| encoder.layers()).min() {
        Some(layers) if skip >= layers => wrong(format!(
            "less than {layers}, the layers of the text encoder"
        )),
        _ => Ok(()),
    }
}

/// The most tokens of a prompt that may be asked for, as in diffusers' pipelines.
const MOST_TOKENS: usize = 512;

/// Refuses a length of prompts in a family whose text encoders all have a fixed one, and a length without room for
/// words.
fn check_max_sequence_length(
    length: usize,
    family: &Family,
    parts: &[&EncoderPart],
    text_encoders: &[TextEncoder],
) -> Result<()> {
    const NAME: &str = "max_sequence_length";
    let is_fixed = |part: &EncoderPart| part.kind == TowerKind::Clip;
    let all_fixed = family.text_encoders.iter().all(is_fixed);
    let none = format!(
        "none, since the text encoder of a {} has a fixed length",
        family.class
    );
    let free = (parts.iter().zip(text_encoders)).filter(|(part, _)| !is_fixed(part));
    let taken = free.map(|(_, encoder)| encoder.frame().taken()).max();
    let least = taken.unwrap_or(0) + 1;
    let holds = (least..=MOST_TOKENS).contains(&length);
    Checks::default()
        .that(NAME, !all_fixed, &none, length)
        .that(NAME, holds, &format!("{least} to {MOST_TOKENS}"), length)
        .result()
}

/// Refuses text encoders with joint spaces whose ids mean different words: all of them read the ids of an
/// optimised prompt. A word may be added to the vocabulary of one of them.
fn check_vocabularies(
    path: &Path,
    parts: &[&EncoderPart],
    text_encoders: &[TextEncoder],
) -> Result<()> {
    let encoders = parts.iter().zip(text_encoders);
    let mut joint = encoders.filter(|(part, _)| part.joint).map(|(_, one)| one);
    let Some(first) = joint.next() else {
        return Ok(());
    };
    let vocabulary = |encoder: &TextEncoder| {
        let tokenizer = encoder.tokenizer();
        let ids = 0..u32::try_from(tokenizer.base_vocab_size()).unwrap_or(u32::MAX);
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

/// Height and width with a shorter side of `side`, in the same proportion.
pub(crate) fn with_shorter_side(resolution: [u32; 2], side: u32) -> [u32; 2] {
    let shorter = u64::from(resolution[0].min(resolution[1]).max(1));
    let scaled = |length: u32| u64::from(length) * u64::from(side) / shorter;
    resolution.map(|length| u32::try_from(scaled(length)).unwrap_or(u32::MAX))
}

/// The autoencoder of previews in f32, or why it cannot be used beside the `own` one.
fn preview_vae(
    files: &ModelFiles,
    family: &Family,
    own: &dyn Autoencoder,
    device: &Device,
) -> Result<Option<PreviewVae>> {
    let part = family.autoencoder.part;
    let Some(files) = files.with_preview_vae(part)? else {
        return Ok(None);
    };
    let config = files.autoencoder(part)?;
    let of =
        |channels, pixels| format!("latents of {channels} channels and {pixels} pixels a side");
    let expected = of(own.denoised_channels(), own.pixels());
    let found = of(config.denoised_channels(), config.pixels());
    if found != expected {
        let notice = format!(
            "previews are approximate colours: `--preview-vae` has {found}, the model {expected}"
        );
        return Ok(Some(Err(notice)));
    }
    let weights = files.weights(part, device, FloatDType::F32)?;
    config.load(&weights).map(|vae| Some(Ok(vae)))
}

/// Height and width of the pictures.
///
/// # Errors
/// [`Error::Missing`] if neither the options nor the denoiser's configuration state it.
pub(crate) fn resolution(
    files: &ModelFiles,
    family: &Family,
    denoiser: &dyn DenoiserConfig,
    vae: &AutoencoderConfig,
) -> Result<[u32; 2]> {
    let trained_on = || {
        let factor = u64::try_from(vae.pixels()).ok()?;
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
