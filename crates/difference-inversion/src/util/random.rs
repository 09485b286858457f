//! Random draws that are the same on every platform, thread count and after every resume.
//!
//! All numbers come from ChaCha8 keyed by the seed. Every use has its own stream, numbered by its
//! [`Purpose`] and by the step that draws, so no draw depends on the number of earlier draws.
//! Within a stream, numbers are drawn in the row-major order of the tensor they fill.

use burn::tensor::{DType, Device, Tensor, TensorData};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;

/// Bits of the stream number that hold the step.
const STEP_BITS: u32 = 48;

/// The use of random numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Timesteps, then noise, of one optimisation step.
    Learn = 0,
    /// Timesteps, then noise, of the fixed set on which the tokens are judged.
    Select = 1,
    /// Dropped words and shifts of one optimisation step.
    Augment = 2,
    /// Initial difference tokens other than zero.
    Initialise = 3,
    /// First words of an optimised prompt; the step is the number of the picture.
    Pez = 4,
    /// Noise of an inversion or of the first latents.
    Generate = 5,
    /// Noise added by a stochastic solver, by step.
    Sample = 6,
    /// The order of items that are each used once.
    Order = 7,
    /// Resamples and flipped signs of the statistics of an evaluation.
    Statistics = 8,
    /// Words left out of what the CLIP loss reads, by update.
    Thin = 9,
}

/// The generator for one purpose at one step.
pub fn rng(seed: u64, purpose: Purpose, step: usize) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(((purpose as u64) << STEP_BITS) | step as u64);
    rng
}

/// Standard normal numbers, drawn in f64 and rounded to f32.
pub fn normal<const D: usize>(
    rng: &mut ChaCha8Rng,
    shape: [usize; D],
    device: &Device,
) -> Tensor<D> {
    let count = shape.iter().product();
    #[expect(clippy::cast_possible_truncation, reason = "tensors are f32")]
    let values: Vec<f32> = (0..count)
        .map(|_| rng.sample::<f64, _>(StandardNormal) as f32)
        .collect();
    Tensor::from_data(TensorData::new(values, shape), (device, DType::F32))
}

/// The numbers below `count` in a random order.
pub fn shuffled(rng: &mut ChaCha8Rng, count: usize) -> Vec<usize> {
    let mut keyed: Vec<(u64, usize)> = (0..count).map(|i| (rng.random(), i)).collect();
    keyed.sort_unstable();
    keyed.into_iter().map(|(_, i)| i).collect()
}

/// `count` numbers from 0 to 1, the i-th in the i-th of `count` equal parts of that range: plain uniform
/// draws for a count of 1, evenly spread ones for more.
pub fn places(rng: &mut ChaCha8Rng, count: usize) -> Vec<f64> {
    (0..count)
        .map(|part| (part as f64 + rng.random::<f64>()) / count as f64)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::util::tensors::host;

    #[test]
    fn a_stream_is_known_by_seed_purpose_and_step_alone() {
        let draw =
            |seed, purpose, step| host(normal(&mut rng(seed, purpose, step), [4], &Device::flex()));
        let first = draw(7, Purpose::Learn, 3);
        assert_eq!(first, draw(7, Purpose::Learn, 3));
        for other in [
            draw(8, Purpose::Learn, 3),
            draw(7, Purpose::Select, 3),
            draw(7, Purpose::Learn, 4),
        ] {
            assert_ne!(first, other);
        }
    }

    #[test]
    fn places_fall_in_equal_parts_of_the_range() {
        for seed in 0..50 {
            let drawn = places(&mut rng(seed, Purpose::Learn, 0), 4);
            for (part, place) in drawn.into_iter().enumerate() {
                let part = part as f64;
                assert!((part / 4.0..(part + 1.0) / 4.0).contains(&place));
            }
        }
    }

    #[test]
    fn shuffled_numbers_are_each_there_once() {
        let order = |seed| shuffled(&mut rng(seed, Purpose::Order, 0), 1000);
        let (first, second) = (order(1), order(2));
        assert!(first != second && first == order(1));
        let stay = first.iter().enumerate().filter(|(i, number)| i == *number);
        assert!(stay.count() < 10);
        let mut sorted = first.clone();
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..1000));
    }

    #[test]
    fn normal_numbers_have_mean_0_and_variance_1() {
        let values = host(normal(
            &mut rng(1, Purpose::Learn, 0),
            [20_000],
            &Device::flex(),
        ));
        let mean = values.iter().sum::<f32>() / 20_000.0;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / 20_000.0;
        assert!(
            mean.abs() < 0.03 && (variance - 1.0).abs() < 0.03,
            "{mean} {variance}"
        );
    }
}
