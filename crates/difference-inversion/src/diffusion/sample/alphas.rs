//! The training noise schedule in whole steps, and the timesteps taken from it.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::diffusion::sample::mix::Mix;
use crate::diffusion::sample::noising::{check_steps, whole};
use crate::diffusion::sample::scheduler::{BetaSchedule, SchedulerConfig, TimestepSpacing};
use crate::weights::check_fixed_fields;
use crate::{Error, Result};

/// The largest number of steps that counts as few: those of distilled models (Turbo, Lightning, Hyper, LCM).
const FEW_STEPS: usize = 8;

/// The share of clean latents left at every timestep, and what follows from it.
///
/// With ᾱ for [`alphas_cumprod`](Self::alphas_cumprod), noisy latents are
/// `√ᾱ x₀ + √(1 − ᾱ) ε`.
#[derive(Debug, Clone)]
pub struct AlphaSchedule {
    alphas_cumprod: Vec<f64>,
    config: SchedulerConfig,
    /// The file it comes from, for errors.
    path: PathBuf,
}

impl AlphaSchedule {
    /// The schedule that `config` describes; `path` is named in errors.
    ///
    /// # Errors
    /// [`Error::Config`] if a value is invalid or not supported.
    pub fn new(config: &SchedulerConfig, path: &Path) -> Result<Self> {
        let wrong = |field: &str, reason: String| {
            Err(Error::Config {
                path: path.to_owned(),
                field: field.to_owned(),
                reason,
            })
        };
        let steps = config.num_train_timesteps;
        if !(2..=100_000).contains(&steps) {
            return wrong(
                "num_train_timesteps",
                format!("expected 2 to 100000, found {steps}"),
            );
        }
        for (field, beta) in [
            ("beta_start", config.beta_start),
            ("beta_end", config.beta_end),
        ] {
            if !(0.0..1.0).contains(&beta) {
                return wrong(
                    field,
                    format!("expected a number from 0 to 1, found {beta}"),
                );
            }
        }
        if let Some(betas) = &config.trained_betas {
            if betas.len() != steps {
                let reason = format!("expected {steps} numbers, found {}", betas.len());
                return wrong("trained_betas", reason);
            }
            if let Some(beta) = betas.iter().find(|beta| !(0.0..1.0).contains(*beta)) {
                let reason = format!("expected numbers from 0 to 1, found {beta}");
                return wrong("trained_betas", reason);
            }
        }
        if config.steps_offset >= steps {
            let reason = format!("expected less than {steps}, found {}", config.steps_offset);
            return wrong("steps_offset", reason);
        }
        let mut alphas: Vec<f32> = betas(config).iter().map(|beta| 1.0 - beta).collect();
        if config.rescale_betas_zero_snr {
            alphas = rescale_zero_terminal_snr(&alphas);
        }
        Ok(Self {
            alphas_cumprod: cumulative_product(&alphas)
                .into_iter()
                .map(f64::from)
                .collect(),
            config: config.clone(),
            path: path.to_owned(),
        })
    }

    /// Refuses fields of the configuration with values other than `supported`, if it is that of the scheduler
    /// `class`: they place the steps of that scheduler. What is done to clean latents goes for every solver.
    ///
    /// # Errors
    /// [`Error::Config`] for another value.
    pub(super) fn check_solver(&self, class: &str, supported: &[(&str, &str)]) -> Result<()> {
        let is_own = self.config.class_name.as_deref() == Some(class);
        let checked = supported
            .iter()
            .filter(|(field, _)| is_own || *field == "thresholding");
        let checked: Vec<_> = checked.copied().collect();
        check_fixed_fields(&self.config.other, &checked, &self.path)
    }

    /// A field of the configuration, if it is that of one of these schedulers and not null.
    pub(super) fn own(&self, classes: &[&str], field: &str) -> Option<&Value> {
        let class = self.config.class_name.as_deref();
        let is_own = class.is_some_and(|class| classes.contains(&class));
        let value = self.config.other.get(field).filter(|_| is_own);
        value.filter(|value| !value.is_null())
    }

    /// The problem with a field of the configuration.
    pub(super) fn wrong(&self, field: &str, reason: &str) -> Error {
        Error::Config {
            path: self.path.clone(),
            field: field.to_owned(),
            reason: reason.to_owned(),
        }
    }

    /// The configuration that the schedule was made from.
    pub fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    /// Number of training timesteps.
    pub fn num_train_timesteps(&self) -> usize {
        self.alphas_cumprod.len()
    }

    /// ᾱ of every training timestep, computed in f32 as in diffusers.
    pub fn alphas_cumprod(&self) -> &[f64] {
        &self.alphas_cumprod
    }

