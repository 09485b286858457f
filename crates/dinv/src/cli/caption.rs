//! `dinv caption`: describes pictures with the captioner.

use std::path::PathBuf;

use clap::Args;
use difference_inversion::Error;
use difference_inversion::util::progress::Stage;
use serde_json::json;

use super::demo_world;
use super::fetch::{Fetcher, Needs};
use super::flags::{General, ModelSettings};
use super::pictures;
use super::record::text_of;
use super::terminal;
use super::watch::{self, Watcher};

/// Describe pictures in words
///
/// Prints the caption that `dinv analogy` would use; of several pictures, with their names.
#[derive(Debug, Args)]
#[command(after_help = "Example:
  dinv caption street.jpg")]
pub(crate) struct CaptionArgs {
    /// The pictures; a folder stands for the pictures in it
    #[arg(value_name = "IMAGE", required = true)]
    images: Vec<PathBuf>,
    #[command(flatten)]
    model: ModelSettings,
    #[command(flatten)]
    general: General,
}

/// Captions every picture.
pub(crate) fn run(args: &CaptionArgs) -> anyhow::Result<()> {
    let models: ModelSettings = args.general.settings(&[&args.model])?.resolve()?;
    let images = pictures::in_folders(&args.images)?;
    watch::catch_interrupts()?;
    let mut watcher = Watcher::new(args.general.quiet);
    let pictures = pictures::check(images.iter().map(PathBuf::as_path), &mut watcher)?;
    let mut fetcher = Fetcher::new(&mut watcher, args.general.yes)?;
    let needs = Needs {
        captioner: true,
        ..Needs::default()
    };
    let model = fetcher.model(&models, needs)?;
    let paths = fetcher.paths(&models, model, needs)?;
    let chosen = models;
    let models = chosen.open(&paths, &mut watcher)?;
    watcher.notices(demo_world::of_first(&chosen, models.pipeline(), &pictures)?);
    let mut captions = Vec::new();
    let mut stopped = Ok(());
    for (done, picture) in pictures.iter().enumerate() {
        if watch::stopping() {
            stopped = Err(Error::Stopped {
                stage: Stage::Caption,
                done,
                total: pictures.len(),
                checkpoint: None,
            });
            break;
        }
        watcher.count("captions", done, pictures.len());
        let caption = models.caption(&picture.read()?)?;
        if args.general.json {
            captions.push(json!({ "image": text_of(picture.path), "caption": caption }));
        } else if pictures.len() == 1 {
            watcher.result(caption)?;
        } else {
            watcher.result(format_args!("{}: {caption}", picture.path.display()))?;
        }
    }
    watcher.finish();
    if args.general.json {
        terminal::json(&json!({ "captions": captions }))?;
    }
    Ok(stopped?)
}
