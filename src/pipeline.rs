//! The frozen models of one checkpoint, and the joint space they are judged in.

use std::path::Path;

use ::image::RgbImage;
use burn::tensor::{DType, Device, FloatDType, Tensor};

use crate::image::{ImagePreprocessor, to_image, to_tensor};
use crate::models::clip::ClipModel;
use crate::models::clip_image::ClipVisionModel;
use crate::models::clip_text::ClipTextModel;
use crate::models::tokenizer::ClipTokenizer;
use crate::models::unet::{UNet2DConditionModel, UNetConfig};
use crate::models::vae::{AutoencoderKL, AutoencoderKLConfig};
use crate::prompt::{FullPrompt, Prompt, Words};
use crate::sample::NoiseSchedule;
use crate::text_encoder::TextEncoder;
use crate::tokens::{Base, host};
use crate::weights::{Weights, read_config};
use crate::{Error, Result, loss};

/// How alike (mean cosine) two token-embedding tables are if one was fine-tuned from the other.
const SAME_ORIGIN: f32 = 0.9;
/// Rows of the tables that are compared.
const COMPARED_ROWS: usize = 2048;

/// What the U-Net is conditioned on, a row for each prompt.
#[derive(Debug, Clone)]
pub struct Conditions {
    /// The text encoder's hidden states [b, n, d].
    pub encoder_hidden_states: Tensor<3>,
}

impl Conditions {
    /// Each row `count` times in a row.
    #[must_use]
    pub fn repeat_each(self, count: usize) -> Self {
        if count == 1 {
            return self;
        }
        let [b, n, d] = self.encoder_hidden_states.dims();
        let repeated = (self.encoder_hidden_states.unsqueeze_dim::<4>(1)) // [b, 1, n, d]
            .repeat_dim(1, count)
            .reshape([b * count, n, d]);
        Self {
            encoder_hidden_states: repeated,
        }
    }

    /// The rows of both.
    #[must_use]
    pub fn followed_by(&self, other: &Self) -> Self {
        let rows = [self, other].map(|part| part.encoder_hidden_states.clone());
        Self {
            encoder_hidden_states: Tensor::cat(rows.to_vec(), 0),
        }
    }
}

/// A text-to-image diffusion model saved by diffusers. All weights are constants.
#[derive(Debug)]
pub struct Pipeline {
    text_encoders: Vec<TextEncoder>,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    schedule: NoiseSchedule,
    /// Height and width of its pictures.
    resolution: [u32; 2],
    device: Device,
    dtype: FloatDType,
}

