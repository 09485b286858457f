//! Text encoders for words and difference tokens: a tokenizer, a frame and a tower.

use std::sync::Arc;

use burn::tensor::{Device, FloatDType, Tensor};
use serde::{Deserialize, Serialize};

use crate::diffusion::model_files::ModelFiles;
use crate::diffusion::words::Prompt;
use crate::models::denoiser::Memory;
use crate::models::text::clip_text::ClipTextModel;
use crate::models::text::qwen3::Qwen3Model;
use crate::models::text::t5::T5EncoderModel;
use crate::models::text::tokenizer::{ClipTokenizer, Tokenizer};
pub use crate::models::text::tower::{Beginning, Encoded, Tower};
use crate::util::tensors::fingerprint;
use crate::weights::{Adapters, Weights};
use crate::{Error, Result};

/// The identity that a text encoder must share with the one the tokens were learned on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EncoderBase {
    /// Number of entries of the token-embedding table.
    pub vocab_size: usize,
    /// Width of the token embeddings.
    pub hidden_size: usize,
    /// SHA-256 of the token-embedding table, rounded to f16 so that an f16 and an f32 copy of one
    /// model are the same base.
    pub table: String,
    /// The changes of its layers by LoRAs, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapters: Option<EncoderAdapters>,
    /// How many layers earlier than usual the hidden states are read.
    #[serde(default, skip_serializing_if = "is_none")]
    pub clip_skip: usize,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_none(layers: &usize) -> bool {
    *layers == 0
}

/// LoRAs that change a text encoder. They are equal if their values are, whatever the files are called.
#[derive(Debug, Clone, Eq, Serialize, Deserialize)]
pub struct EncoderAdapters {
    /// SHA-256 of all changes.
    pub digest: String,
    /// The files' names, with the weights if they are not 1.
    pub names: Vec<String>,
}

impl PartialEq for EncoderAdapters {
    fn eq(&self, other: &Self) -> bool {
        self.digest == other.digest
    }
}

impl EncoderBase {
    /// The identity of a token-embedding table.
    ///
    /// # Shapes
    /// `table`: [vocab_size, hidden_size]
    pub fn new(table: Tensor<2>) -> Self {
        let [vocab_size, hidden_size] = table.dims();
        Self {
            vocab_size,
            hidden_size,
            table: fingerprint([table]),
            adapters: None,
            clip_skip: 0,
        }
    }
}

impl std::fmt::Display for EncoderBase {
    /// The sizes of the table and the beginning of its hash.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let table = self.table.get(..12).unwrap_or(&self.table);
        write!(f, "{} × {} ({table})", self.vocab_size, self.hidden_size)?;
        match &self.adapters {
            Some(adapters) => write!(f, " with the LoRA {}", adapters.names.join(" and ")),
            None => Ok(()),
        }
    }
}

/// The models that difference tokens belong to. Families share text encoders: SDXL and Stable Diffusion 3 have
/// the same CLIP, but tokens that steer one denoiser are meaningless to the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base {
    /// The common name of the kind of denoiser that they were learned through.
    pub denoiser: String,
    /// The text encoders, in the pipeline's order.
    pub encoders: Vec<EncoderBase>,
}

impl Base {
    /// The kind of denoiser of files that do not state it, which are older than the second kind.
    pub const FIRST_DENOISER: &str = "U-Net";
}

impl std::fmt::Display for Base {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let encoders: Vec<String> = self.encoders.iter().map(EncoderBase::to_string).collect();
        write!(
            f,
            "a {} with text encoders of token embeddings {}",
            self.denoiser,
            encoders.join(" and ")
        )
    }
}

/// The ids around the words of every prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The ids before the words.
    pub before: Vec<u32>,
    /// The ids after words and difference tokens; the prompt ends with the last of them.
    pub after: Vec<u32>,
    /// The padding of a prompt.
    pub padding: Padding,
    /// The maximum number of ids of a prompt, which is the exact number if it is padded to its length.
    pub length: usize,
}

