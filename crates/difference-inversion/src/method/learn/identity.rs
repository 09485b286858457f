//! The identity that a checkpoint and the run resuming from it must share.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::diffusion::family::DenoiserPart;
use crate::diffusion::pipeline::Pipeline;
use crate::diffusion::sample::PredictionType;
use crate::diffusion::text_encoder::Base;
use crate::method::learn::{LearnConfig, Pair, Schedule};
use crate::util::arrays::Arrays;
use crate::util::digest::{hex, sha256_of_file};
use crate::util::tensors::host;
use crate::{Error, Result};

/// Settings that may differ between a checkpoint and the run that resumes from it: they do not change
/// completed steps. So may the number of steps, if the learning rate is constant.
const FREE_SETTINGS: [&str; 2] = ["checkpoint_every", "patience"];

/// The name of the settings among the parts of an identity.
const CONFIG: &str = "config";
/// The name of the pairs.
const PAIRS: &str = "pairs";

/// Of how many means a sketch consists.
const MEANS: usize = 64;
/// The largest relative difference of sketches of the same pictures. They differ with the device, and with
/// `--memory low`: with the demo model's autoencoder by up to 0.036.
const TOLERANCE: f32 = 0.1;

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
    pairs: Sketch,
    /// The number of tokens of padded prompts, if it is not the family's.
    max_sequence_length: Option<usize>,
    /// SHA-256 of the file that timesteps and noise are taken from, if any.
    replay: Option<String>,
}

/// What pairs resemble.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Sketch {
    /// SHA-256 of the ids of their prompts.
    prompts: String,
    /// Means of consecutive values of latents and deltas.
    means: Vec<Vec<f32>>,
}

impl<'a> Identity<'a> {
    /// The identity of a run that takes timesteps and noise from the file `replay`, if there is one.
    ///
    /// # Errors
    /// [`Error::Io`] if that cannot be read.
    pub(super) fn new(
        pipeline: &Pipeline,
        pairs: &[Pair],
        config: &'a LearnConfig,
        replay: Option<&Path>,
    ) -> Result<Self> {
        let base = pipeline.base();
        let noising = pipeline.noising();
        Ok(Self {
            config,
            part: &pipeline.family().denoiser,
            denoiser: pipeline.fingerprint(),
            prediction_type: noising.prediction_type(),
            noise_schedule: noising.fingerprint(),
            pairs: Sketch::of(pairs, pipeline.text_encoders().len()),
            max_sequence_length: pipeline.max_sequence_length(),
            replay: replay.map(sha256_of_file).transpose()?,
            base,
        })
    }

    /// By name, as JSON in the metadata of a checkpoint.
    fn parts(&self) -> [(&'static str, String); 8] {
        [
            ("base", json!(self.base.encoders)),
            (self.part.part, json!(self.denoiser)),
            ("prediction_type", json!(self.prediction_type)),
            ("noise_schedule", json!(self.noise_schedule)),
            (CONFIG, json!(self.config)),
            (PAIRS, json!(self.pairs)),
            ("max_sequence_length", json!(self.max_sequence_length)),
            ("replay", json!(self.replay)),
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
            let theirs = arrays.metadata.get(name).map_or("null", String::as_str);
            let mut theirs = read(theirs)?;
            if name == CONFIG
                && let Ok(config) = serde_json::from_value::<LearnConfig>(theirs.clone())
            {
                theirs = json!(config); // with the defaults of newer settings
            }
            if let Some(difference) = self.difference(name, &theirs, &read(&ours)?) {
                let reason = format!(
                    "the checkpoint does not belong to this run: {difference}; resume with what it \
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
            PAIRS => {
                let theirs: Option<Sketch> = serde_json::from_value(theirs.clone()).ok();
                let is_same = theirs.is_some_and(|theirs| theirs.resembles(&self.pairs));
                (!is_same).then(|| "its pictures or captions differ".to_owned())
            }
            "prediction_type" | "max_sequence_length" => Some(other_value(name, theirs, ours)),
            "base" => Some("it was made with other text encoders".to_owned()),
            _ if name == self.part.part => {
                let title = self.part.title;
                Some(format!(
                    "it was made with another {title}, or with its weights in another number format (`--dtype q8`)"
                ))
            }
            "noise_schedule" => Some("it was made with another noise schedule".to_owned()),
            _ => Some(
                "its timesteps and noise come from another file, or from none (`--replay`)"
                    .to_owned(),
            ),
        }
    }
}

impl Sketch {
    /// The sketch of pairs for this number of text encoders.
    fn of(pairs: &[Pair], encoders: usize) -> Self {
        let mut hash = Sha256::new();
        let mut sketches = Vec::new();
        for pair in pairs {
            for latents in [&pair.latents_a, &pair.latents_a_prime] {
                sketches.push(means(&host(latents.clone())));
            }
            sketches.extend(pair.deltas.iter().map(|delta| means(delta)));
            for words in [&pair.prompt_a, &pair.prompt_a_prime] {
                (0..encoders)
                    .flat_map(|encoder| words.prompt().ids(encoder))
                    .for_each(|id| hash.update(id.to_le_bytes()));
                hash.update(u32::MAX.to_le_bytes());
            }
        }
        Self {
            prompts: hex(hash),
            means: sketches,
        }
    }

    /// Whether both are sketches of the same pairs.
    fn resembles(&self, other: &Self) -> bool {
        let near = |(one, other): (&Vec<f32>, &Vec<f32>)| {
            let norm =
                |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>().sqrt();
            let apart = norm(&mut one.iter().zip(other).map(|(one, other)| one - other));
            one.len() == other.len() && apart <= TOLERANCE * norm(&mut one.iter().copied())
        };
        self.prompts == other.prompts
            && self.means.len() == other.means.len()
            && self.means.iter().zip(&other.means).all(near)
    }
}

/// The means of consecutive values.
fn means(values: &[f32]) -> Vec<f32> {
    let length = values.len().div_ceil(MEANS).max(1);
    let runs = values.chunks(length);
    runs.map(|run| run.iter().sum::<f32>() / run.len() as f32)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_resemble_themselves_computed_in_another_way() {
        let latents: Vec<f32> = (0..4096).map(|i| (i as f32 / 97.0).sin() + 0.5).collect();
        let of = |values: Vec<f32>, prompts: &str| Sketch {
            prompts: prompts.to_owned(),
            means: vec![means(&values)],
        };
        let sketch = of(latents.clone(), "words");
        assert_eq!(sketch.means[0].len(), MEANS);
        let nearly = latents.iter().map(|value| value * 1.005 + 0.002).collect();
        assert!(sketch.resembles(&of(nearly, "words")));
        assert!(!sketch.resembles(&of(latents.clone(), "other words")));
        let mut other = latents;
        other[1024..2048].iter_mut().for_each(|value| *value += 0.4);
        assert!(!sketch.resembles(&of(other, "words")));
        assert!(!sketch.resembles(&of(vec![0.5; 7], "words")));
    }
}
