//! The product of a few rows with a panel, whose sums stay in registers.

use std::borrow::Borrow;

use pulp::{Simd, WithSimd};

use super::panels::Panel;
use crate::math::{load, store};
use crate::weights::Slice;

/// Rows of the left matrix, and vectors of a panel, whose sums are in registers at once: 24 of 32, or
/// 10 of 16. (With 12, the compiler keeps one in memory and each step waits for it: half the speed.)
pub(super) const fn tile_size<S: Simd>() -> [usize; 2] {
    if S::REGISTER_COUNT < 32 {
        [5, 2]
    } else {
        [6, 4]
    }
}

/// The matrix on the left, `[rows, steps]`; a product sums over its steps.
#[derive(Clone, Copy)]
pub(crate) enum Left<'a> {
    /// Row after row, `stride` apart.
    Rows { values: &'a [f32], stride: usize },
    /// Step after step, `stride` apart.
    Steps { values: &'a [f32], stride: usize },
    /// Tile after tile of this many rows, as [`pack_tiles`] puts them: each step after step.
    Tiles { values: &'a [f32], rows: usize },
}

/// The destination of a product with a panel.
pub(crate) enum Out<'a, 'b> {
    /// Rows that are `stride` apart, in whole vectors.
    Sums {
        sums: &'a mut [f32],
        stride: usize,
        start: Start<'a>,
    },
    /// The columns of a panel, in separate rows.
    Rows {
        rows: &'a mut [&'b mut [f32]],
        panel: Panel,
        start: Start<'a>,
    },
    /// The same transposed: a row of the product is a column of `rows`, and the panel's columns are some
    /// of the rows.
    Turned {
        rows: &'a mut [&'b mut [f32]],
        panel: Panel,
        start: Start<'a>,
    },
}

/// The initial values that products are added to.
#[derive(Clone, Copy)]
pub(crate) enum Start<'a> {
    Zero,
    /// One number per column of the result, from the first one written.
    Bias(&'a [f32]),
    /// The existing contents.
    Sums,
}

impl Start<'_> {
    /// The same from a column on.
    #[inline(always)]
    pub(super) fn from(self, column: usize) -> Self {
        match self {
            Self::Bias(bias) => Self::Bias(&bias[column..]),
            Self::Zero | Self::Sums => self,
        }
    }

    /// The initial values for one vector; `out` is its destination.
    #[inline(always)]
    fn vector<S: Simd>(self, simd: S, vector: usize, out: &[f32]) -> S::f32s {
        match self {
            Self::Zero => simd.splat_f32s(0.0),
            Self::Bias(bias) => load(simd, &bias[vector * S::F32_LANES..][..out.len()]),
            Self::Sums => load(simd, out),
        }
    }
}

impl Out<'_, '_> {
    #[inline(always)]
    fn rows(&self, width: usize) -> usize {
        match self {
            Self::Sums { sums, stride, .. } => (sums.len() + stride - width) / stride,
            Self::Rows { rows, .. } => rows.len(),
            Self::Turned { rows, .. } => rows.first().map_or(0, |row| row.len()),
        }
    }

