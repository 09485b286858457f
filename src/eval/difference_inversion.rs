//! Difference Inversion and its ablations.

use std::sync::Arc;

use image::RgbImage;
use serde_json::{Map, Value};

use super::settings::{recorded, with_settings};
use super::{Analogy, Captions, EvalModels, Method, Told};
use crate::Result;
use crate::analogy::{self, AnalogyConfig, Example, Models, Target};
use crate::delta::DeltaMode;
use crate::learn::{Initialisation, LearnConfig, Records};
use crate::progress::Observer;
use crate::prompt::PromptMode;

/// Kim, Kim and Kim 2025 ([arXiv 2506.07750](https://arxiv.org/abs/2506.07750)) with the settings
/// recommended for the model; they are those of [`AnalogyConfig`].
struct DifferenceInversion {
    models: Arc<Models>,
    config: AnalogyConfig,
}

/// The method as it is.
pub(super) fn full(models: &EvalModels, values: &Map<String, Value>) -> Result<Box<dyn Method>> {
    ablation(models, values, |_| {})
}

/// The delta of the pictures in place of the interpolated one.
pub(super) fn image_delta(
    models: &EvalModels,
    values: &Map<String, Value>,
) -> Result<Box<dyn Method>> {
    ablation(models, values, |learn| learn.delta = DeltaMode::Image)
}

/// L_after alone.
pub(super) fn no_consistency(
    models: &EvalModels,
    values: &Map<String, Value>,
) -> Result<Box<dyn Method>> {
    ablation(models, values, |learn| learn.consistency = false)
}

/// Difference tokens that start as noise with the vocabulary's spread.
pub(super) fn random_start(
    models: &EvalModels,
    values: &Map<String, Value>,
) -> Result<Box<dyn Method>> {
    ablation(models, values, |learn| {
        learn.initialisation = Initialisation::Random;
    })
}

/// λ_clip = 0.
pub(super) fn no_clip(models: &EvalModels, values: &Map<String, Value>) -> Result<Box<dyn Method>> {
    ablation(models, values, |learn| learn.lambda_clip = 0.0)
}

/// The method with something left out; named settings go before.
fn ablation(
    models: &EvalModels,
    values: &Map<String, Value>,
    leave_out: impl FnOnce(&mut LearnConfig),
) -> Result<Box<dyn Method>> {
    let mut config = models.recommended.clone();
    leave_out(&mut config.learn);
    let config = with_settings(&config, values)?;
    config.learn.validate()?;
    config.generate.validate()?;
    let models = models.text_to_image()?;
    Ok(Box::new(DifferenceInversion { models, config }))
}

impl Method for DifferenceInversion {
    fn settings(&self) -> Value {
        recorded(&self.config)
    }

    /// The captioner describes the pictures, unless the prompts are to be the suite's own texts.
    fn told(&self) -> Told {
        match self.config.prompt.prompt_mode {
            PromptMode::Text => Told::Captions,
            _ => Told::Nothing,
        }
    }

    fn solve(&self, analogy: &Analogy, seed: u64, observer: Observer<'_>) -> Result<RgbImage> {
        let captions = match (self.told(), &analogy.captions) {
            (Told::Captions, Some(captions)) => captions.clone(),
            _ => Captions::default(),
        };
        let example = Example {
            a: analogy.a.clone(),
            a_prime: analogy.a_prime.clone(),
            caption_a: captions.a,
            caption_a_prime: captions.a_prime,
        };
        let target = Target {
            b: analogy.b.clone(),
            caption_b: captions.b,
        };
        let config = self.config.clone().with_seed(seed);
        let records = Records::default();
        let (_, applied) = analogy::solve(
            &self.models,
            &[example],
            &target,
            &config,
            &records,
            observer,
        )?;
        Ok(applied.b_prime)
    }
}
