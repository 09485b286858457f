//! The transformer of Z-Image: `ZImageTransformer2DModel` of diffusers
//! ([Z-Image Team 2025](https://arxiv.org/abs/2511.22699)).

use std::path::Path;

use burn::tensor::Tensor;
use serde::Deserialize;
use serde_json::Value;

use crate::models::denoiser::Memory;
use crate::models::denoiser::conditions::present;
use crate::models::denoiser::joint_block::{BlockOptions, EPSILON};
use crate::models::denoiser::time_embedding::{TimestepEmbedding, sinusoidal_embedding};
use crate::models::denoiser::z_image_block::Block;
use crate::models::layers::{Activation, LayerNorm, Linear, MOST_LAYERS, RmsNorm};
use crate::models::rotation::{Pairs, Rotation};
use crate::weights::{OtherFields, Weights};
use crate::{Error, Result};

/// Axes of a token's place: place in the prompt, row, column.
const AXES: usize = 3;
/// Tokens of the picture and of the prompt are padded to a multiple of this number.
const MULTIPLE: usize = 32;
/// The width of a time before it is embedded.
const WAVES: usize = 256;
/// The width between the two layers that embed a time.
const TIME_INNER: usize = 1024;
/// The most width of an embedded time.
const TIME: usize = 256;
/// Latent pixels on each side of a token's square.
const PATCH: usize = 2;
/// The small constant of the norms of queries and keys.
const HEAD_EPSILON: f64 = 1e-5;

/// `transformer/config.json`, with the names and defaults of diffusers.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct ZImageConfig {
    /// Latent pixels on each side of a token's square: `[2]`.
    pub all_patch_size: Vec<usize>,
    /// The same along time: `[1]`.
    pub all_f_patch_size: Vec<usize>,
    /// Channels of the latents and of the prediction.
    pub in_channels: usize,
    /// The width of all tokens inside.
    pub dim: usize,
    /// The number of blocks that picture and prompt go through together.
    pub n_layers: usize,
    /// The number of blocks that either goes through alone, before.
    pub n_refiner_layers: usize,
    /// Heads of each attention.
    pub n_heads: usize,
    /// Heads of keys and values: as many.
    pub n_kv_heads: usize,
    /// The small constant of the norms around each half of a block.
    pub norm_eps: f64,
    /// Whether queries and keys are normalised.
    pub qk_norm: bool,
    /// The width of the prompt's hidden states.
    pub cap_feat_dim: usize,
    /// The width of the features of pictures that Z-Image Omni reads: null.
    pub siglip_feat_dim: Option<usize>,
    /// The base θ of the rotary positions' frequencies.
    pub rope_theta: f64,
    /// What times from 0 to 1 are multiplied by.
    pub t_scale: f64,
    /// How many numbers of a head encode a token's place on each axis: place in the prompt, row, column.
    pub axes_dims: Vec<usize>,
    /// The number of places on each axis.
    pub axes_lens: Vec<usize>,
    /// All other fields.
    #[serde(flatten)]
    pub other: OtherFields,
}

impl Default for ZImageConfig {
    fn default() -> Self {
        Self {
            all_patch_size: vec![PATCH],
            all_f_patch_size: vec![1],
            in_channels: 16,
            dim: 3840,
            n_layers: 30,
            n_refiner_layers: 2,
            n_heads: 30,
            n_kv_heads: 30,
            norm_eps: 1e-5,
            qk_norm: true,
            cap_feat_dim: 2560,
            siglip_feat_dim: None,
            rope_theta: 256.0,
            t_scale: 1000.0,
            axes_dims: vec![32, 48, 48],
            axes_lens: vec![1024, 512, 512],
            other: OtherFields::new(),
        }
    }
}

