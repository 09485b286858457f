//! `vae/config.json`.

use std::path::Path;

use serde::Deserialize;

use crate::models::denoiser::unet_config::MOST_LEVELS;
use crate::models::layers::{Activation, MOST_LAYERS};
use crate::models::vae::autoencoder::Scaling;
use crate::weights::{OtherFields, check_fixed_fields};
use crate::{Error, Result};

/// Latents on each side of a packed square.
pub(super) const PATCH: usize = 2;

/// Red, green and blue.
const COLOURS: usize = 3;

/// Checks that an autoencoder reads and draws pictures of three channels.
pub(super) fn check_colours(path: &Path, in_channels: usize, out_channels: usize) -> Result<()> {
    for (field, found) in [("in_channels", in_channels), ("out_channels", out_channels)] {
        if found != COLOURS {
            return Err(Error::unsupported(
                path,
                field,
                "3, for red, green and blue",
                found,
            ));
        }
    }
    Ok(())
}

/// The configuration of an [`AutoencoderKL`](super::AutoencoderKL), with the names and defaults of diffusers.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct AutoencoderKLConfig {
    /// Channels of the input pictures.
    pub in_channels: usize,
    /// Channels of the output pictures.
    pub out_channels: usize,
    /// `DownEncoderBlock2D` for every level.
    pub down_block_types: Vec<String>,
    /// `UpDecoderBlock2D` for every level.
    pub up_block_types: Vec<String>,
    /// Channels of every level.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks of every level of the encoder; the decoder has one more.
    pub layers_per_block: usize,
    /// Non-linearity of the residual blocks.
    pub act_fn: Activation,
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Groups of every group normalisation.
    pub norm_num_groups: usize,
    /// The denoiser reads `(latents - shift_factor) · scaling_factor`.
    pub scaling_factor: f64,
    /// See [`scaling_factor`](Self::scaling_factor); null means 0.
    pub shift_factor: Option<f64>,
    /// Whether the network overflows in half precision and has to run in f32.
    pub force_upcast: Option<bool>,
    /// Whether a 1×1 convolution follows the encoder.
    pub use_quant_conv: bool,
    /// Whether a 1×1 convolution precedes the decoder.
    pub use_post_quant_conv: bool,
    /// Whether the middle of encoder and decoder attends over all positions.
    pub mid_block_add_attention: bool,
    /// `AutoencoderKLFlux2`, whose latents are packed and normalised instead of scaled, or `AutoencoderKL`.
    #[serde(rename = "_class_name")]
    pub class_name: Option<String>,
    /// Channels of every level of the decoder; null means those of the encoder.
    pub decoder_block_out_channels: Option<Vec<usize>>,
    /// Added to the variances of packed latents.
    pub batch_norm_eps: f64,
    /// Height and width of the packed squares of latents.
    pub patch_size: [usize; 2],
    /// All other fields.
    #[serde(flatten)]
    pub other: OtherFields,
}

impl Default for AutoencoderKLConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            down_block_types: vec!["DownEncoderBlock2D".to_owned()],
            up_block_types: vec!["UpDecoderBlock2D".to_owned()],
            block_out_channels: vec![64],
            layers_per_block: 1,
            act_fn: Activation::Silu,
            latent_channels: 4,
            norm_num_groups: 32,
            scaling_factor: 0.18215,
            shift_factor: None,
            force_upcast: Some(true),
            use_quant_conv: true,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
            class_name: None,
            decoder_block_out_channels: None,
            batch_norm_eps: 1e-4,
            patch_size: [PATCH; 2],
            other: OtherFields::new(),
        }
    }
}

impl AutoencoderKLConfig {
    /// Factor between the size of a picture and that of its latents.
    pub fn downsampling_factor(&self) -> usize {
        1 << self.block_out_channels.len().saturating_sub(1)
    }

    /// Whether the denoiser reads squares of latents as one, normalised by running statistics, as in FLUX.2.
    pub fn is_packed(&self) -> bool {
        self.class_name.as_deref() == Some("AutoencoderKLFlux2")
    }

    pub(super) fn scaling(&self) -> Scaling {
        Scaling {
            factor: self.scaling_factor,
            shift: self.shift_factor.unwrap_or(0.0),
        }
    }

    /// The autoencoder's latents on each side of one of the denoiser's.
    pub(super) fn patch(&self) -> usize {
        if self.is_packed() { PATCH } else { 1 }
    }

    /// Pixels on each side of one of the denoiser's latents.
    pub fn pixels(&self) -> usize {
        self.downsampling_factor() * self.patch()
    }

    /// Channels of the denoiser's latents.
    pub fn denoised_channels(&self) -> usize {
        self.latent_channels * self.patch() * self.patch()
    }

    /// Channels of every level of the decoder, in the encoder's order.
    pub(super) fn decoder_channels(&self) -> &[usize] {
        match &self.decoder_block_out_channels {
            Some(channels) => channels,
            None => &self.block_out_channels,
        }
    }

    pub(crate) fn check(&self, path: &Path) -> Result<()> {
        let wrong = |field: &str, reason: String| {
            Err(Error::Config {
                path: path.to_owned(),
                field: field.to_owned(),
                reason,
            })
        };
        check_fixed_fields(
            &self.other,
            &[("latents_mean", "null"), ("latents_std", "null")],
            path,
        )?;
        check_colours(path, self.in_channels, self.out_channels)?;
        let levels = self.block_out_channels.len();
        if levels > MOST_LEVELS {
            let reason = format!("expected at most {MOST_LEVELS} levels, found {levels}");
            return wrong("block_out_channels", reason);
        }
        for (field, kinds, supported) in [
            (
                "down_block_types",
                &self.down_block_types,
                "DownEncoderBlock2D",
            ),
            ("up_block_types", &self.up_block_types, "UpDecoderBlock2D"),
        ] {
            if levels == 0 || kinds.len() != levels {
                let reason = format!(
                    "{} blocks, but block_out_channels has {levels}",
                    kinds.len()
                );
                return wrong(field, reason);
            }
            if let Some(kind) = kinds.iter().find(|kind| *kind != supported) {
                return wrong(
                    field,
                    format!("`{kind}` is not supported, only {supported}"),
                );
            }
        }
        let groups = self.norm_num_groups;
        if self.decoder_channels().len() != levels {
            let reason = format!("expected {levels} levels, as in block_out_channels");
            return wrong("decoder_block_out_channels", reason);
        }
        if self.patch_size != [PATCH; 2] {
            let reason = format!("expected [{PATCH}, {PATCH}], found {:?}", self.patch_size);
            return wrong("patch_size", reason);
        }
        if !(self.batch_norm_eps.is_finite() && self.batch_norm_eps >= 0.0) {
            let reason = format!("expected 0 or more, found {}", self.batch_norm_eps);
            return wrong("batch_norm_eps", reason);
        }
        if let Some(c) = self
            .block_out_channels
            .iter()
            .chain(self.decoder_channels())
            .find(|&c| groups == 0 || c % groups != 0)
        {
            return wrong(
                "norm_num_groups",
                format!("{groups} does not divide {c} channels"),
            );
        }
        let layers = self.layers_per_block;
        if !(1..=MOST_LAYERS).contains(&layers) {
            let reason = format!("expected 1 to {MOST_LAYERS}, found {layers}");
            return wrong("layers_per_block", reason);
        }
        if !(self.scaling_factor.is_finite() && self.scaling_factor > 0.0) {
            let reason = format!("expected a positive number, found {}", self.scaling_factor);
            return wrong("scaling_factor", reason);
        }
        Ok(())
    }
}
