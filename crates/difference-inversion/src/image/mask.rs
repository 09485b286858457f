//! Masks as editors save them: white on black, brush strokes on transparency, or the picture with a hole.

use std::path::Path;

use ::image::{DynamicImage, GrayImage, Luma, RgbImage, RgbaImage};

use super::{load_transparent, over_white};
use crate::{Error, Result};

/// Pixels with less alpha are transparent.
const OPAQUE: u8 = 128;
/// The largest deviation of a brush's colour.
const ONE_COLOUR: u8 = 48;
/// The largest difference between the channels of grey.
const GREY: u8 = 16;
/// The largest value of black, and the largest distance of white from its maximum.
const DARK: u8 = 64;

/// How a mask marks the area to redraw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reading {
    /// Pixels at least half as bright as white.
    Bright,
    /// Paint on transparency.
    Painted,
    /// White, on black or on transparency.
    BrightAndOpaque,
    /// The hole in the picture.
    Hole,
}

/// The area that an inpainting model redraws: white there, black elsewhere.
#[derive(Debug, Clone)]
pub struct Mask {
    /// The mask.
    pub image: RgbImage,
    /// How it was interpreted, if that was ambiguous.
    pub notice: Option<String>,
}

/// Reads a mask. Without transparent pixels, the area at least half as bright as white is redrawn. On
/// transparency, brush strokes of one colour mark the area, whatever the colour. Black and white with transparent
/// pixels mark it in white. In a picture with transparent pixels, the erased area is redrawn.
///
/// # Errors
/// As [`load_image`](super::load_image), and [`Error::InvalidFile`] for an empty mask.
pub fn load_mask(path: &Path) -> Result<Mask> {
    let image = load_transparent(path)?;
    if !image.color().has_alpha() {
        return Ok(Mask {
            image: over_white(image),
            notice: None,
        });
    }
    let pixels = image.into_rgba8();
    let Some(reading) = reading(&pixels) else {
        let reason = "the mask is fully transparent and marks nothing";
        return Err(Error::invalid_file(path, reason));
    };
    let told = match reading {
        Reading::Bright => None,
        Reading::Painted => Some("painted areas are redrawn, transparent areas are kept"),
        Reading::BrightAndOpaque => {
            Some("white areas are redrawn, black and transparent areas are kept")
        }
        Reading::Hole => Some("transparent areas are redrawn, the rest is kept"),
    };
    Ok(Mask {
        notice: told.map(|told| format!("{}: {told}", path.display())),
        image: match reading {
            Reading::Bright => over_white(pixels.into()),
            _ => marked(&pixels, reading),
        },
    })
}

/// The area to redraw, in white.
fn marked(pixels: &RgbaImage, reading: Reading) -> RgbImage {
    let grey = GrayImage::from_fn(pixels.width(), pixels.height(), |x, y| {
        let [r, g, b, alpha] = pixels.get_pixel(x, y).0;
        Luma([match reading {
            Reading::Painted => alpha,
            Reading::Hole => u8::MAX - alpha,
            _ if alpha < OPAQUE => 0,
            _ => r.min(g).min(b),
        }])
    });
    DynamicImage::from(grey).into_rgb8()
}

/// How to read a mask with alpha; `None` if it is empty.
fn reading(pixels: &RgbaImage) -> Option<Reading> {
    let (mut least, mut most) = ([u8::MAX; 3], [0; 3]);
    let (mut opaque, mut transparent, mut black_or_white) = (0_u64, 0_u64, 0_u64);
    for pixel in pixels.pixels() {
        let [r, g, b, alpha] = pixel.0;
        if alpha < OPAQUE {
            transparent += 1;
            continue;
        }
        opaque += 1;
        let rgb = [r, g, b];
        for channel in 0..3 {
            least[channel] = least[channel].min(rgb[channel]);
            most[channel] = most[channel].max(rgb[channel]);
        }
        let (low, high) = (r.min(g).min(b), r.max(g).max(b));
        let is_extreme = high <= DARK || low >= u8::MAX - DARK;
        black_or_white += u64::from(high - low <= GREY && is_extreme);
    }
    let spread = (0..3)
        .map(|channel| most[channel].saturating_sub(least[channel]))
        .max();
    match (opaque, transparent) {
        (0, _) => None,
        (_, 0) => Some(Reading::Bright),
        _ if spread.is_some_and(|spread| spread <= ONE_COLOUR) => Some(Reading::Painted),
        // The edges of a brush are between black and white.
        _ if black_or_white * 10 >= opaque * 9 => Some(Reading::BrightAndOpaque),
        _ => Some(Reading::Hole),
    }
}

#[cfg(test)]
mod tests {
    use ::image::{ImageFormat, Rgba};

    use super::*;

    /// Where a mask of these pixels is white, as a row of `#` and `.`; and the notice.
    fn read(pixel: impl Fn(u32) -> [u8; 4]) -> (String, Option<String>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mask.png");
        let pixels = RgbaImage::from_fn(8, 8, |x, _| Rgba(pixel(x)));
        pixels.save_with_format(&path, ImageFormat::Png).unwrap();
        let mask = load_mask(&path).unwrap();
        let row = (0..8).map(|x| {
            if mask.image.get_pixel(x, 3).0[0] >= 128 {
                '#'
            } else {
                '.'
            }
        });
        let told = mask
            .notice
            .map(|notice| notice.rsplit("mask.png: ").next().unwrap().to_owned());
        (row.collect(), told)
    }

    #[test]
    fn what_an_editor_marks_is_drawn_anew() {
        let expected = "....####";
        let inside = |x: u32| x >= 4;
        let nothing = [0; 4];
        for colour in [[0, 0, 0], [255, 255, 255], [230, 20, 40]] {
            let brush = read(|x| {
                let [r, g, b] = colour;
                if inside(x) { [r, g, b, 255] } else { nothing }
            });
            assert_eq!(brush.0, expected, "{colour:?}");
            assert!(brush.1.unwrap().starts_with("painted areas are redrawn"));
        }
        let photo = |x: u32| {
            [(x * 60).min(255), 255 - x * 30, 40].map(|value| u8::try_from(value).unwrap())
        };
        let hole = read(|x| {
            let [r, g, b] = photo(x);
            [r, g, b, if inside(x) { 0 } else { 255 }]
        });
        assert_eq!(hole.0, expected);
        assert!(hole.1.unwrap().starts_with("transparent areas are redrawn"));
        let both = read(|x| match x {
            0..2 => nothing,
            2..4 => [0, 0, 0, 255],
            _ => [255; 4],
        });
        assert_eq!(both.0, expected);
        assert!(both.1.unwrap().starts_with("white areas are redrawn"));
        let opaque = read(|x| if inside(x) { [255; 4] } else { [0, 0, 0, 255] });
        assert_eq!(opaque, (expected.to_owned(), None));
    }

    #[test]
    fn a_mask_of_nothing_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mask.png");
        RgbaImage::new(8, 8).save(&path).unwrap();
        let refused = load_mask(&path).unwrap_err().to_string();
        assert!(refused.contains("fully transparent"), "{refused}");
    }
}
