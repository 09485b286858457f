//! `dinv batch`: many jobs from a file, each difference learned once.

mod manifest;
mod plan;

use std::fs::{self, File};
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use difference_inversion::Error;
use difference_inversion::diffusion::frozen::{ModelPaths, Models};
use difference_inversion::image::{load_image, read_png_text};
use difference_inversion::job::{Job, LearnJob, PairFiles};
use difference_inversion::method::analogy::{self, Target};
use difference_inversion::method::difference::DifferenceTokens;
use indicatif::HumanDuration;
use serde_json::{Value, json};

use self::manifest::{Entry, Source};
use self::plan::{DIFFERENCES, Picture, Shared, Task, Times};

use super::apply;
use super::checkpoint;
use super::fetch::{self, Fetcher, Needs};
use super::fitting::{self, Measured};
use super::flags::{
    DraftFlag, General, GenerateFlags, LearnFlags, ModelSettings, PromptFlags, SeedFlag,
};
use super::output::{Kind, Outputs};
use super::pictures;
use super::record::{Recipe, file_name, text_of};
use super::settings::Settings;
use super::shard::Shard;
use super::terminal::{self, Failure};
use super::watch::{self, Watcher};

/// How often a run looks whether another one has learned a difference.
const BETWEEN_LOOKS: Duration = Duration::from_millis(200);

/// Do many jobs from a file, learning each difference once
///
/// Every line of the file is a job, a JSON object: `a` and `a_prime`, or a `difference`; `b`; and if wanted `caption_a`,
/// `caption_a_prime`, `caption_b`, a `name` for the result, and `settings` of its own. Without `b` it only learns.
/// Paths are relative to the file. What is done is kept, and the same command continues.
#[derive(Debug, Args)]
#[command(
    override_usage = "dinv batch [OPTIONS] <FILE.jsonl> --output <DIR>\n       dinv batch --from <FOLDER>",
    after_help = "Examples:
  dinv batch jobs.jsonl -o made
  dinv batch jobs.jsonl -o made --dry-run
  dinv batch --from photos > photos/jobs.jsonl"
)]
pub(crate) struct BatchArgs {
    /// The jobs
    #[arg(value_name = "FILE.jsonl", required_unless_present = "from")]
    jobs: Option<PathBuf>,
    /// Folder for the results
    #[arg(long, short, value_name = "DIR", required_unless_present = "from")]
    output: Option<PathBuf>,
    /// Print the jobs of a folder instead, with paths relative to it
    ///
    /// In the folder, and in each folder of it, a pair is two pictures called a and a_prime. The other pictures there,
    /// and those of a folder b, are to be changed.
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["jobs", "output", "dry_run"])]
    from: Option<PathBuf>,
    /// Say what would be made, and how long that takes if results show it
    #[arg(long)]
    dry_run: bool,
    /// Begin no further job after N minutes, and interrupt learning; exit code 75
    #[arg(long, value_name = "N")]
    minutes: Option<u64>,
    /// Do only the i-th of n parts of the jobs, for runs on several machines; auto, or auto/n, as the scheduler
    /// numbers its tasks
    #[arg(long, value_name = "i/n", hide_short_help = true)]
    shard: Option<Shard>,
    /// Learn even if the memory is unlikely to suffice
    #[arg(long, hide_short_help = true)]
    no_memory_check: bool,
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
    general: General,
}

