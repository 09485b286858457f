//! Methods that are given B′'s contents in words.

use std::sync::Arc;

use difference_inversion::Result;
use difference_inversion::diffusion::frozen::Models;
use difference_inversion::diffusion::words::FullPrompt;
use difference_inversion::method::generate_config::GenerateConfig;
use difference_inversion::method::regenerate::{self, Branches, Guidance, Inversion};
use difference_inversion::util::arrays::Arrays;
use difference_inversion::util::progress::Observer;
use image::RgbImage;
use serde_json::{Map, Value};

use super::settings::{recorded, with_settings};
use super::{Analogy, Captions, EvalModels, Method, Told};

/// Inverts B to noise under its caption and draws it again under the caption of B′, with the settings
/// of [`GenerateConfig`].
struct Words {
    models: Arc<Models>,
    config: GenerateConfig,
}

/// What Difference Inversion does with B, with the true caption of B′ in place of the Full Prompt: the
/// upper bound if the difference is fully understood.
pub(super) fn text_swap(
    models: &EvalModels,
    values: &Map<String, Value>,
) -> Result<Box<dyn Method>> {
    words(models, &models.recommended.generate, values)
}

/// SDEdit ([Meng et al. 2022](https://arxiv.org/abs/2108.01073)) with the settings of diffusers'
/// image-to-image pipeline.
pub(super) fn sdedit(models: &EvalModels, values: &Map<String, Value>) -> Result<Box<dyn Method>> {
    let config = GenerateConfig {
        inversion: Inversion::Sdedit,
        guidance: Guidance::Ordinary,
        guidance_scale: Some(7.5),
        num_inference_steps: 50,
        sdedit_strength: 0.8,
        ..GenerateConfig::default()
    };
    words(models, &config, values)
}

fn words(
    models: &EvalModels,
    config: &GenerateConfig,
    values: &Map<String, Value>,
) -> Result<Box<dyn Method>> {
    let config = with_settings(config, values)?;
    config.validate()?;
    let models = models.text_to_image()?;
    Ok(Box::new(Words { models, config }))
}

impl Method for Words {
    fn settings(&self) -> Value {
        recorded(&self.config)
    }

    fn told(&self) -> Told {
        Told::Captions
    }

    fn is_told(&self, captions: &Captions, _: Option<&str>) -> bool {
        captions.of_b().is_some()
    }

    fn draw(
        &self,
        analogy: &Analogy,
        _: &Arrays,
        seed: u64,
        observer: Observer<'_>,
    ) -> Result<RgbImage> {
        let pipeline = self.models.pipeline();
        let config = GenerateConfig {
            seed,
            ..self.config.clone()
        };
        let [source, target] = analogy.captions_of_b()?.map(|caption| {
            let words = pipeline.read(&pipeline.prompt(caption)?, 0)?;
            pipeline.encode_prompts(&[FullPrompt::plain(&words)])
        });
        let branches = Branches {
            source: source?,
            target: target?,
            negative: pipeline.encode_negative_prompt(&config.negative_prompt)?,
        };
        let latents_b = pipeline.encode_image(&analogy.b);
        let latents = regenerate::regenerate(pipeline, latents_b, &branches, &config, observer)?;
        pipeline.decode(latents)
    }
}
