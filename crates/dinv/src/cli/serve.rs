//! `dinv serve`: serves jobs over HTTP, and a page in the browser.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use difference_inversion::about;

use crate::serve::{self, Options};

/// Serve a page and an HTTP interface on this machine
///
/// Open the link that is printed. Jobs wait in a queue and run one at a time, as commands of this program.
/// Downloads run alongside. Jobs are kept in --dir, with their pictures and the library of differences. Jobs that were
/// running when the server stopped continue at its next start.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  dinv serve
  dinv serve --dir work --port 8000
  DINV_TOKEN=a-long-secret dinv serve --listen 0.0.0.0

The interface: docs/guide/server.md")]
pub(crate) struct ServeArgs {
    /// Address to listen on; any but this machine's own needs --token
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    listen: IpAddr,
    /// Port to listen on; 0 takes a free one
    #[arg(long, value_name = "PORT", default_value_t = 7865)]
    port: u16,
    /// Folder for jobs and differences [default: dinv in the user's data folder]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Secret that every request has to carry [default: that of DINV_TOKEN]
    ///
    /// At least 8 characters. The variable keeps it out of the list of processes.
    #[arg(long, value_name = "TOKEN")]
    token: Option<String>,
    /// Largest request in MB
    #[arg(long, value_name = "MB", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=4096))]
    max_upload: u64,
    /// How many jobs may wait
    #[arg(long, value_name = "N", default_value_t = 64)]
    queue: usize,
    /// How many minutes models stay open after a job, so that the next one need not open them; 0 closes them at once
    #[arg(long, value_name = "MINUTES", default_value_t = 5)]
    keep_models: u64,
    #[arg(long, help = about!(model.preview_vae), value_name = "PATH")]
    preview_vae: Option<PathBuf>,
    /// Allow requests to name any model: folders, files and models of the Hub that are not on disk
    #[arg(long)]
    allow_any_model: bool,
}

/// Serves until it is stopped.
pub(crate) fn run(args: ServeArgs) -> anyhow::Result<()> {
    let token = args.token.or_else(|| std::env::var("DINV_TOKEN").ok());
    serve::run(Options {
        listen: args.listen,
        port: args.port,
        folder: args.dir,
        token: token.filter(|token| !token.is_empty()),
        max_upload: args.max_upload * 1_000_000,
        queue: args.queue,
        allow_any_model: args.allow_any_model,
        keep: Duration::from_secs(args.keep_models.saturating_mul(60)),
        preview_vae: args.preview_vae,
    })
}
