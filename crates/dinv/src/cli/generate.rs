//! `dinv generate`: plain text-to-image, with or without a learned difference.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use clap::Args;
use difference_inversion::about;
use difference_inversion::diffusion::sample::SolverKind;
use difference_inversion::image::save_png;
use difference_inversion::job::GenerateJob;
use difference_inversion::job::Job;
use difference_inversion::method::difference::DifferenceTokens;
use serde::Serialize;
use serde_json::json;

use super::fetch::{Fetcher, Needs};
use super::fitting;
use super::flags::{General, ModelSettings, SeedFlag, finite};
use super::output::{Kind, Outputs};
use super::record::{Recipe, text_of};
use super::settings::Settings;
use super::terminal::{self, Failure};
use super::vocabulary;
use super::watch::{self, Watcher};

/// Draw a picture from words, or edit one with a model made for that
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  dinv generate --prompt \"a red house on a hill\" -o house.png
  dinv generate --prompt \"a red house on a hill\" --difference night.safetensors -o night-house.png
  dinv generate --model ~/instruct-pix2pix --image street.jpg --prompt \"make it snow\" -o snow.png
  dinv generate --model ~/inpainting --image street.jpg --mask sky.png --prompt \"a sunset\"")]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    words: TextFlags,
    /// Difference to append to the prompt
    #[arg(long, value_name = "FILE")]
    difference: Option<PathBuf>,
    /// Picture to edit, with InstructPix2Pix and inpainting models
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// Area that an inpainting model redraws: white on black, brush strokes on transparency, or the picture
    /// with the area erased
    #[arg(long, value_name = "FILE")]
    mask: Option<PathBuf>,
    /// Start from the tensor `latents` [1, 4, h, w] in a safetensors file instead of the seed's noise;
    /// a tensor `noise` [steps, 4, h, w] in it is what euler-ancestral adds
    #[arg(long, value_name = "FILE", hide_short_help = true)]
    init_latents: Option<PathBuf>,
    /// File for the picture
    #[arg(long, short, value_name = "FILE", default_value = "generated.png")]
    output: PathBuf,
    /// Replace the file if it exists
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    model: ModelSettings,
    #[command(flatten)]
    seed: SeedFlag,
    #[command(flatten)]
    general: General,
}

/// The settings of [`TextToImage`](difference_inversion::diffusion::draw::TextToImage), as far as they were given.
#[derive(Debug, Clone, Args, Serialize)]
struct TextFlags {
    #[arg(long, help = about!(text.prompt), value_name = "TEXT")]
    prompt: String,
    #[arg(long, help = about!(text.negative_prompt), value_name = "TEXT")]
    negative_prompt: Option<String>,
    #[arg(long, help = concat!(about!(text.guidance_scale), " [default: 7.5; FLUX.1 dev 3.5]"), value_name = "SCALE", value_parser = finite)]
    guidance_scale: Option<f64>,
    #[arg(long, help = about!(text.image_guidance_scale), value_name = "SCALE", hide_short_help = true, value_parser = finite)]
    image_guidance_scale: Option<f64>,
    #[arg(long, help = about!(text.num_inference_steps), value_name = "N")]
    num_inference_steps: Option<usize>,
    #[arg(long, help = concat!(about!(text.scheduler), " [default: the model's own]"), value_parser = SolverKind::ALL.map(SolverKind::name))]
    scheduler: Option<String>,
    #[arg(long, help = about!(text.strength), value_name = "S", allow_negative_numbers = true, value_parser = finite)]
    strength: Option<f64>,
}

/// Notes about embeddings whose words are in no text; a difference is refused, since it is likely meant to follow the
/// prompt.
fn unused_embeddings(models: &ModelSettings, texts: [&str; 2]) -> anyhow::Result<Vec<String>> {
    let mut notices = Vec::new();
    for file in models.embeddings() {
        if texts.iter().any(|text| file.is_in(text)) {
            continue;
        }
        let (path, name) = (file.path.display(), file.name());
        if DifferenceTokens::load(&file.path, &Device::flex()).is_ok() {
            let message = format!("{path} is a difference, and the prompt has no `<{name}>`");
            let hint = format!("`--difference {path}` appends it to the prompt");
            return Err(Failure::usage(message).hint(hint).into());
        }
        notices.push(format!(
            "{path} changes nothing: write `<{name}>` in the prompt where it belongs"
        ));
    }
    Ok(notices)
}

