//! The embedding of a time for denoisers.

use burn::tensor::{DType, Tensor};

use crate::Result;
use crate::models::layers::{Activation, Linear};
use crate::weights::Weights;

/// Guidance scales are embedded as times of a thousand steps.
pub(crate) const GUIDANCE_UNIT: f32 = 1000.0;

/// A sinusoidal embedding through two linear layers.
#[derive(Debug, Clone)]
pub(crate) struct TimestepEmbedding {
    linear_1: Linear,
    linear_2: Linear,
    act_fn: Activation,
}

impl TimestepEmbedding {
    /// Reads `linear_1` and `linear_2`.
    pub(crate) fn load(
        weights: &Weights,
        [d_in, d_out]: [usize; 2],
        act_fn: Activation,
    ) -> Result<Self> {
        Self::load_with(weights, [d_in, d_out], act_fn, true)
    }

    /// Two layers that are there, whatever they are called.
    pub(crate) fn new(linear_1: Linear, linear_2: Linear, act_fn: Activation) -> Self {
        Self {
            linear_1,
            linear_2,
            act_fn,
        }
    }

    /// The same of layers that add a bias or not.
    pub(crate) fn load_with(
        weights: &Weights,
        [d_in, d_out]: [usize; 2],
        act_fn: Activation,
        bias: bool,
    ) -> Result<Self> {
        let linear = |name: &str, d_in| Linear::load_with(&weights.scope(name), d_in, d_out, bias);
        Ok(Self {
            linear_1: linear("linear_1", d_in)?,
            linear_2: linear("linear_2", d_out)?,
            act_fn,
        })
    }

    /// # Shapes
    /// `[b, d_in]` to `[b, d_out]`
    pub(crate) fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.linear_2
            .forward(self.act_fn.forward(self.linear_1.forward(x)))
    }
}

/// Sines and cosines of `t` at `dim / 2` frequencies from 1 down to (nearly) 1 / 10000
/// ([Ho et al. 2020](https://arxiv.org/abs/2006.11239), section B), cosines first if
/// `flip_sin_to_cos`.
///
/// # Shapes
/// `[n]` to `[n, dim]`, f32; `dim` is even.
pub(crate) fn sinusoidal_embedding(
    t: Tensor<1>,
    dim: usize,
    flip_sin_to_cos: bool,
    freq_shift: f64,
) -> Tensor<2> {
    let half = dim / 2;
    // In f32, as in diffusers: Chroma multiplies them by numbers up to 343000.
    let frequencies: Vec<f32> = (0..half)
        .map(|i| (-(10000f64.ln() as f32) * i as f32 / (half as f64 - freq_shift) as f32).exp())
        .collect();
    let frequencies = Tensor::<1>::from_floats(frequencies.as_slice(), &t.device());
    let t = t.cast(DType::F32);
    let angles = t.reshape([-1, 1]) * frequencies.reshape([1, half]);
    let (sin, cos) = (angles.clone().sin(), angles.cos());
    Tensor::cat(
        if flip_sin_to_cos {
            vec![cos, sin]
        } else {
            vec![sin, cos]
        },
        1,
    )
}
