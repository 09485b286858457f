//! The interface of all denoising networks. Each implements it in a file of its own, and no other code depends
//! on which one it is.

pub mod attention_control;
pub mod chroma;
pub mod chroma_denoiser;
pub mod conditions;
pub mod flux;
pub mod flux2;
mod flux2_blocks;
pub mod flux2_denoiser;
pub mod flux_denoiser;
mod flux_single_block;
pub mod flux_trunk;
pub(super) mod joint_block;
mod recompute;
pub mod sd3;
pub mod sd3_denoiser;
mod time_embedding;
pub mod unet;
pub(crate) mod unet_blocks;
pub(crate) mod unet_config;
pub mod unet_denoiser;
mod unet_memory;
pub mod z_image;
mod z_image_block;
pub mod z_image_denoiser;

use std::fmt::Debug;
use std::path::Path;
use std::sync::Arc;

use burn::tensor::Tensor;

use crate::models::denoiser::attention_control::AttentionControl;
use crate::models::denoiser::conditions::Conditions;
use crate::weights::Weights;
use crate::{Error, Result};

/// Bytes of a number, for estimates of memory: activations are f32.
const FLOAT: usize = 4;
/// The maximum working memory of kernels, in bytes: gathered neighbourhoods, transformed tiles, scores.
const KERNELS: usize = 64 << 20;

/// A frozen network that predicts the noise in latents.
pub trait Denoiser: Debug + Send + Sync {
    /// The network's output, in the convention of [`Noising`](crate::diffusion::sample::Noising): the network's
    /// own signs and times are converted here. It is computed in the latents' type; gradients flow to the
    /// latents and conditions that are tracked.
    ///
    /// # Shapes
    /// `latents` [b, channels, h, w] with h and w multiples of [`multiple`](Self::multiple); a time in
    /// training steps and a row of `conditions` for each. The result has the latents' shape.
    ///
    /// # Panics
    /// If the conditions are not those of the network's family.
    fn predict(
        &self,
        latents: Tensor<4>,
        times: &[f64],
        conditions: &Conditions,
        how: How<'_>,
    ) -> Tensor<4>;

    /// Height and width of the latents must be multiples of this.
    fn multiple(&self) -> usize;

    /// The maximum height and width of the latents, if the network has a limit.
    fn largest(&self) -> Option<usize> {
        None
    }

    /// How guidance makes its prediction follow the prompt more closely.
    fn guided_by(&self) -> GuidedBy {
        GuidedBy::Reference
    }

    /// SHA-256 of a few weights that distinguish the network from others of its shape, including fine-tuned copies
    /// of itself.
    fn fingerprint(&self) -> String;

    /// The number of layers whose attention an [`AttentionControl`] can change: 0 unless the network has
    /// cross-attention to the prompt.
    fn attention_layers(&self) -> usize {
        0
    }
}

/// How a network computes its prediction.
#[derive(Debug, Clone, Copy)]
pub struct How<'a> {
    /// Whether to save time or memory.
    pub memory: Memory,
    /// The guidance scale for networks guided by an [embedding](GuidedBy::Embedding); 1 means none.
    pub guidance: f64,
    /// The control of attention, if any.
    pub control: Option<&'a dyn AttentionControl>,
}

impl Default for How<'_> {
    fn default() -> Self {
        Self {
            memory: Memory::Normal,
            guidance: 1.0,
            control: None,
        }
    }
}

/// A network's kind of guidance towards a prompt.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum GuidedBy {
    /// A second prediction, under a negative prompt (Ho & Salimans 2021).
    Reference,
    /// A scale as an input of the network: it was distilled from guided predictions
    /// ([Meng et al. 2023](https://arxiv.org/abs/2210.03142)), and there is no negative prompt.
    Embedding {
        /// The scale that such networks are usually told.
        usual: f64,
    },
    /// None: it was distilled at one scale.
    Nothing,
}

/// Whether to save time or memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Memory {
    /// Saves time: what the backward pass needs is kept.
    #[default]
    Normal,
    /// Saves memory: the backward pass computes the inside of each layer again.
    Low,
}

/// The configuration of a [`Denoiser`], from which it is built.
pub trait DenoiserConfig {
    /// Height and width of the latents that it was trained on, if the configuration states them.
    fn trained_on(&self) -> Option<[u64; 2]>;

    /// The channels that it reads, including those of a picture next to the noisy latents.
    fn in_channels(&self) -> usize;

    /// Sets the number of tokens of padded prompts, if it is not the family's. Networks whose prompts have a fixed
    /// length ignore it.
    fn set_max_sequence_length(&mut self, _length: usize) {}

    /// Checks that it matches the other parts of its pipeline.
    ///
    /// # Errors
    /// [`Error::Config`] or [`Error::WrongBase`]
    /// naming the mismatch.
    fn check(&self, around: &Surroundings<'_>) -> Result<()>;

    /// Builds the network, which must use all of the weights.
    ///
    /// # Errors
    /// [`Error::Config`] for a configuration that is contradictory or not supported, and any error in a
    /// tensor.
    fn load(&self, weights: &Weights, around: &Surroundings<'_>) -> Result<Arc<dyn Denoiser>>;

    /// The approximate peak of bytes that the activations of an optimisation step on the CPU take, for
    /// `rows` latents of height and width `latents` in one call of the network.
    ///
    /// # Errors
    /// [`Error::Config`] as for [`load`](Self::load).
    fn step_bytes(&self, rows: usize, latents: [usize; 2], memory: Memory) -> Result<u64>;
}

/// Checks numbers of a configuration, each given with its field, the value found, the expected one if it is known,
/// and a description of that.
///
/// # Errors
/// [`Error::Config`] for the first that differs.
pub(crate) fn check_numbers<const N: usize>(
    path: &Path,
    numbers: [(&str, usize, Option<usize>, &str); N],
) -> Result<()> {
    for (field, found, expected, what) in numbers {
        if let Some(expected) = expected.filter(|&expected| expected != found) {
            let expected = format!("{expected}, {what}");
            return Err(Error::unsupported(path, field, &expected, found));
        }
    }
    Ok(())
}

/// The parts around a denoiser in its pipeline.
#[derive(Debug, Clone, Copy)]
pub struct Surroundings<'a> {
    /// The class of the pipeline, for errors.
    pub class: &'a str,
    /// The width of each text encoder's hidden states.
    pub encoder_widths: &'a [usize],
    /// The width of each text encoder's projected prompt, where it has a projection.
    pub projections: &'a [Option<usize>],
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Channels that a picture adds to them.
    pub image_channels: usize,
    /// Pixels for each side of a latent pixel.
    pub pixels: usize,
    /// Whether the model was distilled to draw without guidance, which its own configuration does not state.
    pub is_distilled: bool,
}
