//! The transformer of Chroma: `ChromaTransformer2DModel` of diffusers
//! ([lodestones 2025](https://huggingface.co/lodestones/Chroma1-HD)). It is FLUX.1 schnell's, but one small network
//! computes the shifts, scales and gates of all blocks from the time alone, and padding is masked.

use std::path::Path;

use burn::tensor::{DType, Device, Tensor, TensorData};
use serde::Deserialize;

use crate::models::denoiser::Memory;
use crate::models::denoiser::conditions::present;
use crate::models::denoiser::flux_trunk::{Block, PATCH, Trunk, TrunkConfig};
use crate::models::denoiser::joint_block::{EPSILON, modulated};
use crate::models::denoiser::time_embedding::{TimestepEmbedding, sinusoidal_embedding};
use crate::models::layers::{Activation, LayerNorm, Linear, MOST_LAYERS, RmsNorm};
use crate::weights::{OtherFields, Weights};
use crate::{Error, Result};

/// Shifts, scales and gates of a stream of a block in which picture and prompt have weights of their own.
const DOUBLE: usize = 6;
/// Shift, scale and gate of a block in which they share weights.
const SINGLE: usize = 3;
/// Shift and scale of the last norm.
const LAST: usize = 2;
/// The numbers of rows are embedded as times of a thousand steps.
const ROW: f32 = 1000.0;

/// `transformer/config.json`, with the names and defaults of diffusers.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct ChromaConfig {
    /// What it has in common with FLUX.1.
    #[serde(flatten)]
    pub trunk: TrunkConfig,
    /// The width of what the small network reads: a quarter each for the time and for a guidance scale, which is
    /// always 0, and half for the number of the row that it computes.
    pub approximator_num_channels: usize,
    /// The width of its layers.
    pub approximator_hidden_dim: usize,
    /// The number of its layers.
    pub approximator_layers: usize,
    /// All other fields.
    #[serde(flatten)]
    pub other: OtherFields,
}

impl Default for ChromaConfig {
    fn default() -> Self {
        Self {
            trunk: TrunkConfig::default(),
            approximator_num_channels: 64,
            approximator_hidden_dim: 5120,
            approximator_layers: 5,
            other: OtherFields::new(),
        }
    }
}

impl ChromaConfig {
    /// Checks its consistency; `path` is named in errors.
    ///
    /// # Errors
    /// [`Error::Config`] for a value that is out of range or contradicts another, and for an unknown
    /// field.
    pub fn check(&self, path: &Path) -> Result<()> {
        let widths = [
            ("approximator_num_channels", self.approximator_num_channels),
            ("approximator_hidden_dim", self.approximator_hidden_dim),
        ];
        self.trunk.check(path, &widths, &self.other)?;
        let wrong = |field: &str, expected: &str, found: usize| {
            Err(Error::unsupported(path, field, expected, found))
        };
        let channels = self.approximator_num_channels;
        if !channels.is_multiple_of(8) {
            return wrong("approximator_num_channels", "a multiple of 8", channels);
        }
        if !(1..=MOST_LAYERS).contains(&self.approximator_layers) {
            let expected = format!("1 to {MOST_LAYERS}");
            return wrong("approximator_layers", &expected, self.approximator_layers);
        }
        Ok(())
    }

    /// The number of shifts, scales and gates of the whole network: of the blocks of one stream, of the picture's
    /// stream in the others, of the prompt's, and of the last norm.
    fn rows(&self) -> usize {
        let TrunkConfig {
            num_layers,
            num_single_layers,
            ..
        } = self.trunk;
        SINGLE * num_single_layers + 2 * DOUBLE * num_layers + LAST
    }
}

/// The small network that stands for the modulation of all blocks (`ChromaApproximator`).
#[derive(Debug, Clone)]
struct Approximator {
    input: Linear,
    layers: Vec<(RmsNorm, TimestepEmbedding)>,
    output: Linear,
}

