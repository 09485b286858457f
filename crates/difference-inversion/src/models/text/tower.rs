//! The interface of all text towers. Each implements it in a file of its own, and no other code depends on
//! which one it is.

use std::any::Any;
use std::fmt::Debug;
use std::sync::Arc;

use burn::tensor::Tensor;

use crate::models::attention::KeyValues;
use crate::{Error, Result};

/// The architectures of text towers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TowerKind {
    /// CLIP's text tower.
    Clip,
    /// The encoder of T5.
    T5,
    /// Qwen3.
    Qwen3,
}

impl TowerKind {
    /// The files of a tokenizer's folder, any set of which holds its vocabulary.
    pub fn vocabularies(self) -> &'static [&'static [&'static str]] {
        match self {
            Self::Clip | Self::Qwen3 => &[&["tokenizer.json"], &["vocab.json", "merges.txt"]],
            Self::T5 => &[&["tokenizer.json"], &["spiece.model"]],
        }
    }
}

impl std::fmt::Display for TowerKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Clip => "CLIP",
            Self::T5 => "T5",
            Self::Qwen3 => "Qwen3",
        })
    }
}

/// A frozen network that maps token embeddings to hidden states. Gradients flow to the embeddings.
pub trait Tower: Any + Debug + Send + Sync {
    /// The token-embedding table, [vocab_size, d].
    fn table(&self) -> &Tensor<2>;

    /// The maximum number of positions.
    fn max_positions(&self) -> usize;

    /// Embeddings of token ids without positions, [n, d].
    ///
    /// # Errors
    /// [`Error::InvalidInput`] for no ids or ids that are not in the table.
    fn embed(&self, ids: &[u32]) -> Result<Tensor<2>>;

    /// Reads the beginning of a prompt, for reuse with any continuation: a causal tower keeps the results of
    /// its layers, a bidirectional one only its [embeddings](Beginning::new).
    ///
    /// # Shapes
    /// `embeds`: [n, d] without positions
    ///
    /// # Errors
    /// [`Error::InvalidInput`] for other shapes.
    fn begin(&self, embeds: Tensor<2>) -> Result<Beginning>;

    /// Reads the rest of a prompt, or all of it without a beginning. The result is that of the whole,
    /// pooled at position `end` of the whole.
    ///
    /// # Shapes
    /// `rest`: [n, d] without positions
    ///
    /// # Errors
    /// [`Error::InvalidInput`] for other shapes.
    fn finish(&self, beginning: Option<&Beginning>, rest: Tensor<2>, end: usize)
    -> Result<Encoded>;

    /// Reads the beginnings of several prompts at once, for a causal tower with a joint space.
    ///
    /// # Shapes
    /// `embeds`: [b, n, d] without positions, the first `padding` of each row to be ignored.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] for other shapes and other towers.
    fn begin_together(&self, _embeds: Tensor<3>, _padding: Arc<[usize]>) -> Result<Beginning> {
        Err(no_projection())
    }

    /// Reads the rest of several prompts: the last hidden states of each at position `end` of the whole, padding
    /// included, after the final norm.
    ///
    /// # Shapes
    /// `rest`: [b, n, d] without positions; result [b, d].
    ///
    /// # Errors
    /// As [`begin_together`](Self::begin_together).
    fn pool_together(
        &self,
        _beginning: &Beginning,
        _rest: Tensor<3>,
        _ends: &[usize],
    ) -> Result<Tensor<2>> {
        Err(no_projection())
    }

    /// Where the prompt of these ids is pooled, if the tower's configuration determines that and not the
    /// prompt's end.
    fn pooled_at(&self, _ids: &[u32]) -> Option<usize> {
        None
    }

    /// Whether the first layer to read a token is a norm that keeps only its direction, so that difference tokens
    /// cannot start at zero: the norm's gradient there is a thousand times that elsewhere.
    fn reads_directions(&self) -> bool {
        false
    }

    /// Whether padding is masked, so that the tower needs to know where a prompt ends.
    fn masks_padding(&self) -> bool {
        false
    }

    /// The width of the joint space, if the tower has a projection into one.
    fn projection_dim(&self) -> Option<usize> {
        None
    }

    /// Unnormalised pooled prompts in the joint space.
    ///
    /// # Shapes
    /// [b, d] to [b, e]
    ///
    /// # Errors
    /// [`Error::InvalidInput`] if there is no projection.
    fn project(&self, _pooled: Tensor<2>) -> Result<Tensor<2>> {
        Err(no_projection())
    }

    /// Replaces all rows of the table after the first `rows` by the embeddings of further tokens, [m, d].
    fn extend(&mut self, rows: usize, embeddings: Tensor<2>);

    /// The number of layers whose outputs are kept, see [`Encoded::hidden_states`].
    fn layers(&self) -> usize {
        0
    }

