//! `dinv apply`: applies a learned difference to any number of pictures.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::Args;
use difference_inversion::Error;
use difference_inversion::diffusion::family::Family;
use difference_inversion::diffusion::frozen::{ModelPaths, Models};
use difference_inversion::image::save_png;
use difference_inversion::method::analogy::{self, Applied, Target};
use difference_inversion::method::difference::DifferenceTokens;
use difference_inversion::method::generate_config::AnalogyConfig;
use difference_inversion::method::prompt::PromptConfig;
use difference_inversion::models::denoiser::Memory;
use serde_json::{Map, Value, json};

use super::analogy::DIFFERENCE;
use super::change;
use super::demo_world;
use super::fetch::{self, Fetcher, Needs};
use super::fitting::{self, Measured};
use super::flags::{
    DraftFlag, General, GenerateFlags, ModelSettings, PreviewFlag, PromptFlags, SeedFlag, TimeFlag,
    check_captions,
};
use super::learned_words;
use super::output::Outputs;
use super::pictures::{self, Picture};
use super::record::{Recipe, file_name, recipe_in, text_of};
use super::settings::{ErasedFlags, Settings};
use super::shard::Shard;
use super::terminal::{self, Failure};
use super::watch::Watcher;

/// Apply a learned difference to pictures
///
/// Every B gives a PNG of the same name in the output folder.
#[derive(Debug, Args)]
#[command(
    override_usage = "dinv apply [OPTIONS] <DIFFERENCE> --b <FILE>... --output <DIR>",
    after_help = "Examples:
  dinv apply night.safetensors --model sd15 --b street.jpg -o nights
  dinv apply night.safetensors --model sd15 --b photos -o nights --strength 0.7
  dinv apply night.safetensors --model sd15 --b photos -o nights --skip-existing
  dinv apply night.safetensors --model sd15 --b evening.png -o days --reverse"
)]
pub(crate) struct ApplyArgs {
    /// The difference, as `dinv learn` or `dinv analogy` wrote it
    #[arg(value_name = "DIFFERENCE")]
    difference: Option<PathBuf>,
    /// B, the pictures to change; a folder stands for the pictures in it
    #[arg(long, value_name = "FILE", required = true, num_args = 1..)]
    b: Vec<PathBuf>,
    /// Folder for the results
    #[arg(long, short, value_name = "DIR")]
    output: PathBuf,
    /// Replace pictures of the same name in that folder
    #[arg(long, conflicts_with = "minutes")]
    overwrite: bool,
    /// Skip pictures whose results are in that folder already, to continue after an interruption
    #[arg(long, conflicts_with = "overwrite")]
    skip_existing: bool,
    /// Process only the i-th of n parts of the pictures, for runs on several machines; auto takes i and
    /// n from the scheduler, auto/n only i
    #[arg(long, value_name = "i/n", hide_short_help = true)]
    shard: Option<Shard>,
    /// Caption of B instead of the captioner's
    ///
    /// Once per picture.
    #[arg(long, value_name = "TEXT", help_heading = "Prompts")]
    caption_b: Vec<String>,
    #[command(flatten)]
    prompt: PromptFlags,
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

/// One picture and its result.
struct Job<'a> {
    b: &'a Path,
    caption: Option<String>,
    /// The name of the result.
    name: String,
}

