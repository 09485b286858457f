//! The files of one diffusion model, in any layout: a diffusers folder, or one file in the
//! layout of the original code.

pub mod embedding;
pub mod layout;
pub mod lora;
pub(crate) mod original;
mod said;
mod strays;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::{Device, FloatDType};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::diffusion::family::{self, EncoderPart, Family};
use crate::diffusion::model_files::embedding::EmbeddingFile;
use crate::diffusion::model_files::layout::Layout;
use crate::diffusion::model_files::lora::{LayerNames, Lora, LoraFile};
use crate::diffusion::model_files::original::transformer::denoiser;
use crate::diffusion::model_files::original::{Networks, autoencoder, networks};
use crate::diffusion::model_files::said::{Said, ZERO_SNR, title};
use crate::diffusion::model_files::strays::{cleaned, noted};
use crate::diffusion::sample::{PredictionType, TimestepSpacing};
use crate::models::denoiser::Memory;
use crate::models::text::tokenizer::Vocabulary;
use crate::models::text::tower::TowerKind;
use crate::models::vae::{AutoencoderConfig, AutoencoderTinyConfig};
use crate::util::error::abbreviate;
use crate::weights::file::TensorFile;
use crate::weights::folder::{has_variant, refuse_pickled};
use crate::weights::json::{from_value, read_config};
use crate::weights::{Changes, Weights};
use crate::{Error, Result};

pub use self::original::text_encoder::EncoderFile;
pub use self::original::transformer::OriginalLayers;

/// The file of a diffusers folder that names its pipeline.
pub const MODEL_INDEX: &str = "model_index.json";

/// The folder of a diffusers folder that describes how latents are noised.
pub const SCHEDULER: &str = "scheduler";

/// The tensors that show the number of latent channels, of an `AutoencoderKL` and of an `AutoencoderTiny`.
const LATENTS_IN: &str = "decoder.conv_in.weight";
const LATENTS_IN_TINY: &str = "decoder.layers.0.weight";

/// The inputs of a convolution, if there is one of this name.
fn channels_of(weights: &Weights, name: &str) -> Option<usize> {
    weights.shape(name)?.get(1).copied()
}

/// The folder of a text encoder's vocabulary in diffusers' layout.
pub fn tokenizer_of(text_encoder: &str) -> String {
    text_encoder.replace("text_encoder", "tokenizer")
}

