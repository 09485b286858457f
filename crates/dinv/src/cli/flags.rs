//! The flags that several subcommands share. Every field is a setting of the same name in a `--config` file; `None`
//! means not given.

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::str::FromStr;
use std::time::Duration;

use anyhow::Context;
use burn::tensor::{Device, FloatDType};
use clap::Args;
use clap::builder::PossibleValuesParser;
use difference_inversion::diffusion::family::{self, Family};
use difference_inversion::diffusion::frozen::{ModelPaths, Models};
use difference_inversion::diffusion::model_files::embedding::EmbeddingFile;
use difference_inversion::diffusion::model_files::layout::Layout;
use difference_inversion::diffusion::model_files::lora::LoraFile;
use difference_inversion::diffusion::model_files::{
    EncoderFile, FileOptions, ModelFiles, check_denoiser_file,
};
use difference_inversion::diffusion::sample::{PredictionType, TimestepSpacing};
use difference_inversion::image::RgbImage;
use difference_inversion::job::PairFiles;
use difference_inversion::method::analogy::Example;
use difference_inversion::models::captioner::ServerAddress;
use difference_inversion::models::text::tower::TowerKind;
use difference_inversion::{Error, about};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Value, json};

use super::device::{self, DEVICES, Place};
use super::fitting::Measured;
use super::locate::{self, DEMO};
use super::opened::Source;
use super::record::file_name;
use super::settings::{ErasedFlags, RECOMMENDED, Settings, recommended_opening};
use super::signals;
use super::terminal::{self, Failure};
use super::watch::Watcher;

/// The number formats of weights.
pub(crate) const DTYPES: [&str; 4] = ["f32", "f16", "bf16", Q8];
/// Linear layers of large networks in blocks of 8 bits, everything else in f16.
pub(crate) const Q8: &str = "q8";

/// Which models, and where they run.
#[derive(Debug, Clone, Default, Args, Serialize, Deserialize)]
#[serde(default)]
#[command(next_help_heading = "Model")]
pub(crate) struct ModelSettings {
    /// Name from `dinv models list`, folder, file, or OWNER/NAME [default: demo]
    ///
    /// Names are demo, sd15, sd21, sdxl, sd3, sd35, sd35-large, flux-dev, flux-schnell, chroma, klein-base, klein,
    /// klein-base-9b, klein-9b, z-image and z-image-turbo.
    /// OWNER/NAME and OWNER/NAME@REVISION are models of the Hugging Face Hub; a file is one .safetensors
    /// file. A dinv.json in the model's folder overrides built-in defaults.
    #[arg(long, value_name = "MODEL")]
    pub(crate) model: Option<PathBuf>,
    /// Family of a single file [default: recognised from its tensors]
    #[arg(long, hide_short_help = true, value_parser = PossibleValuesParser::new(Layout::names()))]
    pub(crate) family: Option<String>,
    /// What the U-Net predicts [default: from the model]
    #[arg(long, hide_short_help = true, value_parser = ["epsilon", "v_prediction", "sample"])]
    pub(crate) prediction_type: Option<String>,
    /// Which timesteps are visited [default: from the model; for a single file, trailing up to 8 steps, leading
    /// above]
    #[arg(long, hide_short_help = true, value_parser = ["leading", "trailing", "linspace"])]
    pub(crate) timestep_spacing: Option<String>,
    /// Rescale the noise schedule to end in pure noise, with trailing steps (zero terminal SNR) [default:
    /// from the model]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          hide_short_help = true)]
    pub(crate) zero_snr: Option<bool>,
    /// Variant of a folder's weights, such as fp16 [default: the plain weights, else fp16]
    #[arg(long, value_name = "NAME", hide_short_help = true)]
    pub(crate) variant: Option<String>,
    /// Vocabulary of a single file: a folder with tokenizer.json, or vocab.json and merges.txt, or a model of
    /// the Hub [default: that of --clip]
    #[arg(long, value_name = "DIR", hide_short_help = true)]
    pub(crate) tokenizer: Option<PathBuf>,
    /// U-Net or transformer that replaces the model's own: a folder, or a .safetensors or GGUF file of
    /// weights for the model's own configuration
    ///
    /// A transformer's file may have diffusers' names or the original ones, as ComfyUI's have, also in fp8. The
    /// model's own weights are not downloaded.
    #[arg(
        long,
        visible_alias = "transformer",
        value_name = "PATH",
        hide_short_help = true
    )]
    pub(crate) unet: Option<PathBuf>,
    #[arg(long, help = about!(model.text_encoder), value_name = "FILE", hide_short_help = true)]
    #[serde(deserialize_with = "one_or_several")]
    pub(crate) text_encoder: Option<Vec<PathBuf>>,
    #[arg(long, help = about!(model.vae), value_name = "PATH", hide_short_help = true)]
    pub(crate) vae: Option<PathBuf>,
    #[arg(long, help = about!(model.preview_vae), value_name = "PATH", hide_short_help = true)]
    pub(crate) preview_vae: Option<PathBuf>,
    #[arg(long, help = about!(model.lora), value_name = "FILE[:WEIGHT]", hide_short_help = true)]
    #[serde(deserialize_with = "one_or_several_texts")]
    pub(crate) lora: Option<Vec<String>>,
    #[arg(long, help = about!(model.embedding), value_name = "[NAME=]FILE", hide_short_help = true)]
    #[serde(deserialize_with = "one_or_several_texts")]
    pub(crate) embedding: Option<Vec<String>>,
    #[arg(long, help = about!(model.clip_skip), value_name = "N", hide_short_help = true)]
    pub(crate) clip_skip: Option<usize>,
    /// The most tokens of a prompt that T5 or Qwen3 reads [default: 256 for Stable Diffusion 3 and FLUX.1 schnell,
    /// 512 for others]
    ///
    /// All but Chroma and Z-Image pad prompts to this length, so it changes the picture. Shorter is faster.
    #[arg(long, value_name = "N", hide_short_help = true)]
    pub(crate) max_sequence_length: Option<usize>,
    /// Leave out T5, the largest text encoder of Stable Diffusion 3, with its download and memory
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          hide_short_help = true)]
    pub(crate) without_t5: Option<bool>,
    /// CLIP, a transformers CLIPModel: a folder or a name of the Hub; for SDXL one for each text encoder, in
    /// any order [default: clip and clip_2 in the model's folder or next to its file, else the Hub's that
    /// matches the text encoder]
    #[arg(long, value_name = "MODEL", hide_short_help = true)]
    #[serde(deserialize_with = "one_or_several")]
    pub(crate) clip: Option<Vec<PathBuf>>,
    /// Captioner: a transformers BLIP or BLIP-2 (a folder or a name of the Hub), or a server with a vision model,
    /// `http://HOST:PORT#MODEL` [default: captioner in the model's folder or next to its file; for a model of the Hub,
    /// Salesforce/blip-image-captioning-large]
    ///
    /// A server is llama.cpp's, Ollama, vLLM or another with OpenAI's chat interface. MODEL may be left out if it has one.
    #[arg(long, value_name = "MODEL", hide_short_help = true)]
    pub(crate) captioner: Option<PathBuf>,
    /// Size in pixels, 512 or 768x512 [default: the model's]
    #[arg(long, value_name = "SIZE")]
    #[serde(deserialize_with = "number_or_text")]
    pub(crate) resolution: Option<String>,
    /// CPU or GPU [default: auto]
    ///
    /// `auto` is the first GPU back end that is built in and finds a GPU, else the CPU.
    #[arg(long, value_parser = DEVICES)]
    pub(crate) device: Option<String>,
    /// Number format of the weights [default: f32]
    ///
    /// The CPU computes in f32 regardless; `vulkan` and `webgpu` have no bf16. `q8` is for the CPU: it holds the linear
    /// layers of the denoiser, T5 and Qwen3 in ggml's Q8_0, and the rest in f16. On the CPU, linear layers of GGUF
    /// and fp8 files keep the file's format, whatever --dtype is.
    #[arg(long, value_parser = DTYPES, hide_short_help = true)]
    pub(crate) dtype: Option<String>,
    /// `low` saves memory by recomputing [default: normal]
    ///
    /// With `low`, a learning step takes a third longer, and T5 of Stable Diffusion 3 and FLUX.1 is read from its file for
    /// every prompt (with `--prompt-dropout`, in every step).
    #[arg(long, value_parser = ["normal", "low"], hide_short_help = true)]
    pub(crate) memory: Option<String>,
}

