//! A : A′ :: B : B′, end to end.

use std::path::PathBuf;

use burn::tensor::{Device, FloatDType, Tensor};
use image::RgbImage;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::learn::{LearnConfig, Records};
use crate::noise::{Guidance, Inversion};
use crate::progress::{LossTerms, Observer};
use crate::prompt::PromptConfig;
use crate::tokens::DifferenceTokens;

/// How B′ is generated from B.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GenerateConfig {
    /// How B becomes noise.
    pub inversion: Inversion,
    /// What guidance moves away from.
    pub guidance: Guidance,
    /// Strength of guidance; 1 is none. Absent: see [`GenerateConfig::guidance_scale`].
    pub guidance_scale: Option<f64>,
    /// Guidance while B is turned into noise.
    pub source_guidance_scale: f64,
    /// Steps of the sampling schedule.
    pub num_inference_steps: usize,
    /// Edit-friendly inversion: the fraction of the schedule that is skipped at its noisy end.
    pub skip: f64,
    /// DDIM inversion: fixed-point iterations per step; 1 is the plain inversion.
    pub inversion_iterations: usize,
    /// SDEdit: how far B is noised, 0 to 1.
    pub sdedit_strength: f64,
    /// Stochasticity of the sampling steps: 0 is DDIM, 1 is DDPM.
    pub eta: f64,
    /// Scale of the difference tokens.
    pub strength: f64,
    /// Undo the difference instead: [P_B, −D̃].
    pub reverse: bool,
    /// What ordinary guidance moves away from.
    pub negative_prompt: String,
    /// Seed of the noise.
    pub seed: u64,
}

impl GenerateConfig {
    /// The strength of guidance: as set, or else what suits the inversion and the guidance.
    pub fn guidance_scale(&self) -> f64 {
        let usual = match (self.guidance, self.inversion) {
            (Guidance::Difference, Inversion::Ddim) => 3.0,
            (Guidance::Difference, _) => 2.0,
            (Guidance::Ordinary, Inversion::Ddim) => 1.0,
            (Guidance::Ordinary, Inversion::EditFriendly) => 15.0,
            (Guidance::Ordinary, Inversion::Sdedit) => 7.5,
        };
        self.guidance_scale.unwrap_or(usual)
    }
}

impl Default for GenerateConfig {
    fn default() -> Self {
        Self {
            inversion: Inversion::EditFriendly,
            guidance: Guidance::Difference,
            guidance_scale: None,
            source_guidance_scale: 1.0,
            num_inference_steps: 100,
            skip: 0.36,
            inversion_iterations: 1,
            sdedit_strength: 0.8,
            eta: 1.0,
            strength: 1.0,
            reverse: false,
            negative_prompt: String::new(),
            seed: 0,
        }
    }
}

/// All settings of one analogy.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AnalogyConfig {
    /// How prompts are made.
    pub prompt: PromptConfig,
    /// How the difference is learned.
    pub learn: LearnConfig,
    /// How B′ is generated.
    pub generate: GenerateConfig,
}

impl AnalogyConfig {
    /// Sets the seed of everything that is drawn.
    #[must_use]
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.prompt.seed = seed;
        self.learn.seed = seed;
        self.generate.seed = seed;
        self
    }
}

/// Where the models of an analogy are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelPaths {
    /// The diffusers pipeline folder.
    pub model: PathBuf,
    /// The joint space: a transformers `CLIPModel` folder; `<model>/clip` by default.
    pub clip: Option<PathBuf>,
    /// A transformers `Blip2ForConditionalGeneration` folder; `<model>/captioner` by default.
    pub captioner: Option<PathBuf>,
}

/// The frozen models of an analogy.
#[derive(Debug)]
pub struct Models {}

impl Models {
    /// Opens the models; the captioner is read when the first caption is asked for.
    ///
    /// # Errors
    /// Whatever is wrong with a model folder, naming the file.
    pub fn open(_paths: &ModelPaths, _device: &Device, _dtype: FloatDType) -> Result<Self> {
        unimplemented!("lands with the pipeline")
    }

    /// A caption for a picture.
    ///
    /// # Errors
    /// [`Error::Missing`](crate::Error::Missing) if there is no captioner.
    pub fn caption(&self, _image: &RgbImage) -> Result<String> {
        unimplemented!("lands with the captioner")
    }
}