/// What follows the end of a prompt that is shorter than it may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Padding {
    /// Nothing.
    Nothing,
    /// This id once.
    Once(u32),
    /// This id, up to the whole length.
    Whole(u32),
}

impl Frame {
    /// CLIP's frame: start, words, end, padding. `positions` are those of the tower.
    pub fn clip(tokenizer: &ClipTokenizer, positions: usize) -> Self {
        Self {
            before: vec![tokenizer.bos()],
            after: vec![tokenizer.eos()],
            padding: Padding::Whole(tokenizer.pad()),
            length: tokenizer.model_max_length().min(positions),
        }
    }

    /// The ids with a fixed place, regardless of the words.
    pub fn ids(&self) -> impl Iterator<Item = u32> {
        let around = self.before.iter().chain(&self.after).copied();
        around.chain(match self.padding {
            Padding::Nothing => None,
            Padding::Once(id) | Padding::Whole(id) => Some(id),
        })
    }

    /// The number of ids it takes itself, without padding.
    pub(crate) fn taken(&self) -> usize {
        self.before.len() + self.after.len()
    }

    /// The number of ids it leaves room for.
    fn room(&self) -> usize {
        self.length.saturating_sub(self.taken())
    }

    /// The ids after the first `count`: the end, and the padding.
    fn rest(&self, count: usize) -> Vec<u32> {
        let mut ids = self.after.clone();
        let left = self.length.saturating_sub(count + ids.len());
        ids.extend(match self.padding {
            Padding::Nothing => Vec::new(),
            Padding::Once(id) => vec![id; left.min(1)],
            Padding::Whole(id) => vec![id; left],
        });
        ids
    }
}

/// Opens a text tower of CLIP, saved on its own, with its tokenizer.
///
/// # Errors
/// If a file is invalid; the error names it.
pub fn open_clip(
    files: &ModelFiles,
    part: &str,
    device: &Device,
    dtype: FloatDType,
) -> Result<TextEncoder> {
    let tokenizer = ClipTokenizer::of(&files.vocabulary(part)?)?;
    let (config, weights) = (files.config(part)?, files.weights(part, device, dtype)?);
    let encoder = TextEncoder::clip(tokenizer, ClipTextModel::load_alone(&weights, &config)?)?;
    encoder.adapted(&weights)
}

/// How a family reads prompts with T5.
#[derive(Debug, Clone, Copy)]
pub struct T5Reading {
    /// The most tokens of a prompt, unless the files' options state another.
    pub length: usize,
    /// Whether prompts are padded to that length, and T5 reads the padding. If not, T5 does not look at the padding, and
    /// the denoiser is shown one token of it.
    pub is_padded: bool,
    /// Whether its layers are in memory or stay in their file.
    pub memory: Memory,
}

/// Opens T5's encoder with its tokenizer. Its hidden states overflow in half precision: it computes in f32 where others
/// compute in f16.
///
/// # Errors
/// If a file is invalid; the error names it.
pub fn open_t5(
    files: &ModelFiles,
    part: &str,
    device: &Device,
    dtype: FloatDType,
    reading: T5Reading,
) -> Result<TextEncoder> {
    let tokenizer = Tokenizer::open_t5(&files.vocabulary(part)?.folder)?;
    let (config, weights) = (files.config(part)?, files.weights(part, device, dtype)?);
    let weights = weights.in_wide_range();
    let pad = tokenizer.id("<pad>")?;
    let frame = Frame {
        before: Vec::new(),
        after: vec![tokenizer.id("</s>")?],
        padding: match reading.is_padded {
            true => Padding::Whole(pad),
            false => Padding::Once(pad),
        },
        length: files.max_sequence_length().unwrap_or(reading.length),
    };
    let mut tower = T5EncoderModel::load(&weights, &config, reading.memory)?;
    if !reading.is_padded {
        tower = tower.masking_padding();
    }
    TextEncoder::new(tokenizer, frame, tower)?.adapted(&weights)
}

