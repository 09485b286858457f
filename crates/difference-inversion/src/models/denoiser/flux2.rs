//! The transformer of FLUX.2 klein: `Flux2Transformer2DModel` of diffusers
//! ([Black Forest Labs 2026](https://bfl.ai/blog/flux2-klein-towards-interactive-visual-intelligence)).

use std::path::Path;

use burn::tensor::Tensor;
use serde::Deserialize;
use serde_json::Value;

use crate::models::denoiser::Memory;
use crate::models::denoiser::flux2_blocks::{DoubleBlock, SingleBlock};
use crate::models::denoiser::joint_block::{BlockOptions, EPSILON, LastNorm, Modulation, patches};
use crate::models::denoiser::time_embedding::{TimestepEmbedding, sinusoidal_embedding};
use crate::models::layers::{Activation, Linear, MOST_LAYERS};
use crate::models::rotation::{Pairs, Rotation};
use crate::weights::{OtherFields, Weights};
use crate::{Error, Result};

/// Axes of a token's position: picture, row, column, position in the prompt.
const AXES: usize = 4;

/// `transformer/config.json`, with the names and defaults of diffusers.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct Flux2Config {
    /// 1: squares are packed into tokens before the network.
    pub patch_size: usize,
    /// The width of a token: the channels of the packed latents.
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
    /// The width of a time before the layers that embed it.
    pub timestep_guidance_channels: usize,
    /// The width of feed-forward layers relative to the tokens.
    pub mlp_ratio: f64,
    /// How many numbers of a head encode a token's position on each axis: picture, row, column, position in the
    /// prompt.
    pub axes_dims_rope: Vec<usize>,
    /// The base θ of the rotary positions' frequencies.
    pub rope_theta: f64,
    /// The small constant of every norm.
    pub eps: f64,
    /// Whether it takes a guidance scale, as FLUX.2 dev does, which is not supported.
    pub guidance_embeds: bool,
    /// All other fields.
    #[serde(flatten)]
    pub other: OtherFields,
}

impl Default for Flux2Config {
    fn default() -> Self {
        Self {
            patch_size: 1,
            in_channels: 128,
            out_channels: None,
            num_layers: 8,
            num_single_layers: 48,
            attention_head_dim: 128,
            num_attention_heads: 48,
            joint_attention_dim: 15360,
            timestep_guidance_channels: 256,
            mlp_ratio: 3.0,
            axes_dims_rope: vec![32; AXES],
            rope_theta: 2000.0,
            eps: EPSILON,
            guidance_embeds: true,
            other: OtherFields::new(),
        }
    }
}

