//! Guidance, and denoising along a schedule.

use std::sync::Arc;

use burn::tensor::Tensor;

use crate::diffusion::pipeline::Pipeline;
use crate::diffusion::sample::Solver;
pub use crate::models::denoiser::GuidedBy;
use crate::models::denoiser::How;
use crate::models::denoiser::attention_control::AttentionControl;
use crate::models::denoiser::conditions::Conditions;
use crate::util::progress::{self, Observer, Progress, Stage};
use crate::util::random::{Purpose, normal, rng};
use crate::{Error, Result};

/// The denoiser's output under guidance: `output₀ + Σᵢ scaleᵢ · (outputᵢ − outputᵢ₋₁)` over branches of
/// conditions, each more specific than the one before. Two branches, the reference and the
/// condition, are classifier-free guidance (Ho & Salimans 2021); three are InstructPix2Pix's guidance
/// by picture and text (Brooks et al. 2023, equation 3). It applies to noise and velocity alike.
#[derive(Debug, Clone)]
pub struct Guide {
    first: Conditions,
    further: Vec<(Conditions, f64)>,
    /// The scale that a network with embedded guidance reads in every branch.
    embedded: f64,
    control: Option<Arc<dyn AttentionControl>>,
}

impl Guide {
    /// One condition without guidance.
    pub fn plain(conditional: Conditions) -> Self {
        Self {
            first: conditional,
            further: Vec::new(),
            embedded: 1.0,
            control: None,
        }
    }

    /// Guidance from `reference` through `conditional` and beyond. A scale of 1 or less means none, as in
    /// diffusers: distilled models are given 0.
    pub fn new(conditional: Conditions, reference: Conditions, scale: f64) -> Self {
        if scale <= 1.0 {
            return Self::plain(conditional);
        }
        Self::plain(reference).towards(conditional, scale)
    }

    /// Guidance as the network supports it: from `negative` through `conditional`, as [`new`](Self::new); by an
    /// embedded scale; or none.
    pub fn ordinary(
        guided_by: GuidedBy,
        conditional: Conditions,
        negative: Conditions,
        scale: f64,
    ) -> Self {
        match guided_by {
            GuidedBy::Reference => Self::new(conditional, negative, scale),
            GuidedBy::Embedding { .. } => Self::plain(conditional).embedding(scale),
            GuidedBy::Nothing => Self::plain(conditional),
        }
    }

    /// The same, and from there towards `conditional`.
    #[must_use]
    pub fn towards(mut self, conditional: Conditions, scale: f64) -> Self {
        self.further.push((conditional, scale));
        self
    }

    /// The same with this scale for a network that [embeds](crate::models::denoiser::GuidedBy) it; the default
    /// is 1.
    #[must_use]
    pub fn embedding(mut self, scale: f64) -> Self {
        self.embedded = scale;
        self
    }

    /// The same, while `control` changes attention inside the denoiser, in all branches.
    #[must_use]
    pub fn controlled(mut self, control: Arc<dyn AttentionControl>) -> Self {
        self.control = Some(control);
        self
    }

    /// The output for latents [b, c, h, w], with one timestep each.
    pub(crate) fn predict(
        &self,
        pipeline: &Pipeline,
        latents: Tensor<4>,
        timesteps: &[f64],
    ) -> Tensor<4> {
        let batch = timesteps.len();
        let branches: Vec<Conditions> = std::iter::once(&self.first)
            .chain(self.further.iter().map(|(conditions, _)| conditions))
            .map(|conditions| conditions.clone().repeat_each(batch))
            .collect();
        let count = branches.len();
        let latents = latents.repeat_dim(0, count); // [count · b, c, h, w]
        let conditions = Conditions::cat(&branches);
        let timesteps = timesteps.repeat(count);
        let how = How {
            guidance: self.embedded,
            control: self.control.as_deref(),
            ..How::default()
        };
        let outputs = pipeline.predict_as(latents, &timesteps, &conditions, how);
        let of = |branch: usize| {
            let outputs = outputs.clone();
            outputs.slice([branch * batch..(branch + 1) * batch])
        };
        let further = self.further.iter().enumerate();
        further.fold(of(0), |output, (branch, (_, scale))| {
            output + (of(branch + 1) - of(branch)) * *scale
        })
    }
}