impl GenerateArgs {
    /// The negative prompt.
    fn negative(&self) -> &str {
        self.words.negative_prompt.as_deref().unwrap_or_default()
    }

    /// The settings that were given.
    pub(crate) fn settings(&self) -> anyhow::Result<Settings> {
        self.general
            .settings(&[&self.words, &self.model, &self.seed])
    }
}

/// Draws the picture.
pub(crate) fn run(args: &GenerateArgs) -> anyhow::Result<()> {
    let settings = args.settings()?;
    let models: ModelSettings = settings.resolve()?;
    let unused = unused_embeddings(&models, [args.words.prompt.as_str(), args.negative()])?;
    let mut job = GenerateJob {
        difference: args.difference.clone(),
        init_latents: args.init_latents.clone(),
        image: args.image.clone(),
        mask: args.mask.clone(),
        ..GenerateJob::default()
    };
    let inputs = job.open(&models.device()?)?;
    let files = [
        &args.image,
        &args.mask,
        &args.difference,
        &args.init_latents,
        &args.general.config,
    ];
    let files: Vec<&Path> = (files.into_iter().flatten())
        .map(PathBuf::as_path)
        .collect();
    let mut output = Outputs::file(&args.output, Kind::Picture, args.overwrite, &files)?;
    let name = args
        .output
        .file_name()
        .unwrap_or_default()
        .to_string_lossy();
    output.claim(&name)?;
    output.check()?;

    watch::catch_interrupts()?;
    let mut watcher = Watcher::new(args.general.quiet);
    let mut fetcher = Fetcher::new(&mut watcher)?;
    let model = fetcher.model(&models)?;
    job.settings = settings.clone().with_model(&model)?.resolve()?;
    let note = vocabulary::note(&models, &model, [args.words.prompt.as_str()]);
    let paths = fetcher.paths(&models, model, Needs::default())?;
    watcher.notices(note);
    watcher.notices(unused);
    let mut recipe = Recipe::new("generate", &models, &paths, &[&job.settings])?;
    for (name, file) in [
        ("difference", &args.difference),
        ("init_latents", &args.init_latents),
        ("image", &args.image),
        ("mask", &args.mask),
    ] {
        recipe.input(name, file.as_deref().map(text_of))?;
    }
    let models = models.open(&paths, &mut watcher)?;
    let texts = [args.words.prompt.as_str(), args.negative()];
    watcher.notices(vocabulary::unknown(models.pipeline(), texts));
    let family = models.pipeline().family();
    let unread = job.settings.unread(family, inputs.tokens.is_some());
    watcher.notices(settings.without_effect(unread));
    if let (Some(path), Some(image)) = (&args.image, &inputs.image) {
        let image = (path.as_path(), image.dimensions());
        watcher.notices(fitting::of_pictures(
            &[image],
            models.pipeline().resolution(),
        ));
        let mask = args.mask.as_deref().zip(inputs.mask.as_ref());
        let mask = mask.map(|(path, mask)| (path, mask.image.dimensions()));
        watcher.notices(mask.and_then(|mask| fitting::of_mask(image, mask)));
    }
    let picture = job.run(&models, &inputs, &mut |progress| watcher.observe(progress))?;
    let text = [
        ("Software", recipe.program.as_str()),
        ("dinv", &recipe.to_line()?),
    ];
    output.publish_one(&name, |path| Ok(save_png(path, &picture, &text)?))?;
    let (_, notices) = watcher.finish();

    if args.general.json {
        return terminal::json(&json!({ "image": text_of(&args.output), "notices": notices }));
    }
    terminal::line(args.output.display())
}
