//! Autoencoders between pictures and latents: `AutoencoderKL` and `AutoencoderKLFlux2` of diffusers, and the distilled
//! `AutoencoderTiny`.

mod autoencoder;
mod tiny;
mod vae_config;
mod vae_tiles;

use burn::tensor::Tensor;

use crate::Result;
use crate::models::denoiser::unet_blocks::{BlockOptions, Downsample, ResnetBlock, Upsample};
use crate::models::feature_map::{Conv2d, GroupNorm, channels_first, channels_last};
use crate::models::layers::{Activation, Linear, Mask, multi_head_attention};
pub use crate::models::vae::autoencoder::{Autoencoder, AutoencoderConfig};
pub use crate::models::vae::tiny::{AutoencoderTiny, AutoencoderTinyConfig};
pub use crate::models::vae::vae_config::AutoencoderKLConfig;
pub use crate::models::vae::vae_tiles::{decode_in_tiles, mean_in_tiles};
use crate::weights::Weights;

/// Epsilon of every normalisation.
const NORM_EPSILON: f64 = 1e-6;

/// A Gaussian over latents with independent elements.
#[derive(Debug, Clone)]
pub struct DiagonalGaussian {
    /// `[b, latent_channels, h, w]`.
    pub mean: Tensor<4>,
    /// Logarithm of the variance, clamped to `[-30, 20]`; of the same shape.
    pub logvar: Tensor<4>,
}

impl DiagonalGaussian {
    /// `mean + exp(logvar / 2) · noise`, with `noise` standard normal and of the same shape.
    pub fn sample(&self, noise: Tensor<4>) -> Tensor<4> {
        self.mean.clone() + (self.logvar.clone() * 0.5).exp() * noise
    }
}

/// The autoencoder of latent diffusion
/// ([Rombach et al. 2022](https://arxiv.org/abs/2112.10752)).
#[derive(Debug, Clone)]
pub struct AutoencoderKL {
    config: AutoencoderKLConfig,
    encoder: Encoder,
    quant_conv: Option<Conv2d>,
    post_quant_conv: Option<Conv2d>,
    decoder: Decoder,
    statistics: Option<Statistics>,
}

/// Mean and standard deviation of every channel of packed latents, `[1, c, 1, 1]` each.
#[derive(Debug, Clone)]
struct Statistics {
    mean: Tensor<4>,
    deviation: Tensor<4>,
}

impl Statistics {
    fn load(weights: &Weights, config: &AutoencoderKLConfig) -> Result<Self> {
        let c = config.denoised_channels();
        let read = |name: &str| weights.tensor(name, [c]).map(|x| x.reshape([1, c, 1, 1]));
        let variance: Tensor<4> = read("running_var")?;
        Ok(Self {
            mean: read("running_mean")?,
            deviation: (variance + config.batch_norm_eps).sqrt(),
        })
    }
}

impl AutoencoderKL {
    /// Builds the network that `config` describes from `weights`, all of which it must use.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) if the config is contradictory or has a value that is not supported;
    /// [`Error::Tensor`](crate::Error::Tensor) if a tensor is missing or of another shape; [`Error::UnusedTensors`](crate::Error::UnusedTensors) if
    /// some are left over.
    pub fn load(weights: &Weights, config: &AutoencoderKLConfig) -> Result<Self> {
        config.check(&weights.config_path())?;
        let conv = |name: &str, wanted: bool, channels: usize| {
            let load = || Conv2d::load(&weights.scope(name), [channels; 2], 1, 1, 0);
            wanted.then(load).transpose()
        };
        let latent = config.latent_channels;
        let vae = Self {
            config: config.clone(),
            encoder: Encoder::load(&weights.scope("encoder"), config)?,
            quant_conv: conv("quant_conv", config.use_quant_conv, 2 * latent)?,
            post_quant_conv: conv("post_quant_conv", config.use_post_quant_conv, latent)?,
            decoder: Decoder::load(&weights.scope("decoder"), config)?,
            statistics: (config.is_packed())
                .then(|| Statistics::load(&weights.scope("bn"), config))
                .transpose()?,
        };
        weights.check_all_used(&["bn.num_batches_tracked"])?;
        Ok(vae)
    }

    /// The configuration that the network was built from.
    pub fn config(&self) -> &AutoencoderKLConfig {
        &self.config
    }

    /// The encoder's latents of pictures, not [`to_denoised`](Autoencoder::to_denoised).
    ///
    /// # Shapes
    /// `[b, in_channels, height, width]` in `[-1, 1]` to `[b, latent_channels, h, w]`, smaller by
    /// [`AutoencoderKLConfig::downsampling_factor`].
    ///
    /// # Panics
    /// If the shape is not as above.
    pub fn encode(&self, image: Tensor<4>) -> DiagonalGaussian {
        let mut moments = self.encoder.forward(channels_last(image));
        if let Some(quant_conv) = &self.quant_conv {
            moments = quant_conv.forward_channels_last(moments);
        }
        let (moments, c) = (channels_first(moments), self.config.latent_channels);
        DiagonalGaussian {
            mean: moments.clone().narrow(1, 0, c),
            logvar: moments.narrow(1, c, c).clamp(-30.0, 20.0),
        }
    }
}