/// Checks the settings of ordinary guidance that are set.
///
/// # Errors
/// [`Error::Setting`] for a negative prompt without a reference, and for a scale of more than 1 without
/// guidance.
pub fn check(guided_by: GuidedBy, scale: Option<f64>, negative_prompt: &str) -> Result<()> {
    let wrong = |name, expected: &str, found| {
        let expected = expected.to_owned();
        Err(Error::Setting {
            name,
            expected,
            found,
        })
    };
    if guided_by != GuidedBy::Reference && !negative_prompt.is_empty() {
        let expected = match guided_by {
            GuidedBy::Nothing => "none, since the model draws without guidance",
            _ => {
                "none, since the model reads the guidance scale as an input and takes no negative prompt"
            }
        };
        return wrong("negative_prompt", expected, format!("{negative_prompt:?}"));
    }
    match scale.filter(|scale| guided_by == GuidedBy::Nothing && *scale > 1.0) {
        Some(scale) => {
            let expected = "1 or less, since the model draws without guidance";
            wrong("guidance_scale", expected, scale.to_string())
        }
        None => Ok(()),
    }
}

/// The start of denoising, and the conditions along its way.
#[derive(Debug, Clone)]
pub struct Start {
    /// The latents before step `step`.
    pub latents: Tensor<4>,
    /// The first step.
    pub step: usize,
    /// The noise added after each step, from the first on: σ_t z_t of an edit-friendly inversion.
    /// Without it, solvers that need noise use `noise`.
    pub residuals: Vec<Tensor<4>>,
    /// The noise of every step of the schedule for solvers that need it, [steps, c, h, w]; drawn
    /// from the seed if absent.
    pub noise: Option<Tensor<4>>,
    /// Whether previews are reported.
    pub previews: bool,
}

/// Runs a solver from a start to the end of its schedule.
///
/// # Errors
/// [`Error::Stopped`] if the observer asks to stop.
pub fn denoise(
    pipeline: &Pipeline,
    guide: &Guide,
    solver: &mut dyn Solver,
    start: Start,
    seed: u64,
    observer: Observer<'_>,
) -> Result<Tensor<4>> {
    solver.check_start(start.step)?;
    let timesteps = solver.timesteps().to_vec();
    let total = timesteps.len() - start.step;
    let mut latents = start.latents;
    if let Some(notice) = pipeline.preview_notice().filter(|_| start.previews) {
        progress::notice(&mut *observer, notice);
    }
    for (done, i) in (start.step..timesteps.len()).enumerate() {
        progress::step(&mut *observer, Stage::Generate, done, total)?;
        let input = solver.scale_model_input(i, latents.clone());
        let output = guide.predict(pipeline, input.clone(), &timesteps[i..=i]);
        if start.previews {
            let picture = pipeline.preview(input, output.clone(), timesteps[i]);
            let _ = observer(&Progress::Preview { picture }); // a request to stop takes effect at the next step
        }
        let fresh = (solver.needs_noise() && start.residuals.is_empty()).then(|| {
            if let Some(noise) = &start.noise {
                return noise.clone().slice([i..i + 1]);
            }
            let mut rng = rng(seed, Purpose::Sample, i);
            normal(&mut rng, latents.dims(), pipeline.device())
        });
        latents = solver.step(i, output, latents, fresh);
        if let Some(residual) = start.residuals.get(done) {
            latents = latents + residual.clone();
        }
    }
    progress::step(observer, Stage::Generate, total, total)?;
    Ok(latents)
}