impl ZImageConfig {
    /// The width of feed-forward layers.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "rounded down, as diffusers does"
    )]
    pub fn inner_width(&self) -> usize {
        (self.dim as f64 / 3.0 * 8.0) as usize
    }

    /// The width of an embedded time.
    pub fn time_width(&self) -> usize {
        self.dim.min(TIME)
    }

    /// The most that height and width of the latents may be.
    pub fn largest(&self) -> usize {
        PATCH * self.axes_lens.iter().skip(1).copied().min().unwrap_or(0)
    }

    /// Checks it in itself; `path` is named in errors.
    ///
    /// # Errors
    /// [`Error::Config`] for a value that is out of range or contradicts another, for an unknown field, and
    /// for Z-Image Omni.
    pub fn check(&self, path: &Path) -> Result<()> {
        let wrong = |field: &str, expected: &str, found: &dyn std::fmt::Debug| {
            Err(Error::unsupported(path, field, expected, found))
        };
        let unknown =
            |(field, value): &(&String, &Value)| !field.starts_with('_') && !value.is_null();
        if let Some((field, value)) = self.other.iter().find(unknown) {
            return wrong(field, "no such field", &value.to_string());
        }
        if let Some(width) = self.siglip_feat_dim {
            let expected = "null: Z-Image Omni, which reads pictures, is not supported";
            return wrong("siglip_feat_dim", expected, &width);
        }
        for (field, sizes, expected) in [
            ("all_patch_size", &self.all_patch_size, PATCH),
            ("all_f_patch_size", &self.all_f_patch_size, 1),
        ] {
            if *sizes != [expected] {
                return wrong(field, &format!("[{expected}]"), sizes);
            }
        }
        for (field, layers) in [
            ("n_layers", self.n_layers),
            ("n_refiner_layers", self.n_refiner_layers),
        ] {
            if !(1..=MOST_LAYERS).contains(&layers) {
                return wrong(field, &format!("1 to {MOST_LAYERS}"), &layers);
            }
        }
        for (field, value) in [
            ("in_channels", self.in_channels),
            ("cap_feat_dim", self.cap_feat_dim),
            ("dim", self.dim),
            ("n_heads", self.n_heads),
        ] {
            if !(1..=1 << 16).contains(&value) {
                return wrong(field, "1 to 65536", &value);
            }
        }
        if !self.dim.is_multiple_of(self.n_heads) {
            let expected = format!("a number that divides {}, the width", self.dim);
            return wrong("n_heads", &expected, &self.n_heads);
        }
        if self.n_kv_heads != self.n_heads {
            return wrong("n_kv_heads", &self.n_heads.to_string(), &self.n_kv_heads);
        }
        for (field, value, range) in [
            ("norm_eps", self.norm_eps, 1e-12..=1.0),
            ("rope_theta", self.rope_theta, 1.0..=1e9),
            ("t_scale", self.t_scale, 1e-3..=1e6),
        ] {
            if !range.contains(&value) {
                let expected = format!("{:?} to {:?}", range.start(), range.end());
                return wrong(field, &expected, &value);
            }
        }
        let lengths = &self.axes_lens;
        if lengths.len() != AXES || lengths.iter().any(|n| !(1..=1 << 20).contains(n)) {
            return wrong("axes_lens", "three numbers from 1 to 1048576", lengths);
        }
        self.axes(path).map(|_| ())
    }

    /// The numbers of a head for each axis.
    fn axes(&self, path: &Path) -> Result<[usize; AXES]> {
        let head = self.dim / self.n_heads;
        let axes: Option<[usize; AXES]> = self.axes_dims.as_slice().try_into().ok();
        let fits = |axes: &[usize; AXES]| {
            let each = axes
                .iter()
                .all(|axis| axis.is_multiple_of(2) && *axis <= head);
            each && axes.iter().sum::<usize>() == head
        };
        axes.filter(fits).ok_or_else(|| {
            let expected = format!("three even numbers that add up to {head}, the width of a head");
            Error::unsupported(path, "axes_dims", &expected, &self.axes_dims)
        })
    }

    fn block(&self) -> BlockOptions {
        BlockOptions {
            heads: self.n_heads,
            head_dim: self.dim / self.n_heads,
            qk_norm: self.qk_norm,
            epsilon: HEAD_EPSILON,
            dual: false,
            last: false,
            bias: false,
            modulates: true,
        }
    }
}

/// The transformer that predicts the velocity x₀ − ε from noisy latents, a time and a prompt.
#[derive(Debug, Clone)]
pub struct ZImageTransformer2DModel {
    config: ZImageConfig,
    axes: [usize; AXES],
    picture_embedder: Linear,
    /// What fills up the picture's tokens, [1, d].
    picture_pad: Tensor<2>,
    picture_blocks: Vec<Block>,
    prompt_norm: RmsNorm,
    prompt_embedder: Linear,
    /// What fills up the prompt's tokens, [1, d].
    prompt_pad: Tensor<2>,
    prompt_blocks: Vec<Block>,
    time: TimestepEmbedding,
    blocks: Vec<Block>,
    last_norm: LayerNorm,
    last_scale: Linear,
    last: Linear,
}

