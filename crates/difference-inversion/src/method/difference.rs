//! Difference tokens D̃: learned from A and A′, appended to B's prompt.

use std::path::Path;

use burn::tensor::{DType, Device, Tensor};

use crate::diffusion::text_encoder::{Base, EncoderBase};
use crate::diffusion::words::signed;
use crate::util::arrays::{Array, Arrays};
use crate::util::tensors::host;
use crate::{Error, Result};

/// Version of the file format, in the metadata of every file.
const FORMAT_VERSION: &str = "1";
/// Names of the embeddings in files for two text encoders (SDXL), as other tools know them.
const PAIR_KEYS: [&str; 2] = ["clip_l", "clip_g"];
/// Name of the embedding in files for one text encoder, as other tools know it.
const SINGLE_KEY: &str = "emb_params";

/// Difference tokens D̃, n rows in the token-embedding space of each text encoder.
#[derive(Debug, Clone)]
pub struct DifferenceTokens {
    /// One [n, d] per text encoder, f32.
    embeddings: Vec<Tensor<2>>,
    base: Base,
    /// Settings they were learned with, for people and for the record.
    settings: serde_json::Value,
}

impl DifferenceTokens {
    /// Tokens with these embeddings, one [n, d] per text encoder of `base`.
    ///
    /// # Errors
    /// [`Error::WrongBase`] if the embeddings do not have the widths of the base.
    pub fn new(embeddings: Vec<Tensor<2>>, base: Base) -> Result<Self> {
        let widths: Vec<usize> = embeddings.iter().map(|e| e.dims()[1]).collect();
        let expected: Vec<usize> = base.iter().map(|encoder| encoder.hidden_size).collect();
        if widths != expected || embeddings.iter().any(|e| e.dims()[0] == 0) {
            return Err(Error::WrongBase {
                reason: format!(
                    "expected token embeddings of width {expected:?}, found {widths:?}"
                ),
            });
        }
        let embeddings = embeddings
            .into_iter()
            .map(|embedding| embedding.cast(DType::F32))
            .collect();
        Ok(Self {
            embeddings,
            base,
            settings: serde_json::Value::Null,
        })
    }

    /// D̃ = 0: n tokens that add nothing yet.
    pub fn zeros(num_tokens: usize, base: &Base, device: &Device) -> Self {
        let embeddings = base
            .iter()
            .map(|encoder| Tensor::zeros([num_tokens, encoder.hidden_size], (device, DType::F32)))
            .collect();
        Self {
            embeddings,
            base: base.clone(),
            settings: serde_json::Value::Null,
        }
    }

    /// Records the settings the tokens were learned with.
    #[must_use]
    pub fn with_settings(mut self, settings: serde_json::Value) -> Self {
        self.settings = settings;
        self
    }

    /// The embeddings, one [n, d] per text encoder, f32.
    pub fn embeddings(&self) -> &[Tensor<2>] {
        &self.embeddings
    }

    /// Only the embeddings.
    pub fn into_embeddings(self) -> Vec<Tensor<2>> {
        self.embeddings
    }

    /// The text encoders the tokens belong to.
    pub fn base(&self) -> &Base {
        &self.base
    }

    /// The settings the tokens were learned with; null if unknown.
    pub fn settings(&self) -> &serde_json::Value {
        &self.settings
    }

    /// Number of tokens n.
    pub fn num_tokens(&self) -> usize {
        self.embeddings.first().map_or(0, |e| e.dims()[0])
    }

    /// −D̃, the difference from A′ to A.
    #[must_use]
    pub fn reversed(&self) -> Self {
        let mut reversed = self.clone();
        for embedding in &mut reversed.embeddings {
            *embedding = signed(embedding, -1.0);
        }
        reversed
    }

    /// Checks that the tokens were learned on these text encoders.
    ///
    /// # Errors
    /// [`Error::WrongBase`] saying how they differ.
    pub fn check_base(&self, base: &Base) -> Result<()> {
        if &self.base == base {
            return Ok(());
        }
        let describe = |base: &Base| {
            let parts: Vec<String> = base.iter().map(EncoderBase::to_string).collect();
            parts.join(" and ")
        };
        Err(Error::WrongBase {
            reason: format!(
                "the difference was learned on text encoders with token embeddings {}, this model \
                 has {}",
                describe(&self.base),
                describe(base)
            ),
        })
    }