    /// Stores the products of the rows from `first` on.
    #[inline(always)]
    fn put<S: Simd, const ROWS: usize, const VECTORS: usize>(
        &mut self,
        simd: S,
        first: usize,
        products: [[S::f32s; VECTORS]; ROWS],
    ) {
        match self {
            Self::Sums {
                sums,
                stride,
                start,
            } => {
                for (row, products) in products.iter().enumerate() {
                    let row = &mut sums[(first + row) * *stride..];
                    let (out, _) = S::as_mut_simd_f32s(&mut row[..VECTORS * S::F32_LANES]);
                    let (out, _) = out.as_chunks_mut::<VECTORS>();
                    let out = &mut out[0];
                    match start {
                        Start::Zero => *out = *products,
                        Start::Bias(bias) => {
                            let (bias, _) = S::as_simd_f32s(bias);
                            for vector in 0..VECTORS {
                                out[vector] = simd.add_f32s(bias[vector], products[vector]);
                            }
                        }
                        Start::Sums => {
                            for vector in 0..VECTORS {
                                out[vector] = simd.add_f32s(out[vector], products[vector]);
                            }
                        }
                    }
                }
            }
            Self::Rows { rows, panel, start } => {
                for (row, products) in rows[first..].iter_mut().zip(products) {
                    let out = row[panel.first..][..panel.columns].chunks_mut(S::F32_LANES);
                    for (vector, (out, product)) in out.zip(products).enumerate() {
                        let start = start.vector(simd, vector, out);
                        store(simd, out, simd.add_f32s(start, product));
                    }
                }
            }
            Self::Turned { rows, panel, start } => {
                // At most 16 lanes, see `Panels`.
                let mut values = [[[0.0; 16]; VECTORS]; ROWS];
                for (values, products) in values.iter_mut().zip(products) {
                    for (values, product) in values.iter_mut().zip(products) {
                        store(simd, &mut values[..S::F32_LANES], product);
                    }
                }
                let rows = &mut rows[panel.first..][..panel.columns];
                for (column, row) in rows.iter_mut().enumerate() {
                    let (vector, lane) = (column / S::F32_LANES, column % S::F32_LANES);
                    let out = &mut row[first..][..ROWS];
                    for (i, (out, values)) in out.iter_mut().zip(&values).enumerate() {
                        let product = values[vector][lane];
                        *out = match start {
                            Start::Zero => product,
                            Start::Bias(bias) => bias[first + i] + product,
                            Start::Sums => *out + product,
                        };
                    }
                }
            }
        }
    }
}

/// The product of `left` and a panel `[steps, width]`.
#[inline(always)]
pub(crate) fn multiply<S: Simd>(
    simd: S,
    left: Left<'_>,
    panel: &[f32],
    width: usize,
    out: &mut Out<'_, '_>,
) {
    simd.vectorize(Multiply {
        left,
        panel,
        width,
        out,
    });
}

/// [`multiply`] as a function of its own. Inlined wherever it is called, its loops would take minutes to compile,
/// and would share their registers with the code around them.
struct Multiply<'a, 'o, 'b, 'c> {
    left: Left<'a>,
    panel: &'a [f32],
    width: usize,
    out: &'o mut Out<'b, 'c>,
}

impl WithSimd for Multiply<'_, '_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            left,
            panel,
            width,
            out,
        } = self;
        let [_, most] = tile_size::<S>();
        match width / S::F32_LANES {
            1 => multiply_vectors::<S, 1>(simd, left, panel, out),
            2 => multiply_vectors::<S, 2>(simd, left, panel, out),
            3 if most > 2 => multiply_vectors::<S, 3>(simd, left, panel, out),
            _ if most > 2 => multiply_vectors::<S, 4>(simd, left, panel, out),
            _ => unreachable!("a panel has at most {most} vectors"),
        }
    }
}

#[inline(always)]
fn multiply_vectors<S: Simd, const VECTORS: usize>(
    simd: S,
    left: Left<'_>,
    panel: &[f32],
    out: &mut Out<'_, '_>,
) {
    let (panel, _) = S::as_simd_f32s(panel);
    let (panel, _) = panel.as_chunks::<VECTORS>();
    let ([tile_rows, _], mut row) = (tile_size::<S>(), 0);
    if VECTORS == 1 && !matches!(left, Left::Tiles { .. }) {
        // Twice the rows: with the sums of only one tile of the usual size, each step would wait.
        row = match tile_rows {
            5 => multiply_tiles::<S, 10, VECTORS>(simd, left, row, panel, out),
            _ => multiply_tiles::<S, 12, VECTORS>(simd, left, row, panel, out),
        };
    }
    row = match tile_rows {
        5 => multiply_tiles::<S, 5, VECTORS>(simd, left, row, panel, out),
        _ => multiply_tiles::<S, 6, VECTORS>(simd, left, row, panel, out),
    };
    let row = multiply_tiles::<S, 2, VECTORS>(simd, left, row, panel, out);
    multiply_tiles::<S, 1, VECTORS>(simd, left, row, panel, out);
}

