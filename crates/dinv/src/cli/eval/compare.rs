//! `dinv eval compare`: differences between two runs, or between the methods of one.

use std::path::PathBuf;

use clap::Args;
use dinv_eval::Folder;
use dinv_eval::compare::{compare_methods, compare_runs, markdown};
use dinv_eval::report::Report;
use serde_json::json;

use super::super::terminal::{self, Failure};

/// Say what changed between two runs, or between the methods of one
///
/// Methods of the same name are compared on the analogies that both runs have solved, metric by
/// metric, with paired significance; and differences in settings, models and seeds are listed.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  dinv eval compare yesterday today
  dinv eval compare night --with difference-inversion")]
pub(super) struct CompareArgs {
    /// Two runs of the same suite, the earlier first, or one with --with
    #[arg(value_name = "RUN", required = true, num_args = 1..=2)]
    runs: Vec<PathBuf>,
    /// Compare all other methods of one run with this one
    #[arg(long, value_name = "METHOD")]
    with: Option<String>,
    /// Print the comparisons as one JSON object
    #[arg(long)]
    json: bool,
}

/// Compares, and prints tables.
pub(super) fn run(args: &CompareArgs) -> anyhow::Result<()> {
    let reports: Vec<Report> = (args.runs.iter())
        .map(|path| Report::gather(&Folder::at(path)))
        .collect::<Result<_, _>>()?;
    let (changes, comparisons) = match (&reports[..], &args.with) {
        ([run], Some(name)) => (Vec::new(), compare_methods(run, name)?),
        ([first, second], None) => {
            let (changes, comparisons) = compare_runs(first, second)?;
            (changes, comparisons)
        }
        _ => {
            let message = "expected two runs, or one run and `--with METHOD`";
            return Err(Failure::usage(message).into());
        }
    };
    if args.json {
        return terminal::json(&json!({ "changes": changes, "comparisons": comparisons }));
    }
    if !changes.is_empty() {
        terminal::line("Changed:\n")?;
        for change in changes {
            terminal::line(format_args!("- {change}"))?;
        }
        terminal::line("")?;
    }
    terminal::line(markdown(&comparisons).trim_end())
}
