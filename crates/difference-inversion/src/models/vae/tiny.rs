//! `AutoencoderTiny` of diffusers: TAESD, a distilled autoencoder of plain convolutions
//! ([Boer Bohan 2023](https://github.com/madebyollin/taesd)).

use std::path::Path;

use burn::tensor::Tensor;
use serde::Deserialize;

use crate::models::denoiser::unet_config::MOST_LEVELS;
use crate::models::feature_map::{Conv2d, channels_first, channels_last, resize_nearest};
use crate::models::layers::{Activation, MOST_LAYERS};
use crate::models::vae::autoencoder::{Autoencoder, Scaling};
use crate::models::vae::vae_config::check_colours;
use crate::weights::{OtherFields, Weights, check_fixed_fields};
use crate::{Error, Result};

/// The decoder softly clamps latents to this magnitude.
const LATENT_RANGE: f64 = 3.0;

/// The configuration of an [`AutoencoderTiny`], with the names and defaults of diffusers.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct AutoencoderTinyConfig {
    /// Channels of the input pictures.
    pub in_channels: usize,
    /// Channels of the output pictures.
    pub out_channels: usize,
    /// Channels of every level of the encoder.
    pub encoder_block_out_channels: Vec<usize>,
    /// Channels of every level of the decoder, from the latents on.
    pub decoder_block_out_channels: Vec<usize>,
    /// Non-linearity inside of the residual blocks.
    pub act_fn: Activation,
    /// How maps are enlarged.
    pub upsample_fn: String,
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Residual blocks of every level of the encoder.
    pub num_encoder_blocks: Vec<usize>,
    /// Residual blocks of every level of the decoder.
    pub num_decoder_blocks: Vec<usize>,
    /// The denoiser reads `(latents - shift_factor) · scaling_factor`.
    pub scaling_factor: f64,
    /// See [`scaling_factor`](Self::scaling_factor); null means 0.
    pub shift_factor: Option<f64>,
    /// All other fields.
    #[serde(flatten)]
    pub other: OtherFields,
}

impl Default for AutoencoderTinyConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            encoder_block_out_channels: vec![64; 4],
            decoder_block_out_channels: vec![64; 4],
            act_fn: Activation::Relu,
            upsample_fn: "nearest".to_owned(),
            latent_channels: 4,
            num_encoder_blocks: vec![1, 3, 3, 3],
            num_decoder_blocks: vec![3, 3, 3, 1],
            scaling_factor: 1.0,
            shift_factor: None,
            other: OtherFields::new(),
        }
    }
}

/// Fields with only one supported value.
const FIXED_FIELDS: &[(&str, &str)] = &[("upsampling_scaling_factor", "2")];

impl AutoencoderTinyConfig {
    /// Factor between the size of a picture and that of its latents.
    pub fn downsampling_factor(&self) -> usize {
        1 << self.num_encoder_blocks.len().saturating_sub(1)
    }

    fn scaling(&self) -> Scaling {
        Scaling {
            factor: self.scaling_factor,
            shift: self.shift_factor.unwrap_or(0.0),
        }
    }

