//! The command line: one file per subcommand turns flags into the library's typed settings.

mod analogy;
mod apply;
mod canvas;
mod caption;
mod checkpoint;
mod doctor;
mod flags;
mod generate;
mod learn;
mod locate;
mod output;
mod plot;
mod record;
mod report;
mod settings;
mod sheet;
mod watch;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Picture analogies: A is to A′ as B is to … B′
///
/// Learns the difference between two pictures and applies it to others, with a frozen text-to-image
/// diffusion model (Difference Inversion, CVPR 2025).
#[derive(Debug, Parser)]
#[command(name = "dinv", version, after_help = "Start with: dinv analogy")]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Analogy(Box<analogy::AnalogyArgs>),
    Learn(Box<learn::LearnArgs>),
    Apply(Box<apply::ApplyArgs>),
    Generate(Box<generate::GenerateArgs>),
    Caption(caption::CaptionArgs),
    Doctor(doctor::DoctorArgs),
}

/// Runs the program.
pub(crate) fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Analogy(args) => analogy::run(*args),
        Command::Learn(args) => learn::run(&args),
        Command::Apply(args) => apply::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Caption(args) => caption::run(&args),
        Command::Doctor(args) => doctor::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report::error(&error),
    }
}
