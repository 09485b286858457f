//! The transformer of FLUX.1: `FluxTransformer2DModel` of diffusers
//! ([Black Forest Labs 2024](https://github.com/black-forest-labs/flux)).

use std::path::Path;

use burn::tensor::Tensor;
use serde::Deserialize;
use serde_json::Value;

use crate::models::denoiser::Memory;
use crate::models::denoiser::flux_single_block::SingleBlock;
use crate::models::denoiser::joint_block::{
    BlockOptions, EPSILON, JointBlock, LastNorm, patches, within_range,
};
use crate::models::denoiser::time_embedding::{
    GUIDANCE_UNIT, TimestepEmbedding, sinusoidal_embedding,
};
use crate::models::layers::{Activation, Linear, MOST_LAYERS};
use crate::models::rotation::{Pairs, Rotation};
use crate::weights::{OtherFields, Weights};
use crate::{Error, Result};

/// The width of a time, and of a guidance scale, before the layers that embed it.
const TIME: usize = 256;
/// The base θ of the rotary positions' frequencies.
const THETA: f64 = 10_000.0;
/// Latent pixels on each side of a token.
pub(super) const PATCH: usize = 2;

/// `transformer/config.json`, with the names and defaults of diffusers.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct FluxConfig {
    /// 1: squares are packed into tokens before the network.
    pub patch_size: usize,
    /// The width of a token: four times the channels of the latents.
    pub in_channels: usize,
    /// The width of a token of the prediction; null means the same.
    pub out_channels: Option<usize>,
    /// The number of blocks in which picture and prompt have weights of their own.
    pub num_layers: usize,
    /// The number of blocks after these in which they share weights.
    pub num_single_layers: usize,
    /// The width of each head.
    pub attention_head_dim: usize,
    /// Heads of each attention.
    pub num_attention_heads: usize,
    /// The width of the prompt's hidden states.
    pub joint_attention_dim: usize,
    /// The width of the pooled prompt.
    pub pooled_projection_dim: usize,
    /// Whether it takes a guidance scale: it was distilled from guided predictions.
    pub guidance_embeds: bool,
    /// How many numbers of a head encode a token's position on each axis: none, row, column.
    pub axes_dims_rope: Vec<usize>,
    /// All other fields.
    #[serde(flatten)]
    pub other: OtherFields,
}

impl Default for FluxConfig {
    fn default() -> Self {
        Self {
            patch_size: 1,
            in_channels: 64,
            out_channels: None,
            num_layers: 19,
            num_single_layers: 38,
            attention_head_dim: 128,
            num_attention_heads: 24,
            joint_attention_dim: 4096,
            pooled_projection_dim: 768,
            guidance_embeds: false,
            axes_dims_rope: vec![16, 56, 56],
            other: OtherFields::new(),
        }
    }
}

impl FluxConfig {
    /// The width of all tokens inside.
    pub fn width(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// The width of a token of the prediction.
    pub fn out_channels(&self) -> usize {
        self.out_channels.unwrap_or(self.in_channels)
    }

    /// Checks its consistency; `path` is named in errors.
    ///
    /// # Errors
    /// [`Error::Config`] for a value that is out of range or contradicts another, and for an unknown
    /// field.
    pub fn check(&self, path: &Path) -> Result<()> {
        let wrong = |field: &str, expected: &str, found: &dyn std::fmt::Debug| {
            Err(Error::unsupported(path, field, expected, found))
        };
        let unknown =
            |(field, value): &(&String, &Value)| !field.starts_with('_') && !value.is_null();
        if let Some((field, value)) = self.other.iter().find(unknown) {
            return wrong(field, "no such field", &value.to_string());
        }
        if self.patch_size != 1 {
            return wrong("patch_size", "1", &self.patch_size);
        }
        for (field, layers) in [
            ("num_layers", self.num_layers),
            ("num_single_layers", self.num_single_layers),
        ] {
            if !(1..=MOST_LAYERS).contains(&layers) {
                return wrong(field, &format!("1 to {MOST_LAYERS}"), &layers);
            }
        }
        for (field, value) in [
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels()),
            ("joint_attention_dim", self.joint_attention_dim),
            ("pooled_projection_dim", self.pooled_projection_dim),
            ("attention_head_dim", self.attention_head_dim),
            ("num_attention_heads", self.num_attention_heads),
        ] {
            if !(1..=1 << 16).contains(&value) {
                return wrong(field, "1 to 65536", &value);
            }
        }
        self.axes(path).map(|_| ())
    }

    /// The numbers of a head for each axis.
    fn axes(&self, path: &Path) -> Result<[usize; 3]> {
        let head = self.attention_head_dim;
        let axes: Option<[usize; 3]> = self.axes_dims_rope.as_slice().try_into().ok();
        let fits = |axes: &[usize; 3]| {
            let each = axes
                .iter()
                .all(|axis| axis.is_multiple_of(2) && *axis <= head);
            each && axes.iter().sum::<usize>() == head
        };
        axes.filter(fits).ok_or_else(|| {
            let expected = format!("three even numbers that add up to {head}, the width of a head");
            Error::unsupported(path, "axes_dims_rope", &expected, &self.axes_dims_rope)
        })
    }

