//! Captions by BLIP or BLIP-2, depending on the folder's contents.

mod bert;
mod blip;
mod blip2;
mod blip2_vision;
pub mod decoding;
mod opt;
mod qformer;
mod reader;
mod word_pieces;

use std::path::{Path, PathBuf};

use burn::tensor::{Device, FloatDType};
use serde::Deserialize;
use tokenizers::Tokenizer;

use crate::image::{ImagePreprocessor, RgbImage};
pub use crate::models::captioner::blip::Blip;
pub use crate::models::captioner::blip2::Blip2;
pub use crate::models::captioner::decoding::{EarlyStopping, GenerationConfig};
use crate::models::captioner::word_pieces::open_bert_tokenizer;
use crate::models::text::tokenizer::open_tokenizer_json;
use crate::weights::read_config;
use crate::{Error, Result};

/// The supported captioning classes of transformers.
const CLASSES: [&str; 2] = [
    "BlipForConditionalGeneration",
    "Blip2ForConditionalGeneration",
];

/// The fields of `config.json` that name the model's class.
#[derive(Debug, Deserialize)]
struct ModelClass {
    model_type: Option<String>,
    #[serde(default)]
    architectures: Option<Vec<String>>,
}

impl ModelClass {
    /// The name of transformers' class; by default the one of [`CLASSES`] of this model type.
    fn name(self) -> String {
        let named = self
            .architectures
            .and_then(|names| names.into_iter().next());
        named.unwrap_or_else(|| match self.model_type.as_deref() {
            Some("blip") => CLASSES[0].to_owned(),
            Some("blip-2") | None => CLASSES[1].to_owned(),
            Some(other) => other.to_owned(),
        })
    }
}

/// The networks of a captioner.
#[derive(Clone, Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "there is one captioner at a time"
)]
enum Model {
    Blip(Blip),
    Blip2(Blip2),
}

/// BLIP or BLIP-2 with its tokenizer and preprocessing.
#[derive(Clone, Debug)]
pub struct Captioner {
    model: Model,
    tokenizer: Tokenizer,
    preprocessor: ImagePreprocessor,
    dir: PathBuf,
    device: Device,
}

impl Captioner {
    /// Opens a folder that holds a transformers `BlipForConditionalGeneration` or
    /// `Blip2ForConditionalGeneration`, its `tokenizer.json` (for BLIP, `vocab.txt` will do) and its
    /// `preprocessor_config.json`.
    ///
    /// # Errors
    /// [`Error::Config`] for any other class; when a file is missing or damaged; as [`Blip::open`]
    /// and [`Blip2::open`].
    pub fn open(dir: &Path, device: &Device, dtype: FloatDType) -> Result<Self> {
        let path = dir.join("config.json");
        let class = read_config::<ModelClass>(&path)?.name();
        let is_blip = class == CLASSES[0];
        if !CLASSES.contains(&class.as_str()) {
            let expected = CLASSES.join(" or ");
            return Err(Error::unsupported(&path, "architectures", &expected, class));
        }
        Ok(Self {
            tokenizer: match is_blip {
                true => open_bert_tokenizer(dir)?,
                false => open_tokenizer_json(&dir.join("tokenizer.json"))?,
            },
            preprocessor: ImagePreprocessor::open(dir)?,
            model: match is_blip {
                true => Model::Blip(Blip::open(dir, device, dtype)?),
                false => Model::Blip2(Blip2::open(dir, device, dtype)?),
            },
            dir: dir.to_owned(),
            device: device.clone(),
        })
    }

    /// Describes a picture; continues a prompt if there is one.
    ///
    /// # Errors
    /// As [`Blip::generate`] and [`Blip2::generate`].
    pub fn caption(&self, image: &RgbImage, config: &GenerationConfig) -> Result<String> {
        let tokenizer =
            |error: tokenizers::Error| Error::invalid_file(&self.dir, error.to_string());
        let prompt = config.prompt.as_deref().unwrap_or_default();
        let prompt = self
            .tokenizer
            .encode_fast(prompt, false)
            .map_err(tokenizer)?;
        let prompt = prompt.get_ids();
        let pixel_values = self.preprocessor.apply(image, &self.device);
        let tokens = match &self.model {
            Model::Blip(model) => model.generate(pixel_values, prompt, config)?,
            Model::Blip2(model) => model.generate(pixel_values, prompt, config)?,
        };
        let text = self.tokenizer.decode(&tokens, true).map_err(tokenizer)?;
        Ok(text.trim().to_owned())
    }
}
