//! The transformer of FLUX.1: `FluxTransformer2DModel` of diffusers
//! ([Black Forest Labs 2024](https://github.com/black-forest-labs/flux)).

use std::path::Path;

use burn::tensor::Tensor;
use serde::Deserialize;

use crate::Result;
use crate::models::denoiser::Memory;
use crate::models::denoiser::flux_trunk::{Trunk, TrunkConfig};
use crate::models::denoiser::joint_block::LastNorm;
use crate::models::denoiser::time_embedding::{
    GUIDANCE_UNIT, TimestepEmbedding, sinusoidal_embedding,
};
use crate::models::layers::Activation;
use crate::weights::{OtherFields, Weights};

/// The width of a time, and of a guidance scale, before the layers that embed it.
const TIME: usize = 256;

/// `transformer/config.json`, with the names and defaults of diffusers.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct FluxConfig {
    /// What it has in common with Chroma.
    #[serde(flatten)]
    pub trunk: TrunkConfig,
    /// The width of the pooled prompt.
    pub pooled_projection_dim: usize,
    /// Whether it takes a guidance scale: it was distilled from guided predictions.
    pub guidance_embeds: bool,
    /// All other fields.
    #[serde(flatten)]
    pub other: OtherFields,
}

impl Default for FluxConfig {
    fn default() -> Self {
        Self {
            trunk: TrunkConfig::default(),
            pooled_projection_dim: 768,
            guidance_embeds: false,
            other: OtherFields::new(),
        }
    }
}

impl FluxConfig {
    /// Checks its consistency; `path` is named in errors.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for a value that is out of range or contradicts another, and for an unknown
    /// field.
    pub fn check(&self, path: &Path) -> Result<()> {
        let widths = [("pooled_projection_dim", self.pooled_projection_dim)];
        self.trunk.check(path, &widths, &self.other)
    }
}

/// The inputs of the network besides latents and prompt, with a row for each.
#[derive(Debug, Clone)]
pub struct Told {
    /// From 0 to 1000, `[b]`.
    pub timesteps: Tensor<1>,
    /// The guidance scale, if the network [takes one](FluxConfig::guidance_embeds).
    pub guidance: f64,
    /// `[b, pooled_projection_dim]`
    pub pooled: Tensor<2>,
}

/// The transformer that predicts the velocity ε − x₀ from noisy latents, a time, a prompt and, if distilled
/// that way, a guidance scale.
#[derive(Debug, Clone)]
pub struct FluxTransformer2DModel {
    config: FluxConfig,
    time: TimestepEmbedding,
    guidance: Option<TimestepEmbedding>,
    pooled: TimestepEmbedding,
    trunk: Trunk,
    norm_out: LastNorm,
}

impl FluxTransformer2DModel {
    /// Builds the network that `config` describes from `weights`, all of which it must use.
    ///
    /// # Errors
    /// As [`FluxConfig::check`]; [`Error::Tensor`](crate::Error::Tensor) if a tensor is missing or of another shape;
    /// [`Error::UnusedTensors`](crate::Error::UnusedTensors) if some are left over.
    pub fn load(weights: &Weights, config: &FluxConfig) -> Result<Self> {
        config.check(&weights.config_path())?;
        let d = config.trunk.width();
        let told = weights.scope("time_text_embed");
        let embedder = |name: &str, d_in: usize| {
            TimestepEmbedding::load(&told.scope(name), [d_in, d], Activation::Silu)
        };
        let network = Self {
            config: config.clone(),
            time: embedder("timestep_embedder", TIME)?,
            guidance: (config.guidance_embeds)
                .then(|| embedder("guidance_embedder", TIME))
                .transpose()?,
            pooled: embedder("text_embedder", config.pooled_projection_dim)?,
            trunk: Trunk::load(weights, &config.trunk, true)?,
            norm_out: LastNorm::load(&weights.scope("norm_out"), d, true)?,
        };
        weights.check_all_used(&[])?;
        Ok(network)
    }

    /// The configuration that the network was built from.
    pub fn config(&self) -> &FluxConfig {
        &self.config
    }

    /// A few weights that distinguish the network from others of its shape.
    pub(crate) fn telling_weights(&self) -> Vec<Tensor<2>> {
        self.trunk.telling_weights()
    }

    /// The network's prediction. Gradients flow to those of `latents`, `context` and the pooled prompt that are
    /// tracked.
    ///
    /// # Shapes
    /// `latents` `[b, in_channels / 4, h, w]` with even h and w; `context`
    /// `[b, m, joint_attention_dim]`. Result `[b, out_channels / 4, h, w]`.
    ///
    /// # Panics
    /// If a shape is not as above.
    pub fn forward(
        &self,
        latents: Tensor<4>,
        context: Tensor<3>,
        told: Told,
        memory: Memory,
    ) -> Tensor<4> {
        // Every modulation activates it before its own layer: this does so once.
        let told = Activation::Silu.forward(self.told(told));
        let told: Tensor<3> = told.unsqueeze_dim(1); // [b, 1, d]
        let of_block = |_| told.clone();
        let last = |x| self.norm_out.forward(x, &told);
        (self.trunk).forward(latents, context, None, of_block, last, memory)
    }

    /// Time, guidance scale and pooled prompt as one vector, `[b, d]`.
    fn told(&self, told: Told) -> Tensor<2> {
        let Told {
            timesteps,
            guidance,
            pooled,
        } = told;
        let dtype = pooled.dtype();
        let scale = timesteps.clone().zeros_like() + guidance as f32 * GUIDANCE_UNIT;
        let waves = |x: Tensor<1>| sinusoidal_embedding(x, TIME, true, 0.0).cast(dtype);
        let mut sum = self.time.forward(waves(timesteps));
        if let Some(embedder) = &self.guidance {
            sum = sum + embedder.forward(waves(scale));
        }
        sum + self.pooled.forward(pooled)
    }
}
