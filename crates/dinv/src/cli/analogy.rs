//! `dinv analogy`: three pictures in, B′ out.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use difference_inversion::image::{RgbImage, fit, save_png};
use difference_inversion::job::AnalogyJob;
use difference_inversion::job::Job;
use difference_inversion::job::TargetFile;
use difference_inversion::method::analogy::{Applied, Example, Learned};
use difference_inversion::method::generate_config::AnalogyConfig;
use difference_inversion::weights::read_config;
use serde_json::{Value, json};

use super::checkpoint::{self, Resume};
use super::fetch::{self, Fetcher, Needs};
use super::flags::{
    DraftFlag, General, GenerateFlags, LearnFlags, ModelSettings, Pairs, PreviewFlag, PromptFlags,
    SeedFlag, TimeFlag,
};
use super::learned_words;
use super::output::Outputs;
use super::plot;
use super::record::{Recipe, Run, file_name, groups, text_of};
use super::settings::Settings;
use super::sheet::{self, Sheet, Tile};
use super::terminal::{self, Failure};
use super::watch::Watcher;
use super::{change, demo_world, fitting, locate};

const B_PRIME: &str = "b_prime.png";
const SHEET: &str = "sheet.png";
const LOSS: &str = "loss.png";
pub(crate) const DIFFERENCE: &str = "difference.safetensors";
const RUN: &str = "run.json";
const FILES: [&str; 5] = [B_PRIME, SHEET, LOSS, DIFFERENCE, RUN];

/// Make B′ so that A is to A′ as B is to B′
///
/// Learns the difference between A and A′ and applies it to B. Without pictures, it solves a built-in
/// example with the demo model, which only knows its own little landscapes; photographs need `--model`.
/// The output folder holds sheet.png (all pictures with captions), b_prime.png, loss.png,
/// difference.safetensors (for `dinv apply`) and run.json (every setting).
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  dinv analogy
  dinv analogy --model sd15 --a day.jpg --a-prime night.jpg --b street.jpg
  dinv analogy --model sd15 --a a.png --a-prime a2.png --b b.png \\
      --caption-a \"a cat\" --caption-a-prime \"a cat in a hat\" --caption-b \"a dog\"")]
pub(crate) struct AnalogyArgs {
    #[command(flatten)]
    pairs: Pairs,
    /// B, the picture to change
    #[arg(long, value_name = "FILE")]
    b: Option<PathBuf>,
    /// Folder for the results
    #[arg(long, short, value_name = "DIR", default_value = "out")]
    output: PathBuf,
    /// Replace results of an earlier run in that folder
    #[arg(long, conflicts_with = "minutes")]
    overwrite: bool,
    /// Resume an interrupted run
    ///
    /// Continues from the checkpoint in the output folder.
    #[arg(long)]
    resume: bool,
    /// Learn even if the memory is unlikely to suffice
    #[arg(long, hide_short_help = true)]
    no_memory_check: bool,
    /// Caption of B instead of the captioner's
    #[arg(long, value_name = "TEXT", help_heading = "Prompts")]
    caption_b: Option<String>,
    #[command(flatten)]
    prompt: PromptFlags,
    #[command(flatten)]
    learn: LearnFlags,
    #[command(flatten)]
    generate: GenerateFlags,
    #[command(flatten)]
    model: ModelSettings,
    #[command(flatten)]
    seed: SeedFlag,
    #[command(flatten)]
    draft: DraftFlag,
    #[command(flatten)]
    preview: PreviewFlag,
    #[command(flatten)]
    time: TimeFlag,
    #[command(flatten)]
    general: General,
}

