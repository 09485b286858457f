//! Plain generation, with or without difference tokens.

use std::path::Path;

use burn::tensor::{Device, Tensor};
use image::RgbImage;

use super::{Models, TextToImage};
use crate::noise::{self, Guide, Start};
use crate::pipeline::{Conditions, Pipeline};
use crate::progress::{self, Observer};
use crate::prompt::FullPrompt;
use crate::random::{Purpose, normal, rng};
use crate::sample::SolverKind;
use crate::tokens::DifferenceTokens;
use crate::weights::Arrays;
use crate::{Error, Result};

/// The noise a picture is made from, where it is not drawn from the seed.
#[derive(Debug, Clone)]
pub struct InitNoise {
    /// Unit-variance noise [1, channels, h, w].
    pub latents: Tensor<4>,
    /// What ancestral solvers add after each step, standard normal [steps, channels, h, w]; drawn
    /// from the seed where absent.
    pub noise: Option<Tensor<4>>,
}

impl InitNoise {
    /// Reads the tensors `latents` and, if there is one, `noise` of a safetensors file.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::InvalidFile`] if it cannot be read or is not such a file,
    /// [`Error::Tensor`] if a tensor is missing or has not four dimensions.
    pub fn read(path: &Path, device: &Device) -> Result<Self> {
        let arrays = Arrays::read(path)?;
        let noise = (arrays.arrays.contains_key("noise"))
            .then(|| arrays.tensor("noise", device))
            .transpose()?;
        Ok(Self {
            latents: arrays.tensor("latents", device)?,
            noise,
        })
    }

    /// Checks that the shapes are those of a picture's latents and of `steps` steps.
    fn check(&self, latent_shape: [usize; 4], steps: usize) -> Result<()> {
        let [_, c, h, w] = latent_shape;
        let noise = self.noise.as_ref().map(Tensor::dims);
        for (name, expected, found) in [
            ("latents", latent_shape, self.latents.dims()),
            ("noise", [steps, c, h, w], noise.unwrap_or([steps, c, h, w])),
        ] {
            if found != expected {
                let reason = format!("expected {name} of shape {expected:?}, found {found:?}");
                return Err(Error::invalid_input(reason));
            }
        }
        Ok(())
    }
}

/// What a picture is drawn from besides the words; nothing of it by default.
#[derive(Debug, Clone, Default)]
pub struct Inputs<'a> {
    /// Difference tokens that follow the prompt.
    pub tokens: Option<&'a DifferenceTokens>,
    /// The noise to start from, drawn from the seed where absent.
    pub init: Option<InitNoise>,
    /// The picture that InstructPix2Pix or an inpainting model changes.
    pub image: Option<&'a RgbImage>,
    /// What an inpainting model draws anew: white, or at least half as bright.
    pub mask: Option<&'a RgbImage>,
}

/// Draws a picture from words and, as far as the model takes them, other inputs.
///
/// # Errors
/// As [`generate_latents`], or [`Error::NotFinite`] if the picture is not made of numbers.
pub fn generate(
    models: &Models,
    request: &TextToImage,
    inputs: Inputs<'_>,
    observer: Observer<'_>,
) -> Result<RgbImage> {
    let latents = generate_latents(models, request, inputs, observer)?;
    models.pipeline().decode(latents)
}

/// The latents of the picture that [`generate()`] draws.
///
/// # Errors
/// [`Error::WrongBase`] if the tokens were learned on another model, [`Error::Setting`] for
/// settings that make no sense, [`Error::Missing`] if the model takes a picture or a mask that is
/// not there, [`Error::InvalidInput`] for one that it does not take or latents of another shape,
/// [`Error::Stopped`] if the observer asks to stop.
pub fn generate_latents(
    models: &Models,
    request: &TextToImage,
    inputs: Inputs<'_>,
    observer: Observer<'_>,
) -> Result<Tensor<4>> {
    let pipeline = models.pipeline();
    let image = pipeline.show(inputs.image, inputs.mask)?;
    let num_tokens = inputs.tokens.map_or(0, DifferenceTokens::num_tokens);
    let words = pipeline.read(&pipeline.prompt(&request.prompt)?, num_tokens)?;
    if let Some(notice) = words.notice() {
        progress::notice(&mut *observer, notice);
    }
    let full = match inputs.tokens {
        None => FullPrompt::plain(&words),
        Some(tokens) => {
            tokens.check_base(&pipeline.base())?;
            FullPrompt::with_difference(&words, tokens.embeddings(), request.strength)
        }
    };
    let prompt = pipeline.encode_prompts(&[full])?;
    draw(pipeline, request, prompt, image, inputs.init, observer)
}

/// The solver that a model was saved with. Every model can be sampled with DDIM, which stands in for those
/// that are not here.
fn own_solver(pipeline: &Pipeline, observer: Observer<'_>) -> SolverKind {
    let Some(class) = pipeline.noising().class_name() else {
        return SolverKind::Ddim;
    };
    SolverKind::of_class(class).unwrap_or_else(|| {
        let notice = format!("the model's own {class} is not supported: ddim draws in its place");
        progress::notice(observer, notice);
        SolverKind::Ddim
    })
}

/// The latents of the picture drawn under the conditions `prompt`, in place of the request's words,
/// beside what the denoiser is shown of a picture (see [`Pipeline::show`]).
///
/// # Errors
/// As [`generate_latents`].
pub fn draw(
    pipeline: &Pipeline,
    request: &TextToImage,
    prompt: Conditions,
    image: Option<Tensor<4>>,
    init: Option<InitNoise>,
    observer: Observer<'_>,
) -> Result<Tensor<4>> {
    let kind: SolverKind = match &request.scheduler {
        Some(name) => name.parse()?,
        None => own_solver(pipeline, &mut *observer),
    };
    let mut solver = kind.build(pipeline.noising(), request.num_inference_steps, 0.0)?;
    let guide = guide(pipeline, request, prompt, image)?;
    let shape = pipeline.latent_shape();
    let init = match init {
        Some(init) => init,
        None => InitNoise {
            latents: normal(
                &mut rng(request.seed, Purpose::Generate, 0),
                shape,
                pipeline.device(),
            ),
            noise: None,
        },
    };
    init.check(shape, solver.timesteps().len())?;
    let start = Start {
        latents: init.latents * solver.init_noise_sigma(),
        step: 0,
        residuals: Vec::new(),
        noise: init.noise,
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

/// Guidance as diffusers has it for each family. A scale of 1 or less is none: distilled
/// models are given 0.
fn guide(
    pipeline: &Pipeline,
    request: &TextToImage,
    prompt: Conditions,
    image: Option<Tensor<4>>,
) -> Result<Guide> {
    let beside = |conditions: Conditions, image: &Option<Tensor<4>>| match image {
        Some(image) => conditions.with_image(image.clone()),
        None => conditions,
    };
    let conditional = beside(prompt, &image);
    if !request.is_guided(pipeline.family()) {
        return Ok(Guide::plain(conditional));
    }
    let negative = pipeline.encode_negative_prompt(&request.negative_prompt)?;
    let reference = beside(negative.clone(), &image);
    if !pipeline.family().has_image_guidance() {
        return Ok(Guide::new(conditional, reference, request.guidance_scale));
    }
    // From neither picture nor text, to the picture, to both.
    let neither = beside(negative, &image.map(|image| image.zeros_like()));
    Ok(Guide::plain(neither)
        .towards(reference, request.image_guidance_scale)
        .towards(conditional, request.guidance_scale))
}
