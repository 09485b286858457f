//! The files of one diffusion model, in whatever layout: a diffusers folder, or one file in the
//! layout of the original code.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::{Device, FloatDType};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::Weights;
use super::config::{from_value, read_config};
use super::family::Family;
use super::file::TensorFile;
use super::folder::{has_variant, refuse_pickled};
use super::original::{MARKS, Networks, networks};
use crate::sample::PredictionType;
use crate::{Error, Result};

/// The file of a diffusers folder that says which pipeline it is.
pub const MODEL_INDEX: &str = "model_index.json";

/// How the files of a model are to be understood, as far as they do not tell it themselves.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct FileOptions {
    /// The family of a single file; by default it is recognised.
    pub family: Option<Family>,
    /// What the U-Net predicts; by default what the scheduler's configuration says, of a single
    /// file the family's.
    pub prediction_type: Option<PredictionType>,
    /// The variant of a folder's weights, such as `fp16`; by default see [`Weights::open`].
    pub variant: Option<String>,
    /// A folder with CLIP's vocabulary, for a single file, which has none.
    pub tokenizer: Option<PathBuf>,
    /// Height and width of the pictures; by default those the U-Net was trained on.
    pub resolution: Option<[u32; 2]>,
    /// A folder with another U-Net, in diffusers' layout, which takes the place of the model's own.
    /// Its input channels decide what it takes beside words: nothing more, a picture, or a picture
    /// and a mask.
    pub unet: Option<PathBuf>,
}

/// Where a text encoder's vocabulary is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vocabulary {
    /// The folder of `tokenizer.json`, or of `vocab.json` and `merges.txt`.
    pub folder: PathBuf,
    /// The token that prompts are filled up with, if not the one that the folder names.
    pub pad_token: Option<&'static str>,
}

/// The files of one diffusion model, of which configurations and headers were read so far. Its
/// networks are called what their folders are in diffusers: `unet`, `vae`, `text_encoder`,
/// `text_encoder_2`.
#[derive(Debug)]
pub struct ModelFiles {
    path: PathBuf,
    options: FileOptions,
    original: Option<Original>,
    notice: Option<String>,
}

/// A single file in the original layout.
#[derive(Debug)]
struct Original {
    file: Arc<TensorFile>,
    family: Family,
    networks: Networks,
}

impl ModelFiles {
    /// Opens a diffusers folder, or a single `.safetensors` file in the original layout, whose
    /// family is recognised by its keys and shapes unless `options` name it.
    ///
    /// Stable Diffusion 2 predicts velocity (768 pixels) or noise (512 pixels, base), which a file
    /// does not tell unless it holds a tensor `v_pred`: it is taken to predict velocity if the
    /// options say nothing else, which [`notice`](Self::notice) says.
    ///
    /// # Errors
    /// [`Error::Io`] if there is nothing at `path`; [`Error::InvalidFile`] if a single file is
    /// pickled, damaged, of no known family, or holds tensors that its family does not have;
    /// [`Error::Setting`] if it is of another family than the options say, or an option is not for
    /// this layout.
    pub fn open(path: &Path, options: &FileOptions) -> Result<Self> {
        std::fs::metadata(path).map_err(Error::io(path))?;
        let (mut original, mut notice) = (None, None);
        if path.is_dir() {
            refuse_for_folder(path, options)?;
            check_variant(path, options)?;
        } else {
            refuse_pickled(path)?;
            if let Some(variant) = &options.variant {
                return Err(Error::Setting {
                    name: "variant",
                    expected: "none, since the model is a single file".to_owned(),
                    found: variant.clone(),
                });
            }
            let opened = Original::open(path, options)?;
            notice = opened.notice(options);
            original = Some(opened);
        }
        Ok(Self {
            path: path.to_owned(),
            options: options.clone(),
            original,
            notice,
        })
    }

    /// The folder or file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Height and width of the pictures, if not those the U-Net was trained on.
    pub fn resolution(&self) -> Option<[u32; 2]> {
        self.options.resolution
    }

    /// Something to tell the user about how the files were understood.
    pub fn notice(&self) -> Option<&str> {
        self.notice.as_deref()
    }

