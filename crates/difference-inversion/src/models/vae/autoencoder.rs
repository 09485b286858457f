//! What a pipeline needs of an autoencoder, whichever class it is of.

use std::fmt::Debug;
use std::path::Path;
use std::sync::Arc;

use burn::tensor::Tensor;
use serde_json::Value;

use crate::Result;
use crate::models::vae::tiny::{AutoencoderTiny, AutoencoderTinyConfig};
use crate::models::vae::{AutoencoderKL, AutoencoderKLConfig};
use crate::weights::{Weights, from_value};

/// A network between pictures and the latents that a denoiser reads.
pub trait Autoencoder: Debug + Send + Sync {
    /// Channels of the denoiser's latents.
    fn denoised_channels(&self) -> usize;

    /// Pixels on each side of one of the denoiser's latents.
    fn pixels(&self) -> usize;

    /// Pixels on each side of one of its own latents.
    fn downsampling_factor(&self) -> usize;

    /// Latents in the denoiser's form: `(latents − shift_factor) · scaling_factor`, or each square of them packed into
    /// channels with the features (c, p, q), then normalised.
    ///
    /// # Shapes
    /// `[b, latent_channels, h, w]`; packed, to `[b, 4 · latent_channels, h / 2, w / 2]`.
    fn to_denoised(&self, latents: Tensor<4>) -> Tensor<4>;

    /// The reverse of [`to_denoised`](Self::to_denoised).
    ///
    /// # Shapes
    /// `[b, c, h, w]` in the denoiser's form, to those of [`decode`](Self::decode).
    fn to_decoder(&self, latents: Tensor<4>) -> Tensor<4>;

    /// Its own latents of pictures; the mean, if it has a Gaussian of them.
    ///
    /// # Shapes
    /// `[b, in_channels, height, width]` in `[-1, 1]` to `[b, latent_channels, h, w]`, smaller by
    /// [`downsampling_factor`](Self::downsampling_factor).
    ///
    /// # Panics
    /// If the shape is not as above.
    fn mean(&self, image: Tensor<4>) -> Tensor<4>;

    /// The pictures of its own latents.
    ///
    /// # Shapes
    /// `[b, latent_channels, h, w]` to `[b, out_channels, height, width]`, about in `[-1, 1]`.
    ///
    /// # Panics
    /// If the shape is not as above.
    fn decode(&self, latents: Tensor<4>) -> Tensor<4>;
}

/// The denoiser's form of latents that are not packed: `(latents − shift) · factor`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scaling {
    pub(super) factor: f64,
    pub(super) shift: f64,
}

impl Scaling {
    pub(super) fn apply(self, latents: Tensor<4>) -> Tensor<4> {
        (latents - self.shift) * self.factor
    }

    pub(super) fn undo(self, latents: Tensor<4>) -> Tensor<4> {
        latents / self.factor + self.shift
    }
}

/// The configuration of an [`Autoencoder`], from which it is built.
#[derive(Debug, Clone)]
pub enum AutoencoderConfig {
    /// That of latent diffusion.
    Kl(AutoencoderKLConfig),
    /// A distilled one.
    Tiny(AutoencoderTinyConfig),
}

impl AutoencoderConfig {
    /// The supported classes of diffusers.
    pub const CLASSES: [&str; 3] = ["AutoencoderKL", "AutoencoderKLFlux2", Self::TINY];
    /// The class of [`Tiny`](Self::Tiny).
    pub(crate) const TINY: &str = "AutoencoderTiny";

    /// Reads a configuration of the class that it names; `path` is named in errors.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) naming a field of the wrong type.
    pub fn open(config: Value, path: &Path) -> Result<Self> {
        let is_tiny = match config["_class_name"].as_str() {
            Some(class) => class == Self::TINY,
            None => config.get("encoder_block_out_channels").is_some(),
        };
        match is_tiny {
            true => from_value(config, path).map(Self::Tiny),
            false => from_value(config, path).map(Self::Kl),
        }
    }

    /// Checks its consistency; `path` is named in errors.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for a value that contradicts another or is not supported.
    pub(crate) fn check(&self, path: &Path) -> Result<()> {
        match self {
            Self::Kl(config) => config.check(path),
            Self::Tiny(config) => config.check(path),
        }
    }

    /// Channels of its own latents.
    pub fn latent_channels(&self) -> usize {
        match self {
            Self::Kl(config) => config.latent_channels,
            Self::Tiny(config) => config.latent_channels,
        }
    }

    /// Channels of the denoiser's latents.
    pub fn denoised_channels(&self) -> usize {
        match self {
            Self::Kl(config) => config.denoised_channels(),
            Self::Tiny(config) => config.latent_channels,
        }
    }

    /// Pixels on each side of one of the denoiser's latents.
    pub fn pixels(&self) -> usize {
        match self {
            Self::Kl(config) => config.pixels(),
            Self::Tiny(config) => config.downsampling_factor(),
        }
    }

    /// Whether the network overflows in half precision and has to run in f32.
    pub fn force_upcast(&self) -> bool {
        match self {
            Self::Kl(config) => config.force_upcast.unwrap_or(false),
            Self::Tiny(_) => false,
        }
    }

    /// The same with latents that are scaled and not shifted.
    #[must_use]
    pub fn without_shift(mut self) -> Self {
        match &mut self {
            Self::Kl(config) => config.shift_factor = None,
            Self::Tiny(config) => config.shift_factor = None,
        }
        self
    }

    /// Builds the network from `weights`, all of which it must use.
    ///
    /// # Errors
    /// As [`AutoencoderKL::load`].
    pub fn load(&self, weights: &Weights) -> Result<Arc<dyn Autoencoder>> {
        Ok(match self {
            Self::Kl(config) => Arc::new(AutoencoderKL::load(weights, config)?),
            Self::Tiny(config) => Arc::new(AutoencoderTiny::load(weights, config)?),
        })
    }
}
