//! Matrix products for f32 on the CPU.
//!
//! The columns of the right matrix are packed into panels of a few vectors. The sums of a few rows of the
//! left matrix with one panel stay in registers while the product steps through the panel
//! ([Goto and van de Geijn 2008](https://doi.org/10.1145/1356052.1356053)). Weights of fewer
//! bits are widened as they are packed.

mod few;
mod panels;
mod tile;

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use self::few::FewRows;
pub(super) use self::panels::{Panel, Panels, PanelsOf, Right};
pub(super) use self::tile::{Left, Out, Start, add_products, multiply};
use self::tile::{pack_tiles, tile_size};
use super::weights::Slice;
use super::{instructions, with_scratch};

/// Steps of all panels processed in one go, so that a panel stays in the second-level cache.
const STEPS: usize = 1024;
/// Most floats of the left matrix that a task reads for all of its panels, for the same reason.
const LEFT: usize = 3 << 15;
/// Panels of a task that pay for packing its part of the left matrix: its rows lie far apart, often by a
/// power of two, and share a few sets of the cache.
const PANELS: usize = 8;
/// Most floats of packed panels to hold at once.
const PACKED: usize = 1 << 20;
/// Steps that one task packs.
const PACKED_STEPS: usize = 64;
/// Most floats of packed panels that one thread packs as fast as several would, and that stay in the
/// second-level cache.
const FEW: usize = 1 << 16;
/// Most rows of one task.
const TASK_ROWS: usize = 384;
/// Tasks per thread, so that threads finish at about the same time.
const TASKS_PER_THREAD: usize = 4;
/// Floats of which a part of a line of weights is a multiple: a line of the cache.
const LINE: usize = 16;
/// Most multiplications for which waking other threads does not pay.
const SMALL: usize = 1 << 19;

/// A block of a matrix, with a slice per row.
pub(super) struct Block<'a> {
    /// Its first row.
    pub(super) row: usize,
    /// Its first column.
    pub(super) column: usize,
    pub(super) rows: Vec<&'a mut [f32]>,
}

/// Cuts some columns of a matrix, whose rows are `width` long, into blocks of this many rows and columns;
/// the last ones may be smaller.
pub(super) fn blocks(
    matrix: &mut [f32],
    width: usize,
    columns: Range<usize>,
    [rows, columns_of_a_block]: [usize; 2],
) -> Vec<Block<'_>> {
    let mut blocks = Vec::new();
    for (number, lines) in matrix.chunks_mut(rows * width).enumerate() {
        let first = blocks.len();
        let columns_of_blocks = columns.clone().step_by(columns_of_a_block);
        blocks.extend(columns_of_blocks.map(|column| Block {
            row: number * rows,
            column,
            rows: Vec::with_capacity(rows.min(lines.len() / width)),
        }));
        for line in lines.chunks_mut(width) {
            let parts = line[columns.clone()].chunks_mut(columns_of_a_block);
            for (block, part) in blocks[first..].iter_mut().zip(parts) {
                block.rows.push(part);
            }
        }
    }
    blocks
}

/// Puts `left · right`, plus a row `bias`, into `out`.
///
/// # Shapes
/// `left` `[rows, steps]`, `right` `[steps, columns]`, `bias` `[columns]`, `out` `[rows, columns]`;
/// the first and the last are contiguous.
pub(super) fn product(
    left: &[f32],
    right: Right<'_>,
    bias: Option<&[f32]>,
    [steps, columns]: [usize; 2],
    out: &mut [f32],
) {
    if out.is_empty() {
        return;
    }
    let rows = out.len() / columns;
    let small = rows * columns * steps <= SMALL;
    let threads = if small {
        1
    } else {
        rayon::current_num_threads()
    };
    let product = Product {
        simd: instructions(),
        left,
        right,
        bias,
        size: [rows, steps, columns],
        threads,
    };
    // Packing transposes either all of the weights, or all of the rows and the result.
    if rows <= few::MOST_ROWS {
        product.few_rows(out);
    } else if right.transposed && rows * (steps + columns / 2) < columns * steps {
        product.by_columns(out);
    } else {
        product.by_rows(out);
    }
}

struct Product<'a> {
    simd: Arch,
    left: &'a [f32],
    right: Right<'a>,
    bias: Option<&'a [f32]>,
    /// Rows, steps, columns.
    size: [usize; 3],
    threads: usize,
}

