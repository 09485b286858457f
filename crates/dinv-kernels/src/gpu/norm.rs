//! Group and layer normalisation on a GPU.

use burn::tensor::{DType, Tensor};
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::cubecl::{self};
use burn_cubecl::tensor::CubeTensor;

use super::super::gradient::with_gradient;
use super::{UNITS, by_element, by_row, contiguous, cube_sum, elem, empty, tensor};

/// Positions whose channels one cube sums.
const POSITIONS: usize = 64;

/// [`norm::layer_norm`](super::super::norm::layer_norm).
pub(in super::super) fn layer_norm<const D: usize>(
    x: Tensor<D>,
    [weight, bias]: [Tensor<1>; 2],
    epsilon: f64,
) -> Tensor<D> {
    with_gradient([x], |[x]| {
        let [x, weight, bias] = [contiguous(x), contiguous(weight), contiguous(bias)];
        let c = weight.meta.shape()[0];
        let rows = x.meta.shape().num_elements() / c.max(1);
        let y = empty(&x, x.meta.shape(), x.dtype);
        let (count, dim) = by_row(&x, rows);
        layer_norm_forward::launch(
            &x.client,
            count,
            dim,
            x.clone().into_buffer_arg(),
            weight.clone().into_buffer_arg(),
            bias.into_buffer_arg(),
            y.clone().into_buffer_arg(),
            c,
            epsilon as f32,
            [elem(&x), elem(&weight)],
        );
        let backward = move |grad: Tensor<D>| {
            let grad = contiguous(grad);
            let out = empty(&x, x.meta.shape(), x.dtype);
            let (count, dim) = by_row(&x, rows);
            layer_norm_backward::launch(
                &x.client,
                count,
                dim,
                x.clone().into_buffer_arg(),
                weight.clone().into_buffer_arg(),
                grad.into_buffer_arg(),
                out.clone().into_buffer_arg(),
                c,
                epsilon as f32,
                [elem(&x), elem(&weight)],
            );
            [tensor(out)]
        };
        (tensor(y), backward)
    })
}

/// Mean and reciprocal standard deviation of `c` elements from `start` on.
#[cube]
fn row_statistics<E: Float>(x: &[E], start: usize, c: usize, epsilon: f32) -> (f32, f32) {
    let mut sum = 0.0f32;
    let mut i = UNIT_POS as usize;
    while i < c {
        sum += f32::cast_from(x[start + i]);
        i += UNITS as usize;
    }
    let mean = cube_sum(sum) / f32::cast_from(c);
    let mut squares = 0.0f32;
    let mut i = UNIT_POS as usize;
    while i < c {
        let difference = f32::cast_from(x[start + i]) - mean;
        squares += difference * difference;
        i += UNITS as usize;
    }
    let variance = cube_sum(squares) / f32::cast_from(c);
    (mean, 1.0f32 / (variance + epsilon).sqrt())
}

#[cube(launch)]
fn layer_norm_forward<E: Float, W: Float>(
    x: &[E],
    weight: &[W],
    bias: &[W],
    y: &mut [E],
    c: usize,
    epsilon: f32,
    #[define(E, W)] _types: [ElemType; 2],
) {
    let start = CUBE_POS * c;
    if start >= x.len() {
        terminate!();
    }
    let (mean, scale) = row_statistics::<E>(x, start, c, epsilon);
    let mut i = UNIT_POS as usize;
    while i < c {
        let normalised = (f32::cast_from(x[start + i]) - mean) * scale;
        y[start + i] =
            E::cast_from(normalised * f32::cast_from(weight[i]) + f32::cast_from(bias[i]));
        i += UNITS as usize;
    }
}

#[cube(launch)]
fn layer_norm_backward<E: Float, W: Float>(
    x: &[E],
    weight: &[W],
    grad: &[E],
    out: &mut [E],
    c: usize,
    epsilon: f32,
    #[define(E, W)] _types: [ElemType; 2],
) {
    let start = CUBE_POS * c;
    if start >= x.len() {
        terminate!();
    }
    let (mean, scale) = row_statistics::<E>(x, start, c, epsilon);
    let mut average = 0.0f32;
    let mut product = 0.0f32;
    let mut i = UNIT_POS as usize;
    while i < c {
        let g = f32::cast_from(grad[start + i]) * f32::cast_from(weight[i]);
        average += g;
        product += g * (f32::cast_from(x[start + i]) - mean) * scale;
        i += UNITS as usize;
    }
    let average = cube_sum(average) / f32::cast_from(c);
    let product = cube_sum(product) / f32::cast_from(c);
    let mut i = UNIT_POS as usize;
    while i < c {
        let g = f32::cast_from(grad[start + i]) * f32::cast_from(weight[i]);
        let normalised = (f32::cast_from(x[start + i]) - mean) * scale;
        out[start + i] = E::cast_from((g - average - normalised * product) * scale);
        i += UNITS as usize;
    }
}

