//! Straight paths from clean latents to noise: the schedule of flow matching.

use std::path::Path;

use serde::Deserialize;

use crate::weights::{OtherFields, check_fixed_fields};
use crate::{Error, Result};

/// Fields with only one supported value.
const FIXED_FIELDS: &[(&str, &str)] = &[
    ("time_shift_type", "\"exponential\""),
    ("invert_sigmas", "false"),
    ("shift_terminal", "null"),
    ("stochastic_sampling", "false"),
    ("use_karras_sigmas", "false"),
    ("use_exponential_sigmas", "false"),
    ("use_beta_sigmas", "false"),
];

/// `scheduler_config.json` of a `FlowMatchEulerDiscreteScheduler`, with diffusers' names and
/// defaults.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct FlowConfig {
    /// The scheduler the model was saved with.
    #[serde(rename = "_class_name")]
    pub class_name: Option<String>,
    /// The time of σ = 1.
    pub num_train_timesteps: usize,
    /// s in σ′ = s σ / (1 + (s − 1) σ): more than 1 puts more steps near the noise.
    pub shift: f64,
    /// Whether s = e^μ instead, with μ linear in the number of the picture's tokens.
    pub use_dynamic_shifting: bool,
    /// A number of tokens,
    pub base_image_seq_len: usize,
    /// μ there,
    pub base_shift: f64,
    /// another number of tokens,
    pub max_image_seq_len: usize,
    /// and μ there.
    pub max_shift: f64,
    /// All other fields.
    #[serde(flatten)]
    pub other: OtherFields,
}

impl Default for FlowConfig {
    fn default() -> Self {
        Self {
            class_name: None,
            num_train_timesteps: 1000,
            shift: 1.0,
            use_dynamic_shifting: false,
            base_image_seq_len: 256,
            base_shift: 0.5,
            max_image_seq_len: 4096,
            max_shift: 1.15,
            other: OtherFields::new(),
        }
    }
}

/// Noisy latents `(1 − σ) x₀ + σ ε` at the time T σ, with T for
/// [`num_train_timesteps`](FlowConfig::num_train_timesteps)
/// ([Esser et al. 2024](https://arxiv.org/abs/2403.03206)).
#[derive(Debug, Clone)]
pub struct FlowSchedule {
    config: FlowConfig,
    /// s
    shift: f64,
    /// Whether n steps are spaced evenly down to 1 / n.
    whole_steps: bool,
    /// Whether a dynamic shift is FLUX.2's, which also depends on the number of steps.
    empirical: bool,
    /// Tokens of the pictures.
    tokens: usize,
}

/// The largest absolute μ of a configuration's dynamic shift e^μ.
const MOST_MU: f64 = 6.0;

/// The largest absolute μ that is told apart: beyond it, every step is one of pure noise.
const LARGEST_MU: f64 = 30.0;

/// Its scheduler in diffusers, and others that visit its times in other ways.
const CLASSES: [&str; 3] = [
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
];

/// μ of FLUX.2, as in its diffusers pipeline (`compute_empirical_mu`): linear in the number of tokens for
/// 200 steps, where it is FLUX.1's, and for 10 steps; for other numbers of steps linear in that number. Above
/// 4300 tokens it is always that of 200 steps.
fn empirical_mu(tokens: usize, steps: usize) -> f64 {
    let (tokens, steps) = (tokens as f64, steps as f64);
    let of_200 = 0.000_169_27 * tokens + 0.456_666_66;
    if tokens > 4300.0 {
        return of_200;
    }
    let of_10 = 8.738_095_24e-5 * tokens + 1.898_333_33;
    of_200 + (of_200 - of_10) / 190.0 * (steps - 200.0)
}

