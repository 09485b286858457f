//! The frozen models of one checkpoint.

mod index;
mod open;
mod picture;

use std::cell::Cell;
use std::sync::{Arc, OnceLock};

use burn::tensor::{DType, Device, FloatDType, Tensor};

pub(crate) use self::open::{resolution, text_encoders, with_shorter_side};
use crate::diffusion::family::{EncoderPart, Family};
use crate::diffusion::model_files::embedding::written_in;
use crate::diffusion::preview::Colours;
use crate::diffusion::sample::Noising;
use crate::diffusion::text_encoder::{Base, Encoded, TextEncoder};
use crate::diffusion::words::{FullPrompt, Prompt, Words};
pub use crate::models::denoiser::conditions::Conditions;
use crate::models::denoiser::{Denoiser, How, Memory};
use crate::models::vae::Autoencoder;
use crate::{Error, Result};

thread_local! {
    /// See [`evaluations`].
    static EVALUATIONS: Cell<u64> = const { Cell::new(0) };
}

/// The number of latents that this thread has passed through denoisers. Backward passes are not counted.
pub fn evaluations() -> u64 {
    EVALUATIONS.get()
}

/// The autoencoder of previews, or why it cannot be used: a sentence for the user.
type PreviewVae = std::result::Result<Arc<dyn Autoencoder>, String>;

/// A text-to-image diffusion model saved by diffusers. All weights are constants, and copies share them.
#[derive(Debug, Clone)]
pub struct Pipeline {
    family: &'static Family,
    /// The family's descriptions of its text encoders.
    parts: Vec<&'static EncoderPart>,
    force_zeros_for_empty_prompt: bool,
    text_encoders: Vec<TextEncoder>,
    denoiser: Arc<dyn Denoiser>,
    /// SHA-256 of the denoiser's changes by LoRAs.
    adapters: Option<String>,
    vae: Arc<dyn Autoencoder>,
    noising: Noising,
    /// Height and width of its pictures.
    resolution: [u32; 2],
    device: Device,
    /// The number format of the computation.
    dtype: FloatDType,
    /// The number format of the autoencoder, which may be wider.
    vae_dtype: FloatDType,
    memory: Memory,
    max_sequence_length: Option<usize>,
    /// The autoencoder of previews, if there is one, or why it cannot be used.
    preview_vae: Option<PreviewVae>,
    /// The colours of latents, from the first preview without one on.
    colours: OnceLock<Colours>,
}

