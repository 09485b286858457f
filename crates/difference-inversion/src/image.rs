//! Picture files in, tensors in [−1, 1], picture files out.

use std::fs::File;
use std::io::{Cursor, Read};
use std::path::Path;

use ::image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits};
use burn::tensor::{Device, Tensor, TensorData};

use crate::{Error, Result};

mod formats;
mod mask;
mod orientation;
mod png;
mod preprocess;
mod profile;
mod resize;
mod tiff;

pub use ::image::RgbImage;
use ::image::RgbaImage;

pub use self::mask::{Mask, load_mask};
pub use self::png::{data_url, read_png_text, save_png};
pub use self::preprocess::ImagePreprocessor;
pub use self::resize::{Filter, resize};

/// Pictures with a shorter side are refused: they show nothing.
pub const MIN_SIDE: u32 = 8;
/// Pictures with one side more than this many times as long as the other are refused: the shorter one is enlarged to
/// a network's size, and the longer one with it.
const MAX_ASPECT: u64 = 100;
/// Pictures with more pixels are refused before decoding.
pub const MAX_PIXELS: u64 = 300_000_000;
/// The largest file read, in bytes.
const MAX_BYTES: u64 = 1 << 30;
/// The most memory a decoder may take, in bytes.
const MAX_DECODED: u64 = 4 << 30;

/// Reads a PNG, JPEG, WebP, GIF (first frame), BMP or TIFF file as 8-bit RGB.
///
/// The format is recognised from the content, not from the name. The picture is auto-rotated (EXIF or XMP) and
/// converted to sRGB from its colour profile, or from a PNG's `cICP`, `gAMA` and `cHRM`. Transparent pixels are
/// blended with white; grey, palette, 16-bit and CMYK pictures are converted. Formats that Pillow reads are
/// read the same way, or refused.
///
/// # Errors
/// [`Error::Io`] when the file cannot be read. [`Error::InvalidFile`], naming the file, when it is not a
/// picture or one of a format that is not read, is truncated or damaged, has a side of less than [`MIN_SIDE`] or more
/// than [`MAX_PIXELS`] pixels (checked from the header, before decoding).
pub fn load_image(path: &Path) -> Result<RgbImage> {
    Ok(over_white(load_transparent(path)?))
}

/// As [`load_image`], but keeps transparency.
pub(crate) fn load_transparent(path: &Path) -> Result<DynamicImage> {
    let invalid = |reason: String| Error::invalid_file(path, reason);
    if path.is_dir() {
        return Err(invalid("a folder, expected a picture".into()));
    }
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut bytes))
        .map_err(Error::io(path))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(invalid("the file is larger than 1 GiB".into()));
    }
    if bytes.is_empty() {
        return Err(invalid("the file is empty".into()));
    }
    decode(&bytes).map_err(invalid)
}

/// Decodes the picture in a file, or states why it cannot.
fn decode(bytes: &[u8]) -> std::result::Result<DynamicImage, String> {
    let (mut image, format, icc) = match tiff::is_tiff(bytes) {
        true => {
            let mut tiff = tiff::Tiff::open(bytes)?;
            check_size(tiff.size, tiff.decoded_bytes()?)?;
            let icc = tiff.icc.clone();
            (tiff.decode()?, ImageFormat::Tiff, icc)
        }
        false => {
            let (image, format, icc) = decode_by_image(bytes)?;
            (image, format, icc)
        }
    };
    let colours = profile::of_file(bytes, format, icc.as_deref());
    image.apply_orientation(orientation::orientation(bytes, format));
    Ok(match colours {
        Some(colours) => profile::to_srgb(image, &colours),
        None => image,
    })
}

