//! Rotary positions ([Su et al. 2021](https://arxiv.org/abs/2104.09864)) along several axes: pairs of
//! neighbouring numbers of a head are turned by angles that grow with the token's place.

use burn::tensor::{DType, Device, Tensor, TensorData};

/// The base θ of the frequencies.
const THETA: f64 = 10_000.0;

/// Cosines and sines of the angles of some tokens, the same for every head.
#[derive(Debug, Clone)]
pub(super) struct Rotation {
    /// `[1, n, 1, head_dim / 2, 1]`
    cos: Tensor<5>,
    sin: Tensor<5>,
}

impl Rotation {
    /// For tokens at these places on the axes, which have `widths` numbers of a head each. The angles of an
    /// axis of width d are place · θ^(−2i/d), in f64.
    pub(super) fn new(places: &[[usize; 3]], widths: [usize; 3], device: &Device) -> Self {
        let angles = places.iter().flat_map(|place| {
            let axes = place.iter().zip(widths);
            axes.flat_map(|(&place, width)| {
                (0..width / 2)
                    .map(move |i| place as f64 / THETA.powf(2.0 * i as f64 / width as f64))
            })
        });
        let angles: Vec<f64> = angles.collect();
        let pairs = widths.iter().sum::<usize>() / 2;
        let table = |of: fn(f64) -> f64| {
            let values: Vec<f32> = angles.iter().map(|&angle| of(angle) as f32).collect();
            let data = TensorData::new(values, [1, places.len(), 1, pairs, 1]);
            Tensor::<5>::from_data(data, (device, DType::F32))
        };
        Self {
            cos: table(f64::cos),
            sin: table(f64::sin),
        }
    }

    /// Turns queries or keys of the tokens, in f32. Tokens behind them stay as they are.
    ///
    /// # Shapes
    /// `[b, n + m, heads · head_dim]` to the same.
    pub(super) fn turn(&self, x: Tensor<3>) -> Tensor<3> {
        let ([_, n, _, pairs, _], [b, all, c]) = (self.cos.dims(), x.dims());
        if all > n {
            let behind = x.clone().narrow(1, n, all - n);
            return Tensor::cat(vec![self.turn(x.narrow(1, 0, n)), behind], 1);
        }
        let dtype = x.dtype();
        let x: Tensor<5> = x
            .cast(DType::F32)
            .reshape([b, n, c / (2 * pairs), pairs, 2]);
        let (first, second) = (x.clone().narrow(4, 0, 1), x.narrow(4, 1, 1));
        let turned = Tensor::cat(
            vec![
                first.clone() * self.cos.clone() - second.clone() * self.sin.clone(),
                second * self.cos.clone() + first * self.sin.clone(),
            ],
            4,
        );
        turned.reshape([b, n, c]).cast(dtype)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::util::tensors::host;

    #[test]
    fn pairs_are_turned_by_place_and_frequency() {
        let device = Device::flex();
        let places = [[0, 0, 0], [0, 1, 2]];
        let rotation = Rotation::new(&places, [2, 2, 4], &device);
        let token = [1.0, 0.0].repeat(4);
        let x = Tensor::<1>::from_floats(token.repeat(3).as_slice(), &device).reshape([1, 3, 8]);
        let found = host(rotation.turn(x));
        // Where nothing turns, and behind what is turned.
        assert_eq!(found[..8], token);
        assert_eq!(found[16..], token);
        let angles = [0.0, 1.0, 2.0, 2.0 / 100.0f64];
        let expected = angles.iter().flat_map(|angle| [angle.cos(), angle.sin()]);
        for (found, expected) in found[8..16].iter().zip(expected) {
            assert!(
                (f64::from(*found) - expected).abs() < 1e-6,
                "{found} {expected}"
            );
        }
    }
}