    /// Checks its consistency; `path` is named in errors.
    ///
    /// # Errors
    /// [`Error::Config`] for a value that contradicts another or is not supported.
    pub(crate) fn check(&self, path: &Path) -> Result<()> {
        check_fixed_fields(&self.other, FIXED_FIELDS, path)?;
        check_colours(path, self.in_channels, self.out_channels)?;
        // Twice as large, both take the same places.
        if !["nearest", "nearest-exact"].contains(&self.upsample_fn.as_str()) {
            return Err(Error::unsupported(
                path,
                "upsample_fn",
                "nearest",
                &self.upsample_fn,
            ));
        }
        let wrong = |field: &str, expected: &str, found: &dyn std::fmt::Debug| {
            Err(Error::unsupported(path, field, expected, found))
        };
        let levels = self.num_encoder_blocks.len();
        if !(1..=MOST_LEVELS).contains(&levels) {
            return wrong(
                "num_encoder_blocks",
                &format!("1 to {MOST_LEVELS} levels"),
                &levels,
            );
        }
        if self.num_decoder_blocks.len() != levels {
            let expected = format!("{levels} levels, as in num_encoder_blocks");
            return wrong("num_decoder_blocks", &expected, &self.num_decoder_blocks);
        }
        for (field, blocks) in [
            ("num_encoder_blocks", &self.num_encoder_blocks),
            ("num_decoder_blocks", &self.num_decoder_blocks),
        ] {
            if blocks.iter().any(|&blocks| blocks > MOST_LAYERS) {
                return wrong(field, &format!("at most {MOST_LAYERS} each"), blocks);
            }
        }
        for (field, channels) in [
            (
                "encoder_block_out_channels",
                &self.encoder_block_out_channels,
            ),
            (
                "decoder_block_out_channels",
                &self.decoder_block_out_channels,
            ),
        ] {
            let alike = channels.windows(2).all(|pair| pair[0] == pair[1]);
            if channels.len() != levels || !alike {
                let expected = format!("the same number of channels for each of {levels} levels");
                return wrong(field, &expected, channels);
            }
        }
        if !(self.scaling_factor.is_finite() && self.scaling_factor > 0.0) {
            return wrong("scaling_factor", "a positive number", &self.scaling_factor);
        }
        Ok(())
    }
}

/// A residual block of three convolutions.
#[derive(Debug, Clone)]
struct Block {
    convs: [Conv2d; 3],
    act_fn: Activation,
}

impl Block {
    fn load(weights: &Weights, channels: usize, act_fn: Activation) -> Result<Self> {
        let weights = weights.scope("conv");
        let conv = |place: usize| Conv2d::load(&weights.scope(place), [channels; 2], 3, 1, 1);
        Ok(Self {
            convs: [conv(0)?, conv(2)?, conv(4)?],
            act_fn,
        })
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let [first, second, third] = &self.convs;
        let y = self.act_fn.forward(first.forward_channels_last(x.clone()));
        let y = self.act_fn.forward(second.forward_channels_last(y));
        Activation::Relu.forward(x + third.forward_channels_last(y))
    }
}

/// A layer of a sequence, on maps that are channels-last.
#[derive(Debug, Clone)]
enum Layer {
    Conv(Box<Conv2d>),
    Activation(Activation),
    Block(Box<Block>),
    /// Twice as large.
    Upsample,
}

impl Layer {
    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        match self {
            Self::Conv(conv) => conv.forward_channels_last(x),
            Self::Activation(activation) => activation.forward(x),
            Self::Block(block) => block.forward(x),
            Self::Upsample => {
                let [_, h, w, _] = x.dims();
                resize_nearest(x, [2 * h, 2 * w])
            }
        }
    }
}

/// Reads layers that are numbered in their order.
struct Sequence<'a> {
    weights: &'a Weights,
    layers: Vec<Layer>,
}

impl Sequence<'_> {
    fn conv(&mut self, channels: [usize; 2]) -> Result<()> {
        let conv = Conv2d::load(&self.weights.scope(self.layers.len()), channels, 3, 1, 1)?;
        self.layers.push(Layer::Conv(Box::new(conv)));
        Ok(())
    }

    fn conv_without_bias(&mut self, channels: usize, stride: usize) -> Result<()> {
        let weights = self.weights.scope(self.layers.len());
        let conv = Conv2d::load_without_bias(&weights, [channels; 2], 3, stride, 1)?;
        self.layers.push(Layer::Conv(Box::new(conv)));
        Ok(())
    }

    fn blocks(&mut self, count: usize, channels: usize, act_fn: Activation) -> Result<()> {
        for _ in 0..count {
            let block = Block::load(&self.weights.scope(self.layers.len()), channels, act_fn)?;
            self.layers.push(Layer::Block(Box::new(block)));
        }
        Ok(())
    }
}