/// How a family reads prompts with Qwen3.
#[derive(Debug, Clone, Copy)]
pub struct Qwen3Reading<'a> {
    /// The chat template before and after the one message of a user.
    pub template: [&'a str; 2],
    /// The layers whose outputs are read, counted from 1 and ascending.
    pub layers: &'a [usize],
    /// The most tokens of a prompt in its template, unless the files' options state another.
    pub length: usize,
    /// Whether prompts are padded to that length.
    pub is_padded: bool,
}

/// Opens Qwen3 with its tokenizer. It was trained in a type of wider range than half precision has: it
/// computes in f32 where others compute in f16.
///
/// # Errors
/// If a file is invalid; the error names it.
pub fn open_qwen3(
    files: &ModelFiles,
    part: &str,
    device: &Device,
    dtype: FloatDType,
    reading: &Qwen3Reading<'_>,
) -> Result<TextEncoder> {
    let (tokenizer, pad) = Tokenizer::open_qwen(&files.vocabulary(part)?.folder)?;
    for token in ["<|im_start|>", "<|im_end|>"] {
        tokenizer.id(token)?; // without them the template would be read as words
    }
    let (config, weights) = (files.config(part)?, files.weights(part, device, dtype)?);
    let weights = weights.in_wide_range();
    let [before, after] = reading.template.map(|text| tokenizer.encode(text));
    let frame = Frame {
        before: before?,
        after: after?,
        padding: match reading.is_padded {
            true => Padding::Whole(pad),
            false => Padding::Nothing,
        },
        length: files.max_sequence_length().unwrap_or(reading.length),
    };
    let tower = Qwen3Model::load(&weights, &config, reading.layers)?;
    TextEncoder::new(tokenizer, frame, tower)?.adapted(&weights)
}

/// The beginnings of several prompts, of which the [features](TextEncoder::features) are read.
#[derive(Debug, Clone)]
pub struct Beginnings(Rows);

#[derive(Debug, Clone)]
enum Rows {
    /// For a tower with a joint space, which reads them at once.
    Together {
        /// Shorter prompts begin with padding.
        read: Beginning,
        /// Of each prompt, its position at which it is pooled, if not at its end.
        pooled_at: Vec<Option<usize>>,
    },
    /// For the others, which read one after the other.
    Each(Vec<Beginning>),
}

impl Beginnings {
    /// Those of all.
    ///
    /// # Panics
    /// If they are not of one tower.
    #[must_use]
    pub fn cat(parts: &[&Self]) -> Self {
        let (mut reads, mut places, mut each) = (Vec::new(), Vec::new(), Vec::new());
        for Self(rows) in parts {
            match rows {
                Rows::Together { read, pooled_at } => {
                    reads.push(read);
                    places.extend(pooled_at);
                }
                Rows::Each(beginnings) => each.extend(beginnings.iter().cloned()),
            }
        }
        assert!(reads.is_empty() || each.is_empty(), "of one tower");
        Self(match reads.is_empty() {
            true => Rows::Each(each),
            false => Rows::Together {
                read: Beginning::cat(&reads),
                pooled_at: places,
            },
        })
    }
}

/// A tokenizer and its text tower.
#[derive(Debug, Clone)]
pub struct TextEncoder {
    tokenizer: Tokenizer,
    frame: Frame,
    tower: Arc<dyn Tower>,
    base: EncoderBase,
    /// The id of the first word added to the vocabulary of its files, if any.
    first_added: Option<u32>,
}

impl TextEncoder {
    /// Combines a tokenizer, a frame and a text tower.
    ///
    /// # Errors
    /// [`Error::WrongBase`] if the tokenizer has ids that the text tower does not know.
    pub fn new(tokenizer: Tokenizer, frame: Frame, tower: impl Tower) -> Result<Self> {
        let [vocab_size, _] = tower.table().dims();
        if tokenizer.vocab_size() > vocab_size {
            let reason = format!(
                "the tokenizer has {} tokens, the text encoder {vocab_size}: they belong to \
                 different models",
                tokenizer.vocab_size(),
            );
            return Err(Error::WrongBase { reason });
        }
        Ok(Self {
            tokenizer,
            frame,
            base: EncoderBase::new(tower.table().clone()),
            tower: Arc::new(tower),
            first_added: None,
        })
    }