impl Pipeline {
    /// Opens a diffusers pipeline folder: `unet`, `vae`, `text_encoder`, `tokenizer`, `scheduler`.
    /// Pictures have the size the U-Net was trained on unless `resolution` (height, width) says
    /// otherwise.
    ///
    /// # Errors
    /// Whatever is wrong with a file, naming it; [`Error::Config`] for models that need more than
    /// a prompt; [`Error::Setting`] for a resolution the networks cannot halve often enough.
    pub fn open(
        folder: &Path,
        resolution: Option<[u32; 2]>,
        device: &Device,
        dtype: FloatDType,
    ) -> Result<Self> {
        let part = |name: &str| {
            let path = folder.join(name);
            if path.is_dir() {
                return Ok(path);
            }
            let reason = format!("not a diffusers pipeline folder: no folder `{name}` in it");
            Err(Error::invalid_file(folder, reason))
        };
        let (unet_folder, vae_folder) = (part("unet")?, part("vae")?);
        let unet_config: UNetConfig = read_config(&unet_folder.join("config.json"))?;
        if unet_config.needs_added_conditions() {
            return Err(Error::unsupported(
                &unet_folder.join("config.json"),
                "addition_embed_type",
                "null",
                &unet_config.addition_embed_type,
            ));
        }
        let unet =
            UNet2DConditionModel::load(&Weights::open(&unet_folder, device, dtype)?, &unet_config)?;
        let vae_config: AutoencoderKLConfig = read_config(&vae_folder.join("config.json"))?;
        let vae = AutoencoderKL::load(&Weights::open(&vae_folder, device, dtype)?, &vae_config)?;
        let tokenizer = ClipTokenizer::open(&part("tokenizer")?)?;
        let text_model = ClipTextModel::open(&part("text_encoder")?, device, dtype)?;
        let width = text_model.config().hidden_size;
        if width != unet_config.context_dim() {
            return Err(Error::unsupported(
                &unet_folder.join("config.json"),
                "cross_attention_dim",
                &format!("{width}, the width of the text encoder"),
                unet_config.context_dim(),
            ));
        }
        if vae_config.latent_channels != unet_config.in_channels {
            return Err(Error::unsupported(
                &unet_folder.join("config.json"),
                "in_channels",
                &format!("{}, the VAE's latent channels", vae_config.latent_channels),
                unet_config.in_channels,
            ));
        }
        let resolution = match resolution.or_else(|| trained_on(&unet_config, &vae_config)) {
            Some(resolution) => resolution,
            None => {
                return Err(Error::Missing {
                    what: "the size of the pictures".to_owned(),
                    reason: "unet/config.json has no `sample_size`".to_owned(),
                });
            }
        };
        let pipeline = Self {
            text_encoders: vec![TextEncoder::new(tokenizer, text_model)?],
            unet,
            vae,
            schedule: NoiseSchedule::open(&part("scheduler")?)?,
            resolution,
            device: device.clone(),
            dtype,
        };
        pipeline.check_resolution()?;
        Ok(pipeline)
    }

    /// The text encoders, one for all models so far.
    pub fn text_encoders(&self) -> &[TextEncoder] {
        &self.text_encoders
    }

    /// The first text encoder's tokenizer, which reads all prompts.
    pub fn tokenizer(&self) -> &ClipTokenizer {
        self.text_encoders[0].tokenizer()
    }

    /// What difference tokens for this model belong to.
    pub fn base(&self) -> Base {
        let bases = self.text_encoders.iter().map(TextEncoder::base);
        bases.cloned().collect()
    }

    /// The noise schedule the U-Net was trained on.
    pub fn schedule(&self) -> &NoiseSchedule {
        &self.schedule
    }

    /// Height and width of the pictures.
    pub fn resolution(&self) -> [u32; 2] {
        self.resolution
    }

    /// Where the models are.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The shape of one picture's latents, [1, channels, h, w].
    pub fn latent_shape(&self) -> [usize; 4] {
        let factor = self.vae.config().downsampling_factor();
        let [h, w] = self
            .resolution
            .map(|side| (side as usize).checked_div(factor).unwrap_or(0));
        [1, self.vae.config().latent_channels, h, w]
    }

    /// Checks that prompts have room for this many difference tokens.
    ///
    /// # Errors
    /// [`Error::Setting`] if not.
    pub fn check_num_tokens(&self, num_tokens: usize) -> Result<()> {
        self.read(&Prompt::default(), num_tokens).map(|_| ())
    }

    /// The latents of a picture, fitted to [`resolution`](Self::resolution):
    /// `(mean − shift_factor) · scaling_factor`. The mean, not a sample, so that a picture has one
    /// place.
    ///
    /// # Shapes
    /// [1, channels, h, w] as [`latent_shape`](Self::latent_shape)
    pub fn encode_image(&self, image: &RgbImage) -> Tensor<4> {
        let config = self.vae.config();
        let pixels = to_tensor(image, self.resolution, &self.device).cast(DType::from(self.dtype));
        let mean = self.vae.encode(pixels).mean;
        (mean - config.shift_factor.unwrap_or(0.0)) * config.scaling_factor
    }