/// [`norm::group_norm`](super::super::norm::group_norm).
pub(in super::super) fn group_norm(
    x: Tensor<4>,
    [weight, bias]: [Tensor<1>; 2],
    groups: usize,
    epsilon: f64,
    silu: bool,
) -> Tensor<4> {
    with_gradient([x], |[x]| {
        let norm = GroupNorm::new(x, weight, bias, groups, epsilon, silu);
        let y = norm.forward();
        (tensor(y), move |grad| {
            [tensor(norm.backward(contiguous(grad)))]
        })
    })
}

/// The input of both passes.
struct GroupNorm {
    /// `[b, h, w, c]`
    x: CubeTensor,
    weight: CubeTensor,
    bias: CubeTensor,
    /// `[b, groups, 2]` f32: mean and reciprocal standard deviation.
    statistics: CubeTensor,
    b: usize,
    positions: usize,
    c: usize,
    groups: usize,
    silu: bool,
}

impl GroupNorm {
    fn new(
        x: Tensor<4>,
        weight: Tensor<1>,
        bias: Tensor<1>,
        groups: usize,
        epsilon: f64,
        silu: bool,
    ) -> Self {
        let [b, h, w, c] = x.dims();
        let [x, weight, bias] = [contiguous(x), contiguous(weight), contiguous(bias)];
        let positions = h * w;
        let parts = positions.div_ceil(POSITIONS).max(1);
        let sums = empty(&x, &[b, parts, 2, c], DType::F32);
        let (count, dim) = by_row(&x, b * parts);
        channel_moments::launch(
            &x.client,
            count,
            dim,
            x.clone().into_buffer_arg(),
            sums.clone().into_buffer_arg(),
            positions,
            c,
            POSITIONS,
            parts,
            elem(&x),
        );
        let statistics = empty(&x, &[b, groups, 2], DType::F32);
        let (count, dim) = by_row(&x, b * groups);
        group_moments::launch(
            &x.client,
            count,
            dim,
            sums.into_buffer_arg(),
            statistics.clone().into_buffer_arg(),
            positions,
            c,
            POSITIONS,
            parts,
            groups,
            epsilon as f32,
        );
        Self {
            x,
            weight,
            bias,
            statistics,
            b,
            positions,
            c,
            groups,
            silu,
        }
    }

    fn forward(&self) -> CubeTensor {
        let x = &self.x;
        let y = empty(x, x.meta.shape(), x.dtype);
        let (count, dim) = by_element(x, x.meta.shape().num_elements());
        group_norm_forward::launch(
            &x.client,
            count,
            dim,
            x.clone().into_buffer_arg(),
            self.weight.clone().into_buffer_arg(),
            self.bias.clone().into_buffer_arg(),
            self.statistics.clone().into_buffer_arg(),
            y.clone().into_buffer_arg(),
            self.positions,
            self.c,
            self.groups,
            self.silu,
            [elem(x), elem(&self.weight)],
        );
        y
    }

    fn backward(&self, grad: CubeTensor) -> CubeTensor {
        let x = &self.x;
        let parts = self.positions.div_ceil(POSITIONS).max(1);
        let sums = empty(x, &[self.b, parts, 2, self.c], DType::F32);
        let (count, dim) = by_row(x, self.b * parts);
        channel_gradients::launch(
            &x.client,
            count,
            dim,
            x.clone().into_buffer_arg(),
            self.weight.clone().into_buffer_arg(),
            self.bias.clone().into_buffer_arg(),
            self.statistics.clone().into_buffer_arg(),
            grad.clone().into_buffer_arg(),
            sums.clone().into_buffer_arg(),
            self.positions,
            self.c,
            POSITIONS,
            parts,
            self.groups,
            self.silu,
            [elem(x), elem(&self.weight)],
        );
        let means = empty(x, &[self.b, self.groups, 2], DType::F32);
        let (count, dim) = by_row(x, self.b * self.groups);
        group_means::launch(
            &x.client,
            count,
            dim,
            sums.into_buffer_arg(),
            means.clone().into_buffer_arg(),
            self.positions,
            self.c,
            parts,
            self.groups,
        );
        let out = empty(x, x.meta.shape(), x.dtype);
        let (count, dim) = by_element(x, x.meta.shape().num_elements());
        group_norm_backward::launch(
            &x.client,
            count,
            dim,
            x.clone().into_buffer_arg(),
            self.weight.clone().into_buffer_arg(),
            self.bias.clone().into_buffer_arg(),
            self.statistics.clone().into_buffer_arg(),
            means.into_buffer_arg(),
            grad.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            self.positions,
            self.c,
            self.groups,
            self.silu,
            [elem(x), elem(&self.weight)],
        );
        out
    }
}

