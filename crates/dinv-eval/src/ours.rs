//! Difference Inversion and its ablations.

use std::sync::Arc;

use difference_inversion::Result;
use difference_inversion::diffusion::frozen::Models;
use difference_inversion::method::analogy::{self, Example, Target};
use difference_inversion::method::delta::DeltaMode;
use difference_inversion::method::difference::DifferenceTokens;
use difference_inversion::method::generate_config::AnalogyConfig;
use difference_inversion::method::learn::{ClipReading, Initialisation, LearnConfig, Records};
use difference_inversion::method::prompt::PromptMode;
use difference_inversion::util::arrays::{Array, Arrays};
use difference_inversion::util::progress::Observer;
use image::RgbImage;
use serde_json::{Map, Value};

use super::settings::{learned_with, recorded, with_settings};
use super::{Analogy, Captions, EvalModels, Method, Told};

/// Kim, Kim and Kim 2025 ([arXiv 2506.07750](https://arxiv.org/abs/2506.07750)) with the settings of
/// [`AnalogyConfig`] that are recommended for the model. With `reverse`, the same analogy is solved
/// backwards: the difference from A′ to A is learned, and subtracted from B.
struct DifferenceInversion {
    models: Arc<Models>,
    config: AnalogyConfig,
}

/// The unmodified method.
pub(super) fn full(models: &EvalModels, values: &Map<String, Value>) -> Result<Box<dyn Method>> {
    ablation(models, values, |_| {})
}

/// The image delta in place of the interpolated one.
pub(super) fn image_delta(
    models: &EvalModels,
    values: &Map<String, Value>,
) -> Result<Box<dyn Method>> {
    ablation(models, values, |learn| learn.delta = DeltaMode::Image)
}

/// Only L_after.
pub(super) fn no_consistency(
    models: &EvalModels,
    values: &Map<String, Value>,
) -> Result<Box<dyn Method>> {
    ablation(models, values, |learn| learn.consistency = false)
}

/// Difference tokens initialised with noise of the vocabulary's spread.
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

/// The CLIP loss as published.
pub(super) fn clip_alone(
    models: &EvalModels,
    values: &Map<String, Value>,
) -> Result<Box<dyn Method>> {
    ablation(models, values, |learn| {
        learn.clip_reading = ClipReading::Alone;
    })
}

/// The method with something left out; named settings override it.
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

    /// Nothing, since the captioner describes the pictures, unless the prompts are the suite's texts.
    fn told(&self) -> Told {
        match self.config.prompt.prompt_mode {
            PromptMode::Text => Told::Captions,
            _ => Told::Nothing,
        }
    }

    fn is_told(&self, captions: &Captions, _: Option<&str>) -> bool {
        let all = captions.of_a().is_some() && captions.b.is_some();
        self.told() == Told::Nothing || all
    }

    fn learning(&self) -> Option<Value> {
        let name = if self.config.generate.reverse {
            "difference tokens from A′ to A"
        } else {
            "difference tokens"
        };
        let drawing = ["generate"];
        Some(learned_with(name, &self.config, &drawing))
    }

    fn learn(&self, analogy: &Analogy, seed: u64, observer: Observer<'_>) -> Result<Arrays> {
        let captions = self.captions(analogy);
        let mut example = Example {
            a: analogy.a.clone(),
            a_prime: analogy.a_prime.clone(),
            caption_a: captions.a,
            caption_a_prime: captions.a_prime,
        };
        if self.config.generate.reverse {
            example = example.reversed();
        }
        let config = self.config.clone().with_seed(seed);
        let records = Records::default();
        let learned = analogy::learn(&self.models, &[example], &config, &records, observer)?;
        let tokens = learned.tokens.into_embeddings().into_iter().enumerate();
        Ok(tokens.fold(Arrays::default(), |arrays, (encoder, tokens)| {
            arrays.with(token_name(encoder), Array::from_tensor(tokens))
        }))
    }

    fn draw(
        &self,
        analogy: &Analogy,
        learned: &Arrays,
        seed: u64,
        observer: Observer<'_>,
    ) -> Result<RgbImage> {
        let base = self.models.pipeline().base();
        let device = self.models.pipeline().device();
        let tokens = (0..base.encoders.len())
            .map(|encoder| learned.tensor(&token_name(encoder), device))
            .collect::<Result<_>>()?;
        let target = Target {
            b: analogy.b.clone(),
            caption_b: self.captions(analogy).b,
        };
        let config = self.config.clone().with_seed(seed);
        let tokens = DifferenceTokens::new(tokens, base)?;
        Ok(analogy::apply(&self.models, &tokens, &target, &config, observer)?.b_prime)
    }
}

impl DifferenceInversion {
    /// The suite's captions, if the method is given them.
    fn captions(&self, analogy: &Analogy) -> Captions {
        match (self.told(), &analogy.captions) {
            (Told::Captions, Some(captions)) => captions.clone(),
            _ => Captions::default(),
        }
    }
}

/// The name of the difference tokens of a text encoder.
fn token_name(encoder: usize) -> String {
    format!("tokens.{encoder}")
}
