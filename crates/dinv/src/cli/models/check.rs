//! `dinv models check`: checks that a model loads and computes.

use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::tensor::{DType, Device, FloatDType, Tensor};
use clap::Args;
use clap::builder::PossibleValuesParser;
use difference_inversion::diffusion::frozen::ModelPaths;
use difference_inversion::diffusion::joint_space;
use difference_inversion::diffusion::joint_space::JointSpace;
use difference_inversion::diffusion::model_files::layout::Layout;
use difference_inversion::diffusion::pipeline::Pipeline;
use difference_inversion::diffusion::words::{FullPrompt, Prompt};
use difference_inversion::image::RgbImage;
use difference_inversion::models::captioner::Captioner;
use difference_inversion::weights::{Weights, read_config};
use difference_inversion::{Error, about};
use serde::Serialize;
use serde_json::{Value, json};

use crate::cli::device::DEVICES;
use crate::cli::fetch::{Fetcher, Needs};
use crate::cli::flags::{DTYPES, ModelSettings};
use crate::cli::record::text_of;
use crate::cli::terminal::{self, Failure};
use crate::cli::watch::Watcher;

/// Side of the test picture, whatever size the model was trained on.
const SIDE: u32 = 256;
/// The timestep at which the denoiser is called.
pub(crate) const TIMESTEP: f64 = 500.0;

/// Load a model and see that it computes
///
/// Loads every network, encodes a text, sends a picture through the autoencoder and back, and calls
/// the denoiser once, at 256×256 pixels; of a CLIP or a captioner, what those do. Prints shapes,
/// parameters and times. Exits with 1 if anything fails or is not a finite number. Downloads
/// nothing.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  dinv models check demo
  dinv models check ~/stable-diffusion-v1-5 --dtype f16")]
pub(crate) struct CheckArgs {
    /// A folder, a single file, or the name of a model that was downloaded
    #[arg(value_name = "MODEL")]
    name: PathBuf,
    /// The family of a single file [default: as recognised]
    #[arg(long, value_parser = PossibleValuesParser::new(Layout::names()))]
    family: Option<String>,
    /// What the U-Net predicts [default: as the model says]
    #[arg(long, value_parser = ["epsilon", "v_prediction", "sample"])]
    prediction_type: Option<String>,
    /// The variant of a folder's weights, such as fp16 [default: the plain ones, else fp16]
    #[arg(long, value_name = "NAME")]
    variant: Option<String>,
    /// The vocabulary of a single file: a folder, or a model of the Hub [default: that of --clip]
    #[arg(long, value_name = "DIR")]
    tokenizer: Option<PathBuf>,
    /// Another U-Net in place of the model's own: a folder, or a file of weights
    #[arg(long, value_name = "PATH")]
    unet: Option<PathBuf>,
    #[arg(long, help = about!(model.vae), value_name = "PATH")]
    vae: Option<PathBuf>,
    #[arg(long, help = about!(model.preview_vae), value_name = "PATH")]
    preview_vae: Option<PathBuf>,
    #[arg(long, help = about!(model.lora), value_name = "FILE[:WEIGHT]")]
    lora: Option<Vec<String>>,
    #[arg(long, help = about!(model.embedding), value_name = "[NAME=]FILE")]
    embedding: Option<Vec<String>>,
    /// The joint space: a folder or a name of the Hub, once for each text encoder
    #[arg(long, value_name = "MODEL")]
    clip: Option<Vec<PathBuf>>,
    /// Where the model runs [default: auto]
    #[arg(long, value_parser = DEVICES)]
    device: Option<String>,
    /// Number format of the weights [default: f32]
    #[arg(long, value_parser = DTYPES)]
    dtype: Option<String>,
    /// Print the results as one JSON object
    #[arg(long)]
    json: bool,
}

/// One check.
#[derive(Debug, Serialize)]
pub(crate) struct Check {
    pub(crate) part: &'static str,
    /// Its result, or its error.
    pub(crate) outcome: Result<String, String>,
    pub(crate) seconds: f64,
    /// Parameters of the network.
    pub(crate) parameters: Option<u64>,
}

