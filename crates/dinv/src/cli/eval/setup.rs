//! The setup that a run and its workers share: the suite, the models, the networks of metrics.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use clap::Args;
use difference_inversion::diffusion::family::Family;
use difference_inversion::diffusion::frozen::ModelPaths;
use difference_inversion::diffusion::joint_space::FOLDERS;
use difference_inversion::hub::joint_spaces;
use difference_inversion::method::generate_config::AnalogyConfig;
use dinv_eval::suite::Suite;
use dinv_eval::{EvalModelPaths, EvalModels, Judge, MeasurePaths, Variant};
use serde::{Deserialize, Serialize};

use super::super::fetch::{Fetcher, Needs};
use super::super::flags::ModelSettings;
use super::super::locate::{self, PHOTOS};
use super::super::terminal::Failure;
use super::super::watch::Watcher;

/// The names of the suites that come with the demo model, each with its folder.
const SUITES: [(&str, &str); 3] = [
    ("demo/validation", "validation"),
    ("demo/test", "test"),
    (PHOTOS, PHOTOS),
];
/// Methods that do not use the captioner.
const WITHOUT_CAPTIONER: [&str; 5] = ["text-swap", "sdedit", "instruct-pix2pix", "visii", "dia"];
/// The method that needs the joint space of an InstructPix2Pix model.
const VISII: &str = "visii";

/// The other models' U-Nets in the folder of a model that has them.
const INSTRUCT: &str = "unet_instruct_pix2pix";
const INPAINT: &str = "unet_inpaint";

/// Which suite.
#[derive(Debug, Clone, Args)]
pub(super) struct SuiteFlag {
    /// The suite: a folder with suite.json, a folder in the layout of InstructPix2Pix's data set, a
    /// .jsonl or .csv file, demo/validation or demo/test, or photos
    #[arg(long, value_name = "SUITE", default_value = SUITES[0].0)]
    suite: PathBuf,
}

impl SuiteFlag {
    /// The path of the suite: an existing path overrides a name.
    pub(super) fn path(&self) -> anyhow::Result<PathBuf> {
        let mut suites = SUITES.iter();
        match suites.find(|(name, _)| self.suite == Path::new(name)) {
            Some((_, folder)) if !self.suite.exists() => locate::suite(folder),
            _ => Ok(self.suite.clone()),
        }
    }
}

/// The models besides the text-to-image model, and the networks of metrics.
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
    /// CLIP of the metrics, the folder of a transformers CLIPModel [default: the model's; the demo model's if the
    /// model has none and the demo suites' judge measures]
    #[arg(long, value_name = "DIR", help_heading = "Metrics")]
    metric_clip: Option<PathBuf>,
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

/// Everything that a worker needs to know; the run sends it as one line of JSON.
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
    /// SHA-256 of these networks.
    pub(super) measured_with: BTreeMap<String, String>,
    /// What determines the results of the method.
    pub(super) made_with: BTreeMap<String, String>,
    pub(super) variant: Variant,
}

/// What the methods need in addition to the text-to-image model.
pub(super) fn needs(variants: &[Variant]) -> Needs {
    let mut methods = variants.iter().map(|variant| variant.method.as_str());
    Needs {
        joint_spaces: true,
        captioner: methods.any(|method| !WITHOUT_CAPTIONER.contains(&method)),
        ..Needs::default()
    }
}

/// The paths of the models of all methods, which are downloaded if necessary.
pub(super) fn model_paths(
    fetcher: &mut Fetcher<'_>,
    settings: &ModelSettings,
    further: &Further,
    model: PathBuf,
    variants: &[Variant],
) -> anyhow::Result<EvalModelPaths> {
    let any = |is: &dyn Fn(&str) -> bool| variants.iter().any(|variant| is(&variant.method));
    let text_to_image = fetcher.paths(settings, model, needs(variants))?;
    let mut other = |name: &Option<PathBuf>, joint_spaces| {
        let needs = Needs {
            joint_spaces,
            ..Needs::default()
        };
        let name = name.as_deref();
        name.map(|name| other_paths(fetcher, settings, name, needs, &text_to_image))
            .transpose()
    };
    let instruct_pix2pix = other(&further.instruct_model, any(&|method| method == VISII))?;
    let inpainting = other(&further.inpaint_model, false)?;
    Ok(EvalModelPaths {
        instruct_pix2pix: instruct_pix2pix.or_else(|| text_to_image.with_unet(INSTRUCT)),
        inpainting: inpainting.or_else(|| text_to_image.with_unet(INPAINT)),
        text_to_image,
    })
}

