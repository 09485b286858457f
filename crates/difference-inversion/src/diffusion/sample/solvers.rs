//! Every solver, each with the paper and the algorithm it comes from.

use burn::tensor::Tensor;
use serde_json::Value;

use crate::Result;
use crate::diffusion::sample::mix::{self, Level, Mix};
use crate::diffusion::sample::noising::{Noising, Step};
use crate::diffusion::sample::{AlphaSchedule, PredictionType, Solver, TimestepSpacing};
use crate::util::settings::Checks;

/// Denoising diffusion implicit models ([Song et al. 2021](https://arxiv.org/abs/2010.02502)):
/// equation 12, with the noise of equation 16 scaled by η.
#[derive(Debug)]
pub struct Ddim {
    steps: Vec<Step>,
    times: Vec<f64>,
    eta: f64,
    /// The magnitude to which predicted clean latents are clamped.
    clip: Option<f64>,
}

impl Ddim {
    /// η = 0 is deterministic, for a flow Euler's method; η = 1 adds as much noise as DDPM.
    ///
    /// # Errors
    /// As [`SolverKind::build`](super::SolverKind::build).
    pub fn new(noising: &Noising, num_inference_steps: usize, eta: f64) -> Result<Self> {
        Checks::default().fraction("eta", eta).result()?;
        let mut clip = None;
        if let Noising::Discrete(schedule) = noising {
            schedule.check_solver("DDIMScheduler", &[("thresholding", "false")])?;
            let config = schedule.config();
            clip = config.clip_sample.then_some(config.clip_sample_range);
        }
        let steps = noising.steps(num_inference_steps)?;
        Ok(Self {
            times: steps.iter().map(|step| step.time).collect(),
            steps,
            eta,
            clip,
        })
    }
}

impl Solver for Ddim {
    fn timesteps(&self) -> &[f64] {
        &self.times
    }

    fn add_noise(&self, i: usize, original: Tensor<4>, noise: Tensor<4>) -> Tensor<4> {
        mix::mixed(&[self.steps[i].from.input], original, noise)
    }

    fn check_start(&self, i: usize) -> Result<()> {
        self.steps.get(i).map_or(Ok(()), |step| step.from.check())
    }

    fn needs_noise(&self) -> bool {
        self.eta > 0.0
    }

    fn step(
        &mut self,
        i: usize,
        model_output: Tensor<4>,
        sample: Tensor<4>,
        noise: Option<Tensor<4>>,
    ) -> Tensor<4> {
        let Step { from, to, .. } = self.steps[i];
        let mut original = mix::pred_original(&[from], model_output.clone(), sample.clone());
        let epsilon = mix::pred_epsilon(&[from], model_output, sample);
        if let Some(range) = self.clip {
            original = original.clamp(-range, range);
        }
        let sigma = self.eta * from.renewed_noise(to);
        let direction = (to.noise * to.noise - sigma * sigma).max(0.0).sqrt();
        let next = original * to.signal + epsilon * direction;
        match noise {
            Some(noise) if sigma > 0.0 => next + noise * sigma,
            _ => next,
        }
    }
}

/// Fields of a scheduler's configuration with their supported values: those that place σ.
const SIGMAS: &[(&str, &str)] = &[
    ("use_karras_sigmas", "false"),
    ("use_exponential_sigmas", "false"),
    ("use_beta_sigmas", "false"),
    ("use_lu_lambdas", "false"),
    ("use_flow_sigmas", "false"),
    ("use_dynamic_shifting", "false"),
    ("final_sigmas_type", "\"zero\""),
];

/// The same for multistep solvers.
const MULTISTEP: &[(&str, &str)] = &[
    ("solver_order", "2"),
    ("lower_order_final", "true"),
    ("thresholding", "false"),
];

/// What the solvers that work on σ = √((1 − ᾱ) / ᾱ) share: the timesteps, and one σ more.
#[derive(Debug)]
struct Sigmas {
    prediction_type: PredictionType,
    timesteps: Vec<f64>,
    /// One for every timestep, then 0.
    sigmas: Vec<f64>,
}

impl Sigmas {
    fn new(schedule: &AlphaSchedule, timesteps: Vec<f64>) -> Self {
        let sigmas = timesteps
            .iter()
            .map(|&t| schedule.sigma(t))
            .chain([0.0])
            .collect();
        Self {
            prediction_type: schedule.config().prediction_type,
            timesteps,
            sigmas,
        }
    }

