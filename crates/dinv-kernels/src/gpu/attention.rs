//! Attention on a GPU, in chunks of queries, which bounds the scores held at once.

use burn::tensor::{DType, Tensor};
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::cubecl::{self};

use super::super::gradient::with_gradient;
use super::{
    UNITS, by_row, contiguous, cube_max, cube_sum, elem, empty, primitive, product, room, tensor,
};

/// Most scores to hold at once.
const SCORES: usize = 1 << 26;
/// Most attention weights to keep for the backward pass.
const KEPT: usize = 1 << 23;
/// Keys are padded to a multiple of this with rows of zero weight. Other sizes prevent vectorised reads
/// in matrix products.
const KEYS: usize = 16;

/// [`fused_attention::attention`](super::super::fused_attention::attention).
pub(in super::super) fn attention(
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    heads: usize,
    causal: bool,
) -> Tensor<3> {
    with_gradient([q, k, v], |inputs| {
        let [q, k, v] = inputs;
        let m = k.dims()[1];
        let padded = m.next_multiple_of(KEYS);
        let pad = |x: Tensor<3>| match padded - m {
            0 => x,
            missing => x.pad([(0, 0), (0, missing), (0, 0)], 0.0),
        };
        let [q, k, v] = [q, pad(k), pad(v)].map(|x| split(x, heads));
        let [b, heads, n, d] = q.dims();
        let softmax = Softmax {
            n,
            m,
            padded,
            causal,
            scale: 1.0 / (d as f32).sqrt(),
        };
        let scores = room(&primitive(q.clone()), size_of::<f32>(), SCORES);
        let queries_at_once = (scores / (b * heads * padded).max(1)).clamp(1, n.max(1));
        let chunk = move |x: &Tensor<4>, first: usize| match queries_at_once {
            all if all == n => x.clone(),
            some => x.clone().slice_dim(2, first..(first + some).min(n)),
        };
        // Scores are f32: in half precision they may overflow before they are scaled.
        let weights = {
            let (q, k) = (q.clone(), k.clone());
            move |first: usize| {
                let keys = k.clone().swap_dims(2, 3);
                let scores = product(chunk(&q, first), keys, DType::F32);
                softmax.forward(scores, first, k.dtype())
            }
        };
        let mut kept = None;
        let mut parts = Vec::new();
        for first in (0..n).step_by(queries_at_once) {
            let weights = weights(first);
            if queries_at_once >= n && b * heads * n * padded <= KEPT {
                kept = Some(weights.clone());
            }
            parts.push(product(weights, v.clone(), v.dtype()));
        }
        let dtype = v.dtype();
        let backward = move |grad: Tensor<3>| {
            let grad = split(grad, heads);
            let mut q_grads = Vec::new();
            let mut sums: Option<(Tensor<4>, Tensor<4>)> = None;
            for first in (0..n).step_by(queries_at_once) {
                let weights = kept.clone().unwrap_or_else(|| weights(first));
                let grad = chunk(&grad, first);
                let v_grad = product(weights.clone().swap_dims(2, 3), grad.clone(), dtype);
                let weights_grad = product(grad, v.clone().swap_dims(2, 3), DType::F32);
                let scores_grad = softmax.backward(weights, weights_grad);
                q_grads.push(product(scores_grad.clone(), k.clone(), dtype));
                let k_grad = product(scores_grad.swap_dims(2, 3), chunk(&q, first), dtype);
                sums = Some(match sums {
                    None => (k_grad, v_grad),
                    Some((k_sum, v_sum)) => (k_sum + k_grad, v_sum + v_grad),
                });
            }
            let (k_grad, v_grad) = sums.unwrap_or_else(|| (k.zeros_like(), v.zeros_like()));
            let of_keys = |grad: Tensor<4>| join(vec![grad.slice_dim(2, 0..m)]);
            [join(q_grads), of_keys(k_grad), of_keys(v_grad)]
        };
        (join(parts), backward)
    })
}

/// `[b, n, heads · d]` to `[b, heads, n, d]`.
fn split(x: Tensor<3>, heads: usize) -> Tensor<4> {
    let [b, n, c] = x.dims();
    x.reshape([b, n, heads, c / heads]).swap_dims(1, 2)
}

