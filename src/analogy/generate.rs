//! Plain generation, with or without difference tokens.

use burn::tensor::Tensor;
use image::RgbImage;

use super::{Models, TextToImage};
use crate::noise::{self, Guide, Start};
use crate::progress::{self, Observer};
use crate::prompt::FullPrompt;
use crate::random::{Purpose, normal, rng};
use crate::sample::SolverKind;
use crate::tokens::DifferenceTokens;
use crate::{Error, Result};

/// Draws a picture from words, optionally followed by difference tokens.
///
/// # Shapes
/// `init_latents`: unit-variance noise [1, channels, h, w], drawn from the seed where absent.
///
/// # Errors
/// As [`generate_latents`], or [`Error::NotFinite`] if the picture is not made of numbers.
pub fn generate(
    models: &Models,
    request: &TextToImage,
    tokens: Option<&DifferenceTokens>,
    init_latents: Option<Tensor<4>>,
    observer: Observer<'_>,
) -> Result<RgbImage> {
    let latents = generate_latents(models, request, tokens, init_latents, observer)?;
    models.pipeline().decode(latents)
}

/// The latents of the picture that [`generate()`] draws.
///
/// # Errors
/// [`Error::WrongBase`] if the tokens were learned on another model, [`Error::Setting`] for
/// settings that make no sense, [`Error::InvalidInput`] for latents of another shape,
/// [`Error::Stopped`] if the observer asks to stop.
pub fn generate_latents(
    models: &Models,
    request: &TextToImage,
    tokens: Option<&DifferenceTokens>,
    init_latents: Option<Tensor<4>>,
    observer: Observer<'_>,
) -> Result<Tensor<4>> {
    let pipeline = models.pipeline();
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
    let conditional = pipeline.encode_prompts(&[full])?;
    // A scale of 1 or less is no guidance, as diffusers has it: distilled models are given 0.
    let guide = match request.guidance_scale > 1.0 {
        true => Guide::new(
            conditional,
            pipeline.encode_negative_prompt(&request.negative_prompt)?,
            request.guidance_scale,
        ),
        false => Guide::plain(conditional),
    };
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
    noise::denoise(
        pipeline,
        &guide,
        &mut *solver,
        start,
        request.seed,
        observer,
    )
}