    /// With only the training steps below `last`.
    fn multistep(
        schedule: &AlphaSchedule,
        num_inference_steps: usize,
        last: usize,
    ) -> Result<Self> {
        let timesteps = schedule.multistep_timesteps(num_inference_steps, last)?;
        Ok(Self::new(
            schedule,
            timesteps.into_iter().map(|t| t as f64).collect(),
        ))
    }

    fn len(&self) -> usize {
        self.timesteps.len()
    }

    /// The mix of latents before step `i`, scaled to the training variance.
    fn input(&self, i: usize) -> Mix {
        let signal = 1.0 / (self.sigmas[i].powi(2) + 1.0).sqrt();
        Mix::new(signal, self.sigmas[i] * signal)
    }

    /// Half the logarithm of the signal-to-noise ratio before step `i`; infinite after the last.
    fn lambda(&self, i: usize) -> f64 {
        -self.sigmas[i].ln()
    }

    /// The clean latents implied by the network's output at step `i`, for latents scaled to the training
    /// variance.
    fn pred_original(&self, i: usize, model_output: Tensor<4>, sample: Tensor<4>) -> Tensor<4> {
        let level = Level::new(self.input(i), self.prediction_type);
        mix::pred_original(&[level], model_output, sample)
    }

    /// Noisy latents before step `i`, scaled to the training variance.
    fn add_noise(&self, i: usize, original: Tensor<4>, noise: Tensor<4>) -> Tensor<4> {
        mix::mixed(&[self.input(i)], original, noise)
    }
}

/// Euler's method on the probability-flow ODE
/// ([Karras et al. 2022](https://arxiv.org/abs/2206.00364), algorithm 2 without churn), and its
/// ancestral form, which steps further down and adds noise up to the next σ. Latents are
/// `x₀ + σ ε`.
#[derive(Debug)]
pub struct Euler {
    sigmas: Sigmas,
    init_noise_sigma: f64,
    ancestral: bool,
}

impl Euler {
    /// # Errors
    /// As [`SolverKind::build`](super::SolverKind::build).
    pub fn new(
        schedule: &AlphaSchedule,
        num_inference_steps: usize,
        ancestral: bool,
    ) -> Result<Self> {
        let kinds = [
            ("interpolation_type", "\"linear\""),
            ("timestep_type", "\"discrete\""),
        ];
        schedule.check_solver("EulerDiscreteScheduler", &[&kinds, SIGMAS].concat())?;
        let sigmas = Sigmas::new(schedule, schedule.sigma_timesteps(num_inference_steps)?);
        let largest = sigmas.sigmas.iter().copied().fold(0.0, f64::max);
        // A leading schedule starts below the largest σ: there the latents are not pure noise.
        let spacing = schedule.spacing(num_inference_steps, TimestepSpacing::Linspace);
        let leading = spacing == TimestepSpacing::Leading;
        let init_noise_sigma = if leading { largest.hypot(1.0) } else { largest };
        Ok(Self {
            sigmas,
            init_noise_sigma,
            ancestral,
        })
    }
}

impl Solver for Euler {
    fn timesteps(&self) -> &[f64] {
        &self.sigmas.timesteps
    }

    fn init_noise_sigma(&self) -> f64 {
        self.init_noise_sigma
    }

    fn scale_model_input(&self, i: usize, sample: Tensor<4>) -> Tensor<4> {
        sample * self.sigmas.input(i).signal
    }

    fn add_noise(&self, i: usize, original: Tensor<4>, noise: Tensor<4>) -> Tensor<4> {
        original + noise * self.sigmas.sigmas[i]
    }

    fn needs_noise(&self) -> bool {
        self.ancestral
    }

