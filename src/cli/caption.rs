//! `dinv caption`: what the captioner sees in pictures.

use std::path::PathBuf;

use clap::Args;
use difference_inversion::image::load_image;
use serde_json::json;

use super::fetch::{Fetcher, Needs};
use super::flags::{General, ModelSettings};
use super::report;
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
    let pictures = args
        .images
        .iter()
        .map(|path| load_image(path))
        .collect::<Result<Vec<_>, _>>()?;
    watch::catch_interrupts()?;
    let mut watcher = Watcher::new(args.general.quiet);
    let mut fetcher = Fetcher::new(&mut watcher)?;
    let model = fetcher.model(&models)?;
    let needs = Needs {
        joint_spaces: false,
        captioner: true,
    };
    let paths = fetcher.paths(&models, model, needs)?;
    let models = models.open(&paths, &mut watcher)?;
    let mut captions = Vec::new();
    for (path, picture) in args.images.iter().zip(&pictures) {
        let caption = models.caption(picture)?;
        if args.general.json {
            captions.push(json!({ "image": path, "caption": caption }));
        } else if args.images.len() == 1 {
            report::line(caption)?;
        } else {
            report::line(format_args!("{}: {caption}", path.display()))?;
        }
    }
    if args.general.json {
        report::json(&json!({ "captions": captions }))?;
    }
    Ok(())
}
