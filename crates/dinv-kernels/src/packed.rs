//! Matrices whose numbers have fewer bits than a float: 8-bit floats, and the blocks of ggml. They are held as they are
//! stored, and widened part by part as a product packs them.

mod ggml;

use burn::tensor::Tensor;
use half::f16;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

pub use self::ggml::Ggml;
use self::ggml::{LONG, SHORT};
use super::weights::float;
use super::{TASK, instructions, tensor, zeros};

/// How numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Packing {
    /// 1 sign, 4 exponent and 3 mantissa bits without infinities (E4M3FN), times a scale.
    F8E4M3(f32),
    /// 1 sign, 5 exponent and 2 mantissa bits, times a scale.
    F8E5M2(f32),
    /// Blocks of ggml.
    Ggml(Ggml),
}

impl Packing {
    /// Numbers and bytes of a block; an 8-bit float is one by itself.
    pub fn block(self) -> [usize; 2] {
        match self {
            Self::F8E4M3(_) | Self::F8E5M2(_) => [1, 1],
            Self::Ggml(kind) => kind.block(),
        }
    }

    /// The numbers as f32. What is cut off of a block is left out.
    pub fn widened(self, bytes: &[u8]) -> Vec<f32> {
        let [numbers, size] = self.block();
        let mut out = zeros(bytes.len() / size * numbers);
        let blocks = TASK.div_ceil(numbers);
        let parts = out.par_chunks_mut(blocks * numbers);
        let simd = instructions();
        parts
            .zip(bytes.par_chunks(blocks * size))
            .for_each(|(out, bytes)| simd.dispatch(Unpack::new(self, bytes, 0, out)));
        out
    }

    /// Writes the numbers of whole blocks to `out`.
    #[inline(always)]
    fn unpack(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Self::F8E4M3(scale) => {
                for (out, &byte) in out.iter_mut().zip(bytes) {
                    *out = from_e4m3(byte) * scale;
                }
            }
            Self::F8E5M2(scale) => {
                for (out, &byte) in out.iter_mut().zip(bytes) {
                    *out = from_e5m2(byte) * scale;
                }
            }
            Self::Ggml(kind) => kind.unpack(bytes, out),
        }
    }
}

/// Unpacks some numbers of blocks.
struct Unpack<'a> {
    packing: Packing,
    /// From the first block on that has one of the numbers.
    bytes: &'a [u8],
    /// Numbers of that block to leave out.
    skipped: usize,
    out: &'a mut [f32],
}

impl<'a> Unpack<'a> {
    /// As many numbers as `out` takes, from one on.
    fn new(packing: Packing, bytes: &'a [u8], start: usize, out: &'a mut [f32]) -> Self {
        let [numbers, size] = packing.block();
        Self {
            packing,
            bytes: &bytes[start / numbers * size..],
            skipped: start % numbers,
            out,
        }
    }

    /// Copies numbers from the inside of the first block.
    #[inline(always)]
    fn part(packing: Packing, block: &[u8], skipped: usize, out: &mut [f32]) {
        let mut whole = [0.0; LONG];
        let [numbers, size] = packing.block();
        packing.unpack(&block[..size], &mut whole[..numbers]);
        out.copy_from_slice(&whole[skipped..][..out.len()]);
    }
}

impl WithSimd for Unpack<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) {
        let [numbers, size] = self.packing.block();
        let (mut bytes, mut out) = (self.bytes, self.out);
        if self.skipped > 0 {
            let begun = out.len().min(numbers - self.skipped);
            let (first, rest) = out.split_at_mut(begun);
            Self::part(self.packing, bytes, self.skipped, first);
            (bytes, out) = (&bytes[size..], rest);
        }
        let blocks = out.len() / numbers;
        let (whole, rest) = out.split_at_mut(blocks * numbers);
        self.packing.unpack(&bytes[..blocks * size], whole);
        if !rest.is_empty() {
            Self::part(self.packing, &bytes[blocks * size..], 0, rest);
        }
    }
}

/// A matrix whose rows are whole blocks.
#[derive(Debug)]
pub struct Packed {
    packing: Packing,
    bytes: Vec<u8>,
    shape: [usize; 2],
}

impl Packed {
    /// How [`q8`](Self::q8) packs.
    pub const Q8: Packing = Packing::Ggml(Ggml::Q8_0);

    /// A matrix of these bytes, row by row, if they are as many as its numbers need.
    pub fn new(packing: Packing, bytes: Vec<u8>, shape: [usize; 2]) -> Option<Self> {
        let [numbers, size] = packing.block();
        let [rows, columns] = shape;
        let fits =
            columns.is_multiple_of(numbers) && bytes.len() == rows * (columns / numbers) * size;
        fits.then_some(Self {
            packing,
            bytes,
            shape,
        })
    }

