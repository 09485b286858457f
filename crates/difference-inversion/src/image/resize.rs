//! Resizing that equals Pillow's to the last bit.
//!
//! The preprocessing of CLIP and BLIP-2 checkpoints is defined by Pillow's resampling: separable,
//! antialiased (the filter widens with the reduction), horizontal pass first, each pass in fixed
//! point and rounded to 8 bits (`Resample.c`). Pillow 13 may do the vertical pass first, which differs
//! only if one side shrinks while the other grows.

use ::image::{Rgb, RgbImage};

/// A resampling filter, numbered as in Pillow and in `preprocessor_config.json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// The nearest pixel.
    Nearest,
    /// Lanczos with three lobes, the sharpest.
    Lanczos,
    /// A triangle.
    Bilinear,
    /// Keys' cubic with a = −0.5.
    Bicubic,
    /// The mean of the covered pixels.
    Box,
    /// A Hamming-windowed sinc of one lobe.
    Hamming,
}

impl Filter {
    /// The filter behind Pillow's number (0 nearest … 5 Hamming), if there is one.
    #[must_use]
    pub fn from_pillow(number: u32) -> Option<Self> {
        use Filter::{Bicubic, Bilinear, Box, Hamming, Lanczos, Nearest};
        [Nearest, Lanczos, Bilinear, Bicubic, Box, Hamming]
            .get(usize::try_from(number).ok()?)
            .copied()
    }

    /// Half the width of the filter, in source pixels at a scale of one.
    fn support(self) -> f64 {
        match self {
            Self::Nearest | Self::Box => 0.5,
            Self::Bilinear | Self::Hamming => 1.0,
            Self::Bicubic => 2.0,
            Self::Lanczos => 3.0,
        }
    }

    /// The filter's height at `x`.
    fn weight(self, x: f64) -> f64 {
        let sinc = |x: f64| {
            if x == 0.0 {
                1.0
            } else {
                let x = x * std::f64::consts::PI;
                x.sin() / x
            }
        };
        let distance = x.abs();
        match self {
            Self::Nearest | Self::Box => f64::from(x > -0.5 && x <= 0.5),
            Self::Bilinear => (1.0 - distance).max(0.0),
            Self::Bicubic if distance < 1.0 => (1.5 * distance - 2.5) * distance * distance + 1.0,
            Self::Bicubic if distance < 2.0 => {
                -0.5 * (((distance - 5.0) * distance + 8.0) * distance - 4.0)
            }
            Self::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Self::Hamming if distance < 1.0 => {
                sinc(x) * (0.54 + 0.46 * (distance * std::f64::consts::PI).cos())
            }
            _ => 0.0,
        }
    }
}

/// Fractional bits of the fixed-point weights.
const PRECISION_BITS: u32 = 32 - 8 - 2;

/// The weights of one output pixel on a row or column of the source.
struct Taps {
    start: u32,
    weights: Vec<i32>,
}

/// The taps of all `size` output pixels along an axis of `source` pixels.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "positions lie inside the picture and weights are at most about one"
)]
fn taps(source: u32, size: u32, filter: Filter) -> Vec<Taps> {
    let scale = f64::from(source) / f64::from(size);
    let filter_scale = scale.max(1.0);
    let support = filter.support() * filter_scale;
    let one_output = |x: u32| {
        let centre = (f64::from(x) + 0.5) * scale;
        if filter == Filter::Nearest {
            return Taps {
                start: centre as u32,
                weights: vec![1 << PRECISION_BITS],
            };
        }
        let start = (centre - support + 0.5).max(0.0) as u32;
        let end = ((centre + support + 0.5) as u32).min(source);
        let raw: Vec<f64> = (start..end)
            .map(|i| filter.weight((f64::from(i) - centre + 0.5) * (1.0 / filter_scale)))
            .collect();
        let total: f64 = raw.iter().sum();
        let one = f64::from(1u32 << PRECISION_BITS);
        let weights = raw
            .iter()
            .map(|weight| (weight / total * one).round() as i32)
            .collect();
        Taps { start, weights }
    };
    (0..size).map(one_output).collect()
}

/// The weighted sum of the pixels that `taps` covers, rounded to 8 bits.
fn blend(taps: &Taps, pixel: impl Fn(u32) -> Rgb<u8>) -> Rgb<u8> {
    let mut sum = [1i32 << (PRECISION_BITS - 1); 3];
    for (position, weight) in (taps.start..).zip(&taps.weights) {
        for (sum, value) in sum.iter_mut().zip(pixel(position).0) {
            *sum += i32::from(value) * weight;
        }
    }
    Rgb(sum.map(|sum| u8::try_from((sum >> PRECISION_BITS).clamp(0, 255)).unwrap_or(u8::MAX)))
}

/// Resizes `image` to `width` × `height` exactly as Pillow’s `Image.resize` does.
#[must_use]
pub fn resize(image: &RgbImage, width: u32, height: u32, filter: Filter) -> RgbImage {
    let mut image = image.clone();
    if width != image.width() {
        let taps = taps(image.width(), width, filter);
        image = RgbImage::from_fn(width, image.height(), |x, y| {
            blend(&taps[x as usize], |x| *image.get_pixel(x, y))
        });
    }
    if height != image.height() {
        let taps = taps(image.height(), height, filter);
        image = RgbImage::from_fn(width, height, |x, y| {
            blend(&taps[y as usize], |y| *image.get_pixel(x, y))
        });
    }
    image
}