/// Applies the difference to every picture.
pub(crate) fn run(mut args: ApplyArgs) -> anyhow::Result<()> {
    let difference = args.difference()?;
    args.b = pictures::in_folders(&args.b)?;
    args.skip_existing |= args.time.is_limited();
    let args = &args;
    let mut jobs = args.jobs()?;
    let settings = args.settings()?;
    let models: ModelSettings = settings.resolve()?;
    let device = models.device()?;
    refuse_folder(&difference)?;
    let tokens = DifferenceTokens::load(&difference, &device)?;
    let (mut output, left_out) = args.outputs(&difference, &jobs)?;
    let all = jobs.len();
    jobs.retain(|job| !left_out.contains(&job.name));

    args.time.watch()?;
    let mut watcher = Watcher::new(args.general.quiet);
    args.announce(all, left_out.len(), &mut watcher);
    let read = pictures::check(jobs.iter().map(|job| job.b), &mut watcher)?;
    let sizes: Vec<Measured<'_>> = read.iter().map(|b| (b.path, b.size)).collect();
    if jobs.is_empty() {
        let on_disk = fetch::on_disk(&models).and_then(|(paths, _)| {
            let config = settings.with_model(&paths.model)?.analogy()?;
            recipe(&models, &paths, &config, (&difference, &tokens))
        });
        // On a machine without the model, what others made cannot be compared.
        if let Ok(recipe) = on_disk {
            args.check_left_out(&recipe, &left_out, &output)?;
        }
        return args.finish(watcher, &[]);
    }
    let mut fetcher = Fetcher::new(&mut watcher, args.general.yes)?;
    let needs = |config: &PromptConfig| Needs::of_prompts(!args.caption_b.is_empty(), config);
    let model = fetcher.model_of_words(&models, needs(&settings.clone().analogy()?.prompt))?;
    // Before the model's other parts are downloaded.
    if let Some((denoiser, widths)) = text_widths(&model, &models)? {
        tokens.check_widths(denoiser, &widths)?;
    }
    let mut config = settings.clone().with_model(&model)?.analogy()?;
    config.generate.previews = args.preview.is_read();
    let needs = needs(&config.prompt);
    let unknown_words =
        demo_world::of_words(&models, &model, args.caption_b.iter().map(String::as_str));
    let paths = fetcher.paths(&models, model, needs)?;
    watcher.notices(unknown_words);
    let unread = [config.prompt.unread(), config.generate.unread()].concat();
    watcher.notices(settings.without_effect(unread));
    watcher.notices(change::of_strength(config.generate.strength));
    let recipe = recipe(&models, &paths, &config, (&difference, &tokens))?;
    args.check_left_out(&recipe, &left_out, &output)?;
    let memory = models.memory()?;
    watcher.say(&format!(
        "applying {} to {}: {}",
        file_name(&difference),
        match jobs.as_slice() {
            [only] => file_name(only.b),
            several => format!("{} pictures", several.len()),
        },
        models.named(),
    ));
    let chosen = models;
    let models = chosen.open(&paths, &mut watcher)?;
    let given = args.caption_b.iter().map(String::as_str);
    watcher.notices(learned_words::unknown(models.pipeline(), given));
    analogy::check_apply(&models, &tokens, &config)?;
    watcher.notices(demo_world::of_first(&chosen, models.pipeline(), &read)?);
    watcher.notices(fitting::of_pictures(&sizes, models.pipeline().resolution()));
    if memory == Memory::Low {
        // The captioner is closed while a picture is made. Captioning all pictures first opens it only once.
        args.caption_all(&mut jobs, &read, (&models, &config), &mut watcher)?;
    }
    let (mut results, mut left) = (Vec::new(), 0);
    for (job, b) in jobs.iter().zip(&read) {
        let path = output.path(&job.name);
        // Another run may be working in the folder.
        match args.claim(&mut output, &job.name, &mut watcher)? {
            Claimed::Mine => {}
            Claimed::There => continue,
            Claimed::Elsewhere => {
                left += 1;
                continue;
            }
        }
        let mut observe = |progress: &_| watcher.observe(progress);
        let applied = (job.target(b))
            .and_then(|target| analogy::apply(&models, &tokens, &target, &config, &mut observe))
            .map_err(|error| args.stopped(error, job))?;
        let mut b = Value::Null;
        output.publish_one(&job.name, |path| {
            b = write(&applied, job.b, recipe.clone(), path)?;
            Ok(())
        })?;
        output.give_back();
        if !args.general.json {
            watcher.result(path.display())?;
        }
        results.push(json!({ "b": b, "b_prime": text_of(&path) }));
    }
    args.finish(watcher, &results)?;
    if left > 0 {
        let message = format!("left to other runs: {left} of {} pictures", jobs.len());
        let failure = Failure::temporary(message).hint("the same command makes what they leave");
        return Err(failure.into());
    }
    Ok(())
}

/// Who makes a result.
enum Claimed {
    /// This run.
    Mine,
    /// Another run has made it.
    There,
    /// Another run is making it.
    Elsewhere,
}

/// Refuses a folder in place of a difference, and names the difference in it.
fn refuse_folder(difference: &Path) -> anyhow::Result<()> {
    if !difference.is_dir() {
        return Ok(());
    }
    let message = format!("{}: a folder, expected a difference", difference.display());
    let inside = difference.join(DIFFERENCE);
    let failure = Failure::input(message);
    Err(match inside.is_file() {
        true => failure.hint(format!("did you mean {}?", inside.display())),
        false => failure,
    }
    .into())
}

