//! How a family of models noises latents: the inputs of its networks, their predictions, and the
//! times.

use std::path::Path;

use burn::tensor::Tensor;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::diffusion::sample::alphas::AlphaSchedule;
use crate::diffusion::sample::flow::FlowSchedule;
use crate::diffusion::sample::mix::{Level, Mix, mixed, pred_original};
use crate::diffusion::sample::scheduler::{PredictionType, check_kind, complete};
use crate::util::digest::hex;
use crate::weights::{from_value, read_config};
use crate::{Error, Result};

/// The mathematics of noising. Times are in training steps, whatever scale the network uses.
#[derive(Debug, Clone)]
pub enum Noising {
    /// Whole steps of training, `√ᾱ x₀ + √(1 − ᾱ) ε` (Ho et al. 2020).
    Discrete(AlphaSchedule),
    /// A straight path, `(1 − σ) x₀ + σ ε`, at any time from 0 to the number of steps.
    Flow(FlowSchedule),
}

/// A step of a schedule, towards less noise.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// The time at which the network is called.
    pub time: f64,
    /// The level of noise there.
    pub from: Level,
    /// The mix of signal and noise afterwards.
    pub to: Mix,
}

impl Noising {
    /// Reads a discrete schedule from `scheduler_config.json`, or the one in a folder.
    ///
    /// # Errors
    /// As [`read_config`] and [`AlphaSchedule::new`]; [`Error::Config`] for noise of another kind.
    pub fn open(path: &Path) -> Result<Self> {
        let file = match path.is_dir() {
            true => path.join("scheduler_config.json"),
            false => path.to_owned(),
        };
        let mut config: Value = read_config(&file)?;
        check_kind(&config, &file)?;
        complete(&mut config);
        let schedule = AlphaSchedule::new(&from_value(config, &file)?, &file)?;
        Ok(Self::Discrete(schedule))
    }

    /// The same for pictures with this number of denoiser tokens, on which the times of a flow may depend.
    #[must_use]
    pub fn for_tokens(self, tokens: usize) -> Self {
        match self {
            Self::Discrete(_) => self,
            Self::Flow(schedule) => Self::Flow(schedule.for_tokens(tokens)),
        }
    }

    /// The prediction type.
    pub fn prediction_type(&self) -> PredictionType {
        match self {
            Self::Discrete(schedule) => schedule.config().prediction_type,
            Self::Flow(_) => PredictionType::Flow,
        }
    }

    /// The default η of an edit-friendly inversion: 1, as published (Huberman-Spiegelglas et al.
    /// 2024), and for a flow 0, with which the inversion is FlowEdit (Kulikov et al. 2025).
    pub fn usual_eta(&self) -> f64 {
        match self {
            Self::Discrete(_) => 1.0,
            Self::Flow(_) => 0.0,
        }
    }

    /// The class of the scheduler that the model was saved with.
    pub fn class_name(&self) -> Option<&str> {
        match self {
            Self::Discrete(schedule) => schedule.config().class_name.as_deref(),
            Self::Flow(schedule) => schedule.config().class_name.as_deref(),
        }
    }

    /// The number of steps of training.
    pub fn num_train_timesteps(&self) -> usize {
        match self {
            Self::Discrete(schedule) => schedule.num_train_timesteps(),
            Self::Flow(schedule) => schedule.config().num_train_timesteps,
        }
    }

    /// The level of noise at a time.
    pub fn level(&self, time: f64) -> Level {
        let input = match self {
            Self::Discrete(schedule) => schedule.input(Some(whole(time))),
            Self::Flow(_) => {
                let sigma = time / self.num_train_timesteps() as f64;
                Mix::new(1.0 - sigma, sigma)
            }
        };
        Level::new(input, self.prediction_type())
    }

    /// The steps of DDIM (Song et al. 2021), which for a flow is Euler's method: from the noisiest
    /// level to the end of the schedule.
    ///
    /// # Errors
    /// [`Error::Setting`] if there are no steps or more than in training.
    pub fn steps(&self, num_inference_steps: usize) -> Result<Vec<Step>> {
        let n = num_inference_steps;
        let step = |time, to| Step {
            time,
            from: self.level(time),
            to,
        };
        match self {
            Self::Discrete(schedule) => {
                let timesteps = schedule.timesteps(n)?.into_iter();
                let to = |t| schedule.input(schedule.previous_timestep(t, n));
                Ok(timesteps.map(|t| step(t as f64, to(t))).collect())
            }
            Self::Flow(schedule) => {
                check_steps(n, self.num_train_timesteps())?;
                let train = self.num_train_timesteps() as f64;
                let times: Vec<f64> = schedule.sigmas(n).iter().map(|s| s * train).collect();
                let following = times.iter().skip(1).map(|&time| self.level(time).input);
                let following = following.chain([Mix::new(1.0, 0.0)]);
                let steps = times.iter().zip(following);
                Ok(steps.map(|(&time, to)| step(time, to)).collect())
            }
        }
    }