impl ZImageTransformer2DModel {
    /// Builds the network that `config` describes from `weights`, all of which it must use.
    ///
    /// # Errors
    /// As [`ZImageConfig::check`]; [`Error::Tensor`] if a tensor is missing or of another shape;
    /// [`Error::UnusedTensors`] if some are left over.
    pub fn load(weights: &Weights, config: &ZImageConfig) -> Result<Self> {
        config.check(&weights.config_path())?;
        let (d, time) = (config.dim, config.time_width());
        let features = PATCH * PATCH * config.in_channels;
        let blocks = |name: &str, count, told| {
            let scope = weights.scope(name);
            (0..count)
                .map(|number| Block::load(&scope.scope(number), config, config.block(), told))
                .collect::<Result<Vec<_>>>()
        };
        let prompt = weights.scope("cap_embedder");
        let times = weights.scope("t_embedder.mlp");
        let last = weights.scope("all_final_layer.2-1");
        let network = Self {
            config: config.clone(),
            axes: config.axes(&weights.config_path())?,
            picture_embedder: Linear::load(&weights.scope("all_x_embedder.2-1"), features, d)?,
            picture_pad: weights.tensor("x_pad_token", [1, d])?,
            picture_blocks: blocks("noise_refiner", config.n_refiner_layers, Some(time))?,
            prompt_norm: RmsNorm::load(&prompt.scope(0), config.cap_feat_dim, config.norm_eps)?,
            prompt_embedder: Linear::load(&prompt.scope(1), config.cap_feat_dim, d)?,
            prompt_pad: weights.tensor("cap_pad_token", [1, d])?,
            prompt_blocks: blocks("context_refiner", config.n_refiner_layers, None)?,
            time: TimestepEmbedding::new(
                Linear::load(&times.scope(0), WAVES, TIME_INNER)?,
                Linear::load(&times.scope(2), TIME_INNER, time)?,
                Activation::Silu,
            ),
            blocks: blocks("layers", config.n_layers, Some(time))?,
            last_norm: LayerNorm::plain(d, EPSILON, weights),
            last_scale: Linear::load(&last.scope("adaLN_modulation.1"), time, d)?,
            last: Linear::load(&last.scope("linear"), d, features)?,
        };
        weights.check_all_used(&[])?;
        Ok(network)
    }

    /// The configuration that the network was built from.
    pub fn config(&self) -> &ZImageConfig {
        &self.config
    }

    /// A few weights that distinguish the network from others of its shape: those of the first and the last
    /// layer, and those that make the first block's keys of the prompt.
    pub(crate) fn telling_weights(&self) -> Vec<Tensor<2>> {
        let ends = [self.picture_embedder.weight(), self.last.weight()];
        let keys = self.prompt_blocks.first().map(Block::keys);
        ends.into_iter().chain(keys).collect()
    }

    /// The network's prediction. Gradients flow to `latents` and `context`, as far as these are tracked.
    ///
    /// Prompts are padded to a multiple of 32 tokens, and attention reads the padding. Rows whose padded
    /// lengths differ are computed one by one.
    ///
    /// # Shapes
    /// `latents` `[b, in_channels, h, w]`, h and w even; `times` `[b]` from 0 for noise to 1 for a picture;
    /// `context` `[b, m, cap_feat_dim]`; `presence` `[b][m]` as [`Conditions`] has it: a token gives way to
    /// padding as far as it is absent. Result like the latents.
    ///
    /// # Panics
    /// If a shape is not as above.
    ///
    /// [`Conditions`]: crate::models::denoiser::conditions::Conditions::presence
    pub fn forward(
        &self,
        latents: Tensor<4>,
        times: Tensor<1>,
        context: Tensor<3>,
        presence: &[Vec<f32>],
        memory: Memory,
    ) -> Tensor<4> {
        let padded = |row: &[f32]| present(row).next_multiple_of(MULTIPLE);
        let length = padded(&presence[0]);
        if presence.iter().any(|other| padded(other) != length) {
            let rows = (0..presence.len()).map(|row| {
                let latents = latents.clone().narrow(0, row, 1);
                let times = times.clone().narrow(0, row, 1);
                let context = context.clone().narrow(0, row, 1);
                self.forward(latents, times, context, &presence[row..=row], memory)
            });
            return Tensor::cat(rows.collect(), 0);
        }
        let [b, c, h, w] = latents.dims();
        let [rows, columns] = [h / PATCH, w / PATCH];
        let device = latents.device().without_autodiff();
        let waves = sinusoidal_embedding(times * self.config.t_scale, WAVES, true, 0.0);
        let told = self.time.forward(waves.cast(context.dtype()));
        let told = told.reshape([b, 1, self.config.time_width()]);
        let [rotation, of_prompt] = self.rotations([rows, columns], length, &device);
        let run = |blocks: &[Block], x: Tensor<3>, rotation: &Rotation| {
            blocks.iter().fold(x, |x, block| match memory {
                Memory::Normal => block.forward(x, &told, rotation),
                Memory::Low => block.recomputed(x, &told, rotation),
            })
        };
        let x = self.picture_embedder.forward(tokens(latents)); // [b, n, d]
        let count = rows * columns;
        let x = filled(x, &self.picture_pad, count.next_multiple_of(MULTIPLE));
        let x = run(&self.picture_blocks, x, &rotation);
        let prompt = self.prompt_norm.forward(context);
        let prompt = self.prompt_embedder.forward(prompt); // [b, m, d]
        let prompt = given_way(prompt, &self.prompt_pad, presence);
        let prompt = filled(prompt, &self.prompt_pad, length);
        let prompt = run(&self.prompt_blocks, prompt, &of_prompt);
        let x = run(&self.blocks, Tensor::cat(vec![x, prompt], 1), &rotation);
        let x = self.last_norm.forward(x.narrow(1, 0, count));
        let scale = self
            .last_scale
            .forward(Activation::Silu.forward(told.clone()));
        let x = self.last.forward(x * (scale + 1.0)); // [b, n, 4c]
        x.reshape([b, rows, columns, PATCH, PATCH, c])
            .permute([0, 5, 1, 3, 2, 4])
            .reshape([b, c, h, w])
    }

