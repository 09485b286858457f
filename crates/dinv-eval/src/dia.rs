//! Diffusion Image Analogies: the difference of two inverted prompts, added to a third.

mod inversion;

use std::sync::Arc;

use burn::tensor::Tensor;
use difference_inversion::diffusion::family;
use difference_inversion::diffusion::frozen::Models;
use difference_inversion::diffusion::joint_space::JointSpace;
use difference_inversion::diffusion::pipeline::Conditions;
use difference_inversion::util::arrays::{Array, Arrays};
use difference_inversion::util::progress::Observer;
use difference_inversion::util::settings::Checks;
use difference_inversion::{Error, Result};
use image::RgbImage;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use self::inversion::Inversion;
use super::metrics::direction;
use super::settings::{learned_with, recorded, with_settings};
use super::{Analogy, EvalModels, Method, Told};

/// Diffusion Image Analogies (Šubrtová et al. 2023, SIGGRAPH). It is given only A, A′ and B.
///
/// Each of A, A′ and B is inverted to a prompt: the first token embeddings of an empty prompt, at the
/// text encoder's input, are optimised so that the U-Net explains the picture. B is inverted to noise
/// that becomes B again under its prompt. B′ is drawn from that noise under `c_B + s (c_A′ − c_A)`,
/// where c is the text encoder's output.
///
/// **From its code** (the text of the paper was unavailable): all of the above; s and guidance are
/// chosen from a grid of results; the start token is among the ten embeddings; a batch is the picture,
/// its mirror image and six crops of 85 to 99 % of its area, each with a timestep of its own among the
/// eight least noisy of ten DDIM steps; fresh noise in each of ten AdamW steps; L-BFGS (ten times twenty
/// iterations) through all sampling steps on the squared error of latents and of pixels, starting from
/// B's latents with the first step's noise; either search ends at a loss of .0008; ten deterministic
/// DDIM steps; s from 0 to 1.5 and guidance from 1 to 12.
/// **Our reading**: its code leaves the choice from the grid to a person. Here, if there is more than
/// one strength or scale, the B′ whose CLIP direction is nearest to that from A to A′ is chosen, which
/// needs only the pictures; by default there is one of each, and no choice. Means of the autoencoder
/// where its code draws samples; weight decay only on the optimised embeddings; the target is the
/// velocity for models that predict it.
///
/// The grid to tune on validation: one of `strengths` .5, 1, 1.5 × one of `guidance_scales` 1, 3, 5, with
/// `noise_learning_rate` 1 and `noise_iterations` 2, which reach a lower error sooner; then `inversion`
/// lbfgs, ddim × `token_iterations` 10, 100 with the best of these.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DiaConfig {
    /// Token embeddings of a picture's prompt, including the start token's.
    pub num_tokens: usize,
    /// Optimisation steps for the embeddings.
    pub token_iterations: usize,
    /// AdamW's learning rate for the embeddings.
    pub token_learning_rate: f64,
    /// AdamW's weight decay for the embeddings.
    pub token_weight_decay: f64,
    /// Random crops in a batch, besides the picture and its mirror image.
    pub crops: usize,
    /// The smallest share of the picture's area in a crop.
    pub least_crop: f64,
    /// The largest share of the picture's area in a crop.
    pub largest_crop: f64,
    /// Steps of the sampling schedule; the timesteps of the batch are among them.
    pub num_inference_steps: usize,
    /// How B is inverted to noise.
    pub inversion: DiaInversion,
    /// L-BFGS: number of `step` calls; its state is kept between them.
    pub noise_iterations: usize,
    /// L-BFGS: iterations per call.
    pub noise_inner_iterations: usize,
    /// L-BFGS: its step size.
    pub noise_learning_rate: f64,
    /// L-BFGS: weight of the pixel error relative to the latent error.
    pub noise_pixel_weight: f64,
    /// Loss at which either search ends.
    pub sufficient_loss: f64,
    /// Factors s of the difference.
    pub strengths: Vec<f64>,
    /// Guidance scales; 1 means no guidance.
    pub guidance_scales: Vec<f64>,
}

/// How B is inverted to noise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiaInversion {
    /// The noise is optimised through all sampling steps.
    #[default]
    Lbfgs,
    /// DDIM inversion.
    Ddim,
}

impl Default for DiaConfig {
    fn default() -> Self {
        Self {
            num_tokens: 10,
            token_iterations: 10,
            token_learning_rate: 0.01,
            token_weight_decay: 0.01,
            crops: 6,
            least_crop: 0.85,
            largest_crop: 0.99,
            num_inference_steps: 10,
            inversion: DiaInversion::Lbfgs,
            noise_iterations: 10,
            noise_inner_iterations: 20,
            noise_learning_rate: 0.1,
            noise_pixel_weight: 1.0,
            sufficient_loss: 0.0008,
            strengths: vec![1.0],
            guidance_scales: vec![1.0],
        }
    }
}

