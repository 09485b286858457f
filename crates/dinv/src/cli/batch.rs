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
use difference_inversion::image::load_image;
use difference_inversion::job::{Job, LearnJob, PairFiles};
use difference_inversion::method::analogy::{self, Target};
use difference_inversion::method::difference::DifferenceTokens;
use indicatif::HumanDuration;
use serde_json::{Value, json};

use self::manifest::{Entry, Source};
use self::plan::{DIFFERENCES, Effort, Identity, Shared, Task, TaskKind, Time, Times};

use super::apply;
use super::change;
use super::checkpoint::{self, Resume};
use super::demo_world;
use super::exit::Exit;
use super::fetch::{self, Fetcher, Needs};
use super::fitting::{self, Measured};
use super::flags::{
    DraftFlag, General, GenerateFlags, LearnFlags, Minutes, ModelSettings, PromptFlags, SeedFlag,
};
use super::learned_words;
use super::output::{Kind, Outputs};
use super::pictures::{self, Picture};
use super::record::{file_name, recipe_in, text_of};
use super::settings::Settings;
use super::shard::Shard;
use super::terminal::{self, Failure};
use super::watch::{self, Watcher};

/// How often a run looks whether another one has learned a difference.
const BETWEEN_LOOKS: Duration = Duration::from_millis(200);

/// Do many jobs from a file, learning each difference once
///
/// Every line of the file is a job, a JSON object: `a` and `a_prime`, or a `difference`; `b`; and optionally `caption_a`,
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
    /// In the folder and in each of its subfolders, the pictures called a and a_prime are a pair. The other pictures
    /// there, except b_prime, and those in a folder b are the ones to change.
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["jobs", "output", "dry_run", "minutes", "shard"])]
    from: Option<PathBuf>,
    /// List what would be made, and estimate the time from earlier results
    #[arg(long)]
    dry_run: bool,
    /// Begin no further job after N minutes, and interrupt learning; exit code 75
    #[arg(long, value_name = "N")]
    minutes: Option<Minutes>,
    /// Do only the i-th of n parts of the jobs, for runs on several machines; auto takes i and n from the
    /// scheduler, auto/n only i
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
    if output.exists() && !output.is_dir() {
        let message = format!("{}: expected a folder, found a file", output.display());
        return Err(Failure::usage(message).into());
    }
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
        identity: Identity::of(&paths)?,
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
        return args.finish(watcher, &work, Tally::default(), None);
    }
    let config = plan::analogy(&settings.clone().with_model(&paths.model)?, "all jobs")?;
    let unread = [
        config.prompt.unread(),
        config.learn.unread(),
        config.generate.unread(),
    ];
    watcher.notices(settings.without_effect(unread.concat()));
    watcher.notices(change::of_strength(config.generate.strength));
    watcher.notices(demo_world::of_words(&models, &paths.model, work.captions()));
    if !work.learning.is_empty() {
        work.check_learning(&models, &paths, !args.no_memory_check)?;
    }
    let pictures = work.read(&mut watcher)?;
    let none: [&str; 0] = [];
    Outputs::folder(output, none, false, &[])?;
    let differences = output.join(DIFFERENCES);
    fs::create_dir_all(&differences).map_err(Error::io(&differences))?;
    let opened = models.open(&paths, &mut watcher)?;
    watcher.notices(demo_world::of_first(&models, opened.pipeline(), &pictures)?);
    let sizes: Vec<Measured<'_>> = pictures.iter().map(|one| (one.path, one.size)).collect();
    watcher.notices(fitting::of_pictures(&sizes, opened.pipeline().resolution()));
    watcher.notices(learned_words::unknown(opened.pipeline(), work.captions()));
    let mut run = Run {
        models: &opened,
        chosen: &models,
        paths: &paths,
        output,
        manifest: path,
        deadline: args.minutes.map(|Minutes(time)| started + time),
        times: output.join(Times::file(shard)),
        watcher: &mut watcher,
        tokens: None,
        broken: None,
        tally: Tally::default(),
        json: args.general.json,
    };
    let stopped = work.tasks.iter().try_for_each(|task| run.try_task(task));
    let tally = run.tally;
    args.finish(watcher, &work, tally, stopped.err())
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
                let settings = settings.clone().with_line(&place, &entry.settings)?;
                let config = plan::analogy(&settings, &place)?;
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

    /// Reports the results, whatever ended the work.
    fn finish(
        &self,
        watcher: Watcher,
        work: &Work<'_>,
        tally: Tally,
        stopped: Option<anyhow::Error>,
    ) -> anyhow::Result<()> {
        let (_, notices) = watcher.finish();
        let Tally {
            results,
            kept,
            failures,
            unexpected,
            left,
        } = tally;
        let (made, failed) = (results.len(), failures.len());
        if self.general.json {
            terminal::json(&json!({
                "results": results, "done": work.done + kept, "failures": failures, "left": left, "notices": notices,
            }))?;
        }
        if let Some(stopped) = stopped {
            return Err(stopped);
        }
        let of_failed = format!("{failed} of {} failed", jobs(work.tasks.len()));
        if left > 0 {
            let also = if failed > 0 {
                format!("; {of_failed}")
            } else {
                String::new()
            };
            let message = format!("left for another time: {}{also}", jobs(left));
            return Err(Failure::temporary(message)
                .hint("the same command continues")
                .into());
        }
        if failed > 0 {
            let hint = "the same command tries them again, and keeps what is done";
            let exit = match unexpected {
                0 => Exit::Data,
                _ => Exit::Failed,
            };
            return Err(Failure::ending(exit, of_failed).hint(hint).into());
        }
        if !self.general.json && !self.general.quiet {
            terminal::message(format_args!("done: {made} made, {} kept", work.done + kept));
        }
        Ok(())
    }
}

