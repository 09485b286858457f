//! The transformer as the denoiser of FLUX.2 klein.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::{DType, Tensor};
use serde_json::Value;

use crate::Result;
use crate::models::denoiser::conditions::Conditions;
use crate::models::denoiser::flux2::{Flux2Config, Flux2Transformer2DModel};
use crate::models::denoiser::{
    Denoiser, DenoiserConfig, FLOAT, GuidedBy, How, KERNELS, Memory, Surroundings, check_numbers,
};
use crate::util::tensors::fingerprint;
use crate::weights::{Weights, from_value};

/// The network's folder in diffusers' layout.
pub const PART: &str = "transformer";

/// Default height and width of the latents: the configuration has none.
const SIDE: u64 = 64;

/// The hidden states of Qwen3 that it reads, side by side: the outputs of these layers, counted from 1.
pub const LAYERS: [usize; 3] = [9, 18, 27];

/// The number of Qwen3's tokens for a prompt.
pub const LENGTH: usize = 512;

/// Opens the configuration of the transformer.
///
/// # Errors
/// If the file is invalid.
pub fn open(config: Value, path: &Path) -> Result<Box<dyn DenoiserConfig>> {
    Ok(Box::new(Config {
        transformer: from_value(config, path)?,
        path: path.to_owned(),
        length: LENGTH,
    }))
}

/// The transformer in its pipeline.
#[derive(Debug)]
struct Transformer {
    network: Flux2Transformer2DModel,
    is_distilled: bool,
}

impl Denoiser for Transformer {
    fn predict(
        &self,
        latents: Tensor<4>,
        times: &[f64],
        conditions: &Conditions,
        how: How<'_>,
    ) -> Tensor<4> {
        let options = (&latents.device().without_autodiff(), DType::F32);
        let timesteps = Tensor::<1>::from_data(times, options);
        let context = conditions.context.clone();
        (self.network).forward(latents, timesteps, context, how.memory)
    }

    fn multiple(&self) -> usize {
        1
    }

    fn guided_by(&self) -> GuidedBy {
        match self.is_distilled {
            true => GuidedBy::Nothing,
            false => GuidedBy::Reference,
        }
    }

    fn fingerprint(&self) -> String {
        fingerprint(self.network.telling_weights())
    }
}

/// `transformer/config.json` in its pipeline.
struct Config {
    transformer: Flux2Config,
    /// The file, for errors.
    path: PathBuf,
    /// The number of tokens of a prompt.
    length: usize,
}

impl DenoiserConfig for Config {
    fn trained_on(&self) -> Option<[u64; 2]> {
        Some([SIDE; 2])
    }

    fn in_channels(&self) -> usize {
        self.transformer.in_channels
    }

    fn check(&self, around: &Surroundings<'_>) -> Result<()> {
        let network = &self.transformer;
        network.check(&self.path)?;
        let qwen = around.encoder_widths.first().map(|d| d * LAYERS.len());
        let (latents, of_latents) = (around.latent_channels, "the channels of the packed latents");
        let numbers = [
            (
                "in_channels",
                network.in_channels,
                Some(latents),
                of_latents,
            ),
            (
                "out_channels",
                network.out_channels(),
                Some(latents),
                of_latents,
            ),
            (
                "joint_attention_dim",
                network.joint_attention_dim,
                qwen,
                "three times the width of Qwen3",
            ),
        ];
        check_numbers(&self.path, numbers)
    }

    fn set_max_sequence_length(&mut self, length: usize) {
        self.length = length;
    }

    fn load(&self, weights: &Weights, around: &Surroundings<'_>) -> Result<Arc<dyn Denoiser>> {
        Ok(Arc::new(Transformer {
            network: Flux2Transformer2DModel::load(weights, &self.transformer)?,
            is_distilled: around.is_distilled,
        }))
    }

    fn step_bytes(&self, rows: usize, latents: [usize; 2], memory: Memory) -> Result<u64> {
        self.transformer.check(&self.path)?;
        let network = &self.transformer;
        Ok(network.step_bytes(rows, latents, self.length, memory))
    }
}

/// Tensors of `tokens × width` that a block keeps, counted from its layers and not measured: normalised,
/// modulated, queries, keys and values before and after normalisation and rotation, attended, projected
/// and gated, and the six times wider inside of the feed-forward layers, split and gated.
const BLOCK: usize = 32;
/// The same for a block of one stream, where queries, keys and values are split from a still wider tensor.
const SINGLE: usize = 40;
/// Such tensors that are held in addition at the same time, in the backward pass.
const AT_WORK: usize = 14;
/// The same for a layer of Qwen3, of which one at a time is computed again: its inside is about four times
/// as wide.
const TEXT: usize = 30;

impl Flux2Config {
    /// The approximate peak of bytes that the activations of an optimisation step on the CPU take, for
    /// `rows` latents of `height` and `width` in one call of the network, and prompts of `prompt` tokens, including
    /// the text encoder's.
    fn step_bytes(
        &self,
        rows: usize,
        [height, width]: [usize; 2],
        prompt: usize,
        memory: Memory,
    ) -> u64 {
        let numbers = rows * (height * width + prompt) * self.width();
        let blocks = self.num_layers * BLOCK + self.num_single_layers * SINGLE;
        let kept = match memory {
            Memory::Normal => blocks,
            Memory::Low => self.num_layers + self.num_single_layers + BLOCK.max(SINGLE),
        };
        let layers = LAYERS[LAYERS.len() - 1];
        let text = rows * prompt * self.joint_attention_dim / LAYERS.len() * (layers + TEXT);
        (((kept + AT_WORK) * numbers + text) * FLOAT + KERNELS) as u64
    }
}
