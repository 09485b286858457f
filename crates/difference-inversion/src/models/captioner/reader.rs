//! A language model with the state of its texts.

use burn::tensor::Tensor;

use crate::models::attention::KeyValues;
use crate::models::captioner::decoding::NextLogits;
use crate::{Error, Result};

/// The keys and values of everything read so far, layer by layer.
pub(super) type Cache = Vec<KeyValues>;

/// A language model with the cache of some texts of equal length. `step` returns the logits
/// `[b, vocab_size]` of the tokens after `b` rows of `n` ids, which follow those in the cache and are added
/// to it.
pub(super) struct Reader<F> {
    step: F,
    cache: Cache,
}

impl<F: Fn(&[u32], [usize; 2], &mut Cache) -> Tensor<2>> Reader<F> {
    /// A model that starts with `cache`.
    pub(super) fn new(step: F, cache: Cache) -> Self {
        Self { step, cache }
    }

    /// Continues a single text; returns the logits of the next token.
    pub(super) fn read(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        values((self.step)(ids, [1, ids.len()], &mut self.cache))
    }
}

impl<F: Fn(&[u32], [usize; 2], &mut Cache) -> Tensor<2>> NextLogits for Reader<F> {
    fn next_logits(&mut self, rows: &[usize], tokens: &[u32]) -> Result<Vec<Vec<f32>>> {
        let held = self.cache.first().map_or(0, |past| past.keys.dims()[0]);
        if !rows.iter().copied().eq(0..held) {
            self.cache = self.cache.iter().map(|past| past.select(rows)).collect();
        }
        let logits = (self.step)(tokens, [tokens.len(), 1], &mut self.cache);
        let vocab_size = logits.dims()[1];
        let rows = values(logits)?;
        Ok(rows.chunks(vocab_size).map(<[f32]>::to_vec).collect())
    }
}

/// Logits as numbers, row after row.
pub(super) fn values(logits: Tensor<2>) -> Result<Vec<f32>> {
    let values: Vec<f32> = logits.into_data().iter::<f32>().collect();
    match values.iter().all(|value| value.is_finite()) {
        true => Ok(values),
        false => Err(Error::NotFinite {
            what: "the captioner's output",
        }),
    }
}