    /// The mix of noisy latents at `timestep`, or for `None` the one at which DDIM ends, before the first
    /// timestep.
    pub(super) fn input(&self, timestep: Option<usize>) -> Mix {
        let alpha = match timestep {
            Some(timestep) => self.alphas_cumprod[timestep],
            None if self.config.set_alpha_to_one => 1.0,
            None => self.alphas_cumprod[0],
        };
        Mix::new(alpha.sqrt(), (1.0 - alpha).sqrt())
    }

    /// The timesteps that DDIM visits in `num_inference_steps` steps, noisiest first.
    ///
    /// # Errors
    /// [`Error::Setting`] if there are none or more than in training.
    pub fn timesteps(&self, num_inference_steps: usize) -> Result<Vec<usize>> {
        let spacing = self.spacing(num_inference_steps, TimestepSpacing::Leading);
        let (train, n) = (self.num_train_timesteps(), num_inference_steps);
        check_steps(n, train)?;
        let timesteps = match spacing {
            TimestepSpacing::Linspace => linspace(train - 1, n, n),
            TimestepSpacing::Leading => self.leading(train / n, n),
            TimestepSpacing::Trailing => trailing(train, train as f64 / n as f64),
        };
        Ok(timesteps)
    }

    /// The timestep after `timestep` when DDIM takes `num_inference_steps` steps; `None` past the
    /// first timestep of training.
    pub(super) fn previous_timestep(
        &self,
        timestep: usize,
        num_inference_steps: usize,
    ) -> Option<usize> {
        timestep.checked_sub(self.num_train_timesteps() / num_inference_steps)
    }

    /// The spacing of `n` steps: the model's, or else the solver's usual one (`otherwise`). If the spacing is a
    /// guess, few steps start from pure noise, since models for which few steps suffice were trained that
    /// way.
    pub(super) fn spacing(&self, n: usize, otherwise: TimestepSpacing) -> TimestepSpacing {
        match self.config.spacing_is_guessed && n <= FEW_STEPS {
            true => TimestepSpacing::Trailing,
            false => self.config.timestep_spacing.unwrap_or(otherwise),
        }
    }

    /// A note about very few steps: that their spacing is a guess, or that they start far below pure
    /// noise.
    pub(super) fn notice(&self, times: &[f64]) -> Option<String> {
        let n = times.len();
        if self.config.spacing_is_guessed && n <= FEW_STEPS {
            let steps = if n == 1 {
                "1 step starts"
            } else {
                &format!("{n} steps start")
            };
            return Some(format!(
                "{steps} from pure noise (trailing spacing), as few-step models need; the file does not say: use \
                 `--timestep-spacing leading` for any other model"
            ));
        }
        let (first, train) = (*times.first()?, self.num_train_timesteps());
        (2.0 * first < train as f64).then(|| {
            format!(
                "with this spacing, {n} steps begin at timestep {first} of {train} and leave most of the noise in \
                 the picture; `--timestep-spacing trailing` starts from pure noise"
            )
        })
    }

    /// The timesteps below which half the logarithm of the signal-to-noise ratio is at least `lambda`.
    pub(super) fn above(&self, lambda: f64) -> usize {
        let lambdas = (0..self.num_train_timesteps()).map(|t| -self.sigma(t as f64).ln());
        lambdas.filter(|&found| found >= lambda).count()
    }

    /// The timesteps of the multistep solvers, which leave out the least noisy one that others visit; only
    /// training steps below `last` are visited.
    pub(super) fn multistep_timesteps(&self, n: usize, last: usize) -> Result<Vec<usize>> {
        let spacing = self.spacing(n, TimestepSpacing::Linspace);
        let train = self.num_train_timesteps();
        check_steps(n, train)?;
        let timesteps = match spacing {
            TimestepSpacing::Linspace => linspace(last - 1, n + 1, n),
            TimestepSpacing::Leading => {
                let ratio = last / (n + 1);
                let mut timesteps = self.leading(ratio, n + 1);
                timesteps.pop();
                timesteps
            }
            TimestepSpacing::Trailing => trailing(last, train as f64 / n as f64),
        };
        Ok(timesteps)
    }

    /// The timesteps of the solvers that work on σ, which may lie between training timesteps.
    pub(super) fn sigma_timesteps(&self, n: usize) -> Result<Vec<f64>> {
        let train = self.num_train_timesteps();
        check_steps(n, train)?;
        let spacing = self.spacing(n, TimestepSpacing::Linspace);
        let timesteps = match spacing {
            TimestepSpacing::Linspace => {
                let step = (train - 1) as f64 / (n.max(2) - 1) as f64;
                let first = if n == 1 { 0.0 } else { (train - 1) as f64 };
                return Ok((0..n).map(|i| first - step * i as f64).collect());
            }
            TimestepSpacing::Leading => self.leading(train / n, n),
            TimestepSpacing::Trailing => trailing(train, train as f64 / n as f64),
        };
        Ok(timesteps.into_iter().map(|t| t as f64).collect())
    }

