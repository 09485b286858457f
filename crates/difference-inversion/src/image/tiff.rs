//! TIFF, read as in Pillow's table of modes (`TiffImagePlugin.OPEN_INFO`), or refused with a reason.

use std::borrow::Cow;
use std::io::Cursor;

use ::image::{DynamicImage, RgbImage, RgbaImage};
use ::tiff::ColorType;
use ::tiff::decoder::{Decoder, DecodingResult, Limits};

use super::orientation::Directory;
use super::{MAX_DECODED, formats};

/// Numbers of tags, by their names in the TIFF 6.0 specification, in Adobe's supplements and in DNG's.
mod tag {
    pub(super) const NEW_SUBFILE_TYPE: u16 = 254;
    pub(super) const BITS_PER_SAMPLE: u16 = 258;
    pub(super) const PHOTOMETRIC: u16 = 262;
    pub(super) const FILL_ORDER: u16 = 266;
    pub(super) const SAMPLES_PER_PIXEL: u16 = 277;
    pub(super) const PREDICTOR: u16 = 317;
    pub(super) const COLOR_MAP: u16 = 320;
    pub(super) const SUB_IFDS: u16 = 330;
    pub(super) const EXTRA_SAMPLES: u16 = 338;
    pub(super) const SAMPLE_FORMAT: u16 = 339;
    pub(super) const ICC: u16 = 34_675;
    pub(super) const DNG_VERSION: u16 = 50_706;
}

/// Values of [`tag::PHOTOMETRIC`].
mod photometric {
    pub(super) const WHITE_IS_ZERO: u64 = 0;
    pub(super) const BLACK_IS_ZERO: u64 = 1;
    pub(super) const RGB: u64 = 2;
    pub(super) const PALETTE: u64 = 3;
    pub(super) const CMYK: u64 = 5;
    pub(super) const YCBCR: u64 = 6;
    pub(super) const CFA: u64 = 32_803;
    pub(super) const LINEAR_RAW: u64 = 34_892;
}

/// The value [`photometric::BLACK_IS_ZERO`] of the tag.
const GREYS: u16 = 1;
/// Corel Draw 10's value for straight alpha, and the standard one.
const COREL: u64 = 999;
const STRAIGHT: u16 = 2;

/// The meaning of an extra sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Alpha {
    /// There is no alpha, or the sample has no meaning.
    None,
    /// The colours are premultiplied by it.
    Associated,
    Straight,
}

/// A TIFF whose header has been read.
pub(super) struct Tiff<'a> {
    decoder: Decoder<Cursor<Cow<'a, [u8]>>>,
    /// Width and height.
    pub(super) size: (u32, u32),
    pub(super) icc: Option<Vec<u8>>,
    bits: u64,
    photometric: u64,
    alpha: Alpha,
    /// Red, green and blue of each index, in that order, with 16 bits.
    palette: Vec<u64>,
}

