//! Difference tokens D̃: learned from A and A′, appended to B's prompt.

use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device, Tensor};

use crate::diffusion::model_files::ModelFiles;
use crate::diffusion::text_encoder::{Base, EncoderBase};
use crate::diffusion::textual_inversion;
use crate::diffusion::words::signed;
use crate::util::arrays::{Array, Arrays};
use crate::util::digest::sha256;
use crate::util::tensors::host;
use crate::{Error, Result};

/// Version of the file format, in the metadata of every file.
const FORMAT_VERSION: &str = "1";
/// Keys of the embeddings in files for two text encoders (SDXL), as in other tools.
const PAIR_KEYS: [&str; 2] = ["clip_l", "clip_g"];
/// Key of the embedding in files for one text encoder, as in other tools.
const SINGLE_KEY: &str = "emb_params";

/// Difference tokens D̃, n rows in the token-embedding space of each text encoder.
#[derive(Debug, Clone)]
pub struct DifferenceTokens {
    /// One [n, d] per text encoder, f32.
    embeddings: Vec<Tensor<2>>,
    base: Base,
    /// Settings they were learned with, for the record.
    settings: serde_json::Value,
}

impl DifferenceTokens {
    /// Tokens with these embeddings, one [n, d] per text encoder of `base`.
    ///
    /// # Errors
    /// [`Error::WrongBase`] if the embeddings do not have the widths of the base.
    pub fn new(embeddings: Vec<Tensor<2>>, base: Base) -> Result<Self> {
        let widths: Vec<usize> = embeddings.iter().map(|e| e.dims()[1]).collect();
        let encoders = base.encoders.iter();
        let expected: Vec<usize> = encoders.map(|encoder| encoder.hidden_size).collect();
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
        let embeddings = (base.encoders.iter())
            .map(|encoder| Tensor::zeros([num_tokens, encoder.hidden_size], (device, DType::F32)))
            .collect();
        Self {
            embeddings,
            base: base.clone(),
            settings: serde_json::Value::Null,
        }
    }