    fn step(
        &mut self,
        i: usize,
        model_output: Tensor<4>,
        sample: Tensor<4>,
        noise: Option<Tensor<4>>,
    ) -> Tensor<4> {
        let (sigma, next) = (self.sigmas.sigmas[i], self.sigmas.sigmas[i + 1]);
        let scaled = self.scale_model_input(i, sample.clone());
        let original = self.sigmas.pred_original(i, model_output, scaled);
        let derivative = (sample.clone() - original) / sigma;
        if !self.ancestral {
            return sample + derivative * (next - sigma);
        }
        let up = (next.powi(2) * (sigma.powi(2) - next.powi(2)) / sigma.powi(2)).sqrt();
        let down = (next.powi(2) - up.powi(2)).max(0.0).sqrt();
        let sample = sample + derivative * (down - sigma);
        match noise {
            Some(noise) => sample + noise * up,
            None => sample,
        }
    }
}

/// DPM-Solver++(2M) ([Lu et al. 2022](https://arxiv.org/abs/2211.01095), algorithm 2): a linear
/// multistep method of second order on the predicted clean latents.
#[derive(Debug)]
pub struct DpmSolverMultistep {
    sigmas: Sigmas,
    previous: Option<Tensor<4>>,
}

impl DpmSolverMultistep {
    /// # Errors
    /// As [`SolverKind::build`](super::SolverKind::build).
    pub fn new(schedule: &AlphaSchedule, num_inference_steps: usize) -> Result<Self> {
        let kinds = [("euler_at_final", "false"), ("variance_type", "null")];
        let mut supported = [&kinds, MULTISTEP, SIGMAS].concat();
        // diffusers reads the names of other schedulers as these.
        let field = |name: &str| schedule.config().other.get(name).and_then(Value::as_str);
        if field("algorithm_type") != Some("deis") {
            supported.push(("algorithm_type", "\"dpmsolver++\""));
        }
        if !["logrho", "bh1", "bh2"]
            .map(Some)
            .contains(&field("solver_type"))
        {
            supported.push(("solver_type", "\"midpoint\""));
        }
        let class = "DPMSolverMultistepScheduler";
        schedule.check_solver(class, &supported)?;
        let train = schedule.num_train_timesteps();
        let field = "lambda_min_clipped";
        let last = match schedule.own(&[class], field) {
            Some(lambda) => lambda.as_f64().map_or(0, |lambda| schedule.above(lambda)),
            None => train,
        };
        if last < 2 {
            return Err(
                schedule.wrong(field, "expected a number below that of the second timestep")
            );
        }
        Ok(Self {
            sigmas: Sigmas::multistep(schedule, num_inference_steps, last)?,
            previous: None,
        })
    }
}

impl Solver for DpmSolverMultistep {
    fn timesteps(&self) -> &[f64] {
        &self.sigmas.timesteps
    }

    fn add_noise(&self, i: usize, original: Tensor<4>, noise: Tensor<4>) -> Tensor<4> {
        self.sigmas.add_noise(i, original, noise)
    }

    fn step(
        &mut self,
        i: usize,
        model_output: Tensor<4>,
        sample: Tensor<4>,
        _noise: Option<Tensor<4>>,
    ) -> Tensor<4> {
        let s = &self.sigmas;
        let original = s.pred_original(i, model_output, sample.clone());
        let (from, to) = (s.input(i), s.input(i + 1));
        let h = s.lambda(i + 1) - s.lambda(i);
        let last = i + 1 == s.len();
        let data = match self.previous.replace(original.clone()) {
            Some(previous) if !last => {
                let r = (s.lambda(i) - s.lambda(i - 1)) / h;
                original.clone() + (original - previous) * (0.5 / r)
            }
            _ => original,
        };
        sample * (to.noise / from.noise) - data * (to.signal * (-h).exp_m1())
    }
}

/// UniPC of second order with B₂(h) = eʰ − 1
/// ([Zhao et al. 2023](https://arxiv.org/abs/2302.04867), algorithms 1 and 2): before each
/// multistep prediction, the output at hand corrects the prediction that led to it.
#[derive(Debug)]
pub struct UniPc {
    sigmas: Sigmas,
    /// Predicted clean latents, the newest first.
    originals: Vec<Tensor<4>>,
    /// Corrected latents before the last step, and the order it was taken with.
    last: Option<(Tensor<4>, usize)>,
    /// Steps whose prediction is not corrected.
    uncorrected: Vec<u64>,
}

