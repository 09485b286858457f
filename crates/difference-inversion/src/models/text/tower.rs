//! The interface of all text towers. Each implements it in a file of its own, and no other code depends on
//! which one it is.

use std::any::Any;
use std::fmt::Debug;

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
        Err(Error::invalid_input(
            "this text encoder has no `text_projection`",
        ))
    }

    /// Replaces all rows of the table after the first `rows` by the embeddings of further tokens, [m, d], if supported.
    fn extend(&mut self, _rows: usize, _embeddings: Tensor<2>) {}

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

/// What a tower computed for a prompt's beginning; empty by default.
#[derive(Clone, Debug, Default)]
pub struct Beginning {
    /// Keys and values of each layer, for a causal tower.
    pub(super) layers: Vec<KeyValues>,
    /// The first layer's input, then the output of each layer whose keys and values are kept.
    pub(super) hidden_states: Vec<Tensor<3>>,
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

    /// The first layer's input, [1, n, d].
    pub fn embeds(&self) -> Option<&Tensor<3>> {
        self.hidden_states.first()
    }

    /// The number of positions.
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
