//! `dinv import`: a textual inversion of another program as a difference.

use std::path::{Path, PathBuf};

use clap::Args;
use difference_inversion::method::difference::DifferenceTokens;
use serde_json::json;

use super::fetch::{Fetcher, Needs};
use super::flags::{General, ModelSettings};
use super::learn;
use super::output::{Kind, Outputs};
use super::record::{Recipe, file_name, text_of};
use super::settings::ErasedFlags;
use super::terminal::{self, Failure};
use super::watch::{self, Watcher};

/// Turn a textual inversion into a difference
///
/// The word's vectors follow the prompt of B as difference tokens do. Reads the files of A1111, ComfyUI, diffusers, InvokeAI
/// and kohya's scripts, and what `dinv export` wrote.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  dinv import ghibli.safetensors --model sd15 -o ghibli-difference.safetensors
  dinv import x.clip_l.safetensors x.clip_g.safetensors --model sdxl -o x.safetensors")]
pub(crate) struct ImportArgs {
    /// The textual inversion; for two text encoders one file or two
    #[arg(value_name = "FILE", required = true)]
    words: Vec<PathBuf>,
    /// File for the difference
    #[arg(
        long,
        short,
        value_name = "FILE",
        default_value = "difference.safetensors"
    )]
    output: PathBuf,
    /// Replace the file if it exists
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    model: ModelSettings,
    #[command(flatten)]
    general: General,
}

/// The settings of the model on which its text encoders depend.
const READ: [&str; 10] = [
    "model",
    "family",
    "variant",
    "tokenizer",
    "text_encoder",
    "lora",
    "clip",
    "clip_skip",
    "without_t5",
    "device",
];

impl ImportArgs {
    /// Notes about given settings that change nothing.
    fn unread(&self) -> anyhow::Result<impl Iterator<Item = String>> {
        let given = ErasedFlags::values(&self.model)?.into_iter();
        let unread = given.filter(|(name, _)| !READ.contains(&name.as_str()));
        Ok(unread.map(|(name, _)| {
            format!("setting `{name}` has no effect: only text encoders are read")
        }))
    }
}

/// Reads the word, and writes it as a difference.
pub(crate) fn run(args: &ImportArgs) -> anyhow::Result<()> {
    let models: ModelSettings = args.general.settings(&[&args.model])?.resolve()?;
    if models.embedding.is_some() {
        return Err(Failure::usage("--embedding: the files to import stand without a flag").into());
    }
    let device = models.device()?;
    let words = args.words.iter().map(PathBuf::as_path);
    let inputs: Vec<&Path> = words.chain(args.general.config.as_deref()).collect();
    let mut output = Outputs::file(&args.output, Kind::Tensors, args.overwrite, &inputs)?;
    let name = file_name(&args.output);
    output.claim(&name)?;
    output.check()?;
    for path in &args.words {
        std::fs::metadata(path).map_err(difference_inversion::Error::io(path))?;
    }

    watch::catch_interrupts()?;
    let mut watcher = Watcher::new(args.general.quiet);
    let mut fetcher = Fetcher::new(&mut watcher, args.general.yes)?;
    let needs = Needs {
        without_denoiser: true,
        ..Needs::default()
    };
    let model = fetcher.model_of_words(&models, needs)?;
    let paths = fetcher.paths(&models, model, needs)?;
    let files = paths.files()?;
    watcher.notices(args.unread()?);
    watcher.notices(files.notices().to_vec());
    let tokens = DifferenceTokens::of_word(&args.words, &files, &device)?;
    let mut recipe = Recipe::new("import", &models, &paths, &[])?;
    let names: Vec<String> = args.words.iter().map(|path| file_name(path)).collect();
    recipe.input("files", &names)?;
    let tokens = tokens.with_settings(serde_json::from_str(&recipe.to_line()?)?);
    output.publish_one(&name, |path| Ok(tokens.save(path)?))?;
    let (_, notices) = watcher.finish();

    if args.general.json {
        return terminal::json(&json!({
            "difference": text_of(&args.output),
            "num_tokens": tokens.num_tokens(),
            "notices": notices,
        }));
    }
    learn::tell(&args.output, args.general.quiet)
}