impl DiaConfig {
    /// Checks the settings that do not depend on the models.
    fn validate(&self) -> Result<()> {
        let crops = self.least_crop > 0.0
            && self.least_crop <= self.largest_crop
            && self.largest_crop <= 1.0;
        let found = format!("{} to {}", self.least_crop, self.largest_crop);
        let expected = "more than 0, at most largest_crop, which is at most 1";
        Checks::default()
            .at_least_1("num_tokens", self.num_tokens)
            .at_least_1("num_inference_steps", self.num_inference_steps)
            .that("least_crop", crops, expected, found)
            .that(
                "strengths",
                !self.strengths.is_empty(),
                "at least one",
                "none",
            )
            .that(
                "guidance_scales",
                !self.guidance_scales.is_empty(),
                "at least one",
                "none",
            )
            .result()
    }
}

/// The learned prompts of A, A′ and B, `[1, n, d]` each.
const PROMPTS: [&str; 3] = ["prompt_a", "prompt_a_prime", "prompt_b"];
/// The noise that becomes B.
const NOISE: &str = "noise";

struct Dia {
    models: Arc<Models>,
    config: DiaConfig,
}

pub(super) fn dia(models: &EvalModels, values: &Map<String, Value>) -> Result<Box<dyn Method>> {
    let config = with_settings(&DiaConfig::default(), values)?;
    config.validate()?;
    let models = models.text_to_image()?;
    models.pipeline().check_family(&family::STABLE_DIFFUSION)?;
    models
        .pipeline()
        .noising()
        .steps(config.num_inference_steps)?;
    Ok(Box::new(Dia { models, config }))
}

impl Method for Dia {
    fn settings(&self) -> Value {
        recorded(&self.config)
    }

    fn told(&self) -> Told {
        Told::Nothing
    }

    fn learning(&self) -> Option<Value> {
        let drawing = ["strengths", "guidance_scales"];
        Some(learned_with("prompts and noise", &self.config, &drawing))
    }

    fn learn(&self, analogy: &Analogy, seed: u64, observer: Observer<'_>) -> Result<Arrays> {
        let inversion = self.inversion(seed);
        let mut learned = Arrays::default();
        let mut prompt_b = None;
        for (number, (name, picture)) in PROMPTS
            .into_iter()
            .zip([&analogy.a, &analogy.a_prime, &analogy.b])
            .enumerate()
        {
            let prompt = inversion.prompt(picture, number, &mut *observer)?;
            let states = Array::from_tensor(prompt.context.clone());
            learned = learned.with(name, states);
            prompt_b = Some(prompt);
        }
        let noise = match prompt_b {
            Some(prompt) => inversion.noise(&analogy.b, &prompt, observer)?,
            None => return Ok(learned),
        };
        Ok(learned.with(NOISE, Array::from_tensor(noise)))
    }

    fn draw(
        &self,
        analogy: &Analogy,
        learned: &Arrays,
        seed: u64,
        observer: Observer<'_>,
    ) -> Result<RgbImage> {
        let inversion = self.inversion(seed);
        let device = self.models.pipeline().device();
        let [a, a_prime, b] = PROMPTS.map(|name| learned.tensor::<3>(name, device));
        let (difference, b) = (a_prime? - a?, b?);
        let start: Tensor<4> = learned.tensor(NOISE, device)?;
        let mut candidates = Vec::new();
        for &scale in &self.config.guidance_scales {
            for &strength in &self.config.strengths {
                let prompt = Conditions::new(b.clone() + difference.clone() * strength);
                candidates.push(inversion.draw(prompt, scale, start.clone(), &mut *observer)?);
            }
        }
        self.nearest(analogy, candidates)
    }
}

impl Dia {
    fn inversion(&self, seed: u64) -> Inversion<'_> {
        Inversion {
            pipeline: self.models.pipeline(),
            config: &self.config,
            seed,
        }
    }

    /// The picture whose CLIP direction from B is nearest to that from A to A′; the first if equal.
    fn nearest(&self, analogy: &Analogy, candidates: Vec<RgbImage>) -> Result<RgbImage> {
        let mut best: Option<(f64, RgbImage)> = None;
        let several = candidates.len() > 1;
        for candidate in candidates {
            let cosine = if several {
                clip_direction(&self.models.joints()?[0], analogy, &candidate)?
            } else {
                0.0
            };
            if best.as_ref().is_none_or(|(highest, _)| cosine > *highest) {
                best = Some((cosine, candidate));
            }
        }
        best.map(|(_, picture)| picture)
            .ok_or_else(|| Error::Missing {
                what: "a picture to choose".to_owned(),
                reason: "there is no strength or no guidance scale".to_owned(),
            })
    }
}

/// cos(E_I(A′) − E_I(A), E_I(B′) − E_I(B)) of unit-norm features; 0 if either difference is zero.
fn clip_direction(joint: &JointSpace, analogy: &Analogy, b_prime: &RgbImage) -> Result<f64> {
    let look = |picture| joint.image_features(picture);
    let (a, a_prime) = (look(&analogy.a)?, look(&analogy.a_prime)?);
    let (b, b_prime) = (look(&analogy.b)?, look(b_prime)?);
    Ok(direction([&a, &a_prime], [&b, &b_prime]))
}

#[cfg(test)]
mod tests;
