//! Panels of a few columns, packed so that a product reads them in memory order.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::tile::tile_size;
use crate::weights::{Slice, Weights};

/// Steps and columns transposed at once.
const TURN: [usize; 2] = [16, 4];

/// The matrix on the right, `[steps, columns]`.
#[derive(Clone, Copy)]
pub(crate) struct Right<'a> {
    pub(crate) values: Slice<'a>,
    /// Distance between steps or, if `transposed`, between columns.
    pub(crate) stride: usize,
    /// Whether its values are stored column by column, like the weights of linear layers.
    pub(crate) transposed: bool,
}

impl<'a> Right<'a> {
    pub(crate) fn new(weights: &'a Weights, stride: usize, transposed: bool) -> Self {
        Self {
            values: weights.as_slices(),
            stride,
            transposed,
        }
    }

    /// Some of its lines, which are columns if it is stored column by column and otherwise steps, and some elements of
    /// each. Packed ones are widened into `room`.
    #[inline(always)]
    pub(super) fn window<'b>(
        &self,
        lines: Range<usize>,
        elements: Range<usize>,
        room: &'b mut [f32],
    ) -> Right<'b>
    where
        'a: 'b,
    {
        let first = lines.start * self.stride + elements.start;
        let size = [lines.len(), elements.len()];
        let (values, stride) = self.values.window(first, self.stride, size, room);
        Right {
            values,
            stride,
            transposed: self.transposed,
        }
    }

    /// Copies steps of a panel's columns to `[steps, panel.width]`, with zeros beyond the last column.
    #[inline(always)]
    pub(crate) fn pack(&self, steps: Range<usize>, panel: Panel, out: &mut [f32]) {
        match panel.width {
            64 => self.pack_rows::<64>(steps, panel, out),
            48 => self.pack_rows::<48>(steps, panel, out),
            32 => self.pack_rows::<32>(steps, panel, out),
            16 => self.pack_rows::<16>(steps, panel, out),
            12 => self.pack_rows::<12>(steps, panel, out),
            8 => self.pack_rows::<8>(steps, panel, out),
            4 => self.pack_rows::<4>(steps, panel, out),
            width => {
                for (step, out) in steps.zip(out.chunks_exact_mut(width)) {
                    self.pack_row(step, panel, out);
                }
            }
        }
    }

    /// [`Right::pack`] for a width known at compile time.
    #[inline(always)]
    fn pack_rows<const WIDTH: usize>(&self, steps: Range<usize>, panel: Panel, out: &mut [f32]) {
        let (out, _) = out.as_chunks_mut::<WIDTH>();
        let out = &mut out[..steps.len()];
        if !self.transposed && panel.columns == WIDTH {
            for (step, out) in steps.zip(out) {
                *out = self.values.array(step * self.stride + panel.first);
            }
            return;
        }
        let mut start = steps.start;
        let mut rest = out;
        if self.transposed {
            let (lines, others) = rest.as_chunks_mut::<{ TURN[0] }>();
            for line in lines {
                self.turn(start, panel, line);
                start += TURN[0];
            }
            rest = others;
        }
        for (step, out) in (start..steps.end).zip(rest) {
            self.pack_row(step, panel, out);
        }
    }

    /// Some steps of [`Right::pack`] for values stored column by column.
    #[inline(always)]
    fn turn<const WIDTH: usize>(
        &self,
        start: usize,
        panel: Panel,
        out: &mut [[f32; WIDTH]; TURN[0]],
    ) {
        let column = |column: usize| -> [f32; TURN[0]] {
            if column < panel.columns {
                self.values
                    .array((panel.first + column) * self.stride + start)
            } else {
                [0.0; TURN[0]]
            }
        };
        for first in (0..WIDTH).step_by(TURN[1]) {
            let [a, b, c, d] = [
                column(first),
                column(first + 1),
                column(first + 2),
                column(first + 3),
            ];
            for (step, out) in out.iter_mut().enumerate() {
                let (parts, _) = out.as_chunks_mut::<{ TURN[1] }>();
                parts[first / TURN[1]] = [a[step], b[step], c[step], d[step]];
            }
        }
    }

    /// One step of [`Right::pack`].
    #[inline(always)]
    fn pack_row(&self, step: usize, panel: Panel, out: &mut [f32]) {
        let (out, beyond) = out.split_at_mut(panel.columns);
        if self.transposed {
            for (column, out) in out.iter_mut().enumerate() {
                let at = (panel.first + column) * self.stride + step;
                let [value] = self.values.array(at);
                *out = value;
            }
        } else {
            self.values.copy(step * self.stride + panel.first, out);
        }
        beyond.fill(0.0);
    }
}

/// How columns are cut into panels, and how many rows are multiplied with a panel at once.
#[derive(Clone, Copy)]
pub(crate) struct Panels {
    columns: usize,
    lanes: usize,
    /// Columns of a whole panel.
    pub(super) widest: usize,
    /// Rows of a whole tile.
    pub(crate) rows: usize,
}

/// Columns that are multiplied together: a whole number of vectors.
#[derive(Clone, Copy)]
pub(crate) struct Panel {
    /// The number of its first column. In a matrix cut into panels, this times the rows is its offset.
    pub(crate) first: usize,
    /// Columns without those that fill up the last vector.
    pub(crate) columns: usize,
    pub(crate) width: usize,
}

impl Panels {
    #[inline(always)]
    pub(crate) fn new<S: Simd>(columns: usize) -> Self {
        let [rows, vectors] = tile_size::<S>();
        Self {
            columns,
            lanes: S::F32_LANES,
            widest: vectors * S::F32_LANES,
            rows,
        }
    }

    /// Columns including those that fill up the last vector.
    pub(crate) fn width(self) -> usize {
        self.columns.next_multiple_of(self.lanes)
    }

    /// All panels, from the first column to the last.
    pub(crate) fn all(self) -> impl Iterator<Item = Panel> {
        (0..self.columns).step_by(self.widest).map(move |first| {
            let columns = self.widest.min(self.columns - first);
            Panel {
                first,
                columns,
                width: columns.next_multiple_of(self.lanes),
            }
        })
    }
}

/// [`Panels`] of this many columns.
pub(crate) struct PanelsOf(pub(crate) usize);

impl WithSimd for PanelsOf {
    type Output = Panels;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) -> Panels {
        Panels::new::<S>(self.0)
    }
}
