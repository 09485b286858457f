//! Mixes of clean latents and noise: a network's input, its output, and the step between two noise levels,
//! whatever the network predicts.

use burn::tensor::Tensor;

use crate::diffusion::sample::PredictionType;
use crate::{Error, Result};

/// `signal · x₀ + noise · ε`
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mix {
    /// The share of the clean latents x₀.
    pub signal: f64,
    /// The share of the noise ε, of unit variance.
    pub noise: f64,
}

impl Mix {
    /// `signal · x₀ + noise · ε`
    pub fn new(signal: f64, noise: f64) -> Self {
        Self { signal, noise }
    }
}

/// A level of noise: the network is given `a x₀ + s ε` and answers with `p x₀ + q ε`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Level {
    /// a and s.
    pub input: Mix,
    /// p and q.
    pub output: Mix,
}

impl Level {
    /// The level whose noisy latents are `input`, for a network that predicts `prediction`.
    pub fn new(input: Mix, prediction: PredictionType) -> Self {
        Self {
            input,
            output: prediction.output(input),
        }
    }

    /// Checks that the network's output says more than its input.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] for pure noise and a network that predicts noise.
    pub(super) fn check(&self) -> Result<()> {
        match self.determinant() == 0.0 {
            true => Err(Error::invalid_input(
                "the noise schedule ends in pure noise (rescale_betas_zero_snr), where a prediction of the noise says \
                 nothing about the picture; a model trained with such a schedule predicts velocity \
                 (prediction_type v_prediction), otherwise the schedule is wrong",
            )),
            false => Ok(()),
        }
    }

    /// `a q − s p`: 0 if the output carries no information beyond the input.
    fn determinant(self) -> f64 {
        self.input.signal * self.output.noise - self.input.noise * self.output.signal
    }

    /// The deterministic step to the noisy latents `to` (Song et al. 2021, equation 12) as
    /// `x_s = c₀ x_t + c₁ output`, with `c₀ = (a′q − s′p) / det`, `c₁ = (s′a − a′s) / det` and
    /// `det = a q − s p`. `None` where the determinant is 0.
    pub fn step_to(self, to: Mix) -> Option<[f64; 2]> {
        let Self { input, output } = self;
        let det = self.determinant();
        (det != 0.0).then(|| {
            let kept = to.signal * output.noise - to.noise * output.signal;
            let added = to.noise * input.signal - to.signal * input.noise;
            [kept / det, added / det]
        })
    }

    /// The standard deviation of the noise that a step to `to` renews if it adds as much as DDPM
    /// (Song et al. 2021, equation 16): `s′/s · √(s² − a² s′² / a′²)`.
    pub fn renewed_noise(self, to: Mix) -> f64 {
        let Mix { signal, noise } = self.input;
        let kept = signal * to.noise / to.signal;
        let variance = (to.noise / noise).powi(2) * (noise * noise - kept * kept);
        variance.max(0.0).sqrt()
    }

    /// x̂₀ = (q x_t − s output) / det, as [`Estimate`] of both.
    fn original(self) -> Estimate {
        Estimate::new([self.output.noise, -self.input.noise], self.determinant())
    }

    /// ε̂ = (a output − p x_t) / det, as [`Estimate`] of both.
    fn epsilon(self) -> Estimate {
        Estimate::new([-self.output.signal, self.input.signal], self.determinant())
    }
}

/// `(sample · x_t + output · output) / divisor`
struct Estimate {
    sample: f64,
    output: f64,
    divisor: f64,
}

impl Estimate {
    /// A single term is divided here, so that the division cancels exactly.
    fn new([sample, output]: [f64; 2], divisor: f64) -> Self {
        let single = sample == 0.0 || output == 0.0;
        let (by, divisor) = if single {
            (divisor, 1.0)
        } else {
            (1.0, divisor)
        };
        Self {
            sample: sample / by,
            output: output / by,
            divisor,
        }
    }
}

/// Mixtures of clean latents and noise, a mix for every row or one for all.
///
/// # Shapes
/// `original` and `noise` alike `[b, c, h, w]`
pub(super) fn mixed(mixes: &[Mix], original: Tensor<4>, noise: Tensor<4>) -> Tensor<4> {
    let signal = column(mixes.iter().map(|mix| mix.signal), &original);
    let share = column(mixes.iter().map(|mix| mix.noise), &noise);
    original * signal + noise * share
}

/// The clean latents x̂₀ implied by a network's `output`, given its input `sample`; shapes as for
/// [`mixed`].
pub(super) fn pred_original(levels: &[Level], output: Tensor<4>, sample: Tensor<4>) -> Tensor<4> {
    estimated(levels, Level::original, output, sample)
}

/// The noise ε̂ implied by a network's `output`, given its input `sample`; shapes as for [`mixed`].
pub(super) fn pred_epsilon(levels: &[Level], output: Tensor<4>, sample: Tensor<4>) -> Tensor<4> {
    estimated(levels, Level::epsilon, output, sample)
}

fn estimated(
    levels: &[Level],
    estimate: fn(Level) -> Estimate,
    output: Tensor<4>,
    sample: Tensor<4>,
) -> Tensor<4> {
    let of = |part: fn(Estimate) -> f64| {
        let values = levels.iter().map(|&level| part(estimate(level)));
        column(values, &sample)
    };
    let [by_sample, by_output] = [of(|one| one.sample), of(|one| one.output)];
    let divisor = of(|one| one.divisor);
    (sample * by_sample + output * by_output) / divisor
}

