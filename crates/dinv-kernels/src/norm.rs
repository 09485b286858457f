//! Group, layer and root mean square normalisation.

use burn::tensor::Tensor;

use super::gradient::with_gradient;
use super::math::{sigmoid_linear, sum};
use super::{Kernel, Values, for_chunks, tensor, zeros};

/// Group normalisation, followed by SiLU if `silu`.
///
/// # Shapes
/// `x` `[b, h, w, c]`, `weight` and `bias` `[c]`; `groups` divides `c`.
pub fn group_norm(
    x: Tensor<4>,
    [weight, bias]: [Tensor<1>; 2],
    groups: usize,
    epsilon: f64,
    silu: bool,
) -> Tensor<4> {
    #[cfg(all(feature = "gpu", not(test)))]
    if !super::on_cpu(&x) {
        return super::gpu::norm::group_norm(x, [weight, bias], groups, epsilon, silu);
    }
    with_gradient([x], |[x]| {
        let shape @ [b, h, w, c] = x.dims();
        let positions = h * w;
        let (x, weight, bias) = (Values::of(x), Values::of(weight), Values::of(bias));
        let mut statistics = zeros(b * 2 * c);
        let kernel = GroupStatistics {
            x: x.as_slice(),
            groups,
            positions,
            epsilon,
        };
        for_chunks(&mut statistics, 2 * c, &kernel);
        let mut out = zeros(b * positions * c);
        let norm = GroupNorm {
            x: x.as_slice(),
            statistics: &statistics,
            weight: weight.as_slice(),
            bias: bias.as_slice(),
            positions,
        };
        if silu {
            for_chunks(&mut out, c, &Forward::<true>(norm));
        } else {
            for_chunks(&mut out, c, &Forward::<false>(norm));
        }
        let backward = move |grad: Tensor<4>| {
            let grad = Values::of(grad);
            let mut out = zeros(b * positions * c);
            let norm = GroupNorm {
                x: x.as_slice(),
                statistics: &statistics,
                weight: weight.as_slice(),
                bias: bias.as_slice(),
                positions,
            };
            let (grad, len) = (grad.as_slice(), positions * c);
            if silu {
                for_chunks(&mut out, len, &Backward::<true> { norm, grad, groups });
            } else {
                for_chunks(&mut out, len, &Backward::<false> { norm, grad, groups });
            }
            [tensor(out, shape)]
        };
        (tensor(out, shape), backward)
    })
}

/// Mean, then reciprocal standard deviation, of every channel's group, for every image.
struct GroupStatistics<'a> {
    x: &'a [f32],
    groups: usize,
    positions: usize,
    epsilon: f64,
}

impl Kernel for GroupStatistics<'_> {
    #[inline(always)]
    fn run(&self, image: usize, out: &mut [f32]) {
        let c = out.len() / 2;
        let x = &self.x[image * self.positions * c..][..self.positions * c];
        let (mean, scale) = out.split_at_mut(c);
        for row in x.chunks_exact(c) {
            for (sum, &x) in mean.iter_mut().zip(row) {
                *sum += x;
            }
        }
        average_groups(mean, self.groups, self.positions);
        for row in x.chunks_exact(c) {
            for ((sum, &x), &mean) in scale.iter_mut().zip(row).zip(&*mean) {
                *sum += (x - mean) * (x - mean);
            }
        }
        average_groups(scale, self.groups, self.positions);
        for scale in scale {
            *scale = 1.0 / (*scale + self.epsilon as f32).sqrt();
        }
    }
}

/// Replaces every channel's sum over `positions` by the mean of its group.
#[inline(always)]
fn average_groups(sums: &mut [f32], groups: usize, positions: usize) {
    let group = sums.len() / groups;
    for sums in sums.chunks_exact_mut(group) {
        let mean = sums.iter().sum::<f32>() / (group * positions) as f32;
        sums.fill(mean);
    }
}

/// The input of both passes.
struct GroupNorm<'a> {
    x: &'a [f32],
    statistics: &'a [f32],
    weight: &'a [f32],
    bias: &'a [f32],
    positions: usize,
}

