//! Statements of a single file besides its weights: marker tensors, and metadata.

use serde_json::Value;

use crate::diffusion::sample::PredictionType;
use crate::weights::file::TensorFile;

/// An empty tensor that marks the U-Net of some fine-tuned checkpoints as predicting velocity.
pub(crate) const VELOCITY: &str = "v_pred";
/// An empty tensor that marks a schedule ending in pure noise.
pub(crate) const ZERO_SNR: &str = "ztsnr";

/// Metadata fields that name the U-Net's prediction type: those of Stability AI's specification
/// (github.com/Stability-AI/ModelSpec) and of kohya's scripts (github.com/kohya-ss/sd-scripts).
const PREDICTIONS: [&str; 3] = [
    "modelspec.prediction_type",
    "modelspec.predict_key",
    "ss_v_parameterization",
];
/// The metadata field that names the model; for Stable Diffusion 2 it distinguishes its two kinds.
const ARCHITECTURE: &str = "modelspec.architecture";
/// The field of kohya's scripts for a schedule that ends in pure noise.
const RESCALED: &str = "ss_zero_terminal_snr";

/// The training step at which `stable-diffusion-2-base` was saved. Like diffusers, this recognises by it
/// that the model predicts noise.
const SD2_BASE_STEP: u64 = 875_000;

/// The statements of a file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Said {
    /// Whether a tensor states that velocity is predicted.
    pub(super) by_tensor: bool,
    /// The prediction type, and where it is stated.
    pub(super) by_metadata: Option<(PredictionType, &'static str)>,
    /// Whether the metadata state that the schedule ends in pure noise.
    pub(super) zero_snr: bool,
}

impl Said {
    pub(super) fn by(file: &TensorFile) -> Self {
        let field = |name: &str| {
            let found = file.metadata().find(|(key, _)| *key == name);
            found.map(|(_, value)| value.trim().to_lowercase())
        };
        let prediction = |name: &&'static str| Some((prediction(name, &field(name)?)?, *name));
        let architecture = || {
            let name = field(ARCHITECTURE)?;
            let kinds = [
                ("stable-diffusion-v2-768-v", PredictionType::VPrediction),
                ("stable-diffusion-v2-512", PredictionType::Epsilon),
            ];
            let kind = kinds.into_iter().find(|(start, _)| name.starts_with(start));
            kind.map(|(_, prediction)| (prediction, ARCHITECTURE))
        };
        let step = || {
            let key = "global_step";
            let bytes = file.bytes(key, [0, 1, 1]).ok()?.try_into().ok()?;
            (u64::from_le_bytes(bytes) == SD2_BASE_STEP).then_some((PredictionType::Epsilon, key))
        };
        Self {
            by_tensor: file.info(VELOCITY).is_some(),
            by_metadata: (PREDICTIONS.iter().find_map(prediction))
                .or_else(architecture)
                .or_else(step),
            zero_snr: field(RESCALED).is_some_and(|value| is_true(&value)),
        }
    }
}

/// The meaning of a field.
fn prediction(name: &str, value: &str) -> Option<PredictionType> {
    if name == PREDICTIONS[2] {
        return is_true(value).then_some(PredictionType::VPrediction);
    }
    Some(match value {
        "epsilon" | "eps" => PredictionType::Epsilon,
        "v" | "v_prediction" | "v-prediction" | "v_pred" | "vpred" => PredictionType::VPrediction,
        "sample" | "x0" => PredictionType::Sample,
        _ => return None,
    })
}

fn is_true(value: &str) -> bool {
    ["true", "1", "yes"].contains(&value)
}

/// The prediction type, for people.
pub(super) fn title(prediction: &Value) -> &'static str {
    match prediction.as_str() {
        Some("epsilon") => "noise",
        Some("v_prediction") => "velocity",
        _ => "clean latents",
    }
}
