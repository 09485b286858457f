//! Rotary positions ([Su et al. 2021](https://arxiv.org/abs/2104.09864)): pairs of numbers of a head are
//! rotated by angles that grow with the token's position, on one axis or several.

use burn::tensor::{DType, Device, Tensor, TensorData};

/// The numbers of a head that are rotated together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pairs {
    /// Neighbours, as in FLUX.
    Neighbours,
    /// One of the first half and one of the second, as in language models.
    Halves,
}

/// Cosines and sines of the angles of some tokens, the same for every head.
#[derive(Debug, Clone)]
pub(super) struct Rotation {
    /// `[1, n, 1, head_dim / 2, 1]`, or `[1, n, 1, 1, head_dim / 2]` for halves.
    cos: Tensor<5>,
    sin: Tensor<5>,
    pairs: Pairs,
}

impl Rotation {
    /// For tokens at these positions on the axes, which have `widths` numbers of a head each. The angles of an
    /// axis of width d are position · θ^(−2i/d), in f64.
    pub(super) fn new<const N: usize>(
        places: &[[usize; N]],
        widths: [usize; N],
        theta: f64,
        pairs: Pairs,
        device: &Device,
    ) -> Self {
        let angles = places.iter().flat_map(|place| {
            let axes = place.iter().zip(widths);
            axes.flat_map(|(&place, width)| {
                (0..width / 2)
                    .map(move |i| place as f64 / theta.powf(2.0 * i as f64 / width as f64))
            })
        });
        let angles: Vec<f64> = angles.collect();
        let count = widths.iter().sum::<usize>() / 2;
        let shape = match pairs {
            Pairs::Neighbours => [1, places.len(), 1, count, 1],
            Pairs::Halves => [1, places.len(), 1, 1, count],
        };
        let table = |of: fn(f64) -> f64| {
            let values: Vec<f32> = angles.iter().map(|&angle| of(angle) as f32).collect();
            Tensor::<5>::from_data(TensorData::new(values, shape), (device, DType::F32))
        };
        Self {
            cos: table(f64::cos),
            sin: table(f64::sin),
            pairs,
        }
    }

    /// Rotates queries or keys of the tokens, in f32. There may be fewer tokens than positions; tokens after the
    /// last position stay unchanged.
    ///
    /// # Shapes
    /// `[b, n, heads · head_dim]` to the same.
    pub(super) fn turn(&self, x: Tensor<3>) -> Tensor<3> {
        let ([_, places, _, rows, columns], [b, n, c]) = (self.cos.dims(), x.dims());
        if dinv_kernels::available_on_cpu(&x) {
            let tables =
                [&self.cos, &self.sin].map(|table| table.clone().reshape([places, rows * columns]));
            return dinv_kernels::rotation::rotate(x, tables, self.pairs == Pairs::Halves);
        }
        if n > places {
            let behind = x.clone().narrow(1, places, n - places);
            return Tensor::cat(vec![self.turn(x.narrow(1, 0, places)), behind], 1);
        }
        let [cos, sin] = [&self.cos, &self.sin].map(|table| table.clone().narrow(1, 0, n));
        let count = rows * columns;
        let heads = c / (2 * count);
        let (shape, dim) = match self.pairs {
            Pairs::Neighbours => ([b, n, heads, count, 2], 4),
            Pairs::Halves => ([b, n, heads, 2, count], 3),
        };
        let dtype = x.dtype();
        let x: Tensor<5> = x.cast(DType::F32).reshape(shape);
        let (first, second) = (x.clone().narrow(dim, 0, 1), x.narrow(dim, 1, 1));
        let turned = Tensor::cat(
            vec![
                first.clone() * cos.clone() - second.clone() * sin.clone(),
                second * cos + first * sin,
            ],
            dim,
        );
        turned.reshape([b, n, c]).cast(dtype)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::util::tensors::host;

    fn assert_near(found: &[f32], expected: impl IntoIterator<Item = f64>) {
        for (found, expected) in found.iter().zip(expected) {
            let error = (f64::from(*found) - expected).abs();
            assert!(error < 1e-6, "{found} {expected}");
        }
    }

    #[test]
    fn neighbours_are_turned_by_place_and_frequency() {
        let device = Device::flex();
        let places = [[0, 0, 0], [0, 1, 2]];
        let rotation = Rotation::new(&places, [2, 2, 4], 1e4, Pairs::Neighbours, &device);
        let token = [1.0, 0.0].repeat(4);
        let x = Tensor::<1>::from_floats(token.repeat(3).as_slice(), &device).reshape([1, 3, 8]);
        let found = host(rotation.turn(x));
        // Unrotated numbers, and tokens after the rotated ones.
        assert_eq!(found[..8], token);
        assert_eq!(found[16..], token);
        let angles = [0.0, 1.0, 2.0, 2.0 / 100.0f64];
        let expected = angles.iter().flat_map(|angle| [angle.cos(), angle.sin()]);
        assert_near(&found[8..16], expected);
    }

    #[test]
    fn halves_are_turned_by_place_and_frequency() {
        let device = Device::flex();
        let places = [[0], [3], [4]];
        let rotation = Rotation::new(&places, [4], 100.0, Pairs::Halves, &device);
        // Two heads of two tokens, fewer than there are positions.
        let token = [1.0, 1.0, 0.0, 0.0].repeat(2);
        let x = Tensor::<1>::from_floats(token.repeat(2).as_slice(), &device).reshape([1, 2, 8]);
        let found = host(rotation.turn(x));
        assert_eq!(found[..8], token);
        let [a, b] = [3.0, 0.3f64];
        let head = [a.cos(), b.cos(), a.sin(), b.sin()];
        assert_near(&found[8..], head.into_iter().chain(head));
    }
}
