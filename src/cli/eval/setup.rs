//! What a run and its workers both need: the suite, the models, the networks of metrics.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use clap::Args;
use difference_inversion::analogy::{AnalogyConfig, ModelPaths};
use difference_inversion::eval::suite::Suite;
use difference_inversion::eval::{EvalModelPaths, EvalModels, Judge, MeasurePaths, Variant};
use serde::{Deserialize, Serialize};

use super::super::fetch::{Fetcher, Needs};
use super::super::flags::ModelSettings;
use super::super::locate;
use super::super::report::Failure;
use super::super::watch::Watcher;

/// The suites that come with the demo model, by the names they are called by.
const DEMO_SUITES: [&str; 2] = ["demo/validation", "demo/test"];
/// Methods that read no captions of the captioner's.
const WITHOUT_CAPTIONER: [&str; 5] = ["text-swap", "sdedit", "instruct-pix2pix", "visii", "dia"];

/// The U-Nets of the other models in the folder of a model that has them.
const INSTRUCT: &str = "unet_instruct_pix2pix";
const INPAINT: &str = "unet_inpaint";

/// Which suite.
#[derive(Debug, Clone, Args)]
pub(super) struct SuiteFlag {
    /// The suite: a folder with suite.json, a folder in the layout of InstructPix2Pix's data set, a
    /// .jsonl or .csv file, demo/validation or demo/test
    #[arg(long, value_name = "SUITE", default_value = DEMO_SUITES[0])]
    suite: PathBuf,
}

impl SuiteFlag {
    /// Where the suite is: a path that exists goes before a name.
    pub(super) fn path(&self) -> anyhow::Result<PathBuf> {
        let name = DEMO_SUITES
            .iter()
            .find(|name| self.suite == Path::new(name));
        let Some(name) = name.filter(|_| !self.suite.exists()) else {
            return Ok(self.suite.clone());
        };
        let path = benchmark()?.join(name.trim_start_matches("demo/"));
        match path.is_dir() {
            true => Ok(path),
            false => {
                let message = format!("{}: the demo suite is missing", path.display());
                Err(Failure::new(message)
                    .hint("give the folder of a suite")
                    .into())
            }
        }
    }
}

/// The folder of the demo suites and their judge, beside the demo model's.
fn benchmark() -> anyhow::Result<PathBuf> {
    let model = locate::demo_model()?;
    Ok(model.parent().unwrap_or(Path::new("..")).join("benchmark"))
}

/// The models beside the text-to-image model, and the networks of metrics.
#[derive(Debug, Clone, Default, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Model")]
pub(super) struct Further {
    /// The InstructPix2Pix model of the methods that need one [default: unet_instruct_pix2pix in
    /// the model's folder, with the rest of that model]
    #[arg(long, value_name = "MODEL")]
    instruct_model: Option<PathBuf>,
    /// The inpainting model of the methods that need one [default: unet_inpaint in the model's
    /// folder, with the rest of that model]
    #[arg(long, value_name = "MODEL")]
    inpaint_model: Option<PathBuf>,
    /// The judge that reads attributes from pictures [default: that of the demo suites, for suites
    /// with its attributes]
    #[arg(long, value_name = "FILE", help_heading = "Metrics")]
    judge: Option<PathBuf>,
    /// DINO-v2, the folder of a transformers Dinov2Model, such as facebook/dinov2-base [default: none]
    #[arg(long, value_name = "DIR", help_heading = "Metrics")]
    dino: Option<PathBuf>,
    /// LPIPS over VGG16, the lpips package's state_dict() saved as safetensors [default: none]
    #[arg(long, value_name = "FILE", help_heading = "Metrics")]
    lpips: Option<PathBuf>,
}

/// Everything a worker has to know, written to it by the run as one line of JSON.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Job {
    pub(super) suite: PathBuf,
    pub(super) output: PathBuf,
    pub(super) seed: u64,
    pub(super) models: ModelSettings,
    pub(super) further: Further,
    /// The settings of Difference Inversion for this model.
    pub(super) recommended: AnalogyConfig,
    /// The networks of metrics.
    pub(super) measures: MeasurePaths,
    /// SHA-256 of these.
    pub(super) measured_with: std::collections::BTreeMap<String, String>,
    pub(super) variant: Variant,
}

