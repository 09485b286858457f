//! VISII: an instruction for InstructPix2Pix, learned from A and A′.

use std::sync::Arc;

use burn::tensor::{DType, Tensor, TensorData};
use difference_inversion::diffusion::draw;
use difference_inversion::diffusion::draw::TextToImage;
use difference_inversion::diffusion::family;
use difference_inversion::diffusion::frozen::Models;
use difference_inversion::diffusion::joint_space::JointSpace;
use difference_inversion::diffusion::pipeline::{Conditions, Pipeline};
use difference_inversion::diffusion::text_encoder::Beginning;
use difference_inversion::diffusion::words::{FullPrompt, Prompt};
use difference_inversion::method::learn::{AdamW, LossScale, Moments};
use difference_inversion::method::loss::finite;
use difference_inversion::method::pez;
use difference_inversion::method::prompt::{PromptConfig, PromptMode};
use difference_inversion::util::arrays::{Array, Arrays};
use difference_inversion::util::progress::{self, Observer, Stage};
use difference_inversion::util::random::{Purpose, normal, rng, shuffled};
use difference_inversion::util::settings::Checks;
use difference_inversion::util::tensors::{cosine, host};
use difference_inversion::{Error, Result};
use image::RgbImage;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::settings::{learned_with, recorded, with_settings};
use super::{Analogy, EvalModels, Method, Told};

/// The cosine at which the CLIP term is clamped.
const LARGEST_COSINE: f64 = 0.5;

/// VISII (Nguyen et al. 2023, "Visual Instruction Inversion",
/// [arXiv 2307.14331](https://arxiv.org/abs/2307.14331)). It is given only A, A′ and B.
///
/// The text encoder's *output* c for an instruction is optimised, so that InstructPix2Pix turns A into
/// A′; start, end and padding stay unchanged. The loss of one timestep t is
/// `λ_mse ‖target − guided(z_A′ + noise_t, t, A, c)‖² − λ_clip clamp(cos(Δ, W mean(c)), −1, ½)` with
/// `Δ = E_I(A′) − E_I(A)` and the text projection W of the joint space.
///
/// **From the paper**: the two terms; the instruction starts as an optimised prompt of A′.
/// **From its code**: that the outputs are optimised and which of them, the guidance inside the loss,
/// the fixed noise of each timestep, the order in which each of 1000 timesteps is visited once, the
/// clamp, all numbers below; the c with the lowest loss of a single step is applied.
/// **Our reading**: the optimised prompt is searched in the model's own joint space (its code:
/// OpenCLIP ViT-H's); unit-norm features in Δ (its code: unnormalised); AdamW in f32 (its code: 8 bits);
/// the target is the velocity for models that predict it.
///
/// The grid to tune on validation: `guidance_scale` 3, 5, 8 × `keep` best, last; then `lambda_clip` .1, 1 ×
/// `image_guidance_scale` 1, 1.5 with the best of these.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VisiiConfig {
    /// Optimisation steps; timesteps are visited again once all have been.
    pub steps: usize,
    /// AdamW's learning rate.
    pub learning_rate: f64,
    /// AdamW's weight decay.
    pub weight_decay: f64,
    /// Weight of the squared error.
    pub lambda_mse: f64,
    /// Weight of the CLIP term.
    pub lambda_clip: f64,
    /// Guidance by the instruction inside the loss.
    pub learn_guidance_scale: f64,
    /// Guidance by A inside the loss.
    pub learn_image_guidance_scale: f64,
    /// Which c is applied.
    pub keep: Keep,
    /// Words of the instruction.
    pub pez_tokens: usize,
    /// Steps of the search for the initial words.
    pub pez_steps: usize,
    /// Learning rate of that search.
    pub pez_learning_rate: f64,
    /// Weight decay of that search.
    pub pez_weight_decay: f64,
    /// Guidance by the instruction when B′ is made.
    pub guidance_scale: f64,
    /// Guidance by B when B′ is made.
    pub image_guidance_scale: f64,
    /// Steps of the sampling schedule.
    pub num_inference_steps: usize,
    /// Name of the solver.
    pub scheduler: String,
}

/// Which of the instructions seen during optimisation is applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Keep {
    /// The instruction after the step with the lowest squared error.
    #[default]
    Best,
    /// The last.
    Last,
}

impl Keep {
    /// The name of the instruction among what was learned.
    fn name(self) -> &'static str {
        match self {
            Self::Best => "best",
            Self::Last => "last",
        }
    }
}

impl Default for VisiiConfig {
    fn default() -> Self {
        Self {
            steps: 1000,
            learning_rate: 1e-3,
            weight_decay: 0.01,
            lambda_mse: 4.0,
            lambda_clip: 0.1,
            learn_guidance_scale: 7.5,
            learn_image_guidance_scale: 1.5,
            keep: Keep::Best,
            pez_tokens: 10,
            pez_steps: 3000,
            pez_learning_rate: 0.1,
            pez_weight_decay: 0.1,
            guidance_scale: 8.0,
            image_guidance_scale: 1.5,
            num_inference_steps: 20,
            scheduler: "euler-ancestral".to_owned(),
        }
    }
}