/// Chunks of queries `[b, heads, .., d]` to `[b, n, heads · d]`.
fn join(mut parts: Vec<Tensor<4>>) -> Tensor<3> {
    let x = match parts.len() {
        1 => parts.remove(0),
        _ => Tensor::cat(parts, 2),
    };
    let [b, heads, n, d] = x.dims();
    x.swap_dims(1, 2).reshape([b, n, heads * d])
}

/// The softmax of scaled scores of `n` queries and `m` keys. `padded` counts the keys including padding
/// of zero weight.
#[derive(Debug, Clone, Copy)]
struct Softmax {
    n: usize,
    m: usize,
    padded: usize,
    causal: bool,
    scale: f32,
}

impl Softmax {
    /// The weights of `scores`, both `[b, heads, queries, padded]`, for the queries from `first` on.
    fn forward(self, scores: Tensor<4>, first: usize, dtype: DType) -> Tensor<4> {
        let queries = scores.dims()[2];
        let scores = contiguous(scores);
        let weights = empty(&scores, scores.meta.shape(), dtype);
        let rows = scores.meta.shape().num_elements() / self.padded.max(1);
        let (count, dim) = by_row(&scores, rows);
        softmax_forward::launch(
            &scores.client,
            count,
            dim,
            scores.clone().into_buffer_arg(),
            weights.clone().into_buffer_arg(),
            self.padded,
            self.m,
            queries,
            first + self.m - self.n.min(self.m),
            self.scale,
            self.causal,
            elem(&weights),
        );
        tensor(weights)
    }

    /// The gradient of the scores from the weights and their gradient.
    fn backward(self, weights: Tensor<4>, grad: Tensor<4>) -> Tensor<4> {
        let (weights, grad) = (contiguous(weights), contiguous(grad));
        let out = empty(&weights, weights.meta.shape(), weights.dtype);
        let rows = weights.meta.shape().num_elements() / self.padded.max(1);
        let (count, dim) = by_row(&weights, rows);
        softmax_backward::launch(
            &weights.client,
            count,
            dim,
            weights.clone().into_buffer_arg(),
            grad.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            self.padded,
            self.scale,
            elem(&weights),
        );
        tensor(out)
    }
}

/// The first `m` of `width` keys have weight; if `causal`, query `i` of the rows sees keys
/// `0..=i + ahead`.
#[cube(launch)]
fn softmax_forward<E: Float>(
    scores: &[f32],
    weights: &mut [E],
    width: usize,
    m: usize,
    queries: usize,
    ahead: usize,
    scale: f32,
    #[comptime] causal: bool,
    #[define(E)] _elem: ElemType,
) {
    let start = CUBE_POS * width;
    if start >= scores.len() {
        terminate!();
    }
    let mut seen = m;
    if causal {
        seen = min(m, CUBE_POS % queries + ahead + 1);
    }
    let mut largest = f32::min_value();
    let mut i = UNIT_POS as usize;
    while i < seen {
        largest = max(largest, scores[start + i]);
        i += UNITS as usize;
    }
    let largest = cube_max(largest);
    let mut sum = 0.0f32;
    let mut i = UNIT_POS as usize;
    while i < seen {
        sum += ((scores[start + i] - largest) * scale).exp();
        i += UNITS as usize;
    }
    let sum = cube_sum(sum);
    let mut i = UNIT_POS as usize;
    while i < width {
        let mut weight = 0.0f32;
        if i < seen {
            weight = ((scores[start + i] - largest) * scale).exp() / sum;
        }
        weights[start + i] = E::cast_from(weight);
        i += UNITS as usize;
    }
}

#[cube(launch)]
fn softmax_backward<E: Float>(
    weights: &[E],
    grad: &[f32],
    out: &mut [E],
    m: usize,
    scale: f32,
    #[define(E)] _elem: ElemType,
) {
    let start = CUBE_POS * m;
    if start >= weights.len() {
        terminate!();
    }
    let mut sum = 0.0f32;
    let mut i = UNIT_POS as usize;
    while i < m {
        sum += f32::cast_from(weights[start + i]) * grad[start + i];
        i += UNITS as usize;
    }
    let sum = cube_sum(sum);
    let mut i = UNIT_POS as usize;
    while i < m {
        let g = f32::cast_from(weights[start + i]) * (grad[start + i] - sum) * scale;
        out[start + i] = E::cast_from(g);
        i += UNITS as usize;
    }
}