impl Product<'_> {
    /// Multiplies few rows, without packing.
    fn few_rows(&self, out: &mut [f32]) {
        let [rows, steps, columns] = self.size;
        let (tasks, multiple) = match self.right.transposed {
            true => (TASKS_PER_THREAD * self.threads, LINE),
            // A task reads a part of each line of the weights.
            false => (self.threads, self.right.values.alignment().max(LINE)),
        };
        let width = columns.div_ceil(tasks).next_multiple_of(multiple);
        let room = few::room(&self.right, width.min(columns));
        let blocks = blocks(out, columns, 0..columns, [rows, width]);
        self.run(blocks, |block| {
            with_scratch(room, |room| {
                self.simd.dispatch(FewRows {
                    left: self.left,
                    right: self.right,
                    bias: self.bias,
                    steps,
                    block,
                    room,
                });
            });
        });
    }

    /// Multiplies rows with packed columns.
    fn by_rows(&self, out: &mut [f32]) {
        let [rows, all_steps, columns] = self.size;
        let panels = self.simd.dispatch(PanelsOf(columns));
        let round = self.round(panels);
        let block = self.block(rows, panels, columns.min(round[1]), round[0]);
        self.rounds(round, columns, |steps, now, packed| {
            self.pack(self.right, steps.clone(), now.clone(), packed);
            let packed = &*packed;
            let blocks = blocks(out, columns, now.clone(), block);
            self.run(blocks, |block| {
                let factors = Factors {
                    left: Slice::F32(self.left),
                    first: block.row * all_steps + steps.start,
                    stride: all_steps,
                    panels: &packed[(block.column - now.start) * steps.len()..],
                    steps: steps.len(),
                };
                let start = self.start(&steps, block.column);
                self.multiply(factors, start, block, false);
            });
        });
    }

    /// Multiplies columns, which are stored one after the other, with packed rows.
    fn by_columns(&self, out: &mut [f32]) {
        let [rows, all_steps, columns] = self.size;
        let panels = self.simd.dispatch(PanelsOf(rows));
        let left = Right {
            values: Slice::F32(self.left),
            stride: all_steps,
            transposed: true,
        };
        let round = self.round(panels);
        let [columns_of_a_task, _] = self.block(columns, panels, panels.widest, round[0]);
        self.rounds(round, rows, |steps, now, packed| {
            self.pack(left, steps.clone(), now.clone(), packed);
            let packed = &*packed;
            let out = &mut out[now.start * columns..now.end * columns];
            let blocks = blocks(out, columns, 0..columns, [now.len(), columns_of_a_task]);
            self.run(blocks, |block| {
                let factors = Factors {
                    left: self.right.values,
                    first: block.column * self.right.stride + steps.start,
                    stride: self.right.stride,
                    panels: packed,
                    steps: steps.len(),
                };
                let start = self.start(&steps, block.column);
                self.multiply(factors, start, block, true);
            });
        });
    }

    /// Calls `work` for some steps of some columns at a time, with room for their panels.
    fn rounds(
        &self,
        [steps, columns]: [usize; 2],
        all_columns: usize,
        mut work: impl FnMut(Range<usize>, Range<usize>, &mut [f32]),
    ) {
        let all_steps = self.size[1];
        with_scratch(steps * columns, |packed| {
            for first in (0..all_columns).step_by(columns) {
                let columns = first..all_columns.min(first + columns);
                for first in (0..all_steps.max(1)).step_by(steps.max(1)) {
                    let steps = first..all_steps.min(first + steps);
                    work(steps, columns.clone(), packed);
                }
            }
        });
    }

    /// Steps and columns of one round: about as many steps in each, whole panels, and whole blocks of packed weights.
    fn round(&self, panels: Panels) -> [usize; 2] {
        let (all, multiple) = (self.size[1], self.right.values.alignment());
        let steps = all.div_ceil(all.div_ceil(STEPS).max(1));
        let steps = steps.next_multiple_of(multiple);
        let columns = (PACKED / steps.max(1)).min(panels.width()).max(1);
        [steps, columns.next_multiple_of(panels.widest.max(multiple))]
    }

    /// What products of these steps are added to, from a column on.
    fn start(&self, steps: &Range<usize>, column: usize) -> Start<'_> {
        match self.bias {
            _ if steps.start > 0 => Start::Sums,
            None => Start::Zero,
            Some(bias) => Start::Bias(&bias[column..]),
        }
    }

    /// Packs some steps of columns of `right` into panels.
    fn pack(
        &self,
        right: Right<'_>,
        steps: Range<usize>,
        columns: Range<usize>,
        packed: &mut [f32],
    ) {
        let count = steps.len();
        let panels = self.simd.dispatch(PanelsOf(columns.len()));
        let steps_of_a_task = match right.transposed {
            true => PACKED_STEPS.max(right.values.alignment()),
            false => PACKED_STEPS,
        };
        let mut tasks = Vec::new();
        tasks.resize_with(count.div_ceil(steps_of_a_task), Vec::new);
        let parts = packed.chunks_mut((count * panels.widest).max(1));
        for (panel, packed) in panels.all().zip(parts) {
            let packed = packed[..count * panel.width].chunks_mut(steps_of_a_task * panel.width);
            for (task, out) in tasks.iter_mut().zip(packed) {
                task.push((panel, out));
            }
        }
        let room = right.values.room(match right.transposed {
            true => steps_of_a_task * panels.widest,
            false => columns.len(),
        });
        let pack = |(number, panels)| {
            let start = steps.start + number * steps_of_a_task;
            with_scratch(room, |room| {
                self.simd.dispatch(Pack {
                    right,
                    steps: start..steps.end.min(start + steps_of_a_task),
                    columns: columns.clone(),
                    panels,
                    room,
                });
            });
        };
        let tasks = tasks.into_iter().enumerate();
        if count * columns.len() <= FEW {
            tasks.for_each(pack);
        } else {
            self.run(tasks.collect(), pack);
        }
    }

    /// Rows and columns per task of this many steps: few panels, used for many rows, or few rows, if all
    /// panels stay in the cache; and enough tasks for all threads.
    fn block(&self, rows: usize, cut: Panels, columns: usize, steps: usize) -> [usize; 2] {
        let (widest, tile) = (cut.widest, cut.rows);
        let panels = columns.div_ceil(widest);
        let most = (LEFT / steps.max(1)).clamp(tile, TASK_ROWS);
        if self.threads == 1 {
            return [most.next_multiple_of(tile), panels * widest];
        }
        let wanted = TASKS_PER_THREAD * self.threads;
        let least = rows.div_ceil(most);
        let down = if steps * columns <= FEW {
            wanted.min(rows.div_ceil(tile)).max(least)
        } else {
            least
        };
        let across = wanted.div_ceil(down).clamp(1, panels);
        let down = wanted.div_ceil(across).max(down).min(rows.div_ceil(tile));
        [
            rows.div_ceil(down).next_multiple_of(tile),
            panels.div_ceil(across) * widest,
        ]
    }

    /// Multiplies one block, `turned` if its columns are the rows of the left factor.
    fn multiply(&self, factors: Factors<'_>, start: Start<'_>, block: Block<'_>, turned: bool) {
        let width = block.rows.first().map_or(0, |row| row.len());
        let [rows, columns] = match turned {
            true => [width, block.rows.len()],
            false => [block.rows.len(), width],
        };
        let cut = self.simd.dispatch(PanelsOf(columns));
        let packing = match factors.left {
            _ if columns >= PANELS * cut.widest => Packing::Tiles,
            Slice::F32(_) => Packing::None,
            Slice::F16(_) | Slice::BF16(_) | Slice::Packed(_) => Packing::Rows,
        };
        let len = match packing {
            Packing::Tiles => rows.next_multiple_of(cut.rows) * factors.steps,
            Packing::Rows => rows * factors.steps,
            Packing::None => 0,
        };
        let room = factors.left.room(cut.rows * factors.steps);
        with_scratch(len + room, |scratch| {
            let (packed, room) = scratch.split_at_mut(len);
            self.simd.dispatch(Task {
                factors,
                packing,
                packed,
                room,
                start,
                block,
                size: [rows, columns],
                turned,
            });
        });
    }

    /// Runs all tasks, on several threads if it pays.
    fn run<T: Send>(&self, tasks: Vec<T>, work: impl Fn(T) + Send + Sync) {
        if self.threads == 1 {
            tasks.into_iter().for_each(work);
        } else {
            tasks.into_par_iter().for_each(work);
        }
    }
}