/// Solves the analogy.
pub(crate) fn run(mut args: AnalogyArgs) -> anyhow::Result<()> {
    let started = Instant::now();
    let settings = args.settings()?;
    let models: ModelSettings = settings.resolve()?;
    let b_path = args.inputs(&settings, &models)?;
    let mut job = AnalogyJob {
        pairs: args.pairs.pairs(),
        target: TargetFile {
            b: b_path.clone(),
            caption_b: args.caption_b.clone(),
        },
        ..AnalogyJob::default()
    };
    let pictures = job.open(&models.device()?)?;
    let (examples, target) = &pictures;
    let mut inputs = args.pairs.files();
    inputs.push(&b_path);
    inputs.extend(args.general.config.as_deref());
    let mut output = Outputs::folder(&args.output, FILES, args.overwrite, &inputs)?;
    output.claim(checkpoint::NAME)?;
    let resume = Resume::of(args.resume, args.time);
    if resume != Resume::Never && output.is_finished() {
        return args.tell(&output.paths());
    }
    output.check()?;
    let checkpoint = output.path(checkpoint::NAME);
    job.records = checkpoint::records(&checkpoint, resume, args.overwrite)?;

    args.time.watch()?;
    let mut watcher = Watcher::new(args.general.quiet);
    if args.b.is_none() && !models.is_demo() {
        watcher.notice("no pictures are given: the demo's example is used");
    }
    let mut fetcher = Fetcher::new(&mut watcher, args.general.yes)?;
    let captions = args.pairs.have_captions() && args.caption_b.is_some();
    let needs = |config: &AnalogyConfig| Needs::of_learning(captions, config);
    let model = fetcher.model_of_words(&models, needs(&settings.clone().analogy()?))?;
    job.settings = settings.clone().with_model(&model)?.analogy()?;
    job.settings.generate.previews = args.preview.is_read();
    let config = &job.settings;
    models.check_loss(&model, &config.learn)?;
    let needs = needs(config);
    let given = args.pairs.given_captions().chain(args.caption_b.as_deref());
    let unknown_words = demo_world::of_words(&models, &model, given);
    let paths = fetcher.paths(&models, model, needs)?;
    watcher.notices(unknown_words);
    watcher.notices(settings.without_effect(config.unread()));
    watcher.notices(change::of_strength(config.generate.strength));
    let mut recipe = Recipe::new("analogy", &models, &paths, &groups(config))?;
    if !args.no_memory_check {
        models.check_memory(&paths, &config.learn, examples.len(), needs.captioner)?;
    }
    watcher.say(&format!(
        "learning {} for {}: {}, {} steps",
        args.pairs.named(),
        file_name(&b_path),
        models.named(),
        config.learn.steps,
    ));
    let chosen = models;
    let models = chosen.open(&paths, &mut watcher)?;
    let seen = (args.pairs.pictures(examples)).chain([(b_path.as_path(), &target.b)]);
    watcher.notices(demo_world::of_pictures(&chosen, models.pipeline(), seen)?);
    let given = args.pairs.given_captions().chain(args.caption_b.as_deref());
    watcher.notices(learned_words::unknown(models.pipeline(), given));
    let mut sizes = args.pairs.sizes(examples);
    sizes.push((&b_path, target.b.dimensions()));
    watcher.notices(fitting::of_pairs(&sizes, models.pipeline().resolution()));
    let mut observe = |progress: &_| watcher.observe(progress);
    let solved = job.run(&models, &pictures, &mut observe);
    let (learned, applied) = solved.map_err(|error| checkpoint::named(error, &checkpoint))?;
    let seen = shown_as(&target.b, &applied.b_prime);
    let shows = change::shows(&seen, &applied.b_prime);
    if !shows && config.generate.signed_strength() != 0.0 {
        watcher.notice(UNCHANGED);
    }

    recipe.input("pairs", pairs_record(&args.pairs, &learned))?;
    recipe.input(
        "b",
        json!({ "file": text_of(&b_path), "caption": applied.caption_b, "prompt": applied.prompt_b }),
    )?;
    let mut run = Run::new(&recipe, &paths, started, watcher.finish())?;
    run.result("best_step", learned.best_step)?;
    run.result("loss", learned.history.last())?;

    let recipe_line = recipe.to_line()?;
    let text = [
        ("Software", recipe.program.as_str()),
        ("dinv", recipe_line.as_str()),
    ];
    let sheet = draw_sheet(examples, &seen, &learned, &applied, (config, shows))?;
    let plot = plot::draw(&plot::of_learning(&learned.history, learned.best_step))?;
    let written = output.publish(Some(checkpoint::NAME), |place| {
        save_png(&place(B_PRIME), &applied.b_prime, &text)?;
        save_png(&place(SHEET), &sheet, &text)?;
        save_png(&place(LOSS), &plot, &text)?;
        learned.tokens.save(&place(DIFFERENCE))?;
        run.write(&place(RUN))
    })?;
    args.tell(&written)
}

/// The note if B′ does not show the difference.
const UNCHANGED: &str = "B′ is almost identical to B: the difference does not show. If A and A′ are swapped, exchange \
                         them; otherwise try `--inversion ddim` or a higher `--guidance-scale`";

/// A picture as the model saw it, at the size of its output.
fn shown_as(picture: &RgbImage, drawn: &RgbImage) -> RgbImage {
    let (width, height) = drawn.dimensions();
    fit(picture, width, height)
}