    /// The options of its blocks.
    pub(super) fn block(&self) -> BlockOptions {
        BlockOptions {
            heads: self.num_attention_heads,
            head_dim: self.attention_head_dim,
            qk_norm: true,
            epsilon: EPSILON,
            dual: false,
            last: false,
            bias: true,
        }
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
    axes: [usize; 3],
    x_embedder: Linear,
    time: TimestepEmbedding,
    guidance: Option<TimestepEmbedding>,
    pooled: TimestepEmbedding,
    context_embedder: Linear,
    blocks: Vec<JointBlock>,
    single_blocks: Vec<SingleBlock>,
    norm_out: LastNorm,
    proj_out: Linear,
}

impl FluxTransformer2DModel {
    /// Builds the network that `config` describes from `weights`, all of which it must use.
    ///
    /// # Errors
    /// As [`FluxConfig::check`]; [`Error::Tensor`] if a tensor is missing or of another shape;
    /// [`Error::UnusedTensors`] if some are left over.
    pub fn load(weights: &Weights, config: &FluxConfig) -> Result<Self> {
        config.check(&weights.config_path())?;
        let d = config.width();
        let told = weights.scope("time_text_embed");
        let embedder = |name: &str, d_in: usize| {
            TimestepEmbedding::load(&told.scope(name), [d_in, d], Activation::Silu)
        };
        let linear = |name: &str, d_in, d_out| Linear::load(&weights.scope(name), d_in, d_out);
        let double = weights.scope("transformer_blocks");
        let single = weights.scope("single_transformer_blocks");
        let network = Self {
            config: config.clone(),
            axes: config.axes(&weights.config_path())?,
            x_embedder: linear("x_embedder", config.in_channels, d)?,
            time: embedder("timestep_embedder", TIME)?,
            guidance: (config.guidance_embeds)
                .then(|| embedder("guidance_embedder", TIME))
                .transpose()?,
            pooled: embedder("text_embedder", config.pooled_projection_dim)?,
            context_embedder: linear("context_embedder", config.joint_attention_dim, d)?,
            blocks: (0..config.num_layers)
                .map(|number| JointBlock::load(&double.scope(number), config.block()))
                .collect::<Result<_>>()?,
            single_blocks: (0..config.num_single_layers)
                .map(|number| SingleBlock::load(&single.scope(number), config.block()))
                .collect::<Result<_>>()?,
            norm_out: LastNorm::load(&weights.scope("norm_out"), d, true)?,
            proj_out: linear("proj_out", d, config.out_channels())?,
        };
        weights.check_all_used(&[])?;
        Ok(network)
    }

    /// The configuration that the network was built from.
    pub fn config(&self) -> &FluxConfig {
        &self.config
    }

    /// A few weights that distinguish the network from others of its shape: those of the first and
    /// the last layer, and those of the first block's keys of the prompt.
    pub(crate) fn telling_weights(&self) -> Vec<Tensor<2>> {
        let ends = [self.x_embedder.weight(), self.proj_out.weight()];
        let keys = self.blocks.first().map(JointBlock::prompt_keys);
        ends.into_iter().chain(keys).collect()
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
        let [b, _, h, w] = latents.dims();
        let [rows, columns] = [h, w].map(|side| side / PATCH);
        let told = self.told(told);
        // Every modulation activates it before its own layer: this does so once.
        let told = Activation::Silu.forward(told);
        let told = told.reshape([b, 1, self.config.width()]);
        let places = (0..rows).flat_map(|row| (0..columns).map(move |column| [0, row, column]));
        let places: Vec<[usize; 3]> = places.collect();
        let device = latents.device().without_autodiff();
        let rotation = Rotation::new(&places, self.axes, THETA, Pairs::Neighbours, &device);
        let mut x = self.x_embedder.forward(patches(latents, PATCH)); // [b, n, d]
        let mut prompt = self.context_embedder.forward(context); // [b, m, d]
        for block in &self.blocks {
            [x, prompt] = match memory {
                Memory::Normal => block.forward(x, prompt, &told, Some(&rotation)),
                Memory::Low => block.recomputed(x, prompt, &told, Some(&rotation)),
            };
            prompt = within_range(prompt);
        }
        let mut x = Tensor::cat(vec![x, prompt], 1); // [b, n + m, d]
        for block in &self.single_blocks {
            x = match memory {
                Memory::Normal => block.forward(x, &told, &rotation),
                Memory::Low => block.recomputed(x, &told, &rotation),
            };
        }
        let x = self.norm_out.forward(x.narrow(1, 0, rows * columns), &told);
        self.latents(self.proj_out.forward(x), [rows, columns])
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

    /// Latents from tokens with the features (c, p, q).
    fn latents(&self, tokens: Tensor<3>, [rows, columns]: [usize; 2]) -> Tensor<4> {
        let c = self.config.out_channels() / (PATCH * PATCH);
        let b = tokens.dims()[0];
        tokens
            .reshape([b, rows, columns, c, PATCH, PATCH])
            .permute([0, 3, 1, 4, 2, 5])
            .reshape([b, c, rows * PATCH, columns * PATCH])
    }
}
