//! 3×3 convolutions with a quarter of the multiplications: Winograd's F(4×4, 3×3)
//! ([Lavin and Gray 2015](https://arxiv.org/abs/1509.09308)).
//!
//! A tile of 4×4 outputs depends on 6×6 inputs `d`; with the kernel `g`, it is
//! `Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A`. So, for each of the 36 points, the contributions of all input channels
//! to all tiles are one matrix product. Weights are transformed anew each time, in blocks that stay in
//! the cache: stored, they would take four times the memory.

mod tiling;
mod transform;

use std::ops::Range;

use burn::tensor::Tensor;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use self::tiling::Tiling;
use self::transform::{Transform, transform_outputs, transform_weights};
use super::math::{load, store};
use super::product::{Panel, Right, add_products};
use super::weights::{Slice, Weights};
use super::{Values, instructions, tensor, with_scratch, zeros};

/// Points of a transformed tile, 6×6.
const POINTS: usize = 36;
/// Outputs of a tile, 4×4.
const OUTPUTS: usize = 16;
/// Side of a tile's outputs.
const SIDE: usize = 4;
/// Taps of the kernel.
const TAPS: usize = 9;
/// Input channels whose weights are transformed at once.
const BLOCK: usize = 128;
/// Distance, in input channels, between points or taps of a block. The extra one keeps all points of a
/// channel from sharing a few sets of the first-level cache.
const SPACED: usize = BLOCK + 1;
/// Tiles that share the transformed weights.
const TILES: usize = 128;
/// Most floats of transformed inputs to hold at once.
const TRANSFORMED: usize = 1 << 22;

/// Numbers of tiles whose inputs are interleaved, so that a step of the product reads them in one go and
/// their sums fit into the registers: the first entry that suffices is used, or the last.
const GROUPS: [usize; 7] = [1, 2, 4, 5, 6, 8, 12];

/// The convolution of channels-last feature maps with a 3×3 kernel and one zero of padding on each side,
/// or its backward pass.
///
/// # Shapes
/// `x` `[b, h, w, c_in]`, `weight` `[9 · c_in, c_out]` of any floating-point type, ordered by row,
/// column and input channel, `bias` `[c_out]`; result `[b, h, w, c_out]`. If `back`, `x` is the gradient
/// of the result, and the result is the gradient of `x`.
pub(super) fn conv(
    x: Tensor<4>,
    weight: &Tensor<2>,
    bias: Option<Tensor<1>>,
    back: bool,
) -> Tensor<4> {
    let [b, h, w, c] = x.dims();
    let [rows, c_out] = weight.dims();
    let channels = [rows / TAPS, c_out];
    let n = channels[usize::from(!back)];
    let simd = instructions();
    let tiling = Tiling::new([b, h, w], simd.dispatch(Vectors));
    let (x, weight, bias) = (
        Values::of(x),
        Weights::of(weight.clone()),
        bias.map(Values::of),
    );
    let kernel = Kernel {
        weight: weight.as_slices(),
        channels,
        back,
    };
    let round = tiling.tiles_of_a_round(c);
    let transformed = tiling.count.min(round).next_multiple_of(tiling.group) * POINTS * c;
    let mut out = zeros(b * h * w * n);
    with_scratch(transformed, |transformed| {
        for first in (0..tiling.count).step_by(round) {
            let tiles = round.min(tiling.count - first);
            let groups = transformed.par_chunks_mut(tiling.group * POINTS * c);
            groups.enumerate().for_each(|(group, out)| {
                let start = group * tiling.group;
                if start < tiles {
                    let tiles = first + start..first + tiles.min(start + tiling.group);
                    let x = x.as_slice();
                    simd.dispatch(Inputs {
                        x,
                        c,
                        tiling: &tiling,
                        tiles,
                        out,
                    });
                }
            });
            let bias = bias.as_ref().map(Values::as_slice);
            products(simd, transformed, &kernel, &tiling, tiles, |parts| {
                parts.put(&mut out, bias, &tiling, first);
            });
        }
    });
    tensor(out, [b, h, w, n])
}

/// The vector length, in floats, and how many tiles' sums of two vectors are in registers at once: 24
/// of 32, or 10 of 16.
struct Vectors;

impl WithSimd for Vectors {
    type Output = [usize; 2];

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) -> [usize; 2] {
        let group = if S::REGISTER_COUNT < 32 { 5 } else { 12 };
        [S::F32_LANES, group]
    }
}

/// Transforms the inputs of one group of tiles to `[POINTS, c, rows of the group]`.
struct Inputs<'a> {
    x: &'a [f32],
    c: usize,
    tiling: &'a Tiling,
    tiles: Range<usize>,
    out: &'a mut [f32],
}

