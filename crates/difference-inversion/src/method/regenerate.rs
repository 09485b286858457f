//! Inverts a picture to noise, and regenerates it from that with another prompt.

use burn::tensor::{DType, Tensor};
use serde::{Deserialize, Serialize};

use crate::diffusion::guide::{Guide, Start, denoise};
use crate::diffusion::pipeline::{Conditions, Pipeline};
use crate::diffusion::sample::{Ddim, Solver};
use crate::method::generate_config::GenerateConfig;
use crate::util::progress::{self, Observer, Stage};
use crate::util::random::{Purpose, normal, rng};
use crate::{Error, Result};

/// Latents per call of the denoiser where their order does not matter.
const INVERSION_BATCH: usize = 4;

/// How B's latents become the start of B′.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Inversion {
    /// Deterministic DDIM steps run backwards (Song et al. 2021).
    Ddim,
    /// Edit-friendly DDPM inversion (Huberman-Spiegelglas et al. 2024).
    #[default]
    EditFriendly,
    /// SDEdit (Meng et al. 2022): noise B up to a strength, then denoise.
    Sdedit,
}

/// The reference that guidance moves away from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Guidance {
    /// The negative prompt (empty by default), as in classifier-free guidance.
    Ordinary,
    /// B's own prompt, so that only the difference is amplified.
    #[default]
    Difference,
}

/// The conditions of inverting B and generating B′, each with one row.
#[derive(Debug, Clone)]
pub struct Branches {
    /// P_B.
    pub source: Conditions,
    /// The Full Prompt [P_B, +D̃].
    pub target: Conditions,
    /// The negative prompt.
    pub negative: Conditions,
}

/// B′'s latents from B's: inverts under P_B, then generates under the Full Prompt.
///
/// # Shapes
/// `latents_b` and the result: [1, channels, h, w], scaled.
///
/// # Errors
/// [`Error::Setting`] for invalid settings, [`Error::InvalidInput`] for a pipeline that
/// draws from more than words, [`Error::Stopped`] if the observer asks to stop.
pub fn regenerate(
    pipeline: &Pipeline,
    latents_b: Tensor<4>,
    branches: &Branches,
    config: &GenerateConfig,
    observer: Observer<'_>,
) -> Result<Tensor<4>> {
    config.validate()?;
    pipeline.check_words_alone()?;
    let guided_by = pipeline.denoiser().guided_by();
    config.check_guidance(guided_by)?;
    let source = match config.guidance {
        Guidance::Ordinary => Guide::ordinary(
            guided_by,
            branches.source.clone(),
            branches.negative.clone(),
            config.source_guidance_scale,
        ),
        Guidance::Difference => Guide::plain(branches.source.clone()),
    };
    let (target, scale) = (
        branches.target.clone(),
        config.guidance_scale_with(guided_by),
    );
    let target = match config.guidance {
        Guidance::Ordinary => Guide::ordinary(guided_by, target, branches.negative.clone(), scale),
        Guidance::Difference => Guide::new(target, branches.source.clone(), scale),
    };
    let eta = match config.inversion {
        Inversion::EditFriendly => config.eta.unwrap_or(pipeline.noising().usual_eta()),
        Inversion::Ddim | Inversion::Sdedit => 0.0,
    };
    let mut solver = Ddim::new(pipeline.noising(), config.num_inference_steps, eta)?;
    if let Some(notice) = pipeline.noising().notice(solver.timesteps()) {
        progress::notice(&mut *observer, notice);
    }
    let steps = solver.timesteps().len();
    solver.check_start(match config.inversion {
        Inversion::Ddim => 0,
        Inversion::EditFriendly => skipped(config, steps),
        Inversion::Sdedit => steps - part_of(config.sdedit_strength, steps),
    })?;
    let start = match config.inversion {
        Inversion::Ddim => {
            let source = Guide::plain(branches.source.clone());
            ddim_inversion(pipeline, latents_b, &source, config, &mut *observer)?
        }
        Inversion::EditFriendly => edit_friendly_inversion(
            pipeline,
            latents_b,
            &source,
            &mut solver,
            config,
            &mut *observer,
        )?,
        Inversion::Sdedit => sdedit(pipeline, latents_b, &solver, config),
    };
    denoise(pipeline, &target, &mut solver, start, config.seed, observer)
}

