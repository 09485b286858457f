//! The multimodal transformer as the denoiser of Stable Diffusion 3 and 3.5.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::{DType, Tensor};
use serde_json::Value;

use crate::models::denoiser::conditions::Conditions;
use crate::models::denoiser::sd3::{SD3Config, SD3Transformer2DModel};
use crate::models::denoiser::{
    Denoiser, DenoiserConfig, FLOAT, How, KERNELS, Memory, Surroundings,
};
use crate::util::tensors::fingerprint;
use crate::weights::{Weights, from_value};
use crate::{Error, Result};

/// The network's folder in diffusers' layout.
pub const PART: &str = "transformer";

/// The number of T5's tokens for a prompt, or of zeros in their place, after CLIP's, as in diffusers' pipeline.
pub const T5_LENGTH: usize = 256;

/// The text encoders without T5.
const CLIP_ENCODERS: usize = 2;

/// Opens the configuration of the transformer.
///
/// # Errors
/// If the file is invalid.
pub fn open(config: Value, path: &Path) -> Result<Box<dyn DenoiserConfig>> {
    Ok(Box::new(Config {
        transformer: from_value(config, path)?,
        path: path.to_owned(),
        t5_length: T5_LENGTH,
    }))
}

/// The transformer in its pipeline.
#[derive(Debug)]
struct Transformer {
    network: SD3Transformer2DModel,
    /// Rows of zeros in place of T5's hidden states, if there is no T5.
    zeros: usize,
}

impl Transformer {
    /// The context that the network reads: CLIP's hidden states are narrower than T5's, and are padded with
    /// zeros; without T5, its tokens are zeros.
    fn context(&self, context: Tensor<3>) -> Tensor<3> {
        let [b, n, d] = context.dims();
        let width = self.network.config().joint_attention_dim;
        let options = (&context.device().without_autodiff(), context.dtype());
        let zeros = |shape: [usize; 3]| Tensor::<3>::zeros(shape, options);
        let mut context = context;
        if d < width {
            context = Tensor::cat(vec![context, zeros([b, n, width - d])], 2); // [b, n, width]
        }
        if self.zeros > 0 {
            context = Tensor::cat(vec![context, zeros([b, self.zeros, width])], 1);
        }
        context
    }
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
        let context = self.context(conditions.context.clone());
        #[expect(clippy::expect_used, reason = "documented under Panics")]
        let pooled = conditions.pooled.clone().expect("a pooled prompt");
        (self.network).forward(latents, timesteps, context, pooled, how.memory)
    }

    fn multiple(&self) -> usize {
        self.network.config().patch_size
    }

    fn largest(&self) -> Option<usize> {
        let config = self.network.config();
        Some(config.patch_size * config.pos_embed_max_size)
    }

    fn fingerprint(&self) -> String {
        fingerprint(self.network.telling_weights())
    }
}

/// `transformer/config.json` in its pipeline.
struct Config {
    transformer: SD3Config,
    t5_length: usize,
    /// The file, for errors.
    path: PathBuf,
}

impl Config {
    fn wrong(&self, field: &str, expected: &str, found: impl std::fmt::Debug) -> Result<()> {
        Err(Error::unsupported(&self.path, field, expected, found))
    }
}

impl DenoiserConfig for Config {
    fn trained_on(&self) -> Option<[u64; 2]> {
        Some([self.transformer.sample_size; 2])
    }

    fn in_channels(&self) -> usize {
        self.transformer.in_channels
    }

    fn set_max_sequence_length(&mut self, length: usize) {
        self.t5_length = length;
    }

