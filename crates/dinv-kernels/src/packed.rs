//! Matrices whose numbers have fewer bits than a float: 8-bit floats, and the blocks of ggml
//! ([llama.cpp](https://github.com/ggml-org/llama.cpp), `ggml-quants.c`). They are held as they are stored, and widened
//! for each product.

use burn::tensor::Tensor;
use half::f16;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

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

/// The types of ggml: a block of numbers, and how many bytes it has.
#[expect(missing_docs, reason = "ggml's names")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ggml {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
}

/// Numbers of a block of the older types, and of the "K" types.
const SHORT: usize = 32;
const LONG: usize = 256;

impl Ggml {
    /// The type that a file numbers so.
    pub fn numbered(number: u32) -> Option<Self> {
        Some(match number {
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            10 => Self::Q2K,
            11 => Self::Q3K,
            12 => Self::Q4K,
            13 => Self::Q5K,
            14 => Self::Q6K,
            _ => return None,
        })
    }

    /// Numbers and bytes of a block.
    pub fn block(self) -> [usize; 2] {
        match self {
            Self::Q4_0 => [SHORT, 18],
            Self::Q4_1 => [SHORT, 20],
            Self::Q5_0 => [SHORT, 22],
            Self::Q5_1 => [SHORT, 24],
            Self::Q8_0 => [SHORT, 34],
            Self::Q2K => [LONG, 84],
            Self::Q3K => [LONG, 110],
            Self::Q4K => [LONG, 144],
            Self::Q5K => [LONG, 176],
            Self::Q6K => [LONG, 210],
        }
    }

    /// Writes the numbers of a block to `out`, of as many numbers.
    #[inline(always)]
    fn unpack(self, block: &[u8], out: &mut [f32]) {
        match self {
            Self::Q4_0 => {
                let d = half_at(block, 0);
                for (i, &byte) in block[2..].iter().enumerate() {
                    out[i] = d * (f32::from(byte & 15) - 8.0);
                    out[i + 16] = d * (f32::from(byte >> 4) - 8.0);
                }
            }
            Self::Q4_1 => {
                let (d, m) = (half_at(block, 0), half_at(block, 2));
                for (i, &byte) in block[4..].iter().enumerate() {
                    out[i] = d * f32::from(byte & 15) + m;
                    out[i + 16] = d * f32::from(byte >> 4) + m;
                }
            }
            Self::Q5_0 => {
                let d = half_at(block, 0);
                fives(&block[2..], out, |q| d * (f32::from(q) - 16.0));
            }
            Self::Q5_1 => {
                let (d, m) = (half_at(block, 0), half_at(block, 2));
                fives(&block[4..], out, |q| d * f32::from(q) + m);
            }
            Self::Q8_0 => {
                let d = half_at(block, 0);
                for (out, &byte) in out.iter_mut().zip(&block[2..]) {
                    *out = d * f32::from(byte.cast_signed());
                }
            }
            Self::Q2K => unpack_q2k(block, out),
            Self::Q3K => unpack_q3k(block, out),
            Self::Q4K => unpack_q45k(block, &[], &block[16..], out),
            Self::Q5K => unpack_q45k(block, &block[16..48], &block[48..], out),
            Self::Q6K => unpack_q6k(block, out),
        }
    }
}

/// The f16 at a place, as f32.
#[inline(always)]
fn half_at(block: &[u8], place: usize) -> f32 {
    f16::from_le_bytes([block[place], block[place + 1]]).to_f32()
}

/// 32 numbers of 5 bits: a fifth bit for each in four bytes, then the lower four.
#[inline(always)]
fn fives(block: &[u8], out: &mut [f32], number: impl Fn(u8) -> f32) {
    let high = u32::from_le_bytes([block[0], block[1], block[2], block[3]]);
    let fifth = |i: usize| if high >> i & 1 == 1 { 16 } else { 0 };
    for (i, &byte) in block[4..].iter().enumerate() {
        out[i] = number(byte & 15 | fifth(i));
        out[i + 16] = number(byte >> 4 | fifth(i + 16));
    }
}

/// 16 scales and minima of 4 bits, 256 numbers of 2, and a scale of either.
#[inline(always)]
fn unpack_q2k(block: &[u8], out: &mut [f32]) {
    let (scales, numbers) = (&block[..16], &block[16..80]);
    let (d, least) = (half_at(block, 80), half_at(block, 82));
    for (group, out) in out.chunks_mut(16).enumerate() {
        let scale = d * f32::from(scales[group] & 15);
        let least = least * f32::from(scales[group] >> 4);
        // 128 numbers share 32 bytes: two groups of 16 for each pair of bits.
        let (half, within) = (group / 8, group % 8);
        let (shift, start) = (within / 2 * 2, half * 32 + within % 2 * 16);
        for (out, &byte) in out.iter_mut().zip(&numbers[start..start + 16]) {
            *out = scale * f32::from(byte >> shift & 3) - least;
        }
    }
}

/// A third bit for each of 256 numbers, their lower two, 16 scales of 6 bits, and a scale of these.
#[inline(always)]
fn unpack_q3k(block: &[u8], out: &mut [f32]) {
    let (high, numbers, packed) = (&block[..32], &block[32..96], &block[96..108]);
    let d = half_at(block, 108);
    for (group, out) in out.chunks_mut(16).enumerate() {
        let lower = match group < 8 {
            true => packed[group] & 15,
            false => packed[group - 8] >> 4,
        };
        let upper = packed[8 + group % 4] >> (group / 4 * 2) & 3;
        let scale = d * (f32::from(lower | upper << 4) - 32.0);
        let (half, within) = (group / 8, group % 8);
        let (shift, side) = (within / 2 * 2, within % 2 * 16);
        let bit = 1u8 << (half * 4 + within / 2);
        for (i, out) in out.iter_mut().enumerate() {
            let number = numbers[half * 32 + side + i] >> shift & 3;
            let less = if high[side + i] & bit == 0 { 4.0 } else { 0.0 };
            *out = scale * (f32::from(number) - less);
        }
    }
}

