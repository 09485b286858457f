//! Matrix products for f32 on the CPU.
//!
//! The columns of the right matrix are packed into panels of a few vectors. The sums of a few rows of the
//! left matrix with one panel stay in registers while the product steps through the panel
//! ([Goto and van de Geijn 2008](https://doi.org/10.1145/1356052.1356053)). Weights of half
//! precision are converted as they are packed.

mod panels;
mod tile;

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

pub(super) use self::panels::{Panel, Panels, PanelsOf, Right};
pub(super) use self::tile::{Left, Out, Start, multiply};
use super::half::Slice;
use super::{instructions, with_scratch};

/// Steps of a panel processed in one go, so that they stay in the second-level cache.
const STEPS: usize = 1024;
/// Most floats of packed panels to hold at once.
const PACKED: usize = 1 << 20;
/// Steps that one task packs.
const PACKED_STEPS: usize = 64;
/// Most floats of packed panels that one thread packs as fast as several would, and that stay in the
/// second-level cache.
const FEW: usize = 1 << 16;
/// Rows of one task.
const TASK_ROWS: usize = 384;
/// Tasks per thread, so that threads finish at about the same time.
const TASKS_PER_THREAD: usize = 4;
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
    if right.transposed && rows * (steps + columns / 2) < columns * steps {
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
    /// Multiplies rows with packed columns.
    fn by_rows(&self, out: &mut [f32]) {
        let [rows, steps, columns] = self.size;
        let panels = self.simd.dispatch(PanelsOf(columns));
        let round = round(panels, steps);
        let block = self.block(rows, panels, columns.min(round));
        with_scratch(steps * panels.width().min(round), |packed| {
            for first in (0..columns).step_by(round) {
                let now = first..columns.min(first + round);
                self.pack(self.right, now.clone(), packed);
                let packed = &*packed;
                let blocks = blocks(out, columns, now, block);
                self.run(blocks, |block| {
                    self.simd.dispatch(Task {
                        left: &self.left[block.row * steps..],
                        packed: &packed[(block.column - first) * steps..],
                        bias: self.bias.map(|bias| &bias[block.column..]),
                        steps,
                        block,
                        turned: false,
                    });
                });
            }
        });
    }

    /// Multiplies columns, which are stored one after the other, with packed rows.
    fn by_columns(&self, out: &mut [f32]) {
        let [rows, steps, columns] = self.size;
        let panels = self.simd.dispatch(PanelsOf(rows));
        let left = Right {
            values: Slice::F32(self.left),
            stride: steps,
            transposed: true,
        };
        let round = round(panels, steps);
        let [columns_of_a_task, _] = self.block(columns, panels, panels.widest);
        with_scratch(steps * panels.width().min(round), |packed| {
            for (number, out) in out.chunks_mut(round * columns).enumerate() {
                let first = number * round;
                let now = first..first + out.len() / columns;
                self.pack(left, now.clone(), packed);
                let packed = &*packed;
                let blocks = blocks(out, columns, 0..columns, [now.len(), columns_of_a_task]);
                self.run(blocks, |block| {
                    let start = block.column * self.right.stride;
                    let len = block.rows.first().map_or(0, |row| row.len()) * steps;
                    let work = |weights: &[f32]| {
                        self.simd.dispatch(Task {
                            left: weights,
                            packed,
                            bias: self.bias.map(|bias| &bias[block.column..]),
                            steps,
                            block,
                            turned: true,
                        });
                    };
                    match self.right.values {
                        Slice::F32(values) => work(&values[start..]),
                        values => with_scratch(len, |weights| {
                            self.simd.dispatch(Widen {
                                values,
                                start,
                                weights,
                            });
                            work(weights);
                        }),
                    }
                });
            }
        });
    }

    /// Packs columns of `right` into panels.
    fn pack(&self, right: Right<'_>, columns: Range<usize>, packed: &mut [f32]) {
        let [_, steps, _] = self.size;
        let panels = self.simd.dispatch(PanelsOf(columns.len()));
        let mut tasks = Vec::new();
        tasks.resize_with(steps.div_ceil(PACKED_STEPS), Vec::new);
        let parts = packed.chunks_mut((steps * panels.widest).max(1));
        for (panel, packed) in panels.all().zip(parts) {
            let packed = packed[..steps * panel.width].chunks_mut(PACKED_STEPS * panel.width);
            let first = columns.start + panel.first;
            for (task, out) in tasks.iter_mut().zip(packed) {
                task.push((Panel { first, ..panel }, out));
            }
        }
        let pack = |(number, panels)| {
            let start = number * PACKED_STEPS;
            self.simd.dispatch(Pack {
                right,
                start,
                panels,
            });
        };
        let tasks = tasks.into_iter().enumerate();
        if steps * columns.len() <= FEW {
            tasks.for_each(pack);
        } else {
            self.run(tasks.collect(), pack);
        }
    }

    /// Rows and columns per task: few panels, used for many rows, or few rows, if all panels stay in the
    /// cache; and enough tasks for all threads.
    fn block(&self, rows: usize, cut: Panels, columns: usize) -> [usize; 2] {
        let (widest, tile) = (cut.widest, cut.rows);
        let panels = columns.div_ceil(widest);
        if self.threads == 1 {
            return [rows, panels * widest];
        }
        let wanted = TASKS_PER_THREAD * self.threads;
        let down = if self.size[1] * columns <= FEW {
            (wanted.min(rows.div_ceil(tile))).max(rows.div_ceil(TASK_ROWS))
        } else {
            rows.div_ceil(TASK_ROWS)
        };
        let across = wanted.div_ceil(down).clamp(1, panels);
        let down = wanted.div_ceil(across).max(down).min(rows.div_ceil(tile));
        [
            rows.div_ceil(down).next_multiple_of(tile),
            panels.div_ceil(across) * widest,
        ]
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

/// Columns of one round in whole panels, which bounds the packed floats.
fn round(panels: Panels, steps: usize) -> usize {
    let columns = PACKED / steps.max(1);
    columns.max(1).next_multiple_of(panels.widest)
}

/// Packs some steps of panels.
struct Pack<'a> {
    right: Right<'a>,
    start: usize,
    panels: Vec<(Panel, &'a mut [f32])>,
}

impl WithSimd for Pack<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, _simd: S) {
        if self.right.transposed {
            for (panel, out) in self.panels {
                let steps = self.start..self.start + out.len() / panel.width;
                self.right.pack(steps, panel, out);
            }
            return;
        }
        // In memory order.
        for number in 0..PACKED_STEPS {
            let step = self.start + number;
            for (panel, out) in &mut self.panels {
                if let Some(out) = out.chunks_exact_mut(panel.width).nth(number) {
                    self.right.pack(step..step + 1, *panel, out);
                }
            }
        }
    }
}

