//! Numbers that files store in fewer bits than a float has, as f32: 8-bit floats, and the blocks of ggml
//! ([llama.cpp](https://github.com/ggml-org/llama.cpp), `ggml-quants.c`).

use half::{bf16, f16};
use safetensors::Dtype;

/// How the numbers of a tensor are stored, where that is not what they are read as.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Packing {
    /// 1 sign, 4 exponent and 3 mantissa bits without infinities (E4M3FN), times a scale.
    F8E4M3(f32),
    /// 1 sign, 5 exponent and 2 mantissa bits, times a scale.
    F8E5M2(f32),
    /// Blocks of ggml.
    Ggml(Ggml),
}

/// The types of ggml that are read: a block of numbers, and how many bytes it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ggml {
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
    pub(super) fn numbered(number: u32) -> Option<Self> {
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
    pub(super) fn block(self) -> [usize; 2] {
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
fn half_at(block: &[u8], place: usize) -> f32 {
    f16::from_le_bytes([block[place], block[place + 1]]).to_f32()
}

/// 32 numbers of 5 bits: a fifth bit for each in four bytes, then the lower four.
fn fives(block: &[u8], out: &mut [f32], number: impl Fn(u8) -> f32) {
    let high = u32::from_le_bytes([block[0], block[1], block[2], block[3]]);
    let fifth = |i: usize| if high >> i & 1 == 1 { 16 } else { 0 };
    for (i, &byte) in block[4..].iter().enumerate() {
        out[i] = number(byte & 15 | fifth(i));
        out[i + 16] = number(byte >> 4 | fifth(i + 16));
    }
}

/// 16 scales and minima of 4 bits, 256 numbers of 2, and a scale of either.
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
    /// As a safetensors file stores numbers of this type, unless it scales them.
    pub(super) fn of(dtype: Dtype, scale: f32) -> Option<Self> {
        match dtype {
            Dtype::F8_E4M3 => Some(Self::F8E4M3(scale)),
            Dtype::F8_E5M2 => Some(Self::F8E5M2(scale)),
            _ => None,
        }
    }

    /// The little-endian bytes of the numbers as f32. What is cut off of a block is left out.
    pub(super) fn widened(self, bytes: &[u8]) -> Vec<u8> {
        let table = |of: fn(u8) -> f32, scale: f32| {
            let numbers: Vec<[u8; 4]> = (0..=255).map(|b| (of(b) * scale).to_le_bytes()).collect();
            (bytes.iter())
                .flat_map(|&byte| numbers[usize::from(byte)])
                .collect()
        };
        match self {
            Self::F8E4M3(scale) => table(from_e4m3, scale),
            Self::F8E5M2(scale) => table(from_e5m2, scale),
            Self::Ggml(kind) => {
                let [numbers, size] = kind.block();
                let mut out = Vec::with_capacity(bytes.len() / size * numbers * 4);
                let mut unpacked = vec![0.0; numbers];
                for block in bytes.chunks_exact(size) {
                    kind.unpack(block, &mut unpacked);
                    out.extend(unpacked.iter().flat_map(|number| number.to_le_bytes()));
                }
                out
            }
        }
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

/// A scalar of a file, as f32.
pub(super) fn scalar(dtype: Dtype, bytes: &[u8]) -> Option<f32> {
    Some(match (dtype, bytes) {
        (Dtype::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
        (Dtype::F16, &[a, b]) => f16::from_le_bytes([a, b]).to_f32(),
        (Dtype::BF16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f32(),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let widened = Packing::F8E4M3(0.5).widened(&[0x38, 0x7e]);
        assert_eq!(widened, [0.5f32, 224.0].map(f32::to_le_bytes).concat());
    }
}
