//! Noise schedules, and every solver from noise to latents.
//!
//! Each solver takes the network's output at its `i`-th timestep and the latents there, and returns
//! the latents at the next. All agree with diffusers' scheduler of the same name to rounding.

mod alphas;
mod flow;
mod lcm;
mod mix;
mod noising;
mod scheduler;
mod solvers;

use burn::tensor::Tensor;

pub use self::alphas::AlphaSchedule;
pub use self::flow::{FlowConfig, FlowSchedule};
pub use self::lcm::Lcm;
pub use self::mix::{Level, Mix};
pub use self::noising::{Noising, Step};
pub use self::scheduler::{BetaSchedule, PredictionType, SchedulerConfig, TimestepSpacing};
pub(crate) use self::scheduler::{check_kind, complete};
pub use self::solvers::{Ddim, DpmSolverMultistep, Euler, UniPc};
use crate::{Error, Result};

/// The available solvers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SolverKind {
    /// [`Ddim`].
    Ddim,
    /// [`DpmSolverMultistep`].
    DpmSolver,
    /// [`Euler`].
    Euler,
    /// [`Euler`] with fresh noise after every step.
    EulerAncestral,
    /// [`Lcm`].
    Lcm,
    /// [`UniPc`].
    UniPc,
}

impl SolverKind {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Ddim,
        Self::DpmSolver,
        Self::Euler,
        Self::EulerAncestral,
        Self::Lcm,
        Self::UniPc,
    ];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ddim => "ddim",
            Self::DpmSolver => "dpm-solver",
            Self::Euler => "euler",
            Self::EulerAncestral => "euler-ancestral",
            Self::Lcm => "lcm",
            Self::UniPc => "uni-pc",
        }
    }

    /// Whether its timesteps are spaced as the model's configuration or the command line says.
    pub fn reads_spacing(self) -> bool {
        self != Self::Lcm
    }

    /// The solver of a scheduler class of diffusers, if it is one of these.
    pub fn of_class(class_name: &str) -> Option<Self> {
        Some(match class_name {
            "DDIMScheduler" | "DDIMParallelScheduler" => Self::Ddim,
            "DPMSolverMultistepScheduler" => Self::DpmSolver,
            "EulerDiscreteScheduler" | "FlowMatchEulerDiscreteScheduler" => Self::Euler,
            "EulerAncestralDiscreteScheduler" => Self::EulerAncestral,
            "LCMScheduler" => Self::Lcm,
            "UniPCMultistepScheduler" => Self::UniPc,
            _ => return None,
        })
    }

    /// Builds a solver of `num_inference_steps` steps; `eta` is for DDIM only. For a flow, Euler's method is
    /// DDIM without noise.
    ///
    /// # Errors
    /// [`Error::Setting`] if there are no steps or more than in training, or `eta` is not from 0
    /// to 1, or for a flow and a solver that needs ᾱ; [`Error::Config`] if the model was saved with
    /// this solver and a variant of it that is not supported.
    pub fn build(
        self,
        noising: &Noising,
        num_inference_steps: usize,
        eta: f64,
    ) -> Result<Box<dyn Solver>> {
        let steps = num_inference_steps;
        let schedule = match (noising, self) {
            (Noising::Discrete(schedule), _) => schedule,
            (Noising::Flow(_), Self::Ddim) => return Ok(Box::new(Ddim::new(noising, steps, eta)?)),
            (Noising::Flow(_), Self::Euler) => {
                return Ok(Box::new(Ddim::new(noising, steps, 0.0)?));
            }
            (Noising::Flow(_), _) => {
                return Err(Error::Setting {
                    name: "scheduler",
                    expected: "euler or ddim, since the model is a flow from noise to latents"
                        .to_owned(),
                    found: self.name().to_owned(),
                });
            }
        };
        Ok(match self {
            Self::Ddim => Box::new(Ddim::new(noising, steps, eta)?),
            Self::DpmSolver => Box::new(DpmSolverMultistep::new(schedule, steps)?),
            Self::Euler => Box::new(Euler::new(schedule, steps, false)?),
            Self::EulerAncestral => Box::new(Euler::new(schedule, steps, true)?),
            Self::Lcm => Box::new(Lcm::new(schedule, steps)?),
            Self::UniPc => Box::new(UniPc::new(schedule, steps)?),
        })
    }
}

impl std::str::FromStr for SolverKind {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.name() == name)
            .ok_or_else(|| Error::Setting {
                name: "scheduler",
                expected: Self::ALL.map(Self::name).join(", "),
                found: name.to_owned(),
            })
    }
}

/// Steps from noise towards latents. Steps are taken in order, from 0 or, if latents were noised up to a
/// later one with [`add_noise`](Solver::add_noise), from there.
pub trait Solver {
    /// The timesteps at which the network is called, noisiest first, in training steps.
    fn timesteps(&self) -> &[f64];

    /// The standard deviation of the latents at the first timestep, if they are pure noise.
    fn init_noise_sigma(&self) -> f64 {
        1.0
    }

    /// The network's input for the latents at step `i`.
    fn scale_model_input(&self, _i: usize, sample: Tensor<4>) -> Tensor<4> {
        sample
    }

    /// Latents with the noise level at which step `i` starts.
    fn add_noise(&self, i: usize, original: Tensor<4>, noise: Tensor<4>) -> Tensor<4>;

    /// Checks that the network's output carries information at step `i`, the first one taken.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] for pure noise and a network that predicts noise.
    fn check_start(&self, _i: usize) -> Result<()> {
        Ok(())
    }

    /// Whether [`step`](Solver::step) needs fresh noise.
    fn needs_noise(&self) -> bool {
        false
    }

    /// The latents after step `i`, from those before it and the network's output; `noise` is
    /// standard normal, and used by solvers that [need it](Solver::needs_noise) only.
    ///
    /// # Shapes
    /// All `[b, c, h, w]`.
    fn step(
        &mut self,
        i: usize,
        model_output: Tensor<4>,
        sample: Tensor<4>,
        noise: Option<Tensor<4>>,
    ) -> Tensor<4>;
}

#[cfg(test)]
mod tests;
