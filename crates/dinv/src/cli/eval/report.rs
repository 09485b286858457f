//! `dinv eval report`: writes the tables and the page of a run again.

use std::path::PathBuf;

use clap::Args;
use dinv_eval::Folder;
use dinv_eval::report::Report;

use super::super::record::text_of;
use super::super::terminal;

/// Write the tables and the page of a run again
///
/// Writes report.md, results.csv, report.json and report.html to the folder of the run, and prints
/// the tables.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  dinv eval report night")]
pub(super) struct ReportArgs {
    /// The folder of a run, finished or not
    #[arg(value_name = "RUN")]
    run: PathBuf,
    /// Print the paths of the files as one JSON object
    #[arg(long)]
    json: bool,
}

/// Writes the report.
pub(super) fn run(args: &ReportArgs) -> anyhow::Result<()> {
    let folder = Folder::at(&args.run);
    write(&folder, &Report::gather(&folder)?, args.json)
}

/// Writes the report of a folder and prints its tables, or the paths.
fn write(folder: &Folder, report: &Report, json: bool) -> anyhow::Result<()> {
    let paths = written(folder, report)?;
    if json {
        return terminal::json(&files(&paths));
    }
    let tables = report.markdown();
    terminal::line(tables.trim_end())?;
    for path in paths {
        terminal::message(path.display());
    }
    Ok(())
}

/// Writes the report of a folder and prints the means in a few lines, or the paths.
pub(super) fn write_briefly(folder: &Folder, report: &Report, json: bool) -> anyhow::Result<()> {
    let paths = written(folder, report)?;
    if json {
        return terminal::json(&files(&paths));
    }
    terminal::line(report.brief().trim_end())?;
    let page = folder.path().join(PAGE);
    terminal::message(format_args!("done: open {}", page.display()));
    Ok(())
}

fn written(folder: &Folder, report: &Report) -> anyhow::Result<Vec<PathBuf>> {
    let paths = report.write(folder)?;
    for notice in report.notices() {
        terminal::message(format_args!("note: {notice}"));
    }
    Ok(paths)
}

fn files(paths: &[PathBuf]) -> serde_json::Value {
    serde_json::json!({ "files": paths.iter().map(text_of).collect::<Vec<_>>() })
}

/// The page of a report.
const PAGE: &str = "report.html";
