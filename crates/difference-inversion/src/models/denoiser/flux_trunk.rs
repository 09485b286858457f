//! What the transformers of FLUX.1 and Chroma share: blocks in which picture and prompt have weights of their own,
//! then blocks in which they share weights.

use std::path::Path;

use burn::tensor::{Device, Tensor};
use serde::Deserialize;

use crate::models::denoiser::flux_single_block::SingleBlock;
use crate::models::denoiser::joint_block::{
    BlockOptions, EPSILON, JointBlock, Sight, patches, within_range,
};
use crate::models::denoiser::{Memory, Surroundings, check_numbers};
use crate::models::layers::{Linear, MOST_LAYERS};
use crate::models::rotation::{Pairs, Rotation};
use crate::weights::{OtherFields, Weights};
use crate::{Error, Result};

/// The base θ of the rotary positions' frequencies.
const THETA: f64 = 10_000.0;
/// Latent pixels on each side of a token.
pub(super) const PATCH: usize = 2;

/// The fields of `transformer/config.json` that both have, with the names and defaults of diffusers.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct TrunkConfig {
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
    /// How many numbers of a head encode a token's position on each axis: none, row, column.
    pub axes_dims_rope: Vec<usize>,
}

impl Default for TrunkConfig {
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
            axes_dims_rope: vec![16, 56, 56],
        }
    }
}

