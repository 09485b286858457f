//! `dinv first-run`: tries a model on known photographs, and reports on one page.

mod facts;
mod page;
mod parts;
mod photos;
mod report;

use std::collections::BTreeMap;
use std::fs;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use difference_inversion::Error;
use difference_inversion::diffusion::draw::TextToImage;
use difference_inversion::diffusion::family::Family;
use difference_inversion::diffusion::frozen::ModelPaths;
use difference_inversion::method::generate_config::AnalogyConfig;
use difference_inversion::util::files::Claim;
use difference_inversion::util::machine::{forget_peak_memory, peak_memory};
use dinv_eval::MeasurePaths;
use serde_json::{Value, json};

use self::parts::{Step, Trial};
use self::photos::{KINDS, Photos};
use self::report::{Found, JSON, Outcome, Part, Report};
use super::fetch::{Fetcher, Needs};
use super::flags::{General, ModelSettings, TimeFlag};
use super::record::{Recipe, groups, in_seconds, text_of};
use super::settings::Settings;
use super::terminal::{self, Failure};
use super::watch::{self, Watcher};
use super::{device, doctor};

/// The most steps of `--quick`: on the whole loss, on the CLIP loss, of drawing.
const QUICK_STEPS: usize = 10;
const QUICK_CLIP_STEPS: usize = 40;
const QUICK_DRAWING: usize = 8;
/// The largest side of `--quick`, in pixels.
const QUICK_SIDE: u64 = 256;

/// Try a model on known photographs, and report on one page
///
/// Checks the model's files, its networks and its tokenizer, as far as their numbers are known. Learns three edits of
/// photographs that come with the program (pencil, night, snow), applies each to two others, and undoes it. Measures
/// how near the results are to the true ones. The report is one file, report.html, to look at and to send.
///
/// What is done is kept: after an interruption or a failure, the same command continues. A part that fails is
/// shown on the page, and the other parts continue. Exits with 1 if a part failed or a value is not as expected.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  dinv first-run --model sd15 --dtype f16
  dinv first-run --model sd15 --dtype f16 --quick
  dinv first-run --model ~/stable-diffusion-v1-5 -o first-run-2")]
pub(crate) struct FirstRunArgs {
    /// Folder for the report, the pictures and the learned differences
    #[arg(long, short, value_name = "DIR", default_value = "first-run")]
    output: PathBuf,
    /// Fewer steps, and at most 256 pixels: for a machine without a GPU
    #[arg(long)]
    quick: bool,
    /// Start again, in place of the run in that folder
    #[arg(long, conflicts_with = "minutes")]
    overwrite: bool,
    /// Learn even if the memory is unlikely to suffice
    #[arg(long, hide_short_help = true)]
    no_memory_check: bool,
    /// DINO-v2 as a further metric, the folder of a transformers Dinov2Model [default: none]
    #[arg(long, value_name = "DIR", hide_short_help = true)]
    dino: Option<PathBuf>,
    /// LPIPS over VGG16 as a further metric, the lpips package's state_dict() saved as safetensors
    /// [default: none]
    #[arg(long, value_name = "FILE", hide_short_help = true)]
    lpips: Option<PathBuf>,
    #[command(flatten)]
    model: ModelSettings,
    #[command(flatten)]
    time: TimeFlag,
    #[command(flatten)]
    general: General,
}

/// The settings of a run, and where its model is.
struct Prepared {
    settings: ModelSettings,
    paths: ModelPaths,
    config: AnalogyConfig,
    drawing: TextToImage,
}

/// Does all parts that are not done.
pub(crate) fn run(args: &FirstRunArgs) -> anyhow::Result<()> {
    let photos = Photos::open()?;
    let given = args.general.settings(&[&args.model])?;
    check_folder(&args.output)?;
    fs::create_dir_all(&args.output).map_err(Error::io(&args.output))?;
    let Some(_claim) = Claim::on(&args.output.join(JSON))? else {
        let message = format!("another run writes to {}", args.output.display());
        return Err(Failure::temporary(message).into());
    };
    args.time.watch()?;
    let mut watcher = Watcher::new(args.general.quiet);
    let prepared = args.prepare(&given, &mut watcher)?;
    let Prepared {
        settings,
        paths,
        config,
        drawing,
    } = prepared;
    let recipe = Recipe::new("first-run", &settings, &paths, &groups(&config))?;
    let made_with = made_with(args, &settings, &recipe);
    if args.overwrite {
        clear(&args.output)?;
    }
    let mut report = match Report::continued(&args.output, &made_with)? {
        Some(report) => report,
        None => Report {
            made_with,
            machine: Value::Null,
            estimate: None,
            parts: Vec::new(),
        },
    };
    report.machine = machine(&settings)?;
    watcher.say(&format!("trying {}", settings.named()));
    watcher.notices(
        settings.is_demo().then(|| {
            "the demo model knows no photographs; `--model` names one that does".to_owned()
        }),
    );
    let mut trial = Trial {
        folder: &args.output,
        photos: &photos,
        settings: &settings,
        paths: &paths,
        config,
        drawing,
        measures: args.measures(),
        facts: parts::facts_of(&paths),
        recipe,
        estimate: report.estimate,
        open: None,
        opened_measures: None,
    };
    for step in Step::all(&KINDS) {
        let done = report.part(&step.name()).filter(|part| part.is_done());
        let known = done.map(|part| part.found.files.clone());
        // The files are read each time: another model in the same place is another run.
        if known.is_some() && step != Step::Files {
            continue;
        }
        if watch::stopping() {
            return Err(stopped().into());
        }
        let part = attempt(&mut trial, &step, args.general.quiet)?;
        let is_there = |file| part.found.files.contains(file);
        if part.is_done() && !known.iter().flatten().all(is_there) {
            return Err(other_files(&args.output).into());
        }
        report.put(part);
        report.estimate = trial.estimate;
        publish(&report, &photos, &args.output)?;
    }
    args.finish(&report)
}