impl ModelSettings {
    /// The place where the models run.
    pub(crate) fn place(&self) -> anyhow::Result<Place> {
        Place::named(self.device.as_deref().unwrap_or("auto"))
    }

    /// The device.
    pub(crate) fn device(&self) -> anyhow::Result<Device> {
        Ok(self.place()?.device)
    }

    /// Name of the device, or of the requested one if it is unavailable.
    pub(crate) fn device_name(&self) -> &str {
        match self.place() {
            Ok(place) => place.name,
            Err(_) => self.device.as_deref().unwrap_or_default(),
        }
    }

    /// Whether it is the demo model.
    pub(crate) fn is_demo(&self) -> bool {
        (self.model.as_deref()).is_none_or(|model| model == Path::new(DEMO))
    }

    /// The model and its device in a few words, such as `model sd15 on cpu`.
    pub(crate) fn named(&self) -> String {
        let model = (self.model.as_deref()).map_or(DEMO.into(), |model| model.to_string_lossy());
        format!("model {model} on {}", self.device_name())
    }

    /// The number format of the weights.
    pub(crate) fn dtype(&self) -> anyhow::Result<FloatDType> {
        device::number_format(self.dtype_name(), self.device_name())
    }

    /// Name of the number format.
    pub(crate) fn dtype_name(&self) -> &str {
        self.dtype.as_deref().unwrap_or("f32")
    }

    /// Whether linear layers are held in 8 bits.
    pub(crate) fn is_q8(&self) -> bool {
        self.dtype_name() == Q8
    }

    /// Name of the memory mode.
    pub(crate) fn memory_name(&self) -> &str {
        self.memory.as_deref().unwrap_or("normal")
    }

    /// Opens the models at `paths`; `watcher` reports how their files were interpreted, if that was
    /// ambiguous.
    pub(crate) fn open(
        &self,
        paths: &ModelPaths,
        watcher: &mut Watcher,
    ) -> anyhow::Result<Rc<Models>> {
        let (place, dtype) = (self.place()?, self.dtype()?);
        let settings = [place.name, self.dtype_name(), self.memory_name()];
        let models =
            Source::new(paths, settings).open(|| Models::open(paths, &place.device, dtype))?;
        for notice in models.notices() {
            watcher.notice(notice);
        }
        if let Some(adapter) = place.adapter {
            watcher.notice(&format!("running on {adapter} ({})", place.name));
        }
        Ok(models)
    }

