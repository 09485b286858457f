//! The autoencoder in overlapping tiles, which saves memory.

use std::ops::Range;

use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::models::vae::Autoencoder;

/// Side of a tile in latents.
const TILE: usize = 40;
/// Overlap of neighbouring tiles in latents, over which they are blended.
const OVERLAP: usize = 8;

/// [`Autoencoder::mean`], in tiles of 40×40 latents that overlap by 8 and are blended. The result is close to
/// that of the whole, but not the same: each tile is normalised separately. Pictures of no more than one tile are
/// encoded as a whole.
///
/// # Shapes
/// As [`Autoencoder::mean`].
///
/// # Panics
/// If the shape is not as above.
pub fn mean_in_tiles(vae: &dyn Autoencoder, image: &Tensor<4>) -> Tensor<4> {
    let factor = vae.downsampling_factor();
    in_tiles(image, [factor, 1], |tile| vae.mean(tile))
}

/// [`Autoencoder::decode`], in tiles as in [`mean_in_tiles`].
///
/// # Shapes
/// As [`Autoencoder::decode`].
///
/// # Panics
/// If the shape is not as above.
pub fn decode_in_tiles(vae: &dyn Autoencoder, latents: &Tensor<4>) -> Tensor<4> {
    let factor = vae.downsampling_factor();
    in_tiles(latents, [1, factor], |tile| vae.decode(tile))
}

/// `run` of every tile of `x`, blended; a latent is `input` elements of `x` wide and high, and
/// `output` elements of the result.
fn in_tiles(
    x: &Tensor<4>,
    [input, output]: [usize; 2],
    run: impl Fn(Tensor<4>) -> Tensor<4>,
) -> Tensor<4> {
    let [b, c, h, w] = x.dims();
    let (height, width) = (h / input, w / input);
    let (rows, columns) = (tiles(height), tiles(width));
    if rows.len() == 1 && columns.len() == 1 {
        return run(x.clone());
    }
    let scaled = |range: &Range<usize>, scale: usize| range.start * scale..range.end * scale;
    let mut sums: Option<[Tensor<4>; 2]> = None;
    for row in &rows {
        for column in &columns {
            let part = [0..b, 0..c, scaled(row, input), scaled(column, input)];
            let y = run(x.clone().slice(part));
            let weights = blend(row, height, output, &x.device()).reshape([1, 1, -1, 1])
                * blend(column, width, output, &x.device()).reshape([1, 1, 1, -1]);
            let weights = weights.cast(y.dtype());
            let padding = (
                column.start * output,
                (width - column.end) * output,
                row.start * output,
                (height - row.end) * output,
            );
            let [y, weights] = [y * weights.clone(), weights].map(|x| x.pad(padding, 0.0));
            sums = Some(match sums {
                None => [y, weights],
                Some([y_sum, weight_sum]) => [y_sum + y, weight_sum + weights],
            });
        }
    }
    match sums {
        Some([y, weights]) => y / weights,
        None => run(x.clone()),
    }
}

/// Evenly spaced tiles that cover `size` latents.
fn tiles(size: usize) -> Vec<Range<usize>> {
    if size <= TILE {
        return vec![0..size];
    }
    let gaps = (size - OVERLAP).div_ceil(TILE - OVERLAP) - 1;
    (0..=gaps)
        .map(|number| (size - TILE) * number / gaps)
        .map(|start| start..start + TILE)
        .collect()
}

/// The weight of each element of a tile's side: less towards an edge with a neighbour.
fn blend(tile: &Range<usize>, size: usize, scale: usize, device: &Device) -> Tensor<1> {
    let (length, overlap) = (tile.len() * scale, (OVERLAP * scale) as f32);
    let edge = |distance: usize, neighbour: bool| match neighbour {
        true => ((distance as f32 + 0.5) / overlap).min(1.0),
        false => 1.0,
    };
    let weights: Vec<f32> = (0..length)
        .map(|place| edge(place, tile.start > 0) * edge(length - 1 - place, tile.end < size))
        .collect();
    Tensor::from_data(TensorData::new(weights, [length]), (device, DType::F32))
}

#[cfg(test)]
mod tests {
    use burn::tensor::Distribution;

    use super::*;

    #[test]
    fn tiles_cover_everything_and_overlap() {
        for size in [8, 40, 41, 64, 72, 100, 128] {
            let tiles = tiles(size);
            assert_eq!((tiles[0].start, tiles[tiles.len() - 1].end), (0, size));
            for pair in tiles.windows(2) {
                assert!(pair[1].start + OVERLAP <= pair[0].end, "{size}: {pair:?}");
            }
        }
        assert_eq!(tiles(64), [0..40, 24..64]);
    }

    #[test]
    fn tiles_of_a_local_map_are_the_whole() {
        let device = Device::flex();
        let x = Tensor::<4>::random([1, 2, 50, 90], Distribution::Default, &device);
        let double = |x: Tensor<4>| x.repeat_dim(2, 1) * 2.0;
        let error = (in_tiles(&x, [1, 1], double) - x * 2.0).abs().max();
        assert!(error.into_scalar::<f32>() < 1e-5);
    }
}
