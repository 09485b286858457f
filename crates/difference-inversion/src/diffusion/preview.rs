//! Previews of a picture that is being drawn: its latents as colours, without the decoder.

use burn::tensor::Tensor;
use image::{Rgb, RgbImage};

use crate::util::tensors::host;

/// Latents per side of the chart from which the colours are learned, and the number of its rectangles. On the demo
/// model's pictures, this fit is off by 34 of 255 in the root of the mean square, and the best linear fit to those
/// pictures themselves by 30.
const CHART: u32 = 32;
const RECTANGLES: u32 = 200;
/// The share of the squared latents that is added to the diagonal, since neighbouring channels may be alike.
const RIDGE: f64 = 1e-4;

/// A linear map from the channels of latents to red, green and blue: the least-squares fit to a chart of colours, seen
/// through the model's own encoder.
#[derive(Debug, Clone)]
pub(crate) struct Colours {
    /// A row for every channel, and one for the constant.
    rows: Vec<[f64; 3]>,
}

impl Colours {
    /// The chart for latents of `factor` pixels per side: rectangles of many sizes and colours, one over the other.
    pub(crate) fn chart(factor: u32) -> RgbImage {
        let side = CHART * factor;
        let mut chart = RgbImage::from_pixel(side, side, Rgb([128; 3]));
        #[expect(clippy::cast_possible_truncation, reason = "a place in the chart")]
        let pixels = |share: f64| (share * f64::from(side)) as i64;
        for number in 1..=RECTANGLES {
            let [x, y, w, h, colour @ ..] =
                [2, 3, 5, 7, 11, 13, 17].map(|base| halton(number, base));
            let [x, y] = [x, y].map(|share| pixels(1.1 * share - 0.1));
            let [w, h] = [w, h].map(|share| pixels(0.05 + 0.25 * share));
            let colour = Rgb(colour.map(byte));
            for (column, row, pixel) in chart.enumerate_pixels_mut() {
                if (x..x + w).contains(&column.into()) && (y..y + h).contains(&row.into()) {
                    *pixel = colour;
                }
            }
        }
        chart
    }

    /// The fit of latents [1, channels, h, w] to the picture that they are of.
    pub(crate) fn fit(latents: &Tensor<4>, picture: &RgbImage) -> Self {
        let (points, [h, w]) = points(latents);
        let [width, height] = [w, h].map(|side| u32::try_from(side).unwrap_or(1).max(1));
        let small = image::imageops::thumbnail(picture, width, height);
        let n = points.first().map_or(0, Vec::len);
        let mut squares = vec![vec![0.0; n]; n];
        let mut products = vec![[0.0; 3]; n];
        for (point, Rgb(colour)) in points.iter().zip(small.pixels()) {
            for (i, a) in point.iter().enumerate() {
                for (j, b) in point.iter().enumerate() {
                    squares[i][j] += a * b;
                }
                for (product, &part) in products[i].iter_mut().zip(colour) {
                    *product += a * f64::from(part) / 255.0;
                }
            }
        }
        for (i, row) in squares.iter_mut().enumerate() {
            row[i] += row[i] * RIDGE + f64::MIN_POSITIVE;
        }
        Self {
            rows: solve(squares, products),
        }
    }

    /// Latents [1, channels, h, w] as a picture of w × h pixels.
    pub(crate) fn of(&self, latents: &Tensor<4>) -> RgbImage {
        let (points, [h, w]) = points(latents);
        let colours = points.iter().flat_map(|point| {
            let parts = point.iter().zip(&self.rows);
            let sum = parts.fold([0.0; 3], |sum, (value, row)| {
                [0, 1, 2].map(|part| sum[part] + value * row[part])
            });
            sum.map(byte)
        });
        let [width, height] = [w, h].map(|side| u32::try_from(side).unwrap_or(0));
        RgbImage::from_vec(width, height, colours.collect()).unwrap_or_default()
    }
}

