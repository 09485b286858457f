//! Captions: by BLIP or BLIP-2 out of a folder, or by a model behind a server.

mod bert;
mod blip;
mod blip2;
mod blip2_vision;
pub mod decoding;
mod opt;
mod qformer;
mod reader;
mod served;
mod word_pieces;

use std::fmt::{self, Debug, Display};
use std::path::{Path, PathBuf};

use burn::tensor::{Device, FloatDType};
use serde::Deserialize;
use tokenizers::Tokenizer;

use crate::image::{ImagePreprocessor, RgbImage};
pub use crate::models::captioner::blip::Blip;
pub use crate::models::captioner::blip2::Blip2;
pub use crate::models::captioner::decoding::{EarlyStopping, GenerationConfig};
pub use crate::models::captioner::served::{ServedCaptioner, ServerAddress};
use crate::models::captioner::word_pieces::open_bert_tokenizer;
use crate::models::text::tokenizer::open_tokenizer_json;
pub use crate::util::caption_problem::CaptionProblem;
use crate::weights::read_config;
use crate::{Error, Result};

/// Describes pictures in words.
pub trait Describes: Debug + Send {
    /// A caption of a picture.
    ///
    /// # Errors
    /// If it cannot be made.
    fn caption(&self, picture: &RgbImage) -> Result<String>;

    /// Captions of a picture before and after an edit. A captioner that sees both at once can write
    /// captions that differ only in the edit.
    ///
    /// # Errors
    /// If they cannot be made.
    fn caption_pair(&self, before: &RgbImage, after: &RgbImage) -> Result<[String; 2]> {
        Ok([self.caption(before)?, self.caption(after)?])
    }
}

/// Where a captioner is.
#[derive(Debug, Clone, PartialEq)]
pub enum CaptionerPlace {
    /// In a folder, see [`Captioner::open`].
    Folder(PathBuf),
    /// Behind a server.
    Server(ServedCaptioner),
}

impl CaptionerPlace {
    /// The folder, if it is one.
    pub fn folder(&self) -> Option<&Path> {
        match self {
            Self::Folder(folder) => Some(folder),
            Self::Server(_) => None,
        }
    }

    /// Opens the captioner; a server is not asked yet.
    ///
    /// # Errors
    /// [`Error::Missing`] if there is no folder, and as [`Captioner::open`].
    pub fn open(&self, device: &Device, dtype: FloatDType) -> Result<Box<dyn Describes>> {
        match self {
            Self::Folder(folder) if folder.is_dir() => {
                Ok(Box::new(Captioner::open(folder, device, dtype)?))
            }
            Self::Folder(folder) => Err(Error::Missing {
                what: "a captioner".to_owned(),
                reason: format!(
                    "there is no folder {}; give captions, or the folder of a BLIP or BLIP-2 as \
                     transformers saves them",
                    folder.display()
                ),
            }),
            Self::Server(served) => Ok(Box::new(served.clone())),
        }
    }
}

impl Display for CaptionerPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(folder) => write!(f, "{}", folder.display()),
            Self::Server(served) => write!(f, "{}", served.address()),
        }
    }
}

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

impl Describes for Captioner {
    fn caption(&self, picture: &RgbImage) -> Result<String> {
        self.caption(picture, &GenerationConfig::default())
    }
}