    /// The learned words of the text encoders.
    pub(crate) fn embeddings(&self) -> Vec<EmbeddingFile> {
        self.embedding
            .iter()
            .flatten()
            .map(|text| embedding(text))
            .collect()
    }

    /// The server that is the captioner, if one is named.
    pub(crate) fn captioner_server(&self) -> anyhow::Result<Option<ServerAddress>> {
        let named = self.captioner.as_deref().map(locate::server);
        Ok(named.transpose()?.flatten())
    }

    /// Checks that the files given in addition to a model exist, before the model is downloaded.
    pub(crate) fn check_there(&self) -> anyhow::Result<()> {
        let loras = self.lora.iter().flatten().map(|text| lora(text).path);
        let words = self.embeddings().into_iter().map(|file| file.path);
        let encoders = self.text_encoder.iter().flatten().cloned();
        let autoencoders = self.vae.iter().chain(&self.preview_vae).cloned();
        let networks = encoders.chain(autoencoders).chain(self.unet.clone());
        let mut paths = loras.chain(words).chain(networks);
        paths.try_for_each(|path| match std::fs::metadata(&path) {
            Ok(_) => Ok(()),
            Err(source) => Err(not_there(&path, source)),
        })
    }

    /// Checks the files that replace networks, against the model's family if it is known by name. Returns the
    /// architectures and widths of the text encoders among them.
    pub(crate) fn check_replacements(&self) -> anyhow::Result<Vec<(TowerKind, usize)>> {
        let known = self.model.as_deref().and_then(locate::known);
        let family = known.and_then(|known| {
            let is_of = |family: &&'static Family| {
                let mut models = family.models.iter();
                models.any(|model| model.name == known.name)
            };
            family::all().find(is_of)
        });
        if let Some(file) = self.unet.as_deref().filter(|path| path.is_file()) {
            check_denoiser_file(file, family)?;
        }
        let mut encoders = Vec::new();
        for file in self.text_encoder.iter().flatten() {
            let found = EncoderFile::recognise(file)?;
            encoders.push((found.kind, found.width));
            let Some(family) = family else { continue };
            let kinds = || family.text_encoders.iter().map(|encoder| encoder.kind);
            if !kinds().any(|kind| kind == found.kind) {
                let kinds: Vec<String> = kinds().map(|kind| kind.to_string()).collect();
                let message = format!(
                    "--text-encoder: expected {}, found {}, {}",
                    kinds.join(" or "),
                    file.display(),
                    found.kind
                );
                return Err(Failure::input(message).into());
            }
        }
        Ok(encoders)
    }

    /// The files of the model at `model`, opened before a tokenizer named apart from it is found or downloaded.
    pub(crate) fn files_before_download(&self, model: &Path) -> anyhow::Result<ModelFiles> {
        let options = FileOptions {
            tokenizer: None,
            ..self.file_options_of(model)?
        };
        Ok(ModelFiles::open(model, &options)?)
    }

    /// How to interpret the files of the model at `model`, with the size of pictures and the length of prompts that it
    /// recommends unless they are given.
    pub(crate) fn file_options_of(&self, model: &Path) -> anyhow::Result<FileOptions> {
        let given = self.file_options()?;
        let of_model = recommended_opening(model)?.file_options();
        let of_model = of_model.with_context(|| model.join(RECOMMENDED).display().to_string())?;
        Ok(FileOptions {
            resolution: given.resolution.or(of_model.resolution),
            max_sequence_length: (given.max_sequence_length).or(of_model.max_sequence_length),
            ..given
        })
    }

    /// How to interpret the model's files, as far as it is given.
    pub(crate) fn file_options(&self) -> anyhow::Result<FileOptions> {
        let prediction_type = named::<PredictionType>(
            "prediction_type",
            "epsilon, v_prediction or sample",
            self.prediction_type.as_deref(),
        )?;
        let timestep_spacing = named::<TimestepSpacing>(
            "timestep_spacing",
            "leading, trailing or linspace",
            self.timestep_spacing.as_deref(),
        )?;
        Ok(FileOptions {
            family: self.family.as_deref().map(Layout::by_name).transpose()?,
            prediction_type,
            timestep_spacing,
            zero_snr: self.zero_snr.unwrap_or(false),
            variant: self.variant.clone(),
            tokenizer: self.tokenizer.clone(),
            resolution: self.resolution.as_deref().map(resolution).transpose()?,
            unet: self.unet.clone(),
            without_t5: self.without_t5.unwrap_or(false),
            loras: self.lora.iter().flatten().map(|text| lora(text)).collect(),
            embeddings: self.embeddings(),
            vae: self.vae.clone(),
            preview_vae: self.preview_vae.clone(),
            text_encoders: self.text_encoder.clone().unwrap_or_default(),
            clip_skip: self.clip_skip.unwrap_or(0),
            max_sequence_length: self.max_sequence_length,
            q8: self.is_q8(),
            memory: self.memory()?,
        })
    }

    /// The given settings for interpreting the model's files; folders are reduced to their names.
    pub(crate) fn file_settings(&self) -> impl Iterator<Item = (String, Value)> {
        let name = |folder: &Option<PathBuf>| {
            let name = folder.as_deref().and_then(Path::file_name);
            name.map(|name| name.to_string_lossy().into_owned())
        };
        let settings = [
            ("family", self.family.clone()),
            ("prediction_type", self.prediction_type.clone()),
            ("timestep_spacing", self.timestep_spacing.clone()),
            (
                "zero_snr",
                self.zero_snr.map(|zero_snr| zero_snr.to_string()),
            ),
            ("variant", self.variant.clone()),
            ("resolution", self.resolution.clone()),
            ("tokenizer", name(&self.tokenizer)),
            ("unet", name(&self.unet)),
            ("vae", name(&self.vae)),
        ];
        let given = |(name, value): (&str, Option<String>)| Some((name.to_owned(), json!(value?)));
        let without_t5 = (self.without_t5).map(|value| ("without_t5".to_owned(), json!(value)));
        let names = |given: &Option<Vec<String>>, name: fn(&str) -> String| {
            let names = given.as_ref()?.iter().map(|given| name(given));
            Some(json!(names.collect::<Vec<_>>()))
        };
        let loras = names(&self.lora, |text| {
            let LoraFile { path, weight } = lora(text);
            format!("{}:{weight}", file_name(&path))
        });
        let embeddings = names(&self.embedding, |text| {
            let file = embedding(text);
            format!("{}={}", file.name(), file_name(&file.path))
        });
        let text_encoders = self.text_encoder.as_ref().map(|files| {
            let names = files.iter().map(|file| file_name(file));
            json!(names.collect::<Vec<_>>())
        });
        let others = [
            ("text_encoder", text_encoders),
            ("lora", loras),
            ("embedding", embeddings),
            ("clip_skip", self.clip_skip.map(|layers| json!(layers))),
            (
                "max_sequence_length",
                self.max_sequence_length.map(|length| json!(length)),
            ),
        ];
        let others = others
            .into_iter()
            .filter_map(|(name, value)| Some((name.to_owned(), value?)));
        settings
            .into_iter()
            .filter_map(given)
            .chain(without_t5)
            .chain(others)
    }
}