/// Checks a model.
pub(crate) fn run(args: &CheckArgs) -> anyhow::Result<()> {
    let settings = ModelSettings {
        model: Some(args.name.clone()),
        family: args.family.clone(),
        prediction_type: args.prediction_type.clone(),
        variant: args.variant.clone(),
        tokenizer: args.tokenizer.clone(),
        unet: args.unet.clone(),
        vae: args.vae.clone(),
        preview_vae: args.preview_vae.clone(),
        lora: args.lora.clone(),
        embedding: args.embedding.clone(),
        clip: args.clip.clone(),
        device: args.device.clone(),
        dtype: args.dtype.clone(),
        ..ModelSettings::default()
    };
    let mut watcher = Watcher::new(true);
    let mut fetcher = Fetcher::looking_only(&mut watcher)?;
    let folder = fetcher.model(&settings, Needs::default())?;
    let alone = ModelPaths {
        model: folder.clone(),
        options: settings.file_options_of(&folder)?,
        ..ModelPaths::default()
    };
    // An invalid single file is reported by its check.
    let paths = (fetcher.paths(&settings, folder, Needs::default())).unwrap_or(alone);
    let of_vocabulary = fetcher.absent.first().map(ToString::to_string);
    let checker = Checker {
        device: settings.device()?,
        dtype: settings.dtype()?,
        silent: args.json,
    };
    let checks = checker.all(&paths)?;
    let failed = checks.iter().filter(|check| check.outcome.is_err()).count();
    if args.json {
        terminal::json(&json!({
            "model": text_of(&args.name),
            "folder": text_of(&paths.model),
            "device": settings.device_name(),
            "dtype": settings.dtype_name(),
            "checks": checks,
            "ok": failed == 0,
        }))?;
    }
    if failed == 0 {
        return Ok(());
    }
    let name = args.name.display();
    let failure = Failure::new(format!(
        "{name}: {failed} of {} checks failed",
        checks.len()
    ));
    Err(match of_vocabulary {
        Some(id) => failure.hint(format!(
            "`dinv models pull {id}` downloads the vocabulary of a single file"
        )),
        None if args.name.exists() => failure,
        None => failure.hint("`dinv models pull` downloads what is missing of a model of the Hub"),
    }
    .into())
}

/// The configuration of the checks.
pub(crate) struct Checker {
    pub(crate) device: Device,
    pub(crate) dtype: FloatDType,
    /// Whether to print nothing about each check.
    pub(crate) silent: bool,
}

impl Checker {
    /// Runs every check that applies to the kind of model in `folder`.
    pub(crate) fn all(&self, paths: &ModelPaths) -> anyhow::Result<Vec<Check>> {
        let folder = &paths.model;
        let kind = match folder.join("config.json") {
            path if path.is_file() => read_config::<Value>(&path)?["model_type"].clone(),
            _ => Value::Null,
        };
        match kind.as_str() {
            Some("clip") => self.joint_space(folder),
            Some(_) => self.captioner(folder),
            None => {
                let mut checks = self.pipeline(paths)?;
                for name in joint_space::FOLDERS {
                    if folder.join(name).is_dir() {
                        checks.extend(self.joint_space(&folder.join(name))?);
                    }
                }
                if folder.join("captioner").is_dir() {
                    checks.extend(self.captioner(&folder.join("captioner"))?);
                }
                Ok(checks)
            }
        }
    }

    fn pipeline(&self, paths: &ModelPaths) -> anyhow::Result<Vec<Check>> {
        let mut checks = Vec::new();
        let opened = self.attempt(&mut checks, "pipeline", Vec::new(), || {
            let open = |resolution| {
                let mut paths = paths.clone();
                paths.options.resolution = resolution;
                let files = paths.files()?;
                let pipeline = Pipeline::open(&files, &self.device, self.dtype)?;
                Ok((files, pipeline))
            };
            let (files, pipeline) = match open(Some([SIDE; 2])) {
                Err(Error::Setting {
                    name: "resolution", ..
                }) => open(None)?, // it draws smaller ones only
                opened => opened?,
            };
            Ok(("loaded".to_owned(), (files, pipeline)))
        })?;
        let Some((files, pipeline)) = opened else {
            return Ok(checks);
        };
        let weights = |name: &str| files.weights(name, &self.device, self.dtype);
        let family = pipeline.family();
        let encoders = family.encoders_in(&files)?;
        let encoders = encoders.iter().map(|encoder| weights(encoder.part));
        let encoders = encoders.collect();
        let first = family.text_encoders[0].part;
        let conditions = self.attempt(&mut checks, first, encoders, || {
            let words = pipeline.read(&Prompt::default(), 0)?;
            let conditions = pipeline.encode_prompts(&[FullPrompt::plain(&words)])?;
            let states = conditions.context.clone();
            Ok((finite("hidden states", states)?, conditions))
        })?;
        let [height, width] = pipeline.resolution();
        let picture = || picture(width, height);
        let vae = family.autoencoder.part;
        self.attempt(&mut checks, vae, vec![weights(vae)], || {
            let picture = picture();
            let latents = pipeline.encode_image(&picture);
            let shape = finite("latents", latents.clone())?;
            let decoded = pipeline.decode(latents)?;
            let error = mean_difference(&picture, &decoded);
            let done = format!("{shape}, a picture comes back {error:.1} of 255 away");
            Ok((done, ()))
        })?;
        if let Some(conditions) = conditions {
            let denoiser = family.denoiser.part;
            self.attempt(&mut checks, denoiser, vec![weights(denoiser)], || {
                let picture = picture();
                let image = family.takes_picture().then_some(&picture);
                let shown = pipeline.show(image, family.takes_mask().then_some(&picture))?;
                let conditions = match shown {
                    Some(image) => conditions.with_image(image),
                    None => conditions,
                };
                let latents = latents(pipeline.latent_shape(), &self.device);
                let prediction = pipeline.predict(latents, &[TIMESTEP], &conditions);
                Ok((finite("prediction", prediction)?, ()))
            })?;
        }
        Ok(checks)
    }