/// Does the jobs.
pub(crate) fn run(args: &BatchArgs) -> anyhow::Result<()> {
    if let Some(folder) = &args.from {
        let lines = manifest::of_folder(folder)?;
        return lines.iter().try_for_each(terminal::line);
    }
    let (Some(path), Some(output)) = (&args.jobs, &args.output) else {
        return Err(Failure::usage("the file of the jobs, or `--output`, is missing").into());
    };
    let started = Instant::now();
    let settings = args.settings()?;
    let models: ModelSettings = settings.resolve()?;
    let entries = manifest::read(path)?;
    models.device()?;
    watch::catch_interrupts()?;
    let mut watcher = Watcher::new(args.general.quiet);
    let shard = args.shard.unwrap_or_default();
    shard.announce(&mut watcher);
    let paths = args.paths(&settings, &models, (path, &entries), &mut watcher)?;
    let shared = Shared {
        manifest: path,
        settings: &settings,
        models: &models,
        model: &paths.model,
    };
    let (tasks, notes) = plan::tasks(entries, &shared)?;
    watcher.notices(notes);
    let tasks = shard.stretch(tasks);
    let work = Work::of(&tasks, output, path)?;
    watcher.say(&work.to_string());
    if args.dry_run {
        return work.tell(args.general.json);
    }
    if work.tasks.is_empty() {
        return args.finish(watcher, work, Vec::new(), 0);
    }
    let differences = output.join(DIFFERENCES);
    fs::create_dir_all(&differences).map_err(Error::io(&differences))?;
    if work.learning > 0 && !args.no_memory_check {
        work.check_memory(&models, &paths)?;
    }
    let sizes = work.read(&mut watcher)?;
    let opened = models.open(&paths, &mut watcher)?;
    watcher.notices(fitting::of_pictures(&sizes, opened.pipeline().resolution()));
    let mut run = Run {
        models: &opened,
        chosen: &models,
        paths: &paths,
        output,
        manifest: path,
        deadline: args
            .minutes
            .map(|minutes| started + Duration::from_secs(60 * minutes)),
        times: output.join(Times::file(shard)),
        watcher: &mut watcher,
        tokens: None,
        broken: None,
        results: Vec::new(),
        failed: 0,
        left: 0,
        json: args.general.json,
    };
    for task in &work.tasks {
        run.try_task(task)?;
    }
    let (results, failed, left) = (run.results, run.failed, run.left);
    if left > 0 {
        let message = format!("{left} jobs are left");
        let hint = "the same command continues";
        return Err(Failure::temporary(message).hint(hint).into());
    }
    args.finish(watcher, work, results, failed)
}

impl BatchArgs {
    /// The given settings.
    fn settings(&self) -> anyhow::Result<Settings> {
        self.general.settings(&[
            &self.prompt,
            &self.learn,
            &self.generate,
            &self.model,
            &self.seed,
            &self.draft,
        ])
    }

    /// The model and all that the jobs need; for a dry run, as far as it is on this disk.
    fn paths(
        &self,
        settings: &Settings,
        models: &ModelSettings,
        (manifest, entries): (&Path, &[Entry]),
        watcher: &mut Watcher,
    ) -> anyhow::Result<ModelPaths> {
        if self.dry_run {
            return Ok(fetch::on_disk(models)?.0);
        }
        let mut fetcher = Fetcher::new(watcher, self.general.yes)?;
        let needs = |settings: &Settings| -> anyhow::Result<Needs> {
            let mut all = Needs::default();
            let mut given: Vec<(&serde_json::Map<String, Value>, bool, bool)> = Vec::new();
            for entry in entries {
                let learns = matches!(entry.source, Source::Pairs(_));
                let kind = (&entry.settings, entry.has_captions(), learns);
                if given.contains(&kind) {
                    continue; // most lines are alike
                }
                given.push(kind);
                let place = format!("{}:{}", manifest.display(), entry.line);
                let config = settings
                    .clone()
                    .with_line(&place, &entry.settings)?
                    .analogy()?;
                let needs = match learns {
                    true => Needs::of_learning(entry.has_captions(), &config),
                    false => Needs::of_prompts(entry.has_captions(), &config.prompt),
                };
                all.joint_spaces |= needs.joint_spaces;
                all.captioner |= needs.captioner;
            }
            Ok(all)
        };
        let model = fetcher.model_of_words(models, needs(settings)?)?;
        let settings = settings.clone().with_model(&model)?;
        fetcher.paths(models, model, needs(&settings)?)
    }

