//! The denoising network: `UNet2DConditionModel` of diffusers, as Stable Diffusion 1.x, 2.x and
//! SDXL configure it.

use burn::tensor::Tensor;

use crate::Result;
use crate::models::denoiser::attention_control::Controlled;
use crate::models::denoiser::time_embedding::{
    GUIDANCE_UNIT, TimestepEmbedding, sinusoidal_embedding,
};
use crate::models::denoiser::unet_blocks::{BlockInput, BlockOptions, Downsample, Level, Upsample};
pub use crate::models::denoiser::unet_config::UNetConfig;
use crate::models::denoiser::{How, Memory};
use crate::models::feature_map::{Conv2d, GroupNorm, channels_first, channels_last};
use crate::models::layers::{Activation, Linear};
use crate::weights::Weights;

/// The inputs of SDXL's U-Net besides the prompt's hidden states.
#[derive(Debug, Clone)]
pub struct AddedConditions {
    /// `[b, d]`: the pooled and projected prompt of the second text encoder.
    pub text_embeds: Tensor<2>,
    /// `[b, 6]`: original height and width, crop top and left, target height and width.
    pub time_ids: Tensor<2>,
}

/// The U-Net that predicts noise (or velocity) from noisy latents, a timestep and a prompt.
#[derive(Debug, Clone)]
pub struct UNet2DConditionModel {
    config: UNetConfig,
    conv_in: Conv2d,
    time_embedding: TimestepEmbedding,
    /// From an embedded guidance scale to the time before its embedding.
    guidance: Option<Linear>,
    add_embedding: Option<TimestepEmbedding>,
    down_blocks: Vec<(Level, Option<Downsample>)>,
    mid_block: Option<Level>,
    up_blocks: Vec<(Level, Option<Upsample>)>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl UNet2DConditionModel {
    /// Builds the network that `config` describes from `weights`, all of which it must use.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) if the config is contradictory or has a value that
    /// is not supported; [`Error::Tensor`](crate::Error::Tensor) if a tensor is missing or of
    /// another shape; [`Error::UnusedTensors`](crate::Error::UnusedTensors) if some are left over.
    pub fn load(weights: &Weights, config: &UNetConfig) -> Result<Self> {
        let levels = config.levels(&weights.config_path())?;
        let channels = &config.block_out_channels;
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let time_embed_dim = config.time_embedding_dim.unwrap_or(first * 4);
        let options = BlockOptions {
            norm_num_groups: config.norm_num_groups,
            norm_eps: config.norm_eps,
            act_fn: config.act_fn,
            time_embed_dim: Some(time_embed_dim),
        };
        let embedding = |name: &str, d_in: usize, act_fn| {
            TimestepEmbedding::load(&weights.scope(name), [d_in, time_embed_dim], act_fn)
        };
        let add_embedding = match config.added_input_dim() {
            Some(d_in) => Some(embedding("add_embedding", d_in, Activation::Silu)?),
            None => None,
        };
        let guidance = config.time_cond_proj_dim.map(|width| {
            let weights = weights.scope("time_embedding").scope("cond_proj");
            Linear::load_with(&weights, width, first, false)
        });
        let conv = |name: &str, channels, kernel: usize| {
            Conv2d::load(&weights.scope(name), channels, kernel, 1, (kernel - 1) / 2)
        };

        let (in_kernel, out_kernel) = (config.conv_in_kernel, config.conv_out_kernel);

        let mut down_blocks = Vec::new();
        let mut c_in = first;
        for (i, level) in levels.iter().enumerate() {
            let weights = weights.scope("down_blocks").scope(i);
            let c = level.channels;
            let resnets: Vec<_> = (0..level.layers)
                .map(|i| [if i == 0 { c_in } else { c }, c])
                .collect();
            let transformers = level.down_transformer.as_ref().map(|t| (level.layers, t));
            let block = Level::load(&weights, &resnets, &options, transformers)?;
            let downsample = if i + 1 == levels.len() {
                None
            } else {
                let weights = weights.scope("downsamplers").scope(0);
                Some(Downsample::load(&weights, c, config.downsample_padding)?)
            };
            down_blocks.push((block, downsample));
            c_in = c;
        }

        let mid_block = match config.mid_block(&levels) {
            Some(transformer) => {
                let resnets = vec![[last, last]; if transformer.is_some() { 2 } else { 1 }];
                let transformers = transformer.as_ref().map(|t| (1, t));
                Some(Level::load(
                    &weights.scope("mid_block"),
                    &resnets,
                    &options,
                    transformers,
                )?)
            }
            None => None,
        };

        let mut up_blocks = Vec::new();
        let mut previous = last;
        for (i, level) in levels.iter().rev().enumerate() {
            let weights = weights.scope("up_blocks").scope(i);
            let c = level.channels;
            // The skip connections come from this level, except the last one, which comes from the level above.
            let skip = levels[(levels.len() - 1 - i).saturating_sub(1)].channels;
            let resnets: Vec<_> = (0..=level.layers)
                .map(|i| {
                    let x = if i == 0 { previous } else { c };
                    [x + if i == level.layers { skip } else { c }, c]
                })
                .collect();
            let transformers = level.up_transformer.as_ref().map(|t| (resnets.len(), t));
            let block = Level::load(&weights, &resnets, &options, transformers)?;
            let upsample = if i + 1 == levels.len() {
                None
            } else {
                Some(Upsample::load(&weights.scope("upsamplers").scope(0), c)?)
            };
            up_blocks.push((block, upsample));
            previous = c;
        }

        let unet = Self {
            config: config.clone(),
            conv_in: conv("conv_in", [config.in_channels, first], in_kernel)?,
            time_embedding: embedding("time_embedding", first, config.act_fn)?,
            guidance: guidance.transpose()?,
            add_embedding,
            down_blocks,
            mid_block,
            up_blocks,
            conv_norm_out: GroupNorm::load(
                &weights.scope("conv_norm_out"),
                config.norm_num_groups,
                first,
                config.norm_eps,
            )?,
            conv_out: conv("conv_out", [first, config.out_channels], out_kernel)?,
        };
        weights.check_all_used(&[])?;
        Ok(unet)
    }

    /// The configuration that the network was built from.
    pub fn config(&self) -> &UNetConfig {
        &self.config
    }

    /// The number of transformer blocks, in the order in which they run: those of the down path, of
    /// the middle, of the up path.
    pub fn transformer_blocks(&self) -> usize {
        let down = self.down_blocks.iter().map(|(level, _)| level);
        let up = self.up_blocks.iter().map(|(level, _)| level);
        let levels = down.chain(&self.mid_block).chain(up);
        levels.map(Level::transformer_blocks).sum()
    }

    /// A few weights that distinguish the network from others of its shape, including fine-tuned copies of itself:
    /// those of the first and the last convolution, which full training changes, and those of the first
    /// transformer block's keys of the prompt, which low-rank adaptation also changes.
    pub(crate) fn telling_weights(&self) -> Vec<Tensor<2>> {
        let down = self.down_blocks.iter().map(|(level, _)| level);
        let keys = down.chain(&self.mid_block).find_map(Level::prompt_keys);
        let convolutions = [&self.conv_in, &self.conv_out].map(Conv2d::weight);
        convolutions.into_iter().cloned().chain(keys).collect()
    }

    /// The network's prediction; the scheduler determines whether it is noise or velocity.
    /// Gradients flow to those of `sample`, `encoder_hidden_states` and `added` that are
    /// tracked.
    ///
    /// # Shapes
    /// `sample` `[b, in_channels, h, w]` (any `h` and `w`), `timesteps` `[b]` in training steps
    /// (0 to 999, fractions allowed), `encoder_hidden_states` `[b, n, cross_attention_dim]`,
    /// `added` if and only if the config has `addition_embed_type` (see
    /// [`UNetConfig::needs_added_conditions`]). Result `[b, out_channels, h, w]`.
    ///
    /// # Panics
    /// If a shape is not as above.
    pub fn forward(
        &self,
        sample: Tensor<4>,
        timesteps: Tensor<1>,
        encoder_hidden_states: Tensor<3>,
        added: Option<&AddedConditions>,
    ) -> Tensor<4> {
        self.forward_with(
            sample,
            timesteps,
            encoder_hidden_states,
            added,
            How::default(),
        )
    }

    /// As [`forward`](Self::forward), with options for the computation.
    ///
    /// # Panics
    /// As [`forward`](Self::forward).
    pub fn forward_with(
        &self,
        sample: Tensor<4>,
        timesteps: Tensor<1>,
        encoder_hidden_states: Tensor<3>,
        added: Option<&AddedConditions>,
        how: How<'_>,
    ) -> Tensor<4> {
        let config = &self.config;
        let dtype = sample.dtype();
        let sinusoidal =
            |t: Tensor<1>, d| sinusoidal_embedding(t, d, config.flip_sin_to_cos, config.freq_shift);
        let guided = self.guidance.as_ref().zip(config.time_cond_proj_dim);
        let guided = guided.map(|(guidance, d)| {
            // 0 without guidance (Luo et al. 2023, equation 10).
            let omega = (timesteps.zeros_like() + how.guidance as f32 - 1.0) * GUIDANCE_UNIT;
            guidance.forward(sinusoidal_embedding(omega, d, false, 1.0).cast(dtype))
        });
        let mut t = sinusoidal(timesteps, config.block_out_channels[0]).cast(dtype);
        if let Some(guided) = guided {
            t = t + guided;
        }
        let mut emb = self.time_embedding.forward(t);
        if let (Some(add_embedding), Some(d)) =
            (&self.add_embedding, config.addition_time_embed_dim)
        {
            #[expect(clippy::expect_used, reason = "documented under Panics")]
            let added = added.expect("this U-Net needs added conditions");
            let [b, ids] = added.time_ids.dims();
            let time_ids = added.time_ids.clone().reshape([b * ids]);
            let time_embeds = sinusoidal(time_ids, d).reshape([b, ids * d]).cast(dtype);
            let added = Tensor::cat(vec![added.text_embeds.clone(), time_embeds], 1);
            emb = emb + add_embedding.forward(added);
        }
        // Every residual block activates the embedding before projecting it: this does so once.
        let cond = BlockInput {
            emb: config.act_fn.forward(emb),
            context: encoder_hidden_states,
            control: how.control.map(Controlled::new),
        };

        let sample = if config.center_input_sample {
            sample * 2.0 - 1.0
        } else {
            sample
        };
        let layer = |level: &Level, i: usize, x: Tensor<4>| match how.memory {
            Memory::Normal => level.forward_layer(i, x, &cond),
            Memory::Low => level.recompute_layer(i, x, &cond),
        };
        let mut x = self.conv_in.forward_channels_last(channels_last(sample));
        let mut skips = vec![x.clone()];
        for (level, downsample) in &self.down_blocks {
            for i in 0..level.len() {
                x = layer(level, i, x);
                skips.push(x.clone());
            }
            if let Some(downsample) = downsample {
                x = downsample.forward(x);
                skips.push(x.clone());
            }
        }
        if let Some(level) = &self.mid_block {
            for i in 0..level.len() {
                x = layer(level, i, x);
            }
        }
        for (level, upsample) in &self.up_blocks {
            for i in 0..level.len() {
                let skip = skips.pop().into_iter();
                x = Tensor::cat([x].into_iter().chain(skip).collect(), 3);
                x = layer(level, i, x);
            }
            if let (Some(upsample), Some(skip)) = (upsample, skips.last()) {
                // Twice as large, or one less if the down path rounded an odd size up.
                let [_, h, w, _] = skip.dims();
                x = upsample.forward(x, [h, w]);
            }
        }
        let x = self.conv_norm_out.forward_act(x, config.act_fn);
        channels_first(self.conv_out.forward_channels_last(x))
    }
}