/// A number of jobs, in words.
fn jobs(count: usize) -> String {
    match count {
        1 => "1 job".to_owned(),
        _ => format!("{count} jobs"),
    }
}

/// How the work went.
#[derive(Debug, Default)]
struct Tally {
    results: Vec<Value>,
    /// Jobs that another run has done meanwhile.
    kept: usize,
    failures: Vec<Value>,
    /// The failures that are not those of an input.
    unexpected: usize,
    /// Jobs that another run works on, or for which there was no time.
    left: usize,
}

/// What is left to do.
struct Work<'a> {
    tasks: Vec<&'a Task>,
    /// The number of jobs whose results are there.
    done: usize,
    /// The tasks whose differences are to be learned.
    learning: Vec<&'a Task>,
    output: &'a Path,
}

impl<'a> Work<'a> {
    /// Compares the tasks with the results that are there.
    fn of(all: &'a [Task], output: &'a Path, manifest: &Path) -> anyhow::Result<Self> {
        let mut work = Self {
            tasks: Vec::new(),
            done: 0,
            learning: Vec::new(),
            output,
        };
        let mut learned: Option<&str> = None;
        let mut others = Vec::new();
        for task in all {
            let there = match &task.picture {
                Some(picture) => picture.is_there(output).unwrap_or_else(|error| {
                    others.push(format!("{}:{}: {error}", manifest.display(), task.line));
                    true
                }),
                None => task.difference_file(output).is_file(),
            };
            if there {
                work.done += 1;
                continue;
            }
            if !task.difference_file(output).is_file() && learned != Some(&task.difference) {
                work.learning.push(task);
                learned = Some(&task.difference);
            }
            work.tasks.push(task);
        }
        if !others.is_empty() {
            let hint =
                "write elsewhere with `-o`, give these jobs other names, or remove the pictures";
            return Err(Failure::usage(manifest::listed(others)).hint(hint).into());
        }
        Ok(work)
    }

    /// The tasks that make a picture.
    fn pictures(&self) -> impl Iterator<Item = &'a Task> {
        let tasks = self.tasks.iter().copied();
        tasks.filter(|task| task.picture.is_some())
    }

    /// The captions that its lines give.
    fn captions(&self) -> impl Iterator<Item = &str> {
        self.tasks.iter().flat_map(|task| {
            let pairs = match &task.source {
                Source::Pairs(pairs) => pairs.as_slice(),
                Source::File(_) => &[],
            };
            let of_pairs = pairs
                .iter()
                .flat_map(|pair| [&pair.caption_a, &pair.caption_a_prime]);
            let of_b = task.picture.iter().map(|picture| &picture.wanted.caption);
            of_pairs
                .chain(of_b)
                .filter_map(|caption| caption.as_deref())
        })
    }

    /// Reports a dry run.
    fn tell(&self, as_json: bool) -> anyhow::Result<()> {
        let learning = self
            .learning
            .iter()
            .map(|task| (TaskKind::Learn, &task.learning));
        let drawing = self.pictures().map(|task| (TaskKind::Apply, &task.drawing));
        let seconds = Times::read(self.output).estimate(learning.chain(drawing));
        if as_json {
            let tasks = self.tasks.iter().map(|task| {
                json!({
                    "line": task.line, "difference": task.difference,
                    "id": task.picture.as_ref().map(|picture| &picture.id),
                    "output": text_of(task.file(self.output)),
                })
            });
            return terminal::json(&json!({
                "jobs": tasks.collect::<Vec<_>>(), "done": self.done,
                "differences": self.learning.len(), "pictures": self.pictures().count(), "seconds": seconds,
            }));
        }
        for task in &self.tasks {
            terminal::line(task.file(self.output).display())?;
        }
        match seconds {
            _ if self.tasks.is_empty() => terminal::message("nothing is left to do"),
            Some(seconds) => terminal::message(format_args!(
                "about {}, judging by the existing results",
                HumanDuration(Duration::from_secs_f64(seconds.max(1.0)))
            )),
            None => terminal::message("how long that takes is known after the first results"),
        }
        Ok(())
    }

    /// Refuses learning that has no loss, and if `memory` learning that does not fit into it.
    fn check_learning(
        &self,
        models: &ModelSettings,
        paths: &ModelPaths,
        memory: bool,
    ) -> anyhow::Result<()> {
        let mut checked = Vec::new();
        for task in &self.learning {
            let Source::Pairs(pairs) = &task.source else {
                continue;
            };
            let config = &task.config.learn;
            models.check_loss(&paths.model, config)?;
            let has_captions = pairs.iter().all(PairFiles::has_captions);
            let captions = Needs::of_learning(has_captions, &task.config).captioner;
            let kind = (config.rows(pairs.len()), config.learn_resolution, captions);
            if memory && !checked.contains(&kind) {
                models.check_memory(paths, config, pairs.len(), captions)?;
                checked.push(kind);
            }
        }
        Ok(())
    }

    /// Reads every picture, so that all errors are reported before the work.
    fn read(&self, watcher: &mut Watcher) -> anyhow::Result<Vec<Picture<'a>>> {
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
        pictures::check(files.into_iter(), watcher)
    }
}

