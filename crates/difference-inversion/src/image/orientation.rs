//! The orientation of a picture, from any place in its file.
//!
//! As in Pillow's `ImageOps.exif_transpose`, EXIF's orientation counts, or XMP's if EXIF has none. EXIF is in a
//! segment or chunk of its own, in PNG anywhere in the file, or in the text `Raw profile type exif` that
//! ImageMagick writes.

use std::io::Read;
use std::ops::Range;

use ::image::ImageFormat;
use ::image::metadata::Orientation;

/// The tag of the orientation, in TIFF and in EXIF.
const ORIENTATION: u16 = 0x0112;
/// The tag of XMP in TIFF.
const XMP: u16 = 700;
/// The bytes before XMP in a JPEG.
const JPEG_XMP: &[u8] = b"http://ns.adobe.com/xap/1.0/\0";
/// The text chunks of PNG that are read.
const PNG_EXIF: &[u8] = b"Raw profile type exif";
const PNG_XMP: &[u8] = b"XML:com.adobe.xmp";
/// The largest size of metadata.
const MOST: usize = 1 << 24;

/// The metadata of a file.
#[derive(Debug, Default)]
struct Metadata {
    exif: Option<Vec<u8>>,
    xmp: Option<Vec<u8>>,
}

/// The orientation of a picture; none if its file states none, or an invalid one.
pub(super) fn orientation(bytes: &[u8], format: ImageFormat) -> Orientation {
    let metadata = match format {
        ImageFormat::Png => of_png(bytes),
        ImageFormat::Jpeg => of_jpeg(bytes),
        ImageFormat::WebP => of_webp(bytes),
        ImageFormat::Gif => of_gif(bytes),
        ImageFormat::Tiff => Metadata {
            exif: None,
            xmp: Directory::first(bytes).and_then(|directory| directory.bytes_of(XMP)),
        },
        _ => Metadata::default(),
    };
    let exif = match format {
        ImageFormat::Tiff => Some(bytes),
        _ => metadata.exif.as_deref(),
    };
    let of_exif = exif.and_then(of_exif);
    let number = of_exif.or_else(|| of_xmp(metadata.xmp.as_deref()?));
    let number = number.and_then(|number| u8::try_from(number).ok());
    number
        .and_then(Orientation::from_exif)
        .unwrap_or(Orientation::NoTransforms)
}

/// The orientation in EXIF, in any integer type.
fn of_exif(mut exif: &[u8]) -> Option<u64> {
    while let Some(rest) = exif.strip_prefix(b"Exif\0\0") {
        exif = rest;
    }
    Directory::first(exif)?.number_of(ORIENTATION)
}

/// The orientation in XMP: `tiff:Orientation="6"`, or `<tiff:Orientation>6</tiff:Orientation>`.
fn of_xmp(xmp: &[u8]) -> Option<u64> {
    const NAME: &[u8] = b"tiff:Orientation";
    let places = xmp.windows(NAME.len()).enumerate();
    let values = places
        .filter(|(_, window)| *window == NAME)
        .filter_map(|(at, _)| {
            let rest = &xmp[at + NAME.len()..];
            let rest = rest
                .strip_prefix(b"=\"")
                .or_else(|| rest.strip_prefix(b">"))?;
            rest.first().filter(|digit| digit.is_ascii_digit())
        });
    values.map(|digit| u64::from(digit - b'0')).next()
}

fn of_png(bytes: &[u8]) -> Metadata {
    let mut metadata = Metadata::default();
    let mut raw = None;
    let mut at = 8;
    while let Some(head) = bytes.get(at..at + 8) {
        let length = usize::try_from(number(&head[..4], true)).unwrap_or(usize::MAX);
        let Some(data) = (at + 8)
            .checked_add(length)
            .and_then(|end| bytes.get(at + 8..end))
        else {
            break;
        };
        match &head[4..] {
            b"eXIf" => metadata.exif = Some(data.to_vec()),
            kind @ (b"tEXt" | b"zTXt" | b"iTXt") => {
                let text = |key: &[u8]| {
                    let rest = data.strip_prefix(key)?.strip_prefix(b"\0")?;
                    text_of(kind, rest)
                };
                raw = text(PNG_EXIF)
                    .and_then(|text| of_hexadecimal(&text))
                    .or(raw);
                metadata.xmp = text(PNG_XMP).or(metadata.xmp);
            }
            b"IEND" => break,
            _ => {}
        }
        at += 12 + length;
    }
    metadata.exif = metadata.exif.or(raw);
    metadata
}

