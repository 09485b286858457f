//! Pointwise functions and gates on a GPU.

use std::f32::consts::FRAC_1_SQRT_2;

use burn::tensor::Tensor;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::cubecl::{self};
use burn_cubecl::tensor::CubeTensor;

use super::super::gradient::with_gradient;
use super::{by_element, contiguous, elem, empty, tensor};

/// `1 / √(2π)`.
const FRAC_1_SQRT_TAU: f32 = 0.398_942_3;
/// `2 √(2/π)`.
const GELU_SLOPE: f32 = 1.595_769;

/// [`pointwise::sigmoid_linear`](super::super::pointwise::sigmoid_linear).
pub(in super::super) fn sigmoid_linear<const D: usize>(x: Tensor<D>, slope: f32) -> Tensor<D> {
    pointwise(x, slope, Function::SigmoidLinear)
}

/// [`pointwise::gelu`](super::super::pointwise::gelu).
pub(in super::super) fn gelu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    pointwise(x, 1.0, Function::Gelu)
}

/// [`pointwise::gelu_tanh`](super::super::pointwise::gelu_tanh).
pub(in super::super) fn gelu_tanh<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    pointwise(x, 1.0, Function::GeluTanh)
}

/// A function of one number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Function {
    SigmoidLinear,
    Gelu,
    GeluTanh,
}

fn pointwise<const D: usize>(x: Tensor<D>, slope: f32, function: Function) -> Tensor<D> {
    with_gradient([x], |[x]| {
        let x = contiguous(x);
        let run = move |x: &CubeTensor, grad: Option<Tensor<D>>| {
            let out = empty(x, x.meta.shape(), x.dtype);
            let (count, dim) = by_element(x, x.meta.shape().num_elements());
            let derivative = grad.is_some();
            let grad = grad.map_or_else(|| x.clone(), contiguous);
            applied::launch(
                &x.client,
                count,
                dim,
                x.clone().into_buffer_arg(),
                grad.into_buffer_arg(),
                out.clone().into_buffer_arg(),
                slope,
                function,
                derivative,
                elem(x),
            );
            tensor(out)
        };
        let y = run(&x, None);
        (y, move |grad| [run(&x, Some(grad))])
    })
}

/// `x Φ(x)` and its derivative.
#[cube]
fn gelu_at(x: f32) -> (f32, f32) {
    let cdf = 0.5f32 * (1.0f32 + Erf::erf(x * FRAC_1_SQRT_2));
    let density = (-0.5f32 * x * x).exp() * FRAC_1_SQRT_TAU;
    (x * cdf, cdf + x * density)
}

/// `x σ(slope · x)` and its derivative.
#[cube]
fn sigmoid_linear_at(x: f32, slope: f32) -> (f32, f32) {
    let gate = 1.0f32 / (1.0f32 + (-slope * x).exp());
    (x * gate, gate * (1.0f32 + slope * x * (1.0f32 - gate)))
}

/// The tanh approximation of `x Φ(x)` and its derivative.
#[cube]
fn gelu_tanh_at(x: f32) -> (f32, f32) {
    let square = 0.044_715f32 * x * x;
    let gate = 1.0f32 / (1.0f32 + (-GELU_SLOPE * x * (1.0f32 + square)).exp());
    let slope = GELU_SLOPE * x * (1.0f32 + 3.0f32 * square);
    (x * gate, gate * (1.0f32 + slope * (1.0f32 - gate)))
}

/// A pointwise function or, if `derivative`, its derivative times `grad`.
#[cube(launch)]
fn applied<E: Float>(
    x: &[E],
    grad: &[E],
    out: &mut [E],
    slope: f32,
    #[comptime] function: Function,
    #[comptime] derivative: bool,
    #[define(E)] _elem: ElemType,
) {
    if ABSOLUTE_POS >= out.len() {
        terminate!();
    }
    let x = f32::cast_from(x[ABSOLUTE_POS]);
    let (value, slant) = if comptime!(function == Function::Gelu) {
        gelu_at(x)
    } else if comptime!(function == Function::GeluTanh) {
        gelu_tanh_at(x)
    } else {
        sigmoid_linear_at(x, slope)
    };
    if derivative {
        out[ABSOLUTE_POS] = E::cast_from(slant * f32::cast_from(grad[ABSOLUTE_POS]));
    } else {
        out[ABSOLUTE_POS] = E::cast_from(value);
    }
}

