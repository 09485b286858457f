//! `dinv caption`: what the captioner sees in pictures.

use std::path::PathBuf;

use clap::Args;
use difference_inversion::Error;
use difference_inversion::image::load_image;
use difference_inversion::util::progress::Stage;
use serde_json::json;

use super::fetch::{Fetcher, Needs};
use super::flags::{General, ModelSettings};
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
    /// The pictures
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
    for path in &args.images {
        load_image(path)?; // report what is wrong before the work
    }
    watch::catch_interrupts()?;
    let mut watcher = Watcher::new(args.general.quiet);
    let mut fetcher = Fetcher::new(&mut watcher)?;
    let model = fetcher.model(&models)?;
    let needs = Needs {
        joint_spaces: false,
        captioner: true,
    };
    let paths = fetcher.paths(&models, model, needs)?;
    watcher.notices(models.demo_notice());
    let models = models.open(&paths, &mut watcher)?;
    let mut captions = Vec::new();
    let mut stopped = Ok(());
    for (done, path) in args.images.iter().enumerate() {
        if watch::stopping() {
            stopped = Err(Error::Stopped {
                stage: Stage::Caption,
                done,
                total: args.images.len(),
                checkpoint: None,
            });
            break;
        }
        let caption = models.caption(&load_image(path)?)?;
        if args.general.json {
            captions.push(json!({ "image": text_of(path), "caption": caption }));
        } else if args.images.len() == 1 {
            terminal::line(caption)?;
        } else {
            terminal::line(format_args!("{}: {caption}", path.display()))?;
        }
    }
    if args.general.json {
        terminal::json(&json!({ "captions": captions }))?;
    }
    Ok(stopped?)
}
