//! `dinv models`: the models on this machine.

pub(crate) mod check;
pub(crate) mod list;
mod pull;

use clap::{Args, Subcommand};

/// See, download and check models
///
/// Models of the Hugging Face Hub are kept in the cache that its Python library uses: $HF_HUB_CACHE, or
/// $HF_HOME/hub, or ~/.cache/huggingface/hub. With HF_HUB_OFFLINE=1 nothing is downloaded; models
/// that ask for an account need HF_TOKEN.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  dinv models list
  dinv models pull sd15
  dinv models check sd15")]
pub(crate) struct ModelsArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    List(list::ListArgs),
    Pull(pull::PullArgs),
    Check(Box<check::CheckArgs>),
}

/// Lists, downloads or checks.
pub(crate) fn run(args: &ModelsArgs) -> anyhow::Result<()> {
    match &args.action {
        Action::List(args) => list::run(args),
        Action::Pull(args) => pull::run(args),
        Action::Check(args) => check::run(args),
    }
}
