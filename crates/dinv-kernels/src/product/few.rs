//! Products of a few rows, such as those that embed a time or modulate a block. Each weight is multiplied only a few times.
//! Copying it would take longer than that, so weights are read once, in memory order.

use pulp::{Simd, WithSimd};

use super::Block;
use super::panels::Right;

/// Most rows of such a product.
pub(super) const MOST_ROWS: usize = 4;
/// Steps whose weights are widened at once, if they are not stored as f32: they stay in the first-level cache.
const PART: usize = 1024;
/// Lines of weights that are read at once.
const LINES: usize = 4;

/// The products of all rows with the columns of one block.
pub(super) struct FewRows<'a, 'b> {
    /// `[rows, steps]`
    pub(super) left: &'a [f32],
    pub(super) right: Right<'a>,
    pub(super) bias: Option<&'a [f32]>,
    pub(super) steps: usize,
    pub(super) block: Block<'b>,
    /// For widened weights, as long as [`room`] says.
    pub(super) room: &'a mut [f32],
}

/// The room that widened weights of a block of so many columns take.
pub(super) fn room(right: &Right<'_>, columns: usize) -> usize {
    let line = if right.transposed { PART } else { columns };
    right.values.room_as_floats(LINES * line)
}

impl WithSimd for FewRows<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match (self.right.transposed, self.block.rows.len()) {
            (true, 1) => simd.vectorize(Dots::<1>(self)),
            (true, 2) => simd.vectorize(Dots::<2>(self)),
            (true, 3) => simd.vectorize(Dots::<3>(self)),
            (true, _) => simd.vectorize(Dots::<4>(self)),
            (false, 1) => simd.vectorize(Sums::<1>(self)),
            (false, 2) => simd.vectorize(Sums::<2>(self)),
            (false, 3) => simd.vectorize(Sums::<3>(self)),
            (false, _) => simd.vectorize(Sums::<4>(self)),
        }
    }
}

/// For weights that are stored column by column: sums over the steps of [`LINES`] columns at a time.
struct Dots<'a, 'b, const ROWS: usize>(FewRows<'a, 'b>);

impl<const ROWS: usize> WithSimd for Dots<'_, '_, ROWS> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let FewRows {
            left,
            right,
            bias,
            steps,
            mut block,
            room,
        } = self.0;
        let columns = block.rows.first().map_or(0, |row| row.len());
        for first in (0..columns).step_by(LINES) {
            let count = LINES.min(columns - first);
            let mut sums = [[simd.splat_f32s(0.0); LINES]; ROWS];
            let mut rests = [[0.0; LINES]; ROWS];
            for start in (0..steps).step_by(PART) {
                let len = PART.min(steps - start);
                let at = (block.column + first) * right.stride + start;
                let (weights, stride) =
                    right
                        .values
                        .as_floats(at, right.stride, [count, len], &mut *room);
                // A line that is not there is read as the last one, and left out in the end.
                let lines: [&[f32]; LINES] =
                    std::array::from_fn(|line| &weights[line.min(count - 1) * stride..][..len]);
                let rows: [&[f32]; ROWS] =
                    std::array::from_fn(|row| &left[row * steps + start..][..len]);
                let vectors = rows.map(|row| S::as_simd_f32s(row).0);
                let of_lines = lines.map(|line| S::as_simd_f32s(line).0);
                for vector in 0..len / S::F32_LANES {
                    for (line, of_line) in of_lines.iter().enumerate() {
                        let weights = of_line[vector];
                        for row in 0..ROWS {
                            sums[row][line] =
                                simd.mul_add_e_f32s(vectors[row][vector], weights, sums[row][line]);
                        }
                    }
                }
                for step in len / S::F32_LANES * S::F32_LANES..len {
                    for line in 0..LINES {
                        for row in 0..ROWS {
                            rests[row][line] += rows[row][step] * lines[line][step];
                        }
                    }
                }
            }
            for (row, out) in block.rows.iter_mut().enumerate().take(ROWS) {
                for (line, out) in out[first..][..count].iter_mut().enumerate() {
                    let bias = bias.map_or(0.0, |bias| bias[block.column + first + line]);
                    *out = simd.reduce_sum_f32s(sums[row][line]) + rests[row][line] + bias;
                }
            }
        }
    }
}

/// For weights that are stored step by step: [`LINES`] steps at a time are added to all columns.
struct Sums<'a, 'b, const ROWS: usize>(FewRows<'a, 'b>);

impl<const ROWS: usize> WithSimd for Sums<'_, '_, ROWS> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let FewRows {
            left,
            right,
            bias,
            steps,
            mut block,
            room,
        } = self.0;
        let columns = block.rows.first().map_or(0, |row| row.len());
        for row in &mut block.rows {
            match bias {
                Some(bias) => row.copy_from_slice(&bias[block.column..][..columns]),
                None => row.fill(0.0),
            }
        }
        for first in (0..steps).step_by(LINES) {
            let count = LINES.min(steps - first);
            let at = first * right.stride + block.column;
            let size = [count, columns];
            let (weights, stride) = (right.values).as_floats(at, right.stride, size, &mut *room);
            // A line that is not there is read as the last one, and multiplied by 0.
            let lines: [&[f32]; LINES] =
                std::array::from_fn(|line| &weights[line.min(count - 1) * stride..][..columns]);
            let of_lines = lines.map(|line| S::as_simd_f32s(line).0);
            for (row, out) in block.rows.iter_mut().enumerate().take(ROWS) {
                let factors: [f32; LINES] = std::array::from_fn(|line| match line < count {
                    true => left[row * steps + first + line],
                    false => 0.0,
                });
                let spread = factors.map(|factor| simd.splat_f32s(factor));
                let (vectors, rest) = S::as_mut_simd_f32s(out);
                let whole = vectors.len();
                for (vector, out) in vectors.iter_mut().enumerate() {
                    for line in 0..LINES {
                        *out = simd.mul_add_e_f32s(spread[line], of_lines[line][vector], *out);
                    }
                }
                for (place, out) in rest.iter_mut().enumerate() {
                    for line in 0..LINES {
                        *out += factors[line] * lines[line][whole * S::F32_LANES + place];
                    }
                }
            }
        }
    }
}
