//! Linear maps and convolutions on a GPU.

use burn::tensor::{DType, Tensor};
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::cubecl::{self};
use cubek::convolution::{
    AcceleratedTileKind, ConvAlgorithm, ConvolutionArgs, ConvolutionInputs, Strategy, launch_ref,
};
use cubek::matmul::definition::{MatmulElems, MatmulGlobalElems};
use cubek::std::InputBinding;

use super::super::conv::Geometry;
use super::super::gradient::with_gradient;
use super::{by_element, contiguous, elem, empty, primitive, product, room, tensor};

/// Most numbers of gathered neighbourhoods to hold at once.
const GATHERED: usize = 1 << 26;

/// [`conv::linear`](super::super::conv::linear).
pub(in super::super) fn linear<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
) -> Tensor<D> {
    with_gradient([x], |[x]| {
        // The gradient keeps the weight as it is stored, which may be half as large.
        let (dtype, stored) = (x.dtype(), weight);
        let y = plus(times(x, stored.clone().cast(dtype).transpose()), bias);
        (y, move |grad| [times(grad, stored.clone().cast(dtype))])
    })
}

/// `x` `[.., k]` times `right` `[k, n]`.
fn times<const D: usize>(x: Tensor<D>, right: Tensor<2>) -> Tensor<D> {
    let (mut shape, dtype) = (x.dims(), x.dtype());
    let [k, n] = right.dims();
    let rows = shape.iter().product::<usize>() / k.max(1);
    let y = product(x.reshape([rows, k]), right, dtype);
    shape[D - 1] = n;
    y.reshape(shape)
}

/// `y` `[.., n]` plus the bias `[n]`, if given.
fn plus<const D: usize>(y: Tensor<D>, bias: Option<Tensor<1>>) -> Tensor<D> {
    match bias {
        Some(bias) => {
            let bias = bias.cast(y.dtype()).unsqueeze();
            y + bias
        }
        None => y,
    }
}

/// [`conv::conv`](super::super::conv::conv).
pub(in super::super) fn conv(
    x: Tensor<4>,
    kernel: &Tensor<2>,
    bias: Option<Tensor<1>>,
    geometry: Geometry,
    output: [usize; 2],
) -> Tensor<4> {
    let kernel = kernel.clone();
    with_gradient([x], |[x]| {
        let ([_, h, w, c_in], dtype) = (x.dims(), x.dtype());
        let c_out = kernel.dims()[1];
        let size = geometry.kernel;
        let kernel = kernel.cast(dtype).reshape([size, size, c_in, c_out]);
        let same = geometry == Geometry::SAME && output == [h, w];
        let y = (same.then(|| implicit(&x, &kernel)).flatten()).unwrap_or_else(|| {
            let kernel = kernel.clone().reshape([size * size * c_in, c_out]);
            gathered_product(x, &kernel, geometry, output, false)
        });
        let y = plus(y, bias);
        let back = move |grad: Tensor<4>| {
            // The gradient of a size-preserving convolution is another one with the kernel flipped.
            let turned = kernel.clone().swap_dims(2, 3); // [size, size, c_out, c_in]
            let grads = same.then(|| implicit(&grad, &turned.clone().flip([0, 1])));
            [grads.flatten().unwrap_or_else(|| {
                let turned = turned.reshape([size * size * c_out, c_in]);
                gathered_product(grad, &turned, geometry, [h, w], true)
            })]
        };
        (y, back)
    })
}

/// A size-preserving convolution as a product on tensor cores that gathers the neighbourhoods while it
/// runs; `None` if there are no tensor cores for the type, or there are few channels.
///
/// # Shapes
/// `x` `[b, h, w, c_in]`, `kernel` `[3, 3, c_in, c_out]`; result `[b, h, w, c_out]`.
fn implicit(x: &Tensor<4>, kernel: &Tensor<4>) -> Option<Tensor<4>> {
    /// Channels must be multiples of this.
    const CHANNELS: usize = 16;
    let ([b, h, w, c_in], c_out) = (x.dims(), kernel.dims()[3]);
    if x.dtype() == DType::F32 || c_in % CHANNELS != 0 || c_out % CHANNELS != 0 {
        return None;
    }
    let x = contiguous(x.clone());
    let kernel = primitive(kernel.clone().permute([3, 0, 1, 2]));
    let out = empty(&x, &[b, h, w, c_out], x.dtype);
    let strategy = Strategy::Inferred {
        algorithm: ConvAlgorithm::SimpleSyncCyclic,
        tile_kind: AcceleratedTileKind::Cmma,
    };
    let (client, elem) = (x.client.clone(), elem(&x));
    let elems = MatmulElems::from_globals(&MatmulGlobalElems {
        lhs: elem,
        rhs: elem,
        out: elem,
    });
    let inputs = ConvolutionInputs::Forward {
        input: InputBinding::new(x.binding(), elem),
        weight: InputBinding::new(kernel.binding(), elem),
        bias: None,
        out: out.clone().binding(),
    };
    let arguments = ConvolutionArgs {
        stride: [1; 2],
        padding: [1; 2],
        dilation: [1; 2],
    };
    let launched = launch_ref::<2>(&strategy, &client, inputs, arguments, elems);
    launched.is_ok().then(|| tensor(out))
}