impl TrunkConfig {
    /// The width of all tokens inside.
    pub fn width(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// The width of a token of the prediction.
    pub fn out_channels(&self) -> usize {
        self.out_channels.unwrap_or(self.in_channels)
    }

    /// Checks its consistency, that of further `widths` by their fields, and that there are no `other` fields; `path`
    /// is named in errors.
    ///
    /// # Errors
    /// [`Error::Config`] for a value that is out of range or contradicts another, and for an unknown
    /// field.
    pub(super) fn check(
        &self,
        path: &Path,
        widths: &[(&str, usize)],
        other: &OtherFields,
    ) -> Result<()> {
        let wrong = |field: &str, expected: &str, found: &dyn std::fmt::Debug| {
            Err(Error::unsupported(path, field, expected, found))
        };
        let mut unknown = other
            .iter()
            .filter(|(field, value)| !field.starts_with('_') && !value.is_null());
        if let Some((field, value)) = unknown.next() {
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
        let own = [
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels()),
            ("joint_attention_dim", self.joint_attention_dim),
            ("attention_head_dim", self.attention_head_dim),
            ("num_attention_heads", self.num_attention_heads),
        ];
        for (field, value) in own.iter().chain(widths) {
            if !(1..=1 << 16).contains(value) {
                return wrong(field, "1 to 65536", value);
            }
        }
        self.axes(path).map(|_| ())
    }

    /// Checks that it matches latents and text encoders, of which T5 is of width `t5` if it is there.
    ///
    /// # Errors
    /// [`Error::Config`] naming the mismatch.
    pub(super) fn check_around(
        &self,
        path: &Path,
        around: &Surroundings<'_>,
        t5: Option<usize>,
    ) -> Result<()> {
        let latents = Some(around.latent_channels * PATCH * PATCH);
        let of_latents = "four times the channels of the latents";
        let width = self.joint_attention_dim;
        let numbers = [
            ("in_channels", self.in_channels, latents, of_latents),
            ("out_channels", self.out_channels(), latents, of_latents),
            ("joint_attention_dim", width, t5, "the width of T5"),
        ];
        check_numbers(path, numbers)
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
}

/// A block, by its number among those of its kind.
#[derive(Debug, Clone, Copy)]
pub(super) enum Block {
    /// Picture and prompt have weights of their own.
    Double(usize),
    /// They share weights.
    Single(usize),
}

/// The layers from packed latents and hidden states to the prediction, without the last norm.
#[derive(Debug, Clone)]
pub(super) struct Trunk {
    config: TrunkConfig,
    axes: [usize; 3],
    x_embedder: Linear,
    context_embedder: Linear,
    blocks: Vec<JointBlock>,
    single_blocks: Vec<SingleBlock>,
    proj_out: Linear,
}

impl Trunk {
    /// Reads its layers. `modulates`: whether each block has layers that compute its shifts, scales and gates.
    pub(super) fn load(weights: &Weights, config: &TrunkConfig, modulates: bool) -> Result<Self> {
        let d = config.width();
        let linear = |name: &str, d_in, d_out| Linear::load(&weights.scope(name), d_in, d_out);
        let double = weights.scope("transformer_blocks");
        let single = weights.scope("single_transformer_blocks");
        let options = BlockOptions {
            heads: config.num_attention_heads,
            head_dim: config.attention_head_dim,
            qk_norm: true,
            epsilon: EPSILON,
            dual: false,
            last: false,
            bias: true,
            modulates,
        };
        Ok(Self {
            config: config.clone(),
            axes: config.axes(&weights.config_path())?,
            x_embedder: linear("x_embedder", config.in_channels, d)?,
            context_embedder: linear("context_embedder", config.joint_attention_dim, d)?,
            blocks: (0..config.num_layers)
                .map(|number| JointBlock::load(&double.scope(number), options))
                .collect::<Result<_>>()?,
            single_blocks: (0..config.num_single_layers)
                .map(|number| SingleBlock::load(&single.scope(number), options))
                .collect::<Result<_>>()?,
            proj_out: linear("proj_out", d, config.out_channels())?,
        })
    }

    /// Where it computes.
    pub(super) fn device(&self) -> Device {
        self.proj_out.weight().device()
    }

    /// A few weights that distinguish the network from others of its shape: those of the first and
    /// the last layer, and those of the first block's keys of the prompt.
    pub(super) fn telling_weights(&self) -> Vec<Tensor<2>> {
        let ends = [self.x_embedder.weight(), self.proj_out.weight()];
        let keys = self.blocks.first().map(JointBlock::prompt_keys);
        ends.into_iter().chain(keys).collect()
    }

    /// The network's prediction. `told` gives what the modulation of each block is computed from, or consists of; `last`
    /// is the last norm; `key_bias` is that of [`Sight`], the picture's tokens first.
    ///
    /// # Shapes
    /// `latents` `[b, in_channels / 4, h, w]` with even h and w; `context`
    /// `[b, m, joint_attention_dim]`. Result `[b, out_channels / 4, h, w]`.
    pub(super) fn forward(
        &self,
        latents: Tensor<4>,
        context: Tensor<3>,
        key_bias: Option<Tensor<4>>,
        told: impl Fn(Block) -> Tensor<3>,
        last: impl FnOnce(Tensor<3>) -> Tensor<3>,
        memory: Memory,
    ) -> Tensor<4> {
        let [_, _, h, w] = latents.dims();
        let [rows, columns] = [h, w].map(|side| side / PATCH);
        let places = (0..rows).flat_map(|row| (0..columns).map(move |column| [0, row, column]));
        let places: Vec<[usize; 3]> = places.collect();
        let device = latents.device().without_autodiff();
        let sight = Sight {
            rotation: Some(Rotation::new(
                &places,
                self.axes,
                THETA,
                Pairs::Neighbours,
                &device,
            )),
            key_bias,
        };
        let mut x = self.x_embedder.forward(patches(latents, PATCH)); // [b, n, d]
        let mut prompt = self.context_embedder.forward(context); // [b, m, d]
        for (number, block) in self.blocks.iter().enumerate() {
            let told = told(Block::Double(number));
            [x, prompt] = match memory {
                Memory::Normal => block.forward(x, prompt, &told, &sight),
                Memory::Low => block.recomputed(x, prompt, &told, &sight),
            };
            prompt = within_range(prompt);
        }
        let mut x = Tensor::cat(vec![x, prompt], 1); // [b, n + m, d]
        for (number, block) in self.single_blocks.iter().enumerate() {
            let told = told(Block::Single(number));
            x = match memory {
                Memory::Normal => block.forward(x, &told, &sight),
                Memory::Low => block.recomputed(x, &told, &sight),
            };
        }
        let x = last(x.narrow(1, 0, rows * columns));
        self.latents(self.proj_out.forward(x), [rows, columns])
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

/// Tensors of `tokens × width` that a block keeps, counted from its layers and not measured: normalised,
/// modulated, queries, keys and values before and after normalisation and rotation, attended, projected
/// and gated, and the four times wider inside of the feed-forward layers twice.
const BLOCK: usize = 26;
/// The same for a block of one stream.
const SINGLE: usize = 26;
/// Such tensors that are held in addition at the same time, in the backward pass.
const AT_WORK: usize = 12;

impl TrunkConfig {
    /// About how many numbers of activations an optimisation step on the CPU holds at its peak, for `rows` latents of
    /// `height` and `width` in one call of the network, and prompts of `prompt` tokens.
    pub(super) fn step_numbers(
        &self,
        rows: usize,
        [height, width]: [usize; 2],
        prompt: usize,
        memory: Memory,
    ) -> usize {
        let picture = (height / PATCH) * (width / PATCH);
        let numbers = rows * (picture + prompt) * self.width();
        let blocks = self.num_layers * BLOCK + self.num_single_layers * SINGLE;
        let kept = match memory {
            Memory::Normal => blocks,
            Memory::Low => self.num_layers + self.num_single_layers + BLOCK.max(SINGLE),
        };
        (kept + AT_WORK) * numbers
    }
}