impl Autoencoder for AutoencoderKL {
    fn denoised_channels(&self) -> usize {
        self.config.denoised_channels()
    }

    fn pixels(&self) -> usize {
        self.config.pixels()
    }

    fn downsampling_factor(&self) -> usize {
        self.config.downsampling_factor()
    }

    fn to_denoised(&self, latents: Tensor<4>) -> Tensor<4> {
        let config = &self.config;
        let Some(Statistics { mean, deviation }) = &self.statistics else {
            return config.scaling().apply(latents);
        };
        let ([b, c, h, w], p) = (latents.dims(), config.patch());
        let packed = latents
            .reshape([b, c, h / p, p, w / p, p])
            .permute([0, 1, 3, 5, 2, 4])
            .reshape([b, c * p * p, h / p, w / p]);
        let [mean, deviation] = [mean, deviation].map(|one| one.clone().cast(packed.dtype()));
        (packed - mean) / deviation
    }

    fn to_decoder(&self, latents: Tensor<4>) -> Tensor<4> {
        let config = &self.config;
        let Some(Statistics { mean, deviation }) = &self.statistics else {
            return config.scaling().undo(latents);
        };
        let [mean, deviation] = [mean, deviation].map(|one| one.clone().cast(latents.dtype()));
        let ([b, c, h, w], p) = (latents.dims(), config.patch());
        (latents * deviation + mean)
            .reshape([b, c / (p * p), p, p, h, w])
            .permute([0, 1, 4, 2, 5, 3])
            .reshape([b, c / (p * p), h * p, w * p])
    }

    fn mean(&self, image: Tensor<4>) -> Tensor<4> {
        self.encode(image).mean
    }

    fn decode(&self, latents: Tensor<4>) -> Tensor<4> {
        let mut x = channels_last(latents);
        if let Some(post_quant_conv) = &self.post_quant_conv {
            x = post_quant_conv.forward_channels_last(x);
        }
        channels_first(self.decoder.forward(x))
    }
}

fn block_options(config: &AutoencoderKLConfig) -> BlockOptions {
    BlockOptions {
        norm_num_groups: config.norm_num_groups,
        norm_eps: NORM_EPSILON,
        act_fn: config.act_fn,
        time_embed_dim: None,
    }
}