/// The distilled autoencoder.
#[derive(Debug, Clone)]
pub struct AutoencoderTiny {
    config: AutoencoderTinyConfig,
    encoder: Vec<Layer>,
    decoder: Vec<Layer>,
}

impl AutoencoderTiny {
    /// Builds the network that `config` describes from `weights`, all of which it must use.
    ///
    /// # Errors
    /// [`Error::Config`] if the config is contradictory or has a value that is not supported; [`Error::Tensor`] if a
    /// tensor is missing or of another shape; [`Error::UnusedTensors`] if some are left over.
    pub fn load(weights: &Weights, config: &AutoencoderTinyConfig) -> Result<Self> {
        config.check(&weights.config_path())?;
        let sequence = |weights: &Weights| weights.scope("layers");
        let vae = Self {
            config: config.clone(),
            encoder: encoder(&sequence(&weights.scope("encoder")), config)?,
            decoder: decoder(&sequence(&weights.scope("decoder")), config)?,
        };
        weights.check_all_used(&[])?;
        Ok(vae)
    }
}

impl Autoencoder for AutoencoderTiny {
    fn denoised_channels(&self) -> usize {
        self.config.latent_channels
    }

    fn pixels(&self) -> usize {
        self.config.downsampling_factor()
    }

    fn downsampling_factor(&self) -> usize {
        self.config.downsampling_factor()
    }

    fn to_denoised(&self, latents: Tensor<4>) -> Tensor<4> {
        self.config.scaling().apply(latents)
    }

    fn to_decoder(&self, latents: Tensor<4>) -> Tensor<4> {
        self.config.scaling().undo(latents)
    }

    fn mean(&self, image: Tensor<4>) -> Tensor<4> {
        run(&self.encoder, (image + 1.0) / 2.0)
    }

    fn decode(&self, latents: Tensor<4>) -> Tensor<4> {
        let clamped = (latents / LATENT_RANGE).tanh() * LATENT_RANGE;
        run(&self.decoder, clamped) * 2.0 - 1.0
    }
}

fn encoder(weights: &Weights, config: &AutoencoderTinyConfig) -> Result<Vec<Layer>> {
    let mut sequence = Sequence {
        weights,
        layers: Vec::new(),
    };
    let c = config.encoder_block_out_channels[0];
    for (level, &blocks) in config.num_encoder_blocks.iter().enumerate() {
        match level {
            0 => sequence.conv([config.in_channels, c])?,
            _ => sequence.conv_without_bias(c, 2)?,
        }
        sequence.blocks(blocks, c, config.act_fn)?;
    }
    sequence.conv([c, config.latent_channels])?;
    Ok(sequence.layers)
}

fn decoder(weights: &Weights, config: &AutoencoderTinyConfig) -> Result<Vec<Layer>> {
    let mut sequence = Sequence {
        weights,
        layers: Vec::new(),
    };
    let c = config.decoder_block_out_channels[0];
    sequence.conv([config.latent_channels, c])?;
    sequence.layers.push(Layer::Activation(config.act_fn));
    let last = config.num_decoder_blocks.len() - 1;
    for (level, &blocks) in config.num_decoder_blocks.iter().enumerate() {
        sequence.blocks(blocks, c, config.act_fn)?;
        if level == last {
            sequence.conv([c, config.out_channels])?;
        } else {
            sequence.layers.push(Layer::Upsample);
            sequence.conv_without_bias(c, 1)?;
        }
    }
    Ok(sequence.layers)
}

/// # Shapes
/// `[b, c, h, w]`, whatever the layers do to them
fn run(layers: &[Layer], x: Tensor<4>) -> Tensor<4> {
    let x = layers
        .iter()
        .fold(channels_last(x), |x, layer| layer.forward(x));
    channels_first(x)
}
