//! Attention on the CPU whose scores stay in the cache: each head handles a few queries with all keys at
//! a time.

use std::sync::Arc;

use burn::tensor::Tensor;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::gradient::with_gradient;
use super::math::{exponentials, max, sum};
use super::product::{Block, Left, Out, Panels, PanelsOf, Right, Start, blocks, multiply};
use super::weights::Slice;
use super::{Values, instructions, tensor, with_scratch, zeros};

/// Most scores computed at once.
const SCORES: usize = 1 << 17;
/// Most queries processed at once.
const QUERIES: usize = 96;
/// Fewest queries for which keys and values are packed.
const TASK_QUERIES: usize = 8 * QUERIES;
/// Tasks per thread, so that threads finish at about the same time.
const TASKS_PER_THREAD: usize = 4;

/// The keys that a query may attend to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mask {
    /// Every query sees every key.
    None,
    /// Query `i` of `n` sees keys `0..=i + m − n` of `m`, `m ≥ n`.
    Causal,
    /// The same without the first keys of each row of the batch, as many as are given, which are padding. The
    /// last key that a query sees with [`Causal`](Self::Causal) stays, so that padding sees itself.
    CausalAfter(Arc<[usize]>),
}

impl Mask {
    /// The number of padding keys at the beginning of row `row`.
    pub fn padding(&self, row: usize) -> usize {
        match self {
            Self::CausalAfter(padding) => padding.get(row).copied().unwrap_or(0),
            Self::None | Self::Causal => 0,
        }
    }
}

/// Whether [`attention`] can mask the keys of `k`: padding only on the CPU.
pub fn supports(mask: &Mask, k: &Tensor<3>) -> bool {
    !matches!(mask, Mask::CausalAfter(_)) || super::on_cpu(k)
}

/// `softmax(q kᵀ / √d) v` for every head. The backward pass computes the attention weights again,
/// as in FlashAttention ([Dao et al. 2022](https://arxiv.org/abs/2205.14135), algorithm 4).
///
/// # Shapes
/// `q` `[b, n, heads · d]`, `k` and `v` `[b, m, heads · d]`; result `[b, n, heads · d]`. The mask is one that
/// can be [applied](supports).
pub fn attention(q: Tensor<3>, k: Tensor<3>, v: Tensor<3>, heads: usize, mask: Mask) -> Tensor<3> {
    let causal = mask != Mask::None;
    #[cfg(all(feature = "gpu", not(test)))]
    if !super::on_cpu(&q) {
        return super::gpu::attention::attention(q, k, v, heads, causal);
    }
    with_gradient([q, k, v], |[q, k, v]| {
        let [b, n, c] = q.dims();
        let m = k.dims()[1];
        let heads = Heads {
            n,
            m,
            c,
            d: c / heads,
            causal,
            padding: 0,
        };
        let inputs = [q, k, v].map(Values::of);
        let mut out = zeros(b * n * c);
        heads.forward(&mask, inputs.each_ref().map(Values::as_slice), &mut out);
        let backward = move |grad: Tensor<3>| {
            let grad = Values::of(grad);
            let mut grads = [n, m, m].map(|rows| zeros(b * rows * c));
            let inputs = inputs.each_ref().map(Values::as_slice);
            heads.backward(&mask, inputs, grad.as_slice(), &mut grads);
            let [q, k, v] = grads;
            [
                tensor(q, [b, n, c]),
                tensor(k, [b, m, c]),
                tensor(v, [b, m, c]),
            ]
        };
        (tensor(out, [b, n, c]), backward)
    })
}

/// The layout of queries, keys and values of all heads: `n` and `m` rows of `c`, `d` per head.
#[derive(Debug, Clone, Copy)]
struct Heads {
    n: usize,
    m: usize,
    c: usize,
    d: usize,
    causal: bool,
    /// The number of keys at the beginning that no query sees except the last that it may see.
    padding: usize,
}

