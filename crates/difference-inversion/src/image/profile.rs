//! Colour management: models were trained on sRGB, but cameras, phones and scanners use other colour spaces.

use ::image::{DynamicImage, ImageFormat, RgbImage, RgbaImage};
use moxcms::{
    Chromaticity, CicpColorPrimaries, CicpProfile, ColorPrimaries, ColorProfile, DataColorSpace,
    Layout, MatrixCoefficients, ToneReprCurve, TransferCharacteristics, TransformOptions, XyY,
};

/// The step between colour levels tested for whether a profile changes anything.
const STEP: usize = 17;
/// The approximate exponent of sRGB's curve, as written in PNG.
const GAMMA_OF_SRGB: f64 = 0.45455;
/// A curve that deviates less than this counts as sRGB's, as in libpng.
const NEAR: f64 = 0.05;

/// The colour space stated by a picture's file: its ICC profile, or the chunks of a PNG.
pub(super) fn of_file(
    bytes: &[u8],
    format: ImageFormat,
    icc: Option<&[u8]>,
) -> Option<ColorProfile> {
    let of_chunks = || match format {
        ImageFormat::Png => of_png(bytes),
        _ => None,
    };
    match icc {
        Some(icc) => ColorProfile::new_from_slice(icc).ok(),
        None => of_chunks(),
    }
}

/// The colour space from the chunks of a PNG, the first of: `cICP`, `sRGB`, `gAMA` with `cHRM`.
fn of_png(bytes: &[u8]) -> Option<ColorProfile> {
    let reader = ::png::Decoder::new(std::io::Cursor::new(bytes))
        .read_info()
        .ok()?;
    let info = reader.info();
    if let Some(cicp) = info.coding_independent_code_points {
        return Some(ColorProfile::new_from_cicp(CicpProfile {
            color_primaries: CicpColorPrimaries::try_from(cicp.color_primaries).ok()?,
            transfer_characteristics: TransferCharacteristics::try_from(cicp.transfer_function)
                .ok()?,
            matrix_coefficients: MatrixCoefficients::Identity,
            full_range: true,
        }));
    }
    let gamma = f64::from(info.gama_chunk?.into_value());
    if info.srgb.is_some() || gamma <= 0.0 {
        return None;
    }
    let mut profile = ColorProfile::new_srgb();
    if let Some(primaries) = info.chrm_chunk {
        let pair =
            |(x, y): (::png::ScaledFloat, ::png::ScaledFloat)| (x.into_value(), y.into_value());
        let of = |pair: (f32, f32)| Chromaticity::new(pair.0, pair.1);
        let (x, y) = pair(primaries.white);
        let white = XyY {
            x: f64::from(x),
            y: f64::from(y),
            yb: 1.0,
        };
        let primaries = ColorPrimaries {
            red: of(pair(primaries.red)),
            green: of(pair(primaries.green)),
            blue: of(pair(primaries.blue)),
        };
        profile.update_rgb_colorimetry(white, primaries);
    }
    if (gamma / GAMMA_OF_SRGB - 1.0).abs() > NEAR {
        #[expect(clippy::cast_possible_truncation, reason = "a small number")]
        let curve = ToneReprCurve::Parametric(vec![(1.0 / gamma) as f32]);
        profile.cicp = None;
        profile.red_trc = Some(curve.clone());
        profile.green_trc = Some(curve.clone());
        profile.blue_trc = Some(curve);
    }
    Some(profile)
}

/// Converts the picture to sRGB. It is unchanged if `profile` is for other channels (as for a CMYK picture that
/// the decoder has converted), or changes nothing beyond rounding. 16-bit pictures stay 16-bit.
pub(super) fn to_srgb(image: DynamicImage, profile: &ColorProfile) -> DynamicImage {
    converted(&image, profile).unwrap_or(image)
}

fn converted(image: &DynamicImage, profile: &ColorProfile) -> Option<DynamicImage> {
    let colour = image.color();
    let (from, to) = match (profile.color_space, colour.has_color(), colour.has_alpha()) {
        (DataColorSpace::Rgb, _, false) => (Layout::Rgb, Layout::Rgb),
        (DataColorSpace::Rgb, _, true) => (Layout::Rgba, Layout::Rgba),
        (DataColorSpace::Gray, false, false) => (Layout::Gray, Layout::Rgb),
        (DataColorSpace::Gray, false, true) => (Layout::GrayAlpha, Layout::Rgba),
        _ => return None,
    };
    if !changes(profile)? {
        return None;
    }
    let (width, height) = (image.width(), image.height());
    let pixels = usize::try_from(u64::from(width) * u64::from(height)).ok()?;
    let (srgb, options) = (ColorProfile::new_srgb(), TransformOptions::default());
    let channels = to.channels();
    let result = if colour.bytes_per_pixel().div_euclid(colour.channel_count()) > 1 {
        let source = match from {
            Layout::Rgb => image.to_rgb16().into_raw(),
            Layout::Rgba => image.to_rgba16().into_raw(),
            Layout::Gray => image.to_luma16().into_raw(),
            _ => image.to_luma_alpha16().into_raw(),
        };
        let transform = profile
            .create_transform_16bit(from, &srgb, to, options)
            .ok()?;
        let mut converted = vec![0_u16; pixels * channels];
        transform.transform(&source, &mut converted).ok()?;
        let byte =
            |value: u16| u8::try_from((u32::from(value) + 128).div_euclid(257)).unwrap_or(u8::MAX);
        converted.into_iter().map(byte).collect()
    } else {
        let source = match from {
            Layout::Rgb => image.to_rgb8().into_raw(),
            Layout::Rgba => image.to_rgba8().into_raw(),
            Layout::Gray => image.to_luma8().into_raw(),
            _ => image.to_luma_alpha8().into_raw(),
        };
        let transform = profile
            .create_transform_8bit(from, &srgb, to, options)
            .ok()?;
        let mut converted = vec![0_u8; pixels * channels];
        transform.transform(&source, &mut converted).ok()?;
        converted
    };
    match to {
        Layout::Rgb => RgbImage::from_raw(width, height, result).map(DynamicImage::from),
        _ => RgbaImage::from_raw(width, height, result).map(DynamicImage::from),
    }
}

/// Whether a profile changes any colour beyond rounding.
fn changes(profile: &ColorProfile) -> Option<bool> {
    let (srgb, options) = (ColorProfile::new_srgb(), TransformOptions::default());
    let levels = || (0..=u8::MAX).step_by(STEP);
    let (layout, colours): (_, Vec<u8>) = match profile.color_space {
        DataColorSpace::Gray => (Layout::Gray, levels().collect()),
        _ => (
            Layout::Rgb,
            levels()
                .flat_map(|r| levels().flat_map(move |g| levels().flat_map(move |b| [r, g, b])))
                .collect(),
        ),
    };
    let transform = profile
        .create_transform_8bit(layout, &srgb, Layout::Rgb, options)
        .ok()?;
    let mut changed = vec![0; colours.len().div_euclid(layout.channels()) * 3];
    transform.transform(&colours, &mut changed).ok()?;
    let repeated = colours.iter().flat_map(|&value| match layout {
        Layout::Gray => std::iter::repeat_n(value, 3),
        _ => std::iter::repeat_n(value, 1),
    });
    Some(repeated.zip(&changed).any(|(x, y)| x.abs_diff(*y) > 1))
}
