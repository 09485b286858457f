//! Gates and resizing.

use burn::tensor::Tensor;

use super::gradient::with_gradient;
use super::math::normal_cdf;
use super::{Kernel, Values, for_chunks, tensor, zeros};

/// `1 / √(2π)`.
const FRAC_1_SQRT_TAU: f32 = 0.398_942_3;

/// `value · GELU(gate)` of rows `[value, gate]`.
///
/// # Shapes
/// `[b, n, 2c]` to `[b, n, c]`.
pub(crate) fn gated_gelu(x: Tensor<3>) -> Tensor<3> {
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
            *out = value * gate * normal_cdf(gate).0;
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
            let (cdf, density) = normal_cdf(gate);
            *value_grad = grad * gate * cdf;
            *gate_grad = grad * value * (cdf + gate * density * FRAC_1_SQRT_TAU);
        }
    }
}

/// Enlarges or shrinks by taking the nearest position above and to the left.
///
/// # Shapes
/// `[b, h, w, c]` to `[b, height, width, c]`.
pub(crate) fn resize_nearest(x: Tensor<4>, [height, width]: [usize; 2]) -> Tensor<4> {
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