    /// CLIP's tokenizer, frame and text tower.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn clip(tokenizer: ClipTokenizer, model: ClipTextModel) -> Result<Self> {
        let frame = Frame::clip(&tokenizer, model.max_positions());
        Self::new(tokenizer.into_tokenizer(), frame, model)
    }

    /// The same, with a tower read from `weights`, whose changes by LoRAs are part of its base.
    ///
    /// # Errors
    /// [`Error::Io`] if a LoRA cannot be read.
    fn adapted(mut self, weights: &Weights) -> Result<Self> {
        let adapters = weights.adapters()?;
        self.base.adapters =
            adapters.map(|Adapters { digest, names }| EncoderAdapters { digest, names });
        Ok(self)
    }

    /// Adds the additional rows of `other`'s table, which are those of words added to its vocabulary.
    pub(crate) fn extend(&mut self, other: &Self) {
        let [own, theirs] = [&*self, other].map(|encoder| encoder.token_table().dims()[0]);
        let first = other
            .first_added
            .map_or(own, |first| own.min(first as usize));
        if let (true, Some(tower)) = (theirs > first, Arc::get_mut(&mut self.tower)) {
            tower.extend(first, other.token_table().clone().slice([first..theirs]));
            self.base = EncoderBase::new(tower.table().clone());
        }
    }

    /// Adds a word `<name>` to the vocabulary, which is read as these embeddings, [n, d], in order. The base of
    /// difference tokens does not change.
    ///
    /// # Errors
    /// [`Error::Setting`] if the vocabulary has the word already.
    pub(crate) fn add_word(&mut self, name: &str, embeddings: Tensor<2>) -> Result<()> {
        let Some(tower) = Arc::get_mut(&mut self.tower) else {
            return Err(Error::invalid_input(
                "words are added before a text encoder is shared",
            ));
        };
        let first = self.tokenizer.add_word(name, embeddings.dims()[0])?;
        tower.extend(first as usize, embeddings);
        self.first_added = self.first_added.or(Some(first));
        Ok(())
    }

    /// The rows of the token-embedding table that come with the model, [vocab_size, d].
    pub fn own_table(&self) -> Tensor<2> {
        let rows = self.first_added.map_or(usize::MAX, |first| first as usize);
        let table = self.token_table();
        table.clone().slice([0..rows.min(table.dims()[0])])
    }

    /// The number of layers, for a tower whose hidden states are kept.
    pub fn layers(&self) -> usize {
        self.tower.layers()
    }

    /// Sets how many layers earlier hidden states are read.
    pub(crate) fn set_clip_skip(&mut self, layers: usize) {
        if layers < self.layers() {
            self.base.clip_skip = layers;
        }
    }

    /// The tower's output without the skipped layers. The pooled prompt is unchanged.
    pub(crate) fn skipped(&self, mut encoded: Encoded) -> Encoded {
        let kept = encoded
            .hidden_states
            .len()
            .saturating_sub(self.base.clip_skip);
        if self.base.clip_skip > 0 && kept > 0 {
            encoded.hidden_states.truncate(kept);
            let last = encoded.hidden_states.last().cloned();
            if let Some(state) = last.and_then(|last| self.tower.normed(last)) {
                encoded.last_hidden_state = state;
            }
        }
        encoded
    }

    /// As [`Tower::share`]; does nothing if a copy also holds the tower.
    pub fn share(&mut self, other: &Self) -> u64 {
        let own = Arc::get_mut(&mut self.tower);
        own.map_or(0, |own| own.share(&*other.tower))
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The ids around the words.
    pub fn frame(&self) -> &Frame {
        &self.frame
    }

    /// The base of difference tokens for this encoder.
    pub fn base(&self) -> &EncoderBase {
        &self.base
    }

    /// The width d of token embeddings and hidden states.
    pub fn hidden_size(&self) -> usize {
        self.base.hidden_size
    }

    /// The width e of the joint space, if the model has a projection into it.
    pub fn projection_dim(&self) -> Option<usize> {
        self.tower.projection_dim()
    }

    /// As [`Tower::reads_directions`].
    pub fn reads_directions(&self) -> bool {
        self.tower.reads_directions()
    }

    /// The token-embedding table, [vocab_size, d].
    pub fn token_table(&self) -> &Tensor<2> {
        self.tower.table()
    }

    /// The maximum number of difference tokens in a prompt.
    pub fn max_num_tokens(&self) -> usize {
        self.frame.room()
    }

    /// The number of word ids that fit into a prompt with `num_tokens` difference tokens.
    ///
    /// # Errors
    /// [`Error::Setting`] if even the difference tokens do not fit.
    pub fn room(&self, num_tokens: usize) -> Result<usize> {
        let most = self.max_num_tokens();
        most.checked_sub(num_tokens).ok_or_else(|| Error::Setting {
            name: "num_tokens",
            expected: format!("at most {most}, which is what the text encoder has room for"),
            found: num_tokens.to_string(),
        })
    }

    /// Embeddings of token ids without positions, [n, d].
    ///
    /// # Errors
    /// [`Error::InvalidInput`] for no ids or ids that are not in the table.
    pub fn embed_tokens(&self, ids: &[u32]) -> Result<Tensor<2>> {
        self.tower.embed(ids)
    }

    /// Reads the beginning of the frame and the words (as ids) of a prompt with room for `num_tokens` difference
    /// tokens; also returns how many ids were cut off at its end.
    ///
    /// # Errors
    /// [`Error::Setting`] if even the difference tokens do not fit.
    pub fn read(&self, words: &[u32], num_tokens: usize) -> Result<(Beginning, usize)> {
        let room = self.room(num_tokens)?;
        let cut = words.len().saturating_sub(room);
        let ids = [&self.frame.before, &words[..words.len() - cut]].concat();
        let mut beginning = match ids.is_empty() {
            true => Beginning::default(),
            false => self.tower.begin(self.embed_tokens(&ids)?)?,
        };
        beginning.pooled_at = self.pooled_among(&ids);
        Ok((beginning, cut))
    }

    /// Reads the beginning of the frame and the words of several prompts, with room for `num_tokens` difference tokens,
    /// for [`features`](Self::features); words that do not fit are cut off. `number` is the encoder's among those of
    /// the pipeline, by which a prompt has its words.
    ///
    /// # Errors
    /// [`Error::Setting`] if even the difference tokens do not fit.
    pub fn read_several(
        &self,
        prompts: &[&Prompt],
        number: usize,
        num_tokens: usize,
    ) -> Result<Beginnings> {
        let prompts: Vec<Vec<u32>> = prompts.iter().map(|prompt| prompt.ids(number)).collect();
        if self.projection_dim().is_none() {
            let each = prompts.iter().map(|words| self.read(words, num_tokens));
            let each = each.map(|read| read.map(|(beginning, _)| beginning));
            return Ok(Beginnings(Rows::Each(each.collect::<Result<_>>()?)));
        }
        let room = self.room(num_tokens)?;
        let ids = prompts.iter().map(|words| {
            let words = &words[..words.len().min(room)];
            [&self.frame.before, words].concat()
        });
        let ids: Vec<Vec<u32>> = ids.collect();
        let longest = ids.iter().map(Vec::len).max().unwrap_or(0);
        let padding: Arc<[usize]> = ids.iter().map(|ids| longest - ids.len()).collect();
        let filler = self.frame.after.first().copied().unwrap_or(0);
        let padded = ids.iter().zip(&*padding).flat_map(|(ids, padding)| {
            std::iter::repeat_n(filler, *padding).chain(ids.iter().copied())
        });
        let embeds = self.embed_tokens(&padded.collect::<Vec<u32>>())?; // [b · longest, d]
        let embeds = embeds.reshape([ids.len(), longest, self.hidden_size()]);
        Ok(Beginnings(Rows::Together {
            read: self.tower.begin_together(embeds, padding)?,
            pooled_at: ids.iter().map(|ids| self.pooled_among(ids)).collect(),
        }))
    }

    /// The position at which a prompt is pooled, if that is among these ids, its first: a word that was added may
    /// have the id that marks the end, as an added id is larger than any other.
    fn pooled_among(&self, ids: &[u32]) -> Option<usize> {
        let whole = [ids, &self.frame.after].concat();
        let place = self.tower.pooled_at(&whole);
        place.filter(|&place| place < ids.len())
    }

    /// Reads the rest of a prompt: difference tokens if there are any, the end, and padding up to
    /// the full length, as in the training of diffusion models.
    ///
    /// # Shapes
    /// `difference`: [n, d]; the output is that of the whole prompt.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] if the tokens have another width or no room.
    pub fn finish(&self, beginning: &Beginning, difference: Option<&Tensor<2>>) -> Result<Encoded> {
        let count = difference.map_or(0, |tokens| tokens.dims()[0]);
        let rest = self.followed(difference, &self.frame.rest(beginning.len() + count))?;
        let end = (beginning.len() + count + self.frame.after.len()).saturating_sub(1);
        let end = beginning.pooled_at.unwrap_or(end);
        let beginning = (!beginning.is_empty()).then_some(beginning);
        self.tower.finish(beginning, rest, end)
    }

    /// Reads a whole prompt given by token embeddings without positions, start and end included; the
    /// pooled prompt is read at its last position.
    ///
    /// # Shapes
    /// `embeds`: [n, d]
    ///
    /// # Errors
    /// [`Error::InvalidInput`] for another width, for more embeddings than positions, and if the text encoder
    /// needs to know which of them are padding.
    pub fn encode_embeds(&self, embeds: Tensor<2>) -> Result<Encoded> {
        if self.tower.masks_padding() {
            return Err(Error::invalid_input(
                "token embeddings cannot stand for a whole prompt of a text encoder that does not look at its \
                 padding",
            ));
        }
        let last = embeds.dims()[0].saturating_sub(1);
        let embeds = embeds.cast(self.token_table().dtype());
        self.tower.finish(None, embeds, last)
    }

    /// The embeddings of a prompt without words, [n, d]: start, end, and padding up to the full
    /// length.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] if the tokenizer has ids that the text encoder does not know.
    pub fn empty_embeds(&self) -> Result<Tensor<2>> {
        let before = &self.frame.before;
        self.embed_tokens(&[before.clone(), self.frame.rest(before.len())].concat())
    }

    /// The unnormalised features of prompts: in the joint space, or the [states at the end](Self::end_states) of a
    /// text encoder that has none.
    ///
    /// # Shapes
    /// `difference`: [b, n, d]; result [b, e].
    ///
    /// # Errors
    /// [`Error::InvalidInput`] if the tokens have another width or number of rows.
    pub fn features(
        &self,
        Beginnings(rows): &Beginnings,
        difference: Option<&Tensor<3>>,
    ) -> Result<Tensor<2>> {
        let count = match rows {
            Rows::Together { pooled_at, .. } => pooled_at.len(),
            Rows::Each(beginnings) => beginnings.len(),
        };
        if let Some(found) = difference.map(|tokens| tokens.dims()[0])
            && found != count
        {
            let reason = format!("expected difference tokens for {count} prompts, found {found}");
            return Err(Error::invalid_input(reason));
        }
        match rows {
            Rows::Together { read, pooled_at } => self.pooled(read, pooled_at, difference),
            Rows::Each(beginnings) => {
                let rows = beginnings.iter().enumerate().map(|(row, beginning)| {
                    let tokens = difference.map(|d| d.clone().narrow(0, row, 1).squeeze_dim(0));
                    self.end_states(beginning, tokens.as_ref())
                });
                Ok(Tensor::cat(rows.collect::<Result<_>>()?, 0))
            }
        }
    }

    /// Several prompts in the joint space. Nothing follows the end: the encoder of a joint space is causal, so padding
    /// would change nothing.
    fn pooled(
        &self,
        read: &Beginning,
        pooled_at: &[Option<usize>],
        difference: Option<&Tensor<3>>,
    ) -> Result<Tensor<2>> {
        let after = self.embed_tokens(&self.frame.after)?; // [after, d]
        let mut rest = after.unsqueeze::<3>().repeat_dim(0, pooled_at.len());
        if let Some(tokens) = difference {
            self.check_width(tokens.dims()[2])?;
            rest = Tensor::cat(vec![tokens.clone().cast(rest.dtype()), rest], 1); // [b, n + after, d]
        }
        let end = (read.len() + rest.dims()[1]).saturating_sub(1);
        let ends = (pooled_at.iter().enumerate())
            .map(|(row, place)| place.map_or(end, |place| place + read.padding(row)));
        let ends: Vec<usize> = ends.collect();
        let pooled = self.tower.pool_together(read, rest, &ends)?;
        self.project(pooled)
    }

    /// The mean of a prompt's hidden states over the frame's end, which has read all that stands before it; of every
    /// layer whose outputs are kept, one after the other, or else of the last. Padding is left out.
    ///
    /// # Shapes
    /// `difference`: [n, d]; result [1, layers · d].
    ///
    /// # Errors
    /// [`Error::InvalidInput`] if the tokens have another width.
    pub fn end_states(
        &self,
        beginning: &Beginning,
        difference: Option<&Tensor<2>>,
    ) -> Result<Tensor<2>> {
        let rest = self.followed(difference, &self.frame.after)?;
        let count = self.frame.after.len();
        let end = (beginning.len() + rest.dims()[0]).saturating_sub(1);
        let beginning = (!beginning.is_empty()).then_some(beginning);
        let encoded = self.tower.finish(beginning, rest, end)?;
        let kept = match encoded.hidden_states.is_empty() {
            true => vec![encoded.last_hidden_state],
            false => encoded.hidden_states,
        };
        let ends =
            (kept.into_iter()).map(|states| states.narrow(1, end + 1 - count, count).mean_dim(1)); // [1, 1, d]
        Ok(Tensor::cat(ends.collect(), 2).squeeze_dim(1))
    }

    /// The embeddings of difference tokens [n, d], if there are any, and of the ids that follow; [n + ids, d].
    fn followed(&self, difference: Option<&Tensor<2>>, ids: &[u32]) -> Result<Tensor<2>> {
        let rest = self.embed_tokens(ids)?;
        let Some(tokens) = difference else {
            return Ok(rest);
        };
        self.check_width(tokens.dims()[1])?;
        Ok(Tensor::cat(
            vec![tokens.clone().cast(rest.dtype()), rest],
            0,
        ))
    }

    /// Checks the width of difference tokens.
    fn check_width(&self, found: usize) -> Result<()> {
        match self.hidden_size() {
            expected if expected == found => Ok(()),
            expected => Err(Error::invalid_input(format!(
                "expected difference tokens of width {expected}, found {found}"
            ))),
        }
    }

    /// A pooled prompt's unnormalised features in the joint space.
    ///
    /// # Shapes
    /// [b, d] to [b, e]
    ///
    /// # Errors
    /// [`Error::InvalidInput`] if the model has no projection.
    pub fn project(&self, pooled: Tensor<2>) -> Result<Tensor<2>> {
        self.tower.project(pooled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_leaves_room_for_words_and_fills_up_what_they_leave() {
        let frame = Frame {
            before: vec![1, 2],
            after: vec![3],
            padding: Padding::Whole(4),
            length: 7,
        };
        assert_eq!(frame.room(), 4);
        assert_eq!(frame.rest(3), [3, 4, 4, 4]);
        assert_eq!(frame.rest(6), [3]);
        assert_eq!(frame.rest(9), [3]);
        assert!(frame.ids().eq([1, 2, 3, 4]));
        let open = Frame {
            padding: Padding::Nothing,
            ..frame
        };
        assert_eq!(open.rest(3), [3]);
        let once = Frame {
            padding: Padding::Once(4),
            ..open
        };
        assert_eq!(once.rest(3), [3, 4]);
        assert_eq!(once.rest(6), [3]);
        assert!(once.ids().eq([1, 2, 3, 4]));
    }
}
