//! A : A′ :: B : B′, end to end.

use image::RgbImage;

use crate::diffusion::frozen::Models;
use crate::diffusion::joint_space::JointSpace;
use crate::diffusion::pipeline::Pipeline;
use crate::diffusion::text_encoder::TextEncoder;
use crate::diffusion::words::FullPrompt;
use crate::method::delta::{self, DeltaMode, Features};
use crate::method::difference::DifferenceTokens;
use crate::method::generate_config::AnalogyConfig;
use crate::method::learn::{self, Initialisation, Outcome, Pair, Records};
use crate::method::prompt::{self, Picture, PromptMode};
use crate::method::regenerate::{self, Branches};
use crate::util::progress::{self, LossTerms, Observer};
use crate::{Error, Result};

/// The number of B among the pictures of a run, beyond all pairs.
const PICTURE_B: usize = usize::MAX >> 17;

/// One pair of pictures (A, A′) that shows the difference.
#[derive(Debug, Clone)]
pub struct Example {
    /// The picture before.
    pub a: RgbImage,
    /// The picture after.
    pub a_prime: RgbImage,
    /// A's caption or own prompt; captioned if absent.
    pub caption_a: Option<String>,
    /// The same for A′.
    pub caption_a_prime: Option<String>,
}

impl Example {
    /// The reverse, from A′ to A.
    #[must_use]
    pub fn reversed(self) -> Self {
        Self {
            a: self.a_prime,
            a_prime: self.a,
            caption_a: self.caption_a_prime,
            caption_a_prime: self.caption_a,
        }
    }
}

/// A picture to apply a difference to.
#[derive(Debug, Clone)]
pub struct Target {
    /// The picture.
    pub b: RgbImage,
    /// Its caption or own prompt; captioned if absent.
    pub caption_b: Option<String>,
}