/// The paths of a model other than the text-to-image model, with the latter's captioner. It may be of
/// another family: it uses its own joint space, unless that of the text-to-image model belongs to it
/// too.
fn other_paths(
    fetcher: &mut Fetcher<'_>,
    settings: &ModelSettings,
    name: &Path,
    needs: Needs,
    text_to_image: &ModelPaths,
) -> anyhow::Result<ModelPaths> {
    let mut settings = of_other(settings, name);
    let model = fetcher.model(&settings, needs)?;
    let alone = ModelPaths {
        model: model.clone(),
        options: settings.file_options_of(&model)?,
        ..ModelPaths::default()
    };
    let is_there = |folder: &PathBuf| folder.is_dir();
    if !alone.clip_folders().iter().any(is_there) {
        let of_text_to_image = text_to_image.clip_folders();
        let known = joint_spaces(&alone.files()?)?;
        let same = known.is_empty() || known == joint_spaces(&text_to_image.files()?)?;
        let there = same && of_text_to_image.iter().all(is_there);
        settings.clip = there.then_some(of_text_to_image);
    }
    let paths = fetcher.paths(&settings, model, needs)?;
    Ok(ModelPaths {
        captioner: Some(text_to_image.captioner_place()),
        ..paths
    })
}

/// The settings for another model: those of its device and picture size. The rest determine how the files of
/// the text-to-image model are interpreted.
fn of_other(settings: &ModelSettings, name: &Path) -> ModelSettings {
    ModelSettings {
        model: Some(name.to_owned()),
        resolution: settings.resolution.clone(),
        device: settings.device.clone(),
        dtype: settings.dtype.clone(),
        memory: settings.memory.clone(),
        ..ModelSettings::default()
    }
}

/// The models of all methods, none of them opened yet.
pub(super) fn models(
    paths: EvalModelPaths,
    settings: &ModelSettings,
    recommended: AnalogyConfig,
) -> anyhow::Result<EvalModels> {
    let (device, dtype) = (settings.device()?, settings.dtype()?);
    Ok(EvalModels::new(paths, recommended, &device, dtype))
}

