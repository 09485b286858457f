//! Linear maps and convolutions on the CPU.

use std::sync::Arc;

use burn::tensor::{Device, Tensor};

use super::gradient::with_gradient;
use super::packed::Packed;
use super::product::{Right, product};
use super::weights::Weights;
use super::{Values, for_chunks, tensor, winograd, with_scratch, zeros};

/// Most floats of gathered neighbourhoods to hold at once.
const GATHERED: usize = 1 << 22;

/// The weight of a linear map.
#[derive(Debug, Clone)]
pub enum Matrix {
    /// `[d_out, d_in]` of any floating-point type.
    Dense(Box<Tensor<2>>),
    /// Of fewer bits, on the CPU. Products widen it part by part, so that nothing holds a wide copy.
    Packed(Arc<Packed>),
}

impl From<Tensor<2>> for Matrix {
    fn from(weight: Tensor<2>) -> Self {
        Self::Dense(Box::new(weight))
    }
}

impl Matrix {
    /// `[d_out, d_in]`
    pub fn dims(&self) -> [usize; 2] {
        match self {
            Self::Dense(weight) => weight.dims(),
            Self::Packed(packed) => packed.shape(),
        }
    }

    /// The bytes that it takes.
    pub fn size(&self) -> usize {
        match self {
            Self::Dense(weight) => weight.shape().num_elements() * weight.dtype().size(),
            Self::Packed(packed) => packed.size(),
        }
    }

    /// Its numbers, on `device` if they are packed.
    pub fn dense(&self, device: &Device) -> Tensor<2> {
        match self {
            Self::Dense(weight) => (**weight).clone(),
            Self::Packed(packed) => packed.dense().to_device(device),
        }
    }
}

impl From<Matrix> for Weights {
    fn from(matrix: Matrix) -> Self {
        match matrix {
            Matrix::Dense(weight) => Self::of(*weight),
            Matrix::Packed(packed) => Self::Packed(packed),
        }
    }
}

/// `x Wᵀ + b`.
///
/// # Shapes
/// `x` `[..., d_in]`, `weight` `[d_out, d_in]`, `bias` `[d_out]`.
pub fn linear<const D: usize>(x: Tensor<D>, weight: Matrix, bias: Option<Tensor<1>>) -> Tensor<D> {
    #[cfg(all(feature = "gpu", not(test)))]
    if !super::on_cpu(&x) {
        let weight = weight.dense(&x.device().without_autodiff());
        return super::gpu::conv::linear(x, weight, bias);
    }
    with_gradient([x], |[x]| {
        let shape = x.dims();
        let [d_out, d_in] = weight.dims();
        let mut out_shape = shape;
        out_shape[D - 1] = d_out;
        let weight = Weights::from(weight);
        let y = times(x, Right::new(&weight, d_in, true), bias, out_shape);
        let back = move |grad| [times(grad, Right::new(&weight, d_in, false), None, shape)];
        (y, back)
    })
}

/// `x · right + bias` in the given shape, which is that of `x` except for the last dimension.
fn times<const D: usize>(
    x: Tensor<D>,
    right: Right<'_>,
    bias: Option<Tensor<1>>,
    shape: [usize; D],
) -> Tensor<D> {
    let dimensions = [x.dims()[D - 1], shape[D - 1]];
    let (x, bias) = (Values::of(x), bias.map(Values::of));
    let bias = bias.as_ref().map(Values::as_slice);
    let mut out = zeros(shape.iter().product());
    product(x.as_slice(), right, bias, dimensions, &mut out);
    tensor(out, shape)
}

/// Fewest channels for which [`winograd`] pays.
const MANY_CHANNELS: usize = 16;

/// How a square kernel moves over a feature map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Rows and columns of the kernel.
    pub kernel: usize,
    /// Distance between the inputs of neighbouring outputs.
    pub stride: usize,
    /// Rows and columns of zeros above and to the left; the output size determines the others.
    pub padding: usize,
}

impl Geometry {
    /// Every position separately.
    pub const POINTWISE: Self = Self {
        kernel: 1,
        stride: 1,
        padding: 0,
    };
    /// The most common convolution: 3×3, output as large as the input.
    pub(super) const SAME: Self = Self {
        kernel: 3,
        stride: 1,
        padding: 1,
    };
}

/// The neighbourhoods of one convolution: output position `o` and tap `k` read input position
/// `o · stride + k − padding`, if it is inside.
#[derive(Debug, Clone, Copy)]
struct Neighbourhoods {
    input: [usize; 2],
    output: [usize; 2],
    geometry: Geometry,
}

impl Neighbourhoods {
    /// The input position that an output position reads at a tap.
    fn source(&self, position: usize, tap: usize, size: usize) -> Option<usize> {
        let place = (position * self.geometry.stride + tap).checked_sub(self.geometry.padding)?;
        (place < size).then_some(place)
    }

    /// The output position that reads an input position at a tap.
    fn target(&self, position: usize, tap: usize, size: usize) -> Option<usize> {
        let place = (position + self.geometry.padding).checked_sub(tap)?;
        let target = place / self.geometry.stride;
        (place % self.geometry.stride == 0 && target < size).then_some(target)
    }

