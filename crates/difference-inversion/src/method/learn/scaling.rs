//! Loss scaling for networks that compute in half precision.

use burn::tensor::{FloatDType, Tensor};

use crate::Result;
use crate::util::tensors::host;

/// The power of two of f16's initial and largest scale.
const MOST: u32 = 16;
/// The number of steps with finite gradients after which the scale is doubled.
const GROWTH_INTERVAL: usize = 200;

/// The factor applied to a loss before its backward pass, and removed from the gradients afterwards, so that
/// gradients too small for f16 do not vanish. It is dynamic: halved if a gradient overflows, doubled after many
/// steps without overflow
/// ([Micikevicius et al. 2018](https://arxiv.org/abs/1710.03740), section 3.2). Other number formats have
/// the range of f32: there it is 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LossScale {
    /// The scale is two to this power, so that scaling is exact.
    exponent: u32,
    /// The largest `exponent`.
    most: u32,
    /// Steps since the scale last changed.
    steps: usize,
}

impl LossScale {
    /// The scale of the first step, for networks that compute in `dtype`.
    pub fn new(dtype: FloatDType) -> Self {
        let most = match dtype {
            FloatDType::F16 => MOST,
            _ => 0,
        };
        Self {
            exponent: most,
            most,
            steps: 0,
        }
    }

    /// The same with another state, see [`moment`](Self::moment).
    pub(super) fn at(self, [exponent, steps]: [usize; 2]) -> Self {
        let exponent = u32::try_from(exponent).unwrap_or(u32::MAX);
        Self {
            exponent: exponent.min(self.most),
            steps,
            ..self
        }
    }

    /// The state that changes from step to step: the power of two, and the steps since it last changed.
    pub(super) fn moment(self) -> [usize; 2] {
        [self.exponent as usize, self.steps]
    }

    /// The gradients of a loss by `parameters`, for one step. While one of them is not finite, the loss is
    /// computed again with half the scale; at a scale of 1, gradients are returned as they are.
    ///
    /// # Errors
    /// As `loss`.
    pub fn gradients<const D: usize>(
        &mut self,
        parameters: &[Tensor<D>],
        mut loss: impl FnMut(&[Tensor<D>]) -> Result<Tensor<1>>,
    ) -> Result<Vec<Tensor<D>>> {
        loop {
            let tracked: Vec<Tensor<D>> = (parameters.iter())
                .map(|parameter| parameter.clone().autodiff().require_grad())
                .collect();
            let mut gradients = self.scaled(loss(&tracked)?).backward();
            let gradients: Vec<Tensor<D>> = (tracked.iter().zip(parameters))
                .map(
                    |(tracked, parameter)| match tracked.grad_remove(&mut gradients) {
                        Some(gradient) => self.unscaled(gradient),
                        None => parameter.zeros_like(),
                    },
                )
                .collect();
            if self.exponent == 0 || gradients.iter().all(is_finite) {
                self.count_step();
                return Ok(gradients);
            }
            self.exponent -= 1;
            self.steps = 0;
        }
    }

    fn count_step(&mut self) {
        self.steps += 1;
        if self.exponent < self.most && self.steps >= GROWTH_INTERVAL {
            self.exponent += 1;
            self.steps = 0;
        }
    }

    fn scaled(self, loss: Tensor<1>) -> Tensor<1> {
        match self.exponent {
            0 => loss,
            exponent => loss * f64::from(exponent).exp2(),
        }
    }

    fn unscaled<const D: usize>(self, gradient: Tensor<D>) -> Tensor<D> {
        match self.exponent {
            0 => gradient,
            exponent => gradient * (-f64::from(exponent)).exp2(),
        }
    }
}

fn is_finite<const D: usize>(gradient: &Tensor<D>) -> bool {
    host(gradient.clone().sum())[0].is_finite()
}

#[cfg(test)]
mod tests {
    use burn::tensor::{DType, Device};

    use super::*;

    fn parameter() -> Tensor<2> {
        Tensor::from_data([[0.5f32, -0.25]], (&Device::flex(), DType::F32))
    }

    /// The gradient of `factor · Σ p` by p through a network of type `dtype`, and how often the loss was
    /// computed.
    fn gradient(scale: &mut LossScale, factor: f64, dtype: DType) -> (Vec<f32>, usize) {
        let mut times = 0;
        let gradients = scale.gradients(&[parameter()], |tracked| {
            times += 1;
            let output = tracked[0].clone().cast(dtype).cast(DType::F32);
            Ok(output.sum() * factor)
        });
        (host(gradients.unwrap()[0].clone()), times)
    }

    #[test]
    fn a_gradient_too_small_for_f16_survives_with_the_scale_alone() {
        let small = 2f64.powi(-30);
        let mut none = LossScale::new(FloatDType::F32);
        assert_eq!(gradient(&mut none, small, DType::F16).0, [0.0; 2]);
        let mut scale = LossScale::new(FloatDType::F16);
        let (found, times) = gradient(&mut scale, small, DType::F16);
        assert_eq!((found, times), (vec![2f32.powi(-30); 2], 1));
    }

    #[test]
    fn the_scale_is_halved_until_the_gradient_is_finite() {
        let mut scale = LossScale::new(FloatDType::F16);
        let (found, times) = gradient(&mut scale, 8.0, DType::F16);
        assert_eq!((found, times), (vec![8.0; 2], 5));
        assert_eq!(scale.moment(), [12, 1]);
        // The next step starts where this one ended.
        assert_eq!(gradient(&mut scale, 8.0, DType::F16).1, 1);
    }

    #[test]
    fn a_gradient_that_overflows_under_every_scale_is_given_as_it_is() {
        let mut scale = LossScale::new(FloatDType::F16);
        let (found, times) = gradient(&mut scale, 1e6, DType::F16);
        assert_eq!(times, 17);
        assert!(found.iter().all(|value| !value.is_finite()), "{found:?}");
    }

    #[test]
    fn many_good_steps_double_the_scale_up_to_its_start() {
        let mut scale = LossScale::new(FloatDType::F16).at([14, 0]);
        for _ in 1..GROWTH_INTERVAL {
            scale.count_step();
        }
        assert_eq!(scale.moment(), [14, GROWTH_INTERVAL - 1]);
        scale.count_step();
        assert_eq!(scale.moment(), [15, 0]);
        for _ in 0..3 * GROWTH_INTERVAL {
            scale.count_step();
        }
        assert_eq!(scale.moment()[0], 16);
    }

    #[test]
    fn f32_and_bf16_are_not_scaled_whatever_a_checkpoint_says() {
        for dtype in [FloatDType::F32, FloatDType::BF16] {
            let mut scale = LossScale::new(dtype).at([9, 0]);
            for _ in 0..2 * GROWTH_INTERVAL {
                scale.count_step();
            }
            assert_eq!(scale.moment()[0], 0);
            let (found, times) = gradient(&mut scale, 0.3, DType::F32);
            assert_eq!((found, times), (vec![0.3; 2], 1));
        }
    }
}
