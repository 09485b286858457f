//! Pointwise functions, gates and resizing.

use burn::tensor::Tensor;

use super::gradient::with_gradient;
use super::{Kernel, Values, for_chunks, math, tensor, zeros};

/// Elements per chunk.
const CHUNK: usize = 1 << 10;

/// `x σ(slope · x)` of every element: SiLU for a slope of 1; for 1.702, the approximation of GELU in
/// OpenAI's CLIP.
pub fn sigmoid_linear<const D: usize>(x: Tensor<D>, slope: f32) -> Tensor<D> {
    #[cfg(all(feature = "gpu", not(test)))]
    if !super::on_cpu(&x) {
        return super::gpu::pointwise::sigmoid_linear(x, slope);
    }
    pointwise(x, SigmoidLinear { slope })
}

/// `x Φ(x)` of every element.
pub fn gelu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    #[cfg(all(feature = "gpu", not(test)))]
    if !super::on_cpu(&x) {
        return super::gpu::pointwise::gelu(x);
    }
    pointwise(x, Gelu)
}

/// The tanh approximation of `x Φ(x)`, of every element.
pub fn gelu_tanh<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    #[cfg(all(feature = "gpu", not(test)))]
    if !super::on_cpu(&x) {
        return super::gpu::pointwise::gelu_tanh(x);
    }
    pointwise(x, GeluTanh)
}

/// A function of one number.
trait Function: Copy + Send + Sync + 'static {
    /// Its value and its derivative.
    fn at(self, x: f32) -> (f32, f32);
}

#[derive(Clone, Copy)]
struct SigmoidLinear {
    slope: f32,
}

impl Function for SigmoidLinear {
    #[inline(always)]
    fn at(self, x: f32) -> (f32, f32) {
        math::sigmoid_linear(x, self.slope)
    }
}

#[derive(Clone, Copy)]
struct Gelu;

impl Function for Gelu {
    #[inline(always)]
    fn at(self, x: f32) -> (f32, f32) {
        math::gelu(x)
    }
}

#[derive(Clone, Copy)]
struct GeluTanh;

impl Function for GeluTanh {
    #[inline(always)]
    fn at(self, x: f32) -> (f32, f32) {
        math::gelu_tanh(x)
    }
}

/// Applies `function` to every element.
fn pointwise<const D: usize>(x: Tensor<D>, function: impl Function) -> Tensor<D> {
    with_gradient([x], |[x]| {
        let shape = x.dims();
        let x = Values::of(x);
        let mut out = zeros(x.as_slice().len());
        let kernel = Applied {
            x: x.as_slice(),
            function,
        };
        for_chunks(&mut out, CHUNK, &kernel);
        let backward = move |grad: Tensor<D>| {
            let grad = Values::of(grad);
            let mut out = zeros(grad.as_slice().len());
            let kernel = AppliedBackward {
                x: x.as_slice(),
                grad: grad.as_slice(),
                function,
            };
            for_chunks(&mut out, CHUNK, &kernel);
            [tensor(out, shape)]
        };
        (tensor(out, shape), backward)
    })
}

struct Applied<'a, F> {
    x: &'a [f32],
    function: F,
}

impl<F: Function> Kernel for Applied<'_, F> {
    #[inline(always)]
    fn run(&self, chunk: usize, out: &mut [f32]) {
        for (out, &x) in out.iter_mut().zip(&self.x[chunk * CHUNK..]) {
            *out = self.function.at(x).0;
        }
    }
}

struct AppliedBackward<'a, F> {
    x: &'a [f32],
    grad: &'a [f32],
    function: F,
}

impl<F: Function> Kernel for AppliedBackward<'_, F> {
    #[inline(always)]
    fn run(&self, chunk: usize, out: &mut [f32]) {
        let inputs = self.x[chunk * CHUNK..]
            .iter()
            .zip(&self.grad[chunk * CHUNK..]);
        for (out, (&x, grad)) in out.iter_mut().zip(inputs) {
            *out = grad * self.function.at(x).1;
        }
    }
}

