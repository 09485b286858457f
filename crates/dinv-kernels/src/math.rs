//! Vectorisable functions of one number, vectorised sums, and loads and stores of vectors.

use std::f32::consts::{FRAC_1_SQRT_2, LOG2_E};

use pulp::Simd;

/// `1 / √(2π)`.
const FRAC_1_SQRT_TAU: f32 = 0.398_942_3;
/// Partial sums kept side by side.
pub(super) const LANES: usize = 16;

/// `eˣ` to about 1e-7 relative; overflow and underflow end at the limits of f32, NaN stays.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // eˣ = 2ⁿ eʳ with n whole and |r| ≤ ln 2 / 2; adding 1.5 · 2²³ rounds to whole numbers.
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN_2_HIGH - n * LN_2_LOW;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 0.166_666_65;
    let p = p * r + 0.5;
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    (p * r * r + r + 1.0) * power
}

/// `Φ(x)`, the normal distribution function, to 1e-7, and `e^(−x²/2)`
/// (Abramowitz and Stegun 7.1.26).
#[inline(always)]
fn normal_cdf(x: f32) -> (f32, f32) {
    let z = x.abs() * FRAC_1_SQRT_2;
    let density = exp(-z * z);
    let t = 1.0 / (1.0 + 0.327_591_1 * z);
    let p = 1.061_405_4;
    let p = p * t - 1.453_152;
    let p = p * t + 1.421_413_7;
    let p = p * t - 0.284_496_74;
    let p = p * t + 0.254_829_6;
    let tail = 0.5 * p * t * density;
    (if x < 0.0 { tail } else { 1.0 - tail }, density)
}

/// `x σ(slope · x)` and its derivative: SiLU for a slope of 1.
#[inline(always)]
pub(super) fn sigmoid_linear(x: f32, slope: f32) -> (f32, f32) {
    let gate = 1.0 / (1.0 + exp(-slope * x));
    (x * gate, gate * (1.0 + slope * x * (1.0 - gate)))
}

/// `x Φ(x)` and its derivative ([Hendrycks and Gimpel 2016](https://arxiv.org/abs/1606.08415)).
#[inline(always)]
pub(super) fn gelu(x: f32) -> (f32, f32) {
    let (cdf, density) = normal_cdf(x);
    (x * cdf, cdf + x * density * FRAC_1_SQRT_TAU)
}

/// The tanh approximation of `x Φ(x)`, `x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))`, and its derivative
/// ([Hendrycks and Gimpel 2016](https://arxiv.org/abs/1606.08415)). `(1 + tanh u) / 2` is `σ(2u)`.
#[inline(always)]
pub(super) fn gelu_tanh(x: f32) -> (f32, f32) {
    /// `2 √(2/π)`.
    const SLOPE: f32 = 1.595_769;
    const CUBIC: f32 = 0.044_715;
    let square = CUBIC * x * x;
    let gate = 1.0 / (1.0 + exp(-SLOPE * x * (1.0 + square)));
    let slope = SLOPE * x * (1.0 + 3.0 * square);
    (x * gate, gate * (1.0 + slope * (1.0 - gate)))
}

/// The vector of `values`, filled up with zeros.
#[inline(always)]
pub(super) fn load<S: Simd>(simd: S, values: &[f32]) -> S::f32s {
    // Without masks (AVX2), partial vectors take a jump.
    match S::as_simd_f32s(values) {
        ([vector], []) => *vector,
        _ => simd.partial_load_f32s(values),
    }
}

/// Stores the beginning of `vector` in `out`, as much as fits.
#[inline(always)]
pub(super) fn store<S: Simd>(simd: S, out: &mut [f32], vector: S::f32s) {
    match S::as_mut_simd_f32s(out) {
        ([out], []) => *out = vector,
        _ => simd.partial_store_f32s(out, vector),
    }
}

/// Sums `f` of the values of all slices, which are of the same length, in [`LANES`] partial sums.
#[inline(always)]
pub(super) fn sum<const N: usize>(slices: [&[f32]; N], f: impl Fn([f32; N]) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let len = slices[0].len();
    let whole = len - len % LANES;
    for first in (0..whole).step_by(LANES) {
        let mut values = [[0.0; N]; LANES];
        for n in 0..N {
            let slice = &slices[n][first..][..LANES];
            for lane in 0..LANES {
                values[lane][n] = slice[lane];
            }
        }
        for lane in 0..LANES {
            lanes[lane] += f(values[lane]);
        }
    }
    for at in whole..len {
        let mut values = [0.0; N];
        for n in 0..N {
            values[n] = slices[n][at];
        }
        lanes[at - whole] += f(values);
    }
    total(lanes)
}

/// Replaces `values` by `e^((value − from) · scale)` and returns their sum.
#[inline(always)]
pub(super) fn exponentials(values: &mut [f32], from: f32, scale: f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let (chunks, rest) = values.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            chunk[lane] = exp((chunk[lane] - from) * scale);
            lanes[lane] += chunk[lane];
        }
    }
    for (value, lane) in rest.iter_mut().zip(&mut lanes) {
        *value = exp((*value - from) * scale);
        *lane += *value;
    }
    total(lanes)
}

#[inline(always)]
fn total(lanes: [f32; LANES]) -> f32 {
    let mut total = 0.0;
    for lane in lanes {
        total += lane;
    }
    total
}

/// The largest of `values`; negative infinity if there are none. NaN is ignored.
#[inline(always)]
pub(super) fn max(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (largest, &value) in lanes.iter_mut().zip(chunk) {
            *largest = if value > *largest { value } else { *largest };
        }
    }
    lanes
        .iter()
        .chain(rest)
        .copied()
        .fold(f32::NEG_INFINITY, f32::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_exact_to_rounding() {
        for i in -8700..8800 {
            let x = i as f32 * 0.01;
            let exact = f64::from(x).exp();
            assert!((f64::from(exp(x)) - exact).abs() <= 3e-7 * exact, "{x}");
        }
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(-1e30) < 1e-37);
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn normal_distribution_function() {
        for (x, expected) in [
            (0.0, 0.5),
            (1.0, 0.841_344_7),
            (-2.0, 0.022_750_13),
            (9.0, 1.0),
        ] {
            assert!((normal_cdf(x).0 - expected).abs() < 2e-7, "{x}");
        }
    }

    #[test]
    fn exponentials_of_any_length() {
        for n in [0, 1, 15, 16, 17, 100] {
            let expected: Vec<f32> = (0..n).map(|i| exp((i as f32 - 3.0) * 0.1)).collect();
            let mut values: Vec<f32> = (0..n).map(|i| i as f32).collect();
            let total = exponentials(&mut values, 3.0, 0.1);
            assert_eq!(values, expected);
            let sum: f32 = expected.iter().sum();
            assert!((total - sum).abs() <= 1e-6 * sum, "{total} {sum}");
        }
    }

    #[test]
    fn sums_and_maxima_of_any_length() {
        for n in [0, 1, 15, 16, 17, 100] {
            let values: Vec<f32> = (0..n).map(|i| i as f32).collect();
            assert_eq!(sum([&values], |[x]| x), values.iter().sum::<f32>());
            let squares: f32 = values.iter().map(|x| x * x).sum();
            assert_eq!(sum([&values, &values], |[x, y]| x * y), squares);
            let largest = values.last().copied().unwrap_or(f32::NEG_INFINITY);
            assert_eq!(max(&values), largest);
        }
    }
}