/// The text of a chunk, after its keyword.
fn text_of(kind: &[u8], rest: &[u8]) -> Option<Vec<u8>> {
    match kind {
        b"tEXt" => Some(rest.to_vec()),
        b"zTXt" => inflated(rest.get(1..)?),
        _ => {
            // Compression flag and method, language, and the keyword in that language.
            let (compressed, rest) = (rest.first()? == &1, rest.get(2..)?);
            let mut parts = rest.splitn(3, |byte| *byte == 0);
            let text = parts.nth(2)?;
            if compressed {
                inflated(text)
            } else {
                Some(text.to_vec())
            }
        }
    }
}

fn inflated(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut inflated = Vec::new();
    let read = flate2::read::ZlibDecoder::new(bytes)
        .take(MOST as u64)
        .read_to_end(&mut inflated);
    read.ok().map(|_| inflated)
}

/// Decodes the bytes that ImageMagick writes as text: a name, a length and hexadecimal digits, in lines.
fn of_hexadecimal(text: &[u8]) -> Option<Vec<u8>> {
    let mut lines = text.splitn(4, |byte| *byte == b'\n');
    let digits: Vec<u8> = (lines.nth(3)?.iter())
        .filter(|byte| !byte.is_ascii_whitespace())
        .map(|byte| char::from(*byte).to_digit(16))
        .map(|digit| digit.and_then(|digit| u8::try_from(digit).ok()))
        .collect::<Option<_>>()?;
    Some(
        digits
            .as_chunks::<2>()
            .0
            .iter()
            .map(|[high, low]| high << 4 | low)
            .collect(),
    )
}

fn of_jpeg(bytes: &[u8]) -> Metadata {
    let mut metadata = Metadata::default();
    let mut at = 2;
    while let Some(&[0xff, marker, high, low]) = bytes.get(at..at + 4) {
        if marker == 0xff {
            at += 1; // fill
            continue;
        }
        if marker == 0xda {
            break;
        }
        let length = usize::from(u16::from_be_bytes([high, low]));
        let data = bytes.get(at + 4..at + 2 + length).unwrap_or_default();
        if marker == 0xe1 {
            if let Some(exif) = data.strip_prefix(b"Exif\0\0") {
                metadata
                    .exif
                    .get_or_insert_default()
                    .extend_from_slice(exif);
            } else if let Some(xmp) = data.strip_prefix(JPEG_XMP) {
                metadata.xmp = Some(xmp.to_vec());
            }
        }
        at += 2 + length;
    }
    metadata
}

fn of_webp(bytes: &[u8]) -> Metadata {
    let mut metadata = Metadata::default();
    let mut at = 12;
    while let Some(head) = bytes.get(at..at + 8) {
        let length = usize::try_from(number(&head[4..], false)).unwrap_or(usize::MAX);
        let Some(data) = (at + 8)
            .checked_add(length)
            .and_then(|end| bytes.get(at + 8..end))
        else {
            break;
        };
        match &head[..4] {
            b"EXIF" => metadata.exif = Some(data.to_vec()),
            b"XMP " => metadata.xmp = Some(data.to_vec()),
            _ => {}
        }
        at += 8 + length + length % 2;
    }
    metadata
}

/// In GIF, XMP is an application extension, found by its name.
fn of_gif(bytes: &[u8]) -> Metadata {
    const NAME: &[u8] = b"\x21\xff\x0bXMP DataXMP";
    let at = bytes.windows(NAME.len()).position(|window| window == NAME);
    Metadata {
        xmp: at.map(|at| bytes[at..].iter().take(MOST).copied().collect()),
        exif: None,
    }
}

/// The first directory of a TIFF or BigTIFF, or of EXIF, which is a TIFF.
pub(super) struct Directory<'a> {
    bytes: &'a [u8],
    big_endian: bool,
    /// Whether it is a BigTIFF.
    big: bool,
    /// The offset of its entries.
    at: usize,
    entries: usize,
}