/// `value · GELU(gate)` of rows `[value, gate]`.
///
/// # Shapes
/// `[b, n, 2c]` to `[b, n, c]`.
pub fn gated_gelu(x: Tensor<3>) -> Tensor<3> {
    #[cfg(all(feature = "gpu", not(test)))]
    if !super::on_cpu(&x) {
        return super::gpu::pointwise::gated_gelu(x);
    }
    with_gradient([x], |[x]| {
        let [b, n, width] = x.dims();
        let c = width / 2;
        let x = Values::of(x);
        let mut out = zeros(b * n * c);
        for_chunks(&mut out, c, &GatedGelu { x: x.as_slice() });
        let backward = move |grad: Tensor<3>| {
            let grad = Values::of(grad);
            let mut out = zeros(b * n * width);
            let kernel = GatedGeluBackward {
                x: x.as_slice(),
                grad: grad.as_slice(),
            };
            for_chunks(&mut out, width, &kernel);
            [tensor(out, [b, n, width])]
        };
        (tensor(out, [b, n, c]), backward)
    })
}

struct GatedGelu<'a> {
    x: &'a [f32],
}

impl Kernel for GatedGelu<'_> {
    #[inline(always)]
    fn run(&self, row: usize, out: &mut [f32]) {
        let c = out.len();
        let (value, gate) = self.x[row * 2 * c..][..2 * c].split_at(c);
        for ((out, &value), &gate) in out.iter_mut().zip(value).zip(gate) {
            *out = value * math::gelu(gate).0;
        }
    }
}

struct GatedGeluBackward<'a> {
    x: &'a [f32],
    grad: &'a [f32],
}

impl Kernel for GatedGeluBackward<'_> {
    #[inline(always)]
    fn run(&self, row: usize, out: &mut [f32]) {
        let c = out.len() / 2;
        let (value, gate) = self.x[row * 2 * c..][..2 * c].split_at(c);
        let (value_grad, gate_grad) = out.split_at_mut(c);
        let outputs = value_grad.iter_mut().zip(gate_grad);
        let inputs = value.iter().zip(gate).zip(&self.grad[row * c..][..c]);
        for ((value_grad, gate_grad), ((&value, &gate), &grad)) in outputs.zip(inputs) {
            let (gelu, slope) = math::gelu(gate);
            *value_grad = grad * gelu;
            *gate_grad = grad * value * slope;
        }
    }
}

/// Enlarges or shrinks by taking the nearest position above and to the left.
///
/// # Shapes
/// `[b, h, w, c]` to `[b, height, width, c]`.
pub fn resize_nearest(x: Tensor<4>, [height, width]: [usize; 2]) -> Tensor<4> {
    #[cfg(all(feature = "gpu", not(test)))]
    if !super::on_cpu(&x) {
        return super::gpu::pointwise::resize_nearest(x, [height, width]);
    }
    with_gradient([x], |[x]| {
        let [b, h, w, c] = x.dims();
        let source = move |row: usize, column: usize| (row * h / height, column * w / width);
        let x = Values::of(x);
        let mut out = zeros(b * height * width * c);
        for_chunks(&mut out, width * c, &|line: usize, out: &mut [f32]| {
            let (image, row) = (line / height, line % height);
            for (column, pixel) in out.chunks_exact_mut(c).enumerate() {
                let (y, column) = source(row, column);
                pixel.copy_from_slice(&x.as_slice()[((image * h + y) * w + column) * c..][..c]);
            }
        });
        let backward = move |grad: Tensor<4>| {
            let grad = Values::of(grad);
            let mut out = zeros(b * h * w * c);
            for_chunks(&mut out, h * w * c, &|image: usize, out: &mut [f32]| {
                for row in 0..height {
                    for column in 0..width {
                        let (y, x) = source(row, column);
                        let from = ((image * height + row) * width + column) * c;
                        let pixel = &mut out[(y * w + x) * c..][..c];
                        for (sum, &grad) in pixel.iter_mut().zip(&grad.as_slice()[from..]) {
                            *sum += grad;
                        }
                    }
                }
            });
            [tensor(out, [b, h, w, c])]
        };
        (tensor(out, [b, height, width, c]), backward)
    })
}
