//! Values of tensors: on the host, hashed, normalised, compared.

use burn::tensor::{DType, Tensor};
use half::f16;
use sha2::{Digest, Sha256};

use super::digest::hex;

/// Keeps the cosine of vectors near zero finite.
const EPSILON: f64 = 1e-8;

/// SHA-256 of weights, rounded to f16 so that f16 and f32 copies of a model have the same hash.
pub(crate) fn fingerprint(weights: impl IntoIterator<Item = Tensor<2>>) -> String {
    let mut hash = Sha256::new();
    for value in weights.into_iter().flat_map(host) {
        hash.update(f16::from_f32(value).to_le_bytes());
    }
    hex(hash)
}

/// The numbers of a tensor as f32 on the host, row-major.
pub fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// Normalises rows to unit norm.
pub(crate) fn unit(rows: Tensor<2>) -> Tensor<2> {
    let rows = rows.cast(DType::F32);
    let squares = rows.clone().powi_scalar(2).sum_dim(1);
    rows / squares.add_scalar(EPSILON).sqrt()
}

/// Cosines of the rows of `x` and `y`, one of which may be a single row.
pub fn cosine(x: Tensor<2>, y: Tensor<2>) -> Tensor<1> {
    let norm = |x: Tensor<2>| x.powi_scalar(2).sum_dim(1).add_scalar(EPSILON).sqrt();
    let norms = norm(x.clone()) * norm(y.clone());
    ((x * y).sum_dim(1) / norms).squeeze_dim(1)
}