impl Job<'_> {
    /// The picture with its caption.
    fn target(&self, b: &Picture<'_>) -> Result<Target, Error> {
        Ok(Target {
            b: b.read()?,
            caption_b: self.caption.clone(),
        })
    }
}

/// Writes B′ with its recipe to `path`; returns the recipe's entry about B.
pub(crate) fn write(
    applied: &Applied,
    b: &Path,
    mut recipe: Recipe,
    path: &Path,
) -> anyhow::Result<Value> {
    let b = json!({
        "file": text_of(b), "caption": applied.caption_b, "prompt": applied.prompt_b,
    });
    recipe.input("b", &b)?;
    let text = [
        ("Software", recipe.program.as_str()),
        ("dinv", &recipe.to_line()?),
    ];
    save_png(path, &applied.b_prime, &text)?;
    Ok(b)
}

/// What determines the results, except B.
pub(super) fn recipe(
    models: &ModelSettings,
    paths: &ModelPaths,
    config: &AnalogyConfig,
    (difference, tokens): (&Path, &DifferenceTokens),
) -> anyhow::Result<Recipe> {
    let groups: [&dyn ErasedFlags; 2] = [&config.prompt, &config.generate];
    let mut recipe = Recipe::new("apply", models, paths, &groups)?;
    recipe.input("difference", text_of(difference))?;
    recipe.input("difference_tokens", tokens.fingerprint())?;
    Ok(recipe)
}

impl ApplyArgs {
    /// The given settings.
    pub(crate) fn settings(&self) -> anyhow::Result<Settings> {
        self.general.settings(&[
            &self.prompt,
            &self.generate,
            &self.model,
            &self.seed,
            &self.draft,
        ])
    }

    /// The difference. `--b` takes all arguments after it, so the difference may be its last one.
    fn difference(&mut self) -> Result<PathBuf, Failure> {
        let is_difference = |path: &PathBuf| {
            let extension = path.extension().unwrap_or_default();
            extension.eq_ignore_ascii_case("safetensors")
        };
        let among = self.b.iter().position(is_difference);
        match (self.difference.take(), among) {
            (Some(difference), _) => Ok(difference),
            (None, Some(at)) if self.b.len() > 1 => Ok(self.b.remove(at)),
            (None, _) => {
                let failure = Failure::usage("the difference is missing");
                Err(failure
                    .hint("put it first: `dinv apply night.safetensors --b street.jpg -o nights`"))
            }
        }
    }