/// The same for formats that the crate `image` decodes in full: the picture as stored, its format and its
/// profile.
fn decode_by_image(
    bytes: &[u8],
) -> std::result::Result<(DynamicImage, ImageFormat, Option<Vec<u8>>), String> {
    let damaged = |error: ImageError| format!("cannot be decoded: {error}");
    let mut reader = ImageReader::new(Cursor::new(bytes))
        .with_guessed_format()
        .map_err(|error| error.to_string())?;
    use ImageFormat::{Bmp, Gif, Jpeg, Png, WebP};
    let is_known = matches!(reader.format(), Some(Bmp | Gif | Jpeg | Png | WebP));
    let other = || formats::named(bytes);
    if let Some(other) = (!is_known).then(other).flatten() {
        return Err(other);
    }
    let format = reader.format();
    let Some(format) = format else {
        return Err("not a picture (expected PNG, JPEG, WebP, GIF, BMP or TIFF)".into());
    };
    let mut limits = Limits::default();
    limits.max_alloc = Some(MAX_DECODED);
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(damaged)?;
    check_size(decoder.dimensions(), decoder.total_bytes())?;
    if format == ImageFormat::Jpeg && !jpeg_is_complete(bytes) {
        return Err("the JPEG is truncated".into());
    }
    let icc = decoder.icc_profile().map_err(damaged)?;
    let image = DynamicImage::from_decoder(decoder).map_err(damaged)?;
    Ok((image, format, icc))
}

/// Refuses pictures that are too small to show anything, and pictures that are too large.
fn check_size((width, height): (u32, u32), decoded: u64) -> std::result::Result<(), String> {
    if width < MIN_SIDE || height < MIN_SIDE {
        return Err(format!(
            "{width}×{height} pixels, expected at least {MIN_SIDE}×{MIN_SIDE}"
        ));
    }
    if u64::from(width.max(height)) > u64::from(width.min(height)) * MAX_ASPECT {
        return Err(format!(
            "{width}×{height} pixels, expected one side at most {MAX_ASPECT} times as long as the other"
        ));
    }
    if u64::from(width) * u64::from(height) > MAX_PIXELS || decoded > MAX_DECODED {
        return Err(format!(
            "{width}×{height} pixels, expected at most {} megapixels",
            MAX_PIXELS.div_euclid(1_000_000)
        ));
    }
    Ok(())
}

/// Whether a JPEG has its end-of-image marker; the decoder fills missing parts with grey.
fn jpeg_is_complete(bytes: &[u8]) -> bool {
    // The segments before the first scan state their length: a thumbnail inside one is skipped.
    let mut at = 2;
    while let Some(&[0xff, marker, high, low]) = bytes.get(at..at + 4) {
        match marker {
            0xff => at += 1, // fill
            0xda => return bytes[at..].windows(2).any(|pair| pair == [0xff, 0xd9]),
            _ => at += 2 + usize::from(u16::from_be_bytes([high, low])),
        }
    }
    false
}

/// The picture in RGB, its transparent pixels blended with white.
fn over_white(image: DynamicImage) -> RgbImage {
    if !image.color().has_alpha() {
        return image.into_rgb8();
    }
    let image = match image {
        // As Pillow, which keeps the upper of two bytes.
        DynamicImage::ImageRgba16(_) | DynamicImage::ImageLumaA16(_) => {
            let wide = image.into_rgba16();
            let upper = |value: &u16| value.to_be_bytes()[0];
            let bytes: Vec<u8> = wide.iter().map(upper).collect();
            RgbaImage::from_raw(wide.width(), wide.height(), bytes).unwrap_or_default()
        }
        image => image.into_rgba8(),
    };
    RgbImage::from_fn(image.width(), image.height(), |x, y| {
        let [r, g, b, alpha] = image.get_pixel(x, y).0.map(u32::from);
        ::image::Rgb([r, g, b].map(|value| {
            let blended = (value * alpha + 255 * (255 - alpha) + 127).div_euclid(255);
            u8::try_from(blended).unwrap_or(u8::MAX)
        }))
    })
}