/// Where the models of all methods are; they are downloaded if need be.
pub(super) fn model_paths(
    fetcher: &mut Fetcher<'_>,
    settings: &ModelSettings,
    further: &Further,
    model: PathBuf,
    variants: &[Variant],
) -> anyhow::Result<EvalModelPaths> {
    let needs = Needs {
        joint_spaces: true,
        captioner: (variants.iter())
            .any(|variant| !WITHOUT_CAPTIONER.contains(&variant.method.as_str())),
    };
    let text_to_image = fetcher.paths(settings, model, needs)?;
    let mut other = |name: &Option<PathBuf>| -> anyhow::Result<Option<ModelPaths>> {
        let Some(name) = name else {
            return Ok(None);
        };
        let named = ModelSettings {
            model: Some(name.clone()),
            unet: None,
            ..settings.clone()
        };
        let model = fetcher.model(&named)?;
        // The joint space is that of the text-to-image model.
        let clip = text_to_image.clip_folders();
        let paths = ModelPaths {
            model,
            options: named.file_options()?,
            clip,
            captioner: Some(text_to_image.captioner_folder()),
        };
        Ok(Some(paths))
    };
    let instruct_pix2pix = other(&further.instruct_model)?;
    let inpainting = other(&further.inpaint_model)?;
    Ok(EvalModelPaths {
        instruct_pix2pix: instruct_pix2pix.or_else(|| text_to_image.with_unet(INSTRUCT)),
        inpainting: inpainting.or_else(|| text_to_image.with_unet(INPAINT)),
        text_to_image,
    })
}

/// The models of all methods, none of them opened yet.
pub(super) fn models(
    paths: EvalModelPaths,
    settings: &ModelSettings,
    recommended: AnalogyConfig,
) -> anyhow::Result<EvalModels> {
    let (device, dtype) = (settings.device()?, settings.dtype()?);
    let memory = settings.memory()?;
    Ok(EvalModels::new(paths, recommended, &device, dtype, memory))
}

/// Where the networks of metrics are: as given, or the demo suites' judge for a suite that tells
/// attributes, unless it does not know them; then that is noted.
pub(super) fn measure_paths(
    further: &Further,
    suite: &Suite,
    watcher: &mut Watcher,
) -> anyhow::Result<MeasurePaths> {
    Ok(MeasurePaths {
        judge: judge(further, suite, watcher)?,
        dino: further.dino.clone(),
        lpips: further.lpips.clone(),
    })
}

fn judge(
    further: &Further,
    suite: &Suite,
    watcher: &mut Watcher,
) -> anyhow::Result<Option<PathBuf>> {
    let mut told = (suite.entries.iter())
        .filter_map(|entry| entry.attributes.as_ref())
        .peekable();
    let path = match (&further.judge, told.peek()) {
        (Some(judge), _) => Some(judge.clone()),
        (None, Some(_)) => benchmark()
            .map(|folder| folder.join("judge.safetensors"))
            .ok()
            .filter(|path| path.is_file()),
        (None, None) => None,
    };
    let Some(path) = path else { return Ok(None) };
    let judge = Judge::open(&path, &Device::flex())?;
    let Some((name, value)) = told.find_map(|attributes| judge.unknown(attributes)) else {
        return Ok(Some(path));
    };
    let unknown = format!("the attribute `{name}` with the value `{value}`");
    if further.judge.is_some() {
        let message = format!(
            "{}: does not know {unknown}, which the suite tells",
            path.display()
        );
        let hint = "leave `--judge` out, or give a judge that was trained for this suite";
        return Err(Failure::new(message).hint(hint).into());
    }
    watcher.notice(&format!(
        "the demo suites' judge is left out, for it does not know {unknown}"
    ));
    Ok(None)
}
