//! The frozen models of one checkpoint.

mod conditions;
mod kind;
mod open;

use ::image::RgbImage;
use burn::tensor::{DType, Device, FloatDType, Tensor};

pub use self::conditions::Conditions;
pub use self::kind::PipelineKind;
use crate::Result;
use crate::image::{to_image, to_tensor};
use crate::models::clip_text::ClipTextOutput;
use crate::models::tokenizer::ClipTokenizer;
use crate::models::unet::{AddedConditions, UNet2DConditionModel};
use crate::models::vae::AutoencoderKL;
use crate::prompt::{FullPrompt, Prompt, Words};
use crate::sample::NoiseSchedule;
use crate::text_encoder::TextEncoder;
use crate::tokens::Base;

/// A text-to-image diffusion model saved by diffusers. All weights are constants.
#[derive(Debug)]
pub struct Pipeline {
    kind: PipelineKind,
    force_zeros_for_empty_prompt: bool,
    text_encoders: Vec<TextEncoder>,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    schedule: NoiseSchedule,
    /// Height and width of its pictures.
    resolution: [u32; 2],
    device: Device,
    dtype: FloatDType,
    /// That of the autoencoder, which may be wider.
    vae_dtype: FloatDType,
}

impl Pipeline {
    /// What kind of pipeline this is.
    pub fn kind(&self) -> PipelineKind {
        self.kind
    }

    /// The text encoders in the order the U-Net reads them: one, or SDXL's two.
    pub fn text_encoders(&self) -> &[TextEncoder] {
        &self.text_encoders
    }

    /// The first text encoder's tokenizer, which cuts prompts into ids for all of them.
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
    /// [`Error::Setting`](crate::Error::Setting) if not.
    pub fn check_num_tokens(&self, num_tokens: usize) -> Result<()> {
        self.read(&Prompt::default(), num_tokens).map(|_| ())
    }

    /// The latents of a picture, fitted to [`resolution`](Self::resolution):
    /// `(mean − shift_factor) · scaling_factor`. The mean, not a sample, so that a picture has one
    /// place.
    ///
    /// # Shapes
    /// [1, channels, h, w] as [`latent_shape`](Self::latent_shape), f32
    pub fn encode_image(&self, image: &RgbImage) -> Tensor<4> {
        let config = self.vae.config();
        let pixels =
            to_tensor(image, self.resolution, &self.device).cast(DType::from(self.vae_dtype));
        let mean = self.vae.encode(pixels).mean;
        (mean.cast(DType::F32) - config.shift_factor.unwrap_or(0.0)) * config.scaling_factor
    }

    /// The picture of latents.
    ///
    /// # Errors
    /// [`Error::NotFinite`](crate::Error::NotFinite) if it is not made of numbers.
    pub fn decode(&self, latents: Tensor<4>) -> Result<RgbImage> {
        let config = self.vae.config();
        let latents = latents.cast(DType::from(self.vae_dtype)) / config.scaling_factor;
        to_image(
            self.vae
                .decode(latents + config.shift_factor.unwrap_or(0.0)),
        )
    }

    /// The words of a text.
    ///
    /// # Errors
    /// [`Error::InvalidFile`](crate::Error::InvalidFile) if the vocabulary cannot express them.
    pub fn prompt(&self, text: &str) -> Result<Prompt> {
        Prompt::new(text, self.tokenizer())
    }

    /// Has every text encoder read the words of a prompt that leaves room for `num_tokens`
    /// difference tokens; words that do not fit are cut off, see [`Words::notice`].
    ///
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) if not even the difference tokens have room.
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
    /// [`Error::InvalidInput`](crate::Error::InvalidInput) if difference tokens have the wrong width or no room.
    pub fn encode_prompts(&self, prompts: &[FullPrompt<'_>]) -> Result<Conditions> {
        let rows = (prompts.iter())
            .map(|full| {
                let outputs = (self
                    .text_encoders
                    .iter()
                    .zip(&full.words.beginnings)
                    .enumerate())
                .map(|(number, (encoder, beginning))| {
                    encoder.finish(beginning, full.difference.get(number))
                })
                .collect::<Result<Vec<_>>>()?;
                match self.kind {
                    PipelineKind::StableDiffusion => self.last_hidden_state(&outputs),
                    PipelineKind::StableDiffusionXl => self.penultimate_hidden_states(&outputs),
                }
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Conditions::cat(rows))
    }

    /// The conditions that ordinary guidance moves away from. For an empty text they are those of
    /// the empty prompt, or zeros where `model_index.json` says `force_zeros_for_empty_prompt`.
    ///
    /// # Errors
    /// [`Error::InvalidFile`](crate::Error::InvalidFile) if the vocabulary cannot express the text.
    pub fn encode_negative_prompt(&self, text: &str) -> Result<Conditions> {
        let words = self.read(&self.prompt(text)?, 0)?;
        let conditions = self.encode_prompts(&[FullPrompt::plain(&words)])?;
        match text.is_empty() && self.force_zeros_for_empty_prompt {
            true => Ok(conditions.without_prompt()),
            false => Ok(conditions),
        }
    }

    /// What the U-Net of Stable Diffusion 1 and 2 reads: the last hidden state, behind the final
    /// norm. (In diffusers' folders, version 2's text encoder ends with the layer that is read.)
    fn last_hidden_state(&self, outputs: &[ClipTextOutput]) -> Result<Conditions> {
        let states = outputs
            .iter()
            .map(|output| output.last_hidden_state.clone());
        Ok(Conditions {
            encoder_hidden_states: Tensor::cat(states.collect(), 2),
            added: None,
        })
    }

    /// What SDXL's U-Net reads: both encoders' last hidden state but one, without the final norm,
    /// side by side; the second encoder's pooled prompt, projected; and the sizes, of a picture
    /// that was never cropped.
    fn penultimate_hidden_states(&self, outputs: &[ClipTextOutput]) -> Result<Conditions> {
        let states = (outputs.iter())
            .map(ClipTextOutput::penultimate_hidden_state)
            .collect::<Result<Vec<_>>>()?;
        let mut pooled = Vec::new();
        if let (Some(encoder), Some(output)) = (self.text_encoders.last(), outputs.last()) {
            pooled.push(encoder.project(output.pooled.clone())?);
        }
        let [height, width] = self.resolution.map(|side| side as f32);
        let time_ids = [height, width, 0.0, 0.0, height, width];
        Ok(Conditions {
            encoder_hidden_states: Tensor::cat(states, 2), // [1, n, d₁ + d₂]
            added: Some(AddedConditions {
                text_embeds: Tensor::cat(pooled, 0),
                time_ids: Tensor::from_data([time_ids], (&self.device, DType::F32)),
            }),
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
            .forward(latents, timesteps, context, conditions.added.as_ref())
            .cast(DType::F32)
    }
}
