//! Metrics of pixels.

use image::RgbImage;

/// The side of SSIM's window.
const WINDOW: usize = 11;
/// The standard deviation of its weights.
const SIGMA: f64 = 1.5;
/// (0.01 · 255)² and (0.03 · 255)².
const C: [f64; 2] = [6.5025, 58.5225];

/// The mean squared difference of pixels scaled to 0 to 1, over all channels.
///
/// # Panics
/// If the pictures differ in size.
pub fn mse(x: &RgbImage, y: &RgbImage) -> f64 {
    assert_eq!(x.dimensions(), y.dimensions(), "pictures of one size");
    let bytes = x.as_raw().iter().zip(y.as_raw());
    let count = bytes.len() as f64;
    let squares = bytes.map(|(&x, &y)| (f64::from(x) - f64::from(y)).powi(2));
    squares.sum::<f64>() / count / 255.0_f64.powi(2)
}

/// The structural similarity ([Wang et al. 2004](https://doi.org/10.1109/TIP.2003.819861)):
/// `(2 μx μy + C₁)(2 σxy + C₂) / ((μx² + μy² + C₁)(σx² + σy² + C₂))`, in Gaussian windows of 11 × 11
/// with σ = 1.5, averaged over all windows that lie in the picture and over the channels. This is
/// scikit-image's `structural_similarity` with `gaussian_weights=True`,
/// `use_sample_covariance=False`, `data_range=255`.
///
/// `None` for pictures smaller than a window.
///
/// # Panics
/// If the pictures differ in size.
pub fn ssim(x: &RgbImage, y: &RgbImage) -> Option<f64> {
    assert_eq!(x.dimensions(), y.dimensions(), "pictures of one size");
    let (width, height) = (x.width() as usize, x.height() as usize);
    if width < WINDOW || height < WINDOW {
        return None;
    }
    let of_channel = |channel: usize| {
        let plane = |image: &RgbImage| -> Vec<f64> {
            image
                .pixels()
                .map(|pixel| f64::from(pixel.0[channel]))
                .collect()
        };
        let (x, y) = (plane(x), plane(y));
        let product =
            |x: &[f64], y: &[f64]| -> Vec<f64> { x.iter().zip(y).map(|(x, y)| x * y).collect() };
        let planes = [product(&x, &x), product(&y, &y), product(&x, &y)];
        let [xx, yy, xy] = planes.map(|plane| blurred(&plane, width));
        let (x, y) = (blurred(&x, width), blurred(&y, width));
        let windows = (0..x.len()).map(|i| {
            let (mean_x, mean_y) = (x[i], y[i]);
            let variances = xx[i] - mean_x * mean_x + yy[i] - mean_y * mean_y;
            let covariance = xy[i] - mean_x * mean_y;
            (2.0 * mean_x * mean_y + C[0]) * (2.0 * covariance + C[1])
                / ((mean_x * mean_x + mean_y * mean_y + C[0]) * (variances + C[1]))
        });
        windows.sum::<f64>() / x.len() as f64
    };
    Some((0..3).map(of_channel).sum::<f64>() / 3.0)
}

/// The Gaussian mean of every window that lies in a picture of this width.
fn blurred(plane: &[f64], width: usize) -> Vec<f64> {
    let weights: [f64; WINDOW] = std::array::from_fn(|i| {
        let distance = i as f64 - (WINDOW / 2) as f64;
        (-distance.powi(2) / (2.0 * SIGMA.powi(2))).exp()
    });
    let sum: f64 = weights.iter().sum();
    let mean = |values: &mut dyn Iterator<Item = f64>| -> f64 {
        values
            .zip(weights)
            .map(|(value, weight)| value * weight / sum)
            .sum()
    };
    let narrow = width + 1 - WINDOW;
    let rows: Vec<f64> = plane
        .chunks_exact(width)
        .flat_map(|row| {
            row.windows(WINDOW)
                .map(|window| mean(&mut window.iter().copied()))
        })
        .collect();
    let height = rows.len() / narrow + 1 - WINDOW;
    (0..height * narrow)
        .map(|at| mean(&mut (0..WINDOW).map(|down| rows[at + down * narrow])))
        .collect()
}