    /// The nearest matrix in blocks of 32 numbers with 8 bits and a common scale (Q8_0), if its rows are whole blocks.
    pub fn q8(values: &[f32], shape: [usize; 2]) -> Option<Self> {
        let [_, size] = Self::Q8.block();
        if !shape[1].is_multiple_of(SHORT) {
            return None;
        }
        let mut bytes = vec![0; values.len() / SHORT * size];
        (bytes.par_chunks_exact_mut(size))
            .zip(values.par_chunks_exact(SHORT))
            .with_min_len(TASK / SHORT)
            .for_each(|(block, values)| pack_q8(values, block));
        Self::new(Self::Q8, bytes, shape)
    }

    /// Rows and columns.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// The bytes that it takes.
    pub fn size(&self) -> usize {
        self.bytes.len()
    }

    /// Its numbers.
    pub fn dense(&self) -> Tensor<2> {
        tensor(self.packing.widened(&self.bytes), self.shape)
    }

    /// Copies its numbers, row after row, from `start` on to `out`, as many as fit.
    pub(super) fn copy(&self, start: usize, out: &mut [f32]) {
        instructions().dispatch(Unpack::new(self.packing, &self.bytes, start, out));
    }
}

/// As ggml's `quantize_row_q8_0_ref`: the largest number is 127 times the scale.
fn pack_q8(values: &[f32], block: &mut [u8]) {
    let largest = values
        .iter()
        .fold(0f32, |largest, value| largest.max(value.abs()));
    let scale = largest / 127.0;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    block[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
    for (byte, value) in block[2..].iter_mut().zip(values) {
        #[expect(clippy::cast_possible_truncation, reason = "from -127 to 127")]
        let number = (value * inverse).round() as i8;
        *byte = number.cast_unsigned();
    }
}

/// Without infinities: all ones is no number (Micikevicius et al. 2022, arXiv 2209.05433).
#[inline(always)]
fn from_e4m3(byte: u8) -> f32 {
    /// 2¹²⁰, the difference of the exponents' biases.
    const REBIAS: f32 = f32::from_bits((127 + 120) << 23);
    let (sign, size) = (u32::from(byte >> 7) << 31, u32::from(byte & 0x7f));
    let finite = f32::from_bits(size << 20) * REBIAS;
    let size = if size == 0x7f { f32::NAN } else { finite };
    f32::from_bits(size.to_bits() | sign)
}

/// The upper half of an f16.
#[inline(always)]
fn from_e5m2(byte: u8) -> f32 {
    float(f16::from_bits(u16::from(byte) << 8))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::conv::{Matrix, linear};
    use crate::for_each_instruction_set;

    #[test]
    fn floats_of_8_bits_are_what_the_papers_tables_say() {
        for (byte, number) in [
            (0x00, 0.0),
            (0x01, 2f32.powi(-9)),
            (0x07, 7.0 * 2f32.powi(-9)),
            (0x08, 2f32.powi(-6)),
            (0x38, 1.0),
            (0xb8, -1.0),
            (0x7e, 448.0),
        ] {
            assert_eq!(from_e4m3(byte), number, "{byte:x}");
        }
        assert!(from_e4m3(0x7f).is_nan() && from_e4m3(0xff).is_nan());
        for (byte, number) in [(0x01, 2f32.powi(-16)), (0x3c, 1.0), (0x7b, 57344.0)] {
            assert_eq!(from_e5m2(byte), number, "{byte:x}");
        }
        assert_eq!(from_e5m2(0xfc), f32::NEG_INFINITY);
        assert_eq!(Packing::F8E4M3(0.5).widened(&[0x38, 0x7e]), [0.5, 224.0]);
    }

    /// Numbers between −1 and 1.
    fn numbers(count: usize) -> Vec<f32> {
        (0..count).map(|i| (i as f32 * 0.7).sin()).collect()
    }

    #[test]
    fn numbers_of_8_bits_are_near_and_packed_again_the_same() {
        let values = numbers(3 * 2 * SHORT);
        for_each_instruction_set(|| {
            let packed = Packed::q8(&values, [3, 2 * SHORT]).unwrap();
            assert_eq!(packed.size(), 3 * 2 * 34);
            let wide = packed.packing.widened(&packed.bytes);
            for (block, values) in wide.chunks(SHORT).zip(values.chunks(SHORT)) {
                let largest = values
                    .iter()
                    .fold(0f32, |most, value| most.max(value.abs()));
                for (found, value) in block.iter().zip(values) {
                    let bound = largest / 127.0 * 0.5 + largest * 1e-3; // half a step, and the scale's rounding
                    assert!((found - value).abs() <= bound, "{found} {value}");
                }
            }
            let again = Packed::q8(&wide, packed.shape()).unwrap();
            assert_eq!(again.bytes, packed.bytes);
        });
        let nothing = Packed::q8(&[0.0; SHORT], [1, SHORT]).unwrap();
        assert_eq!(nothing.packing.widened(&nothing.bytes), [0.0; SHORT]);
        assert!(Packed::q8(&values, [6, 31]).is_none());
        assert!(Packed::new(Packing::Ggml(Ggml::Q8_0), vec![0; 33], [1, 32]).is_none());
    }

    /// A matrix of small whole numbers or eighths, so that sums of products are exact.
    fn exact(packing: Packing, shape: [usize; 2]) -> Arc<Packed> {
        let [numbers, size] = packing.block();
        let mut bytes: Vec<u8> = (0..shape[0] * shape[1] / numbers * size)
            .map(|i| match packing {
                Packing::Ggml(_) => (i * 7919 % 251) as u8,
                Packing::F8E4M3(_) | Packing::F8E5M2(_) => (0x38 + i * 7919 % 13) as u8,
            })
            .collect();
        let one = f16::ONE.to_le_bytes();
        for block in bytes.chunks_exact_mut(size) {
            match packing {
                Packing::Ggml(Ggml::Q8_0) => block[..2].copy_from_slice(&one),
                Packing::Ggml(Ggml::Q6K) => block[208..].copy_from_slice(&one),
                Packing::Ggml(_) => block[..4].copy_from_slice(&[one, one].concat()),
                Packing::F8E4M3(_) | Packing::F8E5M2(_) => {}
            }
        }
        Arc::new(Packed::new(packing, bytes, shape).unwrap())
    }

    /// With few rows, with many, and with rows and columns that are not cut at blocks.
    #[test]
    fn a_packed_matrix_multiplies_as_its_numbers_do() {
        let short = [Packing::Ggml(Ggml::Q8_0), Packing::F8E4M3(0.5)];
        let long = [
            Packing::Ggml(Ggml::Q4K),
            Packing::Ggml(Ggml::Q5K),
            Packing::Ggml(Ggml::Q6K),
        ];
        for_each_instruction_set(|| {
            for packing in short {
                for size in [
                    [7, 64, 45],
                    [2, 1120, 1500],
                    [150, 1120, 300],
                    [600, 96, 70],
                ] {
                    multiplies_as_its_numbers_do(packing, size);
                }
            }
            for packing in long {
                for size in [[2, 768, 45], [40, 1280, 1100], [300, 256, 130]] {
                    multiplies_as_its_numbers_do(packing, size);
                }
            }
        });
    }

    fn multiplies_as_its_numbers_do(packing: Packing, [rows, d_in, d_out]: [usize; 3]) {
        let packed = exact(packing, [d_out, d_in]);
        let dense = Matrix::from(packed.dense());
        let whole = |len: usize| (0..len).map(|i| (i * 31 % 7) as f32 - 3.0).collect();
        let run = |weight: Matrix| {
            let x = tensor(whole(rows * d_in), [rows, d_in]);
            let x = x.autodiff().require_grad();
            let y = linear(x.clone(), weight, None);
            let factors = tensor(whole(rows * d_out), [rows, d_out]);
            let grads = (y.clone() * factors).sum().backward();
            let grad = x.grad(&grads).unwrap();
            [y.inner().into_data(), grad.into_data()]
        };
        let packed = Matrix::Packed(packed);
        assert!(packed.size() * 3 < dense.size() && packed.dims() == dense.dims());
        let found = run(packed);
        assert_eq!(found, run(dense), "{packing:?} {rows} {d_in} {d_out}");
        assert!(
            found
                .iter()
                .all(|numbers| numbers.iter::<f32>().any(|x| x != 0.0))
        );
    }

    /// Wherever a part starts and ends.
    #[test]
    fn any_part_of_a_matrix_can_be_copied() {
        let packings = [Packing::Ggml(Ggml::Q4K), Packed::Q8, Packing::F8E5M2(2.0)];
        for packing in packings {
            let packed = exact(packing, [2, 512]);
            let all = packing.widened(&packed.bytes);
            for start in [0, 1, 31, 32, 255, 256, 300, 767] {
                for len in [0, 1, 31, 64, 100, 256] {
                    let mut out = vec![f32::NAN; len];
                    packed.copy(start, &mut out);
                    assert_eq!(out, all[start..][..len], "{packing:?} {start} {len}");
                }
            }
        }
    }

    /// Over several tasks, the numbers of each block are where they belong.
    #[test]
    fn large_matrices_are_widened_in_order() {
        let [rows, columns] = [130, 512];
        let values = numbers(rows * columns);
        let whole = Packed::q8(&values, [rows, columns]).unwrap();
        let wide = whole.packing.widened(&whole.bytes);
        for row in [0, 31, 32, 33, 129] {
            let alone = &values[row * columns..][..columns];
            let alone = Packed::q8(alone, [1, columns]).unwrap();
            let alone = alone.packing.widened(&alone.bytes);
            assert_eq!(wide[row * columns..][..columns], alone, "{row}");
        }
    }
}