/// Parses a LoRA and its weight, `FILE` or `FILE:WEIGHT`; an existing file with such a name is that file.
pub(crate) fn lora(text: &str) -> LoraFile {
    let path = PathBuf::from(text);
    let split = text.rsplit_once(':').filter(|_| !path.exists());
    let weighted = split.and_then(|(path, weight)| Some((path, weight.trim().parse().ok()?)));
    match weighted {
        Some((path, weight)) => LoraFile {
            path: path.into(),
            weight,
        },
        None => LoraFile { path, weight: 1.0 },
    }
}

/// Parses an embedding, `FILE` or `NAME=FILE`; an existing file with `=` in its name is that file.
pub(crate) fn embedding(text: &str) -> EmbeddingFile {
    let split = text.split_once('=').filter(|_| !Path::new(text).exists());
    match split {
        Some((name, path)) => EmbeddingFile {
            name: Some(name.to_owned()),
            path: path.into(),
        },
        None => EmbeddingFile {
            name: None,
            path: text.into(),
        },
    }
}

/// Parses one of several named values.
fn named<T: DeserializeOwned>(
    setting: &str,
    expected: &str,
    name: Option<&str>,
) -> anyhow::Result<Option<T>> {
    let Some(name) = name else {
        return Ok(None);
    };
    let value = serde_json::from_value(json!(name));
    let message = || format!("{setting}: expected {expected}, found `{name}`");
    Ok(Some(value.map_err(|_| Failure::input(message()))?))
}

/// Height and width of pictures, from a side or `WIDTHxHEIGHT`.
fn resolution(text: &str) -> anyhow::Result<[u32; 2]> {
    let (width, height) = text.split_once(['x', '×']).unwrap_or((text, text));
    match (height.trim().parse(), width.trim().parse()) {
        (Ok(height), Ok(width)) => Ok([height, width]),
        _ => {
            let message = format!("resolution: expected 512 or 768x512, found `{text}`");
            Err(Failure::input(message).into())
        }
    }
}

/// A text that a settings file may write as a number.
fn number_or_text<'de, D: Deserializer<'de>>(value: D) -> Result<Option<String>, D::Error> {
    Ok(match Option::<Value>::deserialize(value)? {
        Some(Value::String(text)) => Some(text),
        other => other.map(|value| value.to_string()),
    })
}

/// Paths; a settings file may write a single one without brackets.
pub(crate) fn one_or_several<'de, D: Deserializer<'de>>(
    value: D,
) -> Result<Option<Vec<PathBuf>>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Paths {
        One(PathBuf),
        Several(Vec<PathBuf>),
    }
    let paths = Option::<Paths>::deserialize(value)?;
    Ok(paths.map(|paths| match paths {
        Paths::One(path) => vec![path],
        Paths::Several(paths) => paths,
    }))
}

/// Texts; a settings file may write a single one without brackets.
pub(crate) fn one_or_several_texts<'de, D: Deserializer<'de>>(
    value: D,
) -> Result<Option<Vec<String>>, D::Error> {
    let paths = one_or_several(value)?;
    let text = |path: PathBuf| path.to_string_lossy().into_owned();
    Ok(paths.map(|paths| paths.into_iter().map(text).collect()))
}

