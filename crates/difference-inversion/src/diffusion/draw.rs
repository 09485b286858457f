//! Drawing from noise under given conditions, as diffusers' pipelines do.

use std::path::Path;

use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::diffusion::family::Family;
use crate::diffusion::guide::{self, Guide, GuidedBy, Start};
use crate::diffusion::pipeline::Pipeline;
use crate::diffusion::sample::SolverKind;
use crate::models::denoiser::conditions::Conditions;
use crate::util::arrays::Arrays;
use crate::util::progress::{self, Observer};
use crate::util::random::{Purpose, normal, rng};
use crate::util::settings::Unread;
use crate::{Error, Result};

/// Plain generation: text-to-image or, with models that take a picture, image-to-image.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TextToImage {
    #[doc = about!(text.prompt)]
    pub prompt: String,
    #[doc = about!(text.negative_prompt)]
    pub negative_prompt: String,
    #[doc = about!(text.guidance_scale)]
    ///
    /// Absent: see [`TextToImage::guidance_scale`].
    pub guidance_scale: Option<f64>,
    #[doc = about!(text.image_guidance_scale)]
    pub image_guidance_scale: f64,
    #[doc = about!(text.num_inference_steps)]
    pub num_inference_steps: usize,
    #[doc = about!(text.scheduler)]
    ///
    /// A name: `ddim`, …; the model's own where absent.
    pub scheduler: Option<String>,
    #[doc = about!(text.strength)]
    ///
    /// Where there are some.
    pub strength: f64,
    #[doc = about!(seed)]
    pub seed: u64,
    /// Whether a [`Preview`](crate::util::progress::Progress::Preview) is reported after every step. The picture stays the same.
    #[serde(skip)]
    pub previews: bool,
}

impl TextToImage {
    /// The guidance scale: the one that is set, or else the model's default.
    pub fn guidance_scale(&self, guided_by: GuidedBy) -> f64 {
        self.guidance_scale.unwrap_or(match guided_by {
            GuidedBy::Reference => 7.5,
            GuidedBy::Embedding { usual } => usual,
            GuidedBy::Nothing => 1.0,
        })
    }

    /// Whether guidance uses a reference, as diffusers does for each family: distilled models are given a scale
    /// of 0.
    pub(crate) fn is_guided(&self, family: &Family) -> bool {
        let by_picture = family.has_image_guidance();
        let scale = self.guidance_scale(GuidedBy::Reference);
        scale > 1.0 && !(by_picture && self.image_guidance_scale < 1.0)
    }

    /// The settings that a model of this family, with the other settings, does not read.
    pub fn unread(&self, family: &Family, with_tokens: bool) -> Vec<Unread> {
        Unread::among([
            ("strength", with_tokens, "difference tokens"),
            (
                "negative_prompt",
                self.is_guided(family),
                "guidance by a scale of more than 1",
            ),
            (
                "image_guidance_scale",
                family.has_image_guidance(),
                "a model that is guided by a picture, as InstructPix2Pix is",
            ),
        ])
    }
}

impl Default for TextToImage {
    fn default() -> Self {
        Self {
            prompt: String::new(),
            negative_prompt: String::new(),
            guidance_scale: None,
            image_guidance_scale: 1.5,
            num_inference_steps: 50,
            scheduler: None,
            strength: 1.0,
            seed: 0,
            previews: false,
        }
    }
}

/// The noise of a picture, if it is not drawn from the seed.
#[derive(Debug, Clone)]
pub struct InitNoise {
    /// Unit-variance noise [1, channels, h, w].
    pub latents: Tensor<4>,
    /// Noise that ancestral solvers add after each step, standard normal [steps, channels, h, w]; drawn
    /// from the seed if absent.
    pub noise: Option<Tensor<4>>,
}

impl InitNoise {
    /// Reads the tensor `latents` and, if present, `noise` from a safetensors file.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::InvalidFile`] if it cannot be read or is not such a file, or a tensor
    /// is missing or does not have four dimensions.
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

    /// Checks the shapes against a picture's latents and `steps` steps.
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

/// The solver that a model was saved with. DDIM, with which every model can be sampled, replaces those that
/// are not implemented.
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

/// Draws latents under the conditions `prompt`, which replace the request's words, together with the
/// denoiser's input from a picture (see [`Pipeline::show`]).
///
/// # Errors
/// [`Error::Setting`] for invalid settings,
/// [`Error::InvalidInput`] for latents of another shape,
/// [`Error::Stopped`] if the observer asks to stop.
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
    let notice = pipeline.noising().notice(solver.timesteps());
    if let Some(notice) = notice.filter(|_| kind.reads_spacing()) {
        progress::notice(&mut *observer, notice);
    }
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
        previews: request.previews,
    };
    guide::denoise(
        pipeline,
        &guide,
        &mut *solver,
        start,
        request.seed,
        observer,
    )
}

/// Guidance as in diffusers for each family. A scale of 1 or less means none: distilled models are
/// given 0.
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
    let guided_by = pipeline.denoiser().guided_by();
    guide::check(guided_by, request.guidance_scale, &request.negative_prompt)?;
    let scale = request.guidance_scale(guided_by);
    if guided_by != GuidedBy::Reference {
        return Ok(Guide::plain(conditional).embedding(scale));
    }
    if !request.is_guided(pipeline.family()) {
        return Ok(Guide::plain(conditional));
    }
    let negative = pipeline.encode_negative_prompt(&request.negative_prompt)?;
    let reference = beside(negative.clone(), &image);
    if !pipeline.family().has_image_guidance() {
        return Ok(Guide::new(conditional, reference, scale));
    }
    // From neither picture nor text, to the picture only, to both.
    let neither = beside(negative, &image.map(|image| image.zeros_like()));
    Ok(Guide::plain(neither)
        .towards(reference, request.image_guidance_scale)
        .towards(conditional, scale))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::family::{INSTRUCT_PIX2PIX, STABLE_DIFFUSION};

    fn names(unread: &[Unread]) -> Vec<&'static str> {
        unread.iter().map(|unread| unread.setting).collect()
    }

    #[test]
    fn settings_without_effect_are_told() {
        let request = TextToImage::default();
        let unread = request.unread(&STABLE_DIFFUSION, false);
        assert_eq!(names(&unread), ["strength", "image_guidance_scale"]);
        assert!(request.unread(&INSTRUCT_PIX2PIX, true).is_empty());
        let turbo = TextToImage {
            guidance_scale: Some(0.0),
            ..request
        };
        let unread = turbo.unread(&INSTRUCT_PIX2PIX, true);
        assert_eq!(names(&unread), ["negative_prompt"]);
    }
}