    pub(crate) fn joint_space(&self, folder: &Path) -> anyhow::Result<Vec<Check>> {
        let mut checks = Vec::new();
        self.attempt(&mut checks, "clip", vec![self.weights(folder)], || {
            let joint = JointSpace::open(folder, &self.device, self.dtype)?;
            let image = joint.image_features(&picture(SIDE, SIDE))?;
            let text = joint.text_features(&Prompt::default())?;
            let cosine: f32 = image.iter().zip(&text).map(|(x, y)| x * y).sum();
            anyhow::ensure!(cosine.is_finite(), "features are not finite");
            Ok((format!("features [{}]", image.len()), ()))
        })?;
        Ok(checks)
    }

    fn captioner(&self, folder: &Path) -> anyhow::Result<Vec<Check>> {
        let mut checks = Vec::new();
        self.attempt(&mut checks, "captioner", vec![self.weights(folder)], || {
            let captioner = Captioner::open(folder, &self.device, self.dtype)?;
            let caption = captioner.caption(&picture(SIDE, SIDE), &Default::default())?;
            Ok((format!("it sees \"{caption}\""), ()))
        })?;
        Ok(checks)
    }

    /// Runs one check, times it, and reports it.
    fn attempt<T>(
        &self,
        checks: &mut Vec<Check>,
        part: &'static str,
        weights: Vec<Result<Weights, Error>>,
        work: impl FnOnce() -> anyhow::Result<(String, T)>,
    ) -> anyhow::Result<Option<T>> {
        let started = Instant::now();
        let (outcome, value) = match work() {
            Ok((outcome, value)) => (Ok(outcome), Some(value)),
            Err(error) => (Err(format!("{error:#}")), None),
        };
        let check = Check {
            part,
            outcome,
            seconds: (started.elapsed().as_secs_f64() * 1e3).round() / 1e3,
            parameters: count(weights),
        };
        if !self.silent {
            let parameters = check
                .parameters
                .map(|count| format!("{count} parameters, "));
            let (state, outcome) = match &check.outcome {
                Ok(outcome) => ("ok", outcome),
                Err(reason) => ("FAILED", reason),
            };
            terminal::line(format_args!(
                "{part:<13} {state:<7} {}{outcome} ({:.2} s)",
                parameters.unwrap_or_default(),
                check.seconds
            ))?;
        }
        checks.push(check);
        Ok(value)
    }

    fn weights(&self, folder: &Path) -> Result<Weights, Error> {
        Weights::open(folder, &self.device, self.dtype)
    }
}

/// The number of parameters of some networks; unknown if one cannot be opened. Some files hold the numbers of the
/// positions beside them, which are none.
fn count(weights: Vec<Result<Weights, Error>>) -> Option<u64> {
    let mut count = None;
    for weights in weights {
        let weights = weights.ok()?;
        let names = weights
            .keys()
            .filter(|name| !name.ends_with("position_ids"));
        let shapes = names.filter_map(|name| weights.shape(name));
        let sizes = shapes.map(|shape| shape.iter().map(|side| *side as u64).product::<u64>());
        *count.get_or_insert(0) += sizes.sum::<u64>();
    }
    count
}

/// The shape of a tensor whose values must all be finite.
pub(crate) fn finite<const D: usize>(what: &str, tensor: Tensor<D>) -> anyhow::Result<String> {
    let shape = tensor.dims();
    let sum = tensor.cast(DType::F32).abs().sum().into_scalar::<f32>();
    anyhow::ensure!(
        sum.is_finite(),
        "{what} {shape:?}: not all of them are finite"
    );
    Ok(format!("{what} {shape:?}"))
}

/// A picture with smooth colours and an edge.
fn picture(width: u32, height: u32) -> RgbImage {
    let byte = |value: u32| u8::try_from(value.min(255)).unwrap_or(u8::MAX);
    RgbImage::from_fn(width, height, |x, y| {
        let blue = if x + y < width { 60 } else { 200 };
        image::Rgb([byte(x), byte(y), blue])
    })
}

/// Deterministic values of about the magnitude of noise.
pub(crate) fn latents(shape: [usize; 4], device: &Device) -> Tensor<4> {
    let count = shape.iter().product();
    #[expect(clippy::cast_precision_loss, reason = "any number will do")]
    let values: Vec<f32> = (0..count)
        .map(|i| 1.4 * (12.9898 * i as f32).sin())
        .collect();
    Tensor::<1>::from_data(values.as_slice(), device).reshape(shape)
}

/// The mean absolute difference of two pictures' values.
fn mean_difference(one: &RgbImage, other: &RgbImage) -> f64 {
    let pairs = one.as_raw().iter().zip(other.as_raw());
    let sum: f64 = pairs.map(|(x, y)| f64::from(x.abs_diff(*y))).sum();
    sum / f64::from(one.width() * one.height() * 3)
}