/// Normalisation, SiLU and a last 3×3 convolution.
#[derive(Debug, Clone)]
struct Head {
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Head {
    fn load(weights: &Weights, channels: [usize; 2], groups: usize) -> Result<Self> {
        let norm = weights.scope("conv_norm_out");
        Ok(Self {
            conv_norm_out: GroupNorm::load(&norm, groups, channels[0], NORM_EPSILON)?,
            conv_out: Conv2d::load(&weights.scope("conv_out"), channels, 3, 1, 1)?,
        })
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let x = self.conv_norm_out.forward_act(x, Activation::Silu);
        self.conv_out.forward_channels_last(x)
    }
}

#[derive(Debug, Clone)]
struct Encoder {
    conv_in: Conv2d,
    down_blocks: Vec<(Vec<ResnetBlock>, Option<Downsample>)>,
    mid_block: MidBlock,
    head: Head,
}

impl Encoder {
    fn load(weights: &Weights, config: &AutoencoderKLConfig) -> Result<Self> {
        let options = block_options(config);
        let channels = &config.block_out_channels;
        let last = channels[channels.len() - 1];
        let mut down_blocks = Vec::new();
        let mut previous = channels[0];
        for (i, &c) in channels.iter().enumerate() {
            let weights = weights.scope("down_blocks").scope(i);
            let resnets = load_resnets(&weights, [previous, c], config.layers_per_block, &options)?;
            let sampler = weights.scope("downsamplers").scope(0);
            let downsample = (i + 1 < channels.len()).then(|| Downsample::load(&sampler, c, 0));
            down_blocks.push((resnets, downsample.transpose()?));
            previous = c;
        }
        let conv_in = weights.scope("conv_in");
        let head = [last, 2 * config.latent_channels];
        Ok(Self {
            conv_in: Conv2d::load(&conv_in, [config.in_channels, channels[0]], 3, 1, 1)?,
            down_blocks,
            mid_block: MidBlock::load(&weights.scope("mid_block"), last, config)?,
            head: Head::load(weights, head, config.norm_num_groups)?,
        })
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let mut x = self.conv_in.forward_channels_last(x);
        for (resnets, downsample) in &self.down_blocks {
            x = resnets.iter().fold(x, |x, resnet| resnet.forward(x, None));
            if let Some(downsample) = downsample {
                x = downsample.forward(x);
            }
        }
        self.head.forward(self.mid_block.forward(x))
    }
}

#[derive(Debug, Clone)]
struct Decoder {
    conv_in: Conv2d,
    mid_block: MidBlock,
    up_blocks: Vec<(Vec<ResnetBlock>, Option<Upsample>)>,
    head: Head,
}

impl Decoder {
    fn load(weights: &Weights, config: &AutoencoderKLConfig) -> Result<Self> {
        let options = block_options(config);
        let channels = config.decoder_channels();
        let last = channels[channels.len() - 1];
        let mut up_blocks = Vec::new();
        let mut previous = last;
        for (i, &c) in channels.iter().rev().enumerate() {
            let weights = weights.scope("up_blocks").scope(i);
            let layers = config.layers_per_block + 1;
            let resnets = load_resnets(&weights, [previous, c], layers, &options)?;
            let sampler = weights.scope("upsamplers").scope(0);
            let upsample = (i + 1 < channels.len()).then(|| Upsample::load(&sampler, c));
            up_blocks.push((resnets, upsample.transpose()?));
            previous = c;
        }
        let conv_in = weights.scope("conv_in");
        let head = [channels[0], config.out_channels];
        Ok(Self {
            conv_in: Conv2d::load(&conv_in, [config.latent_channels, last], 3, 1, 1)?,
            mid_block: MidBlock::load(&weights.scope("mid_block"), last, config)?,
            up_blocks,
            head: Head::load(weights, head, config.norm_num_groups)?,
        })
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let mut x = self
            .mid_block
            .forward(self.conv_in.forward_channels_last(x));
        for (resnets, upsample) in &self.up_blocks {
            x = resnets.iter().fold(x, |x, resnet| resnet.forward(x, None));
            if let Some(upsample) = upsample {
                let [_, h, w, _] = x.dims();
                x = upsample.forward(x, [2 * h, 2 * w]);
            }
        }
        self.head.forward(x)
    }
}

fn load_resnets(
    weights: &Weights,
    [c_in, c_out]: [usize; 2],
    count: usize,
    options: &BlockOptions,
) -> Result<Vec<ResnetBlock>> {
    (0..count)
        .map(|i| {
            let channels = [if i == 0 { c_in } else { c_out }, c_out];
            ResnetBlock::load(&weights.scope("resnets").scope(i), channels, options)
        })
        .collect()
}

/// Two residual blocks, with attention over all positions between them.
#[derive(Debug, Clone)]
struct MidBlock {
    resnets: Vec<ResnetBlock>,
    attention: Option<Attention>,
}

impl MidBlock {
    fn load(weights: &Weights, c: usize, config: &AutoencoderKLConfig) -> Result<Self> {
        let attention = || {
            Attention::load(
                &weights.scope("attentions").scope(0),
                c,
                config.norm_num_groups,
            )
        };
        Ok(Self {
            resnets: load_resnets(weights, [c, c], 2, &block_options(config))?,
            attention: config.mid_block_add_attention.then(attention).transpose()?,
        })
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let x = self.resnets[0].forward(x, None);
        let x = match &self.attention {
            Some(attention) => attention.forward(x),
            None => x,
        };
        self.resnets[1].forward(x, None)
    }
}

/// Attention of one head over all positions.
#[derive(Debug, Clone)]
struct Attention {
    group_norm: GroupNorm,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
}

impl Attention {
    fn load(weights: &Weights, c: usize, groups: usize) -> Result<Self> {
        // Files saved before diffusers 0.17, such as Stable Diffusion 1.5's, have other names; some have kept the
        // 1×1 convolutions of the original code.
        let linear = |name: &str, old_name: &str| {
            let old = weights.scope(old_name);
            let layer = match old.is_empty() {
                true => weights.scope(name),
                false => old,
            };
            Linear::load_squeezed(&layer, c, c)
        };
        Ok(Self {
            group_norm: GroupNorm::load(&weights.scope("group_norm"), groups, c, NORM_EPSILON)?,
            to_q: linear("to_q", "query")?,
            to_k: linear("to_k", "key")?,
            to_v: linear("to_v", "value")?,
            to_out: linear("to_out.0", "proj_attn")?,
        })
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let [b, h, w, c] = x.dims();
        let y = self.group_norm.forward(x.clone()).reshape([b, h * w, c]);
        let (q, k) = (self.to_q.forward(y.clone()), self.to_k.forward(y.clone()));
        let y = multi_head_attention(q, k, self.to_v.forward(y), 1, Mask::None);
        x + self.to_out.forward(y).reshape([b, h, w, c])
    }
}