impl Approximator {
    fn load(weights: &Weights, config: &ChromaConfig) -> Result<Self> {
        let hidden = config.approximator_hidden_dim;
        let linear = |name: &str, d_in, d_out| Linear::load(&weights.scope(name), d_in, d_out);
        let layer = |number: usize| {
            // torch's RMSNorm without an ε of its own.
            let epsilon = f64::from(f32::EPSILON);
            let norm = RmsNorm::load(&weights.scope("norms").scope(number), hidden, epsilon)?;
            let scope = weights.scope("layers").scope(number);
            let layer = TimestepEmbedding::load(&scope, [hidden; 2], Activation::Silu)?;
            Ok((norm, layer))
        };
        Ok(Self {
            input: linear("in_proj", config.approximator_num_channels, hidden)?,
            layers: (0..config.approximator_layers)
                .map(layer)
                .collect::<Result<_>>()?,
            output: linear("out_proj", hidden, config.trunk.width())?,
        })
    }

    /// # Shapes
    /// `[n, approximator_num_channels]` to `[n, d]`
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let mut x = self.input.forward(x);
        for (norm, layer) in &self.layers {
            x = x.clone() + layer.forward(norm.forward(x));
        }
        self.output.forward(x)
    }
}

/// The transformer that predicts the velocity ε − x₀ from noisy latents, a time and a prompt.
#[derive(Debug, Clone)]
pub struct ChromaTransformer2DModel {
    config: ChromaConfig,
    approximator: Approximator,
    /// The embedded number of each row, `[rows, approximator_num_channels / 2]`.
    numbers: Tensor<2>,
    trunk: Trunk,
    last_norm: LayerNorm,
}

impl ChromaTransformer2DModel {
    /// Builds the network that `config` describes from `weights`, all of which it must use.
    ///
    /// # Errors
    /// As [`ChromaConfig::check`]; [`Error::Tensor`] if a tensor is missing or of another shape;
    /// [`Error::UnusedTensors`] if some are left over.
    pub fn load(weights: &Weights, config: &ChromaConfig) -> Result<Self> {
        config.check(&weights.config_path())?;
        // On the CPU: shaders need not know the sine of so large a number.
        let numbers: Vec<f32> = (0..config.rows()).map(|row| row as f32 * ROW).collect();
        let numbers = Tensor::<1>::from_floats(numbers.as_slice(), &Device::flex());
        let numbers = waves(numbers, config.approximator_num_channels / 2);
        let trunk = Trunk::load(weights, &config.trunk, false)?;
        let network = Self {
            config: config.clone(),
            approximator: Approximator::load(&weights.scope("distilled_guidance_layer"), config)?,
            numbers: numbers.to_device(&trunk.device()),
            trunk,
            last_norm: LayerNorm::plain(config.trunk.width(), EPSILON, weights),
        };
        weights.check_all_used(&[])?;
        Ok(network)
    }

    /// The configuration that the network was built from.
    pub fn config(&self) -> &ChromaConfig {
        &self.config
    }

    /// A few weights that distinguish the network from others of its shape.
    pub(crate) fn telling_weights(&self) -> Vec<Tensor<2>> {
        self.trunk.telling_weights()
    }

