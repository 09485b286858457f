//! Transformations to the points of a tile and back.

use pulp::Simd;

use super::{OUTPUTS, SIDE, SPACED, spaced};

/// The three transformations in one dimension, of vectors.
#[derive(Clone, Copy)]
pub(super) struct Transform<S: Simd>(pub(super) S);

impl<S: Simd> Transform<S> {
    #[inline(always)]
    pub(super) fn add(self, x: S::f32s, y: S::f32s) -> S::f32s {
        self.0.add_f32s(x, y)
    }

    #[inline(always)]
    pub(super) fn sub(self, x: S::f32s, y: S::f32s) -> S::f32s {
        self.0.sub_f32s(x, y)
    }

    #[inline(always)]
    pub(super) fn scale(self, a: f32, x: S::f32s) -> S::f32s {
        self.0.mul_f32s(self.0.splat_f32s(a), x)
    }

    /// `a x + y`.
    #[inline(always)]
    pub(super) fn axpy(self, a: f32, x: S::f32s, y: S::f32s) -> S::f32s {
        self.0.mul_add_e_f32s(self.0.splat_f32s(a), x, y)
    }

    /// `Bᵀ`.
    #[inline(always)]
    pub(super) fn inputs(self, [a, b, c, d, e, f]: [S::f32s; 6]) -> [S::f32s; 6] {
        let (ec, db) = (self.sub(e, c), self.sub(d, b));
        let (even, odd) = (self.axpy(-4.0, c, e), self.axpy(-4.0, b, d));
        [
            self.axpy(4.0, self.sub(a, c), ec),
            self.add(even, odd),
            self.sub(even, odd),
            self.axpy(2.0, db, ec),
            self.axpy(-2.0, db, ec),
            self.axpy(4.0, self.sub(b, d), self.sub(f, d)),
        ]
    }

    /// `G`.
    #[inline(always)]
    pub(super) fn weights(self, [a, b, c]: [S::f32s; 3]) -> [S::f32s; 6] {
        let near = self.scale(-1.0 / 6.0, self.add(a, c));
        let far = self.axpy(1.0 / 24.0, a, self.scale(1.0 / 6.0, c));
        [
            self.scale(0.25, a),
            self.axpy(-1.0 / 6.0, b, near),
            self.axpy(1.0 / 6.0, b, near),
            self.axpy(1.0 / 12.0, b, far),
            self.axpy(-1.0 / 12.0, b, far),
            c,
        ]
    }

    /// `Aᵀ`.
    #[inline(always)]
    pub(super) fn outputs(self, [a, b, c, d, e, f]: [S::f32s; 6]) -> [S::f32s; 4] {
        let (even, odd) = (self.add(b, c), self.sub(b, c));
        let (far_even, far_odd) = (self.add(d, e), self.sub(d, e));
        [
            self.add(self.add(a, even), far_even),
            self.axpy(2.0, far_odd, odd),
            self.axpy(4.0, far_even, even),
            self.add(self.axpy(8.0, far_odd, odd), f),
        ]
    }
}

/// `[TAPS, SPACED, 2]` to `[POINTS, SPACED, 2]`, for the first `channels` of the block.
#[inline(always)]
pub(super) fn transform_weights<S: Simd>(
    simd: S,
    weights: &[S::f32s],
    channels: usize,
    out: &mut [S::f32s],
) {
    let transform = Transform(simd);
    for at in 0..2 * channels {
        let mut rows = [[simd.splat_f32s(0.0); 3]; 6];
        for column in 0..3 {
            let tap = |row: usize| weights[(row * 3 + column) * SPACED * 2 + at];
            let taps = [tap(0), tap(1), tap(2)];
            for (row, value) in rows.iter_mut().zip(transform.weights(taps)) {
                row[column] = value;
            }
        }
        for (i, row) in rows.into_iter().enumerate() {
            for (j, value) in transform.weights(row).into_iter().enumerate() {
                out[(i * 6 + j) * SPACED * 2 + at] = value;
            }
        }
    }
}

/// `[POINTS, spaced(tiles), 2]` to `[tiles, OUTPUTS, 2]`.
#[inline(always)]
pub(super) fn transform_outputs<S: Simd>(
    simd: S,
    sums: &[S::f32s],
    tiles: usize,
    out: &mut [S::f32s],
) {
    let transform = Transform(simd);
    for at in 0..2 * tiles {
        let mut rows = [[simd.splat_f32s(0.0); 6]; 4];
        for column in 0..6 {
            let point = |row: usize| sums[(row * 6 + column) * spaced(tiles) * 2 + at];
            let points = [point(0), point(1), point(2), point(3), point(4), point(5)];
            for (row, value) in rows.iter_mut().zip(transform.outputs(points)) {
                row[column] = value;
            }
        }
        for (i, row) in rows.into_iter().enumerate() {
            for (j, value) in transform.outputs(row).into_iter().enumerate() {
                out[(at / 2 * OUTPUTS + i * SIDE + j) * 2 + at % 2] = value;
            }
        }
    }
}