/// One row: all channels at one position.
struct Forward<'a, const SILU: bool>(GroupNorm<'a>);

impl<const SILU: bool> Kernel for Forward<'_, SILU> {
    #[inline(always)]
    fn run(&self, row: usize, out: &mut [f32]) {
        let (norm, c) = (&self.0, out.len());
        let (mean, scale) = norm.statistics[row / norm.positions * 2 * c..][..2 * c].split_at(c);
        let x = &norm.x[row * c..][..c];
        let (weight, bias) = (&norm.weight[..c], &norm.bias[..c]);
        for i in 0..c {
            let y = (x[i] - mean[i]) * scale[i] * weight[i] + bias[i];
            out[i] = if SILU { sigmoid_linear(y, 1.0).0 } else { y };
        }
    }
}

/// The gradient of one image.
struct Backward<'a, const SILU: bool> {
    norm: GroupNorm<'a>,
    grad: &'a [f32],
    groups: usize,
}

impl<const SILU: bool> Kernel for Backward<'_, SILU> {
    #[inline(always)]
    fn run(&self, image: usize, out: &mut [f32]) {
        let norm = &self.norm;
        let (len, c) = (out.len(), out.len() / norm.positions);
        let (mean, scale) = norm.statistics[image * 2 * c..][..2 * c].split_at(c);
        let (x, grad) = (
            &norm.x[image * len..][..len],
            &self.grad[image * len..][..len],
        );
        let (weight, bias) = (&norm.weight[..c], &norm.bias[..c]);
        let mut averages = zeros(2 * c);
        let (sums, products) = averages.split_at_mut(c);
        let rows = x.chunks_exact(c).zip(grad.chunks_exact(c));
        for (out, (x, grad)) in out.chunks_exact_mut(c).zip(rows) {
            for i in 0..c {
                let normalised = (x[i] - mean[i]) * scale[i];
                let mut slope = weight[i];
                if SILU {
                    let y = normalised * weight[i] + bias[i];
                    slope *= sigmoid_linear(y, 1.0).1;
                }
                out[i] = grad[i] * slope;
                sums[i] += out[i];
                products[i] += out[i] * normalised;
            }
        }
        average_groups(sums, self.groups, norm.positions);
        average_groups(products, self.groups, norm.positions);
        for (out, x) in out.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
            for i in 0..c {
                let normalised = (x[i] - mean[i]) * scale[i];
                out[i] = (out[i] - sums[i] - normalised * products[i]) * scale[i];
            }
        }
    }
}

/// Layer normalisation over the last dimension.
///
/// # Shapes
/// `x` `[..., c]`, `weight` and `bias` `[c]`.
pub fn layer_norm<const D: usize>(
    x: Tensor<D>,
    [weight, bias]: [Tensor<1>; 2],
    epsilon: f64,
) -> Tensor<D> {
    #[cfg(all(feature = "gpu", not(test)))]
    if !super::on_cpu(&x) {
        return super::gpu::norm::layer_norm(x, [weight, bias], epsilon);
    }
    with_gradient([x], |[x]| {
        let shape = x.dims();
        let c = shape[D - 1];
        let (x, weight, bias) = (Values::of(x), Values::of(weight), Values::of(bias));
        let mut out = zeros(x.as_slice().len());
        let (rows, weights) = (x.as_slice(), weight.as_slice());
        let kernel = LayerNorm {
            x: rows,
            weight: weights,
            bias: bias.as_slice(),
            epsilon,
        };
        for_chunks(&mut out, c, &kernel);
        let backward = move |grad: Tensor<D>| {
            let grad = Values::of(grad);
            let mut out = zeros(grad.as_slice().len());
            let (x, weight, grad) = (x.as_slice(), weight.as_slice(), grad.as_slice());
            for_chunks(
                &mut out,
                c,
                &LayerNormBackward {
                    x,
                    weight,
                    grad,
                    epsilon,
                },
            );
            [tensor(out, shape)]
        };
        (tensor(out, shape), backward)
    })
}

struct LayerNorm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    bias: &'a [f32],
    epsilon: f64,
}

