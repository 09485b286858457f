//! A : A′ :: B : B′, end to end.

use std::path::PathBuf;
use std::sync::OnceLock;

use burn::tensor::{Device, FloatDType, Tensor};
use image::RgbImage;
use serde::{Deserialize, Serialize};

use crate::delta::{self, DeltaMode, Features};
use crate::learn::{self, LearnConfig, Outcome, Pair, Records};
use crate::models::captioner::Captioner;
use crate::models::generate::GenerationConfig;
use crate::noise::{self, Branches, Guidance, Guide, Inversion, Start};
use crate::pipeline::{JointSpace, Pipeline};
use crate::progress::{self, LossTerms, Observer, Stage};
use crate::prompt::{FullPrompt, Prompt, PromptConfig, PromptMode, Words};
use crate::random::{Purpose, normal, rng};
use crate::sample::SolverKind;
use crate::tokens::DifferenceTokens;
use crate::{Error, Result, pez};

/// The number of B among the pictures of a run, after all pairs.
const PICTURE_B: usize = usize::MAX >> 17;

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
    /// Ordinary guidance while an edit-friendly inversion turns B into noise.
    pub source_guidance_scale: f64,
    /// Steps of the sampling schedule.
    pub num_inference_steps: usize,
    /// Edit-friendly inversion: the fraction of the schedule that is skipped at its noisy end.
    pub skip: f64,
    /// DDIM inversion: fixed-point iterations per step; 1 is the plain inversion.
    pub inversion_iterations: usize,
    /// SDEdit: how far B is noised, 0 to 1.
    pub sdedit_strength: f64,
    /// Edit-friendly inversion: stochasticity of its steps, 0 is DDIM, 1 is DDPM.
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

    /// The factor of the difference tokens: their strength, negative for the reverse edit.
    pub fn token_scale(&self) -> f64 {
        if self.reverse {
            -self.strength
        } else {
            self.strength
        }
    }

    /// Checks that the settings make sense; whether the schedule has as many steps is checked with it.
    ///
    /// # Errors
    /// [`Error::Setting`] naming the first that does not.
    pub fn validate(&self) -> Result<()> {
        let unit = 0.0..=1.0;
        let checks = [
            (
                "guidance_scale",
                self.guidance_scale().is_finite(),
                "a number",
                self.guidance_scale(),
            ),
            (
                "source_guidance_scale",
                self.source_guidance_scale.is_finite(),
                "a number",
                self.source_guidance_scale,
            ),
            (
                "skip",
                (0.0..1.0).contains(&self.skip),
                "0 or more, less than 1",
                self.skip,
            ),
            (
                "sdedit_strength",
                unit.contains(&self.sdedit_strength),
                "0 to 1",
                self.sdedit_strength,
            ),
            ("eta", unit.contains(&self.eta), "0 to 1", self.eta),
            (
                "strength",
                self.strength.is_finite(),
                "a number",
                self.strength,
            ),
            (
                "inversion_iterations",
                self.inversion_iterations > 0,
                "at least 1",
                self.inversion_iterations as f64,
            ),
            (
                "num_inference_steps",
                self.num_inference_steps > 0,
                "at least 1",
                self.num_inference_steps as f64,
            ),
        ];
        match checks.into_iter().find(|(_, holds, ..)| !holds) {
            None => Ok(()),
            Some((name, _, expected, found)) => Err(Error::Setting {
                name,
                expected: expected.to_owned(),
                found: found.to_string(),
            }),
        }
    }
}

