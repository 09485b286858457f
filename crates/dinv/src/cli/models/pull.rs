//! `dinv models pull`: downloads models from the Hub into the cache.

use std::path::{Path, PathBuf};

use clap::Args;
use difference_inversion::diffusion::family::Family;
use difference_inversion::diffusion::frozen::ModelPaths;
use difference_inversion::hub::{self, CAPTIONER, Hub, ModelId, Wanted, joint_spaces, licence};
use serde_json::{Value, json};

use crate::cli::consent;
use crate::cli::fetch;
use crate::cli::flags::Control;
use crate::cli::locate::{self, DEMO, Location, demo_model, name_of};
use crate::cli::record::text_of;
use crate::cli::terminal::{self, Failure};
use crate::cli::watch::{self, Watcher};

/// Download models from the Hugging Face Hub
///
/// Downloads only the files that are read, in one number format. Existing files are kept, and an
/// interrupted download resumes. Prints the folder of every model.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  dinv models pull sd15 openai/clip-vit-large-patch14
  dinv models pull sdxl --variant fp16 --all
  dinv models pull owner/name@refs/pr/1")]
pub(crate) struct PullArgs {
    /// sd15, sd21, sdxl, sd3, sd35, sd35-large, flux-dev, flux-schnell, chroma, klein-base, klein, klein-base-9b, klein-9b, z-image, z-image-turbo, OWNER/NAME or OWNER/NAME@REVISION
    #[arg(value_name = "NAME", required = true)]
    names: Vec<String>,
    /// Variant of the weights, if there are several: fp16 is half the size
    #[arg(long, value_name = "NAME")]
    variant: Option<String>,
    /// Leave out T5, the largest text encoder of Stable Diffusion 3, which works without it
    #[arg(long)]
    without_t5: bool,
    /// Also download what learning needs besides the model: its CLIP, and the captioner
    #[arg(long)]
    all: bool,
    /// Print the results as one JSON object
    #[arg(long)]
    json: bool,
    /// No progress, only errors and notes
    #[arg(long, short)]
    quiet: bool,
    #[command(flatten)]
    control: Control,
}

/// Downloads the models one after another.
pub(crate) fn run(args: &PullArgs) -> anyhow::Result<()> {
    let names = (args.names.iter())
        .map(|name| Ok((name.as_str(), wanted(name)?)))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let hub = Hub::from_env()?;
    watch::catch_interrupts()?;
    let mut watcher = Watcher::new(args.quiet);
    let mut pulled = Vec::new();
    for (name, id) in names {
        let folder = match &id {
            None => demo_model()?,
            Some(id) => {
                watcher.say(&format!("looking for {id} at {}", hub.endpoint));
                let folder = pull(&hub, id, wanted_of(args), &mut watcher)?;
                for other in also_needed(&hub, &folder, args.all)? {
                    if args.all {
                        pull(&hub, &other, Wanted::default(), &mut watcher)?;
                        continue;
                    }
                    watcher.notice(&format!(
                        "learning with {name} also needs {other}; `dinv models pull {other}` downloads it now"
                    ));
                }
                folder
            }
        };
        match args.json {
            true => pulled.push(describe(name, id.as_ref(), &folder)),
            false => terminal::line(folder.display())?,
        }
    }
    let (_, notices) = watcher.finish();
    match args.json {
        true => terminal::json(&json!({ "models": pulled, "notices": notices })),
        false => Ok(()),
    }
}

/// Downloads a model, unless it does not fit on the disk.
fn pull(
    hub: &Hub,
    id: &ModelId,
    wanted: Wanted<'_>,
    watcher: &mut Watcher,
) -> anyhow::Result<PathBuf> {
    let observe = &mut |progress: &_| watcher.observe(progress);
    let bytes = hub.survey(id, wanted, observe)?.bytes;
    consent::ask(&vec![(id.clone(), bytes)], &hub.cache, true, watcher)?;
    let observe = &mut |progress: &_| watcher.observe(progress);
    Ok(hub.pull(id, wanted, observe)?)
}

/// The files wanted of every model.
fn wanted_of(args: &PullArgs) -> Wanted<'_> {
    Wanted {
        variant: args.variant.as_deref(),
        without_t5: args.without_t5,
        ..Wanted::default()
    }
}

/// The model of the Hub that a name stands for; `None` for the demo model if it is already there.
fn wanted(name: &str) -> anyhow::Result<Option<ModelId>> {
    if name == DEMO {
        return Ok(match locate::demo()? {
            Location::Hub(id) => Some(id),
            Location::Disk(_) => None,
        });
    }
    let failure = || Failure::usage(format!("{name}: not a model of the Hub"));
    Ok(Some(
        name_of(name).ok_or_else(|| failure().hint(locate::hint(name)))?,
    ))
}

/// The models that learning on the model in `folder` needs and that are not on this disk: joint spaces, and the captioner
/// if asked for.
fn also_needed(hub: &Hub, folder: &Path, captioner: bool) -> anyhow::Result<Vec<ModelId>> {
    let paths = ModelPaths {
        model: folder.to_owned(),
        ..ModelPaths::default()
    };
    let files = paths.files()?;
    if Family::of(&files).is_err() || !fetch::learns(&files) {
        return Ok(Vec::new()); // such as a joint space
    }
    let mut needed = match paths.clip_folders().iter().any(|folder| folder.is_dir()) {
        true => Vec::new(),
        false => joint_spaces(&files)?,
    };
    if captioner && paths.captioner_folder().is_none() {
        needed.push(CAPTIONER.parse()?);
    }
    let is_absent = |id: &ModelId| {
        let cached = hub.cached(id, None);
        cached.is_none_or(|model| !model.missing.is_empty())
    };
    needed.retain(is_absent);
    Ok(needed)
}

fn describe(name: &str, id: Option<&ModelId>, folder: &Path) -> Value {
    let commit = hub::model_of(folder).map(|id| id.revision().to_owned());
    let licence = match id {
        Some(id) => licence(Some(folder), id.repository()),
        None => Some(env!("CARGO_PKG_LICENSE").to_owned()),
    };
    json!({
        "name": name,
        "id": id.map(ToString::to_string),
        "commit": commit,
        "folder": text_of(folder),
        "bytes": hub::size(folder),
        "licence": licence,
    })
}