    /// The picture of latents.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if it is not made of numbers.
    pub fn decode(&self, latents: Tensor<4>) -> Result<RgbImage> {
        let config = self.vae.config();
        let latents = latents.cast(DType::from(self.dtype)) / config.scaling_factor;
        to_image(
            self.vae
                .decode(latents + config.shift_factor.unwrap_or(0.0)),
        )
    }

    /// The words of a text.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] if the vocabulary cannot express them.
    pub fn prompt(&self, text: &str) -> Result<Prompt> {
        Prompt::new(text, self.tokenizer())
    }

    /// Has every text encoder read the words of a prompt that leaves room for `num_tokens`
    /// difference tokens; words that do not fit are cut off, see [`Words::notice`].
    ///
    /// # Errors
    /// [`Error::Setting`] if not even the difference tokens have room.
    pub fn read(&self, prompt: &Prompt, num_tokens: usize) -> Result<Words> {
        let read = (self.text_encoders.iter())
            .map(|encoder| encoder.read(prompt, num_tokens))
            .collect::<Result<Vec<_>>>()?;
        let cut = read.iter().map(|(_, cut)| *cut).max().unwrap_or(0);
        Ok(Words {
            prompt: prompt.clone(),
            beginnings: read.into_iter().map(|(beginning, _)| beginning).collect(),
            cut,
        })
    }