    /// Reports the results.
    fn finish(
        &self,
        watcher: Watcher,
        work: Work<'_>,
        results: Vec<Value>,
        failed: usize,
    ) -> anyhow::Result<()> {
        let (_, notices) = watcher.finish();
        let made = results.len();
        if self.general.json {
            terminal::json(&json!({
                "results": results, "done": work.done, "failed": failed, "notices": notices,
            }))?;
        }
        if failed > 0 {
            let message = format!("{failed} of {} jobs failed", work.tasks.len());
            return Err(Failure::new(message)
                .hint("the same command tries them again, and keeps what is done")
                .into());
        }
        if !self.general.json && !self.general.quiet {
            terminal::message(format_args!("done: {made} made, {} kept", work.done));
        }
        Ok(())
    }
}

/// What is left to do.
struct Work<'a> {
    tasks: Vec<&'a Task>,
    /// The number of jobs whose results are there.
    done: usize,
    /// The numbers of differences to learn and of pictures to make.
    learning: usize,
    pictures: usize,
    output: &'a Path,
}

impl<'a> Work<'a> {
    /// Compares the tasks with the results that are there.
    fn of(all: &'a [Task], output: &'a Path, manifest: &Path) -> anyhow::Result<Self> {
        let mut work = Self {
            tasks: Vec::new(),
            done: 0,
            learning: 0,
            pictures: 0,
            output,
        };
        let mut learned: Option<&str> = None;
        for task in all {
            let there = match &task.picture {
                Some(picture) => picture.is_there(output, manifest, task.line)?,
                None => task.difference_file(output).is_file(),
            };
            if there {
                work.done += 1;
                continue;
            }
            if !task.difference_file(output).is_file() && learned != Some(&task.difference) {
                work.learning += 1;
                learned = Some(&task.difference);
            }
            work.pictures += usize::from(task.picture.is_some());
            work.tasks.push(task);
        }
        Ok(work)
    }

    /// Reports a dry run.
    fn tell(&self, as_json: bool) -> anyhow::Result<()> {
        let seconds = Times::read(self.output).estimate(self.learning, self.pictures);
        if as_json {
            let tasks = self.tasks.iter().map(|task| {
                json!({
                    "line": task.line, "difference": task.difference,
                    "id": task.picture.as_ref().map(|picture| &picture.id),
                    "output": task.picture.as_ref().map_or_else(
                        || text_of(task.difference_file(self.output)),
                        |picture| text_of(self.output.join(&picture.name)),
                    ),
                })
            });
            return terminal::json(&json!({
                "jobs": tasks.collect::<Vec<_>>(), "done": self.done, "differences": self.learning,
                "pictures": self.pictures, "seconds": seconds,
            }));
        }
        for task in &self.tasks {
            let made = match &task.picture {
                Some(picture) => self.output.join(&picture.name),
                None => task.difference_file(self.output),
            };
            terminal::line(made.display())?;
        }
        match seconds {
            Some(seconds) => terminal::message(format_args!(
                "about {}, as the results that are there took",
                HumanDuration(Duration::from_secs_f64(seconds.max(1.0)))
            )),
            None => terminal::message("how long that takes is known after the first results"),
        }
        Ok(())
    }

    /// Refuses learning that does not fit into memory.
    fn check_memory(&self, models: &ModelSettings, paths: &ModelPaths) -> anyhow::Result<()> {
        let mut checked = Vec::new();
        for task in &self.tasks {
            let Source::Pairs(pairs) = &task.source else {
                continue;
            };
            let config = &task.config.learn;
            models.check_loss(&paths.model, config)?;
            let rows = config.rows(pairs.len());
            if !checked.contains(&rows) {
                models.check_memory(paths, config, pairs.len(), false)?;
                checked.push(rows);
            }
        }
        Ok(())
    }

    /// Reads every picture, so that all errors are reported before the work; returns their sizes.
    fn read(&self, watcher: &mut Watcher) -> anyhow::Result<Vec<Measured<'a>>> {
        let mut files: Vec<&'a Path> = Vec::new();
        for &task in &self.tasks {
            if let Source::Pairs(pairs) = &task.source {
                files.extend(
                    pairs
                        .iter()
                        .flat_map(|pair| [pair.a.as_path(), &pair.a_prime]),
                );
            }
            files.extend(
                task.picture
                    .as_ref()
                    .map(|picture| picture.wanted.b.as_path()),
            );
        }
        files.sort_unstable();
        files.dedup();
        let read = pictures::check(files.into_iter(), watcher)?;
        Ok(read
            .iter()
            .map(|picture| (picture.path, picture.size))
            .collect())
    }
}