/// Converts weights.
struct Widen<'a> {
    values: Slice<'a>,
    start: usize,
    weights: &'a mut [f32],
}

impl WithSimd for Widen<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) {
        self.values.copy(self.start, self.weights);
    }
}

/// One block of a product.
struct Task<'a> {
    /// The rows of the block (its columns, if `turned`), followed by the rest.
    left: &'a [f32],
    /// The panels of the block, followed by the rest.
    packed: &'a [f32],
    /// The bias of the block's columns, followed by the rest.
    bias: Option<&'a [f32]>,
    steps: usize,
    block: Block<'a>,
    turned: bool,
}

impl WithSimd for Task<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            left,
            packed,
            bias,
            steps,
            mut block,
            turned,
        } = self;
        let width = block.rows.first().map_or(0, |row| row.len());
        let columns = if turned { block.rows.len() } else { width };
        for panel in Panels::new::<S>(columns).all() {
            let packed = &packed[panel.first * steps..][..panel.width * steps];
            for first in (0..steps.max(1)).step_by(STEPS) {
                let now = first..steps.min(first + STEPS);
                let start = match bias {
                    _ if first > 0 => Start::Sums,
                    None => Start::Zero,
                    Some(bias) if turned => Start::Bias(bias),
                    Some(bias) => Start::Bias(&bias[panel.first..]),
                };
                let rows = &mut block.rows;
                let mut out = if turned {
                    Out::Turned { rows, panel, start }
                } else {
                    Out::Rows { rows, panel, start }
                };
                let packed = &packed[now.start * panel.width..now.end * panel.width];
                let left = Left::Rows {
                    values: &left[first..],
                    stride: steps,
                };
                multiply(simd, left, packed, panel.width, &mut out);
            }
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
        // With rows packed, and with weights packed.
        for_each_instruction_set(|| [7, 300].map(weights_of_half_precision_are_the_same));
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
