//! The blocks of ggml ([llama.cpp](https://github.com/ggml-org/llama.cpp), `ggml-quants.c`).

use half::f16;

use crate::weights::float;

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
pub(super) const SHORT: usize = 32;
pub(super) const LONG: usize = 256;

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

    /// Writes the numbers of blocks to `out`.
    #[inline(always)]
    pub(super) fn unpack(self, bytes: &[u8], out: &mut [f32]) {
        macro_rules! each {
            ($unpack:ident) => {{
                let (blocks, _) = bytes.as_chunks();
                let (out, _) = out.as_chunks_mut();
                for (block, out) in blocks.iter().zip(out) {
                    $unpack(block, out);
                }
            }};
        }
        match self {
            Self::Q4_0 => each!(unpack_q4_0),
            Self::Q4_1 => each!(unpack_q4_1),
            Self::Q5_0 => each!(unpack_q5_0),
            Self::Q5_1 => each!(unpack_q5_1),
            Self::Q8_0 => each!(unpack_q8_0),
            Self::Q2K => each!(unpack_q2k),
            Self::Q3K => each!(unpack_q3k),
            Self::Q4K => each!(unpack_q4k),
            Self::Q5K => each!(unpack_q5k),
            Self::Q6K => each!(unpack_q6k),
        }
    }
}

/// The f16 at a place, as f32.
#[inline(always)]
fn half_at(block: &[u8], place: usize) -> f32 {
    float(f16::from_le_bytes([block[place], block[place + 1]]))
}

/// The numbers that bytes hold. They are scaled in a step of their own: in one, compilers make vectors of numbers of
/// several blocks, which lie apart: a third of the speed.
#[inline(always)]
fn numbers<const N: usize>(bytes: impl Iterator<Item = u8>) -> [f32; N] {
    let mut numbers = [0.0; N];
    for (number, byte) in numbers.iter_mut().zip(bytes) {
        *number = f32::from(byte);
    }
    numbers
}

/// The same of bytes whose lower halves are the first half of the numbers, and whose upper halves are the second.
#[inline(always)]
fn halves(bytes: &[u8]) -> [f32; SHORT] {
    let mut found = [0; SHORT];
    let (lower, upper) = found.split_at_mut(SHORT / 2);
    for ((lower, upper), &byte) in lower.iter_mut().zip(upper).zip(bytes) {
        (*lower, *upper) = (byte & 15, byte >> 4);
    }
    numbers(found.into_iter())
}

/// A scale, then 32 numbers of 4 bits: the lower halves of 16 bytes, then the upper.
#[inline(always)]
fn unpack_q4_0(block: &[u8; 18], out: &mut [f32; SHORT]) {
    let d = half_at(block, 0);
    for (out, number) in out.iter_mut().zip(halves(&block[2..])) {
        *out = d * (number - 8.0);
    }
}

/// The same with a minimum.
#[inline(always)]
fn unpack_q4_1(block: &[u8; 20], out: &mut [f32; SHORT]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (out, number) in out.iter_mut().zip(halves(&block[4..])) {
        *out = d * number + m;
    }
}

/// A scale, a fifth bit for each of 32 numbers in four bytes, then the lower four.
#[inline(always)]
fn unpack_q5_0(block: &[u8; 22], out: &mut [f32; SHORT]) {
    let d = half_at(block, 0);
    for (out, number) in out.iter_mut().zip(fives(block, 2)) {
        *out = d * (number - 16.0);
    }
}

/// The same with a minimum.
#[inline(always)]
fn unpack_q5_1(block: &[u8; 24], out: &mut [f32; SHORT]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (out, number) in out.iter_mut().zip(fives(block, 4)) {
        *out = d * number + m;
    }
}

/// 32 numbers of 5 bits.
#[inline(always)]
fn fives(block: &[u8], place: usize) -> [f32; SHORT] {
    let (high, low) = block[place..].split_at(4);
    let high = u32::from_le_bytes([high[0], high[1], high[2], high[3]]);
    let mut numbers = halves(low);
    for (i, number) in numbers.iter_mut().enumerate() {
        *number += if high >> i & 1 == 1 { 16.0 } else { 0.0 };
    }
    numbers
}

/// A scale, then 32 numbers of 8 bits.
#[inline(always)]
fn unpack_q8_0(block: &[u8; 34], out: &mut [f32; SHORT]) {
    let d = half_at(block, 0);
    let mut numbers = [0.0; SHORT];
    for (number, &byte) in numbers.iter_mut().zip(&block[2..]) {
        *number = f32::from(byte.cast_signed());
    }
    for (out, number) in out.iter_mut().zip(numbers) {
        *out = d * number;
    }
}