/// Whether these are the first bytes of a TIFF or a BigTIFF.
pub(super) fn is_tiff(bytes: &[u8]) -> bool {
    [b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"]
        .iter()
        .any(|magic| bytes.starts_with(*magic))
}

impl<'a> Tiff<'a> {
    /// Reads the header; the error names what is unsupported or invalid.
    pub(super) fn open(bytes: &'a [u8]) -> Result<Self, String> {
        let directory =
            Directory::first(bytes).ok_or("cannot be decoded: the directory is missing")?;
        let photometric = directory.number_of(tag::PHOTOMETRIC);
        let is_raw = bytes.get(4..11) == Some(b"\x10\0\0\0CR\x02")
            || directory.bytes_of(tag::DNG_VERSION).is_some()
            || photometric.is_some_and(|photometric| {
                [photometric::CFA, photometric::LINEAR_RAW].contains(&photometric)
            })
            || (directory
                .number_of(tag::NEW_SUBFILE_TYPE)
                .is_some_and(|kind| kind & 1 == 1)
                && directory.bytes_of(tag::SUB_IFDS).is_some());
        if is_raw {
            return Err(formats::raw());
        }
        let photometric = photometric.ok_or("cannot be decoded: the kind of colours is missing")?;
        let extra = directory.numbers_of(tag::EXTRA_SAMPLES);
        // The decoder reads palette indices as greys, and does not know Corel Draw's value for alpha.
        let as_known = match photometric {
            photometric::PALETTE => directory.with_short(tag::PHOTOMETRIC, GREYS),
            _ if extra.first() == Some(&COREL) => {
                directory.with_short(tag::EXTRA_SAMPLES, STRAIGHT)
            }
            _ => None,
        };
        let file = as_known.map_or(Cow::Borrowed(bytes), Cow::Owned);
        let mut limits = Limits::default();
        let most = usize::try_from(MAX_DECODED).unwrap_or(usize::MAX);
        limits.decoding_buffer_size = most;
        limits.intermediate_buffer_size = most;
        limits.ifd_value_size = bytes.len();
        let mut decoder = (Decoder::new(Cursor::new(file)).map_err(damaged)?).with_limits(limits);
        let size = decoder.dimensions().map_err(damaged)?;
        let bits = directory
            .numbers_of(tag::BITS_PER_SAMPLE)
            .first()
            .copied()
            .unwrap_or(1);
        let samples = directory.number_of(tag::SAMPLES_PER_PIXEL).unwrap_or(1);
        let this = Self {
            size,
            icc: directory.bytes_of(tag::ICC),
            bits,
            photometric,
            alpha: alpha(photometric, samples, &extra),
            palette: directory.numbers_of(tag::COLOR_MAP),
            decoder,
        };
        this.check(&directory, samples, &extra)?;
        Ok(this)
    }

    /// Refuses files that other readers interpret differently, or not at all.
    fn check(&self, directory: &Directory<'_>, samples: u64, extra: &[u64]) -> Result<(), String> {
        let refused = |what: String| {
            Err(format!(
                "a TIFF {what}, which is not read; save it with 8 bits a channel"
            ))
        };
        let formats = directory.numbers_of(tag::SAMPLE_FORMAT);
        let colours = samples.saturating_sub(extra.len() as u64);
        if formats.contains(&3) {
            return refused("of floating-point numbers without a known white level".to_owned());
        }
        if formats.iter().any(|format| ![1, 4].contains(format)) {
            return refused("of signed numbers".to_owned());
        }
        if directory
            .number_of(tag::FILL_ORDER)
            .is_some_and(|order| order != 1)
        {
            return refused("whose bits are in reversed order".to_owned());
        }
        let (bits, expected): (&[u64], _) = match self.photometric {
            photometric::WHITE_IS_ZERO | photometric::BLACK_IS_ZERO => (&[1, 2, 4, 8, 16], 1),
            photometric::RGB => (
                &[8, 16],
                if extra.is_empty() && samples == 4 {
                    4
                } else {
                    3
                },
            ),
            photometric::PALETTE => (&[1, 2, 4, 8], 1),
            photometric::CMYK => (&[8, 16], 4),
            photometric::YCBCR => (&[8], 3),
            other => return refused(format!("of colours of kind {other}")),
        };
        if !bits.contains(&self.bits) {
            return refused(format!("of {} bits a channel", self.bits));
        }
        let has_alpha = self.alpha != Alpha::None;
        let grey_or_rgb = self.photometric <= photometric::RGB;
        if colours != expected || (has_alpha && !grey_or_rgb) || (samples > 1 && self.bits < 8) {
            return refused(format!("of {samples} channels"));
        }
        // The decoder undoes the prediction wrongly for ignored samples.
        let predicted = directory
            .number_of(tag::PREDICTOR)
            .is_some_and(|predictor| predictor != 1);
        let grey = self.photometric <= photometric::BLACK_IS_ZERO;
        let left_out = !grey && samples > colours + u64::from(has_alpha);
        if predicted && (left_out || self.bits < 8) {
            return refused(
                "with a predictor, and with extra channels or fewer than 8 bits a channel"
                    .to_owned(),
            );
        }
        if self.photometric == photometric::PALETTE && self.palette.len() != 3 << self.bits {
            return Err("cannot be decoded: the palette is not as long as it should be".to_owned());
        }
        Ok(())
    }

    /// Bytes of the decoded samples.
    pub(super) fn decoded_bytes(&mut self) -> Result<u64, String> {
        let layout = self.decoder.image_buffer_layout().map_err(damaged)?;
        Ok(layout.complete_len as u64)
    }

    /// The pixels, with 8 or 16 bits per channel, and with transparency.
    pub(super) fn decode(mut self) -> Result<DynamicImage, String> {
        let (width, height) = self.size;
        let colour = self.decoder.colortype().map_err(damaged)?;
        let mut read = DecodingResult::U8(Vec::new());
        let layout = self
            .decoder
            .read_image_to_buffer(&mut read)
            .map_err(damaged)?;
        let pixels = usize::try_from(u64::from(width) * u64::from(height))
            .map_err(|error| error.to_string())?;
        let channels = usize::from(colour.num_samples());
        let samples: Vec<u16> = match read {
            DecodingResult::U16(samples) => samples,
            DecodingResult::U8(bytes) if self.bits == 8 => {
                bytes.into_iter().map(u16::from).collect()
            }
            DecodingResult::U8(bytes) => {
                let row = layout.row_stride.map_or(bytes.len(), |stride| stride.get());
                unpacked(&bytes, row, width, self.bits)
            }
            _ => {
                return Err(
                    "cannot be decoded: numbers of another type than the header says".to_owned(),
                );
            }
        };
        let samples = match layout.planes {
            0 | 1 => samples,
            planes => {
                let plane = pixels;
                if samples.len() < plane * planes {
                    return Err("cannot be decoded: a plane is missing".to_owned());
                }
                (0..pixels)
                    .flat_map(|pixel| (0..channels).map(move |channel| channel * plane + pixel))
                    .map(|at| samples[at])
                    .collect()
            }
        };
        if samples.len() != pixels * channels {
            return Err("cannot be decoded: fewer pixels than the header says".to_owned());
        }
        if self.bits == 16 && self.alpha == Alpha::Associated {
            // As in Pillow, which keeps the upper 8 bits.
            let samples: Vec<u16> = samples.into_iter().map(|value| value >> 8).collect();
            self.bits = 8;
            return self.coloured(colour, &samples);
        }
        self.coloured(colour, &samples)
    }

    /// Red, green, blue and, if meaningful, alpha, from interleaved samples.
    fn coloured(&self, colour: ColorType, samples: &[u16]) -> Result<DynamicImage, String> {
        let channels = usize::from(colour.num_samples());
        let most = u16::try_from((1_u32 << self.bits) - 1).unwrap_or(u16::MAX);
        let has_alpha = self.alpha != Alpha::None;
        let full = if self.bits == 16 {
            u16::MAX
        } else {
            u16::from(u8::MAX)
        };
        let scaled = |value: u16| scale(value, most, full);
        let pixel = |pixel: &[u16]| -> [u16; 4] {
            let (rgb, alpha_at) = match self.photometric {
                // The decoder has already inverted white-is-zero samples.
                photometric::WHITE_IS_ZERO | photometric::BLACK_IS_ZERO => {
                    ([scaled(pixel[0]); 3], 1)
                }
                photometric::PALETTE => {
                    let at = usize::from(pixel[0]);
                    let count = self.palette.len().div_euclid(3);
                    let colour = |channel: usize| {
                        let value = self
                            .palette
                            .get(channel * count + at)
                            .copied()
                            .unwrap_or_default();
                        u16::try_from(value >> 8).unwrap_or(u16::MAX)
                    };
                    ([colour(0), colour(1), colour(2)], 1)
                }
                photometric::CMYK => (
                    rgb_of_cmyk([pixel[0], pixel[1], pixel[2], pixel[3]], full),
                    4,
                ),
                photometric::YCBCR => (rgb_of_ycbcr([pixel[0], pixel[1], pixel[2]]), 3),
                _ => ([pixel[0], pixel[1], pixel[2]], 3),
            };
            match (self.alpha, pixel.get(alpha_at)) {
                (Alpha::Straight, Some(&alpha)) => [rgb[0], rgb[1], rgb[2], alpha],
                (Alpha::Associated, Some(&alpha)) => {
                    let [r, g, b] = rgb.map(|value| {
                        if alpha == 0 {
                            0
                        } else {
                            scale(value.min(alpha), alpha, full)
                        }
                    });
                    [r, g, b, alpha]
                }
                _ => [rgb[0], rgb[1], rgb[2], full],
            }
        };
        let (width, height) = self.size;
        let is_grey = self.photometric <= photometric::BLACK_IS_ZERO;
        let pixels = samples.chunks_exact(channels).map(pixel);
        let kept = if has_alpha { 4 } else { 3 };
        if self.bits == 16 {
            let values: Vec<u16> = pixels
                .flat_map(|pixel| pixel.into_iter().take(kept))
                .collect();
            let picture = match has_alpha {
                true => ::image::ImageBuffer::from_raw(width, height, values)
                    .map(DynamicImage::ImageRgba16),
                false => ::image::ImageBuffer::from_raw(width, height, values)
                    .map(DynamicImage::ImageRgb16),
            };
            let picture = picture.ok_or("cannot be decoded: too few pixels")?;
            return Ok(match (is_grey, has_alpha) {
                (true, true) => picture.into_luma_alpha16().into(),
                (true, false) => picture.into_luma16().into(),
                (false, _) => picture,
            });
        }
        let byte = |value: u16| u8::try_from(value).unwrap_or(u8::MAX);
        let values: Vec<u8> = pixels
            .flat_map(|pixel| pixel.map(byte).into_iter().take(kept))
            .collect();
        let picture = match has_alpha {
            true => RgbaImage::from_raw(width, height, values).map(DynamicImage::from),
            false => RgbImage::from_raw(width, height, values).map(DynamicImage::from),
        };
        let picture = picture.ok_or("cannot be decoded: too few pixels")?;
        Ok(match (is_grey, has_alpha) {
            (true, true) => picture.into_luma_alpha8().into(),
            (true, false) => picture.into_luma8().into(),
            (false, _) => picture,
        })
    }
}

fn damaged(error: ::tiff::TiffError) -> String {
    match error {
        ::tiff::TiffError::UnsupportedError(kind) => {
            formats::converted(&format!("TIFF of a kind that few programs write ({kind})"))
        }
        error => format!("cannot be decoded: {error}"),
    }
}

/// The meaning of the samples besides the colours: the first may be alpha. Some programs do not declare it.
fn alpha(photometric: u64, samples: u64, extra: &[u64]) -> Alpha {
    match extra.first() {
        Some(&1) => Alpha::Associated,
        Some(&(2 | COREL)) => Alpha::Straight,
        None if photometric == photometric::RGB && samples == 4 => Alpha::Straight,
        _ => Alpha::None,
    }
}

/// Rescales `value` from the range up to `most` to the range up to `full`, rounded.
fn scale(value: u16, most: u16, full: u16) -> u16 {
    let (value, most, full) = (u32::from(value), u32::from(most), u32::from(full));
    u16::try_from((value * full + most.div_euclid(2)).div_euclid(most)).unwrap_or(u16::MAX)
}

/// Unpacks samples of less than 8 bits; each row begins at a byte.
fn unpacked(bytes: &[u8], row: usize, width: u32, bits: u64) -> Vec<u16> {
    let bits = u32::try_from(bits).unwrap_or(8);
    let per_byte = 8_u32.div_euclid(bits);
    let samples = |row: &[u8]| -> Vec<u16> {
        (0..width)
            .map_while(|x| {
                let byte = *row.get(usize::try_from(x.div_euclid(per_byte)).ok()?)?;
                let shift = 8 - bits * (x % per_byte + 1);
                Some(u16::from(byte >> shift & (u8::MAX >> (8 - bits))))
            })
            .collect()
    };
    bytes.chunks(row.max(1)).flat_map(samples).collect()
}

/// Converts CMYK as Pillow does: black reduces what each ink leaves.
fn rgb_of_cmyk([c, m, y, k]: [u16; 4], full: u16) -> [u16; 3] {
    let (most, left) = (u64::from(full), u64::from(full - k));
    [c, m, y].map(|ink| {
        let taken = (u64::from(ink) * left + most.div_euclid(2)).div_euclid(most);
        u16::try_from(left.saturating_sub(taken)).unwrap_or(u16::MAX)
    })
}

/// Converts YCbCr as in JPEG, in full range.
fn rgb_of_ycbcr([y, cb, cr]: [u16; 3]) -> [u16; 3] {
    let [y, cb, cr] = [f32::from(y), f32::from(cb) - 128.0, f32::from(cr) - 128.0];
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the value is rounded and within 0 to 255"
    )]
    let byte = |value: f32| value.round().clamp(0.0, 255.0) as u16;
    [
        byte(y + 1.402 * cr),
        byte(y - 0.344_136 * cb - 0.714_136 * cr),
        byte(y + 1.772 * cb),
    ]
}
