//! `dinv eval run`: solves every analogy of a suite with every method.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, value_parser};
use difference_inversion::Error;
use difference_inversion::models::denoiser::Memory;
use dinv_eval::report::Report;
use dinv_eval::suite::{Entry, Suite};
use dinv_eval::{Folder, Measures, RunRecord, SuiteRecord, TEXT_TO_IMAGE, Variant};

use super::super::fetch::Fetcher;
use super::super::flags::{General, ModelSettings, TimeFlag};
use super::super::shard::Shard;
use super::super::terminal::Failure;
use super::super::watch::Watcher;
use super::progress::RunProgress;
use super::setup::{Further, Job, SuiteFlag};
use super::work::{self, Prepared};
use super::{hashes, methods, setup};

/// The number of analogies of `--quick`, and the methods that solve them all: minutes on two cores.
const QUICK: usize = 4;
const QUICK_METHODS: [&str; 6] = [
    "difference-inversion",
    "no-clip",
    "text-swap",
    "sdedit",
    "instruct-pix2pix",
    "analogist",
];
/// A year, so that the deadline can be represented.
const MOST_MINUTES: u64 = 365 * 24 * 60;

/// Solve every analogy of a suite with every method, and measure
///
/// Finished results are kept: after an interruption, or with another --limit or --methods, the same command continues.
/// The folder holds METHOD/NAME/b_prime.png and result.json, run.json (suite, seeds, settings, hashes of the models),
/// and the report: report.html, report.md, results.csv and report.json.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  dinv eval run --quick -o quick
  dinv eval run --suite demo/test --jobs 2 -o night
  dinv eval run --suite demo/test --jobs 2 --minutes-per-method 45 -o night
  dinv eval run --methods difference-inversion,alpha-0 --variants alpha.toml

A file of variants has one section per variant, named as in the tables. `method`
is a built-in method, everything else a setting of it, named as in a --config
file:
  [alpha-0]
  method = \"difference-inversion\"
  alpha = 0.0
Settings above the first section hold for every variant.")]
pub(super) struct RunArgs {
    #[command(flatten)]
    suite: SuiteFlag,
    /// Folder for the results
    #[arg(long, short, value_name = "DIR", default_value = "eval")]
    output: PathBuf,
    /// Methods, separated by commas: built-in ones and variants; `all` is all of both
    /// [default: those of --variants, else all that are built in]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    methods: Vec<String>,
    /// A TOML file of variants: methods under other names with other settings
    #[arg(long, value_name = "FILE.toml")]
    variants: Option<PathBuf>,
    /// Random seed
    #[arg(long, default_value_t = 0, help_heading = "General")]
    seed: u64,
    /// Processes that run at the same time and share the cores; each opens the models
    #[arg(long, value_name = "N", default_value_t = 1)]
    jobs: usize,
    /// Run only the i-th of n parts of the analogies, for runs on several machines whose folders are
    /// then copied together; auto takes i and n from the scheduler, auto/n only i
    #[arg(long, value_name = "i/n")]
    shard: Option<Shard>,
    /// At most N analogies, evenly over kinds
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// A method that has used so many minutes begins no further analogy; the tables say how many each
    /// solved. The same command continues for as many minutes again
    #[arg(long, value_name = "N", value_parser = value_parser!(u64).range(1..=MOST_MINUTES))]
    minutes_per_method: Option<u64>,
    /// A first look, in minutes: four analogies, and six methods unless --methods names others
    #[arg(long, conflicts_with_all = ["limit", "minutes_per_method"])]
    quick: bool,
    #[command(flatten)]
    further: Further,
    #[command(flatten)]
    model: ModelSettings,
    #[command(flatten)]
    time: TimeFlag,
    #[command(flatten)]
    general: General,
}

impl RunArgs {
    /// The analogies of the run.
    fn entries(&self, suite: &Suite) -> Vec<Entry> {
        let limit = self.limit.or(self.quick.then_some(QUICK));
        let shard = self.shard.unwrap_or_default();
        let all = suite.balanced(limit).into_iter().enumerate();
        let chosen = all.filter(|(place, _)| shard.has(*place));
        chosen.map(|(_, entry)| entry).collect()
    }

    /// The time after which a method begins no further analogy, if limited.
    fn time_of_method(&self) -> Option<Duration> {
        let minutes = self.minutes_per_method;
        minutes.map(|minutes| Duration::from_secs(60 * minutes))
    }

    /// The names of the chosen methods.
    fn methods(&self) -> Vec<String> {
        match self.quick && self.methods.is_empty() && self.variants.is_none() {
            true => QUICK_METHODS.map(str::to_owned).into(),
            false => self.methods.clone(),
        }
    }
}