impl VisiiConfig {
    fn validate(&self) -> Result<()> {
        Checks::default()
            .at_least_1("steps", self.steps)
            .at_least_1("pez_tokens", self.pez_tokens)
            .at_least_1("pez_steps", self.pez_steps)
            .result()
    }
}

struct Visii {
    models: Arc<Models>,
    config: VisiiConfig,
}

pub(super) fn visii(models: &EvalModels, values: &Map<String, Value>) -> Result<Box<dyn Method>> {
    let config = with_settings(&VisiiConfig::default(), values)?;
    config.validate()?;
    let models = models.instruct_pix2pix()?;
    models.pipeline().check_family(&family::INSTRUCT_PIX2PIX)?;
    Ok(Box::new(Visii { models, config }))
}

impl Method for Visii {
    fn settings(&self) -> Value {
        recorded(&self.config)
    }

    fn told(&self) -> Told {
        Told::Nothing
    }

    fn learning(&self) -> Option<Value> {
        let drawing = [
            "keep",
            "guidance_scale",
            "image_guidance_scale",
            "num_inference_steps",
            "scheduler",
        ];
        Some(learned_with("instruction", &self.config, &drawing))
    }

    fn learn(&self, analogy: &Analogy, seed: u64, observer: Observer<'_>) -> Result<Arrays> {
        let inversion = Inversion::new(&self.models, analogy, &self.config, seed, &mut *observer)?;
        let Instructions { best, last } = inversion.learn(observer)?;
        let whole = |words| Array::from_tensor(inversion.frame.around(words));
        Ok(Arrays::default()
            .with(Keep::Best.name(), whole(&best))
            .with(Keep::Last.name(), whole(&last)))
    }

    fn draw(
        &self,
        analogy: &Analogy,
        learned: &Arrays,
        seed: u64,
        observer: Observer<'_>,
    ) -> Result<RgbImage> {
        let config = &self.config;
        let pipeline = self.models.pipeline();
        let request = TextToImage {
            guidance_scale: Some(config.guidance_scale),
            image_guidance_scale: config.image_guidance_scale,
            num_inference_steps: config.num_inference_steps,
            scheduler: Some(config.scheduler.clone()),
            seed,
            ..TextToImage::default()
        };
        let prompt = learned.tensor(config.keep.name(), pipeline.device())?;
        let prompt = Conditions::new(prompt);
        let image = pipeline.show(Some(&analogy.b), None)?;
        let latents = draw::draw(pipeline, &request, prompt, image, None, observer)?;
        pipeline.decode(latents)
    }
}

/// Instructions seen during optimisation, `[words, d]` each.
struct Instructions {
    best: Tensor<2>,
    last: Tensor<2>,
}

/// The outputs of the text encoder that stay unchanged.
struct Frame {
    /// The output of the start token, `[1, 1, d]`.
    start: Tensor<3>,
    /// The outputs of the end token and the padding, `[1, n − words − 1, d]`.
    end: Tensor<3>,
}

impl Frame {
    /// Splits `outputs` `[1, n, d]`, whose end token is at `end`, into frame and words `[words, d]`.
    fn of(outputs: Tensor<3>, end: usize) -> (Self, Tensor<2>) {
        let [_, n, d] = outputs.dims();
        let outputs = outputs.cast(DType::F32);
        let words = outputs.clone().narrow(1, 1, end - 1).reshape([end - 1, d]);
        let frame = Self {
            start: outputs.clone().narrow(1, 0, 1),
            end: outputs.narrow(1, end, n - end),
        };
        (frame, words)
    }

    /// Puts the words back into the frame, `[1, n, d]`.
    fn around(&self, words: &Tensor<2>) -> Tensor<3> {
        let words = words.clone().unsqueeze::<3>();
        Tensor::cat(vec![self.start.clone(), words, self.end.clone()], 1)
    }
}

/// Everything about A, A′ and the first instruction that the steps do not change.
struct Inversion<'a> {
    pipeline: &'a Pipeline,
    joint: &'a JointSpace,
    config: &'a VisiiConfig,
    seed: u64,
    frame: Frame,
    /// The initial instruction, `[words, d]`.
    first: Tensor<2>,
    /// Conditions with neither instruction nor A, then with only A.
    references: Conditions,
    /// The U-Net's input that shows A.
    shown_a: Tensor<4>,
    latents_a_prime: Tensor<4>,
    /// Unit-norm Δ, `[1, e]`.
    direction: Tensor<2>,
}

/// The loss of one timestep; both terms are `[1]`.
struct Objective {
    total: Tensor<1>,
    mse: Tensor<1>,
}