/// Flags of every subcommand.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "General")]
pub(crate) struct General {
    /// Settings from a TOML file; flags override it
    #[arg(long, value_name = "FILE.toml", hide_short_help = true)]
    pub(crate) config: Option<PathBuf>,
    /// Print the results as one JSON object
    #[arg(long, hide_short_help = true)]
    pub(crate) json: bool,
    /// Print only errors and notes
    #[arg(long, short)]
    pub(crate) quiet: bool,
    /// Download models without asking
    ///
    /// Without a terminal, it never asks.
    #[arg(long, short, hide_short_help = true)]
    pub(crate) yes: bool,
    #[command(flatten)]
    pub(crate) control: Control,
}

/// Flags for other programs that start this one. They are read before everything else.
#[derive(Debug, Clone, Args)]
pub(crate) struct Control {
    /// How progress and messages are written to stderr [default: auto]
    ///
    /// `auto` is a bar on a terminal and lines elsewhere. `json` is one JSON object per line, for other
    /// programs: its `type` is `step`, `preview`, `notice`, `message` or `error`.
    #[arg(long, value_parser = ["auto", "json"], hide_short_help = true)]
    pub(crate) progress: Option<String>,
    /// Stop when standard input closes, as after Ctrl-C
    ///
    /// This lets a parent program stop `dinv` on every system; `dinv` also stops when the parent ends.
    #[arg(long, hide_short_help = true)]
    pub(crate) stop_with_stdin: bool,
}

/// Previews of B′ for other programs.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "General")]
pub(crate) struct PreviewFlag {
    /// With `--progress json`, send a small preview after every step of drawing
    ///
    /// A line of the type `preview`, whose `picture` is a data URL of a PNG: a pixel for every latent, or with
    /// `--preview-vae` up to 256 pixels a side. The result stays the same.
    #[arg(long, hide_short_help = true)]
    pub(crate) previews: bool,
}

impl PreviewFlag {
    /// Whether somebody reads previews.
    pub(crate) fn is_read(&self) -> bool {
        self.previews && terminal::writes_json_lines()
    }
}

impl General {
    /// The settings given by flags and by the `--config` file.
    pub(crate) fn settings(&self, flags: &[&dyn ErasedFlags]) -> anyhow::Result<Settings> {
        Settings::new(self.config.as_deref(), flags)
    }
}

/// The seed of everything random.
#[derive(Debug, Clone, Default, Args, Serialize)]
#[command(next_help_heading = "General")]
pub(crate) struct SeedFlag {
    #[arg(long, help = about!(seed))]
    seed: Option<u64>,
}

/// Minutes, with decimals if wanted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Minutes(pub(crate) Duration);

impl FromStr for Minutes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        /// A year, so that its end can be represented.
        const LONGEST: f64 = 525_600.0;
        let minutes = text.parse().ok();
        let minutes = minutes.filter(|minutes| (0.0..=LONGEST).contains(minutes));
        let minutes = minutes.ok_or("expected minutes, such as 55 or 0.5, at most a year")?;
        Ok(Self(Duration::from_secs_f64(60.0 * minutes)))
    }
}

/// A time slot. A command that can replace earlier results refuses both at once: the next run would undo this one.
#[derive(Debug, Clone, Copy, Args)]
#[command(next_help_heading = "General")]
pub(crate) struct TimeFlag {
    /// Stop after N minutes and keep what is done; exit code 75
    ///
    /// The same command continues: it resumes learning from the checkpoint and makes the missing pictures.
    #[arg(long, value_name = "N", hide_short_help = true)]
    minutes: Option<Minutes>,
}

impl TimeFlag {
    /// Whether the time is limited: then the same command is started again until all is done.
    pub(crate) fn is_limited(self) -> bool {
        self.minutes.is_some()
    }

    /// Catches interrupts, and lets the time begin.
    pub(crate) fn watch(self) -> anyhow::Result<()> {
        signals::catch_interrupts()?;
        let minutes = self.minutes;
        minutes.map_or(Ok(()), |Minutes(time)| signals::stop_after(time))
    }
}

/// A first look.
#[derive(Debug, Clone, Copy, Default, Args, Serialize)]
#[command(next_help_heading = "General")]
pub(crate) struct DraftFlag {
    /// A first look: learn from the CLIP loss alone, draw in four steps
    ///
    /// Stands for --lambda-mse 0 --clip-first 0 --steps 60 --learning-rate-schedule linear --num-inference-steps 4
    /// --skip 0 --guidance-scale 1. If you also give one of these flags, your value is used.
    #[arg(long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    draft: bool,
}

/// How prompts are made.
#[derive(Debug, Clone, Default, Args, Serialize)]
#[command(next_help_heading = "Prompts")]
pub(crate) struct PromptFlags {
    #[arg(long, help = about!(prompt_mode), hide_short_help = true, value_parser = ["caption", "optimised", "caption+optimised", "text"])]
    prompt_mode: Option<String>,
    #[arg(long, help = about!(pez_tokens), value_name = "N", hide_short_help = true)]
    pez_tokens: Option<usize>,
    #[arg(long, help = about!(pez_steps), value_name = "N", hide_short_help = true)]
    pez_steps: Option<usize>,
    #[arg(long, help = about!(pez_learning_rate), value_name = "RATE", hide_short_help = true, value_parser = finite)]
    pez_learning_rate: Option<f64>,
    #[arg(long, help = about!(pez_weight_decay), value_name = "DECAY", hide_short_help = true, value_parser = finite)]
    pez_weight_decay: Option<f64>,
}

