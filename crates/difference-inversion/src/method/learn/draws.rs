//! The draws of a step: timesteps and noise, drawn or replayed, and augmented copies of the pairs.

use std::borrow::Cow;

use burn::tensor::{Device, Int, Tensor};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::Result;
use crate::diffusion::pipeline::Pipeline;
use crate::diffusion::sample::Noising;
use crate::diffusion::words::Words;
use crate::method::learn::{Draws, LearnConfig, Pair, Replay};
use crate::util::random::{Purpose, normal, places, rng};

/// Draws per call of the denoiser when tokens are judged.
const SELECTION_CHUNK: usize = 4;

/// The source of a step's timesteps and noise.
#[derive(Debug)]
pub(super) enum Source {
    /// Drawn from the seed; see [`crate::util::random`] for the order.
    Drawn(Drawn),
    /// Read from a file.
    Replayed(Replay, Device),
}

/// The shape of one step's draws.
#[derive(Debug, Clone)]
pub(super) struct Drawn {
    pub(super) seed: u64,
    pub(super) pairs: usize,
    pub(super) samples: usize,
    /// [channels, h, w]
    pub(super) latent_shape: [usize; 3],
    pub(super) noising: Noising,
    pub(super) device: Device,
}

impl Source {
    /// Timesteps and noise of a step.
    pub(super) fn draws(&self, step: usize) -> Draws {
        match self {
            Self::Drawn(drawn) => drawn.draws(step),
            Self::Replayed(replay, device) => replay.draws(step, device),
        }
    }
}

impl Drawn {
    /// [batch, channels, h, w] of one step.
    pub(super) fn noise_shape(&self) -> [usize; 4] {
        let [channels, h, w] = self.latent_shape;
        [self.pairs * self.samples, channels, h, w]
    }

    /// Draws the timesteps of all pairs first, then the noise.
    fn draws(&self, step: usize) -> Draws {
        let mut rng = rng(self.seed, Purpose::Learn, step);
        let timesteps = (0..self.pairs)
            .flat_map(|_| self.times(&mut rng, self.samples))
            .collect();
        Draws {
            timesteps,
            noise: normal(&mut rng, self.noise_shape(), &self.device),
        }
    }

    /// `count` times, spread evenly over the training times.
    fn times(&self, rng: &mut ChaCha8Rng, count: usize) -> Vec<f64> {
        let places = places(rng, count).into_iter();
        places.map(|place| self.noising.time_at(place)).collect()
    }

    /// The fixed set on which tokens are judged, in chunks for one call of the denoiser each: `count`
    /// timesteps spread evenly, the same for every pair.
    pub(super) fn selection_set(&self, count: usize) -> Vec<Draws> {
        let mut rng = rng(self.seed, Purpose::Select, 0);
        let [channels, h, w] = self.latent_shape;
        self.times(&mut rng, count)
            .chunks(SELECTION_CHUNK)
            .map(|chunk| Draws {
                timesteps: chunk.repeat(self.pairs),
                noise: normal(&mut rng, [chunk.len(), channels, h, w], &self.device)
                    .repeat_dim(0, self.pairs), // [pairs · chunk, channels, h, w]
            })
            .collect()
    }
}

/// The pairs of one step: each word of either prompt is dropped with probability `prompt_dropout`, and the
/// latents of A and A′ are moved by the same random shift of up to `jitter` latent pixels, with their edges
/// repeated.
pub(super) fn augmented<'a>(
    pipeline: &Pipeline,
    pairs: &'a [Pair],
    config: &LearnConfig,
    step: usize,
) -> Result<Cow<'a, [Pair]>> {
    if config.prompt_dropout == 0.0 && config.jitter == 0 {
        return Ok(Cow::Borrowed(pairs));
    }
    let mut rng = rng(config.seed, Purpose::Augment, step);
    let changed = (pairs.iter())
        .map(|pair| {
            let [dy, dx] = [(); 2].map(|()| shift(&mut rng, config.jitter));
            let mut thinned = |words: &Words| {
                if config.prompt_dropout == 0.0 {
                    return Ok(words.clone());
                }
                let keep = || rng.random::<f64>() >= config.prompt_dropout;
                pipeline.read(&words.prompt().filtered(keep), config.num_tokens)
            };
            Ok(Pair {
                latents_a: shifted(pair.latents_a.clone(), dy, dx),
                latents_a_prime: shifted(pair.latents_a_prime.clone(), dy, dx),
                prompt_a: thinned(&pair.prompt_a)?,
                prompt_a_prime: thinned(&pair.prompt_a_prime)?,
                deltas: pair.deltas.clone(),
            })
        })
        .collect::<Result<_>>()?;
    Ok(Cow::Owned(changed))
}

/// A number in −limit..=limit.
fn shift(rng: &mut ChaCha8Rng, limit: usize) -> i64 {
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    rng.random_range(-limit..=limit)
}

/// Latents moved down by dy and right by dx.
fn shifted(latents: Tensor<4>, dy: i64, dx: i64) -> Tensor<4> {
    let [_, _, h, w] = latents.dims();
    let device = latents.device();
    let places = |length: usize, by: i64| {
        let length = i64::try_from(length).unwrap_or(i64::MAX);
        let places: Vec<i64> = (0..length).map(|i| (i - by).clamp(0, length - 1)).collect();
        Tensor::<1, Int>::from_ints(places.as_slice(), &device)
    };
    latents.select(2, places(h, dy)).select(3, places(w, dx))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::diffusion::sample::{AlphaSchedule, SchedulerConfig};
    use crate::util::tensors::host;

    fn drawn() -> Drawn {
        Drawn {
            seed: 5,
            pairs: 2,
            samples: 3,
            latent_shape: [1, 2, 2],
            noising: Noising::Discrete(
                AlphaSchedule::new(&SchedulerConfig::default(), Path::new("x")).unwrap(),
            ),
            device: Device::flex(),
        }
    }

    #[test]
    fn a_step_draws_the_same_whatever_came_before() {
        let source = Source::Drawn(drawn());
        let (early, late) = (source.draws(4), source.draws(9));
        assert_eq!(early.timesteps.len(), 6);
        assert_eq!(early.noise.dims(), [6, 1, 2, 2]);
        assert_eq!(source.draws(9).timesteps, late.timesteps);
        assert_eq!(host(source.draws(4).noise), host(early.noise));
    }

    #[test]
    fn the_fixed_set_is_spread_over_the_timesteps_and_equal_for_all_pairs() {
        let set = drawn().selection_set(6);
        assert_eq!(set.len(), 2);
        let first = &set[0];
        assert_eq!(first.timesteps[..4], first.timesteps[4..]);
        let noise = host(first.noise.clone());
        assert_eq!(noise[..16], noise[16..]);
        assert!(first.timesteps[0] < 167.0 && set[1].timesteps[1] >= 833.0);
    }

    #[test]
    fn latents_move_with_their_edges_repeated() {
        let device = Device::flex();
        let latents = Tensor::<1>::from_floats([1., 2., 3., 4.], &device).reshape([1, 1, 2, 2]);
        assert_eq!(host(shifted(latents.clone(), 1, 0)), [1., 2., 1., 2.]);
        assert_eq!(host(shifted(latents, 0, -1)), [2., 2., 4., 4.]);
    }
}