/// Runs the methods that can run, and reports.
pub(super) fn run(args: &RunArgs) -> anyhow::Result<()> {
    if args.jobs == 0 {
        return Err(Failure::usage("--jobs: expected at least 1, found 0").into());
    }
    args.time.watch()?;
    let folder = Folder::at(&args.output);
    let was_there = args.output.exists();
    let Some(claim) = folder.claim()? else {
        let message = format!(
            "{}: another run is working in this folder",
            folder.path().display()
        );
        let hint = "wait until it ends, or write elsewhere with `-o`";
        return Err(Failure::temporary(message).hint(hint).into());
    };
    let prepared = match prepare(args) {
        Ok(prepared) => prepared,
        Err(error) => {
            drop(claim);
            // Removes a folder that was created for a run that does not begin.
            if !was_there {
                let _ = std::fs::remove_dir(folder.path());
            }
            return Err(error);
        }
    };
    let time = args.time_of_method();
    let mut progress = RunProgress::new(args.general.quiet, args.jobs, time);
    let worked = work::work(&prepared, args.jobs, time, &mut progress);
    progress.finish();
    let failures = worked?;
    let report = Report::gather(&prepared.folder)?;
    super::report::write_briefly(&prepared.folder, &report, args.general.json)?;
    drop(claim);
    Ok(failures.told()?)
}

/// Everything up to the first picture.
fn prepare(args: &RunArgs) -> anyhow::Result<Prepared> {
    let variants = methods::chosen(&args.methods(), args.variants.as_deref())?;
    let settings = args.general.settings(&[&args.model])?;
    let model_settings: ModelSettings = settings.resolve()?;
    let suite_path = args.suite.path()?;
    let suite = Suite::open(&suite_path)?;

    let mut watcher = Watcher::new(args.general.quiet);
    args.shard.unwrap_or_default().announce(&mut watcher);
    let mut fetcher = Fetcher::new(&mut watcher, args.general.yes)?;
    let model = fetcher.model(&model_settings, setup::needs(&variants))?;
    let recommended = settings.with_model(&model)?.analogy()?;
    let paths = setup::model_paths(
        &mut fetcher,
        &model_settings,
        &args.further,
        model,
        &variants,
    )?;
    let measures = setup::measure_paths(&args.further, &suite, &paths.text_to_image, &mut watcher)?;
    let hashes_of_models = hashes::of_models(&paths)?;
    let measured_with = hashes::of_measures(&measures, &hashes_of_models[TEXT_TO_IMAGE])?;

    let about = SuiteRecord {
        name: suite.about.name.clone(),
        version: suite.about.version.clone(),
        identity: suite.identity(),
        analogies: suite.entries.len(),
    };
    let mut device = format!(
        "{}, {}",
        model_settings.device_name(),
        model_settings.dtype_name()
    );
    // Large pictures are encoded and decoded in tiles.
    if model_settings.memory()? == Memory::Low {
        device += ", memory low";
    }
    let mut record = RunRecord::new(about, args.seed, device);
    record.options = model_settings.file_settings().collect();
    record.models = hashes_of_models;
    record.measures.clone_from(&measured_with);
    let models = setup::models(paths, &model_settings, recommended.clone())?;
    // A network that cannot be opened is reported before any worker needs it.
    Measures::open(&measures, &models, &model_settings.device()?)?;
    let entries = args.entries(&suite);
    record.methods = methods::records(&variants, &models, &entries)?;
    // A method that is skipped now may have run before; only the others must match its record.
    let skipped: Vec<_> = (record.methods.iter())
        .map(|method| method.skipped.clone())
        .collect();
    let folder = Folder::at(&args.output);
    let record = folder.prepare(record, &entries).map_err(other_run)?;
    for entry in &entries {
        // Only this analogy fails.
        if let Err(error) = folder.show(entry) {
            watcher.notice(&format!(
                "a picture of `{}` cannot be shown: {error}",
                entry.name
            ));
        }
    }
    let job = Job {
        suite: suite_path,
        output: args.output.clone(),
        seed: args.seed,
        models: model_settings,
        further: args.further.clone(),
        recommended,
        measures,
        measured_with,
        made_with: BTreeMap::new(),
        variant: Variant::plain(""),
    };
    Ok(Prepared {
        job,
        record,
        folder,
        entries,
        methods: variants.into_iter().zip(skipped).collect(),
    })
}

/// The error for a folder that belongs to another run.
fn other_run(error: Error) -> anyhow::Error {
    match error {
        Error::InvalidFile { .. } => {
            let hint = "write elsewhere with `-o`, or delete the folder";
            Failure::input(error.to_string()).hint(hint).into()
        }
        error => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        run: RunArgs,
    }

    #[test]
    fn a_method_has_the_minutes_that_were_given() {
        let seconds = |arguments: &str| {
            let arguments = ["dinv"].into_iter().chain(arguments.split_whitespace());
            let time = Program::parse_from(arguments).run.time_of_method();
            time.map(|time| time.as_secs())
        };
        assert_eq!(seconds("--minutes-per-method 45"), Some(2700));
        assert_eq!(seconds("--limit 8"), None);
    }

    #[test]
    fn quick_is_a_few_methods_on_the_same_analogies() {
        let run = |arguments: &str| {
            let arguments = ["dinv"].into_iter().chain(arguments.split_whitespace());
            Program::parse_from(arguments).run
        };
        let quick = run("--quick");
        assert_eq!(
            quick.time_of_method(),
            None,
            "no method stops before another"
        );
        assert_eq!(methods::chosen(&quick.methods(), None).unwrap().len(), 6);
        assert_eq!(run("--quick --methods sdedit").methods(), ["sdedit"]);
        assert!(run("--limit 4").methods().is_empty());
    }
}