    /// Writes the tokens as a textual-inversion embedding that other tools read too: one tensor
    /// `emb_params` [n, d], or `clip_l` and `clip_g` if there are two text encoders. Base,
    /// settings and format version are in the metadata.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let base = serde_json::to_string(&self.base)
            .map_err(|error| Error::invalid_file(path, error.to_string()))?;
        let mut arrays = Arrays::default()
            .with_metadata("format", "difference-tokens")
            .with_metadata("format_version", FORMAT_VERSION)
            .with_metadata("base", base)
            .with_metadata("settings", self.settings.to_string());
        for (key, embedding) in keys(self.embeddings.len()).zip(&self.embeddings) {
            arrays = arrays.with(key, Array::from_tensor(embedding.clone()));
        }
        arrays.write(path)
    }

    /// Reads tokens written by [`save`](Self::save).
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::InvalidFile`] if it cannot be read or is not such a file,
    /// [`Error::Tensor`] if an embedding is missing, [`Error::WrongBase`] if it contradicts the
    /// base in its metadata.
    pub fn load(path: &Path, device: &Device) -> Result<Self> {
        let arrays = Arrays::read(path)?;
        let field = |key: &str| {
            arrays.metadata.get(key).ok_or_else(|| {
                let reason = format!("not a file of difference tokens: no `{key}` in its metadata");
                Error::invalid_file(path, reason)
            })
        };
        let version = field("format_version")?;
        if version != FORMAT_VERSION {
            let reason = format!("expected format version {FORMAT_VERSION}, found {version}");
            return Err(Error::invalid_file(path, reason));
        }
        let json = |key: &str, error: serde_json::Error| {
            Error::invalid_file(path, format!("metadata `{key}`: {error}"))
        };
        let base: Base = serde_json::from_str(field("base")?).map_err(|e| json("base", e))?;
        let settings = serde_json::from_str(field("settings")?).map_err(|e| json("settings", e))?;
        let embeddings = keys(base.len())
            .take(base.len())
            .map(|key| {
                let embedding = arrays.tensor::<2>(&key, device)?;
                if host(embedding.clone())
                    .iter()
                    .all(|value| value.is_finite())
                {
                    return Ok(embedding);
                }
                Err(arrays.wrong(&key, "finite numbers", "NaN or infinity"))
            })
            .collect::<Result<_>>()?;
        Ok(Self::new(embeddings, base)?.with_settings(settings))
    }
}

/// Names of the embeddings in a file for `count` text encoders.
fn keys(count: usize) -> Box<dyn Iterator<Item = String>> {
    match count {
        1 => Box::new(std::iter::once(SINGLE_KEY.to_owned())),
        2 => Box::new(PAIR_KEYS.iter().map(|&key| key.to_owned())),
        _ => Box::new((0..count).map(|number| format!("{SINGLE_KEY}.{number}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base(widths: &[usize]) -> Base {
        widths
            .iter()
            .map(|&hidden_size| EncoderBase {
                vocab_size: 7,
                hidden_size,
                table: "00".repeat(32),
            })
            .collect()
    }

    fn tokens() -> DifferenceTokens {
        let embedding = Tensor::from_data([[1.0f32, -2.0, 0.5], [0.0, 4.0, 8.0]], &Device::flex());
        DifferenceTokens::new(vec![embedding], base(&[3])).unwrap()
    }

    #[test]
    fn the_sign_applies_to_every_embedding() {
        let reversed = host(tokens().reversed().embeddings()[0].clone());
        assert_eq!(reversed, [-1.0, 2.0, -0.5, 0.0, -4.0, -8.0]);
    }

    #[test]
    fn a_file_keeps_embeddings_base_and_settings() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("difference.safetensors");
        let settings = serde_json::json!({ "steps": 3 });
        tokens()
            .with_settings(settings.clone())
            .save(&path)
            .unwrap();
        let read = DifferenceTokens::load(&path, &Device::flex()).unwrap();
        assert_eq!(
            host(read.embeddings()[0].clone()),
            host(tokens().embeddings()[0].clone())
        );
        assert_eq!(read.settings(), &settings);
        assert!(read.check_base(&base(&[3])).is_ok());
        let keys: Vec<String> = Arrays::read(&path).unwrap().arrays.into_keys().collect();
        assert_eq!(keys, ["emb_params"]);
    }

    #[test]
    fn two_text_encoders_use_the_names_of_sdxl_embeddings() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("difference.safetensors");
        let tokens = DifferenceTokens::zeros(4, &base(&[3, 5]), &Device::flex());
        tokens.save(&path).unwrap();
        let arrays = Arrays::read(&path).unwrap().arrays;
        assert_eq!(arrays["clip_l"].shape(), [4, 3]);
        assert_eq!(arrays["clip_g"].shape(), [4, 5]);
        assert_eq!(
            DifferenceTokens::load(&path, &Device::flex())
                .unwrap()
                .num_tokens(),
            4
        );
    }

    #[test]
    fn another_base_is_refused() {
        let mut other = base(&[3]);
        other[0].table = "11".repeat(32);
        let message = tokens().check_base(&other).unwrap_err().to_string();
        assert!(message.contains("7 × 3 (000000000000)"), "{message}");
        assert!(message.contains("7 × 3 (111111111111)"), "{message}");
        assert!(DifferenceTokens::new(tokens().embeddings, base(&[4])).is_err());
    }

    #[test]
    fn an_f16_copy_of_a_table_is_the_same_base() {
        let table = Tensor::<2>::from_data([[0.1f32, 0.2], [0.3, 1e-5]], &Device::flex());
        let rounded = table.clone().cast(DType::F16).cast(DType::F32);
        assert_eq!(EncoderBase::new(table.clone()), EncoderBase::new(rounded));
        assert_ne!(
            EncoderBase::new(table.clone()),
            EncoderBase::new(table.mul_scalar(1.01))
        );
    }

    #[test]
    fn other_safetensors_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let arrays = Arrays::default().with(SINGLE_KEY, Array::floats([1, 3], vec![0.; 3]));
        arrays.write(&path).unwrap();
        let message = DifferenceTokens::load(&path, &Device::flex())
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("not a file of difference tokens"),
            "{message}"
        );
    }
}