    /// The conditions of Full Prompts: start, words, difference tokens, end, padding.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] if difference tokens have the wrong width or no room.
    pub fn encode_prompts(&self, prompts: &[FullPrompt<'_>]) -> Result<Conditions> {
        let encoder = &self.text_encoders[0];
        let rows = (prompts.iter())
            .map(|full| {
                let output = encoder.finish(&full.words.beginnings[0], full.difference.first())?;
                Ok(output.last_hidden_state)
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Conditions {
            encoder_hidden_states: Tensor::cat(rows, 0),
        })
    }

    /// The U-Net's output for noisy latents: noise or velocity, as the schedule says.
    ///
    /// # Shapes
    /// `latents` [b, channels, h, w]; a timestep and a row of `conditions` for each.
    pub fn predict(
        &self,
        latents: Tensor<4>,
        timesteps: &[f64],
        conditions: &Conditions,
    ) -> Tensor<4> {
        let timesteps = Tensor::<1>::from_data(timesteps, (&self.device, DType::F32));
        let latents = latents.cast(DType::from(self.dtype));
        let context = conditions.encoder_hidden_states.clone();
        self.unet
            .forward(latents, timesteps, context, None)
            .cast(DType::F32)
    }

    fn check_resolution(&self) -> Result<()> {
        let factor =
            self.vae.config().downsampling_factor() * self.unet.config().downsampling_factor();
        let fits = |side: u32| side > 0 && (side as usize).is_multiple_of(factor);
        if self.resolution.into_iter().all(fits) {
            return Ok(());
        }
        let [height, width] = self.resolution;
        Err(Error::Setting {
            name: "resolution",
            expected: format!("multiples of {factor}"),
            found: format!("{width}×{height}"),
        })
    }
}

/// Height and width of the pictures the U-Net was trained on, from its `sample_size`.
fn trained_on(unet: &UNetConfig, vae: &AutoencoderKLConfig) -> Option<[u32; 2]> {
    let side = |value: &serde_json::Value| {
        let side = value.as_u64()? * u64::try_from(vae.downsampling_factor()).ok()?;
        u32::try_from(side).ok()
    };
    let size = unet.other.get("sample_size")?;
    match size.as_array() {
        Some(sides) => Some([side(sides.first()?)?, side(sides.get(1)?)?]),
        None => Some([side(size)?; 2]),
    }
}

/// The space that pictures and words share: CLIP with both projections.
#[derive(Debug)]
pub struct JointSpace {
    text_encoder: TextEncoder,
    vision: ClipVisionModel,
    preprocessor: ImagePreprocessor,
    device: Device,
    dtype: FloatDType,
}

impl JointSpace {
    /// Opens a transformers `CLIPModel` folder with its tokenizer and `preprocessor_config.json`.
    ///
    /// # Errors
    /// Whatever is wrong with a file, naming it.
    pub fn open(folder: &Path, device: &Device, dtype: FloatDType) -> Result<Self> {
        let model = ClipModel::open(folder, device, dtype)?;
        Ok(Self {
            text_encoder: TextEncoder::new(ClipTokenizer::open(folder)?, model.text)?,
            vision: model.vision,
            preprocessor: ImagePreprocessor::open(folder)?,
            device: device.clone(),
            dtype,
        })
    }

    /// The text encoder of the joint space.
    pub fn text_encoder(&self) -> &TextEncoder {
        &self.text_encoder
    }

    /// Checks that difference tokens for `encoder` mean something here: the token embeddings must
    /// be the same, or at least a fine-tuned copy.
    ///
    /// # Errors
    /// [`Error::WrongBase`] if they are not.
    pub fn check_encoder(&self, encoder: &TextEncoder) -> Result<()> {
        let (ours, theirs) = (self.text_encoder.token_table(), encoder.token_table());
        if self.text_encoder.base() == encoder.base() {
            return Ok(());
        }
        if ours.dims() == theirs.dims() {
            let rows = COMPARED_ROWS.min(ours.dims()[0]);
            let [ours, theirs] =
                [ours, theirs].map(|table| table.clone().slice([0..rows]).cast(DType::F32));
            if host(loss::cosine(ours, theirs).mean())[0] >= SAME_ORIGIN {
                return Ok(());
            }
        }
        Err(Error::WrongBase {
            reason: "the joint space (CLIP folder) is not that of the model's text encoder: their \
                     token embeddings differ"
                .to_owned(),
        })
    }

    /// A picture's unit-norm features, `[e]`.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] if the preprocessor and the network do not fit.
    pub fn image_features(&self, image: &RgbImage) -> Result<Vec<f32>> {
        let pixels = self
            .preprocessor
            .apply(image, &self.device)
            .cast(DType::from(self.dtype));
        let pooled = self.vision.forward(pixels)?;
        Ok(unit(self.vision.project(pooled)?))
    }

    /// The unit-norm features of words, `[e]`.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] if the model has no projection.
    pub fn text_features(&self, prompt: &Prompt) -> Result<Vec<f32>> {
        Ok(unit(self.prompt_features(prompt, None)?))
    }

    /// E_T([D̃]): the features of difference tokens read alone, not normalised.
    ///
    /// # Shapes
    /// `difference`: [n, d]; result [1, e].
    ///
    /// # Errors
    /// [`Error::InvalidInput`] if the tokens have another width, [`Error::Setting`] if there are
    /// too many.
    pub fn difference_features(&self, difference: &Tensor<2>) -> Result<Tensor<2>> {
        self.prompt_features(&Prompt::default(), Some(difference))
    }

    /// The features of words followed by token embeddings, not normalised.
    ///
    /// # Shapes
    /// `tokens`: [n, d]; result [1, e].
    ///
    /// # Errors
    /// As [`difference_features`](Self::difference_features).
    pub fn prompt_features(
        &self,
        prompt: &Prompt,
        tokens: Option<&Tensor<2>>,
    ) -> Result<Tensor<2>> {
        let num_tokens = tokens.map_or(0, |tokens| tokens.dims()[0]);
        let (beginning, _) = self.text_encoder.read(prompt, num_tokens)?;
        self.text_encoder.features(&beginning, tokens)
    }
}

/// The one row of a tensor, brought to unit norm.
fn unit(row: Tensor<2>) -> Vec<f32> {
    let row = row.cast(DType::F32);
    let norm = row.clone().powi_scalar(2).sum_dim(1).sqrt();
    host(row / norm)
}