impl FirstRunArgs {
    /// Finds or downloads the model, and settles the settings.
    fn prepare(&self, given: &Settings, watcher: &mut Watcher) -> anyhow::Result<Prepared> {
        let mut settings: ModelSettings = given.resolve()?;
        let mut fetcher = Fetcher::new(watcher, self.general.yes)?;
        let needs = |config: &AnalogyConfig| Needs::of_learning(true, config);
        let model = fetcher.model_of_words(&settings, needs(&given.clone().analogy()?))?;
        let with_model = given.clone().with_model(&model)?;
        let mut config = with_model.analogy()?;
        let mut drawing: TextToImage = with_model
            .with_drawing_of(settings.model.as_deref())
            .resolve()?;
        if self.quick {
            config.learn.steps = config.learn.steps.min(QUICK_STEPS);
            config.learn.clip_first = config.learn.clip_first.min(QUICK_CLIP_STEPS);
            let generate = &mut config.generate;
            generate.num_inference_steps = generate.num_inference_steps.min(QUICK_DRAWING);
            drawing.num_inference_steps = drawing.num_inference_steps.min(QUICK_DRAWING);
            if settings.resolution.is_none() {
                settings.resolution = smaller(&settings, &model)?;
            }
        }
        settings.check_loss(&model, &config.learn)?;
        let paths = fetcher.paths(&settings, model, needs(&config))?;
        if !self.no_memory_check {
            settings.check_memory(&paths, &config.learn, 1, false)?;
        }
        Ok(Prepared {
            settings,
            paths,
            config,
            drawing,
        })
    }

    fn measures(&self) -> MeasurePaths {
        MeasurePaths {
            dino: self.dino.clone(),
            lpips: self.lpips.clone(),
            ..MeasurePaths::default()
        }
    }

    /// Says where the page is, and whether something failed.
    fn finish(&self, report: &Report) -> anyhow::Result<()> {
        let page = self.output.join(page::PAGE);
        let [failed, off] = report.problems();
        if self.general.json {
            terminal::json(&json!({
                "page": text_of(&page),
                "report": text_of(self.output.join(JSON)),
                "parts": report.parts.len(),
                "failed": failed,
                "not_as_expected": off,
            }))?;
        } else {
            terminal::line(page.display())?;
        }
        if failed + off > 0 {
            let message = format!("{}: see {}", page::verdict(report), page.display());
            let hint = "the same command tries again what failed; send the page with your report";
            return Err(Failure::new(message).hint(hint).into());
        }
        if !self.general.quiet {
            terminal::message(format_args!("done: open {}", page.display()));
        }
        Ok(())
    }
}

/// Refuses a folder with something else in it.
fn check_folder(folder: &Path) -> anyhow::Result<()> {
    let is_ours = folder.join(JSON).is_file() || !folder.exists();
    if is_ours || difference_inversion::util::files::is_empty(folder) {
        return Ok(());
    }
    let message = format!(
        "{}: not empty, and not the folder of a first run",
        folder.display()
    );
    Err(Failure::usage(message)
        .hint("name another folder with `-o`")
        .into())
}

/// Removes what a run left.
fn clear(folder: &Path) -> anyhow::Result<()> {
    for name in [JSON, page::PAGE] {
        let path = folder.join(name);
        if path.is_file() {
            fs::remove_file(&path).map_err(Error::io(&path))?;
        }
    }
    for name in [parts::LEARNED, parts::PICTURES] {
        let path = folder.join(name);
        if path.is_dir() {
            fs::remove_dir_all(&path).map_err(Error::io(&path))?;
        }
    }
    Ok(())
}