    /// The results to make, and the names of those skipped because they exist.
    fn outputs(
        &self,
        difference: &Path,
        jobs: &[Job<'_>],
    ) -> anyhow::Result<(Outputs, Vec<String>)> {
        let mut inputs: Vec<&Path> = self.b.iter().map(PathBuf::as_path).collect();
        inputs.push(difference);
        inputs.extend(self.general.config.as_deref());
        let names = jobs.iter().map(|job| job.name.as_str());
        let mut output = Outputs::folder(&self.output, names, self.overwrite, &inputs)?;
        let there = match self.skip_existing {
            true => output.leave_out_existing(),
            false => Vec::new(),
        };
        output.check().map_err(|error| self.or_skip(error))?;
        Ok((output, there))
    }

    /// Says which part of the pictures this run takes, and how many of their results are kept.
    fn announce(&self, all: usize, kept: usize, watcher: &mut Watcher) {
        let shard = self.shard.unwrap_or_default();
        shard.announce(watcher);
        if all == 0 {
            watcher.notice(&format!("{shard} has no pictures"));
        }
        if kept > 0 {
            watcher.notice(&format!("{kept} of {all} results exist and are kept"));
        }
    }

    /// Captions all pictures.
    fn caption_all(
        &self,
        jobs: &mut [Job<'_>],
        read: &[Picture<'_>],
        (models, config): (&Models, &AnalogyConfig),
        watcher: &mut Watcher,
    ) -> anyhow::Result<()> {
        for (job, b) in jobs.iter_mut().zip(read) {
            let mut observe = |progress: &_| watcher.observe(progress);
            let caption = (job.target(b))
                .and_then(|target| analogy::caption(models, &target, config, &mut observe));
            job.caption = Some(caption.map_err(|error| self.stopped(error, job))?);
        }
        Ok(())
    }

    /// The pictures to process.
    fn jobs(&self) -> anyhow::Result<Vec<Job<'_>>> {
        check_captions("--caption-b", self.caption_b.len(), "--b", self.b.len())?;
        let mut captions = self.caption_b.iter();
        let jobs = self.b.iter().zip(output_names(&self.b)?);
        let jobs = jobs.map(|(b, name)| Job {
            b,
            caption: captions.next().cloned(),
            name,
        });
        let shard = self.shard.unwrap_or_default();
        let own = jobs.enumerate().filter(|(place, _)| shard.has(*place));
        Ok(own.map(|(_, job)| job).collect())
    }

    /// Checks that the skipped results are what this run would make.
    fn check_left_out(
        &self,
        ours: &Recipe,
        names: &[String],
        output: &Outputs,
    ) -> anyhow::Result<()> {
        let jobs = self.jobs()?;
        let mut left_out = jobs.iter().filter(|job| names.contains(&job.name));
        left_out.try_for_each(|job| self.check_same(ours, job, &output.path(&job.name)))
    }

    /// Checks that an existing result is what this run would make, as far as its recipe states.
    fn check_same(&self, ours: &Recipe, job: &Job<'_>, path: &Path) -> anyhow::Result<()> {
        let mut ours = ours.clone();
        ours.input("b", json!({ "file": text_of(job.b) }))?;
        let ours: Value = serde_json::from_str(&ours.to_line()?)?;
        let difference = match recipe_in(path) {
            Some(theirs) => difference_of(&theirs, &ours),
            None => Some("by something else".to_owned()),
        };
        let Some(difference) = difference else {
            return Ok(());
        };
        let message = format!("{} exists, but was made {difference}", path.display());
        Err(Failure::usage(message)
            .hint("write elsewhere with `-o`, or make all of them again with `--overwrite`")
            .into())
    }

    /// Adds to the hint that existing results can be skipped.
    fn or_skip(&self, error: anyhow::Error) -> anyhow::Error {
        match error.downcast::<Failure>() {
            Ok(failure) if failure.to_string().ends_with("exists already") => failure
                .hint(
                    "write elsewhere with `-o`, add `--skip-existing` to make only those that are missing, or \
                     `--overwrite`",
                )
                .into(),
            Ok(failure) => failure.into(),
            Err(error) => error,
        }
    }

    /// Claims a result. With `--skip-existing`, those of other runs are left out.
    fn claim(
        &self,
        output: &mut Outputs,
        name: &str,
        watcher: &mut Watcher,
    ) -> anyhow::Result<Claimed> {
        match output.claim(name) {
            Err(error) if self.skip_existing && terminal::is_temporary(&error) => {
                watcher.notice(&format!("{error}; it is left to that run"));
                return Ok(Claimed::Elsewhere);
            }
            claimed => claimed?,
        }
        let path = output.path(name);
        if self.skip_existing && path.exists() {
            let done = format!("{} is kept: another run has written it", path.display());
            watcher.notice(&done);
            output.give_back();
            return Ok(Claimed::There);
        }
        Ok(Claimed::Mine)
    }

    /// Ends the work and reports the results.
    fn finish(&self, watcher: Watcher, results: &[Value]) -> anyhow::Result<()> {
        let (_, notices) = watcher.finish();
        if self.general.json {
            return terminal::json(&json!({ "results": results, "notices": notices }));
        }
        if !self.general.quiet && !results.is_empty() {
            let pictures = if results.len() == 1 {
                "picture"
            } else {
                "pictures"
            };
            let folder = self.output.display();
            terminal::message(format_args!(
                "done: {} {pictures} in {folder}",
                results.len()
            ));
        }
        Ok(())
    }

    /// The error for a picture, with a hint on how to continue.
    fn stopped(&self, error: Error, job: &Job<'_>) -> anyhow::Error {
        match error {
            Error::Stopped { .. } if self.b.len() > 1 && !self.overwrite => {
                let with = match self.skip_existing {
                    true => "",
                    false => " with `--skip-existing`",
                };
                let hint = format!("the same command{with} continues with the remaining pictures");
                Failure::interrupted(error.to_string()).hint(hint).into()
            }
            error if self.b.len() > 1 => {
                anyhow::Error::from(error).context(job.b.display().to_string())
            }
            error => error.into(),
        }
    }
}

/// The name of a model's denoiser, and the widths of the token embeddings of the text encoders that difference
/// tokens are learned for, as far as its configurations state them.
fn text_widths(
    model: &Path,
    settings: &ModelSettings,
) -> Result<Option<(&'static str, Vec<usize>)>, anyhow::Error> {
    let files = settings.files_before_download(model)?;
    let family = Family::of(&files)?;
    let learned = (family.text_encoders.iter()).filter(|encoder| encoder.learned);
    let widths = learned.map(|encoder| {
        let config: Value = files.config(encoder.part).ok()?;
        let width = config
            .get("hidden_size")
            .or_else(|| config.get("d_model"))?;
        usize::try_from(width.as_u64()?).ok()
    });
    let widths: Option<Vec<usize>> = widths.collect();
    Ok(widths.map(|widths| (family.denoiser.title, widths)))
}

/// The first setting in which the recipes of two results differ.
fn difference_of(theirs: &Value, ours: &Value) -> Option<String> {
    let file = "/b/file";
    if let (Some(theirs), Some(ours)) = (theirs.pointer(file), ours.pointer(file))
        && theirs != ours
    {
        return Some(format!("from {theirs}, not from {ours}"));
    }
    for name in ["command", "difference_tokens", "difference", "model"] {
        match (&theirs[name], &ours[name]) {
            (Value::Null, _) => {} // of an older program
            (theirs, ours) if theirs == ours => {}
            _ if name == "difference_tokens" => return Some("with another difference".to_owned()),
            (theirs, ours) => return Some(format!("with the {name} {theirs}, not {ours}")),
        }
    }
    let (theirs, ours) = (
        theirs["settings"].as_object()?,
        ours["settings"].as_object()?,
    );
    let names = ours.keys().chain(theirs.keys());
    let differing = |name: &&String| theirs.get(*name) != ours.get(*name);
    let name = names.into_iter().find(differing)?;
    let value = |settings: &Map<String, Value>| match settings.get(name) {
        Some(value) => value.to_string(),
        None => "the default".to_owned(),
    };
    Some(format!(
        "with {name} {}, not {}",
        value(theirs),
        value(ours)
    ))
}

/// The name of each result; no two may be equal.
fn output_names(pictures: &[PathBuf]) -> std::result::Result<Vec<String>, Failure> {
    let (mut names, mut taken) = (Vec::new(), BTreeMap::new());
    for path in pictures {
        let stem = Path::new(path.file_stem().unwrap_or_default());
        let name = format!("{}.png", stem.display());
        // Some systems do not tell upper case from lower case.
        if let Some(first) = taken.insert(name.to_lowercase(), names.len()) {
            let message = format!(
                "{} and {} would both be written to {name}",
                pictures[first].display(),
                path.display()
            );
            return Err(Failure::usage(message).hint("apply the difference to them one by one"));
        }
        names.push(name);
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(paths: &[&str]) -> std::result::Result<Vec<String>, Failure> {
        output_names(&paths.iter().map(PathBuf::from).collect::<Vec<_>>())
    }

    #[test]
    fn results_are_named_after_the_pictures() {
        assert_eq!(
            names(&["x/cat.jpg", "dog.v2.png"]).unwrap(),
            ["cat.png", "dog.v2.png"]
        );
        // Where file names ignore case, these are one file.
        let message = names(&["IMG_1.jpg", "img_1.png"]).unwrap_err().to_string();
        assert!(message.contains("IMG_1.jpg and img_1.png"), "{message}");
    }

    #[test]
    fn results_of_another_recipe_are_told() {
        let recipe = |difference: &str, strength: f64, file: &str| {
            json!({
                "command": "apply", "model": "demo/model", "difference": "d.safetensors",
                "difference_tokens": difference, "settings": { "strength": strength },
                "b": { "file": file },
            })
        };
        let ours = recipe("1", 1.0, "b.png");
        let told = |theirs: &Value| difference_of(theirs, &ours);
        assert_eq!(told(&ours), None);
        for (theirs, expected) in [
            (recipe("2", 1.0, "b.png"), "with another difference"),
            (recipe("1", 0.2, "b.png"), "with strength 0.2, not 1.0"),
            (
                recipe("1", 1.0, "b.jpg"),
                "from \"b.jpg\", not from \"b.png\"",
            ),
        ] {
            assert_eq!(told(&theirs).as_deref(), Some(expected));
        }
    }

    #[test]
    fn two_pictures_may_not_share_a_result() {
        let error = names(&["x/cat.jpg", "y/cat.png"]).unwrap_err().to_string();
        assert_eq!(
            error,
            "x/cat.jpg and y/cat.png would both be written to cat.png"
        );
    }
}
