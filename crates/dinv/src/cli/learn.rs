//! `dinv learn`: learns the difference between A and A′ and writes it to a file.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use difference_inversion::job::Job;
use difference_inversion::job::LearnJob;
use difference_inversion::method::generate_config::AnalogyConfig;
use difference_inversion::method::learn::Records;
use serde_json::json;

use super::checkpoint::{self, Resume};
use super::demo_world;
use super::fetch::{Fetcher, Needs};
use super::fitting;
use super::flags::{
    DraftFlag, General, LearnFlags, ModelSettings, Pairs, PromptFlags, SeedFlag, TimeFlag,
};
use super::learned_words;
use super::output::{Kind, Outputs, refuse_same};
use super::record::{text_of, weight_paths};
use super::settings::Settings;
use super::terminal::{self, Failure};
use super::watch::Watcher;

/// Learn the difference between A and A′, to apply it later
///
/// The file holds the difference tokens as a textual-inversion embedding, the settings, and which text
/// encoder they belong to.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  dinv learn --model sd15 --a day.png --a-prime night.png -o night.safetensors
  dinv learn --model sd15 --a 1.png --a-prime 1n.png --a 2.png --a-prime 2n.png")]
pub(crate) struct LearnArgs {
    #[command(flatten)]
    pairs: Pairs,
    /// File for the difference
    #[arg(
        long,
        short,
        value_name = "FILE",
        default_value = "difference.safetensors"
    )]
    output: PathBuf,
    /// Replace the file if it exists
    #[arg(long, conflicts_with = "minutes")]
    overwrite: bool,
    /// Resume from the checkpoint that an interrupted run left next to the file
    #[arg(long)]
    resume: bool,
    /// Learn even if the memory is unlikely to suffice
    #[arg(long, hide_short_help = true)]
    no_memory_check: bool,
    /// Read timesteps and noise from a safetensors file, such as a trace that starts at step 0, instead of
    /// drawing them
    #[arg(long, value_name = "FILE", hide_short_help = true)]
    replay: Option<PathBuf>,
    /// Write timesteps, noise, loss terms and tokens of every step to a safetensors file; with --resume,
    /// continue the file of the interrupted run
    #[arg(long, value_name = "FILE", hide_short_help = true)]
    trace: Option<PathBuf>,
    #[command(flatten)]
    prompt: PromptFlags,
    #[command(flatten)]
    learn: LearnFlags,
    #[command(flatten)]
    model: ModelSettings,
    #[command(flatten)]
    seed: SeedFlag,
    #[command(flatten)]
    draft: DraftFlag,
    #[command(flatten)]
    time: TimeFlag,
    #[command(flatten)]
    general: General,
}