/// DDIM inversion (Song et al. 2021): each deterministic step x_t → x_s is solved for x_t, with the
/// denoiser's output at the current estimate; the first estimate is x_s itself, and each of
/// `inversion_iterations` improves it (fixed-point iteration, Pan et al. 2023).
///
/// # Errors
/// [`Error::InvalidInput`] if the schedule ends in pure noise but the model predicts noise, which
/// there contains no information about the picture.
pub fn ddim_inversion(
    pipeline: &Pipeline,
    latents: Tensor<4>,
    source: &Guide,
    config: &GenerateConfig,
    observer: Observer<'_>,
) -> Result<Start> {
    let steps = config.num_inference_steps;
    let schedule = pipeline.noising().steps(steps)?;
    let mut x = latents.cast(DType::F32);
    for (done, step) in schedule.iter().rev().enumerate() {
        progress::step(&mut *observer, Stage::Invert, done, steps)?;
        let Some([a, b]) = step.from.step_to(step.to) else {
            return Err(Error::invalid_input(
                "a model that predicts noise cannot be inverted where its schedule leaves nothing \
                 of the picture; its scheduler_config.json contradicts itself",
            ));
        };
        let mut estimate = x.clone();
        for _ in 0..config.inversion_iterations {
            let output = source.predict(pipeline, estimate, &[step.time]);
            estimate = (x.clone() - output * b) / a;
        }
        x = estimate;
    }
    progress::step(observer, Stage::Invert, steps, steps)?;
    Ok(Start {
        latents: x,
        step: 0,
        residuals: Vec::new(),
        noise: None,
        previews: config.previews,
    })
}

/// Edit-friendly DDPM inversion (Huberman-Spiegelglas et al. 2024): each x_t is made from B with
/// independent noise, and `σ_t z_t = x_{t−1} − μ_t(x_t)` makes the steps reproduce B. The
/// first `skip` of the schedule is left out. The residual σ_t z_t is kept rather than z_t, so that
/// B is reproduced exactly even if the last step has σ = 0.
///
/// # Errors
/// [`Error::Stopped`] if the observer asks to stop.
pub fn edit_friendly_inversion(
    pipeline: &Pipeline,
    latents: Tensor<4>,
    source: &Guide,
    solver: &mut Ddim,
    config: &GenerateConfig,
    observer: Observer<'_>,
) -> Result<Start> {
    let device = latents.device();
    let latents = latents.cast(DType::F32);
    let timesteps = solver.timesteps().to_vec();
    let steps = timesteps.len();
    let first = skipped(config, steps);
    let mut path: Vec<Tensor<4>> = (first..steps)
        .map(|i| {
            let noise = normal(
                &mut rng(config.seed, Purpose::Generate, i),
                latents.dims(),
                &device,
            );
            solver.add_noise(i, latents.clone(), noise)
        })
        .collect();
    path.push(latents); // path[i - first] is the latents before step i
    let numbers: Vec<usize> = (first..steps).collect();
    let mut residuals = Vec::with_capacity(numbers.len());
    for chunk in numbers.chunks(INVERSION_BATCH) {
        let (done, total) = (residuals.len(), numbers.len());
        progress::step(&mut *observer, Stage::Invert, done, total)?;
        let together = Tensor::cat(path[done..done + chunk.len()].to_vec(), 0);
        let outputs = source.predict(
            pipeline,
            together,
            &timesteps[chunk[0]..chunk[0] + chunk.len()],
        );
        for (row, &i) in chunk.iter().enumerate() {
            let output = outputs.clone().slice([row..row + 1]);
            let place = i - first;
            let mean = solver.step(i, output, path[place].clone(), None);
            residuals.push(path[place + 1].clone() - mean);
        }
    }
    progress::step(observer, Stage::Invert, numbers.len(), numbers.len())?;
    Ok(Start {
        latents: path.swap_remove(0),
        step: first,
        residuals,
        noise: None,
        previews: config.previews,
    })
}

/// SDEdit (Meng et al. 2022): B with as much noise as the schedule has at `sdedit_strength` of its
/// length, as in diffusers' image-to-image.
pub fn sdedit(
    pipeline: &Pipeline,
    latents: Tensor<4>,
    solver: &dyn Solver,
    config: &GenerateConfig,
) -> Start {
    let steps = solver.timesteps().len();
    let step = steps - part_of(config.sdedit_strength, steps);
    let latents = latents.cast(DType::F32);
    let mut rng = rng(config.seed, Purpose::Generate, 0);
    let noise = normal(&mut rng, latents.dims(), pipeline.device());
    Start {
        latents: if step < steps {
            solver.add_noise(step, latents, noise)
        } else {
            latents
        },
        step,
        residuals: Vec::new(),
        noise: None,
        previews: config.previews,
    }
}

/// The number of the first of `steps` that an edit-friendly inversion takes.
fn skipped(config: &GenerateConfig, steps: usize) -> usize {
    part_of(config.skip, steps).min(steps.saturating_sub(1))
}

/// The number of whole steps in a fraction of `steps`.
fn part_of(fraction: f64, steps: usize) -> usize {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a fraction from 0 to 1 of a small number"
    )]
    let part = (fraction * steps as f64 + 1e-9).floor() as usize;
    part.min(steps)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fractions_of_the_schedule_are_whole_steps() {
        assert_eq!(part_of(0.36, 100), 36);
        assert_eq!(part_of(0.29, 100), 29);
        assert_eq!(part_of(1.0, 7), 7);
        assert_eq!(part_of(0.0, 7), 0);
    }
}
