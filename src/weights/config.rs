//! Reading `config.json` files.

use std::path::Path;

use serde::de::DeserializeOwned;

use crate::{Error, Result};

/// Reads a JSON configuration such as `unet/config.json`; fields that `T` does not know are
/// ignored.
///
/// # Errors
/// [`Error::Io`] if the file cannot be read, [`Error::Config`] naming the field if one is missing
/// or of the wrong type, [`Error::InvalidFile`] if it is not JSON.
pub fn read_config<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read(path).map_err(Error::io(path))?;
    parse_config(&text, path)
}

/// Parses a JSON configuration; `path` is named in errors.
///
/// # Errors
/// As [`read_config`], without the reading.
pub fn parse_config<T: DeserializeOwned>(json: &[u8], path: &Path) -> Result<T> {
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let field = error.path().to_string();
        let source = error.into_inner();
        if source.is_data() {
            Error::Config {
                path: path.to_owned(),
                field,
                reason: source.to_string(),
            }
        } else {
            Error::invalid_file(path, format!("not valid JSON: {source}"))
        }
    })?;
    deserializer
        .end()
        .map_err(|source| Error::invalid_file(path, format!("not valid JSON: {source}")))?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    struct Sample {
        block_out_channels: Vec<usize>,
    }

    fn parse(json: &str) -> Result<Sample> {
        parse_config(json.as_bytes(), Path::new("unet/config.json"))
    }

    #[test]
    fn unknown_fields_are_ignored() {
        let sample = parse(r#"{"block_out_channels": [4, 8], "_class_name": "X"}"#).unwrap();
        assert_eq!(sample.block_out_channels, [4, 8]);
    }

    #[test]
    fn wrong_type_names_file_and_field() {
        let message = parse(r#"{"block_out_channels": [4, "8"]}"#)
            .unwrap_err()
            .to_string();
        assert!(
            message.starts_with("unet/config.json: field `block_out_channels[1]`:"),
            "{message}"
        );
        assert!(message.contains("expected usize"), "{message}");
    }

    #[test]
    fn missing_field_is_named() {
        let message = parse("{}").unwrap_err().to_string();
        assert!(
            message.contains("missing field `block_out_channels`"),
            "{message}"
        );
    }

    #[test]
    fn not_json_is_an_error() {
        for json in ["", "{", "[", "{\"block_out_channels\": [1]} trailing"] {
            let message = parse(json).unwrap_err().to_string();
            assert!(message.contains("not valid JSON"), "{json}: {message}");
        }
    }
}