/// Mean, and sum of the squared distances from it, of every channel over some positions.
#[cube(launch)]
fn channel_moments<E: Float>(
    x: &[E],
    moments: &mut [f32],
    positions: usize,
    c: usize,
    positions_at_once: usize,
    parts: usize,
    #[define(E)] _elem: ElemType,
) {
    if CUBE_POS * 2 * c >= moments.len() {
        terminate!();
    }
    let (image, part) = (CUBE_POS / parts, CUBE_POS % parts);
    let first = part * positions_at_once;
    let last = min(first + positions_at_once, positions);
    let start = (image * positions + first) * c;
    let mut channel = UNIT_POS as usize;
    while channel < c {
        // Offsets from one of the values, so that the mean does not swamp the variance.
        let origin = f32::cast_from(x[start + channel]);
        let mut sum = 0.0f32;
        let mut squares = 0.0f32;
        let mut at = start + channel;
        for _ in first..last {
            let difference = f32::cast_from(x[at]) - origin;
            sum += difference;
            squares += difference * difference;
            at += c;
        }
        let n = f32::cast_from(last - first);
        moments[CUBE_POS * 2 * c + channel] = origin + sum / n;
        moments[(CUBE_POS * 2 + 1) * c + channel] = squares - sum * sum / n;
        channel += UNITS as usize;
    }
}

/// Mean and reciprocal standard deviation of every group, of its channels' moments
/// ([Chan et al. 1983](https://doi.org/10.1080/00031305.1983.10483115)).
#[cube(launch)]
fn group_moments(
    moments: &[f32],
    statistics: &mut [f32],
    positions: usize,
    c: usize,
    positions_at_once: usize,
    parts: usize,
    groups: usize,
    epsilon: f32,
) {
    if CUBE_POS * 2 >= statistics.len() {
        terminate!();
    }
    let (image, group) = (CUBE_POS / groups, CUBE_POS % groups);
    let width = c / groups;
    let mut sum = 0.0f32;
    let mut i = UNIT_POS as usize;
    while i < parts * width {
        let (part, channel) = (i / width, group * width + i % width);
        let n = min(positions_at_once, positions - part * positions_at_once);
        sum += moments[(image * parts + part) * 2 * c + channel] * f32::cast_from(n);
        i += UNITS as usize;
    }
    let all = f32::cast_from(positions * width);
    let mean = cube_sum(sum) / all;
    let mut squares = 0.0f32;
    let mut i = UNIT_POS as usize;
    while i < parts * width {
        let (part, channel) = (i / width, group * width + i % width);
        let n = min(positions_at_once, positions - part * positions_at_once);
        let at = (image * parts + part) * 2 * c + channel;
        let difference = moments[at] - mean;
        squares += moments[at + c] + difference * difference * f32::cast_from(n);
        i += UNITS as usize;
    }
    let variance = cube_sum(squares) / all;
    if UNIT_POS == 0 {
        statistics[CUBE_POS * 2] = mean;
        statistics[CUBE_POS * 2 + 1] = 1.0f32 / (variance + epsilon).sqrt();
    }
}

#[cube(launch)]
fn group_norm_forward<E: Float, W: Float>(
    x: &[E],
    weight: &[W],
    bias: &[W],
    statistics: &[f32],
    y: &mut [E],
    positions: usize,
    c: usize,
    groups: usize,
    #[comptime] silu: bool,
    #[define(E, W)] _types: [ElemType; 2],
) {
    if ABSOLUTE_POS >= x.len() {
        terminate!();
    }
    let channel = ABSOLUTE_POS % c;
    let group = (ABSOLUTE_POS / (positions * c)) * groups + channel / (c / groups);
    let normalised =
        (f32::cast_from(x[ABSOLUTE_POS]) - statistics[group * 2]) * statistics[group * 2 + 1];
    let mut value = normalised * f32::cast_from(weight[channel]) + f32::cast_from(bias[channel]);
    if silu {
        value /= 1.0f32 + (-value).exp();
    }
    y[ABSOLUTE_POS] = E::cast_from(value);
}

