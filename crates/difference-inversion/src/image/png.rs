//! PNG files that carry their settings.

use std::fs::File;
use std::io::{BufReader, Cursor};
use std::path::Path;

use ::image::{ImageFormat, RgbImage};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::util::files::write_atomically;
use crate::{Error, Result};

/// Writes `image` as an 8-bit RGB PNG with `text` as iTXt chunks (key, UTF-8 text), all at once.
///
/// The same picture and text give the same bytes.
///
/// # Errors
/// [`Error::InvalidFile`] for a key that is not 1 to 79 Latin-1 characters, [`Error::Io`] when the file
/// cannot be written.
pub fn save_png(path: &Path, image: &RgbImage, text: &[(&str, &str)]) -> Result<()> {
    let encode = || -> std::result::Result<Vec<u8>, ::png::EncodingError> {
        let mut bytes = Vec::new();
        let mut encoder = ::png::Encoder::new(&mut bytes, image.width(), image.height());
        encoder.set_color(::png::ColorType::Rgb);
        encoder.set_depth(::png::BitDepth::Eight);
        for (key, value) in text {
            encoder.add_itxt_chunk((*key).to_owned(), (*value).to_owned())?;
        }
        let mut writer = encoder.write_header()?;
        writer.write_image_data(image.as_raw())?;
        writer.finish()?;
        Ok(bytes)
    };
    let bytes = encode().map_err(|error| Error::invalid_file(path, error.to_string()))?;
    write_atomically(path, &bytes)
}

/// `image` as a data URL of a PNG, for other programs.
///
/// # Errors
/// [`Error::InvalidInput`] for a picture that PNG cannot hold.
pub fn data_url(image: &RgbImage) -> Result<String> {
    let mut png = Cursor::new(Vec::new());
    let written = image.write_to(&mut png, ImageFormat::Png);
    written.map_err(|error| Error::invalid_input(format!("a picture cannot be sent: {error}")))?;
    let data = STANDARD.encode(png.into_inner());
    Ok(format!("data:image/png;base64,{data}"))
}

/// The iTXt chunks (key, text) of a PNG file, in their order.
///
/// # Errors
/// When the file cannot be read or is not a PNG.
pub fn read_png_text(path: &Path) -> Result<Vec<(String, String)>> {
    let file = File::open(path).map_err(Error::io(path))?;
    let invalid = |reason: String| Error::invalid_file(path, reason);
    let mut reader = ::png::Decoder::new(BufReader::new(file))
        .read_info()
        .map_err(|error| invalid(error.to_string()))?;
    reader
        .finish()
        .map_err(|error| invalid(error.to_string()))?;
    reader
        .info()
        .utf8_text
        .iter()
        .map(|chunk| match chunk.get_text() {
            Ok(text) => Ok((chunk.keyword.clone(), text)),
            Err(error) => Err(invalid(error.to_string())),
        })
        .collect()
}
