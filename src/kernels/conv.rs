//! Linear maps: of every position, and of every neighbourhood.

use burn::tensor::Tensor;

use super::gradient::with_gradient;
use super::{Kernel, Values, for_chunks, tensor, update};

/// Most floats of gathered neighbourhoods to hold at once.
const GATHERED: usize = 1 << 22;

/// `x W + b`.
///
/// # Shapes
/// `x` `[..., d_in]`, `weight` `[d_in, d_out]`, `bias` `[d_out]`.
pub(crate) fn linear<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
) -> Tensor<D> {
    with_gradient([x], |[x]| {
        let shape = x.dims();
        let [d_in, d_out] = weight.dims();
        let rows = shape.iter().product::<usize>() / d_in;
        let mut out_shape = shape;
        out_shape[D - 1] = d_out;
        let y = x.reshape([rows, d_in]).matmul(weight.clone());
        let y = add_bias(y, bias).reshape(out_shape);
        let backward = move |grad: Tensor<D>| {
            let grad = grad.reshape([rows, d_out]);
            [grad.matmul(weight.clone().transpose()).reshape(shape)]
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

/// How a square kernel moves over a feature map.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Geometry {
    pub(crate) kernel: usize,
    pub(crate) stride: usize,
    /// Zeros above and to the left; as many as needed are below and to the right.
    pub(crate) padding: usize,
}

/// The neighbourhoods of one convolution: output position `o` and tap `k` meet input position
/// `(o · stride + k − padding) / spread`, where that is whole and inside.
#[derive(Debug, Clone, Copy)]
struct Neighbourhoods {
    input: [usize; 2],
    output: [usize; 2],
    kernel: usize,
    stride: usize,
    padding: usize,
    spread: usize,
}

impl Neighbourhoods {
    fn source(&self, position: usize, tap: usize, size: usize) -> Option<usize> {
        let place = (position * self.stride + tap).checked_sub(self.padding)?;
        (place % self.spread == 0 && place / self.spread < size).then_some(place / self.spread)
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

    /// Copies the neighbourhoods of one line of outputs; `out` is zero.
    fn gather_line(&self, x: &[f32], c: usize, line: usize, out: &mut [f32]) {
        let [h, w] = self.input;
        let (image, row) = (line / self.output[0], line % self.output[0]);
        let taps = self.kernel * self.kernel * c;
        for ky in 0..self.kernel {
            let Some(y) = self.source(row, ky, h) else {
                continue;
            };
            let x = &x[(image * h + y) * w * c..][..w * c];
            for (column, out) in out.chunks_exact_mut(taps).enumerate() {
                let out = &mut out[ky * self.kernel * c..][..self.kernel * c];
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
/// `x` `[b, h, w, c_in]`; `kernel` `[kernel · kernel · c_in, c_out]`, ordered by row, column and
/// input channel; `turned` gives the kernel of the backward pass,
/// `[kernel · kernel · c_out, c_in]`, with rows and columns reversed; result
/// `[b, output[0], output[1], c_out]`.
pub(crate) fn conv(
    x: Tensor<4>,
    kernel: &Tensor<2>,
    turned: impl FnOnce() -> Tensor<2>,
    bias: Option<Tensor<1>>,
    geometry: Geometry,
    output: [usize; 2],
) -> Tensor<4> {
    let [_, h, w, _] = x.dims();
    let Geometry {
        kernel: size,
        stride,
        padding,
    } = geometry;
    let forward = Neighbourhoods {
        input: [h, w],
        output,
        kernel: size,
        stride,
        padding,
        spread: 1,
    };
    if !x.is_tracked() {
        return forward.product(x.without_autodiff(), kernel, bias);
    }
    let turned = turned();
    with_gradient([x], |[x]| {
        let backward = Neighbourhoods {
            input: output,
            output: [h, w],
            stride: 1,
            padding: size - 1 - padding,
            spread: stride,
            ..forward
        };
        let grads = move |grad: Tensor<4>| [backward.product(grad, &turned, None)];
        (forward.product(x, kernel, bias), grads)
    })
}