/// [`multiply`] for whole tiles from a row on; returns the first row that is left.
#[inline(always)]
fn multiply_tiles<S: Simd, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    left: Left<'_>,
    mut row: usize,
    panel: &[[S::f32s; VECTORS]],
    out: &mut Out<'_, '_>,
) -> usize {
    let rows = out.rows(VECTORS * S::F32_LANES);
    while row + ROWS <= rows {
        let products = multiply_tile::<S, ROWS, VECTORS>(simd, left, row, panel);
        out.put(simd, row, products);
        row += ROWS;
    }
    row
}

/// [`multiply`] for the rows from `first` on.
#[inline(always)]
fn multiply_tile<S: Simd, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    left: Left<'_>,
    first: usize,
    panel: &[[S::f32s; VECTORS]],
) -> [[S::f32s; VECTORS]; ROWS] {
    let zeros = [[simd.splat_f32s(0.0); VECTORS]; ROWS];
    let steps = panel.len();
    match left {
        Left::Tiles { values, rows } if rows == ROWS => {
            let (values, _) = values[first * steps..].as_chunks();
            add_products(simd, &values[..steps], panel, zeros)
        }
        // The last rows, fewer than a tile.
        Left::Tiles { values, rows } => {
            let values = &values[first / rows * rows * steps + first % rows..];
            let stride = rows;
            add_steps(simd, &StepByStep { values, stride }, panel, zeros)
        }
        Left::Rows { values, stride } => {
            let mut rows = [&values[..0]; ROWS];
            for (row, values_of_row) in rows.iter_mut().enumerate() {
                *values_of_row = &values[(first + row) * stride..][..steps];
            }
            add_steps(simd, &RowByRow(rows), panel, zeros)
        }
        Left::Steps { values, stride } => {
            let values = &values[first..];
            add_steps(simd, &StepByStep { values, stride }, panel, zeros)
        }
    }
}

/// Steps of a few rows of the left matrix.
trait Steps<const ROWS: usize> {
    /// One value per row.
    type Step: Borrow<[f32; ROWS]>;

    /// `COUNT` steps from `step` on.
    fn at<const COUNT: usize>(&self, step: usize) -> [Self::Step; COUNT];
}

struct WholeTile<'a, const ROWS: usize>(&'a [[f32; ROWS]]);

impl<'a, const ROWS: usize> Steps<ROWS> for WholeTile<'a, ROWS> {
    type Step = &'a [f32; ROWS];

    #[inline(always)]
    fn at<const COUNT: usize>(&self, step: usize) -> [Self::Step; COUNT] {
        self.0[step..].as_chunks::<COUNT>().0[0].each_ref()
    }
}

struct RowByRow<'a, const ROWS: usize>([&'a [f32]; ROWS]);

impl<const ROWS: usize> Steps<ROWS> for RowByRow<'_, ROWS> {
    type Step = [f32; ROWS];

    #[inline(always)]
    fn at<const COUNT: usize>(&self, step: usize) -> [Self::Step; COUNT] {
        let mut steps = [[0.0; ROWS]; COUNT];
        for (row, values) in self.0.iter().enumerate() {
            let values = &values[step..][..COUNT];
            for (step, value) in steps.iter_mut().zip(values) {
                step[row] = *value;
            }
        }
        steps
    }
}

struct StepByStep<'a> {
    values: &'a [f32],
    stride: usize,
}

impl<'a, const ROWS: usize> Steps<ROWS> for StepByStep<'a> {
    type Step = &'a [f32; ROWS];

    #[inline(always)]
    fn at<const COUNT: usize>(&self, step: usize) -> [Self::Step; COUNT] {
        let mut steps = [&[0.0; ROWS]; COUNT];
        let values = &self.values[step * self.stride..];
        for (step, values_of_step) in steps.iter_mut().enumerate() {
            let (values, _) = values[step * self.stride..].as_chunks();
            *values_of_step = &values[0];
        }
        steps
    }
}

