//! Colour profiles: models were trained on sRGB, and cameras and telephones write other colours.

use ::image::RgbImage;
use moxcms::{ColorProfile, DataColorSpace, Layout, TransformOptions};

/// Levels of a colour that are tried to see whether a profile changes anything.
const STEP: usize = 17;

/// The picture in sRGB, if `profile` is the ICC profile of its RGB colours. As it is, if the profile cannot
/// be read, is one of other colours (of a CMYK picture that the decoder has converted), or changes none by
/// more than the rounding.
pub(super) fn to_srgb(image: RgbImage, profile: &[u8]) -> RgbImage {
    converted(&image, profile).unwrap_or(image)
}

fn converted(image: &RgbImage, profile: &[u8]) -> Option<RgbImage> {
    let profile = ColorProfile::new_from_slice(profile).ok()?;
    if profile.color_space != DataColorSpace::Rgb {
        return None;
    }
    let (srgb, options) = (ColorProfile::new_srgb(), TransformOptions::default());
    let transform = profile.create_transform_8bit(Layout::Rgb, &srgb, Layout::Rgb, options);
    let transform = transform.ok()?;
    let apply = |pixels: &[u8]| {
        let mut converted = vec![0; pixels.len()];
        transform.transform(pixels, &mut converted).ok()?;
        Some(converted)
    };
    let levels = || (0..=u8::MAX).step_by(STEP);
    let colours: Vec<u8> = levels()
        .flat_map(|r| levels().flat_map(move |g| levels().flat_map(move |b| [r, g, b])))
        .collect();
    let changed = apply(&colours)?;
    if colours
        .iter()
        .zip(&changed)
        .all(|(x, y)| x.abs_diff(*y) <= 1)
    {
        return None;
    }
    RgbImage::from_raw(image.width(), image.height(), apply(image.as_raw())?)
}