/// How the difference is learned.
#[derive(Debug, Clone, Default, Args, Serialize)]
#[command(next_help_heading = "Learning")]
pub(crate) struct LearnFlags {
    #[arg(long, help = about!(steps), value_name = "N")]
    steps: Option<usize>,
    #[arg(long, help = concat!(about!(learn_resolution), " [default: that of the pictures that are drawn]"), value_name = "PIXELS", hide_short_help = true)]
    learn_resolution: Option<u32>,
    #[arg(long, help = about!(clip_first), value_name = "N", hide_short_help = true)]
    clip_first: Option<usize>,
    #[arg(long, help = about!(clip_thinned), value_name = "N", hide_short_help = true)]
    clip_thinned: Option<usize>,
    #[arg(long, help = about!(num_tokens), value_name = "N", hide_short_help = true)]
    num_tokens: Option<usize>,
    #[arg(long, help = concat!(about!(learning_rate), " [default: 0.45 times the root mean square of the vocabulary]"), value_name = "RATE", hide_short_help = true, value_parser = finite)]
    learning_rate: Option<f64>,
    #[arg(long, help = about!(learning_rate_schedule), value_parser = ["constant", "linear", "cosine"], hide_short_help = true)]
    learning_rate_schedule: Option<String>,
    #[arg(long, help = about!(alpha), value_name = "0..1", hide_short_help = true, value_parser = finite)]
    alpha: Option<f64>,
    #[arg(long, help = about!(lambda_clip), value_name = "WEIGHT", hide_short_help = true, value_parser = finite)]
    lambda_clip: Option<f64>,
    #[arg(long, help = about!(lambda_mse), value_name = "WEIGHT", hide_short_help = true, value_parser = finite)]
    lambda_mse: Option<f64>,
    #[arg(long, help = about!(lambda_before), value_name = "WEIGHT", hide_short_help = true, value_parser = finite)]
    lambda_before: Option<f64>,
    #[arg(long, help = about!(clip_reading), value_parser = ["alone", "prompts"], hide_short_help = true)]
    clip_reading: Option<String>,
    #[arg(long, help = about!(delta), value_parser = ["interpolated", "image", "text"], hide_short_help = true)]
    delta: Option<String>,
    #[arg(long, help = about!(consistency), value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_missing_value = "true", hide_short_help = true)]
    consistency: Option<bool>,
    #[arg(long, help = about!(initialisation), value_name = "START", value_parser = initialisation, hide_short_help = true)]
    initialisation: Option<Value>,
    #[arg(long, help = about!(weight_decay), value_name = "DECAY", hide_short_help = true, value_parser = finite)]
    weight_decay: Option<f64>,
    #[arg(long, help = about!(samples_per_step), value_name = "N", hide_short_help = true)]
    samples_per_step: Option<usize>,
    #[arg(long, help = about!(max_norm), value_name = "NORM", hide_short_help = true, value_parser = finite)]
    max_norm: Option<f64>,
    #[arg(long, help = about!(prompt_dropout), value_name = "0..1", hide_short_help = true, value_parser = finite)]
    prompt_dropout: Option<f64>,
    #[arg(long, help = about!(jitter), value_name = "N", hide_short_help = true)]
    jitter: Option<usize>,
    #[arg(long, help = about!(select_every), value_name = "N", hide_short_help = true)]
    select_every: Option<usize>,
    #[arg(long, help = about!(select_samples), value_name = "N", hide_short_help = true)]
    select_samples: Option<usize>,
    #[arg(long, help = about!(patience), value_name = "N", hide_short_help = true)]
    patience: Option<usize>,
    #[arg(long, help = about!(checkpoint_every), value_name = "N", hide_short_help = true)]
    checkpoint_every: Option<usize>,
}

/// How B′ is made from B.
#[derive(Debug, Clone, Default, Args, Serialize)]
#[command(next_help_heading = "Making B′")]
pub(crate) struct GenerateFlags {
    #[arg(long, help = about!(inversion), hide_short_help = true, value_parser = ["edit-friendly", "ddim", "sdedit"])]
    inversion: Option<String>,
    #[arg(long, help = about!(guidance), hide_short_help = true, value_parser = ["difference", "ordinary"])]
    guidance: Option<String>,
    #[arg(long, help = concat!(about!(guidance_scale), " [default: depends on the inversion]"), value_name = "SCALE", hide_short_help = true, value_parser = finite)]
    guidance_scale: Option<f64>,
    #[arg(long, help = about!(num_inference_steps), value_name = "N", hide_short_help = true)]
    num_inference_steps: Option<usize>,
    #[arg(long, help = about!(strength), value_name = "S", allow_negative_numbers = true, value_parser = finite)]
    strength: Option<f64>,
    #[arg(long, help = about!(reverse), value_name = "BOOL", num_args = 0..=1, require_equals = true, hide_possible_values = true,
          default_missing_value = "true")]
    reverse: Option<bool>,
    #[arg(long, help = concat!(about!(negative_prompt), "; only with --guidance ordinary"), value_name = "TEXT", hide_short_help = true)]
    negative_prompt: Option<String>,
    #[arg(long, help = concat!(about!(source_guidance_scale), "; only with --guidance ordinary"), value_name = "SCALE", hide_short_help = true, value_parser = finite)]
    source_guidance_scale: Option<f64>,
    #[arg(long, help = about!(skip), value_name = "0..1", hide_short_help = true, value_parser = finite)]
    skip: Option<f64>,
    #[arg(long, help = about!(inversion_iterations), value_name = "N", hide_short_help = true)]
    inversion_iterations: Option<usize>,
    #[arg(long, help = about!(sdedit_strength), value_name = "0..1", hide_short_help = true, value_parser = finite)]
    sdedit_strength: Option<f64>,
    #[arg(long, help = concat!(about!(eta), " [default: 1, for a flow 0]"), value_name = "0..1", hide_short_help = true, value_parser = finite)]
    eta: Option<f64>,
}