impl std::fmt::Display for Work<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} jobs: {} done, {} differences to learn, {} pictures to make",
            self.tasks.len() + self.done,
            self.done,
            self.learning,
            self.pictures
        )
    }
}

impl Picture {
    /// Whether it is there; refuses another picture in its place.
    fn is_there(&self, output: &Path, manifest: &Path, line: usize) -> anyhow::Result<bool> {
        let path = output.join(&self.name);
        if !path.exists() {
            return Ok(false);
        }
        let text = read_png_text(&path).unwrap_or_default();
        let recipe = text.iter().find(|(key, _)| key == "dinv");
        let recipe = recipe.and_then(|(_, text)| serde_json::from_str::<Value>(text).ok());
        if recipe.is_some_and(|recipe| recipe["id"] == self.id.as_str()) {
            return Ok(true);
        }
        let message = format!(
            "{}:{line}: {} exists, but was made from something else",
            manifest.display(),
            path.display()
        );
        let hint = "write elsewhere with `-o`, give the job another name, or remove the picture";
        Err(Failure::new(message).hint(hint).into())
    }
}

/// The work on all tasks.
struct Run<'a> {
    models: &'a Models,
    chosen: &'a ModelSettings,
    paths: &'a ModelPaths,
    output: &'a Path,
    manifest: &'a Path,
    deadline: Option<Instant>,
    /// The file of times.
    times: PathBuf,
    watcher: &'a mut Watcher,
    /// The difference at hand, by its identity.
    tokens: Option<(String, DifferenceTokens)>,
    /// The difference that could not be had, and whether that is temporary.
    broken: Option<(String, bool)>,
    results: Vec<Value>,
    failed: usize,
    /// Jobs that another run works on, or for which there was no time.
    left: usize,
    json: bool,
}