impl std::fmt::Display for Work<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{}: done {}, differences to learn {}, pictures to make {}",
            jobs(self.tasks.len() + self.done),
            self.done,
            self.learning.len(),
            self.pictures().count()
        )
    }
}

impl plan::Picture {
    /// Whether it is there; another picture in its place is an error.
    fn is_there(&self, output: &Path) -> Result<bool, String> {
        let path = output.join(&self.name);
        // While another run writes it, it may be there and empty.
        if fs::symlink_metadata(&path).map_or(true, |file| file.is_file() && file.len() == 0) {
            return Ok(false);
        }
        if recipe_in(&path).is_some_and(|recipe| recipe["id"] == self.id.as_str()) {
            return Ok(true);
        }
        Err(format!(
            "{} exists, and is the result of another job or of other settings",
            path.display()
        ))
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
    /// The difference that is unavailable, the line that failed to provide it, and the exit code for that failure.
    broken: Option<(String, usize, Exit)>,
    tally: Tally,
    json: bool,
}

impl Run<'_> {
    /// Does a task. Its failure is reported and does not end the work; a stop does.
    fn try_task(&mut self, task: &Task) -> anyhow::Result<()> {
        if self.is_late() {
            self.tally.left += 1;
            return Ok(());
        }
        if let Some((difference, line, exit)) = &self.broken
            && *difference == task.difference
        {
            if *exit == Exit::Again {
                self.tally.left += 1;
            } else {
                let message = format!("its difference is unavailable, see line {line}");
                self.fail(task, &Failure::ending(*exit, message).into());
            }
            return Ok(());
        }
        let held = self.hold_difference(task);
        if let Err(error) = &held {
            self.broken = Some((task.difference.clone(), task.line, terminal::exit_of(error)));
        }
        let Err(error) = held.and_then(|()| self.make(task)) else {
            return Ok(());
        };
        if watch::stopping() {
            let message = format!("{}:{}: {error}", self.manifest.display(), task.line);
            let failure = Failure::interrupted(message);
            return Err(failure.hint("the same command continues").into());
        }
        if matches!(error.downcast_ref(), Some(Error::Stopped { .. })) {
            self.tally.left += 1; // the time is over
        } else if terminal::is_temporary(&error) {
            let place = format!("{}:{}", self.manifest.display(), task.line);
            self.watcher.notice(&format!("{place}: {error}"));
            self.tally.left += 1;
        } else {
            self.fail(task, &error);
        }
        Ok(())
    }

    /// Reports a failure.
    fn fail(&mut self, task: &Task, error: &anyhow::Error) {
        let place = format!("{}:{}", self.manifest.display(), task.line);
        let (message, hint) = (terminal::chain(error), terminal::hint(error));
        self.watcher.clear();
        terminal::message(format_args!("error: {place}: {message}"));
        if let Some(hint) = &hint {
            terminal::message(format_args!("hint: {hint}"));
        }
        let failure = json!({ "line": task.line, "message": message, "hint": hint });
        self.tally.failures.push(failure);
        self.tally.unexpected += usize::from(!terminal::exit_of(error).is_final());
    }

    fn is_late(&self) -> bool {
        self.deadline
            .is_some_and(|deadline| Instant::now() >= deadline)
    }

