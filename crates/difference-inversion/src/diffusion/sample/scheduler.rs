//! `scheduler_config.json`.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::weights::OtherFields;
use crate::{Error, Result};

/// How the variances grow over the steps of training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BetaSchedule {
    /// β grows linearly ([Ho et al. 2020](https://arxiv.org/abs/2006.11239)).
    Linear,
    /// √β grows linearly, as in latent diffusion.
    ScaledLinear,
    /// ᾱ follows a squared cosine
    /// ([Nichol and Dhariwal 2021](https://arxiv.org/abs/2102.09672)).
    #[serde(rename = "squaredcos_cap_v2")]
    SquaredCosine,
}

/// The prediction type.
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
    /// ([Lipman et al. 2023](https://arxiv.org/abs/2210.02747)); schedules of ᾱ do not use it.
    #[serde(skip_deserializing)]
    Flow,
}

/// The training timesteps that a shorter schedule visits
/// ([Lin et al. 2024](https://arxiv.org/abs/2305.08891), table 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
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
    /// β of every step, in place of the three fields above.
    pub trained_betas: Option<Vec<f64>>,
    /// The prediction type.
    pub prediction_type: PredictionType,
    /// Which timesteps are visited; by default leading for DDIM and linspace for the others.
    pub timestep_spacing: Option<TimestepSpacing>,
    /// Whether the spacing is a family's usual one and not the model's own, so that few steps are
    /// [trailing](TimestepSpacing::Trailing).
    #[serde(skip)]
    pub spacing_is_guessed: bool,
    /// Added to every timestep of a leading schedule.
    pub steps_offset: usize,
    /// Whether DDIM's last step ends at ᾱ = 1 instead of the first step's ᾱ.
    pub set_alpha_to_one: bool,
    /// Whether DDIM clamps the predicted clean latents.
    pub clip_sample: bool,
    /// The magnitude to which it clamps them.
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
            trained_betas: None,
            prediction_type: PredictionType::Epsilon,
            timestep_spacing: None,
            spacing_is_guessed: false,
            steps_offset: 0,
            set_alpha_to_one: true,
            clip_sample: true,
            clip_sample_range: 1.0,
            rescale_betas_zero_snr: false,
            other: OtherFields::new(),
        }
    }
}

/// The diffusers schedulers with a schedule of β, each with its default first β, last β and growth. Any other
/// solver can replace them.
const OF_BETAS: [(&str, f64, f64, &str); 22] = [
    ("DDIMInverseScheduler", 0.0001, 0.02, "linear"),
    ("DDIMParallelScheduler", 0.0001, 0.02, "linear"),
    ("DDIMScheduler", 0.0001, 0.02, "linear"),
    ("DDPMParallelScheduler", 0.0001, 0.02, "linear"),
    ("DDPMScheduler", 0.0001, 0.02, "linear"),
    ("DEISMultistepScheduler", 0.0001, 0.02, "linear"),
    ("DPMSolverMultistepInverseScheduler", 0.0001, 0.02, "linear"),
    ("DPMSolverMultistepScheduler", 0.0001, 0.02, "linear"),
    ("DPMSolverSDEScheduler", 0.00085, 0.012, "linear"),
    ("DPMSolverSinglestepScheduler", 0.0001, 0.02, "linear"),
    ("EulerAncestralDiscreteScheduler", 0.0001, 0.02, "linear"),
    ("EulerDiscreteScheduler", 0.0001, 0.02, "linear"),
    ("HeunDiscreteScheduler", 0.00085, 0.012, "linear"),
    ("KDPM2AncestralDiscreteScheduler", 0.00085, 0.012, "linear"),
    ("KDPM2DiscreteScheduler", 0.00085, 0.012, "linear"),
    ("LCMScheduler", 0.00085, 0.012, "scaled_linear"),
    ("LMSDiscreteScheduler", 0.0001, 0.02, "linear"),
    ("PNDMScheduler", 0.0001, 0.02, "linear"),
    ("RePaintScheduler", 0.0001, 0.02, "linear"),
    ("SASolverScheduler", 0.0001, 0.02, "linear"),
    ("TCDScheduler", 0.00085, 0.012, "scaled_linear"),
    ("UniPCMultistepScheduler", 0.0001, 0.02, "linear"),
];

/// The schedulers that clamp clean latents by default.
const CLIPPING: [&str; 5] = [
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "RePaintScheduler",
];

/// Fields that mark a noise schedule without β, in any class, with their neutral values.
const OF_OTHER_NOISE: [(&str, &[&str]); 4] = [
    ("timestep_type", &["discrete"]),
    ("use_flow_sigmas", &["false"]),
    ("snr_shift_scale", &["1", "1.0"]),
    ("prediction_type", &["epsilon", "sample", "v_prediction"]),
];

/// Adds the defaults of its class to an incomplete `scheduler_config.json`.
pub(crate) fn complete(config: &mut Value) {
    let class = config["_class_name"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let Some(fields) = config.as_object_mut() else {
        return;
    };
    let mut put = |name: &str, value: Value| {
        fields.entry(name).or_insert(value);
    };
    put("clip_sample", json!(CLIPPING.contains(&class.as_str())));
    if let Some((_, start, end, schedule)) = OF_BETAS.iter().find(|(name, ..)| *name == class) {
        put("beta_start", json!(start));
        put("beta_end", json!(end));
        put("beta_schedule", json!(schedule));
    }
}

/// Refuses a configuration whose noise is not a schedule of β, as shown by its class, or by a field that
/// every solver must respect.
///
/// # Errors
/// [`Error::Config`] naming the field.
pub(crate) fn check_kind(config: &Value, path: &Path) -> Result<()> {
    let wrong = |field: &str, found: &str| {
        Err(Error::Config {
            path: path.to_owned(),
            field: field.to_owned(),
            reason: format!(
                "{found} is another kind of noise, and U-Nets are supported only with a schedule of \
                 betas: no solver can use this model"
            ),
        })
    };
    for (field, plain) in OF_OTHER_NOISE {
        let found = match &config[field] {
            Value::Null => continue,
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        if !plain.contains(&found.as_str()) {
            return wrong(field, &found);
        }
    }
    if config.get("timestep_spacing").is_some_and(Value::is_null) {
        return Err(Error::Config {
            path: path.to_owned(),
            field: "timestep_spacing".to_owned(),
            reason: "expected leading, trailing or linspace, found null".to_owned(),
        });
    }
    match config["_class_name"].as_str() {
        Some(class) if !OF_BETAS.iter().any(|(name, ..)| *name == class) => {
            wrong("_class_name", class)
        }
        _ => Ok(()),
    }
}