impl Pipeline {
    /// Its family.
    pub fn family(&self) -> &'static Family {
        self.family
    }

    /// Checks that it is of the needed family.
    ///
    /// # Errors
    /// [`Error::WrongModel`] if it is of another.
    pub fn check_family(&self, needed: &Family) -> Result<()> {
        match self.family == needed {
            true => Ok(()),
            false => Err(Error::WrongModel {
                reason: format!(
                    "a {} is needed, and the model is a {}",
                    needed.class, self.family.class
                ),
            }),
        }
    }

    /// The network that predicts the noise.
    pub fn denoiser(&self) -> &dyn Denoiser {
        &*self.denoiser
    }

    /// Identifies the denoiser and its changes by LoRAs.
    pub fn fingerprint(&self) -> String {
        let fingerprint = self.denoiser.fingerprint();
        match &self.adapters {
            Some(adapters) => format!("{fingerprint} {adapters}"),
            None => fingerprint,
        }
    }

    /// The text encoders in the order the denoiser reads them.
    pub fn text_encoders(&self) -> &[TextEncoder] {
        &self.text_encoders
    }

    /// The text encoders for which difference tokens are learned: the first ones.
    pub fn learned_encoders(&self) -> &[TextEncoder] {
        let learned = self.parts.iter().take_while(|part| part.learned).count();
        &self.text_encoders[..learned]
    }

    /// The identity of models that share difference tokens with this one.
    pub fn base(&self) -> Base {
        self.family.base(self.learned_encoders())
    }

    /// How latents were noised in training.
    pub fn noising(&self) -> &Noising {
        &self.noising
    }

    /// Height and width of the pictures.
    pub fn resolution(&self) -> [u32; 2] {
        self.resolution
    }

    /// The number of tokens of padded prompts, if it is not the family's.
    pub(crate) fn max_sequence_length(&self) -> Option<usize> {
        self.max_sequence_length
    }

    /// The device of the models.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The number format of the computation.
    pub fn dtype(&self) -> FloatDType {
        self.dtype
    }

    /// The shape of one picture's latents, [1, channels, h, w].
    pub fn latent_shape(&self) -> [usize; 4] {
        let factor = self.vae.pixels();
        let [h, w] = self
            .resolution
            .map(|side| (side as usize).checked_div(factor).unwrap_or(0));
        [1, self.vae.denoised_channels(), h, w]
    }

    /// Checks that prompts have room for this many difference tokens.
    ///
    /// # Errors
    /// [`Error::Setting`] if not.
    pub fn check_num_tokens(&self, num_tokens: usize) -> Result<()> {
        let mut encoders = self.learned_encoders().iter();
        encoders.try_for_each(|encoder| encoder.room(num_tokens).map(|_| ()))
    }

    /// Parts of a text that are written like a learned word, `<name>`, but unknown to all text encoders.
    pub fn unknown_words(&self, text: &str) -> Vec<String> {
        let is_known = |word: &str| {
            let encoders = self.text_encoders.iter();
            encoders
                .map(TextEncoder::tokenizer)
                .any(|tokenizer| tokenizer.knows(word))
        };
        let words = written_in(text);
        words
            .filter(|word| !is_known(word))
            .map(str::to_owned)
            .collect()
    }

    /// The words of a text.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] if the vocabulary cannot express them.
    pub fn prompt(&self, text: &str) -> Result<Prompt> {
        let tokenizers = self.text_encoders.iter().map(TextEncoder::tokenizer);
        Prompt::new(text, &tokenizers.collect::<Vec<_>>())
    }

    /// A prompt whose words are ids of text encoder `encoder`, respelled for encoders that may have another
    /// vocabulary.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] if a vocabulary cannot express a word.
    pub(crate) fn spelled(&self, prompt: Prompt, encoder: usize) -> Result<Prompt> {
        let encoders = self.parts.iter().zip(&self.text_encoders);
        let others = encoders.map(|(part, one)| (!part.joint).then(|| one.tokenizer()));
        prompt.spelled(
            self.text_encoders[encoder].tokenizer(),
            &others.collect::<Vec<_>>(),
        )
    }

    /// Has every text encoder read the words of a prompt with room for `num_tokens` difference tokens. Words
    /// that do not fit are cut off, see [`Words::notice`]. Encoders for which no tokens are learned read the
    /// whole prompt here, once.
    ///
    /// # Errors
    /// [`Error::Setting`] if even the difference tokens do not fit.
    pub fn read(&self, prompt: &Prompt, num_tokens: usize) -> Result<Words> {
        let learned = self.learned_encoders().len();
        let mut words = Words {
            prompt: prompt.clone(),
            ..Words::default()
        };
        for (number, encoder) in self.text_encoders.iter().enumerate() {
            let is_learned = number < learned;
            let room_for = if is_learned { num_tokens } else { 0 };
            let (beginning, cut) = encoder.read(&prompt.ids(number), room_for)?;
            words.cut = words.cut.max(cut);
            match is_learned {
                true => words.beginnings.push(beginning),
                false => words.whole.push(encoder.finish(&beginning, None)?),
            }
        }
        Ok(words)
    }

    /// The conditions of Full Prompts: start, words, difference tokens, end, padding.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] if difference tokens have the wrong width or no room.
    pub fn encode_prompts(&self, prompts: &[FullPrompt<'_>]) -> Result<Conditions> {
        let rows = (prompts.iter())
            .map(|full| {
                let whole = self.encode_prompt(full)?;
                if full.strength == 1.0 {
                    return Ok(whole);
                }
                let without = self.encode_prompt(&FullPrompt::plain(full.words))?;
                Ok(without.towards(whole, full.strength))
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Conditions::cat(&rows))
    }

    /// The conditions of one Full Prompt at strength 1.
    fn encode_prompt(&self, full: &FullPrompt<'_>) -> Result<Conditions> {
        self.encode_as(full, TextEncoder::skipped)
    }

    /// The same, with `read` applied to the outputs of encoders for which tokens are learned.
    fn encode_as(
        &self,
        full: &FullPrompt<'_>,
        read: fn(&TextEncoder, Encoded) -> Encoded,
    ) -> Result<Conditions> {
        let beginnings = self.text_encoders.iter().zip(&full.words.beginnings);
        let mut outputs = (beginnings.enumerate())
            .map(|(number, (encoder, beginning))| {
                let encoded = encoder.finish(beginning, full.difference.get(number))?;
                Ok(read(encoder, encoded))
            })
            .collect::<Result<Vec<_>>>()?;
        outputs.extend(full.words.whole.iter().cloned());
        (self.family.conditions)(&self.text_encoders, &outputs)
    }

    /// The conditions of a whole prompt given by token embeddings without positions, including start, end and
    /// padding.
    ///
    /// # Shapes
    /// `embeds`: [n, d], n the length of a prompt with its padding
    ///
    /// # Errors
    /// [`Error::InvalidInput`] if there is more than one text encoder, and for another width or too
    /// many embeddings.
    pub fn encode_embeds(&self, embeds: Tensor<2>) -> Result<Conditions> {
        match &self.text_encoders[..] {
            [encoder] => {
                let encoded = encoder.skipped(encoder.encode_embeds(embeds)?);
                (self.family.conditions)(&self.text_encoders, &[encoded])
            }
            _ => Err(Error::invalid_input(format!(
                "token embeddings cannot stand for a whole prompt of a {}: it is read by more than \
                 one text encoder",
                self.family.class
            ))),
        }
    }

    /// The conditions that ordinary guidance moves away from. For an empty text they are those of
    /// the empty prompt, or zeros if `model_index.json` sets `force_zeros_for_empty_prompt`. As in diffusers,
    /// `clip_skip` does not apply to them.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] if the vocabulary cannot express the text.
    pub fn encode_negative_prompt(&self, text: &str) -> Result<Conditions> {
        let words = self.read(&self.prompt(text)?, 0)?;
        let conditions = self.encode_as(&FullPrompt::plain(&words), |_, encoded| encoded)?;
        match text.is_empty() && self.force_zeros_for_empty_prompt {
            true => Ok(conditions.without_prompt()),
            false => Ok(conditions),
        }
    }

    /// The denoiser's output for noisy latents, in the convention of [`Noising`].
    ///
    /// # Shapes
    /// `latents` [b, channels, h, w]; a time in training steps and a row of `conditions` for each, with an image if
    /// and only if the family takes a picture.
    pub fn predict(&self, latents: Tensor<4>, times: &[f64], conditions: &Conditions) -> Tensor<4> {
        self.predict_as(latents, times, conditions, How::default())
    }

    /// As [`predict`](Self::predict), with controlled attention or embedded guidance. The pipeline decides what is
    /// saved.
    ///
    /// # Shapes
    /// As [`predict`](Self::predict).
    pub fn predict_as(
        &self,
        latents: Tensor<4>,
        times: &[f64],
        conditions: &Conditions,
        how: How<'_>,
    ) -> Tensor<4> {
        EVALUATIONS.set(EVALUATIONS.get() + times.len() as u64);
        let dtype = DType::from(self.dtype);
        let how = How {
            memory: self.memory,
            ..how
        };
        let (latents, conditions) = (latents.cast(dtype), conditions.clone().cast(dtype));
        (self.denoiser)
            .predict(latents, times, &conditions, how)
            .cast(DType::F32)
    }
}