impl Kernel for LayerNorm<'_> {
    #[inline(always)]
    fn run(&self, row: usize, out: &mut [f32]) {
        let c = out.len();
        let x = &self.x[row * c..][..c];
        let (mean, scale) = row_statistics(x, self.epsilon);
        let (weight, bias) = (&self.weight[..c], &self.bias[..c]);
        for i in 0..c {
            out[i] = (x[i] - mean) * scale * weight[i] + bias[i];
        }
    }
}

struct LayerNormBackward<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    grad: &'a [f32],
    epsilon: f64,
}

impl Kernel for LayerNormBackward<'_> {
    #[inline(always)]
    fn run(&self, row: usize, out: &mut [f32]) {
        let c = out.len();
        let (x, grad) = (&self.x[row * c..][..c], &self.grad[row * c..][..c]);
        let weight = &self.weight[..c];
        let (mean, scale) = row_statistics(x, self.epsilon);
        let average = sum([grad, weight], |[grad, weight]| grad * weight) / c as f32;
        let product = sum([grad, weight, x], |[grad, weight, x]| {
            grad * weight * (x - mean)
        });
        let product = product * scale / c as f32;
        for i in 0..c {
            let normalised = (x[i] - mean) * scale;
            out[i] = (grad[i] * weight[i] - average - normalised * product) * scale;
        }
    }
}

/// Mean and reciprocal standard deviation.
#[inline(always)]
fn row_statistics(x: &[f32], epsilon: f64) -> (f32, f32) {
    let n = x.len() as f32;
    let mean = sum([x], |[x]| x) / n;
    let variance = sum([x], |[x]| (x - mean) * (x - mean)) / n;
    (mean, 1.0 / (variance + epsilon as f32).sqrt())
}

/// Division by the root mean square over the last dimension, on the CPU.
///
/// # Shapes
/// `x` `[..., c]`, `weight` `[c]`.
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, epsilon: f64) -> Tensor<D> {
    with_gradient([x], |[x]| {
        let shape = x.dims();
        let c = shape[D - 1];
        let (x, weight) = (Values::of(x), Values::of(weight));
        let mut out = zeros(x.as_slice().len());
        let norm = RmsNorm {
            x: x.as_slice(),
            weight: weight.as_slice(),
            epsilon,
        };
        for_chunks(&mut out, c, &norm);
        let backward = move |grad: Tensor<D>| {
            let grad = Values::of(grad);
            let mut out = zeros(grad.as_slice().len());
            let norm = RmsNorm {
                x: x.as_slice(),
                weight: weight.as_slice(),
                epsilon,
            };
            let grad = grad.as_slice();
            for_chunks(&mut out, c, &RmsNormBackward { norm, grad });
            [tensor(out, shape)]
        };
        (tensor(out, shape), backward)
    })
}

struct RmsNorm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    epsilon: f64,
}

impl RmsNorm<'_> {
    /// The reciprocal root mean square.
    #[inline(always)]
    fn scale(&self, x: &[f32]) -> f32 {
        let mean = sum([x], |[x]| x * x) / x.len() as f32;
        1.0 / (mean + self.epsilon as f32).sqrt()
    }
}

impl Kernel for RmsNorm<'_> {
    #[inline(always)]
    fn run(&self, row: usize, out: &mut [f32]) {
        let c = out.len();
        let (x, weight) = (&self.x[row * c..][..c], &self.weight[..c]);
        let scale = self.scale(x);
        for i in 0..c {
            out[i] = x[i] * scale * weight[i];
        }
    }
}

struct RmsNormBackward<'a> {
    norm: RmsNorm<'a>,
    grad: &'a [f32],
}

impl Kernel for RmsNormBackward<'_> {
    #[inline(always)]
    fn run(&self, row: usize, out: &mut [f32]) {
        let c = out.len();
        let (x, grad) = (&self.norm.x[row * c..][..c], &self.grad[row * c..][..c]);
        let weight = &self.norm.weight[..c];
        let scale = self.norm.scale(x);
        let product = sum([grad, weight, x], |[grad, weight, x]| grad * weight * x);
        let product = product * scale * scale / c as f32;
        for i in 0..c {
            out[i] = (grad[i] * weight[i] - x[i] * product) * scale;
        }
    }
}
