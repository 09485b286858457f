//! The multimodal transformer of Stable Diffusion 3 and 3.5: `SD3Transformer2DModel` of diffusers
//! ([Esser et al. 2024](https://arxiv.org/abs/2403.03206)).

use std::path::Path;

use burn::tensor::Tensor;
use serde::Deserialize;

use crate::models::denoiser::Memory;
use crate::models::denoiser::joint_block::{
    BlockOptions, EPSILON, JointBlock, LastNorm, Sight, patches,
};
use crate::models::denoiser::time_embedding::{TimestepEmbedding, sinusoidal_embedding};
use crate::models::layers::{Activation, Linear, MOST_LAYERS};
use crate::weights::Weights;
use crate::{Error, Result};

/// The width of a time before the layers that embed it.
const TIME: usize = 256;

/// `transformer/config.json`, with the names and defaults of diffusers.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct SD3Config {
    /// Height and width of the latents that it was trained on.
    pub sample_size: u64,
    /// Latent pixels on each side of a token.
    pub patch_size: usize,
    /// Channels of the latents.
    pub in_channels: usize,
    /// The number of blocks.
    pub num_layers: usize,
    /// The width of each head.
    pub attention_head_dim: usize,
    /// Heads of each attention.
    pub num_attention_heads: usize,
    /// The width of the prompt's hidden states.
    pub joint_attention_dim: usize,
    /// The width of the prompt inside, equal to that of all heads together.
    pub caption_projection_dim: usize,
    /// The width of the pooled prompt.
    pub pooled_projection_dim: usize,
    /// Channels of the prediction; null means those of the latents.
    pub out_channels: Option<usize>,
    /// The maximum number of tokens on each side.
    pub pos_embed_max_size: usize,
    /// The blocks whose picture has a second attention, to itself.
    pub dual_attention_layers: Vec<usize>,
    /// `rms_norm` if queries and keys are normalised, else null.
    pub qk_norm: Option<String>,
}

impl Default for SD3Config {
    fn default() -> Self {
        Self {
            sample_size: 128,
            patch_size: 2,
            in_channels: 16,
            num_layers: 18,
            attention_head_dim: 64,
            num_attention_heads: 18,
            joint_attention_dim: 4096,
            caption_projection_dim: 1152,
            pooled_projection_dim: 2048,
            out_channels: Some(16),
            pos_embed_max_size: 96,
            dual_attention_layers: Vec::new(),
            qk_norm: None,
        }
    }
}

impl SD3Config {
    /// The width of all tokens inside.
    pub fn width(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// Channels of the prediction.
    pub fn out_channels(&self) -> usize {
        self.out_channels.unwrap_or(self.in_channels)
    }

    /// Checks its consistency; `path` is named in errors.
    ///
    /// # Errors
    /// [`Error::Config`] for a value that is out of range or contradicts another.
    pub fn check(&self, path: &Path) -> Result<()> {
        let wrong = |field: &str, expected: &str, found: &dyn std::fmt::Debug| {
            Err(Error::unsupported(path, field, expected, found))
        };
        let layers = self.num_layers;
        if !(1..=MOST_LAYERS).contains(&layers) {
            return wrong("num_layers", &format!("1 to {MOST_LAYERS}"), &layers);
        }
        for (field, value) in [
            ("patch_size", self.patch_size),
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels()),
            ("joint_attention_dim", self.joint_attention_dim),
            ("pooled_projection_dim", self.pooled_projection_dim),
            ("attention_head_dim", self.attention_head_dim),
            ("num_attention_heads", self.num_attention_heads),
            ("pos_embed_max_size", self.pos_embed_max_size),
        ] {
            if !(1..=1 << 16).contains(&value) {
                return wrong(field, "1 to 65536", &value);
            }
        }
        let width = self.width();
        if self.caption_projection_dim != width {
            let expected = format!("{width}, the width of all heads");
            return wrong(
                "caption_projection_dim",
                &expected,
                &self.caption_projection_dim,
            );
        }
        if let Some(kind) = self.qk_norm.as_deref().filter(|kind| *kind != "rms_norm") {
            return wrong("qk_norm", "null or \"rms_norm\"", &kind);
        }
        if let Some(layer) = self.dual_attention_layers.iter().find(|&&i| i >= layers) {
            let expected = format!("numbers below {layers}, the number of blocks");
            return wrong("dual_attention_layers", &expected, layer);
        }
        Ok(())
    }

    /// The options of block `number`.
    pub(super) fn block(&self, number: usize) -> BlockOptions {
        BlockOptions {
            heads: self.num_attention_heads,
            head_dim: self.attention_head_dim,
            qk_norm: self.qk_norm.is_some(),
            epsilon: EPSILON,
            dual: self.dual_attention_layers.contains(&number),
            last: number + 1 == self.num_layers,
            bias: true,
            modulates: true,
        }
    }
}

/// The transformer that predicts the velocity ε − x₀ from noisy latents, a time and a prompt.
#[derive(Debug, Clone)]
pub struct SD3Transformer2DModel {
    config: SD3Config,
    /// Maps the `in_channels · patch · patch` numbers of a token.
    patches: Linear,
    /// `[side, side, d]`
    positions: Tensor<3>,
    time: TimestepEmbedding,
    pooled: TimestepEmbedding,
    context_embedder: Linear,
    blocks: Vec<JointBlock>,
    norm_out: LastNorm,
    proj_out: Linear,
}

