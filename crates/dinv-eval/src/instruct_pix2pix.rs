//! InstructPix2Pix: a U-Net trained to follow instructions.

use std::sync::Arc;

use difference_inversion::Result;
use difference_inversion::diffusion::draw::TextToImage;
use difference_inversion::diffusion::family;
use difference_inversion::diffusion::frozen::Models;
use difference_inversion::method::generate;
use difference_inversion::method::generate::Inputs;
use difference_inversion::util::arrays::Arrays;
use difference_inversion::util::progress::Observer;
use image::RgbImage;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::settings::{recorded, with_settings};
use super::{Analogy, Captions, EvalModels, Method, Told};

/// InstructPix2Pix (Brooks et al. 2023, [arXiv 2211.09800](https://arxiv.org/abs/2211.09800)). It is
/// given the instruction and B; it sees neither A nor A′.
///
/// **From the paper**: guidance by picture and by text (equation 3), 100 ancestral Euler steps, and the
/// range of scales, 5 to 10 for the text and 1 to 1.5 for the picture. **From its code**: the defaults
/// below. The picture's scale is 1.5 on its page and in diffusers, 1.2 in its command line.
/// **Our reading**: none.
///
/// The grid to tune on validation: `guidance_scale` 3, 5, 7.5 × `image_guidance_scale` 1, 1.5, 2. Extend
/// it where the best lies at an edge.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct InstructPix2PixConfig {
    /// Strength of guidance by the instruction.
    pub guidance_scale: f64,
    /// Strength of guidance by B.
    pub image_guidance_scale: f64,
    /// Steps of the sampling schedule.
    pub num_inference_steps: usize,
    /// Name of the solver.
    pub scheduler: String,
    /// The negative prompt.
    pub negative_prompt: String,
}

impl Default for InstructPix2PixConfig {
    fn default() -> Self {
        Self {
            guidance_scale: 7.5,
            image_guidance_scale: 1.5,
            num_inference_steps: 100,
            scheduler: "euler-ancestral".to_owned(),
            negative_prompt: String::new(),
        }
    }
}

struct InstructPix2Pix {
    models: Arc<Models>,
    config: InstructPix2PixConfig,
}

pub(super) fn instruct_pix2pix(
    models: &EvalModels,
    values: &Map<String, Value>,
) -> Result<Box<dyn Method>> {
    let config = with_settings(&InstructPix2PixConfig::default(), values)?;
    let models = models.instruct_pix2pix()?;
    models.pipeline().check_family(&family::INSTRUCT_PIX2PIX)?;
    Ok(Box::new(InstructPix2Pix { models, config }))
}

impl Method for InstructPix2Pix {
    fn settings(&self) -> Value {
        recorded(&self.config)
    }

    fn told(&self) -> Told {
        Told::Instruction
    }

    fn is_told(&self, _: &Captions, instruction: Option<&str>) -> bool {
        instruction.is_some()
    }

    fn draw(
        &self,
        analogy: &Analogy,
        _: &Arrays,
        seed: u64,
        observer: Observer<'_>,
    ) -> Result<RgbImage> {
        let config = self.config.clone();
        let request = TextToImage {
            prompt: analogy.told_instruction()?.to_owned(),
            negative_prompt: config.negative_prompt,
            guidance_scale: Some(config.guidance_scale),
            image_guidance_scale: config.image_guidance_scale,
            num_inference_steps: config.num_inference_steps,
            scheduler: Some(config.scheduler),
            seed,
            ..TextToImage::default()
        };
        let inputs = Inputs {
            image: Some(&analogy.b),
            ..Inputs::default()
        };
        generate::generate(&self.models, &request, inputs, observer)
    }
}
