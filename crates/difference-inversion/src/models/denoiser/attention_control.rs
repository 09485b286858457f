//! Changes to attention inside the denoiser, while it runs.

use std::cell::Cell;
use std::fmt;

use burn::tensor::Tensor;

/// The kind of attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttentionKind {
    /// The feature map itself: self-attention.
    ToItself,
    /// The prompt: cross-attention.
    ToPrompt,
}

/// One attention of the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionPlace {
    /// The kind of attention.
    pub kind: AttentionKind,
    /// The number of the transformer block, counted from 0 in the order in which they run.
    pub layer: usize,
    /// Height and width of the feature map; queries are its positions in row-major order.
    pub size: [usize; 2],
}

/// Replaces the softmax in some of a denoiser's attentions.
pub trait AttentionControl: fmt::Debug + Send + Sync {
    /// Whether this attention is changed.
    fn changes(&self, place: &AttentionPlace) -> bool;

    /// The weights of the values, from the scores `q kᵀ / √d`. Ordinary attention takes the softmax of the
    /// scores.
    ///
    /// # Shapes
    /// `[b, heads, n, m]`, `n` queries and `m` keys, to the same
    fn weights(&self, place: &AttentionPlace, scores: Tensor<4>) -> Tensor<4>;
}

/// A control with its position in the network.
#[derive(Debug)]
pub(crate) struct Controlled<'a> {
    control: &'a dyn AttentionControl,
    passed: Cell<usize>,
}

impl<'a> Controlled<'a> {
    pub(crate) fn new(control: &'a dyn AttentionControl) -> Self {
        Self {
            control,
            passed: Cell::new(0),
        }
    }

    /// The control in the next transformer block, whose feature map has this height and width.
    pub(crate) fn next(&self, size: [usize; 2]) -> ControlledBlock<'a> {
        let layer = self.passed.get();
        self.passed.set(layer + 1);
        ControlledBlock {
            control: self.control,
            layer,
            size,
        }
    }
}

/// A control in one transformer block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ControlledBlock<'a> {
    control: &'a dyn AttentionControl,
    layer: usize,
    size: [usize; 2],
}

impl<'a> ControlledBlock<'a> {
    /// The function from scores to weights in the block's attention of this kind, if it is changed.
    pub(crate) fn weights(
        self,
        kind: AttentionKind,
    ) -> Option<impl FnOnce(Tensor<4>) -> Tensor<4> + 'a> {
        let place = AttentionPlace {
            kind,
            layer: self.layer,
            size: self.size,
        };
        let control = self.control;
        (control.changes(&place)).then_some(move |scores| control.weights(&place, scores))
    }
}