    fn check(&self, around: &Surroundings<'_>) -> Result<()> {
        self.transformer.check(&self.path)?;
        let latents = around.latent_channels;
        for (field, found) in [
            ("in_channels", self.transformer.in_channels),
            ("out_channels", self.transformer.out_channels()),
        ] {
            if found != latents {
                let expected = format!("{latents}, the channels of the latents");
                return self.wrong(field, &expected, found);
            }
        }
        let (clip, t5) = around
            .encoder_widths
            .split_at(CLIP_ENCODERS.min(around.encoder_widths.len()));
        let (width, found) = (
            clip.iter().sum::<usize>(),
            self.transformer.joint_attention_dim,
        );
        if found < width {
            let expected = format!("at least {width}, the width of both CLIP text encoders");
            return self.wrong("joint_attention_dim", &expected, found);
        }
        if let Some(width) = t5.first().filter(|width| **width != found) {
            let expected = format!("{width}, the width of T5");
            return self.wrong("joint_attention_dim", &expected, found);
        }
        let projections = around.projections.iter().take(CLIP_ENCODERS).copied();
        let Some(pooled) = projections.sum::<Option<usize>>() else {
            let reason =
                "a CLIP text encoder has no `text_projection`, which Stable Diffusion 3 needs";
            return Err(Error::WrongBase {
                reason: reason.to_owned(),
            });
        };
        match self.transformer.pooled_projection_dim {
            found if found != pooled => {
                let expected = format!("{pooled}, the width of both projected prompts");
                self.wrong("pooled_projection_dim", &expected, found)
            }
            _ => Ok(()),
        }
    }

    fn load(&self, weights: &Weights, around: &Surroundings<'_>) -> Result<Arc<dyn Denoiser>> {
        let has_t5 = around.encoder_widths.len() > CLIP_ENCODERS;
        Ok(Arc::new(Transformer {
            network: SD3Transformer2DModel::load(weights, &self.transformer)?,
            zeros: match has_t5 {
                true => 0,
                false => self.t5_length,
            },
        }))
    }

    fn step_bytes(&self, rows: usize, latents: [usize; 2], memory: Memory) -> Result<u64> {
        self.transformer.check(&self.path)?;
        let tokens = CLIP_LENGTH + self.t5_length;
        Ok(self.transformer.step_bytes(rows, latents, tokens, memory))
    }
}

/// The number of CLIP's tokens for a prompt.
const CLIP_LENGTH: usize = 77;
/// Tensors of `tokens × width` that a block keeps: normalised, modulated, queries, keys and values,
/// attended, projected and gated, and the four times wider inside of the feed-forward layers twice.
const BLOCK: usize = 22;
/// Such tensors that the picture's second attention adds.
const DUAL: usize = 11;
/// Such tensors that are held in addition at the same time, in the backward pass.
const AT_WORK: usize = 10;

impl SD3Config {
    /// The approximate peak of bytes that the activations of an optimisation step on the CPU take, for
    /// `rows` latents of `height` and `width` in one call of the network, and prompts of `prompt` tokens.
    fn step_bytes(
        &self,
        rows: usize,
        [height, width]: [usize; 2],
        prompt: usize,
        memory: Memory,
    ) -> u64 {
        let patch = self.patch_size;
        let picture = rows * (height / patch) * (width / patch);
        let tokens = picture + rows * prompt;
        let d = self.width();
        let blocks = (0..self.num_layers).map(|number| self.block(number));
        let kept = blocks.map(|block| {
            let dual = if block.dual { DUAL * picture } else { 0 };
            d * (BLOCK * tokens + dual)
        });
        let inputs = self.num_layers * d * tokens;
        let kept = match memory {
            Memory::Normal => kept.sum(),
            Memory::Low => inputs + kept.max().unwrap_or(0),
        };
        ((kept + AT_WORK * d * tokens) * FLOAT + KERNELS) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A network of six blocks took 1221 MiB in a step of `dinv learn`, and 554 with `--memory low`; 301 of
    /// these were its weights and the program.
    #[test]
    fn the_estimate_is_near_what_a_step_was_measured_to_take() {
        let config = SD3Config {
            num_layers: 6,
            attention_head_dim: 64,
            num_attention_heads: 8,
            caption_projection_dim: 512,
            dual_attention_layers: vec![0, 1, 2],
            qk_norm: Some("rms_norm".to_owned()),
            ..SD3Config::default()
        };
        let prompt = CLIP_LENGTH + T5_LENGTH;
        let estimate =
            |memory| config.step_bytes(2, [64, 64], prompt, memory) as f64 / f64::from(1 << 20);
        for (memory, measured) in [
            (Memory::Normal, 1221.0 - 301.0),
            (Memory::Low, 554.0 - 301.0),
        ] {
            let ratio = estimate(memory) / measured;
            assert!((0.95..1.3).contains(&ratio), "{memory:?}: {ratio}");
        }
    }
}
