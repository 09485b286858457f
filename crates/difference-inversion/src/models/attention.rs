//! Attention with its projections, and keys and values that can be cached.

use burn::tensor::Tensor;

use crate::models::layers::{Linear, Mask, multi_head_attention};

/// The keys and values of some positions.
#[derive(Clone, Debug)]
pub struct KeyValues {
    /// `[b, m, c]`
    pub keys: Tensor<3>,
    /// `[b, m, c]`
    pub values: Tensor<3>,
}

impl KeyValues {
    /// Appends these positions to those of `past`.
    #[must_use]
    pub fn after(self, past: Option<&Self>) -> Self {
        let Some(past) = past else { return self };
        Self {
            keys: Tensor::cat(vec![past.keys.clone(), self.keys], 1),
            values: Tensor::cat(vec![past.values.clone(), self.values], 1),
        }
    }

    /// The rows of the batch numbered `rows`, in that order.
    #[must_use]
    pub fn select(&self, rows: &[usize]) -> Self {
        let pick = |x: &Tensor<3>| {
            let rows = rows
                .iter()
                .map(|&row| x.clone().narrow(0, row, 1))
                .collect();
            Tensor::cat(rows, 0)
        };
        Self {
            keys: pick(&self.keys),
            values: pick(&self.values),
        }
    }
}

/// Multi-head attention between two sequences: query, key, value and output projection.
#[derive(Clone, Debug)]
pub struct Attention {
    /// Makes queries, `[.., c]`.
    pub query: Linear,
    /// Makes keys, `[.., c]`.
    pub key: Linear,
    /// Makes values, `[.., c]`.
    pub value: Linear,
    /// Mixes the heads.
    pub output: Linear,
    /// The number of heads; it divides `c`.
    pub heads: usize,
}

impl Attention {
    /// As [`Linear::share`].
    pub fn share(&mut self, other: &Self) -> u64 {
        self.query.share(&other.query)
            + self.key.share(&other.key)
            + self.value.share(&other.value)
            + self.output.share(&other.output)
    }

    /// The keys and values of the sequence that is attended to.
    ///
    /// # Shapes
    /// `context`: `[b, m, c_context]`
    #[must_use]
    pub fn key_values(&self, context: Tensor<3>) -> KeyValues {
        KeyValues {
            keys: self.key.forward(context.clone()),
            values: self.value.forward(context),
        }
    }

    /// Attention from the positions of `x` to `context`.
    ///
    /// # Shapes
    /// `[b, n, c]` to `[b, n, c]`
    #[must_use]
    pub fn forward(&self, x: Tensor<3>, context: &KeyValues, mask: Mask) -> Tensor<3> {
        let query = self.query.forward(x);
        let (keys, values) = (context.keys.clone(), context.values.clone());
        self.output
            .forward(multi_head_attention(query, keys, values, self.heads, mask))
    }
}