/// The central `width` × `height` of a picture; a smaller picture is padded with black.
fn crop(image: &RgbImage, width: u32, height: u32) -> RgbImage {
    // Half the difference, rounded as transformers' `center_crop` does: up when padding.
    let offset = |canvas: u32, picture: u32| {
        i64::from(canvas)
            .saturating_sub(i64::from(picture) - 1)
            .div_euclid(2)
    };
    let mut canvas = RgbImage::new(width, height);
    let (x, y) = (offset(width, image.width()), offset(height, image.height()));
    ::image::imageops::replace(&mut canvas, image, x, y);
    canvas
}

/// The largest central part of a picture with the aspect ratio of `width` × `height`.
#[must_use]
pub fn middle(image: &RgbImage, width: u32, height: u32) -> RgbImage {
    let (w, h) = (u64::from(image.width()), u64::from(image.height()));
    let (target_w, target_h) = (u64::from(width), u64::from(height));
    let side = |long: u64, wanted: u64, other: u64| {
        u32::try_from(((2 * long * wanted + other).div_euclid(2 * other)).max(1))
            .unwrap_or(u32::MAX)
    };
    if w * target_h > h * target_w {
        crop(image, side(h, target_w, target_h), image.height())
    } else {
        crop(image, image.width(), side(w, target_h, target_w))
    }
}

/// Fills `width` × `height` with the [`middle`] of a picture, resized by Lanczos.
#[must_use]
pub fn fit(image: &RgbImage, width: u32, height: u32) -> RgbImage {
    let middle = middle(image, width, height);
    resize(&middle, width, height, Filter::Lanczos)
}

/// The picture as a tensor in [−1, 1], fitted to `size` = `[height, width]` (see [`fit`]).
///
/// # Shapes
/// `[1, 3, height, width]`
#[must_use]
pub fn to_tensor(image: &RgbImage, size: [u32; 2], device: &Device) -> Tensor<4> {
    normalised_tensor(
        &fit(image, size[1], size[0]),
        |_, value| value / 127.5 - 1.0,
        device,
    )
}

/// The pixels as `[1, 3, height, width]`, each passed through `scale(channel, 0 to 255)`.
fn normalised_tensor(
    image: &RgbImage,
    scale: impl Fn(usize, f32) -> f32,
    device: &Device,
) -> Tensor<4> {
    let (width, height) = (image.width() as usize, image.height() as usize);
    let scale = &scale;
    let values: Vec<f32> = (0..3)
        .flat_map(|channel| {
            image
                .pixels()
                .map(move |pixel| scale(channel, f32::from(pixel.0[channel])))
        })
        .collect();
    Tensor::from_data(TensorData::new(values, [1, 3, height, width]), device)
}

/// The first picture of a tensor in [−1, 1]; values outside are clamped.
///
/// # Shapes
/// `image`: `[b, 3, height, width]`
///
/// # Errors
/// [`Error::NotFinite`] when a value is NaN or infinite.
///
/// # Panics
/// When the tensor does not have three channels.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the value is rounded and within 0 to 255"
)]
pub fn to_image(image: Tensor<4>) -> Result<RgbImage> {
    let [_, channels, height, width] = image.dims();
    assert_eq!(channels, 3, "a picture has three channels");
    let values: Vec<f32> = image.narrow(0, 0, 1).into_data().iter::<f32>().collect();
    if !values.iter().all(|value| value.is_finite()) {
        return Err(Error::NotFinite {
            what: "the decoded picture",
        });
    }
    let plane = height * width;
    let byte = |value: f32| ((value.clamp(-1.0, 1.0) + 1.0) * 127.5).round_ties_even() as u8;
    Ok(RgbImage::from_fn(width as u32, height as u32, |x, y| {
        let at = y as usize * width + x as usize;
        ::image::Rgb([0, 1, 2].map(|channel| byte(values[channel * plane + at])))
    }))
}

#[cfg(test)]
mod tests;