    fn leading(&self, ratio: usize, n: usize) -> Vec<usize> {
        let last = self.num_train_timesteps() - 1;
        (0..n)
            .rev()
            .map(|i| (i * ratio + self.config.steps_offset).min(last))
            .collect()
    }

    /// σ = √((1 − ᾱ) / ᾱ) at `timestep`, linear between training timesteps. If nothing is left of the clean
    /// latents, ᾱ is taken as 2⁻²⁴, as in diffusers, so that σ is finite.
    pub(super) fn sigma(&self, timestep: f64) -> f64 {
        let at = |t: usize| {
            let alpha = self.alphas_cumprod[t.min(self.alphas_cumprod.len() - 1)];
            let alpha = if alpha == 0.0 {
                f64::from(2f32.powi(-24))
            } else {
                alpha
            };
            ((1.0 - alpha) / alpha).sqrt()
        };
        let t = whole(timestep);
        let fraction = timestep - timestep.floor();
        if fraction == 0.0 {
            at(t)
        } else {
            at(t) * (1.0 - fraction) + at(t + 1) * fraction
        }
    }
}

/// β of every timestep, with the rounding of diffusers' f32.
fn betas(config: &SchedulerConfig) -> Vec<f32> {
    let n = config.num_train_timesteps;
    let between = |start: f64, end: f64| -> Vec<f32> {
        let (start, end) = (start as f32, end as f32);
        let step = (end - start) / (n - 1) as f32;
        // From both ends towards the middle, as torch.linspace.
        (0..n)
            .map(|i| {
                if i < n / 2 {
                    start + step * i as f32
                } else {
                    end - step * (n - 1 - i) as f32
                }
            })
            .collect()
    };
    if let Some(betas) = &config.trained_betas {
        return betas.iter().map(|&beta| beta as f32).collect();
    }
    match config.beta_schedule {
        BetaSchedule::Linear => between(config.beta_start, config.beta_end),
        BetaSchedule::ScaledLinear => between(config.beta_start.sqrt(), config.beta_end.sqrt())
            .into_iter()
            .map(|root| root * root)
            .collect(),
        BetaSchedule::SquaredCosine => {
            let alpha_bar = |i: usize| {
                let t = i as f64 / n as f64;
                ((t + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2)
                    .cos()
                    .powi(2)
            };
            (0..n)
                .map(|i| (1.0 - alpha_bar(i + 1) / alpha_bar(i)).min(0.999) as f32)
                .collect()
        }
    }
}

fn cumulative_product(alphas: &[f32]) -> Vec<f32> {
    let mut product = 1f64;
    alphas
        .iter()
        .map(|&alpha| {
            product *= f64::from(alpha);
            product as f32
        })
        .collect()
}

/// Shifts and scales √ᾱ so that the last is 0 and the first is unchanged, and returns its α
/// ([Lin et al. 2024](https://arxiv.org/abs/2305.08891), algorithm 1).
fn rescale_zero_terminal_snr(alphas: &[f32]) -> Vec<f32> {
    let roots: Vec<f32> = cumulative_product(alphas)
        .into_iter()
        .map(f32::sqrt)
        .collect();
    let (first, last) = (roots[0], roots[roots.len() - 1]);
    let alpha_bar: Vec<f32> = roots
        .iter()
        .map(|root| (root - last) * (first / (first - last)))
        .map(|root| root * root)
        .collect();
    let ratios = alpha_bar.windows(2).map(|pair| pair[1] / pair[0]);
    // Through β and back, with its rounding.
    std::iter::once(alpha_bar[0])
        .chain(ratios)
        .map(|alpha| 1.0 - (1.0 - alpha))
        .collect()
}

/// The last `n` of `points` evenly spaced numbers from 0 to `last`, rounded, from the largest.
fn linspace(last: usize, points: usize, n: usize) -> Vec<usize> {
    let step = if points > 1 {
        last as f64 / (points - 1) as f64
    } else {
        0.0
    };
    (points - n..points)
        .rev()
        .map(|i| round(i as f64 * step))
        .collect()
}

/// Evenly spaced numbers from `last - 1` down to 0.
fn trailing(last: usize, step: f64) -> Vec<usize> {
    let last = last as f64;
    let numbers = (0..).map(|i| last - f64::from(i) * step);
    let numbers = numbers.take_while(|&t| t > step * 1e-6);
    numbers.map(|t| round(t).saturating_sub(1)).collect()
}

/// The nearest whole number, the even one of two, as NumPy rounds.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "timesteps are from 0 to 100000"
)]
fn round(t: f64) -> usize {
    t.round_ties_even() as usize
}