/// Packs some steps of panels.
struct Pack<'a> {
    right: Right<'a>,
    steps: Range<usize>,
    /// Those of all panels, which count from the first of them.
    columns: Range<usize>,
    panels: Vec<(Panel, &'a mut [f32])>,
    /// For a window of packed weights.
    room: &'a mut [f32],
}

impl WithSimd for Pack<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, _simd: S) {
        let Self { right, room, .. } = self;
        let count = self.steps.len();
        if right.transposed {
            for (panel, out) in self.panels {
                let first = self.columns.start + panel.first;
                let columns = first..first + panel.columns;
                let window = right.window(columns, self.steps.clone(), room);
                window.pack(0..count, Panel { first: 0, ..panel }, out);
            }
            return;
        }
        // In memory order.
        for (number, step) in self.steps.enumerate() {
            let window = right.window(step..step + 1, self.columns.clone(), room);
            for (panel, out) in &mut self.panels {
                let out = &mut out[number * panel.width..][..panel.width];
                window.pack(0..1, *panel, out);
            }
        }
    }
}

/// What a block is the product of.
#[derive(Clone, Copy)]
struct Factors<'a> {
    /// The left matrix or, if turned, the columns of the right one: row after row, `stride` apart.
    left: Slice<'a>,
    /// Where the block's first row and step are.
    first: usize,
    stride: usize,
    /// The panels of the block, followed by the rest.
    panels: &'a [f32],
    /// Steps of the panels.
    steps: usize,
}

