//! `dinv apply`: a learned difference, on any number of pictures.

use std::path::{Path, PathBuf};

use clap::Args;
use difference_inversion::analogy::{self, Target};
use difference_inversion::image::{load_image, save_png};
use difference_inversion::tokens::DifferenceTokens;
use serde_json::json;

use super::fetch::{Fetcher, Needs};
use super::flags::{General, GenerateFlags, ModelSettings, PromptFlags, SeedFlag, check_captions};
use super::output::OutputFolder;
use super::record::Recipe;
use super::report::{self, Failure};
use super::watch::{self, Watcher};

/// Apply a learned difference to pictures
///
/// Every B gives a PNG of the same name in the output folder.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  dinv apply night.safetensors --b street.jpg -o nights
  dinv apply night.safetensors --b photos/*.jpg -o nights --strength 0.7
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
    /// Caption of B in place of the captioner's; once per picture
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

/// Applies the difference to every picture.
pub(crate) fn run(args: &ApplyArgs) -> anyhow::Result<()> {
    check_captions("--caption-b", args.caption_b.len(), "--b", args.b.len())?;
    let names = output_names(&args.b)?;
    let settings =
        args.general
            .settings(&[&args.prompt, &args.generate, &args.model, &args.seed])?;
    let models: ModelSettings = settings.resolve()?;
    let tokens = DifferenceTokens::load(&args.difference, &models.device()?)?;
    let pictures = args
        .b
        .iter()
        .map(|b| load_image(b))
        .collect::<Result<Vec<_>, _>>()?;
    let output = OutputFolder::prepare(&args.output, names.clone(), args.overwrite)?;

    watch::catch_interrupts()?;
    let mut watcher = Watcher::new(args.general.quiet);
    let mut fetcher = Fetcher::new(&mut watcher)?;
    let model = fetcher.model(&models)?;
    let config = settings.with_model(&model)?.analogy()?;
    let needs = Needs::of_prompts(!args.caption_b.is_empty(), &config.prompt);
    let paths = fetcher.paths(&models, model, needs)?;
    watcher.notices(config.generate.without_effect());
    let recipe = Recipe::new(
        "apply",
        &models,
        &paths,
        &[&config.prompt, &config.generate],
    )?;
    let models = models.open(&paths, &mut watcher)?;
    analogy::check_apply(&models, &tokens, &config)?;
    // All captions first: with little memory, the captioner is closed when pictures are made.
    let mut targets = Vec::new();
    for (index, b) in pictures.into_iter().enumerate() {
        let caption_b = args.caption_b.get(index).cloned();
        let target = Target { b, caption_b };
        let mut observe = |progress: &_| watcher.observe(progress);
        targets.push(analogy::captioned(&models, &target, &config, &mut observe)?);
    }
    let mut results = Vec::new();
    for (index, target) in targets.iter().enumerate() {
        let applied = analogy::apply(&models, &tokens, target, &config, &mut |progress| {
            watcher.observe(progress)
        })?;
        let mut recipe = recipe.clone();
        let input = json!({
            "file": args.b[index], "caption": applied.caption_b, "prompt": applied.prompt_b,
        });
        recipe.input("difference", &args.difference)?;
        recipe.input("b", &input)?;
        let path = output.path(&names[index]);
        let text = [
            ("Software", recipe.program.as_str()),
            ("dinv", &recipe.to_line()?),
        ];
        save_png(&path, &applied.b_prime, &text)?;
        if !args.general.json {
            report::line(path.display())?;
        }
        results.push(json!({ "b": input, "b_prime": path }));
    }
    let (_, notices) = watcher.finish();
    if args.general.json {
        report::json(&json!({ "results": results, "notices": notices }))?;
    }
    Ok(())
}

/// The name of each result, which no two may share.
fn output_names(pictures: &[PathBuf]) -> Result<Vec<String>, Failure> {
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

    fn names(paths: &[&str]) -> Result<Vec<String>, Failure> {
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
