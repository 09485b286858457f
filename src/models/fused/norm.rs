//! Group and layer normalisation.

use burn::tensor::Tensor;

use super::gradient::with_gradient;
use super::math::{sigmoid, sum};
use super::{Values, for_chunks, tensor};

/// Group normalisation, followed by SiLU if `silu`.
///
/// # Shapes
/// `x` `[b, h, w, c]`, `weight` and `bias` `[c]`; `groups` divides `c`.
pub(in crate::models) fn group_norm(
    x: Tensor<4>,
    [weight, bias]: [Tensor<1>; 2],
    groups: usize,
    epsilon: f64,
    silu: bool,
) -> Tensor<4> {
    with_gradient([x], |[x]| {
        let shape @ [b, h, w, c] = x.dims();
        let size = h * w * c;
        let (x, weight, bias) = (Values::of(x), Values::of(weight), Values::of(bias));
        // Mean and reciprocal standard deviation of every channel's group.
        let mut statistics = vec![0.0; b * 2 * c];
        for_chunks(&mut statistics, 2 * c, |image, out| {
            let x = &x.as_slice()[image * size..][..size];
            let (mean, scale) = out.split_at_mut(c);
            add_channels(x, mean, |x, _| x);
            average_groups(mean, groups, h * w);
            add_channels(x, scale, |x, channel| {
                (x - mean[channel]) * (x - mean[channel])
            });
            average_groups(scale, groups, h * w);
            for scale in scale {
                *scale = 1.0 / (*scale + epsilon as f32).sqrt();
            }
        });
        let mut out = vec![0.0; b * size];
        for_chunks(&mut out, c, |row, out| {
            let (mean, scale) = statistics[row / (h * w) * 2 * c..][..2 * c].split_at(c);
            let x = &x.as_slice()[row * c..][..c];
            let (weight, bias) = (&weight.as_slice()[..c], &bias.as_slice()[..c]);
            for i in 0..c {
                let y = (x[i] - mean[i]) * scale[i] * weight[i] + bias[i];
                out[i] = if silu { y * sigmoid(y) } else { y };
            }
        });
        let backward = move |grad: Tensor<4>| {
            let grad = Values::of(grad);
            let mut out = vec![0.0; b * size];
            for_chunks(&mut out, size, |image, out| {
                let (mean, scale) = statistics[image * 2 * c..][..2 * c].split_at(c);
                let x = &x.as_slice()[image * size..][..size];
                let grad = &grad.as_slice()[image * size..][..size];
                let (weight, bias) = (&weight.as_slice()[..c], &bias.as_slice()[..c]);
                let (mut sums, mut products) = (vec![0.0; c], vec![0.0; c]);
                for (row, out) in out.chunks_exact_mut(c).enumerate() {
                    let (x, grad) = (&x[row * c..][..c], &grad[row * c..][..c]);
                    for i in 0..c {
                        let normalised = (x[i] - mean[i]) * scale[i];
                        let mut slope = weight[i];
                        if silu {
                            let y = normalised * weight[i] + bias[i];
                            let gate = sigmoid(y);
                            slope *= gate * (1.0 + y * (1.0 - gate));
                        }
                        out[i] = grad[i] * slope;
                        sums[i] += out[i];
                        products[i] += out[i] * normalised;
                    }
                }
                average_groups(&mut sums, groups, h * w);
                average_groups(&mut products, groups, h * w);
                for (row, out) in out.chunks_exact_mut(c).enumerate() {
                    let x = &x[row * c..][..c];
                    for i in 0..c {
                        let normalised = (x[i] - mean[i]) * scale[i];
                        out[i] = (out[i] - sums[i] - normalised * products[i]) * scale[i];
                    }
                }
            });
            [tensor(out, shape)]
        };
        (tensor(out, shape), backward)
    })
}

/// Adds `f(element, channel)` of every row of `x` to `sums`.
#[inline(always)]
fn add_channels(x: &[f32], sums: &mut [f32], f: impl Fn(f32, usize) -> f32) {
    let c = sums.len();
    for row in x.chunks_exact(c) {
        for channel in 0..c {
            sums[channel] += f(row[channel], channel);
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

/// Layer normalisation over the last dimension.
///
/// # Shapes
/// `x` `[..., c]`, `weight` and `bias` `[c]`.
pub(in crate::models) fn layer_norm<const D: usize>(
    x: Tensor<D>,
    [weight, bias]: [Tensor<1>; 2],
    epsilon: f64,
) -> Tensor<D> {
    with_gradient([x], |[x]| {
        let shape = x.dims();
        let c = shape[D - 1];
        let (x, weight, bias) = (Values::of(x), Values::of(weight), Values::of(bias));
        let mut out = vec![0.0; x.as_slice().len()];
        for_chunks(&mut out, c, |row, out| {
            let x = &x.as_slice()[row * c..][..c];
            let (mean, scale) = row_statistics(x, epsilon);
            let (weight, bias) = (&weight.as_slice()[..c], &bias.as_slice()[..c]);
            for i in 0..c {
                out[i] = (x[i] - mean) * scale * weight[i] + bias[i];
            }
        });
        let backward = move |grad: Tensor<D>| {
            let grad = Values::of(grad);
            let mut out = vec![0.0; grad.as_slice().len()];
            for_chunks(&mut out, c, |row, out| {
                let x = &x.as_slice()[row * c..][..c];
                let grad = &grad.as_slice()[row * c..][..c];
                let weight = &weight.as_slice()[..c];
                let (mean, scale) = row_statistics(x, epsilon);
                let average = sum(c, |i| grad[i] * weight[i]) / c as f32;
                let product = sum(c, |i| grad[i] * weight[i] * (x[i] - mean)) * scale / c as f32;
                for i in 0..c {
                    let normalised = (x[i] - mean) * scale;
                    out[i] = (grad[i] * weight[i] - average - normalised * product) * scale;
                }
            });
            [tensor(out, shape)]
        };
        (tensor(out, shape), backward)
    })
}

/// Mean and reciprocal standard deviation.
#[inline(always)]
fn row_statistics(x: &[f32], epsilon: f64) -> (f32, f32) {
    let n = x.len() as f32;
    let mean = sum(x.len(), |i| x[i]) / n;
    let variance = sum(x.len(), |i| (x[i] - mean) * (x[i] - mean)) / n;
    (mean, 1.0 / (variance + epsilon as f32).sqrt())
}