/// The neighbourhoods of every position times `right`, some lines at a time. The neighbourhoods are
/// those of a convolution's outputs or, if `back`, of its inputs: the outputs that read them.
///
/// # Shapes
/// `x` `[b, h, w, c]`, `right` `[kernel · kernel · c, n]`; result `[b, to[0], to[1], n]`.
fn gathered_product(
    x: Tensor<4>,
    right: &Tensor<2>,
    geometry: Geometry,
    to: [usize; 2],
    back: bool,
) -> Tensor<4> {
    let ([b, h, w, c], dtype) = (x.dims(), x.dtype());
    let Geometry {
        kernel,
        stride,
        padding,
    } = geometry;
    let (line, most) = (
        to[1] * kernel * kernel * c,
        room(&primitive(x.clone()), dtype.size(), GATHERED),
    );
    if b > 1 && b * line > most {
        let images = (0..b).map(|image| {
            let x = x.clone().slice_dim(0, image..image + 1);
            gathered_product(x, right, geometry, to, back)
        });
        return Tensor::cat(images.collect(), 0);
    }
    let x = contiguous(x);
    let lines_at_once = (most / (b * line).max(1)).clamp(1, to[0].max(1));
    let mut parts = Vec::new();
    for first in (0..to[0]).step_by(lines_at_once) {
        let lines = lines_at_once.min(to[0] - first);
        let out = empty(&x, &[b, lines, to[1], kernel * kernel * c], dtype);
        let (count, dim) = by_element(&x, out.meta.shape().num_elements());
        gathered::launch(
            &x.client,
            count,
            dim,
            x.clone().into_buffer_arg(),
            out.clone().into_buffer_arg(),
            h,
            w,
            c,
            first,
            lines,
            to[1],
            kernel,
            stride,
            padding,
            back,
            elem(&x),
        );
        parts.push(times(tensor::<4>(out), right.clone()));
    }
    match parts.len() {
        1 => parts.remove(0),
        _ => Tensor::cat(parts, 1),
    }
}

/// Gathers the neighbourhoods of the positions of some lines, see [`gathered_product`].
#[cube(launch)]
fn gathered<E: Float>(
    x: &[E],
    out: &mut [E],
    h: usize,
    w: usize,
    c: usize,
    first: usize,
    lines: usize,
    width: usize,
    #[comptime] kernel: usize,
    #[comptime] stride: usize,
    #[comptime] padding: usize,
    #[comptime] back: bool,
    #[define(E)] _elem: ElemType,
) {
    if ABSOLUTE_POS >= out.len() {
        terminate!();
    }
    let channel = ABSOLUTE_POS % c;
    let tap = (ABSOLUTE_POS / c) % (kernel * kernel);
    let position = ABSOLUTE_POS / (c * kernel * kernel);
    let column = position % width;
    let row = (position / width) % lines + first;
    let image = position / (width * lines);
    let (tap_y, tap_x) = (tap / kernel, tap % kernel);
    let mut value = E::from_int(0);
    if back {
        // The output that reads this input at the tap, if any.
        if row + padding >= tap_y && column + padding >= tap_x {
            let (y, x_) = (row + padding - tap_y, column + padding - tap_x);
            if y % stride == 0 && x_ % stride == 0 && y / stride < h && x_ / stride < w {
                value = x[((image * h + y / stride) * w + x_ / stride) * c + channel];
            }
        }
    } else {
        // The input that this output reads at the tap, if it is inside.
        let (y, x_) = (row * stride + tap_y, column * stride + tap_x);
        if y >= padding && x_ >= padding && y - padding < h && x_ - padding < w {
            value = x[((image * h + y - padding) * w + x_ - padding) * c + channel];
        }
    }
    out[ABSOLUTE_POS] = value;
}