/// Two f16 that scale 8 scales and 8 minima of 6 bits, which are packed in 12 bytes; then 256 numbers of 4
/// bits, or with a fifth in `high`.
#[inline(always)]
fn unpack_q45k(block: &[u8], high: &[u8], numbers: &[u8], out: &mut [f32]) {
    let (d, least) = (half_at(block, 0), half_at(block, 2));
    let packed = &block[4..16];
    for (group, out) in out.chunks_mut(32).enumerate() {
        let [scale, minimum] = match group < 4 {
            true => [packed[group] & 63, packed[group + 4] & 63],
            false => [
                packed[group + 4] & 15 | packed[group - 4] >> 6 << 4,
                packed[group + 4] >> 4 | packed[group] >> 6 << 4,
            ],
        };
        let (scale, minimum) = (d * f32::from(scale), least * f32::from(minimum));
        let bytes = &numbers[group / 2 * 32..][..32];
        let shift = group % 2 * 4;
        for (i, out) in out.iter_mut().enumerate() {
            let fifth = high.get(i).map_or(0, |byte| byte >> group & 1);
            *out = scale * f32::from(bytes[i] >> shift & 15 | fifth << 4) - minimum;
        }
    }
}

/// The lower four bits of 256 numbers, their upper two, 16 scales of 8 bits, and a scale of these.
#[inline(always)]
fn unpack_q6k(block: &[u8], out: &mut [f32]) {
    let (lower, upper, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half_at(block, 208);
    for (group, out) in out.chunks_mut(16).enumerate() {
        let scale = d * f32::from(scales[group].cast_signed());
        let (half, within) = (group / 8, group % 8);
        let (row, side) = (within / 2, within % 2 * 16);
        let lower = &lower[half * 64 + row % 2 * 32 + side..][..16];
        let upper = &upper[half * 32 + side..][..16];
        for (out, (&low, &high)) in out.iter_mut().zip(lower.iter().zip(upper)) {
            let number = low >> (row / 2 * 4) & 15 | (high >> (row * 2) & 3) << 4;
            *out = scale * (f32::from(number) - 32.0);
        }
    }
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
        self.widen(bytes, &mut out);
        out
    }

    /// Puts the numbers of whole blocks into `out`, on all threads.
    fn widen(self, bytes: &[u8], out: &mut [f32]) {
        let [numbers, size] = self.block();
        let table: [f32; 256] = match self {
            Self::F8E4M3(scale) => std::array::from_fn(|byte| from_e4m3(byte as u8) * scale),
            Self::F8E5M2(scale) => std::array::from_fn(|byte| from_e5m2(byte as u8) * scale),
            Self::Ggml(_) => [0.0; 256],
        };
        let blocks = TASK.div_ceil(numbers);
        let parts = out.par_chunks_mut(blocks * numbers);
        let simd = instructions();
        parts
            .zip(bytes.par_chunks(blocks * size))
            .for_each(|(out, bytes)| match self {
                Self::Ggml(kind) => simd.dispatch(Unpack { kind, bytes, out }),
                Self::F8E4M3(_) | Self::F8E5M2(_) => {
                    for (out, &byte) in out.iter_mut().zip(bytes) {
                        *out = table[usize::from(byte)];
                    }
                }
            });
    }
}

/// Unpacks blocks.
struct Unpack<'a> {
    kind: Ggml,
    bytes: &'a [u8],
    out: &'a mut [f32],
}

impl WithSimd for Unpack<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) {
        let [numbers, size] = self.kind.block();
        let blocks = self.bytes.chunks_exact(size);
        for (block, out) in blocks.zip(self.out.chunks_exact_mut(numbers)) {
            self.kind.unpack(block, out);
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

    /// Puts its numbers into `out`.
    pub(super) fn widen(&self, out: &mut [f32]) {
        self.packing.widen(&self.bytes, out);
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
fn from_e4m3(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let size = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * (-9f32).exp2(),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if byte >> 7 == 1 { -size } else { size }
}

/// The upper half of an f16.
fn from_e5m2(byte: u8) -> f32 {
    f16::from_bits(u16::from(byte) << 8).to_f32()
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

    #[test]
    fn a_packed_matrix_multiplies_as_its_numbers_do() {
        let [rows, d_in, d_out] = [7, 2 * SHORT, 45];
        let packed = Arc::new(Packed::q8(&numbers(d_out * d_in), [d_out, d_in]).unwrap());
        let dense = Matrix::from(packed.dense());
        let run = |weight: Matrix| {
            let x = tensor(numbers(rows * d_in), [rows, d_in]);
            let x = x.autodiff().require_grad();
            let y = linear(x.clone(), weight, None);
            let factors = tensor(numbers(rows * d_out), [rows, d_out]);
            let grads = (y.clone() * factors).sum().backward();
            let grad = x.grad(&grads).unwrap();
            [y.inner().into_data(), grad.into_data()]
        };
        let packed = Matrix::Packed(packed);
        assert!(packed.size() * 3 < dense.size() && packed.dims() == dense.dims());
        assert_eq!(run(packed), run(dense));
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