impl SD3Transformer2DModel {
    /// Builds the network that `config` describes from `weights`, all of which it must use.
    ///
    /// # Errors
    /// As [`SD3Config::check`]; [`Error::Tensor`] if a tensor is missing or of another shape;
    /// [`Error::UnusedTensors`] if some are left over.
    pub fn load(weights: &Weights, config: &SD3Config) -> Result<Self> {
        config.check(&weights.config_path())?;
        let (d, patch, side) = (config.width(), config.patch_size, config.pos_embed_max_size);
        let (channels, embed) = (config.in_channels, weights.scope("pos_embed"));
        let proj = embed.scope("proj");
        let kernel = proj.matrix("weight", [d, channels, patch, patch])?;
        let told = weights.scope("time_text_embed");
        let embedder = |name: &str, d_in: usize| {
            TimestepEmbedding::load(&told.scope(name), [d_in, d], Activation::Silu)
        };
        let blocks = weights.scope("transformer_blocks");
        let network = Self {
            config: config.clone(),
            patches: Linear::new(
                kernel.reshape([d, channels * patch * patch]),
                Some(proj.tensor("bias", [d])?),
            ),
            positions: (embed.tensor("pos_embed", [1, side * side, d])?).reshape([side, side, d]),
            time: embedder("timestep_embedder", TIME)?,
            pooled: embedder("text_embedder", config.pooled_projection_dim)?,
            context_embedder: Linear::load(
                &weights.scope("context_embedder"),
                config.joint_attention_dim,
                d,
            )?,
            blocks: (0..config.num_layers)
                .map(|number| JointBlock::load(&blocks.scope(number), config.block(number)))
                .collect::<Result<_>>()?,
            norm_out: LastNorm::load(&weights.scope("norm_out"), d, true)?,
            proj_out: Linear::load(
                &weights.scope("proj_out"),
                d,
                patch * patch * config.out_channels(),
            )?,
        };
        weights.check_all_used(&[])?;
        Ok(network)
    }

    /// The configuration that the network was built from.
    pub fn config(&self) -> &SD3Config {
        &self.config
    }

    /// A few weights that distinguish the network from others of its shape: those of the first and
    /// the last layer, and those of the first block's keys of the prompt.
    pub(crate) fn telling_weights(&self) -> Vec<Tensor<2>> {
        let ends = [self.patches.weight(), self.proj_out.weight()];
        let keys = self.blocks.first().map(JointBlock::prompt_keys);
        ends.into_iter().chain(keys).collect()
    }

    /// The network's prediction. Gradients flow to those of `latents`, `context` and `pooled` that are
    /// tracked.
    ///
    /// # Shapes
    /// `latents` `[b, in_channels, h, w]` with h and w multiples of the patch size, and no more
    /// than `pos_embed_max_size` patches each; `timesteps` `[b]` from 0 to 1000; `context`
    /// `[b, m, joint_attention_dim]`; `pooled` `[b, pooled_projection_dim]`. Result `[b,
    /// out_channels, h, w]`.
    ///
    /// # Panics
    /// If a shape is not as above.
    pub fn forward(
        &self,
        latents: Tensor<4>,
        timesteps: Tensor<1>,
        context: Tensor<3>,
        pooled: Tensor<2>,
        memory: Memory,
    ) -> Tensor<4> {
        let dtype = latents.dtype();
        let [b, _, h, w] = latents.dims();
        let size = [h, w].map(|side| side / self.config.patch_size);
        let time = sinusoidal_embedding(timesteps, TIME, true, 0.0).cast(dtype);
        let told = self.time.forward(time) + self.pooled.forward(pooled);
        // Every modulation activates it before its own layer: this does so once.
        let told = Activation::Silu.forward(told);
        let told = told.reshape([b, 1, self.config.width()]);
        let mut x = self.tokens(latents) + self.positions(size).cast(dtype);
        let mut prompt = self.context_embedder.forward(context);
        let sight = Sight::default();
        for block in &self.blocks {
            [x, prompt] = match memory {
                Memory::Normal => block.forward(x, prompt, &told, &sight),
                Memory::Low => block.recomputed(x, prompt, &told, &sight),
            };
        }
        let x = self.norm_out.forward(x, &told);
        self.latents(self.proj_out.forward(x), size)
    }

    /// One token per patch, with the features (c, p, q), `[b, n, d]`.
    fn tokens(&self, latents: Tensor<4>) -> Tensor<3> {
        self.patches
            .forward(patches(latents, self.config.patch_size))
    }

    /// The middle of the table of positions, `[1, n, d]`.
    fn positions(&self, [rows, columns]: [usize; 2]) -> Tensor<3> {
        let side = self.config.pos_embed_max_size;
        let middle = (self.positions.clone())
            .narrow(0, (side - rows) / 2, rows)
            .narrow(1, (side - columns) / 2, columns);
        middle.reshape([1, rows * columns, self.config.width()])
    }

    /// Latents from tokens with the features (p, q, c).
    fn latents(&self, tokens: Tensor<3>, [rows, columns]: [usize; 2]) -> Tensor<4> {
        let (patch, c) = (self.config.patch_size, self.config.out_channels());
        let b = tokens.dims()[0];
        tokens
            .reshape([b, rows, columns, patch, patch, c])
            .permute([0, 5, 1, 3, 2, 4])
            .reshape([b, c, rows * patch, columns * patch])
    }
}