impl UniPc {
    /// # Errors
    /// As [`SolverKind::build`](super::SolverKind::build).
    pub fn new(schedule: &AlphaSchedule, num_inference_steps: usize) -> Result<Self> {
        let class = "UniPCMultistepScheduler";
        let kinds = [("predict_x0", "true"), ("solver_p", "null")];
        let mut supported = [&kinds, MULTISTEP, SIGMAS].concat();
        // diffusers reads all names except bh1, such as those of other schedulers, as bh2.
        let solver_type = schedule.config().other.get("solver_type");
        if solver_type.is_some_and(|name| name == "bh1") {
            supported.push(("solver_type", "\"bh2\""));
        }
        schedule.check_solver(class, &supported)?;
        let field = "disable_corrector";
        let uncorrected = match schedule.own(&[class], field) {
            Some(steps) => serde_json::from_value(steps.clone())
                .map_err(|_| schedule.wrong(field, "expected a list of steps"))?,
            None => Vec::new(),
        };
        let train = schedule.num_train_timesteps();
        Ok(Self {
            sigmas: Sigmas::multistep(schedule, num_inference_steps, train)?,
            uncorrected,
            originals: Vec::new(),
            last: None,
        })
    }

    /// The part of the step from `i` to `i + 1` that needs no differences, and the factor of the term
    /// added to it.
    fn first_order(&self, i: usize, sample: Tensor<4>) -> (Tensor<4>, f64) {
        let s = &self.sigmas;
        let (from, to) = (s.input(i), s.input(i + 1));
        let factor = to.signal * (s.lambda(i) - s.lambda(i + 1)).exp_m1();
        let x = sample * (to.noise / from.noise) - self.originals[0].clone() * factor;
        (x, factor)
    }

    /// The place of step `i - 1` relative to step `i`, in units of the step from `i` to `i + 1`.
    fn ratio(&self, i: usize) -> f64 {
        let s = &self.sigmas;
        (s.lambda(i - 1) - s.lambda(i)) / (s.lambda(i + 1) - s.lambda(i))
    }

    /// The step from `i` to `i + 1` taken again, now that the network was called at its end.
    fn correct(
        &self,
        i: usize,
        original_next: &Tensor<4>,
        sample: Tensor<4>,
        order: usize,
    ) -> Tensor<4> {
        let (x, factor) = self.first_order(i, sample);
        let newest = &self.originals[0];
        let change = original_next.clone() - newest.clone();
        if order == 1 {
            return x - change * (0.5 * factor);
        }
        let r = self.ratio(i);
        let hh = self.sigmas.lambda(i) - self.sigmas.lambda(i + 1);
        let phi_1 = hh.exp_m1();
        let phi_2 = phi_1 / hh - 1.0;
        let phi_3 = phi_2 / hh - 0.5;
        // The weights solve [[1, 1], [r, 1]] ρ = [φ₂, 2 φ₃] / φ₁.
        let (b_1, b_2) = (phi_2 / phi_1, 2.0 * phi_3 / phi_1);
        let rho_1 = (b_1 - b_2) / (1.0 - r);
        let rho_2 = b_1 - rho_1;
        let older = (self.originals[1].clone() - newest.clone()) / r;
        x - (older * rho_1 + change * rho_2) * factor
    }
}

impl Solver for UniPc {
    fn timesteps(&self) -> &[f64] {
        &self.sigmas.timesteps
    }

    fn add_noise(&self, i: usize, original: Tensor<4>, noise: Tensor<4>) -> Tensor<4> {
        self.sigmas.add_noise(i, original, noise)
    }

    fn step(
        &mut self,
        i: usize,
        model_output: Tensor<4>,
        sample: Tensor<4>,
        _noise: Option<Tensor<4>>,
    ) -> Tensor<4> {
        let original = self.sigmas.pred_original(i, model_output, sample.clone());
        let sample = match self.last.take() {
            Some((before, order)) if !self.uncorrected.contains(&(i as u64 - 1)) => {
                self.correct(i - 1, &original, before, order)
            }
            _ => sample,
        };
        self.originals.insert(0, original);
        self.originals.truncate(2);
        let order = self.originals.len().min(self.sigmas.len() - i);
        let (x, factor) = self.first_order(i, sample.clone());
        self.last = Some((sample, order));
        if order == 1 {
            return x;
        }
        let older = (self.originals[1].clone() - self.originals[0].clone()) / self.ratio(i);
        x - older * (0.5 * factor)
    }
}
