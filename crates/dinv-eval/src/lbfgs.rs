//! L-BFGS (Liu & Nocedal 1989) with a fixed step size, equal step by step to `torch.optim.LBFGS`
//! without a line search.

use std::collections::VecDeque;

use difference_inversion::Result;

/// A loss and its gradient.
pub(crate) type Evaluation = (f64, Vec<f64>);

/// Settings and state of the optimiser, with torch's tolerances and history of 100.
#[derive(Debug)]
pub(crate) struct Lbfgs {
    learning_rate: f64,
    /// Iterations of one [`step`](Self::step).
    max_iterations: usize,
    /// Differences of points and of their gradients, oldest first.
    history: VecDeque<(Vec<f64>, Vec<f64>)>,
    /// Estimate of the inverse Hessian's diagonal.
    diagonal: f64,
    /// The last move and the gradient before it.
    last: Option<(Vec<f64>, Vec<f64>)>,
}

const HISTORY: usize = 100;
const GRADIENT_TOLERANCE: f64 = 1e-7;
const CHANGE_TOLERANCE: f64 = 1e-9;
const CURVATURE_TOLERANCE: f64 = 1e-10;

impl Lbfgs {
    pub(crate) fn new(learning_rate: f64, max_iterations: usize) -> Self {
        Self {
            learning_rate,
            max_iterations,
            history: VecDeque::new(),
            diagonal: 1.0,
            last: None,
        }
    }

    /// Moves `x`, whose loss and gradient are `start`, by up to `max_iterations` quasi-Newton steps.
    ///
    /// # Errors
    /// As `evaluate`.
    pub(crate) fn step(
        &mut self,
        x: &mut [f64],
        start: Evaluation,
        mut evaluate: impl FnMut(&[f64]) -> Result<Evaluation>,
    ) -> Result<()> {
        let (mut loss, mut gradient) = start;
        for iteration in 1..=self.max_iterations {
            if largest(&gradient) <= GRADIENT_TOLERANCE {
                break;
            }
            let first = self.last.is_none();
            let direction = self.direction(&gradient);
            let size = match first {
                true => (1.0 / gradient.iter().map(|g| g.abs()).sum::<f64>()).min(1.0),
                false => 1.0,
            } * self.learning_rate;
            let slope = dot(&gradient, &direction);
            let moved: Vec<f64> = direction.iter().map(|d| d * size).collect();
            self.last = Some((moved.clone(), gradient.clone()));
            if slope > -CHANGE_TOLERANCE {
                break;
            }
            for (x, moved) in x.iter_mut().zip(&moved) {
                *x += moved;
            }
            if iteration == self.max_iterations {
                break;
            }
            let before = loss;
            (loss, gradient) = evaluate(x)?;
            if largest(&moved) <= CHANGE_TOLERANCE || (loss - before).abs() < CHANGE_TOLERANCE {
                break;
            }
        }
        Ok(())
    }

    /// The search direction: minus the gradient, times the estimate of the inverse Hessian (two-loop
    /// recursion).
    fn direction(&mut self, gradient: &[f64]) -> Vec<f64> {
        if let Some((moved, before)) = &self.last {
            let change: Vec<f64> = gradient.iter().zip(before).map(|(g, b)| g - b).collect();
            let curvature = dot(&change, moved);
            if curvature > CURVATURE_TOLERANCE {
                if self.history.len() == HISTORY {
                    self.history.pop_front();
                }
                self.diagonal = curvature / dot(&change, &change);
                self.history.push_back((moved.clone(), change));
            }
        }
        let mut direction: Vec<f64> = gradient.iter().map(|g| -g).collect();
        let mut factors = Vec::with_capacity(self.history.len());
        for (moved, change) in self.history.iter().rev() {
            let factor = dot(moved, &direction) / dot(change, moved);
            add(&mut direction, change, -factor);
            factors.push(factor);
        }
        direction.iter_mut().for_each(|d| *d *= self.diagonal);
        for ((moved, change), factor) in self.history.iter().zip(factors.into_iter().rev()) {
            let correction = dot(change, &direction) / dot(change, moved);
            add(&mut direction, moved, factor - correction);
        }
        direction
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(x: &mut [f64], y: &[f64], factor: f64) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += factor * y;
    }
}

fn largest(x: &[f64]) -> f64 {
    x.iter().fold(0.0, |largest, x| largest.max(x.abs()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rosenbrock's function and its gradient.
    fn rosenbrock(x: &[f64]) -> Evaluation {
        let (a, b) = (1.0 - x[0], x[1] - x[0] * x[0]);
        let gradient = vec![-2.0 * a - 400.0 * x[0] * b, 200.0 * b];
        (a * a + 100.0 * b * b, gradient)
    }

    /// Computed by torch 2.15 in f64: `x = [-1.2, 1.0]`, `LBFGS([x], lr=0.1, max_iter=4)`, three calls of
    /// `step`.
    const TORCH: [[f64; 2]; 3] = [
        [-1.105565141753, 1.039818512641],
        [-1.082144084119, 1.051116138567],
        [-1.065631061812, 1.058233301014],
    ];

    #[test]
    fn three_steps_equal_torch() {
        let mut x = vec![-1.2, 1.0];
        let mut optimiser = Lbfgs::new(0.1, 4);
        for expected in TORCH {
            let start = rosenbrock(&x);
            optimiser
                .step(&mut x, start, |x| Ok(rosenbrock(x)))
                .unwrap();
            for (found, expected) in x.iter().zip(expected) {
                assert!((found - expected).abs() < 1e-9, "{found} {expected}");
            }
        }
    }

    #[test]
    fn a_valley_is_followed_to_its_lowest_point() {
        let mut x = vec![-1.2, 1.0];
        let mut optimiser = Lbfgs::new(0.5, 20);
        for _ in 0..40 {
            let start = rosenbrock(&x);
            optimiser
                .step(&mut x, start, |x| Ok(rosenbrock(x)))
                .unwrap();
        }
        assert!(rosenbrock(&x).0 < 1e-6, "{x:?}");
    }
}
