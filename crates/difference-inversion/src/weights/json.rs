//! Reading `config.json` files.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::Value;

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
    // Windows editors put a byte order mark before the text.
    let json = without_infinities(json.strip_prefix(b"\xef\xbb\xbf").unwrap_or(json));
    let mut deserializer = serde_json::Deserializer::from_slice(&json);
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

/// A configuration from parsed JSON; `path` is named in errors.
///
/// # Errors
/// [`Error::Config`] naming the field if one is missing or of the wrong type.
pub fn from_value<T: DeserializeOwned>(config: Value, path: &Path) -> Result<T> {
    serde_path_to_error::deserialize(config).map_err(|error| Error::Config {
        path: path.to_owned(),
        field: error.path().to_string(),
        reason: error.into_inner().to_string(),
    })
}

/// Replaces the words `Infinity`, `-Infinity` and `NaN` outside strings by null: Python writes
/// them although they are not JSON.
fn without_infinities(json: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(json.len());
    let mut rest = json;
    let mut in_string = false;
    while let Some((&byte, tail)) = rest.split_first() {
        let word = [b"-Infinity".as_slice(), b"Infinity", b"NaN"]
            .into_iter()
            .find(|word| !in_string && rest.starts_with(word));
        if let Some(word) = word {
            out.extend_from_slice(b"null");
            rest = &rest[word.len()..];
        } else if in_string && byte == b'\\' {
            let (escape, tail) = rest.split_at(rest.len().min(2));
            out.extend_from_slice(escape);
            rest = tail;
        } else {
            in_string ^= byte == b'"';
            out.push(byte);
            rest = tail;
        }
    }
    out
}

/// A setting that a config gives either once for all blocks or once per block.
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
#[serde(
    untagged,
    expecting = "expected one value, or a list with one value per block"
)]
pub enum PerBlock<T> {
    /// The same for every block.
    Same(T),
    /// One for each block.
    Each(Vec<T>),
}

impl<T: Clone> PerBlock<T> {
    /// The values for `blocks` blocks, or `None` if the list has another length.
    pub fn expand(&self, blocks: usize) -> Option<Vec<T>> {
        match self {
            Self::Same(value) => Some(vec![value.clone(); blocks]),
            Self::Each(values) => (values.len() == blocks).then(|| values.clone()),
        }
    }
}

/// The fields of a config that its struct does not name.
pub type OtherFields = serde_json::Map<String, Value>;

/// Checks the known fields of which only a single value, given as JSON, is supported: an unsupported
/// architecture must be an error, not a wrong result.
/// A field that is absent or null has the default, which is the supported value.
///
/// # Errors
/// [`Error::UnsupportedField`] naming the file, the field, and both values.
pub fn check_fixed_fields(fields: &OtherFields, fixed: &[(&str, &str)], path: &Path) -> Result<()> {
    for (name, supported) in fixed {
        let found = fields.get(*name).unwrap_or(&Value::Null);
        let same_number = found.as_f64().is_some_and(|x| supported.parse() == Ok(x));
        if !found.is_null() && found.to_string().as_str() != *supported && !same_number {
            return Err(Error::UnsupportedField {
                path: path.to_owned(),
                field: (*name).to_owned(),
                found: shortened(found.to_string()),
                supported: (*supported).to_owned(),
            });
        }
    }
    Ok(())
}

/// The beginning of a long value.
fn shortened(value: String) -> String {
    const SHOWN: usize = 80;
    match value.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &value[..end]),
        None => value,
    }
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

    #[test]
    fn only_the_supported_value_of_a_fixed_field_passes() {
        let check = |json: &str| {
            let fields = serde_json::from_str(json).unwrap();
            let fixed = [
                ("class_embed_type", "null"),
                ("scale", "1.0"),
                ("norm", "\"default\""),
            ];
            check_fixed_fields(&fields, &fixed, Path::new("config.json"))
        };
        for json in [
            "{}",
            r#"{"scale": 1, "class_embed_type": null, "norm": "default"}"#,
        ] {
            assert!(check(json).is_ok(), "{json}");
        }
        let message = check(r#"{"class_embed_type": "timestep"}"#)
            .unwrap_err()
            .to_string();
        let field = "config.json: field `class_embed_type`: ";
        assert_eq!(
            message,
            format!("{field}\"timestep\" is not supported, only null")
        );
        assert!(check(r#"{"scale": 2}"#).is_err());
    }

    #[test]
    fn per_block_settings_are_one_value_or_a_list() {
        let parse = |json: &str| parse_config::<PerBlock<usize>>(json.as_bytes(), Path::new("c"));
        assert_eq!(parse("3").unwrap().expand(2), Some(vec![3, 3]));
        assert_eq!(parse("[3, 4]").unwrap().expand(2), Some(vec![3, 4]));
        assert_eq!(parse("[3, 4]").unwrap().expand(3), None);
        assert!(
            parse("[[1], 2]")
                .unwrap_err()
                .to_string()
                .contains("one value per block")
        );
    }

    #[test]
    fn numbers_that_are_not_json_are_null() {
        let text = br#"{"a": -Infinity, "b": [NaN, Infinity], "c\"": "NaN \" -Infinity"}"#;
        let expected = br#"{"a": null, "b": [null, null], "c\"": "NaN \" -Infinity"}"#;
        assert_eq!(without_infinities(text), expected);
    }
}
