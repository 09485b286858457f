//! AdamW (Loshchilov & Hutter 2019), equal step by step to `torch.optim.AdamW`.

use burn::tensor::Tensor;

/// Settings of the optimiser.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Step size.
    pub learning_rate: f64,
    /// Decay of the mean of the gradient and of its square.
    pub betas: [f64; 2],
    /// Added to the denominator.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

impl AdamW {
    /// The optimiser with torch's betas (0.9, 0.999) and epsilon 1e-8.
    pub fn new(learning_rate: f64, weight_decay: f64) -> Self {
        Self {
            learning_rate,
            betas: [0.9, 0.999],
            epsilon: 1e-8,
            weight_decay,
        }
    }

    /// One update; `step` counts from 0.
    ///
    /// p ← (1 − lr·wd) p; m ← β₁ m + (1 − β₁) g; v ← β₂ v + (1 − β₂) g²;
    /// p ← p − lr/(1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)
    ///
    /// # Shapes
    /// All tensors have the parameter's shape.
    #[must_use]
    pub fn step<const D: usize>(
        &self,
        parameter: Tensor<D>,
        gradient: Tensor<D>,
        moments: &mut Moments<D>,
        step: usize,
    ) -> Tensor<D> {
        let [beta_1, beta_2] = self.betas;
        let t = i32::try_from(step).unwrap_or(i32::MAX - 1) + 1;
        let correction_1 = 1.0 - beta_1.powi(t);
        let correction_2 = 1.0 - beta_2.powi(t);
        moments.first = moments.first.clone() * beta_1 + gradient.clone() * (1.0 - beta_1);
        moments.second =
            moments.second.clone() * beta_2 + gradient.clone() * gradient * (1.0 - beta_2);
        let denominator = moments.second.clone().sqrt() / correction_2.sqrt() + self.epsilon;
        let step_size = self.learning_rate / correction_1;
        parameter * (1.0 - self.learning_rate * self.weight_decay)
            - moments.first.clone() / denominator * step_size
    }
}

/// Running means of the gradient and of its square.
#[derive(Debug, Clone)]
pub struct Moments<const D: usize> {
    /// Of the gradient.
    pub first: Tensor<D>,
    /// Of the squared gradient.
    pub second: Tensor<D>,
}

impl<const D: usize> Moments<D> {
    /// Zero moments for a parameter.
    pub fn zeros_like(parameter: &Tensor<D>) -> Self {
        Self {
            first: parameter.zeros_like(),
            second: parameter.zeros_like(),
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::util::tensors::host;

    /// Computed by torch 2: `p = Parameter([0.5, -1.0, 0.0])`, `AdamW([p], lr=0.1,
    /// weight_decay=0.01)`, gradients `[0.1, -0.2, 3.0]`, `[0.3, 0.0, -1.0]`, `[-0.5, 0.1, 0.5]`.
    #[expect(clippy::excessive_precision, reason = "as printed by torch")]
    const TORCH: [[f32; 3]; 3] = [
        [0.399_500_01, -0.899, -0.099_999_994],
        [0.307_322_38, -0.831_095_16, -0.139_921_86],
        [0.323_106_5, -0.812_537_37, -0.180_324_48],
    ];

    #[test]
    fn three_steps_equal_torch() {
        let device = Device::flex();
        let optimiser = AdamW::new(0.1, 0.01);
        let mut parameter = Tensor::<1>::from_floats([0.5, -1.0, 0.0], &device);
        let mut moments = Moments::zeros_like(&parameter);
        let gradients = [[0.1, -0.2, 3.0], [0.3, 0.0, -1.0], [-0.5, 0.1, 0.5]];
        for (step, (gradient, expected)) in gradients.into_iter().zip(TORCH).enumerate() {
            let gradient = Tensor::from_floats(gradient, &device);
            parameter = optimiser.step(parameter, gradient, &mut moments, step);
            for (found, expected) in host(parameter.clone()).into_iter().zip(expected) {
                assert!(
                    (found - expected).abs() < 1e-6,
                    "step {step}: {found} {expected}"
                );
            }
        }
    }
}