/// Steps in one turn of the loop. One by one, the loop's own instructions would cost up to a fifth of the speed
/// while others use the same core.
const UNROLLED: usize = 4;

/// Adds the products of all steps of a panel to the sums.
#[inline(always)]
fn add_steps<S: Simd, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    left: &impl Steps<ROWS>,
    panel: &[[S::f32s; VECTORS]],
    mut sums: [[S::f32s; VECTORS]; ROWS],
) -> [[S::f32s; VECTORS]; ROWS] {
    let (turns, rest) = panel.as_chunks::<UNROLLED>();
    for (turn, panel) in turns.iter().enumerate() {
        let steps = left.at::<UNROLLED>(turn * UNROLLED);
        for step in 0..UNROLLED {
            add(simd, steps[step].borrow(), &panel[step], &mut sums);
        }
    }
    for (number, panel) in rest.iter().enumerate() {
        let [step] = left.at(turns.len() * UNROLLED + number);
        add(simd, step.borrow(), panel, &mut sums);
    }
    sums
}

/// Adds the products of a tile of the left matrix, `[step, row]`, and a panel to the sums.
#[inline(always)]
pub(crate) fn add_products<S: Simd, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    left: &[[f32; ROWS]],
    panel: &[[S::f32s; VECTORS]],
    sums: [[S::f32s; VECTORS]; ROWS],
) -> [[S::f32s; VECTORS]; ROWS] {
    add_steps(simd, &WholeTile(left), panel, sums)
}

/// Adds the products of one step.
#[inline(always)]
fn add<S: Simd, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    left: &[f32; ROWS],
    right: &[S::f32s; VECTORS],
    sums: &mut [[S::f32s; VECTORS]; ROWS],
) {
    for row in 0..ROWS {
        let value = simd.splat_f32s(left[row]);
        for vector in 0..VECTORS {
            sums[row][vector] = simd.mul_add_e_f32s(value, right[vector], sums[row][vector]);
        }
    }
}

/// Packs rows of the left matrix, `stride` apart, for [`Left::Tiles`]: `[tile, step, row]`, with zeros beyond the
/// last row. `first` is where the first row and step are.
#[inline(always)]
pub(super) fn pack_tiles<S: Simd>(
    left: Slice<'_>,
    first: usize,
    stride: usize,
    size: [usize; 2],
    out: &mut [f32],
    room: &mut [f32],
) {
    match tile_size::<S>()[0] {
        5 => pack_tiles_of::<5>(left, first, stride, size, out, room),
        _ => pack_tiles_of::<6>(left, first, stride, size, out, room),
    }
}

#[inline(always)]
fn pack_tiles_of<const ROWS: usize>(
    left: Slice<'_>,
    first: usize,
    stride: usize,
    [rows, steps]: [usize; 2],
    out: &mut [f32],
    room: &mut [f32],
) {
    /// Steps transposed at once.
    const TURN: usize = 16;
    let (out, _) = out.as_chunks_mut::<ROWS>();
    for (tile, out) in out.chunks_exact_mut(steps.max(1)).enumerate() {
        let count = ROWS.min(rows - tile * ROWS);
        let first = first + tile * ROWS * stride;
        let (left, stride) = left.window(first, stride, [count, steps], room);
        let (parts, rest) = out.as_chunks_mut::<TURN>();
        let whole = parts.len() * TURN;
        for (part, out) in parts.iter_mut().enumerate() {
            let mut values = [[0.0; TURN]; ROWS];
            for (row, values) in values[..count].iter_mut().enumerate() {
                *values = left.array(row * stride + part * TURN);
            }
            for step in 0..TURN {
                for row in 0..ROWS {
                    out[step][row] = values[row][step];
                }
            }
        }
        for (step, out) in rest.iter_mut().enumerate() {
            for (row, out) in out.iter_mut().enumerate() {
                let at = row * stride + whole + step;
                [*out] = if row < count { left.array(at) } else { [0.0] };
            }
        }
    }
}