/// Parses a finite number: JSON has neither infinity nor NaN.
pub(crate) fn finite(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() => Ok(number),
        Ok(_) => Err("expected a finite number".into()),
        Err(error) => Err(error.to_string()),
    }
}

fn initialisation(text: &str) -> Result<Value, String> {
    match text.split_once(':') {
        Some(("word", words)) if !words.trim().is_empty() => Ok(json!({ "word": words })),
        None if ["zero", "random"].contains(&text) => Ok(json!(text)),
        _ => Err("expected `zero`, `random` or `word:TEXT`".into()),
    }
}

/// The error of a file that is not there, which may be meant as a name of the Hub.
fn not_there(path: &Path, source: std::io::Error) -> anyhow::Error {
    let error = Error::io(path)(source);
    let parts: Vec<_> = path.components().collect();
    let is_name = parts.len() == 2
        && path.extension().is_none()
        && (parts.iter()).all(|part| matches!(part, std::path::Component::Normal(_)));
    if !is_name {
        return error.into();
    }
    let (name, folder) = (path.display(), file_name(path));
    let hint = format!(
        "a folder or a file is expected here, not a name of the Hub: `hf download {name} --local-dir {folder}` makes the \
         folder {folder}"
    );
    Failure::input(error.to_string()).hint(hint).into()
}

/// The pairs of pictures and their captions.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct Pairs {
    /// A, the picture before the edit; repeat for several pairs
    #[arg(long, value_name = "FILE")]
    pub(crate) a: Vec<PathBuf>,
    /// A′, the picture after the edit
    #[arg(long, value_name = "FILE")]
    pub(crate) a_prime: Vec<PathBuf>,
    /// Caption of A instead of the captioner's
    ///
    /// Once per pair.
    #[arg(long, value_name = "TEXT", help_heading = "Prompts")]
    pub(crate) caption_a: Vec<String>,
    /// Caption of A′ instead of the captioner's
    ///
    /// Once per pair.
    #[arg(long, value_name = "TEXT", help_heading = "Prompts")]
    pub(crate) caption_a_prime: Vec<String>,
}

impl Pairs {
    /// All captions that were given.
    pub(crate) fn given_captions(&self) -> impl Iterator<Item = &str> {
        let captions = self.caption_a.iter().chain(&self.caption_a_prime);
        captions.map(String::as_str)
    }

    /// Whether every picture has a caption.
    pub(crate) fn have_captions(&self) -> bool {
        !self.caption_a.is_empty() && !self.caption_a_prime.is_empty()
    }

    /// Checks that the numbers of A′ and of captions match that of A.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        let count = self.a.len();
        if self.a_prime.len() != count {
            let message = format!(
                "expected one `--a-prime` for every `--a`, found {} and {count}",
                self.a_prime.len()
            );
            return Err(Failure::usage(message).into());
        }
        check_captions("--caption-a", self.caption_a.len(), "--a", count)?;
        check_captions(
            "--caption-a-prime",
            self.caption_a_prime.len(),
            "--a",
            count,
        )
    }

    /// The pairs in a few words, such as `day.png → night.png`.
    pub(crate) fn named(&self) -> String {
        let mut pairs = self.a.iter().zip(&self.a_prime);
        let first = pairs.next().map_or_else(String::new, |(a, a_prime)| {
            format!("{} → {}", file_name(a), file_name(a_prime))
        });
        match pairs.count() {
            0 => first,
            1 => format!("{first} and another pair"),
            more => format!("{first} and {more} other pairs"),
        }
    }

    /// The files of the pictures.
    pub(crate) fn files(&self) -> Vec<&Path> {
        let files = self.a.iter().chain(&self.a_prime);
        files.map(PathBuf::as_path).collect()
    }

    /// Each picture with its file, A before its A′.
    pub(crate) fn pictures<'a>(
        &'a self,
        examples: &'a [Example],
    ) -> impl Iterator<Item = (&'a Path, &'a RgbImage)> {
        let images = examples.iter().flat_map(|pair| [&pair.a, &pair.a_prime]);
        let files = self
            .a
            .iter()
            .zip(&self.a_prime)
            .flat_map(|(a, a_prime)| [a, a_prime]);
        files.map(PathBuf::as_path).zip(images)
    }

    /// The size of each picture, A before its A′.
    pub(crate) fn sizes(&self, examples: &[Example]) -> Vec<Measured<'_>> {
        let pairs = self.a.iter().zip(&self.a_prime).zip(examples);
        pairs
            .flat_map(|((a, a_prime), example)| {
                let [of_a, of_a_prime] = [&example.a, &example.a_prime].map(|x| x.dimensions());
                [(a.as_path(), of_a), (a_prime.as_path(), of_a_prime)]
            })
            .collect()
    }

    /// The pairs, each with its captions.
    pub(crate) fn pairs(&self) -> Vec<PairFiles> {
        let pairs = self.a.iter().zip(&self.a_prime).enumerate();
        pairs
            .map(|(index, (a, a_prime))| PairFiles {
                a: a.clone(),
                a_prime: a_prime.clone(),
                caption_a: self.caption_a.get(index).cloned(),
                caption_a_prime: self.caption_a_prime.get(index).cloned(),
            })
            .collect()
    }
}