/// [`pointwise::gated_gelu`](super::super::pointwise::gated_gelu).
pub(in super::super) fn gated_gelu(x: Tensor<3>) -> Tensor<3> {
    with_gradient([x], |[x]| {
        let [b, n, width] = x.dims();
        let c = width / 2;
        let x = contiguous(x);
        let y = empty(&x, &[b, n, c], x.dtype);
        let (count, dim) = by_element(&x, b * n * c);
        gated_gelu_forward::launch(
            &x.client,
            count,
            dim,
            x.clone().into_buffer_arg(),
            y.clone().into_buffer_arg(),
            c,
            elem(&x),
        );
        let backward = move |grad: Tensor<3>| {
            let out = empty(&x, &[b, n, width], x.dtype);
            let (count, dim) = by_element(&x, b * n * c);
            gated_gelu_backward::launch(
                &x.client,
                count,
                dim,
                x.clone().into_buffer_arg(),
                contiguous(grad).into_buffer_arg(),
                out.clone().into_buffer_arg(),
                c,
                elem(&x),
            );
            [tensor(out)]
        };
        (tensor(y), backward)
    })
}

#[cube(launch)]
fn gated_gelu_forward<E: Float>(x: &[E], y: &mut [E], c: usize, #[define(E)] _elem: ElemType) {
    if ABSOLUTE_POS >= y.len() {
        terminate!();
    }
    let value = (ABSOLUTE_POS / c) * 2 * c + ABSOLUTE_POS % c;
    let (gate, _slant) = gelu_at(f32::cast_from(x[value + c]));
    y[ABSOLUTE_POS] = E::cast_from(f32::cast_from(x[value]) * gate);
}

#[cube(launch)]
fn gated_gelu_backward<E: Float>(
    x: &[E],
    grad: &[E],
    out: &mut [E],
    c: usize,
    #[define(E)] _elem: ElemType,
) {
    if ABSOLUTE_POS >= grad.len() {
        terminate!();
    }
    let value = (ABSOLUTE_POS / c) * 2 * c + ABSOLUTE_POS % c;
    let (gate, slant) = gelu_at(f32::cast_from(x[value + c]));
    let g = f32::cast_from(grad[ABSOLUTE_POS]);
    out[value] = E::cast_from(g * gate);
    out[value + c] = E::cast_from(g * f32::cast_from(x[value]) * slant);
}

/// [`pointwise::resize_nearest`](super::super::pointwise::resize_nearest).
pub(in super::super) fn resize_nearest(x: Tensor<4>, [height, width]: [usize; 2]) -> Tensor<4> {
    with_gradient([x], |[x]| {
        let [b, h, w, c] = x.dims();
        let x = contiguous(x);
        let run = move |x: &CubeTensor, shape: [usize; 4], back: bool| {
            let out = empty(x, &shape, x.dtype);
            let (count, dim) = by_element(x, shape.iter().product());
            resized::launch(
                &x.client,
                count,
                dim,
                x.clone().into_buffer_arg(),
                out.clone().into_buffer_arg(),
                h,
                w,
                height,
                width,
                c,
                back,
                elem(x),
            );
            tensor(out)
        };
        let y = run(&x, [b, height, width, c], false);
        let back = move |grad| [run(&contiguous::<4>(grad), [b, h, w, c], true)];
        (y, back)
    })
}

/// Positions of `out` take the value of the position of `x` above and to the left or, if `back`, the
/// sum of all positions that took it.
#[cube(launch)]
fn resized<E: Float>(
    x: &[E],
    out: &mut [E],
    h: usize,
    w: usize,
    height: usize,
    width: usize,
    c: usize,
    #[comptime] back: bool,
    #[define(E)] _elem: ElemType,
) {
    if ABSOLUTE_POS >= out.len() {
        terminate!();
    }
    let channel = ABSOLUTE_POS % c;
    let position = ABSOLUTE_POS / c;
    if back {
        let (column, row) = (position % w, position / w % h);
        let image = position / (w * h);
        let mut sum = 0.0f32;
        for y in (row * height).div_ceil(h)..((row + 1) * height).div_ceil(h) {
            for x_ in (column * width).div_ceil(w)..((column + 1) * width).div_ceil(w) {
                sum += f32::cast_from(x[((image * height + y) * width + x_) * c + channel]);
            }
        }
        out[ABSOLUTE_POS] = E::cast_from(sum);
    } else {
        let (column, row) = (position % width, position / width % height);
        let image = position / (width * height);
        let at = (image * h + row * h / height) * w + column * w / width;
        out[ABSOLUTE_POS] = x[at * c + channel];
    }
}