    /// Makes the picture of a task with the difference at hand.
    fn make(&mut self, task: &Task) -> anyhow::Result<()> {
        let Some((_, tokens)) = &self.tokens else {
            return Ok(());
        };
        let difference = task.difference_file(self.output);
        let Some(picture) = &task.picture else {
            let learned = json!({ "line": task.line, "difference": text_of(&difference) });
            self.tally.results.push(learned);
            return Ok(());
        };
        let started = Instant::now();
        let mut output = Outputs::folder(self.output, [&picture.name], false, &[])?;
        output.claim(&picture.name)?;
        if picture.is_there(self.output).map_err(Failure::new)? {
            self.tally.kept += 1; // another run was faster
            return Ok(());
        }
        output.check()?;
        let target = Target {
            b: load_image(&picture.wanted.b)?,
            caption_b: picture.wanted.caption.clone(),
        };
        let watcher = &mut *self.watcher;
        let observe = &mut |progress: &_| watcher.observe(progress);
        let applied = analogy::apply(self.models, tokens, &target, &task.config, observe)?;
        let made = (difference.as_path(), tokens);
        let mut recipe = apply::recipe(self.chosen, self.paths, &task.config, made)?;
        recipe.input("id", &picture.id)?;
        let mut b = Value::Null;
        output.publish_one(&picture.name, |path| {
            b = apply::write(&applied, &picture.wanted.b, recipe, path)?;
            Ok(())
        })?;
        self.took(TaskKind::Apply, &task.drawing, started);
        let path = output.path(&picture.name);
        if !self.json {
            self.watcher.result(path.display())?;
        }
        self.tally.results.push(json!({
            "line": task.line, "id": picture.id, "b": b, "b_prime": text_of(&path),
            "difference": text_of(&difference),
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
            loop {
                match self.learn(task, pairs, &path) {
                    Ok(()) => break,
                    Err(error) if is_held(&error) && !self.is_late() => {
                        if !waits {
                            let learns = "another run learns it; this one waits";
                            self.watcher
                                .notice(&format!("{}: {learns}", path.display()));
                        }
                        waits = true;
                        std::thread::sleep(BETWEEN_LOOKS);
                        if watch::stopping() {
                            return Err(error);
                        }
                    }
                    // Where there are no locks, another run may have learned the same.
                    Err(_) if path.is_file() => break,
                    Err(error) => return Err(error),
                }
            }
        }
        let tokens = DifferenceTokens::load(&path, self.models.pipeline().device());
        let tokens = tokens.map_err(|error| again_without(error, task, &path))?;
        self.tokens = Some((task.difference.clone(), tokens));
        Ok(())
    }

    /// Learns the difference of pairs and writes it to `path`, unless it is there.
    fn learn(&mut self, task: &Task, pairs: &[PairFiles], path: &Path) -> anyhow::Result<()> {
        let started = Instant::now();
        let checkpoint = checkpoint::beside(path);
        let mut output = Outputs::file(path, Kind::Tensors, false, &[])?;
        let (name, spent) = (file_name(path), file_name(&checkpoint));
        output.claim(&spent)?; // while another run writes the file, it may be there and empty
        if path.is_file() {
            return Ok(());
        }
        output.check()?;
        let job = LearnJob {
            pairs: pairs.to_vec(),
            settings: task.config.clone(),
            // Its name says that it is of the same pairs and settings.
            records: checkpoint::records(&checkpoint, Resume::IfThere, false)?,
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
        });
        let learned = learned.map_err(|error| again_without(error, task, &checkpoint))?;
        output.publish(Some(&spent), |place| {
            Ok(learned.tokens.save(&place(&name))?)
        })?;
        self.took(TaskKind::Learn, &task.learning, started);
        if !self.json {
            self.watcher.result(path.display())?;
        }
        Ok(())
    }

    /// Notes how long something took, for later estimates; without a note there is none.
    fn took(&self, kind: TaskKind, effort: &Effort, started: Instant) {
        let file = File::options().create(true).append(true).open(&self.times);
        let time = Time {
            kind,
            effort: effort.clone(),
            seconds: started.elapsed().as_secs_f64(),
        };
        let _ = file.and_then(|mut file| file.write_all(time.line().as_bytes()));
    }
}

/// Whether another run writes the difference, which is a failure of the command line and not of the library.
fn is_held(error: &anyhow::Error) -> bool {
    error.is::<Failure>() && terminal::is_temporary(error)
}

/// An error; if it is about a file that this command wrote and can write again, with a hint.
fn again_without(error: Error, task: &Task, file: &Path) -> anyhow::Error {
    let is_ours = matches!(task.source, Source::Pairs(_));
    match error {
        Error::InvalidFile { ref path, .. } if is_ours && path == file => {
            let hint = format!(
                "remove {}: the same command learns it again",
                file.display()
            );
            Failure::input(error.to_string()).hint(hint).into()
        }
        error => error.into(),
    }
}