/// How to read the files of a model: what they do not state themselves, what replaces or changes them, and whether
/// to save time or memory.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct FileOptions {
    /// The family of a single file; by default it is recognised.
    pub family: Option<Layout>,
    /// What the U-Net predicts. The default is stated by the scheduler's configuration; for a single file by its
    /// metadata, or else by its family. A tensor `v_pred` in a single file overrides this.
    pub prediction_type: Option<PredictionType>,
    /// Whether the noise schedule is rescaled so that it ends in pure noise, and visited from there
    /// (`rescale_betas_zero_snr`, trailing), regardless of the model.
    pub zero_snr: bool,
    /// Which timesteps are visited; by default those of the scheduler's configuration.
    pub timestep_spacing: Option<TimestepSpacing>,
    /// The variant of a folder's weights, such as `fp16`; by default see [`Weights::open`].
    pub variant: Option<String>,
    /// A folder with CLIP's vocabulary, for a single file, which has none.
    pub tokenizer: Option<PathBuf>,
    /// Height and width of the pictures; by default those that the U-Net was trained on.
    pub resolution: Option<[u32; 2]>,
    /// A folder in diffusers' layout with a denoiser that replaces the model's own. The input channels of a U-Net
    /// determine its inputs besides words: nothing, a picture, or a picture and a mask. Or a file with weights for
    /// the configuration of the model's own: safetensors or GGUF, a transformer's also in its original layout.
    pub unet: Option<PathBuf>,
    /// Leaves out T5 if the family works without it.
    pub without_t5: bool,
    /// Low-rank changes to the denoiser and the text encoders.
    pub loras: Vec<LoraFile>,
    /// Learned words for the text encoders.
    pub embeddings: Vec<EmbeddingFile>,
    /// An autoencoder with the same number of latent channels that replaces the model's own: a folder in diffusers'
    /// layout, or a file with weights for the model's own configuration, in diffusers' or the original layout.
    pub vae: Option<PathBuf>,
    /// An autoencoder that decodes previews, as for [`vae`](Self::vae): a distilled one is fast.
    pub preview_vae: Option<PathBuf>,
    /// Files with weights for the model's own text encoders, each recognised by its tensors.
    pub text_encoders: Vec<PathBuf>,
    /// How many layers earlier than usual CLIP's hidden states are read, counted as in diffusers (`clip_skip`).
    pub clip_skip: usize,
    /// The most tokens of a prompt that T5 or Qwen3 reads (`max_sequence_length` of diffusers' pipelines); by default
    /// the family's. All families but Chroma and Z-Image pad prompts to it, so that it changes their pictures.
    pub max_sequence_length: Option<usize>,
    /// Whether linear layers are held with 8 bits a number (ggml's Q8_0), on the CPU: those of the denoiser, T5 and
    /// Qwen3. Matrices that a file packs stay packed in any case.
    pub q8: bool,
    /// Whether to save time or memory. With [`Memory::Low`], the backward pass through the denoiser computes the
    /// inside of each layer once more, the autoencoder works in tiles, the captioner and the image towers of joint
    /// spaces are closed while a difference is learned or a picture is made, and T5, unless difference tokens are
    /// learned for it, is read from its file layer by layer for every prompt.
    pub memory: Memory,
}

/// The files of one diffusion model, of which only configurations and headers have been read. Its networks
/// are named after their folders in diffusers.
#[derive(Debug)]
pub struct ModelFiles {
    path: PathBuf,
    options: FileOptions,
    original: Option<Original>,
    loras: Vec<Lora>,
    text_encoders: Vec<(PathBuf, EncoderFile)>,
    notices: Vec<String>,
}

/// A single file in the original layout.
#[derive(Debug)]
struct Original {
    file: Arc<TensorFile>,
    layout: Layout,
    networks: Networks,
    notices: Vec<String>,
}