impl AnalogyArgs {
    /// The given settings.
    pub(crate) fn settings(&self) -> anyhow::Result<Settings> {
        self.general.settings(&[
            &self.prompt,
            &self.learn,
            &self.generate,
            &self.model,
            &self.seed,
            &self.draft,
        ])
    }

    /// Reports where the results are.
    fn tell(&self, written: &[PathBuf]) -> anyhow::Result<()> {
        if !self.general.json {
            (written.iter()).try_for_each(|path| terminal::line(path.display()))?;
            if !self.general.quiet {
                terminal::message(format_args!("done: open {}", written[1].display()));
            }
            return Ok(());
        }
        let run: Value = read_config(&written[4])?;
        terminal::json(&json!({
            "b_prime": text_of(&written[0]), "sheet": text_of(&written[1]),
            "loss": text_of(&written[2]), "difference": text_of(&written[3]),
            "run": text_of(&written[4]),
            "caption_b": run["b"]["caption"], "prompt_b": run["b"]["prompt"],
        }))
    }

    /// Checks that A, A′ and B are all given or all absent, which means the built-in example. Returns B.
    fn inputs(&mut self, settings: &Settings, models: &ModelSettings) -> anyhow::Result<PathBuf> {
        if let Some(b) = &self.b {
            if self.pairs.a.is_empty() {
                return Err(Failure::usage("`--b` needs `--a` and `--a-prime`").into());
            }
            self.pairs.check()?;
            if b.is_dir() {
                let message = format!("{}: a folder, expected a picture", b.display());
                let hint = format!(
                    "for a folder, `dinv learn` the difference once, then `dinv apply FILE --b {} -o DIR`",
                    b.display()
                );
                return Err(Failure::input(message).hint(hint).into());
            }
            return Ok(b.clone());
        }
        if !self.pairs.a.is_empty() || !self.pairs.a_prime.is_empty() {
            let failure = Failure::usage("`--b` is missing: the picture to change");
            return Err(failure
                .hint("`dinv learn` learns a difference without a B")
                .into());
        }
        settings.analogy()?; // no download for settings that are wrong
        fetch::example(models, &self.general)?;
        let example = locate::example()?;
        self.pairs.a = vec![example.a];
        self.pairs.a_prime = vec![example.a_prime];
        self.pairs.check()?;
        Ok(example.b)
    }
}

/// The pairs as recorded in `run.json`.
fn pairs_record(pairs: &Pairs, learned: &Learned) -> Vec<Value> {
    let files = pairs.a.iter().zip(&pairs.a_prime);
    let words = learned.captions.iter().zip(&learned.prompts);
    files
        .zip(words)
        .map(|((a, a_prime), (captions, prompts))| {
            json!({
                "a": { "file": text_of(a), "caption": captions[0], "prompt": prompts[0] },
                "a_prime": { "file": text_of(a_prime), "caption": captions[1], "prompt": prompts[1] },
            })
        })
        .collect()
}

/// Draws the sheet of all pictures, as the model saw them; `shows` is whether B′ shows the difference.
fn draw_sheet(
    examples: &[Example],
    b: &RgbImage,
    learned: &Learned,
    applied: &Applied,
    (config, shows): (&AnalogyConfig, bool),
) -> anyhow::Result<RgbImage> {
    let seen = |picture: &RgbImage| shown_as(picture, &applied.b_prime);
    let pairs: Vec<[RgbImage; 2]> = examples
        .iter()
        .map(|example| [seen(&example.a), seen(&example.a_prime)])
        .collect();
    let done = match (shows, config.generate.reverse) {
        (false, _) => "almost identical to B: the difference does not show",
        (true, true) => "B with the difference undone",
        (true, false) => "B with the difference applied",
    };
    let footer = format!(
        "{} difference tokens, kept from step {} of {} · strength {} · seed {}",
        learned.tokens.num_tokens(),
        learned.best_step,
        learned.history.len(),
        config.generate.signed_strength(),
        config.generate.seed,
    );
    let tile = |picture, name, caption| Tile {
        picture,
        name,
        caption,
    };
    let sheet = Sheet {
        examples: pairs
            .iter()
            .zip(&learned.captions)
            .map(|([a, a_prime], [caption_a, caption_a_prime])| {
                [
                    tile(a, "A", caption_a),
                    tile(a_prime, "A′", caption_a_prime),
                ]
            })
            .collect(),
        results: vec![[
            tile(b, "B", &applied.caption_b),
            tile(&applied.b_prime, "B′", done),
        ]],
        footer: &footer,
    };
    sheet::draw(&sheet)
}