    /// The family of a single file.
    pub fn family(&self) -> Option<&Family> {
        Some(&self.original.as_ref()?.family)
    }

    /// The folder of the U-Net that takes the place of the model's own, if one does.
    pub fn other_unet(&self) -> Option<&Path> {
        self.options.unet.as_deref()
    }

    /// The folder of a part that does not come with the model.
    fn replaced(&self, part: &str) -> Option<&Path> {
        self.other_unet().filter(|_| part == "unet")
    }

    /// Whether the model has this network.
    pub fn has(&self, network: &str) -> bool {
        match &self.original {
            _ if self.replaced(network).is_some() => true,
            Some(original) => original.networks.contains_key(network),
            None => self.path.join(network).is_dir(),
        }
    }

    /// The file that errors about a [`config`](Self::config) name.
    pub fn config_path(&self, network: &str) -> PathBuf {
        if let Some(folder) = self.replaced(network) {
            return folder.join("config.json");
        }
        match (&self.original, network) {
            (Some(_), _) => self.path.clone(),
            (None, MODEL_INDEX) => self.path.join(MODEL_INDEX),
            (None, "scheduler") => self.path.join("scheduler/scheduler_config.json"),
            (None, _) => self.path.join(network).join("config.json"),
        }
    }

    /// The configuration of a network, of the `scheduler`, or [`MODEL_INDEX`].
    ///
    /// # Errors
    /// [`Error::InvalidFile`] if the model has no such part; as [`read_config`].
    pub fn config<T: DeserializeOwned>(&self, part: &str) -> Result<T> {
        let path = self.config_path(part);
        let mut config: Value = match &self.original {
            _ if self.replaced(part).is_some() => read_config(&path)?,
            Some(original) => original.config(part)?,
            None if part == MODEL_INDEX && !path.is_file() => {
                return Err(self.no_folder(&format!("no {MODEL_INDEX}")));
            }
            None if part == MODEL_INDEX => read_config(&path)?,
            None => {
                self.folder(part)?;
                read_config(&path)?
            }
        };
        if let (true, Some(prediction_type)) = (part == "scheduler", self.options.prediction_type)
            && config.is_object()
        {
            config["prediction_type"] = json!(prediction_type);
        }
        from_value(config, &path)
    }

    /// The weights of a network, under diffusers' keys.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] if the model has no such network; as [`Weights::open`].
    pub fn weights(&self, network: &str, device: &Device, dtype: FloatDType) -> Result<Weights> {
        if let Some(folder) = self.replaced(network) {
            return Weights::open(folder, device, dtype);
        }
        let Some(original) = &self.original else {
            let variant = self.options.variant.as_deref();
            return Weights::open_variant(&self.folder(network)?, variant, device, dtype);
        };
        let Some(tensors) = original.networks.get(network) else {
            return Err(original.has_no(network));
        };
        let files = vec![Arc::clone(&original.file)];
        Ok(Weights::new(
            &self.path,
            files,
            tensors.clone(),
            device,
            dtype,
        ))
    }

    /// The vocabulary of a text encoder.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] if the model has no such text encoder; [`Error::Missing`] if a single
    /// file was given without a vocabulary.
    pub fn vocabulary(&self, text_encoder: &str) -> Result<Vocabulary> {
        let Some(original) = &self.original else {
            return Ok(Vocabulary {
                folder: self.folder(&text_encoder.replace("text_encoder", "tokenizer"))?,
                pad_token: None,
            });
        };
        let encoders = &original.family.text_encoders;
        let encoder = encoders
            .iter()
            .find(|encoder| encoder.network == text_encoder);
        let Some(encoder) = encoder else {
            return Err(original.has_no(text_encoder));
        };
        let Some(folder) = &self.options.tokenizer else {
            return Err(Error::NoVocabulary {
                path: self.path.clone(),
            });
        };
        Ok(Vocabulary {
            folder: folder.clone(),
            pad_token: encoder.pad_token,
        })
    }

    /// The folder of a part of a diffusers folder.
    fn folder(&self, name: &str) -> Result<PathBuf> {
        let folder = self.path.join(name);
        match folder.is_dir() {
            true => Ok(folder),
            false => Err(self.no_folder(&format!("no folder `{name}`"))),
        }
    }