impl<'a> Inversion<'a> {
    fn new(
        models: &'a Models,
        analogy: &Analogy,
        config: &'a VisiiConfig,
        seed: u64,
        observer: Observer<'_>,
    ) -> Result<Self> {
        let pipeline = models.pipeline();
        let Some(joint) = models.joints()?.first() else {
            return Err(Error::Missing {
                what: "a joint space".to_owned(),
                reason: "the instruction starts as words that are found in it".to_owned(),
            });
        };
        let [before, after] =
            [&analogy.a, &analogy.a_prime].map(|image| joint.image_features(image));
        let (before, after) = (before?, after?);
        let search = PromptConfig {
            prompt_mode: PromptMode::Optimised,
            pez_tokens: config.pez_tokens,
            pez_steps: config.pez_steps,
            pez_learning_rate: config.pez_learning_rate,
            pez_weight_decay: config.pez_weight_decay,
            seed,
        };
        let prompt = pez::optimise(joint, &after, &Prompt::default(), &search, 0, observer)?;
        let words = pipeline.read(&prompt, 0)?;
        let outputs = pipeline.encode_prompts(&[FullPrompt::plain(&words)])?;
        let end = words.beginnings.first().map_or(1, Beginning::len);
        let (frame, first) = Frame::of(outputs.context, end);
        let Some(shown_a) = pipeline.show(Some(&analogy.a), None)? else {
            return Err(Error::invalid_input("the model is shown no picture"));
        };
        let empty = pipeline.encode_negative_prompt("")?;
        let references = Conditions::cat(&[
            empty.clone().with_image(shown_a.zeros_like()),
            empty.with_image(shown_a.clone()),
        ]);
        let delta: Vec<f32> = (after.iter().zip(&before)).map(|(a, b)| a - b).collect();
        let shape = [1, delta.len()];
        let direction = Tensor::from_data(
            TensorData::new(delta, shape),
            (pipeline.device(), DType::F32),
        );
        Ok(Self {
            pipeline,
            joint,
            config,
            seed,
            frame,
            first,
            references,
            shown_a,
            latents_a_prime: pipeline.encode_image(&analogy.a_prime),
            direction,
        })
    }

    /// Learns the instructions.
    fn learn(&self, observer: Observer<'_>) -> Result<Instructions> {
        let config = self.config;
        let timesteps = self.pipeline.noising().num_train_timesteps();
        let order = shuffled(&mut rng(self.seed, Purpose::Order, 0), timesteps);
        let optimiser = AdamW::new(config.learning_rate, config.weight_decay);
        let largest = host(self.frame.around(&self.first).max())[0];
        let mut words = self.first.clone();
        let mut moments = Moments::zeros_like(&words);
        let mut loss_scale = LossScale::new(self.pipeline.dtype());
        let mut best = (f64::INFINITY, words.clone());
        for (step, &timestep) in order.iter().cycle().take(config.steps).enumerate() {
            progress::step(&mut *observer, Stage::Learn, step, config.steps)?;
            let mut mse = f64::INFINITY;
            let gradients = loss_scale.gradients(&[words.clone()], |words| {
                let objective = self.objective(&words[0], timestep)?;
                mse = finite(&objective.mse, step)?;
                Ok(objective.total)
            })?;
            for gradient in gradients {
                let gradient = gradient.clamp(-largest, largest);
                words = optimiser.step(words, gradient, &mut moments, step);
            }
            if mse <= best.0 {
                best = (mse, words.clone());
            }
        }
        progress::step(observer, Stage::Learn, config.steps, config.steps)?;
        Ok(Instructions {
            best: best.1,
            last: words,
        })
    }

    /// The loss of the instruction `words` `[words, d]` at a timestep, which has its own fixed noise.
    fn objective(&self, words: &Tensor<2>, timestep: usize) -> Result<Objective> {
        let (pipeline, config) = (self.pipeline, self.config);
        let shape = self.latents_a_prime.dims();
        let noise = normal(
            &mut rng(self.seed, Purpose::Learn, timestep),
            shape,
            pipeline.device(),
        );
        let latents = self.latents_a_prime.clone();
        let (noising, t) = (pipeline.noising(), timestep as f64);
        let noisy = noising.add_noise(latents.clone(), noise.clone(), &[t]);
        let target = noising.target(latents, noise, &[t]);
        // The references do not depend on the instruction, so they are not tracked.
        let references =
            pipeline.predict(noisy.clone().repeat_dim(0, 2), &[t, t], &self.references);
        let (neither, a_alone) = (
            references.clone().narrow(0, 0, 1),
            references.narrow(0, 1, 1),
        );
        let outputs = self.frame.around(words);
        let conditions = Conditions::new(outputs.clone()).with_image(self.shown_a.clone());
        let both = pipeline.predict(noisy, &[t], &conditions);
        let guided = neither.clone()
            + (a_alone.clone() - neither) * config.learn_image_guidance_scale
            + (both - a_alone) * config.learn_guidance_scale;
        let mse = (guided - target).powi_scalar(2).mean();
        let mut total = mse.clone() * config.lambda_mse;
        if config.lambda_clip > 0.0 {
            let mean = outputs.mean_dim(1).squeeze_dim::<2>(1); // [1, d]
            let features = self.joint.text_encoder().project(mean)?.cast(DType::F32);
            let cosine = cosine(features, self.direction.clone()).clamp(-1.0, LARGEST_COSINE);
            total = total - cosine * config.lambda_clip;
        }
        Ok(Objective { total, mse })
    }
}

#[cfg(test)]
mod tests;
