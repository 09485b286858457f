//! The record of a run: `run.json`, and the text inside every PNG.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use burn::tensor::{Device, FloatDType};
use difference_inversion::Result;
use difference_inversion::diffusion::family::Family;
use difference_inversion::diffusion::frozen::ModelPaths;
use difference_inversion::diffusion::joint_space;
use difference_inversion::hub::model_of;
use difference_inversion::image::read_png_text;
use difference_inversion::method::generate_config::AnalogyConfig;
use difference_inversion::models::captioner::ServerAddress;
use difference_inversion::util::digest::sha256_of_file;
use difference_inversion::util::files::write_atomically;
use difference_inversion::weights::Weights;
use serde::Serialize;
use serde_json::{Map, Value};

use super::flags::ModelSettings;
use super::watch::StageTimes;

/// Names of the inputs that are files.
const FILES: [&str; 5] = ["file", "difference", "image", "init_latents", "mask"];

/// Everything that determines a result, and so everything needed to reproduce it.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Recipe {
    pub(crate) program: String,
    pub(crate) command: &'static str,
    pub(crate) model: String,
    pub(crate) clip: Vec<String>,
    pub(crate) captioner: String,
    pub(crate) device: String,
    pub(crate) dtype: String,
    pub(crate) memory: String,
    /// By name, as in a `--config` file.
    pub(crate) settings: Map<String, Value>,
    /// Inputs, captions and prompts.
    #[serde(flatten)]
    pub(crate) inputs: Map<String, Value>,
}

impl Recipe {
    /// A recipe without inputs.
    pub(crate) fn new(
        command: &'static str,
        models: &ModelSettings,
        paths: &ModelPaths,
        groups: &[&dyn super::settings::ErasedFlags],
    ) -> anyhow::Result<Self> {
        let mut settings = Map::new();
        for group in groups {
            settings.extend(group.values()?);
        }
        settings.extend(models.file_settings());
        Ok(Self {
            program: format!("{} {}", env!("CARGO_BIN_NAME"), env!("CARGO_PKG_VERSION")),
            command,
            model: text_of(&paths.model),
            clip: paths.clip_folders().iter().map(text_of).collect(),
            captioner: paths.captioner_place().to_string(),
            device: models.device_name().to_owned(),
            dtype: models.dtype_name().to_owned(),
            memory: models.memory_name().to_owned(),
            settings,
            inputs: Map::new(),
        })
    }

    /// Adds an input.
    pub(crate) fn input(&mut self, name: &str, value: impl Serialize) -> anyhow::Result<()> {
        self.inputs
            .insert(name.to_owned(), serde_json::to_value(value)?);
        Ok(())
    }

    /// The recipe as one line of JSON, which PNGs carry under the key `dinv`. A picture travels further than
    /// `run.json`: its recipe has the names of folders and files, not their paths.
    pub(crate) fn to_line(&self) -> anyhow::Result<String> {
        let travelling = Self {
            model: last_names(&self.model),
            clip: self.clip.iter().map(|clip| last_names(clip)).collect(),
            captioner: captioner_name(&self.captioner),
            inputs: without_folders(&self.inputs),
            ..self.clone()
        };
        Ok(serde_json::to_string(&travelling)?)
    }
}

/// The recipe that a picture carries, if it is one of this program's.
pub(crate) fn recipe_in(picture: &Path) -> Option<Value> {
    let text = read_png_text(picture).ok()?;
    let (_, recipe) = text.iter().find(|(key, _)| key == "dinv")?;
    serde_json::from_str(recipe).ok()
}

/// A path as people read it: JSON is Unicode, and not all paths are.
pub(crate) fn text_of(path: impl AsRef<Path>) -> String {
    path.as_ref().to_string_lossy().into_owned()
}

/// The name of a file without its folder.
pub(crate) fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(|| text_of(path), text_of)
}

/// The settings of an analogy in reading order.
pub(crate) fn groups(config: &AnalogyConfig) -> [&dyn super::settings::ErasedFlags; 3] {
    [&config.prompt, &config.learn, &config.generate]
}

/// The portable name of a model: the Hub's name and commit, or else the last two names of its path,
/// such as `demo/model`.
pub(crate) fn last_names(path: &str) -> String {
    let path = Path::new(path);
    if let Some(id) = model_of(path) {
        return id.to_string();
    }
    let names: Vec<_> = path.iter().collect();
    text_of(
        names[names.len().saturating_sub(2)..]
            .iter()
            .collect::<PathBuf>(),
    )
}

/// The portable name of a captioner. That of a server keeps its address; its model may be named by a path.
fn captioner_name(captioner: &str) -> String {
    match captioner.parse::<ServerAddress>() {
        Ok(address) => match address.model() {
            Some(model) => address.with_model(last_names(model)).to_string(),
            None => address.to_string(),
        },
        Err(_) => last_names(captioner),
    }
}

