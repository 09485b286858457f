//! `dinv eval`: measures methods that make B′ on a suite of analogies.

mod compare;
mod export;
mod hashes;
mod jobs;
mod methods;
mod progress;
mod report;
mod run;
mod setup;
mod work;
mod worker;

use clap::{Args, Subcommand};

/// Measure methods that make B′ on a suite of analogies
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  dinv eval run --suite demo/validation --quick -o quick
  dinv eval run --suite demo/test --jobs 2 -o night
  dinv eval report night
  dinv eval compare night --with difference-inversion
  dinv eval export --suite demo/test demo-test")]
pub(crate) struct EvalArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    Run(Box<run::RunArgs>),
    Report(report::ReportArgs),
    Compare(compare::CompareArgs),
    Export(export::ExportArgs),
    #[command(hide = true)]
    Worker(worker::WorkerArgs),
}

/// Runs, reports or exports.
pub(crate) fn run(args: &EvalArgs) -> anyhow::Result<()> {
    match &args.action {
        Action::Run(args) => run::run(args),
        Action::Report(args) => report::run(args),
        Action::Compare(args) => compare::run(args),
        Action::Export(args) => export::run(args),
        Action::Worker(args) => worker::run(args),
    }
}