impl WithSimd for Inputs<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            x,
            c,
            tiling,
            tiles,
            out,
        } = self;
        let (transform, zero) = (Transform(simd), simd.splat_f32s(0.0));
        let rows = tiling.group_of(tiles.len());
        for (row, tile) in tiles.enumerate() {
            let [image, top, left] = tiling.place(tile);
            for first in (0..c).step_by(S::F32_LANES) {
                let lanes = (c - first).min(S::F32_LANES);
                let mut points = [[zero; 6]; 6];
                for (i, points) in points.iter_mut().enumerate() {
                    let Some(y) = inside(top + i, tiling.height) else {
                        continue;
                    };
                    for (j, point) in points.iter_mut().enumerate() {
                        let Some(column) = inside(left + j, tiling.width) else {
                            continue;
                        };
                        let at = ((image * tiling.height + y) * tiling.width + column) * c + first;
                        *point = load(simd, &x[at..][..lanes]);
                    }
                    *points = transform.inputs(*points);
                }
                for j in 0..6 {
                    let [p, q, r, s, t, u] = &points;
                    let column = transform.inputs([p[j], q[j], r[j], s[j], t[j], u[j]]);
                    for (i, value) in column.into_iter().enumerate() {
                        let mut values = [0f32; 16];
                        store(simd, &mut values[..S::F32_LANES], value);
                        let out = &mut out[((i * 6 + j) * c + first) * rows..][..lanes * rows];
                        for (out, value) in out.chunks_exact_mut(rows).zip(values) {
                            out[row] = value;
                        }
                    }
                }
            }
        }
    }
}

/// The position without its padding of one, or `None` in the padding.
#[inline(always)]
fn inside(padded: usize, size: usize) -> Option<usize> {
    padded.checked_sub(1).filter(|&position| position < size)
}

/// The kernel's weights, `[TAPS, channels[0], channels[1]]`.
#[derive(Clone, Copy)]
struct Kernel<'a> {
    weight: Slice<'a>,
    channels: [usize; 2],
    /// Whether it is applied transposed, from the second channels to the first.
    back: bool,
}

impl Kernel<'_> {
    /// Copies the weights from `block` input channels to a panel of output channels to
    /// `[TAPS, SPACED, panel.width]`.
    #[inline(always)]
    fn copy(&self, block: Range<usize>, panel: Panel, out: &mut [f32]) {
        let [c_in, c_out] = self.channels;
        let right = Right {
            values: self.weight,
            stride: c_out,
            transposed: self.back,
        };
        for (tap, out) in out.chunks_exact_mut(SPACED * panel.width).enumerate() {
            let rows = if self.back { TAPS - 1 - tap } else { tap } * c_in;
            if self.back {
                let first = rows + panel.first;
                right.pack(block.clone(), Panel { first, ..panel }, out);
            } else {
                right.pack(rows + block.start..rows + block.end, panel, out);
            }
        }
    }
}

/// The outputs of all tiles for one panel of output channels, `[tiles, OUTPUTS, panel]`.
struct Outputs<'a> {
    /// `[groups, POINTS, c, rows of the group]`
    inputs: &'a [f32],
    tiling: &'a Tiling,
    tiles: usize,
    c: usize,
    kernel: &'a Kernel<'a>,
    panel: Panel,
    /// For weights `[TAPS, SPACED, panel]`, transformed ones `[POINTS, SPACED, panel]` and sums
    /// `[POINTS, spaced(tiles), panel]`.
    scratch: &'a mut [f32],
    out: &'a mut [f32],
}

impl WithSimd for Outputs<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            inputs,
            tiling,
            tiles,
            c,
            kernel,
            panel,
            scratch,
            out,
        } = self;
        let (copied, scratch) = scratch.split_at_mut(TAPS * SPACED * panel.width);
        let (transformed, sums) = scratch.split_at_mut(POINTS * SPACED * panel.width);
        let (sums, _) = S::as_mut_simd_f32s(sums);
        let (transformed, _) = S::as_mut_simd_f32s(transformed);
        for start in (0..c).step_by(BLOCK) {
            let block = start..c.min(start + BLOCK);
            kernel.copy(block.clone(), panel, copied);
            let (weights, _) = S::as_simd_f32s(copied);
            transform_weights(simd, weights, block.len(), transformed);
            for point in 0..POINTS {
                let weights = &transformed[point * SPACED * 2..][..block.len() * 2];
                let (sums, _) = sums[point * spaced(tiles) * 2..][..tiles * 2].as_chunks_mut::<2>();
                for (group, sums) in sums.chunks_mut(tiling.group).enumerate() {
                    let rows = tiling.group_of(sums.len());
                    let at = group * tiling.group * POINTS * c + (point * c + start) * rows;
                    let inputs = &inputs[at..][..block.len() * rows];
                    let fresh = start == 0;
                    match rows {
                        12 => multiply::<S, 12>(simd, inputs, weights, sums, fresh),
                        8 => multiply::<S, 8>(simd, inputs, weights, sums, fresh),
                        6 => multiply::<S, 6>(simd, inputs, weights, sums, fresh),
                        5 => multiply::<S, 5>(simd, inputs, weights, sums, fresh),
                        4 => multiply::<S, 4>(simd, inputs, weights, sums, fresh),
                        2 => multiply::<S, 2>(simd, inputs, weights, sums, fresh),
                        _ => multiply::<S, 1>(simd, inputs, weights, sums, fresh),
                    }
                }
            }
        }
        let (out, _) = S::as_mut_simd_f32s(out);
        transform_outputs(simd, sums, tiles, out);
    }
}