/// One pair of pictures (A, A′) that shows the difference.
#[derive(Debug, Clone)]
pub struct Example {
    /// The picture before.
    pub a: RgbImage,
    /// The picture after.
    pub a_prime: RgbImage,
    /// A's caption or own prompt; captioned where absent.
    pub caption_a: Option<String>,
    /// The same for A′.
    pub caption_a_prime: Option<String>,
}

/// A picture to apply a difference to.
#[derive(Debug, Clone)]
pub struct Target {
    /// The picture.
    pub b: RgbImage,
    /// Its caption or own prompt; captioned where absent.
    pub caption_b: Option<String>,
}

/// What learning found.
#[derive(Debug, Clone)]
pub struct Learned {
    /// The best difference tokens.
    pub tokens: DifferenceTokens,
    /// After how many steps they were found.
    pub best_step: usize,
    /// The loss of every step.
    pub history: Vec<LossTerms>,
    /// Captions of A and A′ of every example.
    pub captions: Vec<[String; 2]>,
    /// Prompts of A and A′ of every example, as the text encoder saw them.
    pub prompts: Vec<[String; 2]>,
}

/// A picture with the difference applied.
#[derive(Debug, Clone)]
pub struct Applied {
    /// B′.
    pub b_prime: RgbImage,
    /// B's caption.
    pub caption_b: String,
    /// B's prompt, as the text encoder saw it.
    pub prompt_b: String,
}

/// Learns the difference that the examples show.
///
/// # Errors
/// [`Error`](crate::Error) of every kind; [`Error::Stopped`](crate::Error::Stopped) if the
/// observer asks to stop.
pub fn learn(
    _models: &Models,
    _examples: &[Example],
    _config: &AnalogyConfig,
    _records: &Records,
    _observer: Observer<'_>,
) -> Result<Learned> {
    unimplemented!("lands with the optimisation loop")
}

/// Applies a difference to one picture.
///
/// # Errors
/// As [`learn`]; [`Error::WrongBase`](crate::Error::WrongBase) if the tokens were learned on
/// another model.
pub fn apply(
    _models: &Models,
    _tokens: &DifferenceTokens,
    _target: &Target,
    _config: &AnalogyConfig,
    _observer: Observer<'_>,
) -> Result<Applied> {
    unimplemented!("lands with the inversions")
}

/// A : A′ :: B : B′: [`learn`], then [`apply`].
///
/// # Errors
/// As [`learn`] and [`apply`].
pub fn solve(
    models: &Models,
    examples: &[Example],
    target: &Target,
    config: &AnalogyConfig,
    records: &Records,
    observer: Observer<'_>,
) -> Result<(Learned, Applied)> {
    let learned = learn(models, examples, config, records, observer)?;
    let applied = apply(models, &learned.tokens, target, config, observer)?;
    Ok((learned, applied))
}

/// Plain text-to-image.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TextToImage {
    /// What to draw.
    pub prompt: String,
    /// What to move away from.
    pub negative_prompt: String,
    /// Strength of guidance; 1 is none.
    pub guidance_scale: f64,
    /// Steps of the sampling schedule.
    pub num_inference_steps: usize,
    /// Name of the solver: `ddim`, …; the model's own if absent.
    pub scheduler: Option<String>,
    /// Scale of the difference tokens, where there are any.
    pub strength: f64,
    /// Seed of the noise.
    pub seed: u64,
}

impl Default for TextToImage {
    fn default() -> Self {
        Self {
            prompt: String::new(),
            negative_prompt: String::new(),
            guidance_scale: 7.5,
            num_inference_steps: 50,
            scheduler: None,
            strength: 1.0,
            seed: 0,
        }
    }
}

/// Draws a picture from words, optionally followed by difference tokens.
///
/// # Shapes
/// `init_latents`: unit-variance noise [1, channels, h, w], drawn from the seed where absent.
///
/// # Errors
/// As [`apply`].
pub fn generate(
    _models: &Models,
    _request: &TextToImage,
    _tokens: Option<&DifferenceTokens>,
    _init_latents: Option<Tensor<4>>,
    _observer: Observer<'_>,
) -> Result<RgbImage> {
    unimplemented!("lands with the pipeline")
}