    /// The vectors of a textual inversion as difference tokens for a model: appended to the prompt of B, they add
    /// what the word means. A word for several text encoders may have one file for each. Only the model's text encoders
    /// are opened.
    ///
    /// # Errors
    /// If a file of the model or of the word is invalid (the error names it), or if the word has no vectors for one of the
    /// text encoders.
    pub fn of_word(files: &[PathBuf], model: &ModelFiles, device: &Device) -> Result<Self> {
        if let Some(path) = files.iter().find(|path| Self::load(path, device).is_ok()) {
            let reason =
                "it is a difference already, for the model that it was learned on: use it as it is";
            return Err(Error::invalid_file(path, reason));
        }
        let (embeddings, base) = textual_inversion::vectors(files, model, device)?;
        Self::new(embeddings, base)
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

    /// The text encoders and denoiser of the tokens.
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

    /// SHA-256 of the embeddings, which identifies the difference.
    pub fn fingerprint(&self) -> String {
        let numbers = self
            .embeddings
            .iter()
            .flat_map(|embedding| host(embedding.clone()));
        sha256(numbers.flat_map(f32::to_le_bytes).collect::<Vec<u8>>())
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

    /// Checks that the tokens were learned on these text encoders, through this kind of denoiser.
    ///
    /// # Errors
    /// [`Error::WrongBase`] stating how they differ.
    pub fn check_base(&self, base: &Base) -> Result<()> {
        if &self.base == base {
            return Ok(());
        }
        if let Some(reason) = self.adapted_otherwise(base) {
            return Err(Error::WrongBase { reason });
        }
        let reason = format!(
            "the difference was learned on {}, this model is {base}",
            self.base
        );
        Err(Error::WrongBase { reason })
    }

    /// How the LoRAs that change the text encoders differ, if nothing else differs.
    fn adapted_otherwise(&self, base: &Base) -> Option<String> {
        let [ours, theirs] = [&self.base, base].map(|base| {
            let mut bare = base.clone();
            let adapters = bare
                .encoders
                .iter_mut()
                .map(|encoder| encoder.adapters.take());
            let mut names: Vec<String> = Vec::new();
            for name in adapters.flatten().flat_map(|adapters| adapters.names) {
                if !names.contains(&name) {
                    names.push(name);
                }
            }
            (bare, names.join(" and "))
        });
        if ours.0 != theirs.0 {
            return self.skipped_otherwise(base);
        }
        Some(match (ours.1.as_str(), theirs.1.as_str()) {
            (learned, "") => format!(
                "the difference was learned with the LoRA {learned}, which changes the text encoder: give it with \
                 `--lora`"
            ),
            ("", given) => format!(
                "the difference was learned without the LoRA {given}, which changes the text encoder: leave it out, or \
                 learn the difference with it"
            ),
            (learned, given) => format!(
                "the difference was learned with the LoRA {learned}, and the text encoder is changed by {given}: give \
                 the same files with the same weights"
            ),
        })
    }

    /// How the layers that are read differ, if nothing else differs.
    fn skipped_otherwise(&self, base: &Base) -> Option<String> {
        let skip = |base: &Base| base.encoders.iter().map(|encoder| encoder.clip_skip).max();
        let mut bare = self.base.clone();
        for (encoder, other) in bare.encoders.iter_mut().zip(&base.encoders) {
            encoder.clip_skip = other.clip_skip;
        }
        let learned = skip(&self.base)?;
        (bare == *base).then(|| {
            format!("the difference was learned with `--clip-skip {learned}`: give the same")
        })
    }

    /// Checks that the tokens were learned on this kind of denoiser, and that their widths match the text encoders for
    /// which a model learns tokens. Only the model's configurations need to be known.
    ///
    /// # Errors
    /// [`Error::WrongBase`] stating how they differ.
    pub fn check_widths(&self, denoiser: &str, widths: &[usize]) -> Result<()> {
        let encoders = self.base.encoders.iter();
        let ours: Vec<usize> = encoders.map(|encoder| encoder.hidden_size).collect();
        if ours == widths && self.base.denoiser == denoiser {
            return Ok(());
        }
        let reason = format!(
            "the difference was learned on a {} with token embeddings of width {ours:?}, this model is a {denoiser} with \
             {widths:?}",
            self.base.denoiser
        );
        Err(Error::WrongBase { reason })
    }

    /// Writes the tokens as a textual-inversion embedding that other tools read too: one tensor
    /// `emb_params` [n, d], or `clip_l` and `clip_g` if there are two text encoders. Base,
    /// settings and format version are in the metadata.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let base = serde_json::to_string(&self.base.encoders)
            .map_err(|error| Error::invalid_file(path, error.to_string()))?;
        let mut arrays = Arrays::default()
            .with_metadata("format", "difference-tokens")
            .with_metadata("format_version", FORMAT_VERSION)
            .with_metadata("base", base)
            .with_metadata("denoiser", &self.base.denoiser)
            .with_metadata("settings", self.settings.to_string());
        for (key, embedding) in keys(self.embeddings.len()).zip(&self.embeddings) {
            arrays = arrays.with(key, Array::from_tensor(embedding.clone()));
        }
        arrays.write(path)
    }

    /// Reads tokens written by [`save`](Self::save).
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::InvalidFile`] if it cannot be read, is not such a file or lacks an
    /// embedding, [`Error::WrongBase`] if it contradicts the base in its metadata.
    pub fn load(path: &Path, device: &Device) -> Result<Self> {
        let arrays = Arrays::read(path)?;
        let field = |key: &str| {
            arrays.metadata.get(key).ok_or_else(|| {
                let what = foreign(&arrays);
                let reason =
                    format!("not a file of difference tokens{what}: no `{key}` in its metadata");
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
        let encoders: Vec<EncoderBase> =
            serde_json::from_str(field("base")?).map_err(|e| json("base", e))?;
        let denoiser = arrays.metadata.get("denoiser").map(String::as_str);
        let base = Base {
            denoiser: denoiser.unwrap_or(Base::FIRST_DENOISER).to_owned(),
            encoders,
        };
        let settings = serde_json::from_str(field("settings")?).map_err(|e| json("settings", e))?;
        let embeddings = keys(base.encoders.len())
            .take(base.encoders.len())
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

/// Describes another program's file with few tensors.
fn foreign(arrays: &Arrays) -> &'static str {
    let keys = || arrays.arrays.keys();
    let is_of_lora = |key: &String| key.contains("lora_") || key.contains(".lora");
    let is_word = |key: &String| {
        key == SINGLE_KEY || PAIR_KEYS.contains(&key.as_str()) || key.starts_with('<')
    };
    if keys().any(is_of_lora) {
        ", but a LoRA"
    } else if keys().any(is_word) {
        ", but a textual inversion of another program, which stands for a word and not for a difference \
         (`dinv learn` makes a difference from two pictures, `dinv import` from a word)"
    } else {
        ""
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
        let encoders = widths.iter().map(|&hidden_size| EncoderBase {
            vocab_size: 7,
            hidden_size,
            table: "00".repeat(32),
            adapters: None,
            clip_skip: 0,
        });
        Base {
            denoiser: "network".to_owned(),
            encoders: encoders.collect(),
        }
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
        other.encoders[0].table = "11".repeat(32);
        let message = tokens().check_base(&other).unwrap_err().to_string();
        assert!(message.contains("7 × 3 (000000000000)"), "{message}");
        assert!(message.contains("7 × 3 (111111111111)"), "{message}");
        assert!(DifferenceTokens::new(tokens().embeddings, base(&[4])).is_err());
        // The same text encoders in another family.
        let other = Base {
            denoiser: "transformer".to_owned(),
            ..base(&[3])
        };
        let message = tokens().check_base(&other).unwrap_err().to_string();
        let expected = "learned on a network with text encoders of token embeddings 7 × 3";
        assert!(message.contains(expected), "{message}");
        assert!(message.contains("this model is a transformer"), "{message}");
    }

    #[test]
    fn a_file_that_names_no_denoiser_is_of_the_first_kind() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("difference.safetensors");
        tokens().save(&path).unwrap();
        let mut arrays = Arrays::read(&path).unwrap();
        assert_eq!(arrays.metadata.remove("denoiser").unwrap(), "network");
        arrays.write(&path).unwrap();
        let read = DifferenceTokens::load(&path, &Device::flex()).unwrap();
        assert_eq!(read.base().denoiser, Base::FIRST_DENOISER);
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
            message.contains("not a file of difference tokens, but a textual inversion"),
            "{message}"
        );
        for (name, expected) in [
            ("lora_unet_x.lora_up.weight", "but a LoRA"),
            ("<cat-toy>", "but a textual inversion"),
            ("w", "difference tokens: no `format_version`"),
        ] {
            let array = Array::floats([1, 3], vec![0.; 3]);
            let arrays = Arrays::default().with(name, array);
            arrays.write(&path).unwrap();
            let message = DifferenceTokens::load(&path, &Device::flex()).unwrap_err();
            assert!(message.to_string().contains(expected), "{message}");
        }
        std::fs::write(&path, b"PK\x03\x04").unwrap();
        let message = DifferenceTokens::load(&path, &Device::flex()).unwrap_err();
        assert!(message.to_string().contains("pickled"), "{message}");
    }
}