impl Heads {
    fn forward(self, mask: &Mask, [q, k, v]: [&[f32]; 3], out: &mut [f32]) {
        let Self { n, m, c, d, .. } = self;
        if out.is_empty() {
            return;
        }
        let simd = instructions();
        let tasks = TASKS_PER_THREAD * rayon::current_num_threads();
        let parts = tasks
            .div_ceil(out.len() / (n * d))
            .max(n.div_ceil(TASK_QUERIES));
        let queries = n.div_ceil(parts.min(n.div_ceil(QUERIES)));
        let images = out.chunks_exact_mut(n * c).enumerate();
        let tasks = images.flat_map(|(image, out)| {
            let blocks = blocks(out, c, 0..c, [queries, d]);
            blocks.into_iter().map(move |block| (image, block))
        });
        let tasks: Vec<_> = tasks.collect();
        let panels = [m, d].map(|columns| simd.dispatch(PanelsOf(columns)));
        let sizes = self.forward_sizes(panels, queries);
        tasks.into_par_iter().for_each(|(image, block)| {
            with_scratch(sizes.iter().sum(), |scratch| {
                simd.dispatch(Forward {
                    heads: self.of_row(mask, image),
                    q: &q[(image * n + block.row) * c + block.column..],
                    k: &k[image * m * c + block.column..],
                    v: &v[image * m * c + block.column..],
                    block,
                    sizes,
                    scratch,
                });
            });
        });
    }

    /// The same for row `row` of the batch.
    fn of_row(self, mask: &Mask, row: usize) -> Self {
        Self {
            padding: mask.padding(row),
            ..self
        }
    }

    fn backward(
        self,
        mask: &Mask,
        [q, k, v]: [&[f32]; 3],
        grad: &[f32],
        grads: &mut [Vec<f32>; 3],
    ) {
        let Self { n, m, c, d, .. } = self;
        if n * m * c == 0 {
            return;
        }
        let simd = instructions();
        let [q_grads, k_grads, v_grads] = grads;
        let q_grads = q_grads.chunks_exact_mut(n * c);
        let k_grads = k_grads.chunks_exact_mut(m * c);
        let v_grads = v_grads.chunks_exact_mut(m * c);
        let images = q_grads.zip(k_grads).zip(v_grads).enumerate();
        let tasks = images.flat_map(|(image, ((q_grads, k_grads), v_grads))| {
            let q_grads = blocks(q_grads, c, 0..c, [n, d]).into_iter();
            let k_grads = blocks(k_grads, c, 0..c, [m, d]).into_iter();
            let v_grads = blocks(v_grads, c, 0..c, [m, d]).into_iter();
            let heads = q_grads.zip(k_grads).zip(v_grads);
            heads.map(move |((q, k), v)| (image, [q, k, v]))
        });
        let tasks: Vec<_> = tasks.collect();
        let panels = [m, d].map(|columns| simd.dispatch(PanelsOf(columns)));
        let sizes = self.backward_sizes(panels);
        tasks.into_par_iter().for_each(|(image, grads)| {
            let [queries, keys] = [n, m].map(|rows| image * rows * c + grads[0].column);
            with_scratch(sizes.iter().sum(), |scratch| {
                simd.dispatch(Backward {
                    heads: self.of_row(mask, image),
                    q: &q[queries..],
                    k: &k[keys..],
                    v: &v[keys..],
                    grad: &grad[queries..],
                    grads: grads.map(|block| block.rows),
                    sizes,
                    scratch,
                });
            });
        });
    }

    /// The number of queries processed at once.
    #[inline(always)]
    fn queries(keys: Panels, queries: usize) -> usize {
        let most = (SCORES / keys.width().max(1)).clamp(keys.rows, QUERIES);
        queries.min(most - most % keys.rows)
    }

    /// Sizes of the buffers for packed keys and values, and for scores.
    fn forward_sizes(self, [keys, columns]: [Panels; 2], queries: usize) -> [usize; 3] {
        let queries = Self::queries(keys, queries);
        [
            self.d * keys.width(),
            self.m * columns.width(),
            queries * stride(keys),
        ]
    }

    /// Sizes of the buffers for keys and values, packed as columns; keys, packed as rows; weights and
    /// scores; the gradients of keys and values; packed queries and gradients of the result.
    fn backward_sizes(self, [keys, columns]: [Panels; 2]) -> [usize; 9] {
        let queries = Self::queries(keys, self.n);
        let turned = self.d * keys.width();
        let rows = self.m * columns.width();
        let scores = queries * stride(keys);
        let packed = queries * columns.width();
        [
            turned, turned, rows, scores, scores, rows, rows, packed, packed,
        ]
    }

