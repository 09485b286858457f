//! The direction from A to A′ in the joint space of pictures and words.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Differences of unit-norm features shorter than this count as none.
const MIN_LENGTH: f64 = 1e-4;
/// Angles closer than this to 0 or π do not determine a great circle.
const MIN_SINE: f64 = 1e-4;

/// Which delta the CLIP loss follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeltaMode {
    /// The interpolation of the image delta and the text delta.
    #[default]
    Interpolated,
    /// Only the image delta (ablation A).
    Image,
    /// Only the text delta.
    Text,
}

/// The delta of one pair (A, A′).
#[derive(Debug, Clone, PartialEq)]
pub struct Delta {
    /// Unit-norm direction in the joint space.
    pub direction: Vec<f32>,
    /// Its sources, fewer than requested if the captions are equal.
    pub mode: DeltaMode,
}

/// Unit-norm features of A and A′ in the joint space, each `[d]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Features {
    /// Of A or its caption.
    pub a: Vec<f32>,
    /// Of A′ or its caption.
    pub a_prime: Vec<f32>,
}

impl Features {
    /// The unit-norm direction from A to A′; `None` if they are the same.
    fn direction(&self) -> Option<Vec<f64>> {
        let difference: Vec<f64> = (self.a_prime.iter().zip(&self.a))
            .map(|(&after, &before)| f64::from(after) - f64::from(before))
            .collect();
        let length = norm(&difference);
        (length >= MIN_LENGTH).then(|| difference.iter().map(|x| x / length).collect())
    }
}

/// The delta of a pair:
/// `D_interp = sin((1−α)θ)/sin θ · D_img + sin(αθ)/sin θ · D_txt` (the paper's delta
/// interpolation), where D_img and D_txt are normalised first, so that only α determines
/// the mix. If the captions are equal, it is the image delta.
///
/// # Shapes
/// `image` and `text`: unit-norm features `[d]`; the result is `[d]`.
///
/// # Errors
/// [`Error::NoDifference`] if the requested delta would be zero, as it is for A = A′.
pub fn delta(image: &Features, text: &Features, mode: DeltaMode, alpha: f64) -> Result<Delta> {
    let none = |what: &str| Error::NoDifference {
        reason: format!("the {what} of A and A′ have the same place in the joint space"),
    };
    let image_delta = image.direction().ok_or_else(|| none("pictures"))?;
    let (direction, mode) = match (mode, text.direction()) {
        (DeltaMode::Text, None) => return Err(none("captions")),
        (DeltaMode::Text, Some(text_delta)) => (text_delta, DeltaMode::Text),
        (DeltaMode::Image, _) | (_, None) => (image_delta, DeltaMode::Image),
        (DeltaMode::Interpolated, Some(text_delta)) => (
            slerp(&image_delta, &text_delta, alpha),
            DeltaMode::Interpolated,
        ),
    };
    #[expect(clippy::cast_possible_truncation, reason = "tensors are f32")]
    let direction = direction.iter().map(|&x| x as f32).collect();
    Ok(Delta { direction, mode })
}

/// Spherical interpolation of unit vectors: `from` at 0, `to` at 1 (Shoemake 1985).
///
/// At an angle of 0, every mix is the same vector. At π, no great circle is preferred, so the nearer end
/// is returned.
fn slerp(from: &[f64], to: &[f64], alpha: f64) -> Vec<f64> {
    let cosine: f64 = from.iter().zip(to).map(|(x, y)| x * y).sum();
    let theta = cosine.clamp(-1.0, 1.0).acos();
    if theta.sin() < MIN_SINE {
        return if alpha < 0.5 { from } else { to }.to_vec();
    }
    let [w_from, w_to] = [1.0 - alpha, alpha].map(|part| (part * theta).sin() / theta.sin());
    (from.iter().zip(to))
        .map(|(x, y)| w_from * x + w_to * y)
        .collect()
}

fn norm(x: &[f64]) -> f64 {
    x.iter().map(|v| v * v).sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn features(a: [f32; 2], a_prime: [f32; 2]) -> Features {
        Features {
            a: a.to_vec(),
            a_prime: a_prime.to_vec(),
        }
    }

    /// Image delta (1, 1)/√2, text delta (−1, 1)/√2.
    fn right_angle(mode: DeltaMode, alpha: f64) -> Delta {
        let image = features([0.0, -1.0], [1.0, 0.0]);
        let text = features([1.0, 0.0], [0.0, 1.0]);
        delta(&image, &text, mode, alpha).unwrap()
    }

    fn assert_close(found: &[f32], expected: [f64; 2]) {
        for (&x, y) in found.iter().zip(expected) {
            assert!(
                (f64::from(x) - y).abs() < 1e-6,
                "{found:?} is not {expected:?}"
            );
        }
    }

    #[test]
    fn the_ends_are_the_image_delta_and_the_text_delta() {
        let half = 0.5f64.sqrt();
        assert_close(
            &right_angle(DeltaMode::Interpolated, 0.0).direction,
            [half, half],
        );
        assert_close(
            &right_angle(DeltaMode::Interpolated, 1.0).direction,
            [-half, half],
        );
        assert_close(&right_angle(DeltaMode::Image, 0.8).direction, [half, half]);
        assert_close(&right_angle(DeltaMode::Text, 0.2).direction, [-half, half]);
    }

    #[test]
    fn alpha_is_the_part_of_the_angle() {
        // θ = 90°, the image delta at 45°: α = 0.5 points to 90°, α = 0.8 to 45° + 72° = 117°.
        assert_close(
            &right_angle(DeltaMode::Interpolated, 0.5).direction,
            [0.0, 1.0],
        );
        let angle = 117f64.to_radians();
        let expected = [angle.cos(), angle.sin()]; // (−0.45399, 0.89101)
        assert_close(
            &right_angle(DeltaMode::Interpolated, 0.8).direction,
            expected,
        );
    }

    #[test]
    fn equal_captions_leave_the_image_delta_alone() {
        let text = features([1.0, 0.0], [1.0, 0.0]);
        let image = features([0.0, 1.0], [1.0, 0.0]);
        let found = delta(&image, &text, DeltaMode::Interpolated, 0.8).unwrap();
        assert_eq!(found.mode, DeltaMode::Image);
        assert_close(&found.direction, [0.5f64.sqrt(), -0.5f64.sqrt()]);
        let error = delta(&image, &text, DeltaMode::Text, 0.8).unwrap_err();
        assert_eq!(
            error.to_string(),
            "there is no difference to learn: the captions of A and A′ have the same place in the joint space"
        );
    }

    #[test]
    fn equal_pictures_are_an_error() {
        let image = features([0.6, 0.8], [0.6, 0.8]);
        let text = features([1.0, 0.0], [0.0, 1.0]);
        let error = delta(&image, &text, DeltaMode::Interpolated, 0.8).unwrap_err();
        assert!(matches!(error, Error::NoDifference { .. }));
    }

    #[test]
    fn parallel_and_opposite_deltas_stay_finite() {
        let x = [0.6, 0.8];
        let opposite = [-0.6, -0.8];
        for alpha in [0.0, 0.3, 0.5, 1.0] {
            assert_eq!(slerp(&x, &x, alpha), x);
        }
        assert_eq!(slerp(&x, &opposite, 0.4), x);
        assert_eq!(slerp(&x, &opposite, 0.6), opposite);
    }
}
