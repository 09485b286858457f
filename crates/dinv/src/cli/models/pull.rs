//! `dinv models pull`: downloads models from the Hub into the cache.

use std::path::Path;

use clap::Args;
use difference_inversion::diffusion::frozen::ModelPaths;
use difference_inversion::hub::{self, Hub, ModelId, Wanted, joint_spaces, licence};
use serde_json::{Value, json};

use crate::cli::consent;
use crate::cli::locate::{self, DEMO, demo_model, name_of};
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
  dinv models pull sdxl --variant fp16
  dinv models pull owner/name@refs/pr/1")]
pub(crate) struct PullArgs {
    /// sd15, sd21, sdxl, sd3, sd35, sd35-large, flux-dev, flux-schnell, klein-base, klein, klein-base-9b, klein-9b, z-image, z-image-turbo, OWNER/NAME or OWNER/NAME@REVISION
    #[arg(value_name = "NAME", required = true)]
    names: Vec<String>,
    /// Variant of the weights, if there are several: fp16 is half the size
    #[arg(long, value_name = "NAME")]
    variant: Option<String>,
    /// Leave out T5, the largest text encoder of Stable Diffusion 3, which works without it
    #[arg(long)]
    without_t5: bool,
    /// Print the results as one JSON object
    #[arg(long)]
    json: bool,
    /// No progress, only errors and notes
    #[arg(long, short)]
    quiet: bool,
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
                let observe = &mut |progress: &_| watcher.observe(progress);
                let bytes = hub.survey(id, wanted_of(args), observe)?.bytes;
                consent::ask(&vec![(id.clone(), bytes)], &hub.cache, true, &mut watcher)?;
                let observe = &mut |progress: &_| watcher.observe(progress);
                let folder = hub.pull(id, wanted_of(args), observe)?;
                for other in also_needed(&hub, &folder)? {
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

/// The files wanted of every model.
fn wanted_of(args: &PullArgs) -> Wanted<'_> {
    Wanted {
        variant: args.variant.as_deref(),
        without_t5: args.without_t5,
        ..Wanted::default()
    }
}

/// The model of the Hub that a name stands for; `None` for the demo model, which is already there.
fn wanted(name: &str) -> anyhow::Result<Option<ModelId>> {
    if name == DEMO {
        return Ok(None);
    }
    let failure = || Failure::usage(format!("{name}: not a model of the Hub"));
    Ok(Some(
        name_of(name).ok_or_else(|| failure().hint(locate::hint(name)))?,
    ))
}

/// The joint spaces of the model in `folder` that are not on this disk.
fn also_needed(hub: &Hub, folder: &Path) -> anyhow::Result<Vec<ModelId>> {
    let paths = ModelPaths {
        model: folder.to_owned(),
        ..ModelPaths::default()
    };
    if paths.clip_folders().iter().any(|folder| folder.is_dir()) {
        return Ok(Vec::new());
    }
    let is_absent = |id: &ModelId| {
        let cached = hub.cached(id, None);
        cached.is_none_or(|model| !model.missing.is_empty())
    };
    let spaces = joint_spaces(&paths.files()?)?;
    Ok(spaces.into_iter().filter(is_absent).collect())
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
