//! `dinv generate`: plain text-to-image, with or without a learned difference.

use std::path::{Path, PathBuf};

use clap::Args;
use difference_inversion::about;
use difference_inversion::diffusion::sample::SolverKind;
use difference_inversion::image::save_png;
use difference_inversion::job::GenerateJob;
use difference_inversion::job::Job;
use serde::Serialize;
use serde_json::json;

use super::demo_world;
use super::fetch::{Fetcher, Needs};
use super::fitting;
use super::flags::{General, ModelSettings, PreviewFlag, SeedFlag, finite};
use super::learned_words;
use super::output::{Kind, Outputs};
use super::record::{Recipe, text_of};
use super::settings::Settings;
use super::terminal;
use super::watch::{self, Watcher};

/// Draw a picture from words, or edit one with a model made for that
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  dinv generate --prompt \"a small red house on grass by day\" -o house.png
  dinv generate --prompt \"a small red house on grass by day\" --difference night.safetensors
  dinv generate --model ~/instruct-pix2pix --image day.jpg --prompt \"at night\"
  dinv generate --model ~/inpainting --image b.jpg --mask m.png --prompt sunset")]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    words: TextFlags,
    /// Difference to append to the prompt
    #[arg(long, value_name = "FILE")]
    difference: Option<PathBuf>,
    /// Picture to edit (InstructPix2Pix and inpainting models)
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// Area that an inpainting model redraws
    ///
    /// White on black, brush strokes on transparency, or the picture with the area erased.
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
    preview: PreviewFlag,
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
    #[arg(long, help = concat!(about!(text.guidance_scale), " [default: the model's, or 7.5]"),
          long_help = concat!(about!(text.guidance_scale), " [default: the model's, or 7.5]\n\n",
              "FLUX.1 dev reads the number as an input. FLUX.1 schnell has no guidance. Neither takes a negative prompt."),
          value_name = "SCALE", value_parser = finite)]
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

impl GenerateArgs {
    /// The negative prompt.
    fn negative(&self) -> &str {
        self.words.negative_prompt.as_deref().unwrap_or_default()
    }

    /// The given settings.
    pub(crate) fn settings(&self) -> anyhow::Result<Settings> {
        let settings = self
            .general
            .settings(&[&self.words, &self.model, &self.seed])?;
        Ok(settings.without_draft())
    }
}

/// Draws the picture.
pub(crate) fn run(args: &GenerateArgs) -> anyhow::Result<()> {
    let settings = args.settings()?;
    let models: ModelSettings = settings.resolve()?;
    let unused = learned_words::unused(&models, [args.words.prompt.as_str(), args.negative()])?;
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
    let mut fetcher = Fetcher::new(&mut watcher, args.general.yes)?;
    let model = fetcher.model(&models, Needs::default())?;
    let with_model = settings.clone().with_model(&model)?;
    job.settings = with_model
        .with_drawing_of(models.model.as_deref())
        .resolve()?;
    job.settings.previews = args.preview.is_read();
    let note = demo_world::of_words(&models, &model, [args.words.prompt.as_str()]);
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
    watcher.notices(learned_words::unknown(models.pipeline(), texts));
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
