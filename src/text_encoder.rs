//! Words and difference tokens through one CLIP text encoder.

use burn::tensor::{DType, Device, FloatDType, Tensor};

use crate::models::clip_text::{ClipTextModel, ClipTextOutput, PrefixCache};
use crate::models::tokenizer::ClipTokenizer;
use crate::tokens::EncoderBase;
use crate::weights::ModelFiles;
use crate::{Error, Result};

/// Start and end of every prompt.
const FRAME: usize = 2;

pub use crate::models::clip_text::ClipTextOutput as Encoded;

/// Opens a text tower of CLIP, saved alone, with its tokenizer.
///
/// # Errors
/// Whatever is wrong with a file, naming it.
pub fn open_clip(
    files: &ModelFiles,
    part: &str,
    device: &Device,
    dtype: FloatDType,
) -> Result<TextEncoder> {
    let tokenizer = ClipTokenizer::of(&files.vocabulary(part)?)?;
    let (config, weights) = (files.config(part)?, files.weights(part, device, dtype)?);
    TextEncoder::new(tokenizer, ClipTextModel::load_alone(&weights, &config)?)
}

/// A tokenizer and its text encoder.
#[derive(Debug, Clone)]
pub struct TextEncoder {
    tokenizer: ClipTokenizer,
    model: ClipTextModel,
    base: EncoderBase,
    max_length: usize,
}

impl TextEncoder {
    /// Puts a tokenizer before its text encoder.
    ///
    /// # Errors
    /// [`Error::WrongBase`] if the tokenizer has ids that the text encoder does not know.
    pub fn new(tokenizer: ClipTokenizer, model: ClipTextModel) -> Result<Self> {
        let config = model.config();
        if tokenizer.vocab_size() > config.vocab_size {
            let reason = format!(
                "the tokenizer has {} tokens, the text encoder {}: they belong to different models",
                tokenizer.vocab_size(),
                config.vocab_size
            );
            return Err(Error::WrongBase { reason });
        }
        let max_length = tokenizer
            .model_max_length()
            .min(config.max_position_embeddings);
        let base = EncoderBase::new(model.token_embeddings().clone());
        Ok(Self {
            tokenizer,
            model,
            base,
            max_length,
        })
    }