/// Learns the difference.
pub(crate) fn run(args: &LearnArgs) -> anyhow::Result<()> {
    let started = Instant::now();
    args.pairs.check()?;
    if args.pairs.a.is_empty() {
        return Err(
            Failure::usage("`--a` and `--a-prime` are missing: the pair to learn from").into(),
        );
    }
    let settings = args.settings()?;
    let models: ModelSettings = settings.resolve()?;
    let mut job = LearnJob {
        pairs: args.pairs.pairs(),
        ..LearnJob::default()
    };
    let examples = job.open(&models.device()?)?;
    let mut inputs = args.pairs.files();
    inputs.extend(args.replay.as_deref());
    inputs.extend(args.general.config.as_deref());
    let mut output = Outputs::file(&args.output, Kind::Tensors, args.overwrite, &inputs)?;
    let checkpoint = checkpoint::beside(&args.output);
    let spent = checkpoint.file_name().unwrap_or_default().to_string_lossy();
    output.claim(&spent)?;
    output.check()?;
    let records = args.records(&checkpoint)?;
    let trace = args.traced(&checkpoint, records.resume.is_some(), &inputs)?;
    job.records = Records {
        replay: args.replay.clone(),
        trace: args.trace.clone(),
        ..records
    };

    args.time.watch()?;
    let mut watcher = Watcher::new(args.general.quiet);
    let mut fetcher = Fetcher::new(&mut watcher, args.general.yes)?;
    let needs = |config: &AnalogyConfig| Needs::of_learning(args.pairs.have_captions(), config);
    let model = fetcher.model_of_words(&models, needs(&settings.clone().analogy()?))?;
    job.settings = settings.clone().with_model(&model)?.analogy()?;
    let config = &job.settings;
    models.check_loss(&model, &config.learn)?;
    let needs = needs(config);
    let unknown_words = demo_world::of_words(&models, &model, args.pairs.given_captions());
    let paths = fetcher.paths(&models, model, needs)?;
    for output in [Some(&output), trace.as_ref()].into_iter().flatten() {
        output.refuse_inputs(&weight_paths(&paths)?)?;
    }
    watcher.notices(unknown_words);
    if !args.no_memory_check {
        models.check_memory(&paths, &config.learn, examples.len(), needs.captioner)?;
    }
    watcher
        .notices(settings.without_effect([config.prompt.unread(), config.learn.unread()].concat()));
    watcher.say(&format!(
        "learning {}: {}, {} steps",
        args.pairs.named(),
        models.named(),
        config.learn.steps,
    ));
    let chosen = models;
    let models = chosen.open(&paths, &mut watcher)?;
    let pictures = args.pairs.pictures(&examples);
    watcher.notices(demo_world::of_pictures(
        &chosen,
        models.pipeline(),
        pictures,
    )?);
    watcher.notices(learned_words::unknown(
        models.pipeline(),
        args.pairs.given_captions(),
    ));
    watcher.notices(fitting::of_pairs(
        &args.pairs.sizes(&examples),
        models.pipeline().resolution(),
    ));
    let learned = job.run(&models, &examples, &mut |progress| {
        watcher.observe(progress)
    })?;
    output.publish(Some(&spent), |place| {
        let name = args.output.file_name().unwrap_or_default();
        Ok(learned.tokens.save(&place(&name.to_string_lossy()))?)
    })?;
    let (_, notices) = watcher.finish();

    if args.general.json {
        return terminal::json(&json!({
            "difference": text_of(&args.output),
            "trace": args.trace.as_deref().map(text_of),
            "num_tokens": learned.tokens.num_tokens(),
            "best_step": learned.best_step,
            "loss": learned.history.last(),
            "captions": learned.captions,
            "prompts": learned.prompts,
            "notices": notices,
            "seconds": started.elapsed().as_secs_f64(),
        }));
    }
    tell(&args.output, args.general.quiet)
}

/// Says where a difference is, and what to do with it.
pub(super) fn tell(difference: &Path, quiet: bool) -> anyhow::Result<()> {
    let difference = difference.display();
    terminal::line(&difference)?;
    if !quiet {
        terminal::message(format_args!(
            "done: apply it with dinv apply {difference} --b PICTURE -o DIR"
        ));
    }
    Ok(())
}

impl LearnArgs {
    /// The given settings.
    pub(crate) fn settings(&self) -> anyhow::Result<Settings> {
        self.general.settings(&[
            &self.prompt,
            &self.learn,
            &self.model,
            &self.seed,
            &self.draft,
        ])
    }

    /// The checkpoints, and whether to resume.
    fn records(&self, checkpoint: &Path) -> Result<Records, Failure> {
        let resume = Resume::of(self.resume, self.time);
        checkpoint::records(checkpoint, resume, self.overwrite)
    }

    /// The trace, if requested: a separate file, which a resumed run continues.
    fn traced(
        &self,
        checkpoint: &Path,
        resumes: bool,
        inputs: &[&Path],
    ) -> anyhow::Result<Option<Outputs>> {
        let Some(path) = &self.trace else {
            return Ok(None);
        };
        let outputs = [
            ("the difference", self.output.as_path()),
            ("the checkpoint", checkpoint),
            ("the trace", path),
        ];
        refuse_same(&outputs)?;
        let replace = self.overwrite || resumes;
        let mut trace = Outputs::file(path, Kind::Tensors, replace, inputs)?;
        trace.claim(&path.file_name().unwrap_or_default().to_string_lossy())?;
        trace.check()?;
        Ok(Some(trace))
    }
}
