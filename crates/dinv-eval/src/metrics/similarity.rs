//! Angles and distances between features.

use difference_inversion::util::vector::cosine;

/// The directional similarity `cos(after − before, after′ − before′)` of two changes between pictures,
/// each given as [before, after] ([Gal et al. 2021](https://arxiv.org/abs/2108.00946) compare pictures
/// with texts). It is 0 if B′ equals B.
///
/// The features may be of unit norm (InstructPix2Pix's code) or unnormalised (Analogist's).
pub fn direction(change: [&[f32]; 2], other: [&[f32]; 2]) -> f64 {
    let difference = |[before, after]: [&[f32]; 2]| -> Vec<f32> {
        before
            .iter()
            .zip(after)
            .map(|(before, after)| after - before)
            .collect()
    };
    cosine(&difference(change), &difference(other))
}

/// A cosine rescaled to 0 to 1, `(1 + cos) / 2`, as the paper's DINO column seems to be.
pub fn rescaled(cosine: f64) -> f64 {
    f64::midpoint(1.0, cosine)
}

/// One stage of LPIPS ([Zhang et al. 2018](https://arxiv.org/abs/1801.03924), equation 1):
/// `mean over positions of Σ_c w_c (x̂_c − ŷ_c)²`, where x̂ and ŷ have unit norm at every position.
/// Without `weights`, all are 1.
///
/// # Shapes
/// `x`, `y`: `[positions, channels]`, row by row; `weights`: `[channels]`
pub fn stage_distance(x: &[f32], y: &[f32], channels: usize, weights: Option<&[f32]>) -> f64 {
    const EPSILON: f64 = 1e-10;
    let norm = |row: &[f32]| {
        row.iter()
            .map(|&v| f64::from(v).powi(2))
            .sum::<f64>()
            .sqrt()
            + EPSILON
    };
    let rows = x.chunks_exact(channels).zip(y.chunks_exact(channels));
    let positions = rows.len().max(1) as f64;
    let sum: f64 = rows
        .map(|(x, y)| {
            let (x_norm, y_norm) = (norm(x), norm(y));
            let squares = x.iter().zip(y).enumerate().map(|(c, (&x, &y))| {
                let weight = weights.map_or(1.0, |weights| f64::from(weights[c]));
                weight * (f64::from(x) / x_norm - f64::from(y) / y_norm).powi(2)
            });
            squares.sum::<f64>()
        })
        .sum();
    sum / positions
}
