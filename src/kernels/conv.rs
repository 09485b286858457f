//! Linear maps: of every position, and of every neighbourhood.

use burn::tensor::Tensor;

use super::gradient::with_gradient;
use super::half::widened;
use super::winograd;
use super::{Kernel, Values, for_chunks, tensor, update};

/// Most floats of gathered neighbourhoods to hold at once.
const GATHERED: usize = 1 << 22;

/// `x Wᵀ + b`.
///
/// # Shapes
/// `x` `[..., d_in]`, `weight` `[d_out, d_in]` of any floating-point type, `bias` `[d_out]`.
pub(crate) fn linear<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
) -> Tensor<D> {
    with_gradient([x], |[x]| {
        let shape = x.dims();
        let [d_out, d_in] = weight.dims();
        let rows = shape.iter().product::<usize>() / d_in;
        let mut out_shape = shape;
        out_shape[D - 1] = d_out;
        let x = x.reshape([rows, d_in]);
        let y = x.matmul(widened(weight.clone()).transpose());
        let y = add_bias(y, bias).reshape(out_shape);
        let backward = move |grad: Tensor<D>| {
            let grad = grad.reshape([rows, d_out]);
            [grad.matmul(widened(weight.clone())).reshape(shape)]
        };
        (y, backward)
    })
}

fn add_bias(x: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<2> {
    let Some(bias) = bias else { return x };
    let bias = Values::of(bias);
    let bias = bias.as_slice();
    update(x, |x| for_chunks(x, bias.len(), &AddBias { bias }))
}

struct AddBias<'a> {
    bias: &'a [f32],
}

impl Kernel for AddBias<'_> {
    #[inline(always)]
    fn run(&self, _row: usize, out: &mut [f32]) {
        for (out, &bias) in out.iter_mut().zip(self.bias) {
            *out += bias;
        }
    }
}

/// Fewest channels for which [`winograd`] pays.
const MANY_CHANNELS: usize = 16;

/// How a square kernel moves over a feature map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) kernel: usize,
    pub(crate) stride: usize,
    /// Zeros above and to the left; as many as needed are below and to the right.
    pub(crate) padding: usize,
}

impl Geometry {
    /// Every position by itself.
    pub(crate) const POINTWISE: Self = Self {
        kernel: 1,
        stride: 1,
        padding: 0,
    };
    /// What most convolutions are: 3×3, output as large as input.
    const SAME: Self = Self {
        kernel: 3,
        stride: 1,
        padding: 1,
    };
}

/// The neighbourhoods of one convolution: output position `o` and tap `k` meet input position
/// `o · stride + k − padding`, if that is inside.
#[derive(Debug, Clone, Copy)]
struct Neighbourhoods {
    input: [usize; 2],
    output: [usize; 2],
    geometry: Geometry,
}

impl Neighbourhoods {
    /// The input position that an output position meets at a tap.
    fn source(&self, position: usize, tap: usize, size: usize) -> Option<usize> {
        let place = (position * self.geometry.stride + tap).checked_sub(self.geometry.padding)?;
        (place < size).then_some(place)
    }

    /// The output position that an input position meets at a tap.
    fn target(&self, position: usize, tap: usize, size: usize) -> Option<usize> {
        let place = (position + self.geometry.padding).checked_sub(tap)?;
        let target = place / self.geometry.stride;
        (place % self.geometry.stride == 0 && target < size).then_some(target)
    }

    /// `x` `[b, h, w, c]` times the kernel `[kernel · kernel · c, c_out]`, plus the bias.
    fn product(&self, x: Tensor<4>, kernel: &Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<4> {
        let [b, _, _, c] = x.dims();
        let [height, width] = self.output;
        let [taps, c_out] = kernel.dims();
        let x = Values::of(x);
        let lines = b * height;
        let lines_at_once = (GATHERED / (width * taps)).clamp(1, lines);
        let gather = |first: usize, lines: usize| {
            let mut gathered = vec![0.0; lines * width * taps];
            for_chunks(
                &mut gathered,
                width * taps,
                &|line: usize, out: &mut [f32]| {
                    self.gather_line(x.as_slice(), c, first + line, out);
                },
            );
            tensor(gathered, [lines * width, taps]).matmul(kernel.clone())
        };
        let parts = (0..lines)
            .step_by(lines_at_once)
            .map(|first| gather(first, lines_at_once.min(lines - first)))
            .collect();
        add_bias(Tensor::cat(parts, 0), bias).reshape([b, height, width, c_out])
    }

    /// The gradient of the input `[b, h, w, c]` from that of the output: what every output
    /// position passes to its neighbourhood, summed up; image by image.
    fn back(&self, grad: &Tensor<4>, kernel: &Tensor<2>) -> Tensor<4> {
        let [b, height, width, c_out] = grad.dims();
        let ([h, w], taps) = (self.input, kernel.dims()[0]);
        let c = taps / (self.geometry.kernel * self.geometry.kernel);
        let mut out = vec![0.0; b * h * w * c];
        for (image, out) in out.chunks_exact_mut((h * w * c).max(1)).enumerate() {
            let grad = grad.clone().slice_dim(0, image..image + 1);
            let grad = grad.reshape([height * width, c_out]);
            let passed = Values::of(grad.matmul(kernel.clone().transpose()));
            for_chunks(out, w * c, &|row: usize, out: &mut [f32]| {
                self.sum_line(passed.as_slice(), c, row, out);
            });
        }
        tensor(out, [b, h, w, c])
    }

    /// Adds to one line of inputs what `passed` `[outputs, kernel · kernel · c]` has for it.
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

    /// Copies the neighbourhoods of one line of outputs; `out` is zero.
    fn gather_line(&self, x: &[f32], c: usize, line: usize, out: &mut [f32]) {
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
pub(crate) fn conv(
    x: Tensor<4>,
    kernel: &Tensor<2>,
    bias: Option<Tensor<1>>,
    geometry: Geometry,
    output: [usize; 2],
) -> Tensor<4> {
    let [_, h, w, c_in] = x.dims();
    let channels = c_in.min(kernel.dims()[1]);
    let kernel = kernel.clone();
    if geometry == Geometry::SAME && output == [h, w] && channels >= MANY_CHANNELS {
        return with_gradient([x], |[x]| {
            let y = winograd::conv(x, &kernel, bias, false);
            (y, move |grad| [winograd::conv(grad, &kernel, None, true)])
        });
    }
    let neighbourhoods = Neighbourhoods {
        input: [h, w],
        output,
        geometry,
    };
    with_gradient([x], |[x]| {
        let y = neighbourhoods.product(x, &widened(kernel.clone()), bias);
        let back = move |grad| [neighbourhoods.back(&grad, &widened(kernel.clone()))];
        (y, back)
    })
}
