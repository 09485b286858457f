//! The sampler of latent consistency models.

use burn::tensor::Tensor;

use crate::diffusion::sample::mix::{self, Level};
use crate::diffusion::sample::noising::whole;
use crate::diffusion::sample::{AlphaSchedule, Solver};
use crate::{Error, Result};

/// The class of diffusers, and another that has the same fields.
const CLASSES: [&str; 2] = ["LCMScheduler", "TCDScheduler"];
/// The standard deviation that the boundary condition assumes of the data.
const SIGMA_DATA: f64 = 0.5;
/// Default steps of the schedule that models are distilled on, and the factor of its times in the boundary
/// condition.
const DISTILLED_ON: f64 = 50.0;
const TIMESTEP_SCALING: f64 = 10.0;

/// Multistep consistency sampling ([Luo et al. 2023](https://arxiv.org/abs/2310.04378), algorithm 3): each step
/// predicts the clean latents at once, and adds fresh noise to them up to the next timestep. The timesteps are
/// those of the schedule that the model was distilled on.
#[derive(Debug)]
pub struct Lcm {
    levels: Vec<Level>,
    times: Vec<f64>,
    timestep_scaling: f64,
    /// The magnitude to which predicted clean latents are clamped.
    clip: Option<f64>,
}

impl Lcm {
    /// # Errors
    /// As [`SolverKind::build`](super::SolverKind::build).
    pub fn new(schedule: &AlphaSchedule, num_inference_steps: usize) -> Result<Self> {
        schedule.check_solver(CLASSES[0], &[("thresholding", "false")])?;
        let train = schedule.num_train_timesteps();
        let number = |field: &str, otherwise: f64| {
            let found = schedule.own(&CLASSES, field);
            let number = found.map_or(Some(otherwise), serde_json::Value::as_f64);
            let told = found.map_or_else(String::new, ToString::to_string);
            number.ok_or_else(|| schedule.wrong(field, &format!("expected a number, found {told}")))
        };
        let field = "original_inference_steps";
        let steps = number(field, DISTILLED_ON.min(train as f64))?;
        if steps.fract() != 0.0 || !(1.0..=train as f64).contains(&steps) {
            let reason = format!("expected a whole number from 1 to {train}, found {steps}");
            return Err(schedule.wrong(field, &reason));
        }
        let distilled_on = whole(steps);
        let timestep_scaling = number("timestep_scaling", TIMESTEP_SCALING)?;
        let n = num_inference_steps;
        if !(1..=distilled_on).contains(&n) {
            return Err(Error::Setting {
                name: "num_inference_steps",
                expected: format!(
                    "1 to {distilled_on} with the scheduler lcm, whose steps are some of those that the model \
                     was distilled on"
                ),
                found: n.to_string(),
            });
        }
        // Evenly spaced places of the schedule that the model was distilled on, from its noisiest step.
        let stride = distilled_on as f64 / n as f64;
        let place = |i: usize| distilled_on - whole(i as f64 * stride);
        let timesteps: Vec<usize> = (0..n)
            .map(|i| place(i) * (train / distilled_on) - 1)
            .collect();
        let config = schedule.config();
        Ok(Self {
            levels: (timesteps.iter())
                .map(|&t| Level::new(schedule.input(Some(t)), config.prediction_type))
                .collect(),
            times: timesteps.into_iter().map(|t| t as f64).collect(),
            timestep_scaling,
            clip: config.clip_sample.then_some(config.clip_sample_range),
        })
    }
}

impl Solver for Lcm {
    fn timesteps(&self) -> &[f64] {
        &self.times
    }

    fn add_noise(&self, i: usize, original: Tensor<4>, noise: Tensor<4>) -> Tensor<4> {
        mix::mixed(&[self.levels[i].input], original, noise)
    }

    fn check_start(&self, i: usize) -> Result<()> {
        self.levels.get(i).map_or(Ok(()), Level::check)
    }

    fn needs_noise(&self) -> bool {
        true
    }

    fn step(
        &mut self,
        i: usize,
        model_output: Tensor<4>,
        sample: Tensor<4>,
        noise: Option<Tensor<4>>,
    ) -> Tensor<4> {
        let mut original = mix::pred_original(&[self.levels[i]], model_output, sample.clone());
        if let Some(range) = self.clip {
            original = original.clamp(-range, range);
        }
        // At time 0 the consistency function is the identity (equation 9).
        let time = self.times[i] * self.timestep_scaling;
        let norm = time.hypot(SIGMA_DATA);
        let denoised = original * (time / norm) + sample * (SIGMA_DATA / norm).powi(2);
        match (self.levels.get(i + 1), noise) {
            (Some(next), Some(noise)) => mix::mixed(&[next.input], denoised, noise),
            _ => denoised,
        }
    }
}