    /// A hidden state after the final norm, for a tower that keeps hidden states.
    fn normed(&self, _hidden_state: Tensor<3>) -> Option<Tensor<3>> {
        None
    }

    /// Replaces its weights by those of `other` wherever both are equal. Returns the number of shared
    /// bytes.
    fn share(&mut self, _other: &(dyn Tower + 'static)) -> u64 {
        0
    }
}

/// The error of a tower without a joint space.
pub(super) fn no_projection() -> Error {
    Error::invalid_input("this text encoder has no `text_projection`")
}

/// What a tower computed for the beginning of a prompt, or of several; empty by default.
#[derive(Clone, Debug, Default)]
pub struct Beginning {
    /// Keys and values of each layer, for a causal tower.
    pub(super) layers: Vec<KeyValues>,
    /// The first layer's input, then the output of each layer whose keys and values are kept.
    pub(super) hidden_states: Vec<Tensor<3>>,
    /// The number of positions at the beginning of each row that are padding, if any are.
    pub(super) padding: Option<Arc<[usize]>>,
    /// Where the prompt is pooled, if not at its end.
    pub(crate) pooled_at: Option<usize>,
}

impl Beginning {
    /// Embeddings that cannot be processed before the rest is known.
    ///
    /// # Shapes
    /// [n, d]
    pub fn new(embeds: Tensor<2>) -> Self {
        Self {
            hidden_states: vec![embeds.unsqueeze()],
            ..Self::default()
        }
    }

    /// The rows of all; shorter ones begin with more padding.
    ///
    /// # Panics
    /// If they are not of one tower.
    #[must_use]
    pub fn cat(parts: &[&Self]) -> Self {
        let longest = parts.iter().map(|part| part.len()).max().unwrap_or(0);
        let filled = |part: &Self, x: &Tensor<3>| match longest - part.len() {
            0 => x.clone(),
            missing => x.clone().pad([(0, 0), (missing, 0), (0, 0)], 0.0),
        };
        let cat = |pick: &dyn Fn(&Self) -> Tensor<3>| {
            let rows = parts.iter().map(|part| filled(part, &pick(part)));
            Tensor::cat(rows.collect(), 0)
        };
        let first = parts.first().copied();
        let layers = first.map_or(0, |first| first.layers.len());
        let states = first.map_or(0, |first| first.hidden_states.len());
        let padding = parts.iter().flat_map(|part| {
            let rows = part.embeds().map_or(0, |x| x.dims()[0]);
            (0..rows).map(|row| part.padding(row) + longest - part.len())
        });
        let padding: Vec<usize> = padding.collect();
        let is_padded = padding.iter().any(|&padding| padding > 0);
        Self {
            layers: (0..layers)
                .map(|layer| KeyValues {
                    keys: cat(&|part| part.layers[layer].keys.clone()),
                    values: cat(&|part| part.layers[layer].values.clone()),
                })
                .collect(),
            hidden_states: (0..states)
                .map(|state| cat(&|part| part.hidden_states[state].clone()))
                .collect(),
            padding: is_padded.then(|| padding.into()),
            pooled_at: None,
        }
    }

    /// The first layer's input, [b, n, d].
    pub fn embeds(&self) -> Option<&Tensor<3>> {
        self.hidden_states.first()
    }

    /// The number of positions at the beginning of row `row` that are padding.
    pub fn padding(&self, row: usize) -> usize {
        let padding = self.padding.as_deref().unwrap_or_default();
        padding.get(row).copied().unwrap_or(0)
    }

    /// The number of positions, padding included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.embeds().map_or(0, |x| x.dims()[1])
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The output of a text tower.
#[derive(Clone, Debug)]
pub struct Encoded {
    /// The input of the first layer, then the output of each layer, `[b, n, d]`, without the final
    /// norm. SDXL reads the second-to-last. T5, whose last output is read after the norm, keeps none, and Qwen3
    /// only the outputs that are read.
    pub hidden_states: Vec<Tensor<3>>,
    /// The last layer's output after the final norm, `[b, n, d]`. Stable Diffusion 1 and 2 read
    /// this.
    pub last_hidden_state: Tensor<3>,
    /// The last hidden state where the prompt ends, `[b, d]`.
    pub pooled: Tensor<2>,
}

impl Encoded {
    /// The second-to-last hidden state, without the final norm, `[b, n, d]`.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] for a tower without layers.
    pub fn penultimate_hidden_state(&self) -> Result<Tensor<3>> {
        let place = self.hidden_states.len().checked_sub(2);
        place
            .map(|place| self.hidden_states[place].clone())
            .ok_or_else(|| {
                Error::invalid_input("a text encoder without layers has no hidden state but one")
            })
    }
}