    /// What is wrong with a folder that lacks something; it may hold a single file instead.
    fn no_folder(&self, lacks: &str) -> Error {
        let mut reason = format!("not a diffusers pipeline folder: {lacks} in it");
        let entries = std::fs::read_dir(&self.path)
            .into_iter()
            .flatten()
            .flatten();
        let single = entries
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|end| end == "safetensors"))
            .min();
        if let Some(single) = single {
            reason.push_str(&format!("; to open {}, name the file", single.display()));
        }
        Error::invalid_file(&self.path, reason)
    }
}

impl Original {
    fn open(path: &Path, options: &FileOptions) -> Result<Self> {
        let file = TensorFile::open(path)?;
        let marked = file.info(MARKS[0]).is_some();
        let predicts_noise = match options.prediction_type {
            Some(prediction_type) => prediction_type == PredictionType::Epsilon,
            None => false,
        };
        let family = match &options.family {
            Some(family) => family.clone(),
            None => Family::recognise(&file, predicts_noise && !marked)?,
        };
        let mut family = family.adapt_to(&file)?;
        if marked {
            family.scheduler["prediction_type"] = json!(PredictionType::VPrediction);
        }
        if file.info(MARKS[1]).is_some() {
            family.scheduler["rescale_betas_zero_snr"] = json!(true);
            family.scheduler["timestep_spacing"] = json!("trailing");
        }
        let networks = networks(&file, &family)?;
        Ok(Self {
            file: Arc::new(file),
            family,
            networks,
        })
    }

    fn notice(&self, options: &FileOptions) -> Option<String> {
        let is_open = options.family.is_none() && options.prediction_type.is_none();
        let is_marked = self.file.info(MARKS[0]).is_some();
        (self.family.name == "sd2" && is_open && !is_marked).then(|| {
            format!(
                "{} is taken to predict velocity, as Stable Diffusion 2 for 768 pixels does; the \
                 file does not tell: the base model for 512 pixels needs the family sd2-base",
                self.file.path().display()
            )
        })
    }

    fn config(&self, network: &str) -> Result<Value> {
        let family = &self.family;
        match network {
            MODEL_INDEX => Ok(json!({ "_class_name": family.class_name })),
            "unet" => Ok(family.unet.clone()),
            "vae" => Ok(family.vae.clone()),
            "scheduler" => Ok(family.scheduler.clone()),
            _ => {
                let mut encoders = family.text_encoders.iter();
                let encoder = encoders.find(|encoder| encoder.network == network);
                encoder
                    .map(|encoder| encoder.config.clone())
                    .ok_or_else(|| self.has_no(network))
            }
        }
    }

    fn has_no(&self, network: &str) -> Error {
        let reason = format!("{} has no `{network}`", self.family.title);
        Error::invalid_file(self.file.path(), reason)
    }
}

/// The networks of a pipeline, by their folders.
pub const NETWORKS: [&str; 4] = ["unet", "vae", "text_encoder", "text_encoder_2"];

/// Refuses a variant that none of the networks in a folder has.
fn check_variant(path: &Path, options: &FileOptions) -> Result<()> {
    let Some(variant) = &options.variant else {
        return Ok(());
    };
    let mut folders = NETWORKS.iter().map(|name| path.join(name));
    if folders.any(|folder| has_variant(&folder, variant)) {
        return Ok(());
    }
    Err(Error::Setting {
        name: "variant",
        expected: format!("one that a network in {} has", path.display()),
        found: variant.clone(),
    })
}

/// Refuses options that a folder answers itself.
fn refuse_for_folder(path: &Path, options: &FileOptions) -> Result<()> {
    let refuse = |name: &'static str, found: String| {
        Err(Error::Setting {
            name,
            expected: format!(
                "none, since {} is a folder, which has its own",
                path.display()
            ),
            found,
        })
    };
    if let Some(family) = &options.family {
        return refuse("family", family.name.to_owned());
    }
    match &options.tokenizer {
        Some(tokenizer) => refuse("tokenizer", tokenizer.display().to_string()),
        None => Ok(()),
    }
}
