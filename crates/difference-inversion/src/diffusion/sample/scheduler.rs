//! `scheduler_config.json`.

use serde::{Deserialize, Serialize};

use crate::weights::OtherFields;

/// How the variances grow over the steps of training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BetaSchedule {
    /// β grows linearly ([Ho et al. 2020](https://arxiv.org/abs/2006.11239)).
    Linear,
    /// √β grows linearly, as latent diffusion has it.
    ScaledLinear,
    /// ᾱ follows a squared cosine
    /// ([Nichol and Dhariwal 2021](https://arxiv.org/abs/2102.09672)).
    #[serde(rename = "squaredcos_cap_v2")]
    SquaredCosine,
}

/// What the network predicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PredictionType {
    /// The noise ε.
    Epsilon,
    /// The clean latents.
    Sample,
    /// The velocity √ᾱ ε − √(1 − ᾱ) x₀
    /// ([Salimans and Ho 2022](https://arxiv.org/abs/2202.00512)).
    VPrediction,
    /// The velocity ε − x₀ of a straight path
    /// ([Lipman et al. 2023](https://arxiv.org/abs/2210.02747)); no schedule of ᾱ has it.
    #[serde(skip_deserializing)]
    Flow,
}

/// Which of the training's timesteps a shorter schedule visits
/// ([Lin et al. 2024](https://arxiv.org/abs/2305.08891), table 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimestepSpacing {
    /// From the first to the last, both included.
    Linspace,
    /// From the first on.
    Leading,
    /// From the last down.
    Trailing,
}

/// The configuration of a scheduler, with the names and defaults of diffusers.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct SchedulerConfig {
    /// The scheduler the model was saved with.
    #[serde(rename = "_class_name")]
    pub class_name: Option<String>,
    /// Steps of training.
    pub num_train_timesteps: usize,
    /// β of the first step.
    pub beta_start: f64,
    /// β of the last step.
    pub beta_end: f64,
    /// How β grows in between.
    pub beta_schedule: BetaSchedule,
    /// What the network predicts.
    pub prediction_type: PredictionType,
    /// Which timesteps are visited; by default leading for DDIM and linspace for the others.
    pub timestep_spacing: Option<TimestepSpacing>,
    /// Added to every timestep of a leading schedule.
    pub steps_offset: usize,
    /// Whether DDIM's last step ends at ᾱ = 1 instead of the first step's ᾱ.
    pub set_alpha_to_one: bool,
    /// Whether DDIM clamps the predicted clean latents.
    pub clip_sample: bool,
    /// To which magnitude it does.
    pub clip_sample_range: f64,
    /// Whether the schedule is rescaled so that the last step is pure noise
    /// ([Lin et al. 2024](https://arxiv.org/abs/2305.08891), algorithm 1).
    pub rescale_betas_zero_snr: bool,
    /// All other fields.
    #[serde(flatten)]
    pub other: OtherFields,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self {
            class_name: None,
            num_train_timesteps: 1000,
            beta_start: 0.0001,
            beta_end: 0.02,
            beta_schedule: BetaSchedule::Linear,
            prediction_type: PredictionType::Epsilon,
            timestep_spacing: None,
            steps_offset: 0,
            set_alpha_to_one: true,
            clip_sample: true,
            clip_sample_range: 1.0,
            rescale_betas_zero_snr: false,
            other: OtherFields::new(),
        }
    }
}