impl Default for GenerateConfig {
    fn default() -> Self {
        Self {
            inversion: Inversion::EditFriendly,
            guidance: Guidance::Difference,
            guidance_scale: None,
            source_guidance_scale: 3.5,
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
pub struct Models {
    pipeline: Pipeline,
    /// One for each text encoder of the pipeline.
    joints: Vec<JointSpace>,
    captioner: OnceLock<Captioner>,
    captioner_folder: PathBuf,
    device: Device,
    dtype: FloatDType,
}

impl Models {
    /// Opens the models; the captioner is read when the first caption is asked for.
    ///
    /// # Errors
    /// Whatever is wrong with a model folder, naming the file; [`Error::WrongBase`] if the joint
    /// space does not belong to the model.
    pub fn open(paths: &ModelPaths, device: &Device, dtype: FloatDType) -> Result<Self> {
        let pipeline = Pipeline::open(&paths.model, None, device, dtype)?;
        let clip = paths
            .clip
            .clone()
            .unwrap_or_else(|| paths.model.join("clip"));
        if !clip.is_dir() {
            return Err(Error::Missing {
                what: "the joint space".to_owned(),
                reason: format!(
                    "there is no folder {}; give the transformers CLIPModel folder whose text \
                     encoder the model has",
                    clip.display()
                ),
            });
        }
        let joint = JointSpace::open(&clip, device, dtype)?;
        joint.check_encoder(&pipeline.text_encoders()[0])?;
        Ok(Self {
            pipeline,
            joints: vec![joint],
            captioner: OnceLock::new(),
            captioner_folder: (paths.captioner.clone())
                .unwrap_or_else(|| paths.model.join("captioner")),
            device: device.clone(),
            dtype,
        })
    }

    /// The diffusion model.
    pub fn pipeline(&self) -> &Pipeline {
        &self.pipeline
    }

    /// The joint spaces, one for each text encoder of the pipeline.
    pub fn joints(&self) -> &[JointSpace] {
        &self.joints
    }

    /// A caption for a picture.
    ///
    /// # Errors
    /// [`Error::Missing`] if there is no captioner.
    pub fn caption(&self, image: &RgbImage) -> Result<String> {
        let captioner = match self.captioner.get() {
            Some(captioner) => captioner,
            None if self.captioner_folder.is_dir() => {
                let folder = &self.captioner_folder;
                let captioner = Captioner::open(folder, &self.device, self.dtype)?;
                self.captioner.get_or_init(|| captioner)
            }
            None => {
                return Err(Error::Missing {
                    what: "a captioner".to_owned(),
                    reason: format!(
                        "there is no folder {}; give captions, or a transformers \
                         Blip2ForConditionalGeneration folder",
                        self.captioner_folder.display()
                    ),
                });
            }
        };
        captioner.caption(image, &GenerationConfig::default())
    }

    /// A picture's caption, as given or as written by the captioner.
    fn caption_unless_given(
        &self,
        image: &RgbImage,
        given: Option<&str>,
        mode: PromptMode,
        observer: Observer<'_>,
    ) -> Result<String> {
        if let Some(text) = given {
            return Ok(text.to_owned());
        }
        if mode == PromptMode::Text {
            return Err(Error::Missing {
                what: "a prompt".to_owned(),
                reason: "with the prompt mode `text` every picture needs its own text".to_owned(),
            });
        }
        progress::step(&mut *observer, Stage::Caption, 0, 1)?;
        let caption = self.caption(image)?;
        progress::step(observer, Stage::Caption, 1, 1)?;
        Ok(caption)
    }

    /// P_X: the frozen prompt of a picture, read by the text encoders. `number` tells the pictures
    /// of one run apart.
    fn prompt(
        &self,
        picture: &Picture<'_>,
        config: &PromptConfig,
        num_tokens: usize,
        observer: Observer<'_>,
    ) -> Result<Words> {
        let caption = self.pipeline.prompt(&picture.caption)?;
        let prefix = match config.prompt_mode {
            PromptMode::Caption | PromptMode::Text => None,
            PromptMode::Optimised => Some(Prompt::default()),
            PromptMode::CaptionOptimised => Some(caption.clone()),
        };
        let prompt = match prefix {
            None => caption,
            Some(prefix) => {
                let joint = &self.joints[0];
                let image = joint.image_features(picture.image)?;
                pez::optimise(
                    joint,
                    &image,
                    &prefix,
                    config,
                    picture.number,
                    &mut *observer,
                )?
            }
        };
        let words = self.pipeline.read(&prompt, num_tokens)?;
        if let Some(notice) = words.notice() {
            progress::notice(observer, notice);
        }
        Ok(words)
    }
}

/// A picture with its caption, and its number among those of a run.
struct Picture<'a> {
    image: &'a RgbImage,
    caption: String,
    number: usize,
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
/// [`Error::NoDifference`] if A = A′, [`Error::Missing`] if a caption is needed and cannot be
/// made, and as [`learn::difference`].
pub fn learn(
    models: &Models,
    examples: &[Example],
    config: &AnalogyConfig,
    records: &Records,
    observer: Observer<'_>,
) -> Result<Learned> {
    config.learn.validate()?;
    let mut pairs = Vec::with_capacity(examples.len());
    let mut captions = Vec::with_capacity(examples.len());
    for (number, example) in examples.iter().enumerate() {
        let (pair, caption) = prepare(models, example, number, config, &mut *observer)?;
        pairs.push(pair);
        captions.push(caption);
    }
    let Outcome {
        tokens,
        best_step,
        history,
    } = learn::difference(
        &models.pipeline,
        &models.joints,
        &pairs,
        &config.learn,
        records,
        observer,
    )?;
    let prompts: Vec<[String; 2]> = (pairs.iter())
        .map(|pair| [&pair.prompt_a, &pair.prompt_a_prime].map(|p| p.prompt().text().to_owned()))
        .collect();
    let settings = serde_json::json!({
        "learn": config.learn,
        "prompt": config.prompt,
        "captions": captions,
        "prompts": prompts,
        "best_step": best_step,
    });
    Ok(Learned {
        tokens: tokens.with_settings(settings),
        best_step,
        history,
        captions,
        prompts,
    })
}

/// Works out all of a pair that does not depend on D̃: captions, delta, prompts and latents.
fn prepare(
    models: &Models,
    example: &Example,
    number: usize,
    config: &AnalogyConfig,
    observer: Observer<'_>,
) -> Result<(Pair, [String; 2])> {
    if example.a == example.a_prime {
        return Err(Error::NoDifference {
            reason: "A and A′ are the same picture".to_owned(),
        });
    }
    let mode = config.prompt.prompt_mode;
    let sides = [
        (&example.a, &example.caption_a),
        (&example.a_prime, &example.caption_a_prime),
    ];
    let mut captions = Vec::with_capacity(2);
    for (image, given) in sides {
        let needed = config.learn.delta != DeltaMode::Image || mode != PromptMode::Optimised;
        captions.push(match needed {
            true => models.caption_unless_given(image, given.as_deref(), mode, &mut *observer)?,
            false => given.clone().unwrap_or_default(),
        });
    }
    let captions = [captions[0].clone(), captions[1].clone()];
    let mut deltas = Vec::with_capacity(models.joints.len());
    for joint in &models.joints {
        let text = |caption: &str| joint.text_features(&models.pipeline.prompt(caption)?);
        let image = Features {
            a: joint.image_features(&example.a)?,
            a_prime: joint.image_features(&example.a_prime)?,
        };
        let text = Features {
            a: text(&captions[0])?,
            a_prime: text(&captions[1])?,
        };
        let delta = delta::delta(&image, &text, config.learn.delta, config.learn.alpha)?;
        if delta.mode != config.learn.delta {
            let notice = "the captions of A and A′ do not differ: there is no text delta, so the \
                          image delta stands alone";
            progress::notice(&mut *observer, notice);
        }
        deltas.push(delta.direction);
    }
    let mut prompt = |image, side: usize| {
        let picture = Picture {
            image,
            caption: captions[side].clone(),
            number: 2 * number + side,
        };
        models.prompt(
            &picture,
            &config.prompt,
            config.learn.num_tokens,
            &mut *observer,
        )
    };
    let pair = Pair {
        prompt_a: prompt(&example.a, 0)?,
        prompt_a_prime: prompt(&example.a_prime, 1)?,
        latents_a: models.pipeline.encode_image(&example.a),
        latents_a_prime: models.pipeline.encode_image(&example.a_prime),
        deltas,
    };
    Ok((pair, captions))
}

/// Applies a difference to one picture: the Full Prompt [P_B, ±strength · D̃] drives the generation
/// of B′ from B's inverted noise.
///
/// # Errors
/// [`Error::WrongBase`] if the tokens were learned on another model, [`Error::Missing`] if a
/// caption is needed and cannot be made, and as [`noise::regenerate`].
pub fn apply(
    models: &Models,
    tokens: &DifferenceTokens,
    target: &Target,
    config: &AnalogyConfig,
    observer: Observer<'_>,
) -> Result<Applied> {
    let generate = &config.generate;
    generate.validate()?;
    let pipeline = &models.pipeline;
    tokens.check_base(&pipeline.base())?;
    let (given, mode) = (target.caption_b.as_deref(), config.prompt.prompt_mode);
    let caption_b = match mode {
        PromptMode::Optimised => given.unwrap_or_default().to_owned(),
        _ => models.caption_unless_given(&target.b, given, mode, &mut *observer)?,
    };
    let picture = Picture {
        image: &target.b,
        caption: caption_b.clone(),
        number: PICTURE_B,
    };
    let num_tokens = tokens.num_tokens();
    let words = models.prompt(&picture, &config.prompt, num_tokens, &mut *observer)?;
    let negative = pipeline.read(&pipeline.prompt(&generate.negative_prompt)?, 0)?;
    let scale = generate.token_scale();
    let full = FullPrompt::with_difference(&words, tokens.embeddings(), scale);
    let branches = Branches {
        source: pipeline.encode_prompts(&[FullPrompt::plain(&words)])?,
        target: pipeline.encode_prompts(&[full])?,
        negative: pipeline.encode_prompts(&[FullPrompt::plain(&negative)])?,
    };
    let latents_b = pipeline.encode_image(&target.b);
    let latents = noise::regenerate(pipeline, latents_b, &branches, generate, observer)?;
    Ok(Applied {
        b_prime: pipeline.decode(latents)?,
        caption_b,
        prompt_b: words.prompt().text().to_owned(),
    })
}

/// A : A′ :: B : B′: [`learn()`], then [`apply()`].
///
/// # Errors
/// As [`learn()`] and [`apply()`].
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
/// [`Error::WrongBase`] if the tokens were learned on another model, [`Error::Setting`] for
/// settings that make no sense, [`Error::InvalidInput`] for latents of another shape,
/// [`Error::Stopped`] if the observer asks to stop.
pub fn generate(
    models: &Models,
    request: &TextToImage,
    tokens: Option<&DifferenceTokens>,
    init_latents: Option<Tensor<4>>,
    observer: Observer<'_>,
) -> Result<RgbImage> {
    let pipeline = &models.pipeline;
    let kind: SolverKind = match &request.scheduler {
        Some(name) => name.parse()?,
        None => {
            let class = pipeline.schedule().config().class_name.as_deref();
            SolverKind::of_class(class.unwrap_or_default())
        }
    };
    let mut solver = kind.build(pipeline.schedule(), request.num_inference_steps, 0.0)?;
    let num_tokens = tokens.map_or(0, DifferenceTokens::num_tokens);
    let words = pipeline.read(&pipeline.prompt(&request.prompt)?, num_tokens)?;
    if let Some(notice) = words.notice() {
        progress::notice(&mut *observer, notice);
    }
    let full = match tokens {
        None => FullPrompt::plain(&words),
        Some(tokens) => {
            tokens.check_base(&pipeline.base())?;
            FullPrompt::with_difference(&words, tokens.embeddings(), request.strength)
        }
    };
    let negative = pipeline.read(&pipeline.prompt(&request.negative_prompt)?, 0)?;
    let guide = Guide::new(
        pipeline.encode_prompts(&[full])?,
        pipeline.encode_prompts(&[FullPrompt::plain(&negative)])?,
        request.guidance_scale,
    );
    let shape = pipeline.latent_shape();
    let latents = match init_latents {
        Some(latents) if latents.dims() == shape => latents,
        Some(latents) => {
            let found = latents.dims();
            let reason = format!("expected latents of shape {shape:?}, found {found:?}");
            return Err(Error::invalid_input(reason));
        }
        None => normal(
            &mut rng(request.seed, Purpose::Generate, 0),
            shape,
            pipeline.device(),
        ),
    };
    let start = Start {
        latents: latents * solver.init_noise_sigma(),
        step: 0,
        residuals: Vec::new(),
    };
    let latents = noise::denoise(
        pipeline,
        &guide,
        &mut *solver,
        start,
        request.seed,
        observer,
    )?;
    pipeline.decode(latents)
}