    /// `x` `[b, h, w, c]` times the kernel `[kernel · kernel · c, c_out]`, plus the bias.
    fn product(
        &self,
        x: Tensor<4>,
        kernel: &Weights,
        c_out: usize,
        bias: Option<Tensor<1>>,
    ) -> Tensor<4> {
        let [b, _, _, c] = x.dims();
        let [height, width] = self.output;
        let taps = self.geometry.kernel * self.geometry.kernel * c;
        let (x, bias) = (Values::of(x), bias.map(Values::of));
        let bias = bias.as_ref().map(Values::as_slice);
        let right = Right::new(kernel, c_out, false);
        let mut out = zeros(b * height * width * c_out);
        let lines_at_once = (GATHERED / (width * taps)).max(1);
        let rounds = out.chunks_mut((lines_at_once * width * c_out).max(1));
        for (round, out) in rounds.enumerate() {
            with_scratch(out.len() / c_out * taps, |gathered| {
                let gather = |line: usize, out: &mut [f32]| {
                    self.gather_line(x.as_slice(), c, round * lines_at_once + line, out);
                };
                for_chunks(gathered, width * taps, &gather);
                product(gathered, right, bias, [taps, c_out], out);
            });
        }
        tensor(out, [b, height, width, c_out])
    }

    /// The gradient of the input `[b, h, w, c]` from that of the output, image by image: the sum of what
    /// every output position passes to its neighbourhood.
    fn back(&self, grad: Tensor<4>, kernel: &Weights, c: usize) -> Tensor<4> {
        let [b, height, width, c_out] = grad.dims();
        let ([h, w], taps) = (self.input, self.geometry.kernel * self.geometry.kernel * c);
        let grad = Values::of(grad);
        let right = Right::new(kernel, c_out, true);
        let mut out = zeros(b * h * w * c);
        let images = out.chunks_exact_mut((h * w * c).max(1));
        let grads = grad
            .as_slice()
            .chunks_exact((height * width * c_out).max(1));
        with_scratch(height * width * taps, |passed| {
            for (out, grad) in images.zip(grads) {
                product(grad, right, None, [c_out, taps], passed);
                for_chunks(out, w * c, &|row: usize, out: &mut [f32]| {
                    self.sum_line(passed, c, row, out);
                });
            }
        });
        tensor(out, [b, h, w, c])
    }

    /// Adds the parts of `passed` `[outputs, kernel · kernel · c]` that belong to one line of inputs.
    fn sum_line(&self, passed: &[f32], c: usize, row: usize, out: &mut [f32]) {
        let ([height, width], kernel) = (self.output, self.geometry.kernel);
        for ky in 0..kernel {
            let Some(y) = self.target(row, ky, height) else {
                continue;
            };
            for (column, out) in out.chunks_exact_mut(c).enumerate() {
                for kx in 0..kernel {
                    if let Some(x) = self.target(column, kx, width) {
                        let at = ((y * width + x) * kernel * kernel + ky * kernel + kx) * c;
                        for (out, passed) in out.iter_mut().zip(&passed[at..]) {
                            *out += passed;
                        }
                    }
                }
            }
        }
    }

    /// Copies the neighbourhoods of one line of outputs.
    fn gather_line(&self, x: &[f32], c: usize, line: usize, out: &mut [f32]) {
        out.fill(0.0);
        let [h, w] = self.input;
        let (image, row) = (line / self.output[0], line % self.output[0]);
        let kernel = self.geometry.kernel;
        let taps = kernel * kernel * c;
        for ky in 0..kernel {
            let Some(y) = self.source(row, ky, h) else {
                continue;
            };
            let x = &x[(image * h + y) * w * c..][..w * c];
            for (column, out) in out.chunks_exact_mut(taps).enumerate() {
                let out = &mut out[ky * kernel * c..][..kernel * c];
                for (kx, out) in out.chunks_exact_mut(c).enumerate() {
                    if let Some(column) = self.source(column, kx, w) {
                        out.copy_from_slice(&x[column * c..][..c]);
                    }
                }
            }
        }
    }
}

/// A convolution over a channels-last feature map.
///
/// # Shapes
/// `x` `[b, h, w, c_in]`; `kernel` `[kernel · kernel · c_in, c_out]` of any floating-point type,
/// ordered by row, column and input channel; result `[b, output[0], output[1], c_out]`.
pub fn conv(
    x: Tensor<4>,
    kernel: &Tensor<2>,
    bias: Option<Tensor<1>>,
    geometry: Geometry,
    output: [usize; 2],
) -> Tensor<4> {
    #[cfg(all(feature = "gpu", not(test)))]
    if !super::on_cpu(&x) {
        return super::gpu::conv::conv(x, kernel, bias, geometry, output);
    }
    let [_, h, w, c_in] = x.dims();
    let channels = c_in.min(kernel.dims()[1]);
    let kernel = kernel.clone();
    if geometry == Geometry::SAME && output == [h, w] && channels >= MANY_CHANNELS {
        return with_gradient([x], |[x]| {
            let y = winograd::conv(x, &kernel, bias, false);
            (y, move |grad| [winograd::conv(grad, &kernel, None, true)])
        });
    }
    let c_out = kernel.dims()[1];
    let neighbourhoods = Neighbourhoods {
        input: [h, w],
        output,
        geometry,
    };
    with_gradient([x], |[x]| {
        let kernel = Weights::of(kernel);
        let y = neighbourhoods.product(x, &kernel, c_out, bias);
        (y, move |grad| [neighbourhoods.back(grad, &kernel, c_in)])
    })
}
