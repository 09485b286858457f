//! The identity that a checkpoint and the run resuming from it must share.

use burn::tensor::Tensor;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::diffusion::family::DenoiserPart;
use crate::diffusion::pipeline::Pipeline;
use crate::diffusion::sample::PredictionType;
use crate::diffusion::text_encoder::Base;
use crate::method::learn::{LearnConfig, Pair, Schedule};
use crate::util::arrays::Arrays;
use crate::util::digest::hex;
use crate::util::tensors::host;
use crate::{Error, Result};

/// Settings that may differ between a checkpoint and the run that resumes from it: they do not change
/// completed steps. So may the number of steps, if the learning rate is constant.
const FREE_SETTINGS: [&str; 2] = ["checkpoint_every", "patience"];

/// The name of the settings among the parts of an identity.
const CONFIG: &str = "config";

/// Everything that determines the steps of a run, besides the state in a checkpoint.
#[derive(Debug, Clone)]
pub(super) struct Identity<'a> {
    pub(super) config: &'a LearnConfig,
    pub(super) base: Base,
    /// The denoiser's part of its family.
    part: &'static DenoiserPart,
    /// Fingerprint of the denoiser's weights.
    denoiser: String,
    /// Its prediction type.
    prediction_type: PredictionType,
    /// As [`Noising::fingerprint`](crate::diffusion::sample::Noising::fingerprint).
    noise_schedule: String,
    /// SHA-256 of the pairs' latents, deltas and prompts.
    pairs: String,
}

impl<'a> Identity<'a> {
    pub(super) fn new(pipeline: &Pipeline, pairs: &[Pair], config: &'a LearnConfig) -> Self {
        let base = pipeline.base();
        let noising = pipeline.noising();
        Self {
            config,
            part: &pipeline.family().denoiser,
            denoiser: pipeline.fingerprint(),
            prediction_type: noising.prediction_type(),
            noise_schedule: noising.fingerprint(),
            pairs: hash_of(pairs, pipeline.text_encoders().len()),
            base,
        }
    }

    /// By name, as JSON in the metadata of a checkpoint.
    fn parts(&self) -> [(&'static str, String); 6] {
        [
            ("base", json!(self.base.encoders)),
            (self.part.part, json!(self.denoiser)),
            ("prediction_type", json!(self.prediction_type)),
            ("noise_schedule", json!(self.noise_schedule)),
            (CONFIG, json!(self.config)),
            ("pairs", json!(self.pairs)),
        ]
        .map(|(name, value)| (name, value.to_string()))
    }

    /// Adds the identity to a checkpoint.
    pub(super) fn mark(&self, arrays: Arrays) -> Arrays {
        (self.parts().into_iter()).fold(arrays, |arrays, (name, json)| {
            arrays.with_metadata(name, json)
        })
    }

    /// Checks that a checkpoint belongs to this run, or to one that was the same up to there.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] naming the difference.
    pub(super) fn check(&self, arrays: &Arrays) -> Result<()> {
        for (name, ours) in self.parts() {
            let read = |json: &str| -> Result<Value> {
                serde_json::from_str(json).map_err(|error| {
                    Error::invalid_file(&arrays.path, format!("metadata `{name}`: {error}"))
                })
            };
            let theirs = arrays.metadata.get(name).map_or("", String::as_str);
            let mut theirs = read(theirs)?;
            if name == CONFIG
                && let Ok(config) = serde_json::from_value::<LearnConfig>(theirs.clone())
            {
                theirs = json!(config); // with the defaults of newer settings
            }
            if let Some(difference) = self.difference(name, &theirs, &read(&ours)?) {
                let reason = format!(
                    "the checkpoint does not belong to this run: {difference}; go on with what it \
                     was made with, or start again without it"
                );
                return Err(Error::invalid_file(&arrays.path, reason));
            }
        }
        Ok(())
    }

    /// Whether a setting may differ. With more steps, a learning rate that falls is another one from the first step.
    fn is_free(&self, setting: &str) -> bool {
        let is_constant = self.config.learning_rate_schedule == Schedule::Constant;
        FREE_SETTINGS.contains(&setting) || setting == "steps" && is_constant
    }

    /// The difference between a part of the checkpoint's identity and this run's, if any.
    fn difference(&self, name: &str, theirs: &Value, ours: &Value) -> Option<String> {
        let other_value = |name: &str, theirs: &Value, ours: &Value| {
            format!("its `{name}` is {theirs}, this run's {ours}")
        };
        match name {
            CONFIG => (ours.as_object().into_iter().flatten())
                .map(|(setting, ours)| (setting, theirs.get(setting).unwrap_or(&Value::Null), ours))
                .find(|(setting, theirs, ours)| theirs != ours && !self.is_free(setting))
                .map(|(setting, theirs, ours)| other_value(setting, theirs, ours)),
            _ if theirs == ours => None,
            "prediction_type" => Some(other_value(name, theirs, ours)),
            "base" => Some("it was made with other text encoders".to_owned()),
            _ if name == self.part.part => {
                let title = self.part.title;
                Some(format!(
                    "it was made with another {title}, or with its weights in other bits (`--dtype q8`)"
                ))
            }
            "noise_schedule" => Some("it was made with another noise schedule".to_owned()),
            _ => Some("its pictures or captions are others".to_owned()),
        }
    }
}

/// SHA-256 of latents, deltas and prompts.
fn hash_of(pairs: &[Pair], encoders: usize) -> String {
    let mut hash = Sha256::new();
    let mut floats = |values: &[f32]| values.iter().for_each(|v| hash.update(v.to_le_bytes()));
    for pair in pairs {
        let latents = |latents: &Tensor<4>| host(latents.clone());
        floats(&latents(&pair.latents_a));
        floats(&latents(&pair.latents_a_prime));
        pair.deltas.iter().for_each(|delta| floats(delta));
    }
    for pair in pairs {
        for words in [&pair.prompt_a, &pair.prompt_a_prime] {
            (0..encoders)
                .flat_map(|encoder| words.prompt().ids(encoder))
                .for_each(|id| hash.update(id.to_le_bytes()));
            hash.update(u32::MAX.to_le_bytes());
        }
    }
    hex(hash)
}