/// Checks that captions are given for all pictures or for none.
pub(crate) fn check_captions(
    flag: &str,
    captions: usize,
    picture_flag: &str,
    pictures: usize,
) -> anyhow::Result<()> {
    if captions == 0 || captions == pictures {
        return Ok(());
    }
    let message = format!(
        "expected `{flag}` not at all or once for every `{picture_flag}`, found {captions} and {pictures}"
    );
    Err(Failure::usage(message).into())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use difference_inversion::diffusion::family;

    use super::*;

    #[test]
    fn help_names_every_model_that_is_known_by_name() {
        let command = crate::cli::Cli::command();
        for (subcommand, flag) in [("analogy", "model"), ("models", "names")] {
            let of = |command: &clap::Command| {
                let flag = command.get_arguments().find(|arg| arg.get_id() == flag)?;
                Some(flag.get_long_help().or(flag.get_help())?.to_string())
            };
            let found = command.find_subcommand(subcommand).unwrap();
            let help = of(found)
                .or_else(|| of(found.find_subcommand("pull")?))
                .unwrap();
            for model in family::known_models() {
                assert!(help.contains(model.name), "{subcommand}: {help}");
            }
        }
    }

    #[test]
    fn a_model_s_folder_may_state_how_it_is_opened() {
        let place = tempfile::tempdir().unwrap();
        let of = |stated: &str, given: Option<&str>| {
            std::fs::write(place.path().join(RECOMMENDED), stated).unwrap();
            let settings = ModelSettings {
                resolution: given.map(str::to_owned),
                ..ModelSettings::default()
            };
            let options = settings.file_options_of(place.path());
            options.map(|options| options.resolution)
        };
        let stated = r#"{"steps": 10, "resolution": "192x128"}"#;
        assert_eq!(of(stated, None).unwrap(), Some([128, 192]));
        assert_eq!(
            of(r#"{"resolution": 128}"#, None).unwrap(),
            Some([128, 128])
        );
        assert_eq!(of(stated, Some("64")).unwrap(), Some([64, 64]));
        assert_eq!(of("{}", None).unwrap(), None);
        let length = |stated: &str, given| {
            std::fs::write(place.path().join(RECOMMENDED), stated).unwrap();
            let settings = ModelSettings {
                max_sequence_length: given,
                ..ModelSettings::default()
            };
            let options = settings.file_options_of(place.path()).unwrap();
            options.max_sequence_length
        };
        let stated = r#"{"max_sequence_length": 77, "resolution": "192x128", "steps": 10}"#;
        let lengths = [
            length(stated, None),
            length(stated, Some(64)),
            length("{}", None),
        ];
        assert_eq!(lengths, [Some(77), Some(64), None]);
        let settings = Settings::new(None, &[]).unwrap();
        std::fs::write(place.path().join(RECOMMENDED), stated).unwrap();
        let settings = settings.with_model(place.path()).unwrap();
        assert_eq!(settings.analogy().unwrap().learn.steps, 10);
        let error = format!("{:#}", of(r#"{"resolution": "wide"}"#, None).unwrap_err());
        assert!(error.contains("dinv.json: resolution: expected"), "{error}");
    }

    /// Checks that the library reads every value that `--help` offers for a setting.
    #[test]
    fn offered_values_are_understood() {
        let command = crate::cli::Cli::command();
        let analogy = command.find_subcommand("analogy").unwrap();
        let settings = |name: &str, value: Value| {
            Settings::new(None, &[&json!({ name: value })])
                .unwrap()
                .analogy()
        };
        for name in ["prompt_mode", "delta", "inversion", "guidance"] {
            let flag = analogy
                .get_arguments()
                .find(|arg| arg.get_id() == name)
                .unwrap();
            let values = flag.get_possible_values();
            assert!(values.len() >= 2);
            for value in values {
                settings(name, json!(value.get_name())).unwrap();
            }
            let error = settings(name, json!("something else")).unwrap_err();
            let expected = "unknown variant `something else`";
            assert!(error.to_string().contains(expected), "{error}");
        }
        for text in ["zero", "random", "word:blue sky"] {
            settings("initialisation", initialisation(text).unwrap()).unwrap();
        }
        assert_eq!(
            initialisation("ones"),
            Err("expected `zero`, `random` or `word:TEXT`".to_owned())
        );
    }

    /// Checks that every setting of an analogy has a flag.
    #[test]
    fn every_setting_has_a_flag() {
        let command = crate::cli::Cli::command();
        let analogy = command.find_subcommand("analogy").unwrap();
        let flags: Vec<&str> = analogy
            .get_arguments()
            .map(|arg| arg.get_id().as_str())
            .collect();
        let config = serde_json::to_value(
            difference_inversion::method::generate_config::AnalogyConfig::default(),
        )
        .unwrap();
        for group in config.as_object().unwrap().values() {
            for name in group.as_object().unwrap().keys() {
                assert!(flags.contains(&name.as_str()), "no flag for `{name}`");
            }
        }
    }
}