/// 16 scales and minima of 4 bits, 256 numbers of 2, and a scale of either.
#[inline(always)]
fn unpack_q2k(block: &[u8; 84], out: &mut [f32; LONG]) {
    let (scales, packed) = (&block[..16], &block[16..80]);
    let (d, least) = (half_at(block, 80), half_at(block, 82));
    for (group, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let scale = d * f32::from(scales[group] & 15);
        let least = least * f32::from(scales[group] >> 4);
        // 128 numbers share 32 bytes: two groups of 16 for each pair of bits.
        let (half, within) = (group / 8, group % 8);
        let (shift, start) = (within / 2 * 2, half * 32 + within % 2 * 16);
        let bytes = packed[start..start + 16].iter();
        let numbers: [f32; 16] = numbers(bytes.map(|byte| byte >> shift & 3));
        for (out, number) in out.iter_mut().zip(numbers) {
            *out = scale * number - least;
        }
    }
}

/// A third bit for each of 256 numbers, their lower two, 16 scales of 6 bits, and a scale of these.
#[inline(always)]
fn unpack_q3k(block: &[u8; 110], out: &mut [f32; LONG]) {
    let (high, low, packed) = (&block[..32], &block[32..96], &block[96..108]);
    let d = half_at(block, 108);
    for (group, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let lower = match group < 8 {
            true => packed[group] & 15,
            false => packed[group - 8] >> 4,
        };
        let upper = packed[8 + group % 4] >> (group / 4 * 2) & 3;
        let scale = d * (f32::from(lower | upper << 4) - 32.0);
        let (half, within) = (group / 8, group % 8);
        let (shift, side) = (within / 2 * 2, within % 2 * 16);
        let bit = half * 4 + within / 2;
        let pairs = low[half * 32 + side..][..16]
            .iter()
            .zip(&high[side..][..16]);
        let numbers: [f32; 16] =
            numbers(pairs.map(|(low, high)| low >> shift & 3 | (high >> bit & 1) << 2));
        for (out, number) in out.iter_mut().zip(numbers) {
            *out = scale * (number - 4.0);
        }
    }
}

/// The scale and the minimum of each 32 numbers of a block that begins with two f16, which scale them, and 12 bytes
/// of 8 scales and 8 minima of 6 bits.
#[inline(always)]
fn scales_and_minima(block: &[u8]) -> [[f32; 2]; LONG / 32] {
    let (d, least) = (half_at(block, 0), half_at(block, 2));
    let packed = &block[4..16];
    let mut found = [[0.0; 2]; LONG / 32];
    for (group, found) in found.iter_mut().enumerate() {
        let [scale, minimum] = match group < 4 {
            true => [packed[group] & 63, packed[group + 4] & 63],
            false => [
                packed[group + 4] & 15 | packed[group - 4] >> 6 << 4,
                packed[group + 4] >> 4 | packed[group] >> 6 << 4,
            ],
        };
        *found = [d * f32::from(scale), least * f32::from(minimum)];
    }
    found
}

/// Scales and minima, then 256 numbers of 4 bits.
#[inline(always)]
fn unpack_q4k(block: &[u8; 144], out: &mut [f32; LONG]) {
    let groups = out.as_chunks_mut::<32>().0.iter_mut().enumerate();
    for ((group, out), [scale, minimum]) in groups.zip(scales_and_minima(block)) {
        let shift = group % 2 * 4;
        let bytes = block[16 + group / 2 * 32..][..32].iter();
        let numbers: [f32; 32] = numbers(bytes.map(|byte| byte >> shift & 15));
        for (out, number) in out.iter_mut().zip(numbers) {
            *out = scale * number - minimum;
        }
    }
}

/// Scales and minima, a fifth bit for each of 256 numbers, then their lower four.
#[inline(always)]
fn unpack_q5k(block: &[u8; 176], out: &mut [f32; LONG]) {
    let groups = out.as_chunks_mut::<32>().0.iter_mut().enumerate();
    for ((group, out), [scale, minimum]) in groups.zip(scales_and_minima(block)) {
        let shift = group % 2 * 4;
        let low = &block[48 + group / 2 * 32..][..32];
        let pairs = low.iter().zip(&block[16..48]);
        let numbers: [f32; 32] =
            numbers(pairs.map(|(low, high)| low >> shift & 15 | (high >> group & 1) << 4));
        for (out, number) in out.iter_mut().zip(numbers) {
            *out = scale * number - minimum;
        }
    }
}

/// The lower four bits of 256 numbers, their upper two, 16 scales of 8 bits, and a scale of these.
#[inline(always)]
fn unpack_q6k(block: &[u8; 210], out: &mut [f32; LONG]) {
    let (lower, upper, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half_at(block, 208);
    for (group, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let scale = d * f32::from(scales[group].cast_signed());
        let (half, within) = (group / 8, group % 8);
        let (row, side) = (within / 2, within % 2 * 16);
        let lower = &lower[half * 64 + row % 2 * 32 + side..][..16];
        let upper = &upper[half * 32 + side..][..16];
        let pairs = lower.iter().zip(upper);
        let numbers: [f32; 16] = numbers(
            pairs.map(|(low, high)| low >> (row / 2 * 4) & 15 | (high >> (row * 2) & 3) << 4),
        );
        for (out, number) in out.iter_mut().zip(numbers) {
            *out = scale * (number - 32.0);
        }
    }
}