impl Flux2Config {
    /// The width of all tokens inside.
    pub fn width(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// The width of a token of the prediction.
    pub fn out_channels(&self) -> usize {
        self.out_channels.unwrap_or(self.in_channels)
    }

    /// The width of feed-forward layers.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the ratio is positive and at most 64; rounded down, as diffusers does"
    )]
    pub fn inner_width(&self) -> usize {
        (self.width() as f64 * self.mlp_ratio) as usize
    }

    /// Checks its consistency; `path` is named in errors.
    ///
    /// # Errors
    /// [`Error::Config`] for a value that is out of range or contradicts another, for an unknown field,
    /// and for FLUX.2 dev.
    pub fn check(&self, path: &Path) -> Result<()> {
        let wrong = |field: &str, expected: &str, found: &dyn std::fmt::Debug| {
            Err(Error::unsupported(path, field, expected, found))
        };
        let unknown =
            |(field, value): &(&String, &Value)| !field.starts_with('_') && !value.is_null();
        if let Some((field, value)) = self.other.iter().find(unknown) {
            return wrong(field, "no such field", &value.to_string());
        }
        if self.guidance_embeds {
            let expected = "false, as in FLUX.2 klein: FLUX.2 dev, which takes a guidance scale, is not supported";
            return wrong("guidance_embeds", expected, &true);
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
            ("attention_head_dim", self.attention_head_dim),
            ("num_attention_heads", self.num_attention_heads),
        ] {
            if !(1..=1 << 16).contains(&value) {
                return wrong(field, "1 to 65536", &value);
            }
        }
        let time = self.timestep_guidance_channels;
        if !(2..=1 << 16).contains(&time) || !time.is_multiple_of(2) {
            return wrong("timestep_guidance_channels", "an even number", &time);
        }
        if !(self.mlp_ratio > 0.0 && self.mlp_ratio <= 64.0) || self.inner_width() == 0 {
            return wrong("mlp_ratio", "more than 0, at most 64", &self.mlp_ratio);
        }
        if !(1.0..=1e9).contains(&self.rope_theta) {
            return wrong("rope_theta", "1 to 1000000000", &self.rope_theta);
        }
        if self.eps != EPSILON {
            return wrong("eps", "0.000001", &self.eps);
        }
        self.axes(path).map(|_| ())
    }

    /// The numbers of a head for each axis.
    fn axes(&self, path: &Path) -> Result<[usize; AXES]> {
        let head = self.attention_head_dim;
        let axes: Option<[usize; AXES]> = self.axes_dims_rope.as_slice().try_into().ok();
        let fits = |axes: &[usize; AXES]| {
            let each = axes
                .iter()
                .all(|axis| axis.is_multiple_of(2) && *axis <= head);
            each && axes.iter().sum::<usize>() == head
        };
        axes.filter(fits).ok_or_else(|| {
            let expected = format!("four even numbers that add up to {head}, the width of a head");
            Error::unsupported(path, "axes_dims_rope", &expected, &self.axes_dims_rope)
        })
    }

    fn block(&self) -> BlockOptions {
        BlockOptions {
            heads: self.num_attention_heads,
            head_dim: self.attention_head_dim,
            qk_norm: true,
            epsilon: EPSILON,
            dual: false,
            last: false,
            bias: false,
            modulates: true,
        }
    }
}

/// The modulations that all blocks of a kind share.
#[derive(Debug, Clone)]
struct Modulations {
    picture: Modulation,
    prompt: Modulation,
    single: Modulation,
}

/// The transformer that predicts the velocity ε − x₀ from noisy latents, a time and a prompt.
#[derive(Debug, Clone)]
pub struct Flux2Transformer2DModel {
    config: Flux2Config,
    axes: [usize; AXES],
    x_embedder: Linear,
    time: TimestepEmbedding,
    context_embedder: Linear,
    modulations: Modulations,
    blocks: Vec<DoubleBlock>,
    single_blocks: Vec<SingleBlock>,
    norm_out: LastNorm,
    proj_out: Linear,
}

impl Flux2Transformer2DModel {
    /// Builds the network that `config` describes from `weights`, all of which it must use.
    ///
    /// # Errors
    /// As [`Flux2Config::check`]; [`Error::Tensor`] if a tensor is missing or of another shape;
    /// [`Error::UnusedTensors`] if some are left over.
    pub fn load(weights: &Weights, config: &Flux2Config) -> Result<Self> {
        config.check(&weights.config_path())?;
        let (d, inner) = (config.width(), config.inner_width());
        let linear =
            |name: &str, d_in, d_out| Linear::load_without_bias(&weights.scope(name), d_in, d_out);
        let modulation =
            |name: &str, parts| Modulation::load(&weights.scope(name), d, parts, false);
        let double = weights.scope("transformer_blocks");
        let single = weights.scope("single_transformer_blocks");
        let network = Self {
            config: config.clone(),
            axes: config.axes(&weights.config_path())?,
            x_embedder: linear("x_embedder", config.in_channels, d)?,
            time: TimestepEmbedding::load_with(
                &weights.scope("time_guidance_embed.timestep_embedder"),
                [config.timestep_guidance_channels, d],
                Activation::Silu,
                false,
            )?,
            context_embedder: linear("context_embedder", config.joint_attention_dim, d)?,
            modulations: Modulations {
                picture: modulation("double_stream_modulation_img", 6)?,
                prompt: modulation("double_stream_modulation_txt", 6)?,
                single: modulation("single_stream_modulation", 3)?,
            },
            blocks: (0..config.num_layers)
                .map(|number| DoubleBlock::load(&double.scope(number), config.block(), inner))
                .collect::<Result<_>>()?,
            single_blocks: (0..config.num_single_layers)
                .map(|number| SingleBlock::load(&single.scope(number), config.block(), inner))
                .collect::<Result<_>>()?,
            norm_out: LastNorm::load(&weights.scope("norm_out"), d, false)?,
            proj_out: linear("proj_out", d, config.out_channels())?,
        };
        weights.check_all_used(&[])?;
        Ok(network)
    }