    /// A matrix of one head, `[rows, d]`, or transposed.
    #[inline(always)]
    fn matrix(self, values: &[f32], transposed: bool) -> Right<'_> {
        Right {
            values: Slice::F32(values),
            stride: self.c,
            transposed,
        }
    }

    /// The rows of one head, `[rows, d]`.
    #[inline(always)]
    fn rows(self, values: &[f32], first: usize) -> Left<'_> {
        Left::Rows {
            values: &values[first * self.c..],
            stride: self.c,
        }
    }

    /// The products of some queries with all keys (or of their gradients with all values), rows
    /// [`stride`] apart.
    #[inline(always)]
    fn scores<S: Simd>(
        self,
        simd: S,
        queries: Left<'_>,
        packed: &[f32],
        keys: Panels,
        scores: &mut [f32],
    ) {
        for panel in keys.all() {
            let mut out = Out::Sums {
                sums: &mut scores[panel.first..],
                stride: stride(keys),
                start: Start::Zero,
            };
            let packed = &packed[panel.first * self.d..][..panel.width * self.d];
            multiply(simd, queries, packed, panel.width, &mut out);
        }
    }

    /// Replaces the scores of query number `query` by `e^score`, and by zeros for keys that it does not
    /// see. Returns the factor that makes them a softmax.
    #[inline(always)]
    fn exponentials(self, scores: &mut [f32], query: usize) -> f32 {
        let scale = 1.0 / (self.d as f32).sqrt();
        let seen = if self.causal {
            (query + 1 + self.m - self.n).min(self.m)
        } else {
            self.m
        };
        let (seen, after) = scores[..self.m].split_at_mut(seen);
        let padding = self.padding.min(seen.len().saturating_sub(1));
        let (before, seen) = seen.split_at_mut(padding);
        before.fill(0.0);
        after.fill(0.0);
        let largest = max(seen);
        1.0 / exponentials(seen, largest, scale)
    }

    /// Replaces the scores of a query by its weights and, in `grads`, the gradients of the weights by those
    /// of the scores.
    #[inline(always)]
    fn weigh(self, weights: &mut [f32], grads: &mut [f32], query: usize) {
        let share = self.exponentials(weights, query);
        let (weights, grads) = (&mut weights[..self.m], &mut grads[..self.m]);
        let mean = share * sum([weights, grads], |[weight, grad]| weight * grad);
        let scale = 1.0 / (self.d as f32).sqrt();
        for (grad, weight) in grads.iter_mut().zip(weights) {
            *weight *= share;
            *grad = *weight * (*grad - mean) * scale;
        }
    }
}

/// The distance between the scores of two queries. Rows a power of two apart would share a few sets of
/// the cache.
#[inline(always)]
fn stride(keys: Panels) -> usize {
    keys.width() + 16
}

/// Packs all columns of a matrix of `steps` rows.
#[inline(always)]
fn pack(matrix: Right<'_>, steps: usize, panels: Panels, out: &mut [f32]) {
    for panel in panels.all() {
        let out = &mut out[panel.first * steps..][..panel.width * steps];
        matrix.pack(0..steps, panel, out);
    }
}

/// The results of some queries in one head.
struct Forward<'a> {
    heads: Heads,
    /// From the first query on.
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    block: Block<'a>,
    sizes: [usize; 3],
    scratch: &'a mut [f32],
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            heads,
            q,
            k,
            v,
            mut block,
            sizes,
            scratch,
        } = self;
        let (m, d) = (heads.m, heads.d);
        let (keys, columns) = (Panels::new::<S>(m), Panels::new::<S>(d));
        let (queries, stride) = (Heads::queries(keys, block.rows.len()), stride(keys));
        let (packed_k, scratch) = scratch.split_at_mut(sizes[0]);
        let (packed_v, scores) = scratch.split_at_mut(sizes[1]);
        pack(heads.matrix(k, true), d, keys, packed_k);
        pack(heads.matrix(v, false), m, columns, packed_v);
        for (number, out) in block.rows.chunks_mut(queries).enumerate() {
            let (first, rows) = (number * queries, out.len());
            let scores = &mut scores[..rows * stride];
            heads.scores(simd, heads.rows(q, first), packed_k, keys, scores);
            let mut shares = [0.0; QUERIES];
            let each = scores.chunks_exact_mut(stride).zip(&mut shares);
            for (row, (scores, share)) in each.enumerate() {
                *share = heads.exponentials(scores, block.row + first + row);
            }
            let left = Left::Rows {
                values: scores,
                stride,
            };
            for panel in columns.all() {
                let values = &packed_v[panel.first * m..][..panel.width * m];
                let mut out = Out::Rows {
                    rows: out,
                    panel,
                    start: Start::Zero,
                };
                multiply(simd, left, values, panel.width, &mut out);
            }
            for (row, share) in out.iter_mut().zip(shares) {
                for value in row.iter_mut() {
                    *value *= share;
                }
            }
        }
    }
}