impl FlowSchedule {
    /// The schedule that `config` describes; `path` is named in errors.
    ///
    /// # Errors
    /// [`Error::Config`] if a value is out of range or not supported.
    pub fn new(config: &FlowConfig, path: &Path) -> Result<Self> {
        check_fixed_fields(&config.other, FIXED_FIELDS, path)?;
        if let Some(class) = &config.class_name
            && !CLASSES.contains(&class.as_str())
        {
            return Err(Error::Config {
                path: path.to_owned(),
                field: "_class_name".to_owned(),
                reason: format!("expected {}, found {class}", CLASSES.join(" or ")),
            });
        }
        let wrong = |field: &str, expected: &str, found: String| {
            Err(Error::Config {
                path: path.to_owned(),
                field: field.to_owned(),
                reason: format!("expected {expected}, found {found}"),
            })
        };
        let (steps, shift) = (config.num_train_timesteps, config.shift);
        if !(2..=100_000).contains(&steps) {
            return wrong("num_train_timesteps", "2 to 100000", steps.to_string());
        }
        if !(1e-3..=1e3).contains(&shift) {
            return wrong("shift", "0.001 to 1000", shift.to_string());
        }
        for (field, mu) in [
            ("base_shift", config.base_shift),
            ("max_shift", config.max_shift),
        ] {
            if !(-MOST_MU..=MOST_MU).contains(&mu) {
                return wrong(field, "-6 to 6", mu.to_string());
            }
        }
        let (base, most) = (config.base_image_seq_len, config.max_image_seq_len);
        if base >= most {
            return wrong(
                "max_image_seq_len",
                &format!("more than {base}"),
                most.to_string(),
            );
        }
        let schedule = Self {
            config: config.clone(),
            shift,
            whole_steps: false,
            empirical: false,
            tokens: base,
        };
        Ok(schedule.for_tokens(base))
    }

    /// The same for pictures with this number of tokens, on which a dynamic shift depends.
    #[must_use]
    pub fn for_tokens(mut self, tokens: usize) -> Self {
        self.tokens = tokens;
        let config = &self.config;
        if config.use_dynamic_shifting && self.empirical {
            self.shift = shift_of(empirical_mu(tokens, 200));
        } else if config.use_dynamic_shifting {
            let (base, most) = (config.base_image_seq_len, config.max_image_seq_len);
            let slope = (config.max_shift - config.base_shift) / (most as f64 - base as f64);
            let mu = config.base_shift + slope * (tokens as f64 - base as f64);
            self.shift = shift_of(mu);
        }
        self
    }

    /// The same with n steps that are evenly spaced before the shift, from 1 down to 1 / n, as in FLUX.1.
    #[must_use]
    pub fn with_whole_steps(mut self) -> Self {
        self.whole_steps = true;
        self
    }

    /// The same with FLUX.2's dynamic shift, which depends on the number of steps; and with
    /// [whole steps](Self::with_whole_steps). Training times, which have no number of steps, are shifted as for
    /// 200 steps, where the shift is FLUX.1's.
    #[must_use]
    pub fn with_empirical_shift(mut self) -> Self {
        (self.empirical, self.whole_steps) = (true, true);
        let tokens = self.tokens;
        self.for_tokens(tokens)
    }

    /// s in σ′ = s σ / (1 + (s − 1) σ) during training.
    pub fn shift(&self) -> f64 {
        self.shift
    }

    /// The configuration that the schedule was made from.
    pub fn config(&self) -> &FlowConfig {
        &self.config
    }

    /// σ′ = s σ / (1 + (s − 1) σ)
    pub(super) fn shifted(&self, sigma: f64) -> f64 {
        shifted(self.shift, sigma)
    }

    /// The σ of `n` steps from 1 down: evenly spaced, then shifted. As in diffusers, the last one before the
    /// shift is the least σ of training, already shifted unless the shift is dynamic; with
    /// [whole steps](Self::with_whole_steps), it is 1 / n.
    pub(super) fn sigmas(&self, n: usize) -> Vec<f64> {
        let least = 1.0 / self.config.num_train_timesteps as f64;
        let least = match (self.whole_steps, self.config.use_dynamic_shifting) {
            (true, _) => 1.0 / n as f64,
            (false, true) => least,
            (false, false) => self.shifted(least),
        };
        let step = (1.0 - least) / (n.max(2) - 1) as f64;
        let shift = match self.empirical && self.config.use_dynamic_shifting {
            true => shift_of(empirical_mu(self.tokens, n)),
            false => self.shift,
        };
        (0..n)
            .map(|i| shifted(shift, 1.0 - step * i as f64))
            .collect()
    }
}

/// s = e^μ
fn shift_of(mu: f64) -> f64 {
    mu.clamp(-LARGEST_MU, LARGEST_MU).exp()
}

/// s σ / (1 + (s − 1) σ)
fn shifted(shift: f64, sigma: f64) -> f64 {
    shift * sigma / (1.0 + (shift - 1.0) * sigma)
}