/// The gradient of the normalised value, before weight and bias, from that of the result.
#[cube]
fn gradient_of_normalised(
    normalised: f32,
    weight: f32,
    bias: f32,
    grad: f32,
    #[comptime] silu: bool,
) -> f32 {
    let mut g = grad * weight;
    if silu {
        let value = normalised * weight + bias;
        let gate = 1.0f32 / (1.0f32 + (-value).exp());
        g *= gate * (1.0f32 + value * (1.0f32 - gate));
    }
    g
}

/// Sums over some positions, per channel, of the gradients of the normalised values, and of their
/// products with these values.
#[cube(launch)]
fn channel_gradients<E: Float, W: Float>(
    x: &[E],
    weight: &[W],
    bias: &[W],
    statistics: &[f32],
    grad: &[E],
    sums: &mut [f32],
    positions: usize,
    c: usize,
    positions_at_once: usize,
    parts: usize,
    groups: usize,
    #[comptime] silu: bool,
    #[define(E, W)] _types: [ElemType; 2],
) {
    if CUBE_POS * 2 * c >= sums.len() {
        terminate!();
    }
    let (image, part) = (CUBE_POS / parts, CUBE_POS % parts);
    let first = part * positions_at_once;
    let last = min(first + positions_at_once, positions);
    let start = (image * positions + first) * c;
    let mut channel = UNIT_POS as usize;
    while channel < c {
        let group = image * groups + channel / (c / groups);
        let (mean, scale) = (statistics[group * 2], statistics[group * 2 + 1]);
        let (w, b) = (
            f32::cast_from(weight[channel]),
            f32::cast_from(bias[channel]),
        );
        let mut sum = 0.0f32;
        let mut product = 0.0f32;
        let mut at = start + channel;
        for _ in first..last {
            let normalised = (f32::cast_from(x[at]) - mean) * scale;
            let g = gradient_of_normalised(normalised, w, b, f32::cast_from(grad[at]), silu);
            sum += g;
            product += g * normalised;
            at += c;
        }
        sums[CUBE_POS * 2 * c + channel] = sum;
        sums[(CUBE_POS * 2 + 1) * c + channel] = product;
        channel += UNITS as usize;
    }
}

/// The means over every group of the sums of [`channel_gradients`].
#[cube(launch)]
fn group_means(
    sums: &[f32],
    means: &mut [f32],
    positions: usize,
    c: usize,
    parts: usize,
    groups: usize,
) {
    if CUBE_POS * 2 >= means.len() {
        terminate!();
    }
    let (image, group) = (CUBE_POS / groups, CUBE_POS % groups);
    let width = c / groups;
    let mut sum = 0.0f32;
    let mut product = 0.0f32;
    let mut i = UNIT_POS as usize;
    while i < parts * width {
        let (part, channel) = (i / width, group * width + i % width);
        let at = (image * parts + part) * 2 * c + channel;
        sum += sums[at];
        product += sums[at + c];
        i += UNITS as usize;
    }
    let all = f32::cast_from(positions * width);
    let sum = cube_sum(sum) / all;
    let product = cube_sum(product) / all;
    if UNIT_POS == 0 {
        means[CUBE_POS * 2] = sum;
        means[CUBE_POS * 2 + 1] = product;
    }
}

#[cube(launch)]
fn group_norm_backward<E: Float, W: Float>(
    x: &[E],
    weight: &[W],
    bias: &[W],
    statistics: &[f32],
    means: &[f32],
    grad: &[E],
    out: &mut [E],
    positions: usize,
    c: usize,
    groups: usize,
    #[comptime] silu: bool,
    #[define(E, W)] _types: [ElemType; 2],
) {
    if ABSOLUTE_POS >= x.len() {
        terminate!();
    }
    let channel = ABSOLUTE_POS % c;
    let group = (ABSOLUTE_POS / (positions * c)) * groups + channel / (c / groups);
    let scale = statistics[group * 2 + 1];
    let normalised = (f32::cast_from(x[ABSOLUTE_POS]) - statistics[group * 2]) * scale;
    let g = gradient_of_normalised(
        normalised,
        f32::cast_from(weight[channel]),
        f32::cast_from(bias[channel]),
        f32::cast_from(grad[ABSOLUTE_POS]),
        silu,
    );
    out[ABSOLUTE_POS] =
        E::cast_from((g - means[group * 2] - normalised * means[group * 2 + 1]) * scale);
}
