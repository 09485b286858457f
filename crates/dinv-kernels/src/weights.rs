//! Weights as they are stored, widened to f32 on use.

use std::sync::Arc;

use burn::tensor::{DType, Tensor};
use half::{bf16, f16};

use super::Values;
use super::packed::Packed;

/// Weights in row-major order, of any type that they are stored in.
pub(super) enum Weights {
    F32(Values),
    F16(Values),
    BF16(Values),
    Packed(Arc<Packed>),
}

impl Weights {
    /// Weights on the CPU, without autodiff.
    pub(super) fn of<const D: usize>(x: Tensor<D>) -> Self {
        match x.dtype() {
            DType::F16 => Self::F16(Values::of(x)),
            DType::BF16 => Self::BF16(Values::of(x)),
            _ => Self::F32(Values::of(x)),
        }
    }

    /// The elements.
    pub(super) fn as_slices(&self) -> Slice<'_> {
        match self {
            Self::F32(values) => Slice::F32(values.as_slice()),
            Self::F16(values) => Slice::F16(&values.0.storage()[values.range()]),
            Self::BF16(values) => Slice::BF16(&values.0.storage()[values.range()]),
            Self::Packed(packed) => Slice::Packed(packed),
        }
    }
}

/// Elements of any type that weights are stored in.
#[derive(Clone, Copy)]
pub(super) enum Slice<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
    Packed(&'a Packed),
}

/// Packed numbers are best read from a multiple of this on: their blocks have 32 or 256.
const ALIGNMENT: usize = 256;

impl<'a> Slice<'a> {
    /// The number of which parts that are read should be multiples.
    pub(super) fn alignment(&self) -> usize {
        match self {
            Self::Packed(_) => ALIGNMENT,
            Self::F32(_) | Self::F16(_) | Self::BF16(_) => 1,
        }
    }

    /// The room that [`window`](Self::window) needs for so many elements.
    pub(super) fn room(&self, elements: usize) -> usize {
        match self {
            Self::Packed(_) => elements,
            Self::F32(_) | Self::F16(_) | Self::BF16(_) => 0,
        }
    }

    /// Rows of `len` elements, the first of which is at `first` and the others `stride` apart: the elements from the
    /// first on, and their stride. Packed ones are widened into `room`, side by side.
    #[inline(always)]
    pub(super) fn window<'b>(
        self,
        first: usize,
        stride: usize,
        [rows, len]: [usize; 2],
        room: &'b mut [f32],
    ) -> (Slice<'b>, usize)
    where
        'a: 'b,
    {
        match self {
            Self::F32(values) => (Slice::F32(&values[first..]), stride),
            Self::F16(values) => (Slice::F16(&values[first..]), stride),
            Self::BF16(values) => (Slice::BF16(&values[first..]), stride),
            Self::Packed(packed) => {
                let lines = room.chunks_exact_mut(len.max(1)).take(rows);
                for (row, out) in lines.enumerate() {
                    packed.copy(first + row * stride, out);
                }
                (Slice::F32(room), len)
            }
        }
    }

    /// The room that [`as_floats`](Self::as_floats) needs for so many elements.
    pub(super) fn room_as_floats(&self, elements: usize) -> usize {
        match self {
            Self::F32(_) => 0,
            Self::F16(_) | Self::BF16(_) | Self::Packed(_) => elements,
        }
    }

    /// As [`window`](Self::window), but all that are not f32 are widened.
    #[inline(always)]
    pub(super) fn as_floats<'b>(
        self,
        first: usize,
        stride: usize,
        [rows, len]: [usize; 2],
        room: &'b mut [f32],
    ) -> (&'b [f32], usize)
    where
        'a: 'b,
    {
        if let Self::F32(values) = self {
            return (&values[first..], stride);
        }
        let lines = room.chunks_exact_mut(len.max(1)).take(rows);
        for (row, out) in lines.enumerate() {
            self.copy(first + row * stride, out);
        }
        (room, len)
    }

    /// Copies the elements from `start` on to `out`, as many as fit.
    #[inline(always)]
    pub(super) fn copy(&self, start: usize, out: &mut [f32]) {
        match self {
            Self::F32(values) => out.copy_from_slice(&values[start..][..out.len()]),
            Self::F16(values) => put(&values[start..][..out.len()], out, float),
            Self::BF16(values) => put(&values[start..][..out.len()], out, bf16::to_f32),
            Self::Packed(packed) => packed.copy(start, out),
        }
    }

    /// As many elements from `start` on.
    #[inline(always)]
    pub(super) fn array<const N: usize>(&self, start: usize) -> [f32; N] {
        let mut out = [0.0; N];
        self.copy(start, &mut out);
        out
    }
}

#[inline(always)]
fn put<T: Copy>(values: &[T], out: &mut [f32], convert: impl Fn(T) -> f32) {
    for (out, &value) in out.iter_mut().zip(values) {
        *out = convert(value);
    }
}

/// The same number as f32; unlike [`f16::to_f32`], it uses operations that compilers vectorise.
#[inline(always)]
pub(super) fn float(x: f16) -> f32 {
    /// 2¹¹², the difference of the exponents' biases.
    const REBIAS: f32 = f32::from_bits((127 + 112) << 23);
    let bits = u32::from(x.to_bits());
    let magnitude = (bits & 0x7fff) << 13;
    let finite = (f32::from_bits(magnitude) * REBIAS).to_bits();
    let infinite = magnitude | 0x7f80_0000; // or not a number
    let magnitude = if bits & 0x7c00 == 0x7c00 {
        infinite
    } else {
        finite
    };
    f32::from_bits(magnitude | (bits & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;

    #[test]
    fn every_number_of_half_precision() {
        let device = Device::flex();
        let all: Vec<u16> = (0..=u16::MAX).collect();
        let halves: Vec<f16> = all.iter().map(|&bits| f16::from_bits(bits)).collect();
        let shorts: Vec<bf16> = all.iter().map(|&bits| bf16::from_bits(bits)).collect();
        let same = |weights: Tensor<1>, expected: Vec<f32>| {
            let mut found = vec![0.0; 1 << 16];
            Weights::of(weights).as_slices().copy(0, &mut found);
            for (found, expected) in found.into_iter().zip(expected) {
                assert!(
                    found == expected || (found.is_nan() && expected.is_nan()),
                    "{found} {expected}"
                );
            }
        };
        let expected = halves.iter().map(|x| x.to_f32()).collect();
        let data = TensorData::new(halves, [1 << 16]);
        let x = Tensor::<1>::from_data(data, (&device, DType::F16));
        same(x, expected);
        let expected = shorts.iter().map(|x| x.to_f32()).collect();
        let data = TensorData::new(shorts, [1 << 16]);
        let x = Tensor::<1>::from_data(data, (&device, DType::BF16));
        same(x, expected);
    }
}
