//! Scales, shifts and gates of transformers, which depend on the network's other inputs, on the CPU.

use burn::tensor::Tensor;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::gradient::with_gradient;
use super::{Kernel, Values, for_chunks, instructions, tensor, zeros};

/// Columns that one task sums.
const COLUMNS: usize = 256;

/// `x · factor + addend`, with a row of `factor` for every row of the batch, and one or all of `addend`.
///
/// # Shapes
/// `x` `[b, n, d]`, `factor` `[b, 1, d]`, `addend` `[b, 1, d]` or `[b, n, d]`.
pub fn multiply_add(x: Tensor<3>, factor: Tensor<3>, addend: Tensor<3>) -> Tensor<3> {
    let tracked = [&factor, &addend].map(Tensor::is_tracked);
    with_gradient([x, factor, addend], |[x, factor, addend]| {
        let shape @ [b, n, d] = x.dims();
        let every_row = addend.dims()[1] == n;
        let [x, factor, addend] = [x, factor, addend].map(Values::of);
        let mut out = zeros(b * n * d);
        let kernel = MultiplyAdd {
            x: x.as_slice(),
            factor: factor.as_slice(),
            addend: Some(addend.as_slice()),
            n,
            every_row,
        };
        for_chunks(&mut out, d, &kernel);
        let x = tracked[0].then_some(x); // only the factor's gradient needs it
        let backward = move |grad: Tensor<3>| {
            let values = Values::of(grad.clone());
            let rows = values.as_slice();
            let mut out = zeros(b * n * d);
            let kernel = MultiplyAdd {
                x: rows,
                factor: factor.as_slice(),
                addend: None,
                n,
                every_row,
            };
            for_chunks(&mut out, d, &kernel);
            let summed = |with: Option<&[f32]>, tracked: bool| {
                let mut out = zeros(b * d);
                if tracked {
                    sums(rows, with, [n, d], &mut out);
                }
                tensor(out, [b, 1, d])
            };
            let addend_grad = match every_row {
                true => grad,
                false => summed(None, tracked[1]),
            };
            let factor_grad = summed(x.as_ref().map(Values::as_slice), tracked[0]);
            [tensor(out, shape), factor_grad, addend_grad]
        };
        (tensor(out, shape), backward)
    })
}

struct MultiplyAdd<'a> {
    x: &'a [f32],
    factor: &'a [f32],
    addend: Option<&'a [f32]>,
    /// Rows that share a factor.
    n: usize,
    /// Whether each row has an addend of its own.
    every_row: bool,
}

impl Kernel for MultiplyAdd<'_> {
    #[inline(always)]
    fn run(&self, row: usize, out: &mut [f32]) {
        let d = out.len();
        let image = row / self.n;
        let x = &self.x[row * d..][..d];
        let factor = &self.factor[image * d..][..d];
        match self.addend {
            Some(addend) => {
                let row = if self.every_row { row } else { image };
                let addend = &addend[row * d..][..d];
                for i in 0..d {
                    out[i] = x[i] * factor[i] + addend[i];
                }
            }
            None => {
                for i in 0..d {
                    out[i] = x[i] * factor[i];
                }
            }
        }
    }
}

/// Sums `rows`, or their products with another matrix, over the `n` rows of every image.
///
/// # Shapes
/// `rows` and `with` `[b, n, d]`, `out` `[b, d]`, zeros.
fn sums(rows: &[f32], with: Option<&[f32]>, [n, d]: [usize; 2], out: &mut [f32]) {
    let simd = instructions();
    for (image, out) in out.chunks_exact_mut(d).enumerate() {
        let parts = out.par_chunks_mut(COLUMNS).enumerate();
        parts.for_each(|(part, out)| {
            let first = image * n * d + part * COLUMNS;
            simd.dispatch(Sums {
                rows: &rows[first..],
                with: with.map(|with| &with[first..]),
                size: [n, d],
                out,
            });
        });
    }
}

struct Sums<'a> {
    rows: &'a [f32],
    with: Option<&'a [f32]>,
    size: [usize; 2],
    out: &'a mut [f32],
}

impl WithSimd for Sums<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) {
        let ([n, d], width) = (self.size, self.out.len());
        for row in 0..n {
            let values = &self.rows[row * d..][..width];
            match self.with {
                Some(with) => {
                    let with = &with[row * d..][..width];
                    for i in 0..width {
                        self.out[i] += values[i] * with[i];
                    }
                }
                None => {
                    for (out, value) in self.out.iter_mut().zip(values) {
                        *out += value;
                    }
                }
            }
        }
    }
}