/// The digits of a number in a base, mirrored at the point (Halton 1960): for different prime bases, points that fill
/// space evenly.
fn halton(mut number: u32, base: u32) -> f64 {
    let (mut sum, mut place) = (0.0, 1.0);
    while number > 0 {
        place /= f64::from(base);
        sum += place * f64::from(number % base);
        number /= base;
    }
    sum
}

/// A share from 0 to 1 as a byte.
fn byte(share: f64) -> u8 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped; not a number becomes 0"
    )]
    let byte = (share * 255.0).round().clamp(0.0, 255.0) as u8;
    byte
}

/// The channels at every place, row by row, each followed by 1, and the height and width.
fn points(latents: &Tensor<4>) -> (Vec<Vec<f64>>, [usize; 2]) {
    let [_, channels, h, w] = latents.dims();
    let values = host(latents.clone());
    let places = h * w;
    let point = |place: usize| {
        let channels = (0..channels).map(|channel| f64::from(values[channel * places + place]));
        channels.chain([1.0]).collect()
    };
    ((0..places).map(point).collect(), [h, w])
}

/// Solves a symmetric positive definite system in place by elimination, which needs no pivots.
fn solve(mut left: Vec<Vec<f64>>, mut right: Vec<[f64; 3]>) -> Vec<[f64; 3]> {
    for i in 0..left.len() {
        let (row, known) = (left[i].clone(), right[i]);
        for j in i + 1..left.len() {
            let factor = left[j][i] / row[i];
            (left[j].iter_mut().zip(&row)).for_each(|(value, above)| *value -= factor * above);
            (right[j].iter_mut().zip(known)).for_each(|(value, above)| *value -= factor * above);
        }
    }
    for i in (0..left.len()).rev() {
        right[i] = right[i].map(|value| value / left[i][i]);
        let known = right[i];
        for j in 0..i {
            let factor = left[j][i];
            (right[j].iter_mut().zip(known)).for_each(|(value, below)| *value -= factor * below);
        }
    }
    right
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    #[test]
    fn digits_are_mirrored() {
        let found = [1, 2, 3, 4].map(|number| halton(number, 2));
        assert_eq!(found, [0.5, 0.25, 0.75, 0.125]);
        assert!((halton(5, 3) - 7.0 / 9.0).abs() < 1e-12);
    }

    #[test]
    fn a_linear_system_is_solved() {
        let left = vec![
            vec![4.0, 2.0, 0.0],
            vec![2.0, 5.0, 1.0],
            vec![0.0, 1.0, 3.0],
        ];
        let expected = [[1.0, -2.0, 0.0], [0.5, 3.0, 0.0], [-1.0, 0.0, 2.0]];
        let right = left.iter().map(|row| {
            let parts = row.iter().zip(expected);
            parts.fold([0.0; 3], |sum, (a, x)| [0, 1, 2].map(|i| sum[i] + a * x[i]))
        });
        let found = solve(left.clone(), right.collect());
        for (found, expected) in found.iter().flatten().zip(expected.iter().flatten()) {
            assert!((found - expected).abs() < 1e-12, "{found} {expected}");
        }
    }

    /// Latents that are the colours in another order and scale are shown as the colours.
    #[test]
    fn colours_are_found_in_latents() {
        let chart = Colours::chart(8);
        let small = image::imageops::thumbnail(&chart, CHART, CHART);
        let channel = |part: usize, scale: f32| {
            small
                .pixels()
                .map(move |pixel| f32::from(pixel[part]) / 255.0 * scale - 0.5)
        };
        let values: Vec<f32> = channel(2, 3.0)
            .chain(channel(0, -1.0))
            .chain(channel(1, 2.0))
            .collect();
        let side = CHART as usize;
        let latents = Tensor::<1>::from_floats(values.as_slice(), &Device::flex());
        let latents = latents.reshape([1, 3, side, side]);
        let shown = Colours::fit(&latents, &chart).of(&latents);
        for (found, expected) in shown.iter().zip(small.iter()) {
            assert!(found.abs_diff(*expected) <= 1, "{found} {expected}");
        }
    }
}