impl Run<'_> {
    /// Does a task. Its failure is reported and does not end the work; a stop does.
    fn try_task(&mut self, task: &Task) -> anyhow::Result<()> {
        if self.is_late() {
            self.left += 1;
            return Ok(());
        }
        if let Some((difference, temporary)) = &self.broken
            && *difference == task.difference
        {
            match temporary {
                true => self.left += 1,
                false => self.failed += 1,
            }
            return Ok(());
        }
        let place = format!("{}:{}", self.manifest.display(), task.line);
        let held = self.hold_difference(task);
        if let Err(error) = &held {
            self.broken = Some((task.difference.clone(), terminal::is_temporary(error)));
        }
        let Err(error) = held.and_then(|()| self.make(task)) else {
            return Ok(());
        };
        let stopped = matches!(error.downcast_ref(), Some(Error::Stopped { .. }));
        if stopped && !watch::stopping() {
            self.left += 1; // the deadline
            return Ok(());
        }
        if stopped {
            let hint = "the same command continues";
            return Err(Failure::interrupted(format!("{place}: {error}"))
                .hint(hint)
                .into());
        }
        if terminal::is_temporary(&error) {
            self.watcher.notice(&format!("{place}: {error}"));
            self.left += 1;
            return Ok(());
        }
        self.failed += 1;
        self.watcher.clear();
        terminal::message(format_args!("error: {place}: {}", terminal::chain(&error)));
        Ok(())
    }

    fn is_late(&self) -> bool {
        self.deadline
            .is_some_and(|deadline| Instant::now() >= deadline)
    }

    /// Makes the picture of a task with the difference at hand.
    fn make(&mut self, task: &Task) -> anyhow::Result<()> {
        let (Some((_, tokens)), Some(picture)) = (&self.tokens, &task.picture) else {
            return Ok(());
        };
        let started = Instant::now();
        let mut output = Outputs::folder(self.output, [&picture.name], false, &[])?;
        output.claim(&picture.name)?;
        output.check()?;
        let target = Target {
            b: load_image(&picture.wanted.b)?,
            caption_b: picture.wanted.caption.clone(),
        };
        let watcher = &mut *self.watcher;
        let observe = &mut |progress: &_| watcher.observe(progress);
        let applied = analogy::apply(self.models, tokens, &target, &task.config, observe)?;
        let config = &task.config;
        let groups: [&dyn super::settings::ErasedFlags; 2] = [&config.prompt, &config.generate];
        let mut recipe = Recipe::new("apply", self.chosen, self.paths, &groups)?;
        recipe.input("difference", text_of(task.difference_file(self.output)))?;
        recipe.input("difference_tokens", tokens.fingerprint())?;
        recipe.input("id", &picture.id)?;
        let mut b = Value::Null;
        output.publish_one(&picture.name, |path| {
            b = apply::write(&applied, &picture.wanted.b, recipe, path)?;
            Ok(())
        })?;
        self.took("apply", started)?;
        let path = output.path(&picture.name);
        if !self.json {
            self.watcher.result(path.display())?;
        }
        self.results.push(json!({
            "line": task.line, "id": picture.id, "b": b, "b_prime": text_of(&path),
            "difference": text_of(task.difference_file(self.output)),
        }));
        Ok(())
    }

    /// Takes the difference of a task in hand: from its file, or learned now.
    fn hold_difference(&mut self, task: &Task) -> anyhow::Result<()> {
        if self
            .tokens
            .as_ref()
            .is_some_and(|(id, _)| *id == task.difference)
        {
            return Ok(());
        }
        self.tokens = None;
        let path = task.difference_file(self.output);
        if let Source::Pairs(pairs) = &task.source {
            let mut waits = false;
            while !path.is_file() {
                match self.learn(task, pairs, &path) {
                    Ok(()) => {}
                    // Where there are no locks, another run may have learned the same.
                    Err(_) if path.is_file() => {}
                    Err(error) if terminal::is_temporary(&error) && !self.is_late() => {
                        if !waits {
                            let learns = "another run learns it; this one waits";
                            self.watcher
                                .notice(&format!("{}: {learns}", path.display()));
                        }
                        waits = true;
                        std::thread::sleep(BETWEEN_LOOKS);
                        if watch::stopping() {
                            return Err(Failure::interrupted("stopped").into());
                        }
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        let tokens = DifferenceTokens::load(&path, self.models.pipeline().device())?;
        self.tokens = Some((task.difference.clone(), tokens));
        Ok(())
    }

    /// Learns the difference of pairs and writes it to `path`.
    fn learn(&mut self, task: &Task, pairs: &[PairFiles], path: &Path) -> anyhow::Result<()> {
        let started = Instant::now();
        let checkpoint = checkpoint::beside(path);
        let mut output = Outputs::file(path, Kind::Tensors, false, &[])?;
        let (name, spent) = (file_name(path), file_name(&checkpoint));
        output.claim(&spent)?;
        output.check()?;
        let job = LearnJob {
            pairs: pairs.to_vec(),
            settings: task.config.clone(),
            // Its name says that it is of the same pairs and settings.
            records: checkpoint::records(&checkpoint, checkpoint.exists(), false)?,
        };
        let examples = job.open(self.models.pipeline().device())?;
        let deadline = self.deadline;
        let watcher = &mut *self.watcher;
        let learned = job.run(self.models, &examples, &mut |progress| {
            let late = deadline.is_some_and(|deadline| Instant::now() >= deadline);
            match watcher.observe(progress) {
                ControlFlow::Continue(()) if late => ControlFlow::Break(()),
                flow => flow,
            }
        })?;
        output.publish(Some(&spent), |place| {
            Ok(learned.tokens.save(&place(&name))?)
        })?;
        self.took("learn", started)?;
        if !self.json {
            self.watcher.result(path.display())?;
        }
        Ok(())
    }

    /// Notes how long something took.
    fn took(&self, kind: &str, started: Instant) -> anyhow::Result<()> {
        let file = File::options().create(true).append(true).open(&self.times);
        let mut file = file.map_err(Error::io(&self.times))?;
        let line = Times::line(kind, started.elapsed().as_secs_f64());
        Ok(file
            .write_all(line.as_bytes())
            .map_err(Error::io(&self.times))?)
    }
}