/// The paths of the networks of metrics: as given, or the demo suites' judge for a suite that states
/// attributes. If it does not know them, it is omitted with a note. Where the judge measures, the demo model's CLIP
/// stands in for that of a `model` that has none.
pub(super) fn measure_paths(
    further: &Further,
    suite: &Suite,
    model: &ModelPaths,
    watcher: &mut Watcher,
) -> anyhow::Result<MeasurePaths> {
    let judge = judge(further, suite, watcher)?;
    let mut clip = further.metric_clip.clone();
    let family = Family::of(&model.files()?)?;
    if clip.is_none() && !family.has_joint_space() {
        let of_demo = || locate::demo_model().map(|folder| folder.join(FOLDERS[0]));
        clip = (judge.as_ref().and_then(|_| of_demo().ok())).filter(|folder| folder.is_dir());
        if clip.is_none() {
            watcher.notice(&format!(
                "CLIP's metrics are left out, since a {} has no CLIP: give one with `--metric-clip`",
                family.class
            ));
        }
    }
    Ok(MeasurePaths {
        clip,
        judge,
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
        (None, Some(_)) => locate::benchmark()
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
            "{}: does not know {unknown}, which the suite states",
            path.display()
        );
        let hint = "leave `--judge` out, or give a judge that was trained for this suite";
        return Err(Failure::input(message).hint(hint).into());
    }
    watcher.notice(&format!(
        "the demo suites' judge is left out, since it does not know {unknown}"
    ));
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use difference_inversion::diffusion::model_files::FileOptions;
    use difference_inversion::models::captioner::CaptionerPlace;
    use difference_inversion::models::denoiser::Memory;

    use super::*;

    /// The folder of a model that has a text encoder of this width and number of layers.
    fn model(place: &Path, name: &str, (width, layers, act): (usize, usize, &str)) -> PathBuf {
        let folder = place.join(name);
        fs::create_dir_all(folder.join("text_encoder")).unwrap();
        let config = format!(
            r#"{{"hidden_size": {width}, "num_hidden_layers": {layers}, "hidden_act": "{act}"}}"#
        );
        fs::write(folder.join("text_encoder/config.json"), config).unwrap();
        fs::write(folder.join("model_index.json"), "{}").unwrap();
        folder
    }

    const SD_1: (usize, usize, &str) = (768, 12, "quick_gelu");
    const SD_2: (usize, usize, &str) = (1024, 23, "gelu");
    const TINY: (usize, usize, &str) = (32, 3, "gelu");

    #[test]
    fn what_is_said_of_the_text_to_image_model_is_not_said_of_others() {
        let place = tempfile::tempdir().unwrap();
        let ours = model(place.path(), "ours", SD_2);
        let theirs = model(place.path(), "theirs", SD_1);
        let text = |text: &str| Some(text.to_owned());
        let settings = ModelSettings {
            model: Some(ours.clone()),
            family: text("sd2"),
            prediction_type: text("v_prediction"),
            timestep_spacing: text("trailing"),
            zero_snr: Some(true),
            variant: text("fp16"),
            tokenizer: Some(ours.join("tokenizer")),
            unet: Some(ours.join("unet")),
            text_encoder: None,
            clip: Some(vec![ours.join("clip")]),
            captioner: Some(ours.join("captioner")),
            resolution: text("256"),
            device: text("cpu"),
            dtype: text("q8"),
            memory: text("low"),
            without_t5: None,
            preview_vae: None,
            vae: Some(ours.join("vae")),
            lora: Some(vec!["style.safetensors:0.5".to_owned()]),
            embedding: Some(vec!["cat.safetensors".to_owned()]),
            clip_skip: Some(1),
            max_sequence_length: Some(77),
        };
        let other = of_other(&settings, &theirs);
        assert_eq!(other.model.as_ref(), Some(&theirs));
        let options = FileOptions {
            resolution: Some([256, 256]),
            q8: true,
            memory: Memory::Low,
            ..FileOptions::default()
        };
        assert_eq!(other.file_options().unwrap(), options);
        let runs = [&other.device, &other.dtype, &other.memory];
        assert_eq!(runs, [&text("cpu"), &text("q8"), &text("low")]);
        assert_eq!((other.clip, other.captioner), (None, None));
    }

    #[test]
    fn a_model_beside_the_text_to_image_model_has_a_joint_space_that_belongs_to_it() {
        let place = tempfile::tempdir().unwrap();
        let joint_space_of = |ours: (usize, usize, &str), theirs, own: bool| {
            let ours = model(place.path(), "ours", ours);
            let theirs = model(place.path(), "theirs", theirs);
            fs::create_dir_all(ours.join("clip")).unwrap();
            let own_clip = theirs.join("clip");
            if own {
                fs::create_dir_all(own_clip).unwrap();
            } else if own_clip.is_dir() {
                fs::remove_dir(own_clip).unwrap();
            }
            let settings = ModelSettings {
                model: Some(ours.clone()),
                ..ModelSettings::default()
            };
            let further = Further {
                instruct_model: Some(theirs),
                ..Further::default()
            };
            let mut watcher = Watcher::new(true);
            let mut fetcher = Fetcher::looking_only(&mut watcher).unwrap();
            let variants = [Variant::plain(VISII)];
            let paths = model_paths(&mut fetcher, &settings, &further, ours, &variants);
            let paths = paths.unwrap().instruct_pix2pix.unwrap();
            assert_eq!(
                paths.captioner,
                Some(CaptionerPlace::Folder(
                    place.path().join("ours").join("captioner")
                ))
            );
            paths.clip_folders()
        };
        let [ours, theirs] =
            ["ours", "theirs"].map(|name| vec![place.path().join(name).join("clip")]);
        assert_eq!(joint_space_of(SD_1, SD_1, true), theirs);
        assert_eq!(joint_space_of(SD_1, SD_1, false), ours);
        assert_eq!(joint_space_of(TINY, TINY, false), ours);
        // From the Hub, or from where it would be downloaded to.
        assert_ne!(joint_space_of(SD_2, SD_1, false), ours);
    }
}