/// The result of learning.
#[derive(Debug, Clone)]
pub struct Learned {
    /// The best difference tokens.
    pub tokens: DifferenceTokens,
    /// The number of steps after which they were found.
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
/// made, and as [`Models::joints`] and [`learn::difference`].
pub fn learn(
    models: &Models,
    examples: &[Example],
    config: &AnalogyConfig,
    records: &Records,
    observer: Observer<'_>,
) -> Result<Learned> {
    config.learn.validate()?;
    config.prompt.validate()?;
    let pipeline = models.pipeline();
    pipeline.check_words_alone()?;
    let mut config = config.clone();
    let has_directions = (pipeline.learned_encoders().iter()).any(TextEncoder::reads_directions);
    if config.learn.initialisation == Initialisation::Zero
        && has_directions
        && records.resume.is_none()
    {
        let notice = "the model's text encoder reads the direction of a token and not its length: the difference \
                      tokens start as noise of the vocabulary's spread, and not at zero";
        progress::notice(&mut *observer, notice);
    }
    let mut learning = pipeline.clone(); // shares all weights
    let denoises = config.learn.rows(examples.len()) > 0;
    if let Some(side) = config.learn.learn_resolution.filter(|_| denoises) {
        learning = learning.with_shorter_side(side).map_err(of_learning)?;
    }
    let has_joint_space = pipeline.family().has_joint_space();
    let joints = match config.learn.lambda_clip > 0.0 && has_joint_space {
        true => models.joints()?,
        false => &[],
    };
    if let Some(notice) = unguided(joints, pipeline.learned_encoders().len()) {
        progress::notice(&mut *observer, notice);
    }
    let mut pairs = Vec::with_capacity(examples.len());
    let mut captions = Vec::with_capacity(examples.len());
    for (number, example) in examples.iter().enumerate() {
        let (pair, caption) = prepare(
            (models, &learning),
            joints,
            example,
            number,
            &config,
            &mut *observer,
        )?;
        pairs.push(pair);
        captions.push(caption);
    }
    if config.learn.lambda_clip > 0.0 && !has_joint_space {
        let tells = pairs.iter().any(Pair::prompts_differ);
        let (notice, is_led) = led_by_captions(tells, config.learn.delta);
        progress::notice(&mut *observer, notice);
        if !is_led {
            config.learn.lambda_clip = 0.0;
            config.learn.validate()?;
        }
    }
    let config = &config;
    models.pictures_are_read();
    let Outcome {
        tokens,
        best_step,
        history,
    } = learn::difference(&learning, joints, &pairs, &config.learn, records, observer)?;
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

/// An error about the resolution, named by the setting that chose it.
fn of_learning(error: Error) -> Error {
    match error {
        Error::Setting {
            name: "resolution",
            expected,
            found,
        } => Error::Setting {
            name: "learn_resolution",
            expected,
            found,
        },
        other => other,
    }
}

/// What stands in for the CLIP loss where no text encoder was trained with pictures, as a note, and whether anything
/// does.
fn led_by_captions(prompts_differ: bool, delta: DeltaMode) -> (&'static str, bool) {
    match (delta, prompts_differ) {
        (DeltaMode::Image, _) => (
            "no text encoder of the model was trained with pictures, so none can follow the delta `image`: \
             `lambda_clip` counts as 0",
            false,
        ),
        (_, false) => (
            "no text encoder of the model was trained with pictures, and the prompts of A and A′ are equal: \
             `lambda_clip` counts as 0",
            false,
        ),
        (_, true) => (
            "no text encoder of the model was trained with pictures: the CLIP loss reads the text encoder's own states \
             and follows only the captions",
            true,
        ),
    }
}

/// A note if joint spaces guide the tokens of only some text encoders.
fn unguided(joints: &[JointSpace], encoders: usize) -> Option<String> {
    if !(1..encoders).contains(&joints.len()) {
        return None;
    }
    let guided = joints.iter().map(|joint| (joint.encoder() + 1).to_string());
    let guided: Vec<String> = guided.collect();
    Some(match &guided[..] {
        [one] => format!(
            "a joint space was given only for text encoder {one}: the CLIP loss guides its \
             difference tokens and not the others'"
        ),
        several => format!(
            "joint spaces were given only for text encoders {}: the CLIP loss guides their \
             difference tokens and not the others'",
            several.join(" and ")
        ),
    })
}

/// Computes everything about a pair that does not depend on D̃: captions, delta, prompts, and latents of the size at
/// which D̃ is learned.
fn prepare(
    (models, learning): (&Models, &Pipeline),
    joints: &[JointSpace],
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
    let given = [&example.caption_a, &example.caption_a_prime].map(Option::as_deref);
    let of_delta = config.learn.delta != DeltaMode::Image && config.learn.lambda_clip > 0.0;
    let captions = match of_delta || mode != PromptMode::Optimised {
        true => {
            let pictures = [&example.a, &example.a_prime];
            prompt::captions_unless_given(models, pictures, given, mode, &mut *observer)?
        }
        false => given.map(|caption| caption.unwrap_or_default().to_owned()),
    };
    let mut deltas = Vec::with_capacity(joints.len());
    for joint in joints {
        let text = |caption: &str| joint.text_features(&models.pipeline().prompt(caption)?);
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
            let notice = "the captions of A and A′ are equal: only the pictures give a direction";
            progress::notice(&mut *observer, notice);
        }
        deltas.push(delta.direction);
    }
    let mut read = |image, side: usize| {
        let picture = Picture {
            image,
            caption: captions[side].clone(),
            number: 2 * number + side,
        };
        prompt::prompt(
            models,
            &picture,
            &config.prompt,
            config.learn.num_tokens,
            &mut *observer,
        )
    };
    let pair = Pair {
        prompt_a: read(&example.a, 0)?,
        prompt_a_prime: read(&example.a_prime, 1)?,
        latents_a: learning.encode_image(&example.a),
        latents_a_prime: learning.encode_image(&example.a_prime),
        deltas,
    };
    Ok((pair, captions))
}

/// Checks that a difference can be applied with these models and settings. No picture is needed.
///
/// # Errors
/// [`Error::WrongBase`] if the tokens were learned on another model, [`Error::Setting`] for invalid settings or
/// more steps than the schedule has, [`Error::InvalidInput`] for a model that draws from more than words.
pub fn check_apply(
    models: &Models,
    tokens: &DifferenceTokens,
    config: &AnalogyConfig,
) -> Result<()> {
    check_drawing(models, config)?;
    tokens.check_base(&models.pipeline().base())
}

/// Checks that B′ can be made with these models and settings.
fn check_drawing(models: &Models, config: &AnalogyConfig) -> Result<()> {
    config.generate.validate()?;
    config.prompt.validate()?;
    let steps = config.generate.num_inference_steps;
    models.pipeline().noising().steps(steps)?;
    let guided_by = models.pipeline().denoiser().guided_by();
    config.generate.check_guidance(guided_by)?;
    models.pipeline().check_words_alone()
}

/// The target's caption, as given or as written by the captioner, if its prompt uses one. With it,
/// [`apply`] needs no captioner.
///
/// # Errors
/// [`Error::Missing`] if a caption is needed and cannot be made.
pub fn caption(
    models: &Models,
    target: &Target,
    config: &AnalogyConfig,
    observer: Observer<'_>,
) -> Result<String> {
    let (given, mode) = (target.caption_b.as_deref(), config.prompt.prompt_mode);
    match mode {
        PromptMode::Optimised => Ok(given.unwrap_or_default().to_owned()),
        _ => prompt::caption_unless_given(models, &target.b, given, mode, observer),
    }
}

/// Applies a difference to one picture: B′ is generated from B's inverted noise under the Full Prompt
/// [P_B, ±D̃], scaled by the strength.
///
/// # Errors
/// [`Error::WrongBase`] if the tokens were learned on another model, [`Error::Missing`] if a
/// caption is needed and cannot be made, and as [`regenerate::regenerate`].
pub fn apply(
    models: &Models,
    tokens: &DifferenceTokens,
    target: &Target,
    config: &AnalogyConfig,
    observer: Observer<'_>,
) -> Result<Applied> {
    check_apply(models, tokens, config)?;
    let (pipeline, generate) = (models.pipeline(), &config.generate);
    let caption_b = caption(models, target, config, &mut *observer)?;
    let picture = Picture {
        image: &target.b,
        caption: caption_b.clone(),
        number: PICTURE_B,
    };
    let num_tokens = tokens.num_tokens();
    let words = prompt::prompt(models, &picture, &config.prompt, num_tokens, &mut *observer)?;
    models.pictures_are_read();
    let strength = generate.signed_strength();
    let full = FullPrompt::with_difference(&words, tokens.embeddings(), strength);
    let branches = Branches {
        source: pipeline.encode_prompts(&[FullPrompt::plain(&words)])?,
        target: pipeline.encode_prompts(&[full])?,
        negative: pipeline.encode_negative_prompt(&generate.negative_prompt)?,
    };
    let latents_b = pipeline.encode_image(&target.b);
    let latents = regenerate::regenerate(pipeline, latents_b, &branches, generate, observer)?;
    Ok(Applied {
        b_prime: pipeline.decode(latents)?,
        caption_b,
        prompt_b: words.prompt().text().to_owned(),
    })
}

/// A : A′ :: B : B′: [`learn()`], then [`apply()`]. Invalid settings of either and a missing caption of B are
/// reported before learning.
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
    check_drawing(models, config)?;
    config.learn.validate()?;
    let target = Target {
        caption_b: Some(caption(models, target, config, &mut *observer)?),
        b: target.b.clone(),
    };
    let learned = learn(models, examples, config, records, &mut *observer)?;
    let applied = apply(models, &learned.tokens, &target, config, observer)?;
    Ok((learned, applied))
}
