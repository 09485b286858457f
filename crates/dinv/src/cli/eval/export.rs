//! `dinv eval export`: writes a suite as a folder that any tool can read.

use std::path::PathBuf;

use clap::Args;
use dinv_eval::suite::Suite;

use super::super::terminal;
use super::setup::SuiteFlag;

/// Write a suite as a folder that any tool can read
///
/// The folder holds suite.json, manifest.jsonl with one analogy a line, and the pictures.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  dinv eval export --suite demo/test demo-test")]
pub(super) struct ExportArgs {
    #[command(flatten)]
    suite: SuiteFlag,
    /// The folder; it must be empty or absent
    #[arg(value_name = "DIR")]
    output: PathBuf,
}

/// Writes the suite.
pub(super) fn run(args: &ExportArgs) -> anyhow::Result<()> {
    let suite = Suite::open(&args.suite.path()?)?;
    suite.export(&args.output)?;
    terminal::message(format_args!("{} analogies", suite.entries.len()));
    terminal::line(args.output.display())
}
