//! Attention in chunks of queries, so that the scores held at once are bounded; on every device.

use burn::tensor::{Bool, DType, Tensor, activation};

use super::gradient::with_gradient;

/// Most scores to hold at once.
const SCORES: usize = 1 << 24;
/// Most attention weights to keep for the backward pass.
const KEPT: usize = 1 << 20;

/// `softmax(q kᵀ / √d) v` for every head. The backward pass computes the attention weights again
/// (unless they are few), as in FlashAttention
/// ([Dao et al. 2022](https://arxiv.org/abs/2205.14135), algorithm 4).
///
/// # Shapes
/// `q` `[b, heads, n, d]`, `k` and `v` `[b, heads, m, d]`; if `causal`, query `i` sees keys
/// `0..=i + m − n`, and `n ≤ m`.
pub(crate) fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, causal: bool) -> Tensor<4> {
    with_gradient([q, k, v], |[q, k, v]| {
        let [b, heads, n, d] = q.dims();
        let (m, dtype) = (k.dims()[2], q.dtype());
        let softmax = Softmax {
            n,
            m,
            causal,
            scale: 1.0 / (d as f32).sqrt(),
        };
        let queries_at_once = (SCORES / (b * heads * m).max(1)).clamp(1, n);
        let chunk = move |x: &Tensor<4>, first: usize| {
            let len = queries_at_once.min(n - first);
            x.clone().slice_dim(2, first..first + len)
        };
        // Scores in f32 from the first: those of half precision may overflow before they are scaled.
        let weights = {
            let (q, k) = (q.clone(), k.clone());
            move |first: usize| {
                let [q, k] = [chunk(&q, first), k.clone()].map(|x| x.cast(DType::F32));
                softmax
                    .forward(q.matmul(k.swap_dims(2, 3)), first)
                    .cast(dtype)
            }
        };
        let mut kept = None;
        let mut parts = Vec::new();
        for first in (0..n).step_by(queries_at_once) {
            let weights = weights(first);
            if b * heads * n * m <= KEPT {
                kept = Some(weights.clone());
            }
            parts.push(weights.matmul(v.clone()));
        }
        let backward = move |grad: Tensor<4>| {
            let mut q_grads = Vec::new();
            let mut sums: Option<(Tensor<4>, Tensor<4>)> = None;
            for first in (0..n).step_by(queries_at_once) {
                let weights = kept.clone().unwrap_or_else(|| weights(first));
                let grad = chunk(&grad, first);
                let v_grad = weights.clone().swap_dims(2, 3).matmul(grad.clone());
                let weights_grad = grad.matmul(v.clone().swap_dims(2, 3));
                let scores_grad = softmax.backward(weights, weights_grad);
                q_grads.push(scores_grad.clone().matmul(k.clone()));
                let k_grad = scores_grad.swap_dims(2, 3).matmul(chunk(&q, first));
                sums = Some(match sums {
                    None => (k_grad, v_grad),
                    Some((k_sum, v_sum)) => (k_sum + k_grad, v_sum + v_grad),
                });
            }
            let (k_grad, v_grad) = sums.unwrap_or_else(|| (k.zeros_like(), v.zeros_like()));
            [Tensor::cat(q_grads, 2), k_grad, v_grad]
        };
        (Tensor::cat(parts, 2), backward)
    })
}

/// The softmax of scaled scores of `n` queries and `m` keys.
#[derive(Debug, Clone, Copy)]
struct Softmax {
    n: usize,
    m: usize,
    causal: bool,
    scale: f32,
}

impl Softmax {
    /// The weights of `scores`, both `[b, heads, queries, m]`, of the queries from `first` on.
    fn forward(&self, scores: Tensor<4>, first: usize) -> Tensor<4> {
        let scores = scores.mul_scalar(self.scale);
        activation::softmax(self.hide(scores, first), 3)
    }

    /// The gradient of the scores from the weights and their gradient.
    fn backward(&self, weights: Tensor<4>, grad: Tensor<4>) -> Tensor<4> {
        let dtype = grad.dtype();
        let (weights, grad) = (weights.cast(DType::F32), grad.cast(DType::F32));
        let mean = (weights.clone() * grad.clone()).sum_dim(3);
        (weights * (grad - mean) * self.scale).cast(dtype)
    }

    /// `scores` `[b, heads, queries, m]` of the queries from `first` on, where those of keys that a
    /// query does not see are as low as can be.
    fn hide(&self, scores: Tensor<4>, first: usize) -> Tensor<4> {
        if !self.causal {
            return scores;
        }
        let queries = scores.dims()[2];
        let diagonal = (first + self.m - self.n) as i64;
        let hidden = Tensor::<2, Bool>::tril_mask([queries, self.m], diagonal, &scores.device());
        scores.mask_fill(hidden.unsqueeze(), f32::NEG_INFINITY)
    }
}