/// A number for every row, `[n, 1, 1, 1]`, on the device and of the type of `like`.
fn column(values: impl Iterator<Item = f64>, like: &Tensor<4>) -> Tensor<4> {
    let values: Vec<f64> = values.collect();
    let options = (&like.device().without_autodiff(), like.dtype());
    Tensor::<1>::from_data(values.as_slice(), options).reshape([values.len(), 1, 1, 1])
}

impl PredictionType {
    /// The mix of the network's output if its input is `input`.
    pub fn output(self, input: Mix) -> Mix {
        match self {
            Self::Epsilon => Mix::new(0.0, 1.0),
            Self::Sample => Mix::new(1.0, 0.0),
            Self::VPrediction => Mix::new(-input.noise, input.signal),
            Self::Flow => Mix::new(-1.0, 1.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{DType, Device, Distribution};

    use super::*;
    use crate::util::tensors::host;

    const PREDICTIONS: [PredictionType; 4] = [
        PredictionType::Epsilon,
        PredictionType::Sample,
        PredictionType::VPrediction,
        PredictionType::Flow,
    ];

    /// Levels from nearly clean to nearly noise, of unit variance, or straight for a flow.
    fn inputs(prediction: PredictionType) -> impl Iterator<Item = Mix> {
        (1..1000).map(move |t| {
            let share = f64::from(t) / 1000.0;
            match prediction {
                PredictionType::Flow => Mix::new(1.0 - share, share),
                _ => Mix::new((1.0 - share).sqrt(), share.sqrt()),
            }
        })
    }

    #[test]
    fn a_step_takes_true_noise_from_one_level_to_the_next() {
        let (original, noise) = (0.3, -1.2);
        let of = |mix: Mix| mix.signal * original + mix.noise * noise;
        for prediction in PREDICTIONS {
            let inputs: Vec<Mix> = inputs(prediction).collect();
            for (t, s) in [(998, 900), (500, 480), (19, 0)] {
                let level = Level::new(inputs[t], prediction);
                for to in [inputs[s], Mix::new(1.0, 0.0)] {
                    let [a, b] = level.step_to(to).unwrap();
                    let found = a * of(level.input) + b * of(level.output);
                    assert!((found - of(to)).abs() < 1e-9, "{prediction:?} {t}");
                }
            }
        }
    }

    #[test]
    fn steps_are_those_of_each_prediction_and_eulers_for_a_flow() {
        for prediction in PREDICTIONS {
            let inputs: Vec<Mix> = inputs(prediction).collect();
            for (&t, &s) in inputs[20..].iter().zip(&inputs) {
                let expected = match prediction {
                    PredictionType::Epsilon => {
                        let ratio = s.signal / t.signal;
                        [ratio, s.noise - ratio * t.noise]
                    }
                    PredictionType::VPrediction => [
                        s.signal * t.signal + s.noise * t.noise,
                        s.noise * t.signal - s.signal * t.noise,
                    ],
                    PredictionType::Sample => {
                        let ratio = s.noise / t.noise;
                        [ratio, s.signal - ratio * t.signal]
                    }
                    PredictionType::Flow => [1.0, s.noise - t.noise],
                };
                let found = Level::new(t, prediction).step_to(s).unwrap();
                for (found, expected) in found.into_iter().zip(expected) {
                    let error = (found - expected).abs();
                    assert!(error < 1e-12, "{prediction:?} {t:?}: {found} != {expected}");
                }
            }
        }
    }

    #[test]
    fn renewed_noise_is_that_of_ddpm() {
        let inputs: Vec<Mix> = inputs(PredictionType::Epsilon).collect();
        for (&t, &s) in inputs[20..].iter().zip(&inputs) {
            let [alpha, previous] = [t, s].map(|mix| mix.signal * mix.signal);
            let variance = (1.0 - previous) / (1.0 - alpha) * (1.0 - alpha / previous);
            let found = Level::new(t, PredictionType::Epsilon).renewed_noise(s);
            assert!((found - variance.sqrt()).abs() < 1e-12, "{t:?}");
        }
    }

    #[test]
    fn estimates_are_those_of_each_prediction_to_the_bit() {
        let device = Device::flex();
        let random = || {
            let normal = Distribution::Normal(0.0, 1.0);
            Tensor::<4>::random([1, 1, 4, 4], normal, &device).cast(DType::F32)
        };
        for prediction in PREDICTIONS {
            for input in inputs(prediction) {
                let (output, sample) = (random(), random());
                let (a, s) = (input.signal, input.noise);
                let (x, o) = (sample.clone(), output.clone());
                let [original, epsilon] = match prediction {
                    PredictionType::Epsilon => [(x - o.clone() * s) / a, o],
                    PredictionType::Sample => [o.clone(), (x - o * a) / s],
                    PredictionType::VPrediction => [x.clone() * a - o.clone() * s, o * a + x * s],
                    PredictionType::Flow => [x.clone() - o.clone() * s, x + o * a],
                };
                let level = [Level::new(input, prediction)];
                let found = pred_original(&level, output.clone(), sample.clone());
                assert_eq!(host(found), host(original), "{prediction:?} {input:?}");
                let found = pred_epsilon(&level, output, sample);
                assert_eq!(host(found), host(epsilon), "{prediction:?} {input:?}");
            }
        }
    }

    #[test]
    fn noise_says_nothing_of_latents_of_which_nothing_is_left() {
        let noise = Mix::new(0.0, 1.0);
        let to = Mix::new(0.1, 0.9);
        assert_eq!(Level::new(noise, PredictionType::Epsilon).step_to(to), None);
        for prediction in [PredictionType::VPrediction, PredictionType::Flow] {
            let [a, b] = Level::new(noise, prediction).step_to(to).unwrap();
            assert!(a.is_finite() && b.is_finite() && a > 0.0);
        }
    }
}