impl<'a> Directory<'a> {
    pub(super) fn first(bytes: &'a [u8]) -> Option<Self> {
        let big_endian = match bytes.get(..2)? {
            b"MM" => true,
            b"II" => false,
            _ => return None,
        };
        let read = |at: usize, length: usize| {
            Some(number(bytes.get(at..at.checked_add(length)?)?, big_endian))
        };
        let big = match read(2, 2)? {
            42 => false,
            43 => true,
            _ => return None,
        };
        let (place, width, count) = if big { (8, 8, 8) } else { (4, 4, 2) };
        let at = usize::try_from(read(place, width)?).ok()?;
        let entries = usize::try_from(read(at, count)?).ok()?;
        Some(Self {
            bytes,
            big_endian,
            big,
            at: at.checked_add(count)?,
            entries: entries.min(MOST),
        })
    }

    /// The type and the bytes of a tag's values.
    fn entry(&self, tag: u16) -> Option<(u64, &'a [u8])> {
        let (kind, place) = self.place(tag)?;
        Some((kind, &self.bytes[place]))
    }

    /// The type of a tag's values, and where they are.
    fn place(&self, tag: u16) -> Option<(u64, Range<usize>)> {
        let (size, width) = if self.big { (20, 8) } else { (12, 4) };
        let read = |bytes: &[u8]| number(bytes, self.big_endian);
        let mut entries = (0..self.entries).map_while(|entry| {
            let at = self.at.checked_add(entry * size)?;
            Some((at, self.bytes.get(at..at.checked_add(size)?)?))
        });
        let (place, entry) = entries.find(|(_, entry)| read(&entry[..2]) == u64::from(tag))?;
        let kind = read(&entry[2..4]);
        let count = usize::try_from(read(&entry[4..4 + width])).ok()?;
        let length = count.checked_mul(match kind {
            1 | 2 | 6 | 7 => 1,
            3 | 8 => 2,
            4 | 9 | 11 | 13 => 4,
            5 | 10 | 12 | 16 | 17 | 18 => 8,
            _ => return None,
        })?;
        let inside = place + 4 + width;
        let at = match length <= width {
            true => inside,
            false => usize::try_from(read(&entry[4 + width..])).ok()?,
        };
        let place = at..at.checked_add(length)?;
        self.bytes.get(place.clone())?;
        Some((kind, place))
    }

    /// The single integer of a tag; bytes do not count, as in Pillow.
    pub(super) fn number_of(&self, tag: u16) -> Option<u64> {
        let (kind, value) = self.entry(tag)?;
        let read = |bytes: &[u8]| number(bytes, self.big_endian);
        match (kind, value.len()) {
            (3 | 8, 2) | (4 | 9 | 13, 4) | (16..=18, 8) => Some(read(value)),
            (5 | 10, 8) => {
                let (numerator, denominator) = (read(&value[..4]), read(&value[4..]));
                let whole = denominator > 0 && numerator.is_multiple_of(denominator);
                whole.then(|| numerator.div_euclid(denominator))
            }
            _ => None,
        }
    }

    /// All integers of a tag.
    pub(super) fn numbers_of(&self, tag: u16) -> Vec<u64> {
        let Some((kind, value)) = self.entry(tag) else {
            return Vec::new();
        };
        let width = match kind {
            1 | 6 | 7 => 1,
            3 | 8 => 2,
            4 | 9 | 13 => 4,
            16..=18 => 8,
            _ => return Vec::new(),
        };
        value
            .chunks_exact(width)
            .map(|bytes| number(bytes, self.big_endian))
            .collect()
    }

    /// A copy of the file with the first value of a tag of shorts replaced, if it has one.
    pub(super) fn with_short(&self, tag: u16, value: u16) -> Option<Vec<u8>> {
        let (3, place) = self.place(tag)? else {
            return None;
        };
        let value = match self.big_endian {
            true => value.to_be_bytes(),
            false => value.to_le_bytes(),
        };
        let mut bytes = self.bytes.to_vec();
        bytes
            .get_mut(place.start..place.start + 2)?
            .copy_from_slice(&value);
        Some(bytes)
    }

    /// The bytes of a tag.
    pub(super) fn bytes_of(&self, tag: u16) -> Option<Vec<u8>> {
        self.entry(tag).map(|(_, value)| value.to_vec())
    }
}

/// An unsigned number of up to eight bytes.
fn number(bytes: &[u8], big_endian: bool) -> u64 {
    let join = |number: u64, byte: &u8| number << 8 | u64::from(*byte);
    match big_endian {
        true => bytes.iter().fold(0, join),
        false => bytes.iter().rev().fold(0, join),
    }
}
