//! What every text tower has in common. Each implements this in a file of its own, and nothing else
//! knows which it is.

use std::any::Any;
use std::fmt::Debug;

use burn::tensor::Tensor;

use crate::models::attention::KeyValues;
use crate::{Error, Result};

/// A frozen network that makes hidden states of token embeddings. Gradients flow to the embeddings.
pub trait Tower: Any + Debug + Send + Sync {
    /// The token-embedding table, [vocab_size, d].
    fn table(&self) -> &Tensor<2>;

    /// The most positions that it reads.
    fn max_positions(&self) -> usize;

    /// Embeddings of token ids without positions, [n, d].
    ///
    /// # Errors
    /// [`Error::InvalidInput`] for no ids or ids that are not in the table.
    fn embed(&self, ids: &[u32]) -> Result<Tensor<2>>;

    /// Reads the beginning of a prompt, once for all that may follow: a causal tower keeps what its
    /// layers made of it, one that looks both ways only its [embeddings](Beginning::new).
    ///
    /// # Shapes
    /// `embeds`: [n, d] without positions
    ///
    /// # Errors
    /// [`Error::InvalidInput`] for other shapes.
    fn begin(&self, embeds: Tensor<2>) -> Result<Beginning>;

    /// Reads the rest of a prompt, all of it if nothing precedes. The result is that of the whole,
    /// pooled at position `end` of the whole.
    ///
    /// # Shapes
    /// `rest`: [n, d] without positions
    ///
    /// # Errors
    /// [`Error::InvalidInput`] for other shapes.
    fn finish(&self, beginning: Option<&Beginning>, rest: Tensor<2>, end: usize)
    -> Result<Encoded>;

    /// Where the prompt of these ids is pooled, if the tower's configuration decides that and not the
    /// prompt's end.
    fn pooled_at(&self, _ids: &[u32]) -> Option<usize> {
        None
    }

    /// Whether a norm that leaves nothing of a token but its direction is the first to read it, so that
    /// difference tokens of zeros are no start: the norm's gradient there is a thousand times that elsewhere.
    fn reads_directions(&self) -> bool {
        false
    }

    /// Whether padding is not looked at, so that the tower has to be told where a prompt ends.
    fn masks_padding(&self) -> bool {
        false
    }

    /// The width of the joint space, if the tower has a projection into one.
    fn projection_dim(&self) -> Option<usize> {
        None
    }

    /// Pooled prompts in the joint space, not normalised.
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

    /// Puts the embeddings of further tokens, [m, d], behind the first `rows` of the table, if the tower can.
    fn extend(&mut self, _rows: usize, _embeddings: Tensor<2>) {}

    /// The number of layers whose outputs are kept, see [`Encoded::hidden_states`].
    fn layers(&self) -> usize {
        0
    }

    /// A hidden state behind the final norm, of a tower that keeps hidden states.
    fn normed(&self, _hidden_state: Tensor<3>) -> Option<Tensor<3>> {
        None
    }

    /// Holds the weights of `other` in the place of its own wherever both are the same. Gives the
    /// bytes that are shared.
    fn share(&mut self, _other: &(dyn Tower + 'static)) -> u64 {
        0
    }
}

/// What a tower has made of a prompt's beginning. Nothing by default.
#[derive(Clone, Debug, Default)]
pub struct Beginning {
    /// Keys and values of each layer, of a causal tower.
    pub(super) layers: Vec<KeyValues>,
    /// The first layer's input, then the output of each layer whose keys and values are kept.
    pub(super) hidden_states: Vec<Tensor<3>>,
    /// Where the prompt is pooled, if not at its end.
    pub(crate) pooled_at: Option<usize>,
}

impl Beginning {
    /// Embeddings of which nothing can be made before the rest is there.
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

/// What a text tower makes of prompts.
#[derive(Clone, Debug)]
pub struct Encoded {
    /// The input of the first layer, then the output of each layer, `[b, n, d]`, without the final
    /// norm. SDXL reads the last but one. T5, of which the last is read behind the norm, keeps none, and Qwen3
    /// only the outputs that are read.
    pub hidden_states: Vec<Tensor<3>>,
    /// The last layer's output behind the final norm, `[b, n, d]`. Stable Diffusion 1 and 2 read
    /// this.
    pub last_hidden_state: Tensor<3>,
    /// The last hidden state where the prompt ends, `[b, d]`.
    pub pooled: Tensor<2>,
}

impl Encoded {
    /// The last hidden state but one, without the final norm, `[b, n, d]`.
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