    /// As [`ClipTextModel::share`].
    pub fn share(&mut self, other: &Self) -> u64 {
        self.model.share(&other.model)
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &ClipTokenizer {
        &self.tokenizer
    }

    /// What difference tokens for this encoder belong to.
    pub fn base(&self) -> &EncoderBase {
        &self.base
    }

    /// The width d of token embeddings and hidden states.
    pub fn hidden_size(&self) -> usize {
        self.model.config().hidden_size
    }

    /// The width e of the joint space, if the model has a projection into it.
    pub fn projection_dim(&self) -> Option<usize> {
        self.model.projection_dim()
    }

    /// The token-embedding table, [vocab_size, d].
    pub fn token_table(&self) -> &Tensor<2> {
        self.model.token_embeddings()
    }

    /// The most difference tokens that a prompt has room for.
    pub fn max_num_tokens(&self) -> usize {
        self.max_length.saturating_sub(FRAME)
    }

    /// Embeddings of token ids without positions, [n, d].
    ///
    /// # Errors
    /// [`Error::InvalidInput`] for no ids or ids that are not in the table.
    pub fn embed_tokens(&self, ids: &[u32]) -> Result<Tensor<2>> {
        Ok(self.model.embed_tokens(&[ids.to_vec()])?.squeeze_dim(0))
    }

    /// Reads the start and the words (as ids) of a prompt that leaves room for `num_tokens`
    /// difference tokens; also says how many ids had to be cut off at its end.
    ///
    /// # Errors
    /// [`Error::Setting`] if not even the difference tokens have room.
    pub fn read(&self, words: &[u32], num_tokens: usize) -> Result<(PrefixCache, usize)> {
        let most = self.max_num_tokens();
        let Some(room) = most.checked_sub(num_tokens) else {
            return Err(Error::Setting {
                name: "num_tokens",
                expected: format!("at most {most}, which is what the text encoder has room for"),
                found: num_tokens.to_string(),
            });
        };
        let mut ids = words.to_vec();
        let cut = ids.len().saturating_sub(room);
        ids.truncate(room);
        ids.insert(0, self.tokenizer.bos());
        Ok((self.model.prefix(self.model.embed_tokens(&[ids])?)?, cut))
    }

    /// Reads the rest of a prompt: difference tokens if there are any, the end, and padding up to
    /// the full length, as diffusion models were trained with it.
    ///
    /// # Shapes
    /// `difference`: [n, d]; the output is that of the whole prompt.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] if the tokens have another width or no room.
    pub fn finish(
        &self,
        beginning: &PrefixCache,
        difference: Option<&Tensor<2>>,
    ) -> Result<ClipTextOutput> {
        let tokens = difference.map_or(0, |tokens| tokens.dims()[0]);
        let ends = self.max_length.saturating_sub(beginning.len() + tokens);
        self.finish_with(beginning, difference, ends.max(1))
    }

    /// Reads a whole prompt given by token embeddings without positions, start and end included; the
    /// pooled prompt is read at its last position.
    ///
    /// # Shapes
    /// `embeds`: [n, d]
    ///
    /// # Errors
    /// [`Error::InvalidInput`] for another width, and for more embeddings than there are positions.
    pub fn encode_embeds(&self, embeds: Tensor<2>) -> Result<ClipTextOutput> {
        let last = embeds.dims()[0].saturating_sub(1);
        let embeds = embeds.cast(self.token_table().dtype()).unsqueeze::<3>();
        self.model.forward_embeds(embeds, &[last])
    }

    /// The embeddings of a prompt without words, [n, d]: start, end, and padding up to the full
    /// length.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] if the tokenizer has ids that the text encoder does not know.
    pub fn empty_embeds(&self) -> Result<Tensor<2>> {
        let mut ids = vec![self.tokenizer.pad(); self.max_length.max(FRAME)];
        ids[0] = self.tokenizer.bos();
        ids[1] = self.tokenizer.eos();
        self.embed_tokens(&ids)
    }

    /// The prompt's place in the joint space, not normalised. Nothing comes after the end: the
    /// encoder is causal, so padding would change nothing.
    ///
    /// # Shapes
    /// `difference`: [n, d]; result [1, e].
    ///
    /// # Errors
    /// As [`finish`](Self::finish), or if the model has no projection.
    pub fn features(
        &self,
        beginning: &PrefixCache,
        difference: Option<&Tensor<2>>,
    ) -> Result<Tensor<2>> {
        let output = self.finish_with(beginning, difference, 1)?;
        self.project(output.pooled)
    }

    /// A pooled prompt's place in the joint space, not normalised.
    ///
    /// # Shapes
    /// [b, d] to [b, e]
    ///
    /// # Errors
    /// [`Error::InvalidInput`] if the model has no projection.
    pub fn project(&self, pooled: Tensor<2>) -> Result<Tensor<2>> {
        self.model.project(pooled)
    }

    /// Difference tokens, then the end token and padding, `ends` of them together.
    fn finish_with(
        &self,
        beginning: &PrefixCache,
        difference: Option<&Tensor<2>>,
        ends: usize,
    ) -> Result<ClipTextOutput> {
        let mut ids = vec![self.tokenizer.pad(); ends];
        ids[0] = self.tokenizer.eos();
        let mut rest = self.embed_tokens(&ids)?; // [ends, d]
        let mut eos_position = beginning.len();
        if let Some(tokens) = difference {
            let dtype: DType = rest.dtype();
            let expected = rest.dims()[1];
            if tokens.dims()[1] != expected {
                return Err(Error::invalid_input(format!(
                    "expected difference tokens of width {expected}, found {}",
                    tokens.dims()[1]
                )));
            }
            eos_position += tokens.dims()[0];
            rest = Tensor::cat(vec![tokens.clone().cast(dtype), rest], 0); // [n + ends, d]
        }
        let rest = rest.unsqueeze::<3>();
        self.model
            .forward_embeds_after(beginning, rest, &[eos_position])
    }
}