    /// Where all tokens are, those of the picture first, and where those of the prompt are. The prompt's
    /// places start at 1, the picture follows as one more place, and its padding is at 0.
    fn rotations(
        &self,
        [rows, columns]: [usize; 2],
        length: usize,
        device: &burn::tensor::Device,
    ) -> [Rotation; 2] {
        let count = rows * columns;
        let padding = count.next_multiple_of(MULTIPLE) - count;
        let picture =
            (0..rows).flat_map(|row| (0..columns).map(move |column| [length + 1, row, column]));
        let prompt: Vec<[usize; AXES]> = (1..=length).map(|place| [place, 0, 0]).collect();
        let all: Vec<[usize; AXES]> = picture
            .chain(std::iter::repeat_n([0; AXES], padding))
            .chain(prompt.iter().copied())
            .collect();
        [all, prompt].map(|places| {
            let theta = self.config.rope_theta;
            Rotation::new(&places, self.axes, theta, Pairs::Neighbours, device)
        })
    }
}

/// Squares of latent pixels, row by row, with the features (p, q, c): unlike everywhere else, channels come
/// last.
///
/// # Shapes
/// `[b, c, h, w]` to `[b, n, 4c]`
fn tokens(latents: Tensor<4>) -> Tensor<3> {
    let [b, c, h, w] = latents.dims();
    let [rows, columns] = [h / PATCH, w / PATCH];
    latents
        .reshape([b, c, rows, PATCH, columns, PATCH])
        .permute([0, 2, 4, 3, 5, 1])
        .reshape([b, rows * columns, PATCH * PATCH * c])
}

/// The first `length` tokens of each row, filled up with `pad`.
///
/// # Shapes
/// `x` `[b, n, d]`, `pad` `[1, d]`; result `[b, length, d]`
fn filled(x: Tensor<3>, pad: &Tensor<2>, length: usize) -> Tensor<3> {
    let [b, n, d] = x.dims();
    if n >= length {
        return x.narrow(1, 0, length);
    }
    let pad = pad.clone().reshape([1, 1, d]).repeat(&[b, length - n, 1]);
    Tensor::cat(vec![x, pad], 1)
}

/// Tokens that give way to `pad` as far as they are absent.
///
/// # Shapes
/// `x` `[b, n, d]`, `pad` `[1, d]`, `presence` `[b][n]`
fn given_way(x: Tensor<3>, pad: &Tensor<2>, presence: &[Vec<f32>]) -> Tensor<3> {
    if presence.iter().flatten().all(|&share| share == 1.0) {
        return x;
    }
    let [b, n, d] = x.dims();
    let options = (&x.device().without_autodiff(), x.dtype());
    let shares = presence.concat();
    let shares = Tensor::<1>::from_data(shares.as_slice(), options).reshape([b, n, 1]);
    let pad = pad.clone().reshape([1, 1, d]);
    x * shares.clone() + pad * (shares.neg() + 1.0)
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::util::tensors::host;

    #[test]
    fn tokens_give_way_to_padding_as_far_as_they_are_absent() {
        let device = Device::flex();
        let x = Tensor::<1>::from_floats([1.0, 2.0, 3.0, 4.0], &device).reshape([2, 2, 1]);
        let pad = Tensor::<1>::from_floats([9.0], &device).reshape([1, 1]);
        let presence = [vec![1.0, 0.0], vec![1.0, 0.5]];
        let x = given_way(x, &pad, &presence);
        assert_eq!(host(x.clone()), [1.0, 9.0, 3.0, 6.5]);
        let longer = host(filled(x.clone(), &pad, 3));
        assert_eq!(longer, [1.0, 9.0, 9.0, 3.0, 6.5, 9.0]);
        assert_eq!(host(filled(x, &pad, 1)), [1.0, 3.0]);
    }

    #[test]
    fn channels_come_last_in_a_token() {
        let values: Vec<f32> = (0..8u8).map(f32::from).collect();
        let x = Tensor::<1>::from_floats(values.as_slice(), &Device::flex()).reshape([1, 2, 2, 2]);
        assert_eq!(host(tokens(x)), [0.0, 4.0, 1.0, 5.0, 2.0, 6.0, 3.0, 7.0]);
    }
}