/// Inputs with the names of files only, without folders.
fn without_folders(inputs: &Map<String, Value>) -> Map<String, Value> {
    let shortened = |name: &str, value: &Value| match value {
        Value::String(path) if FILES.contains(&name) => Path::new(path)
            .file_name()
            .map_or_else(|| path.clone(), |name| name.to_string_lossy().into_owned())
            .into(),
        Value::Object(parts) => without_folders(parts).into(),
        Value::Array(parts) => (parts.iter())
            .map(|part| match part {
                Value::Object(parts) => without_folders(parts).into(),
                other => other.clone(),
            })
            .collect(),
        other => other.clone(),
    };
    (inputs.iter())
        .map(|(name, value)| (name.clone(), shortened(name, value)))
        .collect()
}

/// The files with weights of the model, the joint spaces and the captioner, as they would be read. Each
/// has the name of its network, which does not depend on where the file is.
pub(crate) fn weight_files(paths: &ModelPaths) -> Result<Vec<(String, PathBuf)>> {
    let device = Device::flex();
    let model = paths.files()?;
    let mut files = Vec::new();
    for network in Family::of(&model)?.networks_in(&model)? {
        let weights = model.weights(network, &device, FloatDType::F32)?;
        files.extend(named_files(network, &weights));
    }
    for (number, file) in model.loras().enumerate() {
        files.push((numbered("lora", number), file.to_owned()));
    }
    for (number, file) in model.embeddings().iter().enumerate() {
        files.push((numbered("embedding", number), file.path.clone()));
    }
    for (network, folder) in folders_beside(paths) {
        let weights = Weights::open(&folder, &device, FloatDType::F32)?;
        files.extend(named_files(network, &weights));
    }
    Ok(files)
}

/// The folders of the joint spaces and the captioner that are there, with their names.
pub(crate) fn folders_beside(paths: &ModelPaths) -> impl Iterator<Item = (&'static str, PathBuf)> {
    let joints = joint_space::FOLDERS.into_iter().zip(paths.clip_folders());
    let captioner = paths.captioner_folder();
    let all = joints.chain(captioner.map(|folder| ("captioner", folder)));
    all.filter(|(_, folder)| folder.is_dir())
}

/// The paths of [`weight_files`].
pub(crate) fn weight_paths(paths: &ModelPaths) -> Result<Vec<PathBuf>> {
    Ok(weight_files(paths)?
        .into_iter()
        .map(|(_, file)| file)
        .collect())
}

/// The files of a network, named after it; further shards also have a number.
pub(crate) fn named_files(network: &str, weights: &Weights) -> Vec<(String, PathBuf)> {
    let files = weights.files().enumerate();
    files
        .map(|(number, file)| (numbered(network, number), file.to_owned()))
        .collect()
}

/// The name of the first of several files, or of a further one.
pub(crate) fn numbered(name: &str, number: usize) -> String {
    match number {
        0 => name.to_owned(),
        _ => format!("{name} ({number})"),
    }
}

/// A run with its environment.
#[derive(Debug, Serialize)]
pub(crate) struct Run<'a> {
    #[serde(flatten)]
    recipe: &'a Recipe,
    results: Map<String, Value>,
    notices: Vec<String>,
    threads: usize,
    /// Time of each stage and in total, in seconds.
    seconds: BTreeMap<String, f64>,
    /// SHA-256 of every file of weights.
    model_files: BTreeMap<String, String>,
}

impl<'a> Run<'a> {
    /// Collects the environment of a run; hashes the weights.
    pub(crate) fn new(
        recipe: &'a Recipe,
        paths: &ModelPaths,
        started: Instant,
        (times, notices): (StageTimes, Vec<String>),
    ) -> anyhow::Result<Self> {
        let mut seconds: BTreeMap<String, f64> = times
            .iter()
            .map(|(stage, time)| (stage.to_string(), in_seconds(*time)))
            .collect();
        seconds.insert("total".into(), in_seconds(started.elapsed()));
        let mut hashes = BTreeMap::new();
        for (_, file) in weight_files(paths)? {
            sha256_once(&mut hashes, &file)?;
        }
        let model_files = (hashes.into_iter())
            .map(|(file, hash)| (text_of(file), hash))
            .collect();
        let threads = rayon::current_num_threads();
        Ok(Self {
            recipe,
            results: Map::new(),
            notices,
            threads,
            seconds,
            model_files,
        })
    }

    /// Adds a result.
    pub(crate) fn result(&mut self, name: &str, value: impl Serialize) -> anyhow::Result<()> {
        self.results
            .insert(name.to_owned(), serde_json::to_value(value)?);
        Ok(())
    }

    /// Writes `run.json`.
    pub(crate) fn write(&self, path: &Path) -> anyhow::Result<()> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        Ok(write_atomically(path, text.as_bytes())?)
    }
}

/// Seconds, rounded to milliseconds.
pub(crate) fn in_seconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e3).round() / 1e3
}

/// The SHA-256 of a file; a known one is not computed again.
pub(crate) fn sha256_once(known: &mut BTreeMap<PathBuf, String>, path: &Path) -> Result<String> {
    if let Some(hash) = known.get(path) {
        return Ok(hash.clone());
    }
    let hash = sha256_of_file(path)?;
    known.insert(path.to_owned(), hash.clone());
    Ok(hash)
}