/// How the left factor of a block is copied before it is multiplied.
#[derive(Clone, Copy)]
enum Packing {
    /// Not at all.
    None,
    /// Row after row, as f32.
    Rows,
    /// In tiles ([`Left::Tiles`]).
    Tiles,
}

/// One block of a product.
struct Task<'a> {
    factors: Factors<'a>,
    packing: Packing,
    /// Room for the copy, and for a tile of packed weights.
    packed: &'a mut [f32],
    room: &'a mut [f32],
    /// From the block's first column on.
    start: Start<'a>,
    block: Block<'a>,
    /// Rows of the left factor, columns of the panels.
    size: [usize; 2],
    turned: bool,
}

impl WithSimd for Task<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            factors,
            packing,
            packed,
            room,
            start,
            mut block,
            size: [rows, columns],
            turned,
        } = self;
        let steps = factors.steps;
        let left = match (packing, factors.left) {
            (Packing::Tiles, left) => {
                let Factors { first, stride, .. } = factors;
                pack_tiles::<S>(left, first, stride, [rows, steps], packed, room);
                Left::Tiles {
                    values: packed,
                    rows: tile_size::<S>()[0],
                }
            }
            (Packing::None, Slice::F32(values)) => Left::Rows {
                values: &values[factors.first..],
                stride: factors.stride,
            },
            (_, values) => {
                for (row, out) in packed.chunks_exact_mut(steps.max(1)).enumerate() {
                    values.copy(factors.first + row * factors.stride, out);
                }
                Left::Rows {
                    values: packed,
                    stride: steps,
                }
            }
        };
        for panel in Panels::new::<S>(columns).all() {
            let packed = &factors.panels[panel.first * steps..][..panel.width * steps];
            let rows = &mut block.rows;
            let mut out = if turned {
                Out::Turned { rows, panel, start }
            } else {
                let start = start.from(panel.first);
                Out::Rows { rows, panel, start }
            };
            multiply(simd, left, packed, panel.width, &mut out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::for_each_instruction_set;

    /// Small whole numbers, so that sums of products are exact.
    fn numbers(len: usize, seed: usize) -> Vec<f32> {
        let number = |i: usize| ((i + seed) * 7919 % 17) as f32 - 8.0;
        (0..len).map(number).collect()
    }

    #[test]
    fn products_of_any_size_are_exact() {
        let sizes = [
            [1, 1, 1],
            [5, 3, 70],
            [6, 300, 64],
            [49, 257, 65],
            [13, 600, 333],
            [70, 1100, 200],
            [300, 1030, 1100],
            [530, 40, 321],
            [3, 0, 5],
            [0, 4, 5],
            [2, 1030, 70],
            [4, 2500, 43],
            [3, 19, 1100],
        ];
        for_each_instruction_set(|| sizes.map(products_of_a_size_are_exact));
    }

    fn products_of_a_size_are_exact([rows, steps, columns]: [usize; 3]) {
        let left = numbers(rows * steps, 1);
        let bias = numbers(columns, 3);
        for transposed in [false, true] {
            let values = numbers(steps * columns, 2);
            let right = |step: usize, column: usize| {
                values[if transposed {
                    column * steps + step
                } else {
                    step * columns + column
                }]
            };
            for bias in [None, Some(&*bias)] {
                let mut out = vec![f32::NAN; rows * columns];
                let matrix = Right {
                    values: Slice::F32(&values),
                    stride: if transposed { steps } else { columns },
                    transposed,
                };
                product(&left, matrix, bias, [steps, columns], &mut out);
                for (row, out) in out.chunks(columns).enumerate() {
                    for (column, &found) in out.iter().enumerate() {
                        let products =
                            (0..steps).map(|step| left[row * steps + step] * right(step, column));
                        let expected = products.sum::<f32>() + bias.map_or(0.0, |b| b[column]);
                        assert_eq!(
                            found,
                            expected,
                            "{rows} {steps} {columns} {transposed} {:?}",
                            instructions()
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn weights_of_half_precision_are_the_same_numbers() {
        // With few rows, with few packed, with many (and weights packed in tiles), and with weights packed in panels.
        for_each_instruction_set(|| [3, 7, 600].map(weights_of_half_precision_are_the_same));
    }

    fn weights_of_half_precision_are_the_same(rows: usize) {
        let [steps, columns] = [150, 130];
        let (left, values) = (numbers(rows * steps, 1), numbers(steps * columns, 2));
        let f16s: Vec<half::f16> = values.iter().map(|&x| half::f16::from_f32(x)).collect();
        let bf16s: Vec<half::bf16> = values.iter().map(|&x| half::bf16::from_f32(x)).collect();
        let slices = [Slice::F32(&values), Slice::F16(&f16s), Slice::BF16(&bf16s)];
        for transposed in [false, true] {
            let [expected, f16, bf16] = slices.map(|values| {
                let mut out = vec![f32::NAN; rows * columns];
                let right = Right {
                    values,
                    stride: if transposed { steps } else { columns },
                    transposed,
                };
                product(&left, right, None, [steps, columns], &mut out);
                out
            });
            assert_eq!(f16, expected, "{rows} {transposed}");
            assert_eq!(bf16, expected, "{rows} {transposed}");
        }
    }

    #[test]
    fn a_left_matrix_may_lie_step_after_step() {
        struct Both(Vec<f32>, Vec<f32>);
        impl WithSimd for Both {
            type Output = [Vec<f32>; 2];
            fn with_simd<S: Simd>(self, simd: S) -> [Vec<f32>; 2] {
                let Self(values, panel) = self;
                let width = S::F32_LANES;
                let [rows, steps] = [8, 5];
                let turned: Vec<f32> = (0..rows * steps)
                    .map(|i| values[i % steps * rows + i / steps])
                    .collect();
                let lefts = [
                    Left::Steps {
                        values: &values,
                        stride: rows,
                    },
                    Left::Rows {
                        values: &turned,
                        stride: steps,
                    },
                ];
                lefts.map(|left| {
                    let mut sums = vec![1.0; rows * width];
                    let mut out = Out::Sums {
                        sums: &mut sums,
                        stride: width,
                        start: Start::Sums,
                    };
                    multiply(simd, left, &panel[..steps * width], width, &mut out);
                    sums
                })
            }
        }
        for_each_instruction_set(|| {
            let both = Both(numbers(40, 1), numbers(5 * 16, 2));
            let [found, expected] = instructions().dispatch(both);
            assert_eq!(found, expected);
            assert!(found.iter().any(|&x| x != 1.0));
        });
    }

    #[test]
    fn blocks_cover_a_matrix() {
        let mut matrix = vec![0.0; 7 * 5];
        for Block { row, column, rows } in blocks(&mut matrix, 5, 0..5, [3, 2]) {
            for (i, values) in rows.into_iter().enumerate() {
                for (j, value) in values.iter_mut().enumerate() {
                    *value += ((row + i) * 5 + column + j) as f32;
                }
            }
        }
        let expected: Vec<f32> = (0..35).map(|i| i as f32).collect();
        assert_eq!(matrix, expected);
    }
}