    /// The configuration that the network was built from.
    pub fn config(&self) -> &Flux2Config {
        &self.config
    }

    /// A few weights that distinguish the network from others of its shape: those of the first and
    /// the last layer, and those of the first block's keys of the prompt.
    pub(crate) fn telling_weights(&self) -> Vec<Tensor<2>> {
        let ends = [self.x_embedder.weight(), self.proj_out.weight()];
        let keys = self.blocks.first().map(DoubleBlock::prompt_keys);
        ends.into_iter().chain(keys).collect()
    }

    /// The network's prediction. Gradients flow to those of `latents` and `context` that are tracked.
    ///
    /// # Shapes
    /// `latents` `[b, in_channels, h, w]`, `timesteps` `[b]` from 0 to 1000, `context`
    /// `[b, m, joint_attention_dim]`. Result `[b, out_channels, h, w]`.
    ///
    /// # Panics
    /// If a shape is not as above.
    pub fn forward(
        &self,
        latents: Tensor<4>,
        timesteps: Tensor<1>,
        context: Tensor<3>,
        memory: Memory,
    ) -> Tensor<4> {
        let ([b, _, h, w], d) = (latents.dims(), self.config.width());
        let waves = self.config.timestep_guidance_channels;
        let waves = sinusoidal_embedding(timesteps, waves, true, 0.0).cast(context.dtype());
        // Every modulation activates it before its own layer: this does so once.
        let told = Activation::Silu.forward(self.time.forward(waves));
        let told = told.reshape([b, 1, d]);
        let parts = self.modulations.picture.parts(&told);
        let prompt_parts = self.modulations.prompt.parts(&told);
        let single_parts = self.modulations.single.parts(&told);
        let picture = (0..h).flat_map(|row| (0..w).map(move |column| [0, row, column, 0]));
        let words = (0..context.dims()[1]).map(|place| [0, 0, 0, place]);
        let places: Vec<[usize; AXES]> = picture.chain(words).collect();
        let device = latents.device().without_autodiff();
        let theta = self.config.rope_theta;
        let rotation = Rotation::new(&places, self.axes, theta, Pairs::Neighbours, &device);
        let x = self.x_embedder.forward(patches(latents, 1)); // [b, n, d]
        let prompt = self.context_embedder.forward(context); // [b, m, d]
        let mut both = [x, prompt];
        for block in &self.blocks {
            let parts = [&parts[..], &prompt_parts];
            both = match memory {
                Memory::Normal => block.forward(both, parts, &rotation),
                Memory::Low => block.recomputed(both, parts, &rotation),
            };
        }
        let mut x = Tensor::cat(both.to_vec(), 1); // [b, n + m, d]
        for block in &self.single_blocks {
            x = match memory {
                Memory::Normal => block.forward(x, &single_parts, &rotation),
                Memory::Low => block.recomputed(x, &single_parts, &rotation),
            };
        }
        let x = self.norm_out.forward(x.narrow(1, 0, h * w), &told);
        let tokens = self.proj_out.forward(x); // [b, n, out_channels]
        let c = self.config.out_channels();
        tokens.swap_dims(1, 2).reshape([b, c, h, w])
    }
}