    /// A note about a solver's few steps, from the times at which it calls the network.
    pub fn notice(&self, times: &[f64]) -> Option<String> {
        match self {
            Self::Discrete(schedule) => schedule.notice(times),
            Self::Flow(_) => None,
        }
    }

    /// The times of [`steps`](Self::steps).
    ///
    /// # Errors
    /// As [`steps`](Self::steps).
    pub fn times(&self, num_inference_steps: usize) -> Result<Vec<f64>> {
        let steps = self.steps(num_inference_steps)?;
        Ok(steps.into_iter().map(|step| step.time).collect())
    }

    /// The time at `place`, from 0 to 1, among the equally likely training times: a whole step, or T σ
    /// with σ shifted, in the f32 precision in which it is recorded.
    pub fn time_at(&self, place: f64) -> f64 {
        let train = self.num_train_timesteps();
        match self {
            Self::Discrete(_) => whole(place * train as f64).min(train - 1) as f64,
            Self::Flow(schedule) => {
                let time = schedule.shifted(place) * train as f64;
                f64::from(time as f32)
            }
        }
    }

    /// Checks that the schedule has this time.
    ///
    /// # Errors
    /// The available times, in words.
    pub(crate) fn check_time(&self, time: f64) -> std::result::Result<(), String> {
        let train = self.num_train_timesteps();
        let (there, times) = match self {
            Self::Discrete(_) => (
                (0.0..train as f64).contains(&time) && time.fract() == 0.0,
                format!("timesteps in 0..{train}"),
            ),
            Self::Flow(_) => (
                (0.0..=train as f64).contains(&time),
                format!("timesteps in 0..={train}"),
            ),
        };
        if there { Ok(()) } else { Err(times) }
    }

    /// Noisy latents.
    ///
    /// # Shapes
    /// `original` and `noise` alike `[b, c, h, w]`; `times` one for every row, or one for all.
    pub fn add_noise(&self, original: Tensor<4>, noise: Tensor<4>, times: &[f64]) -> Tensor<4> {
        let inputs = times.iter().map(|&time| self.level(time).input);
        mixed(&inputs.collect::<Vec<_>>(), original, noise)
    }

    /// The clean latents implied by a network's `output` for noisy `latents` at a time; shapes as for
    /// [`add_noise`](Self::add_noise).
    pub(crate) fn original(&self, latents: Tensor<4>, output: Tensor<4>, time: f64) -> Tensor<4> {
        pred_original(&[self.level(time)], output, latents)
    }

    /// The target of the prediction; shapes as for [`add_noise`](Self::add_noise).
    pub fn target(&self, original: Tensor<4>, noise: Tensor<4>, times: &[f64]) -> Tensor<4> {
        let outputs = times.iter().map(|&time| self.level(time).output);
        mixed(&outputs.collect::<Vec<_>>(), original, noise)
    }

    /// SHA-256 of everything that determines noisy latents and times.
    pub(crate) fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        match self {
            Self::Discrete(schedule) => {
                for alpha_bar in schedule.alphas_cumprod() {
                    hash.update(alpha_bar.to_le_bytes());
                }
            }
            Self::Flow(schedule) => {
                hash.update((self.num_train_timesteps() as u64).to_le_bytes());
                hash.update(schedule.shift().to_le_bytes());
            }
        }
        hex(hash)
    }
}

/// Refuses no steps, and more than in training.
pub(super) fn check_steps(num_inference_steps: usize, num_train_timesteps: usize) -> Result<()> {
    if (1..=num_train_timesteps).contains(&num_inference_steps) {
        return Ok(());
    }
    Err(Error::Setting {
        name: "num_inference_steps",
        expected: format!("1 to {num_train_timesteps}"),
        found: num_inference_steps.to_string(),
    })
}

/// The whole step of training at or before a time.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "times are from 0 to 100000"
)]
pub(super) fn whole(time: f64) -> usize {
    time as usize
}