impl ModelFiles {
    /// Opens a diffusers folder, or a single `.safetensors` file in the original layout, whose
    /// family is recognised by its keys and shapes unless `options` name it.
    ///
    /// A tensor `v_pred` determines what a single file's U-Net predicts, else the options, else its metadata.
    /// Stable Diffusion 2 predicts velocity (768 pixels) or noise (512 pixels, base): if nothing states it,
    /// velocity is assumed. [`notices`](Self::notices) state the decision.
    ///
    /// # Errors
    /// [`Error::Io`] if there is nothing at `path`; [`Error::InvalidFile`] if a single file is
    /// pickled, damaged, of no known family, or has tensors that its family does not have;
    /// [`Error::Setting`] if it is of another family than the options state, or an option is not for
    /// this layout.
    pub fn open(path: &Path, options: &FileOptions) -> Result<Self> {
        std::fs::metadata(path).map_err(Error::io(path))?;
        let (mut original, mut notices) = (None, Vec::new());
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
            notices.clone_from(&opened.notices);
            original = Some(opened);
        }
        let loras = options.loras.iter().map(Lora::open);
        let loras = loras.collect::<Result<Vec<_>>>()?;
        notices.extend(loras.iter().filter_map(Lora::notice));
        let text_encoders = options.text_encoders.iter();
        let text_encoders =
            text_encoders.map(|path| Ok((path.clone(), EncoderFile::recognise(path)?)));
        let mut files = Self {
            text_encoders: text_encoders.collect::<Result<_>>()?,
            path: path.to_owned(),
            options: options.clone(),
            original,
            loras,
            notices,
        };
        files.note_strays();
        Ok(files)
    }

    /// Adds notes about tensors in the folders of networks that belong to no network. Errors in a folder are
    /// reported when it is read.
    fn note_strays(&mut self) {
        for network in family::networks() {
            let (folder, variant) = match (self.replaced(network), &self.original) {
                (Some(folder), _) => (folder, None),
                (None, Some(_)) => continue,
                (None, None) => (self.path.join(network), self.options.variant.as_deref()),
            };
            if folder.join("config.json").is_file()
                && let Ok(weights) =
                    Weights::open_variant(&folder, variant, &Device::flex(), FloatDType::F32)
            {
                self.notices.extend(noted(&weights));
            }
        }
    }

    /// The folder or file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Height and width of the pictures, if not those the U-Net was trained on.
    pub fn resolution(&self) -> Option<[u32; 2]> {
        self.options.resolution
    }

    /// Notes for the user about how the files were interpreted.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// Whether the timestep spacing is a guess: a single file gets the usual spacing of its family.
    pub(crate) fn spacing_is_guessed(&self) -> bool {
        let original = self.original.as_ref();
        let is_marked = |original: &Original| original.file.info(ZERO_SNR).is_some();
        let asked = self.options.timestep_spacing.is_some() || self.options.zero_snr;
        original.is_some_and(|original| !asked && !is_marked(original))
    }

    /// The layout of a single file.
    pub fn layout(&self) -> Option<&Layout> {
        Some(&self.original.as_ref()?.layout)
    }

    /// The folder or file of the denoiser that replaces the model's own, if any.
    pub fn other_denoiser(&self) -> Option<&Path> {
        self.options.unet.as_deref()
    }

    /// The folder or file of the autoencoder that replaces the model's own, if any.
    pub fn other_vae(&self) -> Option<&Path> {
        self.options.vae.as_deref()
    }

    /// The path of the replacement of a part of the model, if any.
    fn other(&self, part: &str) -> Option<&Path> {
        let is_vae = || family::all().any(|family| family.autoencoder.part == part);
        if is_denoiser(part) {
            return self.other_denoiser();
        }
        is_vae().then(|| self.other_vae())?
    }

    /// Whether a part of the model is replaced.
    pub(crate) fn is_replaced(&self, part: &str) -> bool {
        self.other(part).is_some()
    }

    /// The folder of a replaced part. A whole model's folder stands for its part.
    fn replaced(&self, part: &str) -> Option<PathBuf> {
        let path = self.other(part).filter(|path| !path.is_file())?;
        let within = path.join(part);
        Some(match within.join("config.json").is_file() {
            true => within,
            false => path.to_owned(),
        })
    }

    /// How many layers earlier than usual CLIP's hidden states are read.
    pub fn clip_skip(&self) -> usize {
        self.options.clip_skip
    }

    /// The most tokens of a prompt that T5 or Qwen3 reads, unless it is the family's.
    pub fn max_sequence_length(&self) -> Option<usize> {
        self.options.max_sequence_length
    }

    /// The files of learned words for the text encoders.
    pub fn embeddings(&self) -> &[EmbeddingFile] {
        &self.options.embeddings
    }

    /// Whether the model has this network.
    pub fn has(&self, network: &str) -> bool {
        match &self.original {
            _ if self.replaced(network).is_some() => true,
            Some(original) => original.networks.contains_key(network),
            None => self.path.join(network).is_dir(),
        }
    }

    /// Whether to save time or memory.
    pub fn memory(&self) -> Memory {
        self.options.memory
    }

    /// Whether T5 is left out.
    pub fn leaves_out_t5(&self) -> bool {
        self.options.without_t5
    }

    /// Whether [`MODEL_INDEX`] names this part, so that the model is incomplete without it.
    pub(crate) fn names(&self, network: &str) -> bool {
        let class = || {
            let index: Value = self.config(MODEL_INDEX).ok()?;
            Some(index.get(network)?.get(0)?.is_string())
        };
        class().unwrap_or(false)
    }

    /// The file named by errors about a [`config`](Self::config).
    pub fn config_path(&self, network: &str) -> PathBuf {
        if let Some(folder) = self.replaced(network) {
            return folder.join("config.json");
        }
        match (&self.original, network) {
            (Some(_), _) => self.path.clone(),
            (None, MODEL_INDEX) => self.path.join(MODEL_INDEX),
            (None, SCHEDULER) => self.path.join(SCHEDULER).join("scheduler_config.json"),
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
        if part == SCHEDULER && config.is_object() {
            self.adapt_scheduler(&mut config);
        }
        from_value(config, &path)
    }

    /// Adds to a scheduler's configuration what is stated elsewhere: by the options, and in a folder by
    /// `model_index.json`, whose class diffusers uses.
    fn adapt_scheduler(&self, config: &mut Value) {
        if self.original.is_none() {
            let index = self.path.join(MODEL_INDEX);
            let index: Value = read_config(&index).unwrap_or_default();
            if let Some(class) = index[SCHEDULER][1].as_str() {
                config["_class_name"] = json!(class);
            }
            if let Some(prediction_type) = self.options.prediction_type {
                config["prediction_type"] = json!(prediction_type);
            }
        }
        if self.options.zero_snr {
            rescale(config);
        }
        if let Some(spacing) = self.options.timestep_spacing {
            config["timestep_spacing"] = json!(spacing);
        }
    }

    /// A given setting of discrete noise schedules and its value, if there is one.
    pub(crate) fn setting_of_discrete_noise(&self) -> Option<(&'static str, String)> {
        let text = |value: Value| value.as_str().map_or(value.to_string(), str::to_owned);
        let FileOptions {
            prediction_type,
            timestep_spacing,
            zero_snr,
            ..
        } = &self.options;
        let settings = [
            ("prediction_type", prediction_type.map(|kind| json!(kind))),
            ("timestep_spacing", timestep_spacing.map(|kind| json!(kind))),
            ("zero_snr", zero_snr.then(|| json!(true))),
        ];
        let mut given = settings.into_iter();
        given.find_map(|(name, value)| Some((name, text(value?))))
    }

    /// The files of its LoRAs.
    pub fn loras(&self) -> impl Iterator<Item = &Path> {
        self.loras.iter().map(Lora::path)
    }

    /// Checks that the LoRAs change only layers of these networks.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] naming the first unknown layer, and the model that the file was made for.
    pub(crate) fn check_loras(&self, networks: &[&str], model: &str) -> Result<()> {
        if self.loras.is_empty() {
            return Ok(());
        }
        let names = networks.iter().map(|network| {
            let weights = self.own_weights(network, &Device::flex(), FloatDType::F32)?;
            Ok(LayerNames::of(network, &weights))
        });
        let names = names.collect::<Result<Vec<_>>>()?;
        self.loras
            .iter()
            .try_for_each(|lora| lora.check_known(&names, model))
    }

    /// The configuration of the autoencoder, of the class that `model_index.json` names. A file that replaces the
    /// model's own is of the configuration beside it, if there is one of an autoencoder; otherwise of the model's own,
    /// or a distilled one of the usual size.
    ///
    /// # Errors
    /// As [`config`](Self::config); as [`weights`](Self::weights) for such a file.
    pub(crate) fn autoencoder(&self, part: &str) -> Result<AutoencoderConfig> {
        if let Some(path) = self.other_vae().filter(|_| self.replaced(part).is_none()) {
            let beside = path.with_file_name("config.json");
            let config: Value = read_config(&beside).unwrap_or_default();
            let class = config["_class_name"].as_str().unwrap_or_default();
            if AutoencoderConfig::CLASSES.contains(&class) {
                return AutoencoderConfig::open(config, &beside);
            }
            let weights = self.own_weights(part, &Device::flex(), FloatDType::F32)?;
            if let Some(latent_channels) = channels_of(&weights, LATENTS_IN_TINY) {
                return Ok(AutoencoderConfig::Tiny(AutoencoderTinyConfig {
                    latent_channels,
                    ..AutoencoderTinyConfig::default()
                }));
            }
        }
        let mut config: Value = self.config(part)?;
        if self.original.is_none() && !self.is_replaced(part) {
            let index: Value = self.config(MODEL_INDEX)?;
            if let Some(class) = index[part][1].as_str() {
                config["_class_name"] = json!(class);
            }
        }
        AutoencoderConfig::open(config, &self.config_path(part))
    }

    /// Checks that the replacement of the model's autoencoder is one, with the same number of latent channels.
    ///
    /// # Errors
    /// [`Error::Setting`] if the number differs; [`Error::InvalidFile`] if it is not an autoencoder.
    pub(crate) fn check_vae(&self, part: &str) -> Result<()> {
        let (Some(path), Some(found)) = (self.other_vae(), self.other_latent_channels(part)?)
        else {
            return Ok(());
        };
        // A model without one of its own is checked by its denoiser.
        let own: Option<Value> = self.own_config(part).ok();
        let own = own.and_then(|own| AutoencoderConfig::open(own, path).ok());
        match own.map(|own| own.latent_channels()) {
            Some(expected) if expected != found => Err(Error::Setting {
                name: "vae",
                expected: format!(
                    "an autoencoder of {expected} latent channels, as the model's own"
                ),
                found: format!("{}, which has {found}", path.display()),
            }),
            _ => Ok(()),
        }
    }

    /// These files with the autoencoder of previews in place of the model's own, if there is one.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] if it is not an autoencoder.
    pub(crate) fn with_preview_vae(&self, part: &str) -> Result<Option<Self>> {
        let Some(path) = &self.options.preview_vae else {
            return Ok(None);
        };
        let options = FileOptions {
            vae: Some(path.clone()),
            preview_vae: None,
            loras: Vec::new(),
            ..self.options.clone()
        };
        let files = Self::open(&self.path, &options)?;
        files.other_latent_channels(part)?;
        Ok(Some(files))
    }

    /// The latent channels of the autoencoder that replaces the model's own, if there is one.
    fn other_latent_channels(&self, part: &str) -> Result<Option<usize>> {
        let Some(path) = self.other_vae() else {
            return Ok(None);
        };
        let class = |config: &Value| config["_class_name"].as_str().map(str::to_owned);
        if self.replaced(part).is_some()
            && let Some(class) = class(&self.config(part)?)
            && !AutoencoderConfig::CLASSES.contains(&class.as_str())
        {
            let path = self.config_path(part);
            let expected = AutoencoderConfig::CLASSES.join(" or ");
            return Err(Error::unsupported(&path, "_class_name", &expected, class));
        }
        let weights = self.own_weights(part, &Device::flex(), FloatDType::F32)?;
        let inputs = [LATENTS_IN, LATENTS_IN_TINY];
        let found = inputs.iter().find_map(|name| channels_of(&weights, name));
        let Some(found) = found else {
            let reason = format!(
                "not a whole autoencoder: there is no `{LATENTS_IN}` in it; TAESD's own files are halves of one, so take \
                 its folder in diffusers' layout, with an AutoencoderTiny"
            );
            return Err(Error::invalid_file(path, reason));
        };
        Ok(Some(found))
    }

    /// The configuration of a network that comes with the model.
    fn own_config<T: DeserializeOwned>(&self, part: &str) -> Result<T> {
        let path = self.path.join(part).join("config.json");
        match &self.original {
            Some(original) => from_value(original.config(part)?, &self.path),
            None => read_config(&path),
        }
    }

    /// The weights of a network, under diffusers' keys, with the changes of LoRAs.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] if the model has no such network, or a LoRA does not fit it; as [`Weights::open`].
    pub fn weights(&self, network: &str, device: &Device, dtype: FloatDType) -> Result<Weights> {
        let mut weights = self.own_weights(network, device, dtype)?;
        if self.options.q8 && self.may_be_in_8_bits(network)? {
            weights = weights.in_8_bits();
        }
        if self.loras.is_empty() {
            return Ok(weights);
        }
        let names = LayerNames::of(network, &weights);
        let mut changes = Changes::new();
        for lora in &self.loras {
            lora.add_changes(&names, &weights, &mut changes)?;
        }
        Ok(weights.changed(changes))
    }

    /// Whether a network is large and stays in memory. CLIP is small, and shares its weights with the joint space.
    fn may_be_in_8_bits(&self, network: &str) -> Result<bool> {
        let mut encoders = Family::of(self)?.text_encoders.iter();
        let large = |encoder: &EncoderPart| match encoder.kind {
            TowerKind::Clip => false,
            TowerKind::T5 => encoder.memory(self.memory()) == Memory::Normal, // else no layer is held
            TowerKind::Qwen3 => true,
        };
        Ok(is_denoiser(network) || encoders.any(|one| one.part == network && large(one)))
    }

    /// The same without LoRAs.
    fn own_weights(&self, network: &str, device: &Device, dtype: FloatDType) -> Result<Weights> {
        if let Some(path) = self.other(network) {
            let path = self.replaced(network).unwrap_or_else(|| path.to_owned());
            if !path.is_file() {
                return cleaned(Weights::open(&path, device, dtype)?);
            }
            return match is_denoiser(network) {
                true => cleaned(denoiser(&path, Family::of(self)?, device, dtype)?),
                false => autoencoder(&path, device, dtype),
            };
        }
        if let Some((path, file)) = self.text_encoder_file(network) {
            let config: Value = self.config(network)?;
            let classes = config["architectures"].as_array().into_iter().flatten();
            let mut classes = classes.filter_map(Value::as_str);
            let has_projection = classes.any(|class| class.ends_with("WithProjection"));
            return file.open(path, has_projection, device, dtype);
        }
        let Some(original) = &self.original else {
            let variant = self.options.variant.as_deref();
            return cleaned(Weights::open_variant(
                &self.folder(network)?,
                variant,
                device,
                dtype,
            )?);
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

    /// The file with weights for a text encoder: the first of its architecture and width.
    fn text_encoder_file(&self, network: &str) -> Option<(&Path, EncoderFile)> {
        if self.text_encoders.is_empty() {
            return None;
        }
        let mut parts = Family::of(self).ok()?.text_encoders.iter();
        let part = parts.find(|part| part.part == network)?;
        let config: Value = self.config(network).ok()?;
        let widths = [&config["hidden_size"], &config["d_model"]];
        let width = widths.into_iter().find_map(Value::as_u64)?;
        let fits = |(_, file): &&(PathBuf, EncoderFile)| {
            file.kind == part.kind && file.width as u64 == width
        };
        let (path, file) = self.text_encoders.iter().find(fits)?;
        Some((path, *file))
    }

    /// Checks that every file of a text encoder is for one of these.
    ///
    /// # Errors
    /// [`Error::Setting`] naming the first that is not.
    pub(crate) fn check_text_encoders(&self, parts: &[&str]) -> Result<()> {
        let used: Vec<&Path> = (parts.iter())
            .filter_map(|part| Some(self.text_encoder_file(part)?.0))
            .collect();
        let mut files = self.text_encoders.iter().enumerate();
        let is_unused = |(place, (path, _)): &(usize, &(PathBuf, EncoderFile))| {
            let again = self.text_encoders[..*place]
                .iter()
                .any(|(other, _)| other == path);
            again || !used.contains(&path.as_path())
        };
        let Some((_, (path, file))) = files.find(is_unused) else {
            return Ok(());
        };
        Err(Error::Setting {
            name: "text_encoder",
            expected: format!(
                "one file for each text encoder of the model, {}, of its architecture and width",
                parts.join(", ")
            ),
            found: format!("{}, {} of width {}", path.display(), file.kind, file.width),
        })
    }

    /// Checks that a folder that takes the place of the model's denoiser has one of the same class.
    pub(crate) fn check_denoiser(&self, part: &str) -> Result<()> {
        let Some(folder) = self.replaced(part) else {
            return Ok(());
        };
        let class = |config: Value| config["_class_name"].as_str().map(str::to_owned);
        let found = class(self.config(part)?);
        // A model whose own is absent is checked with its configuration.
        let own = self.own_config(part).ok().and_then(class);
        match own.zip(found) {
            Some((own, found)) if own != found => Err(Error::Setting {
                name: "unet",
                expected: format!("the class {own}, as the model's own"),
                found: format!("{}, of class {found}", folder.display()),
            }),
            _ => Ok(()),
        }
    }

    /// The vocabulary of a text encoder.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] if the model has no such text encoder; [`Error::Missing`] if a single
    /// file was given without a vocabulary.
    pub fn vocabulary(&self, text_encoder: &str) -> Result<Vocabulary> {
        let Some(original) = &self.original else {
            return Ok(Vocabulary {
                folder: self.folder(&tokenizer_of(text_encoder))?,
                pad_token: None,
            });
        };
        let encoders = &original.layout.text_encoders;
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

    /// The error for a folder that lacks something; it may hold a single file instead.
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
        let above = self.path.canonicalize().ok();
        let above = above.as_deref().and_then(Path::parent);
        let pipeline = above.filter(|folder| folder.join(MODEL_INDEX).is_file());
        let is_network = self.path.join("config.json").is_file();
        match (pipeline, single) {
            (Some(pipeline), _) => {
                let pipeline = pipeline.display();
                reason = format!("one part of the model in {pipeline}: name that folder");
            }
            (None, Some(_)) if is_network => {
                reason = "one network, not a whole model: name the folder of a model with its \
                          model_index.json, and this one with `--unet` if it is a U-Net"
                    .to_owned();
            }
            (None, Some(single)) => {
                reason.push_str(&format!("; to open {}, name the file", single.display()));
            }
            (None, None) => {}
        }
        Error::invalid_file(&self.path, reason)
    }
}

/// Checks that a file can replace the denoiser of a family, as far as its header says: before anything is downloaded.
///
/// # Errors
/// [`Error::Io`] and [`Error::InvalidFile`] if it cannot be read, or is the transformer of another family.
pub fn check_denoiser_file(path: &Path, family: Option<&'static Family>) -> Result<()> {
    refuse_pickled(path)?;
    let names = TensorFile::open(path)?.names();
    match (family::of_original(&names), family) {
        (Some(found), Some(family)) if found != family => Err(not_of(path, found, family)),
        _ => Ok(()),
    }
}

/// The transformer of another family.
fn not_of(path: &Path, found: &Family, expected: &Family) -> Error {
    let reason = format!(
        "the transformer of a {}, where that of a {} is expected",
        found.class, expected.class
    );
    Error::invalid_file(path, reason)
}

/// Whether some family has its denoiser in this folder.
fn is_denoiser(part: &str) -> bool {
    family::all().any(|family| family.denoiser.part == part)
}

/// A noise schedule that ends in pure noise, and is visited from there.
fn rescale(scheduler: &mut Value) {
    scheduler["rescale_betas_zero_snr"] = json!(true);
    scheduler["timestep_spacing"] = json!(TimestepSpacing::Trailing);
}

impl Original {
    fn open(path: &Path, options: &FileOptions) -> Result<Self> {
        let file = TensorFile::open(path)?;
        let said = Said::by(&file);
        let asked = options.prediction_type;
        let told = match said.by_tensor {
            true => Some((PredictionType::VPrediction, "tensor `v_pred`")),
            false => match asked {
                Some(_) => None,
                None => said.by_metadata,
            },
        };
        let prediction = told.map(|(prediction, _)| prediction).or(asked);
        let predicts_noise = prediction == Some(PredictionType::Epsilon);
        let layout = match &options.family {
            Some(layout) => layout.clone(),
            None => Layout::recognise(&file, predicts_noise)?,
        };
        // Two families differ only in the prediction type, so naming one of them states it.
        let is_named = options.family.is_some() && layout.has_twin();
        let mut layout = layout.adapt_to(&file)?;
        let usual = layout.scheduler["prediction_type"].clone();
        match (told, asked) {
            (Some((prediction, _)), _) if said.by_tensor || !is_named => {
                layout.scheduler["prediction_type"] = json!(prediction);
            }
            (_, Some(asked)) => layout.scheduler["prediction_type"] = json!(asked),
            _ => {}
        }
        if file.info(ZERO_SNR).is_some() || said.zero_snr {
            rescale(&mut layout.scheduler);
        }
        let found = &layout.scheduler["prediction_type"];
        let mut notices = Vec::new();
        let name = file.path().display().to_string();
        let predicts = |by: &str| format!("{name} predicts {}, as its {by} says", title(found));
        match (told, asked) {
            (Some((prediction, by)), Some(asked)) if asked != prediction => {
                let asked = title(&json!(asked));
                notices.push(format!("{}; the request for {asked} is ignored", predicts(by)));
            }
            (Some((_, by)), _) if *found != usual || layout.has_twin() => notices.push(predicts(by)),
            (None, None) if layout.name == "sd2" && options.family.is_none() => notices.push(format!(
                "{name} is taken to predict velocity, as Stable Diffusion 2 for 768 pixels does; the \
                 file does not say which: the base model for 512 pixels needs the family sd2-base"
            )),
            _ => {}
        }
        let (networks, strays) = networks(&file, &layout)?;
        if !strays.is_empty() {
            let (count, names) = (strays.len(), abbreviate(&strays));
            notices.push(format!(
                "{name}: {count} tensors belong to no network of a {} and are left out: {names}",
                layout.title
            ));
        }
        Ok(Self {
            file: Arc::new(file),
            layout,
            networks,
            notices,
        })
    }

    fn config(&self, network: &str) -> Result<Value> {
        let layout = &self.layout;
        let family = layout.family;
        if network == MODEL_INDEX {
            return Ok(json!({ "_class_name": family.class }));
        }
        let encoders = (layout.text_encoders.iter()).map(|one| (one.network, &one.config));
        let mut configs = [
            (family.denoiser.part, &layout.denoiser),
            (family.autoencoder.part, &layout.vae),
            (SCHEDULER, &layout.scheduler),
        ]
        .into_iter()
        .chain(encoders);
        let config = configs.find(|(name, _)| *name == network);
        config
            .map(|(_, config)| config.clone())
            .ok_or_else(|| self.has_no(network))
    }

    fn has_no(&self, network: &str) -> Error {
        let reason = format!("{} has no `{network}`", self.layout.title);
        Error::invalid_file(self.file.path(), reason)
    }
}

/// Refuses a variant that none of the networks in a folder has.
fn check_variant(path: &Path, options: &FileOptions) -> Result<()> {
    let Some(variant) = &options.variant else {
        return Ok(());
    };
    let folders = family::networks();
    let mut folders = folders.iter().map(|name| path.join(name));
    if folders.any(|folder| has_variant(&folder, variant)) {
        return Ok(());
    }
    Err(Error::Setting {
        name: "variant",
        expected: format!("one that a network in {} has", path.display()),
        found: variant.clone(),
    })
}

/// Refuses options that a folder determines itself.
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