/// The resolution of `--quick` for a model that draws larger pictures.
fn smaller(settings: &ModelSettings, model: &Path) -> anyhow::Result<Option<String>> {
    let quick = |larger: bool| larger.then(|| QUICK_SIDE.to_string());
    let files = settings.files_before_download(model)?;
    if let Some(recommended) = files.resolution() {
        let mut sides = recommended.into_iter().map(u64::from);
        return Ok(quick(sides.any(|side| side > QUICK_SIDE)));
    }
    let family = Family::of(&files)?;
    let trained_on = family.denoiser.config(&files)?.trained_on();
    let autoencoder: Value = files.config(family.autoencoder.part)?;
    let halvings = autoencoder["block_out_channels"]
        .as_array()
        .map_or(3, |blocks| blocks.len() - 1);
    let larger =
        trained_on.is_some_and(|sides| sides.iter().any(|side| side << halvings > QUICK_SIDE));
    Ok(quick(larger))
}

/// What determines the results, by names for people.
fn made_with(
    args: &FirstRunArgs,
    settings: &ModelSettings,
    recipe: &Recipe,
) -> BTreeMap<String, Value> {
    let values = [
        ("program", json!(recipe.program)),
        ("model", json!(recipe.model)),
        ("clip", json!(recipe.clip)),
        ("device", json!(recipe.device)),
        ("dtype", json!(recipe.dtype)),
        ("memory", json!(recipe.memory)),
        ("resolution", json!(settings.resolution)),
        ("quick", json!(args.quick)),
        ("dino", json!(args.dino.as_deref().map(text_of))),
        ("lpips", json!(args.lpips.as_deref().map(text_of))),
        ("settings", json!(recipe.settings)),
    ];
    values.map(|(name, value)| (name.to_owned(), value)).into()
}

/// The machine, as `dinv doctor` sees it, with its system and the name of its GPU.
fn machine(settings: &ModelSettings) -> anyhow::Result<Value> {
    let mut machine = serde_json::to_value(doctor::examine(settings))?;
    machine["system"] = json!(sysinfo::System::long_os_version());
    machine["architecture"] = json!(std::env::consts::ARCH);
    machine["adapter"] = json!(settings.place()?.adapter);
    Ok(machine)
}

/// Does one part. What goes wrong is its outcome; only a request to stop ends the run.
fn attempt(trial: &mut Trial<'_>, step: &Step, quiet: bool) -> anyhow::Result<Part> {
    let mut watcher = Watcher::new(quiet);
    watcher.say(&step.title());
    let mut found = Found::default();
    let started = Instant::now();
    forget_peak_memory();
    let done = caught(|| trial.work(step, &mut found, &mut watcher));
    let outcome = match done {
        Ok(()) => Outcome::Done,
        Err(_) if watch::stopping() => return Err(stopped().into()),
        Err(error) => Outcome::Failed {
            message: terminal::chain(&error),
            hint: terminal::hint(&error),
        },
    };
    let (times, notices) = watcher.finish();
    if let Outcome::Failed { message, .. } = &outcome {
        terminal::message(format_args!("failed: {}: {message}", step.title()));
    }
    Ok(Part {
        name: step.name(),
        title: step.title(),
        outcome,
        seconds: in_seconds(started.elapsed()),
        peak_memory: peak_memory(),
        stages: parts::by_name(times),
        notices,
        found,
    })
}

/// Runs `work`. A panic, which is a fault of the program or of a driver, is an error: the other parts go on.
fn caught(work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    match panic::catch_unwind(AssertUnwindSafe(|| device::with_memory_errors(work))) {
        Ok(done) => done,
        Err(payload) => {
            let said = device::said(payload.as_ref()).unwrap_or("no message");
            let hint =
                "this is a fault of the program or of a driver; send the page with your report";
            Err(Failure::new(format!("the part crashed: {said}"))
                .hint(hint)
                .into())
        }
    }
}

/// Writes the report and the page.
fn publish(report: &Report, photos: &Photos, folder: &Path) -> anyhow::Result<()> {
    report.write(folder)?;
    page::write(report, photos, folder)
}

/// The end of a run that was asked to stop.
fn stopped() -> Failure {
    Failure::interrupted("stopped: what is done is kept").hint("the same command continues")
}

/// The refusal to continue with another model in the same place.
fn other_files(folder: &Path) -> Failure {
    let message = format!(
        "{} holds a run with other files of the model",
        folder.display()
    );
    Failure::usage(message).hint("write elsewhere with `-o`, or add `--overwrite` to start again")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_that_breaks_down_is_an_error() {
        let error = caught(|| panic!("index out of bounds")).unwrap_err();
        assert_eq!(error.to_string(), "the part crashed: index out of bounds");
        let error = caught(|| panic!("wgpu error: Out of Memory")).unwrap_err();
        assert!(error.to_string().contains("too little memory"), "{error}");
        assert!(caught(|| Ok(())).is_ok());
    }
}