    /// The network's prediction. Gradients flow to `latents` and `context`, as far as these are tracked.
    ///
    /// Tokens of a prompt that are absent are not attended to, and those that are present in part with that part of the
    /// weight; their states are those of the whole token times this part. Rows whose prompts end at different places are
    /// computed one by one.
    ///
    /// # Shapes
    /// `latents` `[b, in_channels / 4, h, w]` with even h and w; `timesteps` `[b]` from 0 to 1000; `context`
    /// `[b, m, joint_attention_dim]`; `presence` `[b][m]` as [`Conditions`] has it. Result like the latents.
    ///
    /// # Panics
    /// If a shape is not as above.
    ///
    /// [`Conditions`]: crate::models::denoiser::conditions::Conditions::presence
    pub fn forward(
        &self,
        latents: Tensor<4>,
        timesteps: Tensor<1>,
        context: Tensor<3>,
        presence: &[Vec<f32>],
        memory: Memory,
    ) -> Tensor<4> {
        let length = present(&presence[0]);
        if presence.iter().any(|row| present(row) != length) {
            let rows = (0..presence.len()).map(|row| {
                let latents = latents.clone().narrow(0, row, 1);
                let timesteps = timesteps.clone().narrow(0, row, 1);
                let context = context.clone().narrow(0, row, 1);
                self.forward(latents, timesteps, context, &presence[row..=row], memory)
            });
            return Tensor::cat(rows.collect(), 0);
        }
        let [_, _, h, w] = latents.dims();
        let told = self.told(timesteps, context.dtype()); // [b, rows, d]
        let part = |start, count| told.clone().narrow(1, start, count);
        let TrunkConfig {
            num_layers,
            num_single_layers,
            ..
        } = self.config.trunk;
        let picture = SINGLE * num_single_layers;
        let prompt = picture + DOUBLE * num_layers;
        let of_block = |block| match block {
            Block::Single(number) => part(SINGLE * number, SINGLE),
            Block::Double(number) => {
                let streams = [picture, prompt].map(|first| part(first + DOUBLE * number, DOUBLE));
                Tensor::cat(streams.to_vec(), 1)
            }
        };
        let last = |x| {
            let first = self.config.rows() - LAST;
            let [shift, scale] = [first, first + 1].map(|row| part(row, 1));
            modulated(self.last_norm.forward(x), &shift, &scale)
        };
        let tokens = (h / PATCH) * (w / PATCH);
        let mut context = context.narrow(1, 0, length);
        let mut key_bias = None;
        let presence: Vec<&[f32]> = presence.iter().map(|row| &row[..length]).collect();
        if presence
            .iter()
            .any(|row| row.iter().any(|&share| share != 1.0))
        {
            context = whole(context, &presence);
            key_bias = Some(bias(&presence, tokens, &latents));
        }
        (self.trunk).forward(latents, context, key_bias, of_block, last, memory)
    }

    /// The shifts, scales and gates of all blocks, `[b, rows, d]`.
    fn told(&self, timesteps: Tensor<1>, dtype: DType) -> Tensor<3> {
        let (b, rows) = (timesteps.dims()[0], self.config.rows());
        let channels = self.config.approximator_num_channels;
        let no_guidance = waves(timesteps.zeros_like(), channels / 4);
        let time = Tensor::cat(vec![waves(timesteps, channels / 4), no_guidance], 1);
        let time: Tensor<3> = time.unsqueeze_dim(1); // [b, 1, channels / 2]
        let numbers = self.numbers.clone().unsqueeze::<3>(); // [1, rows, channels / 2]
        let input = Tensor::cat(vec![time.repeat_dim(1, rows), numbers.repeat_dim(0, b)], 2);
        let told = self
            .approximator
            .forward(input.reshape([b * rows, channels]).cast(dtype));
        told.reshape([b, rows, self.config.trunk.width()])
    }
}

/// Sines and cosines of times.
fn waves(times: Tensor<1>, width: usize) -> Tensor<2> {
    sinusoidal_embedding(times, width, true, 0.0)
}

/// The states of whole tokens, of which `context` has shares.
///
/// # Shapes
/// `[b, m, d]`, `presence` `[b][m]`
fn whole(context: Tensor<3>, presence: &[&[f32]]) -> Tensor<3> {
    let [b, m, _] = context.dims();
    let shares = presence.concat().into_iter();
    let shares = shares.map(|share| if share > 0.0 { share } else { 1.0 });
    let shares = TensorData::new(shares.collect::<Vec<f32>>(), [b, m, 1]);
    let options = (&context.device().without_autodiff(), context.dtype());
    context / Tensor::<3>::from_data(shares, options)
}

/// What is added to the scores of each key: the logarithm of its presence, which multiplies its weight.
///
/// # Shapes
/// `[b, 1, 1, n + m]` for n tokens of a picture and m of a prompt, in f32, on the device of `latents`.
fn bias(presence: &[&[f32]], tokens: usize, latents: &Tensor<4>) -> Tensor<4> {
    let rows = presence.iter().flat_map(|row| {
        let of_prompt = row.iter().map(|share| share.clamp(0.0, 1.0).ln());
        std::iter::repeat_n(0.0, tokens).chain(of_prompt)
    });
    let rows: Vec<f32> = rows.collect();
    let shape = [presence.len(), 1, 1, rows.len() / presence.len()];
    let device = latents.device().without_autodiff();
    Tensor::from_data(TensorData::new(rows, shape), &device)
}
