//! `dinv apply`: a learned difference, on any number of pictures.

use std::path::{Path, PathBuf};

use clap::Args;
use difference_inversion::Error;
use difference_inversion::image::{load_image, save_png};
use difference_inversion::job::ApplyJob;
use difference_inversion::job::Job as _;
use difference_inversion::job::TargetFile;
use difference_inversion::method::analogy::{self, Applied};
use difference_inversion::method::difference::DifferenceTokens;
use difference_inversion::method::generate_config::AnalogyConfig;
use difference_inversion::models::denoiser::Memory;
use serde_json::{Value, json};

use super::fetch::{Fetcher, Needs};
use super::fitting::{self, Measured};
use super::flags::{General, GenerateFlags, ModelSettings, PromptFlags, SeedFlag, check_captions};
use super::output::OutputFolder;
use super::record::{Recipe, file_name, text_of};
use super::terminal::{self, Failure};
use super::vocabulary;
use super::watch::{self, Watcher};

/// Apply a learned difference to pictures
///
/// Every B gives a PNG of the same name in the output folder.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  dinv apply night.safetensors --b street.jpg -o nights
  dinv apply night.safetensors --b photos/*.jpg -o nights --strength 0.7
  dinv apply night.safetensors --b photos/*.jpg -o nights --strength 0.7 --skip-existing
  dinv apply night.safetensors --b evening.png -o days --reverse")]
pub(crate) struct ApplyArgs {
    /// The difference, as `dinv learn` or `dinv analogy` wrote it
    #[arg(value_name = "DIFFERENCE")]
    difference: PathBuf,
    /// B, the pictures to change
    #[arg(long, value_name = "FILE", required = true, num_args = 1..)]
    b: Vec<PathBuf>,
    /// Folder for the results
    #[arg(long, short, value_name = "DIR")]
    output: PathBuf,
    /// Replace pictures of the same name in that folder
    #[arg(long)]
    overwrite: bool,
    /// Skip pictures whose results are in that folder already, to continue after an interruption
    #[arg(long, conflicts_with = "overwrite")]
    skip_existing: bool,
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
pub(crate) fn run(args: &ApplyArgs) -> anyhow::Result<()> {
    let mut jobs = args.jobs()?;
    let settings =
        args.general
            .settings(&[&args.prompt, &args.generate, &args.model, &args.seed])?;
    let models: ModelSettings = settings.resolve()?;
    let device = models.device()?;
    let tokens = DifferenceTokens::load(&args.difference, &device)?;
    let inputs: Vec<&Path> = (args.b.iter().chain([&args.difference]))
        .map(PathBuf::as_path)
        .collect();
    let names = jobs.iter().map(|job| job.name.as_str());
    let may_exist = args.overwrite || args.skip_existing;
    let output = OutputFolder::prepare(&args.output, names, may_exist, &inputs)?;
    if args.skip_existing {
        jobs.retain(|job| !output.path(&job.name).exists());
    }
    // One picture at a time: hundreds of photographs are more than the memory holds.
    let sizes = (jobs.iter())
        .map(|job| Ok((job.b, load_image(job.b)?.dimensions())))
        .collect::<anyhow::Result<Vec<Measured<'_>>>>()?;

    watch::catch_interrupts()?;
    let mut watcher = Watcher::new(args.general.quiet);
    let there = args.b.len() - jobs.len();
    if there > 0 {
        watcher.notice(&format!(
            "{there} of {} results exist and are kept",
            args.b.len()
        ));
    }
    if jobs.is_empty() {
        return args.finish(watcher, &[]);
    }
    let mut fetcher = Fetcher::new(&mut watcher)?;
    let model = fetcher.model_of_words(&models)?;
    let config = settings.clone().with_model(&model)?.analogy()?;
    let needs = Needs::of_prompts(!args.caption_b.is_empty(), &config.prompt);
    let unknown_words =
        vocabulary::note(&models, &model, args.caption_b.iter().map(String::as_str));
    let paths = fetcher.paths(&models, model, needs)?;
    watcher.notices(unknown_words);
    let unread = [config.prompt.unread(), config.generate.unread()].concat();
    watcher.notices(settings.without_effect(unread));
    let mut recipe = Recipe::new(
        "apply",
        &models,
        &paths,
        &[&config.prompt, &config.generate],
    )?;
    recipe.input("difference", text_of(&args.difference))?;
    let memory = models.memory()?;
    watcher.say(&format!(
        "applying {} to {}: {}",
        file_name(&args.difference),
        match jobs.as_slice() {
            [only] => file_name(only.b),
            several => format!("{} pictures", several.len()),
        },
        models.named(),
    ));
    let models = models.open(&paths, &mut watcher)?;
    analogy::check_apply(&models, &tokens, &config)?;
    watcher.notices(fitting::of_pictures(&sizes, models.pipeline().resolution()));
    if memory == Memory::Low {
        // The captioner is closed while a picture is made: all captions first, or it is opened for each.
        for job in &mut jobs {
            let mut observe = |progress: &_| watcher.observe(progress);
            let (_, target) = args.request(job, &config).open(&device)?;
            let caption = analogy::caption(&models, &target, &config, &mut observe);
            job.caption = Some(caption.map_err(|error| args.stopped(error, job))?);
        }
    }
    let mut results = Vec::new();
    for job in &jobs {
        let mut observe = |progress: &_| watcher.observe(progress);
        let request = args.request(job, &config);
        let applied = request
            .run(&models, &request.open(&device)?, &mut observe)
            .map_err(|error| args.stopped(error, job))?;
        let path = output.path(&job.name);
        let b = job.write(&applied, recipe.clone(), &path)?;
        if !args.general.json {
            terminal::line(path.display())?;
        }
        results.push(json!({ "b": b, "b_prime": text_of(&path) }));
    }
    args.finish(watcher, &results)
}

impl Job<'_> {
    /// Writes the result with its recipe to `path`; gives what the recipe says of B.
    fn write(&self, applied: &Applied, mut recipe: Recipe, path: &Path) -> anyhow::Result<Value> {
        let b = json!({
            "file": text_of(self.b), "caption": applied.caption_b, "prompt": applied.prompt_b,
        });
        recipe.input("b", &b)?;
        let text = [
            ("Software", recipe.program.as_str()),
            ("dinv", &recipe.to_line()?),
        ];
        save_png(path, &applied.b_prime, &text)?;
        Ok(b)
    }
}

impl ApplyArgs {
    /// What there is to do.
    fn jobs(&self) -> anyhow::Result<Vec<Job<'_>>> {
        check_captions("--caption-b", self.caption_b.len(), "--b", self.b.len())?;
        let mut captions = self.caption_b.iter();
        let jobs = self.b.iter().zip(output_names(&self.b)?);
        let jobs = jobs.map(|(b, name)| Job {
            b,
            caption: captions.next().cloned(),
            name,
        });
        Ok(jobs.collect())
    }

    /// What is asked for one picture.
    fn request(&self, job: &Job<'_>, settings: &AnalogyConfig) -> ApplyJob {
        ApplyJob {
            difference: self.difference.clone(),
            target: TargetFile {
                b: job.b.to_owned(),
                caption_b: job.caption.clone(),
            },
            settings: settings.clone(),
        }
    }

    /// Ends the work with what it gave.
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

    /// The error at a picture, and how to continue.
    fn stopped(&self, error: Error, job: &Job<'_>) -> anyhow::Error {
        match error {
            Error::Stopped { .. } if self.b.len() > 1 && !self.overwrite => Failure::interrupted(
                error.to_string(),
            )
            .hint("the same command with `--skip-existing` continues with the remaining pictures")
            .into(),
            error if self.b.len() > 1 => {
                anyhow::Error::from(error).context(job.b.display().to_string())
            }
            error => error.into(),
        }
    }
}

/// The name of each result, which no two may share.
fn output_names(pictures: &[PathBuf]) -> std::result::Result<Vec<String>, Failure> {
    let mut names: Vec<String> = Vec::new();
    for path in pictures {
        let stem = Path::new(path.file_stem().unwrap_or_default());
        let name = format!("{}.png", stem.display());
        if let Some(first) = names.iter().position(|known| *known == name) {
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