/// The gradients of one head.
struct Backward<'a> {
    heads: Heads,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    /// Of the result.
    grad: &'a [f32],
    /// Of queries, keys and values.
    grads: [Vec<&'a mut [f32]>; 3],
    sizes: [usize; 9],
    scratch: &'a mut [f32],
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            heads,
            q,
            k,
            v,
            grad,
            grads: [mut q_grads, mut k_grads, mut v_grads],
            sizes,
            scratch,
        } = self;
        let (m, d) = (heads.m, heads.d);
        let (keys, columns) = (Panels::new::<S>(m), Panels::new::<S>(d));
        let (queries, stride) = (Heads::queries(keys, q_grads.len()), stride(keys));
        let mut rest = scratch;
        let [
            k_turned,
            v_turned,
            k_packed,
            weights,
            scores,
            k_sums,
            v_sums,
            q_now,
            grad_now,
        ] = sizes.map(|size| {
            let (part, others) = std::mem::take(&mut rest).split_at_mut(size);
            rest = others;
            part
        });
        pack(heads.matrix(k, true), d, keys, k_turned);
        pack(heads.matrix(v, true), d, keys, v_turned);
        pack(heads.matrix(k, false), m, columns, k_packed);
        for (number, q_grads) in q_grads.chunks_mut(queries).enumerate() {
            let (first, rows) = (number * queries, q_grads.len());
            let weights = &mut weights[..rows * stride];
            let scores = &mut scores[..rows * stride];
            heads.scores(simd, heads.rows(q, first), k_turned, keys, weights);
            heads.scores(simd, heads.rows(grad, first), v_turned, keys, scores);
            let each = weights
                .chunks_exact_mut(stride)
                .zip(scores.chunks_exact_mut(stride));
            for (row, (weights, scores)) in each.enumerate() {
                heads.weigh(weights, scores, first + row);
            }
            let now = heads.matrix(&q[first * heads.c..], false);
            pack(now, rows, columns, q_now);
            let now = heads.matrix(&grad[first * heads.c..], false);
            pack(now, rows, columns, grad_now);
            for panel in columns.all() {
                let left = Left::Rows {
                    values: scores,
                    stride,
                };
                let mut out = Out::Rows {
                    rows: q_grads,
                    panel,
                    start: Start::Zero,
                };
                let k_packed = &k_packed[panel.first * m..][..panel.width * m];
                multiply(simd, left, k_packed, panel.width, &mut out);
                let now = panel.first * rows..(panel.first + panel.width) * rows;
                for (values, packed, sums) in [
                    (&*scores, &*q_now, &mut *k_sums),
                    (&*weights, &*grad_now, &mut *v_sums),
                ] {
                    let left = Left::Steps { values, stride };
                    let mut out = Out::Sums {
                        sums: &mut sums[panel.first * m..][..panel.width * m],
                        stride: panel.width,
                        start: if first == 0 { Start::Zero } else { Start::Sums },
                    };
                    multiply(simd, left, &packed[now.clone()], panel.width, &mut out);
                }
            }
        }
        for (rows, sums) in [(&mut k_grads, k_sums), (&mut v_grads, v_sums)] {
            for panel in columns.all() {
                let sums = sums[panel.first * m..].chunks_exact(panel.width);
                for (row, sums) in rows.iter_mut().zip(sums) {
                    row[panel.first..][..panel.columns].copy_from_slice(&sums[..panel.columns]);
                }
            }
        }
    }
}