/// Distance, in tiles, between the sums of two points, for the reason of [`SPACED`].
const fn spaced(tiles: usize) -> usize {
    tiles | 1
}

/// Adds the products of inputs `[k, ROWS]` and weights `[k, 2]` to the sums of up to `ROWS` tiles; if
/// `fresh`, overwrites the sums.
#[inline(always)]
fn multiply<S: Simd, const ROWS: usize>(
    simd: S,
    inputs: &[f32],
    weights: &[S::f32s],
    sums: &mut [[S::f32s; 2]],
    fresh: bool,
) {
    let mut total = [[simd.splat_f32s(0.0); 2]; ROWS];
    if !fresh {
        for (total, &mut sum) in total.iter_mut().zip(&mut *sums) {
            *total = sum;
        }
    }
    let ((inputs, _), (weights, _)) = (inputs.as_chunks::<ROWS>(), weights.as_chunks::<2>());
    let total = add_products(simd, inputs, weights, total);
    for (sum, total) in sums.iter_mut().zip(total) {
        *sum = total;
    }
}

/// Outputs by chunk of tiles and panel of channels: `[chunks, panels, tiles, OUTPUTS, panel]`.
struct Parts<'a> {
    values: &'a [f32],
    panels: usize,
}

/// Passes `take` the outputs of the `tiles` whose inputs are `transformed`.
fn products(
    simd: Arch,
    transformed: &[f32],
    kernel: &Kernel<'_>,
    tiling: &Tiling,
    tiles: usize,
    take: impl FnOnce(Parts<'_>),
) {
    let (chunk, panel) = (tiling.tiles_of_a_chunk(), tiling.panel());
    let [c_in, c_out] = kernel.channels;
    let (c, n) = if kernel.back {
        (c_out, c_in)
    } else {
        (c_in, c_out)
    };
    let panels = n.div_ceil(panel);
    let size = chunk * OUTPUTS * panel;
    with_scratch(tiles.div_ceil(chunk) * panels * size, |values| {
        let tasks = values.par_chunks_mut(size).enumerate();
        tasks.for_each(|(task, out)| {
            let (first, channel) = (task / panels * chunk, task % panels * panel);
            let tiles = chunk.min(tiles - first);
            with_scratch(
                (TAPS * SPACED + POINTS * (SPACED + spaced(tiles))) * panel,
                |scratch| {
                    simd.dispatch(Outputs {
                        inputs: &transformed[first * POINTS * c..],
                        tiling,
                        tiles,
                        c,
                        kernel,
                        panel: Panel {
                            first: channel,
                            columns: panel.min(n - channel),
                            width: panel,
                        },
                        scratch,
                        out,
                    });
                },
            );
        });
        take(Parts { values, panels });
    });
}

impl Parts<'_> {
    /// Copies the outputs of the tiles from `first` on to their places in `[b, h, w, n]`.
    fn put(&self, out: &mut [f32], bias: Option<&[f32]>, tiling: &Tiling, first: usize) {
        let (chunk, panel) = (tiling.tiles_of_a_chunk(), tiling.panel());
        let tiles = self.values.len() / (self.panels * OUTPUTS * panel);
        let [down, across] = tiling.grid;
        let n = out.len() / (tiling.width * tiling.height * (tiling.count / (down * across)));
        let lines = out.par_chunks_mut(tiling.width * n).enumerate();
        lines.for_each(|(line, out)| {
            let (image, row) = (line / tiling.height, line % tiling.height);
            for (column, out) in out.chunks_exact_mut(n).enumerate() {
                let tile = (image * down + row / SIDE) * across + column / SIDE;
                let Some(tile) = tile.checked_sub(first).filter(|&tile| tile < tiles) else {
                    continue;
                };
                let place = row % SIDE * SIDE + column % SIDE;
                for (number, out) in out.chunks_mut(panel).enumerate() {
                    let part = (tile / chunk * self.panels + number) * chunk + tile % chunk;
                    let values = &self.values[(part * OUTPUTS + place) * panel..][..out.len()];
                    out.copy_from_slice(values);
                    if let Some(bias) = bias {
                        for (out, bias) in out.iter_mut().zip(&bias[number * panel..]) {
                            *out += bias;
                        }
                    }
                }
            }
        });
    }
}
