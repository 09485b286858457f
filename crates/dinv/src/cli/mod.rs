//! The command line: one file per subcommand turns flags into the library's typed settings.

mod analogy;
mod apply;
mod canvas;
mod caption;
mod checkpoint;
mod device;
mod doctor;
mod eval;
mod exit;
mod fetch;
mod fitting;
mod flags;
mod generate;
mod learn;
mod locate;
mod memory;
mod models;
mod output;
mod pictures;
mod plot;
mod record;
mod settings;
mod sheet;
mod signals;
mod terminal;
mod watch;

use std::process::ExitCode;

use clap::{Arg, CommandFactory, FromArgMatches, Parser, Subcommand};
use difference_inversion::diffusion::draw::TextToImage;
use difference_inversion::method::generate_config::AnalogyConfig;
use serde_json::{Map, Value};

use self::exit::Exit;

/// Picture analogies: A is to A′ as B is to … B′
///
/// Learns the difference between two pictures and applies it to others, with a frozen text-to-image
/// diffusion model (Difference Inversion, CVPR 2025).
#[derive(Debug, Parser)]
#[command(name = "dinv", version, after_help = exit::ABOUT)]
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
    Eval(eval::EvalArgs),
    Doctor(doctor::DoctorArgs),
    Models(models::ModelsArgs),
}

/// Runs the program.
pub(crate) fn main() -> ExitCode {
    let matches = command().get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let done = device::with_memory_errors(|| match cli.command {
        Command::Analogy(args) => analogy::run(*args),
        Command::Learn(args) => learn::run(&args),
        Command::Apply(args) => apply::run(*args),
        Command::Generate(args) => generate::run(&args),
        Command::Caption(args) => caption::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Models(args) => models::run(&args),
    });
    match done {
        Ok(()) => Exit::Done,
        Err(error) => terminal::error(&error),
    }
    .into()
}

/// The command line, with the default of every setting behind its help.
fn command() -> clap::Command {
    let analogy = settings::values(&AnalogyConfig::default()).unwrap_or_default();
    let generate = settings::values(&TextToImage::default()).unwrap_or_default();
    Cli::command().mut_subcommands(|subcommand| {
        let defaults = match subcommand.get_name() {
            "generate" => &generate,
            _ => &analogy,
        };
        subcommand.mut_args(|arg| with_default(arg, defaults))
    })
}

/// Adds the default of the setting an argument stands for, if it stands for one that has any.
fn with_default(arg: Arg, defaults: &Map<String, Value>) -> Arg {
    let default = match defaults.get(arg.get_id().as_str()) {
        Some(Value::String(text)) if !text.is_empty() => text.clone(),
        Some(value @ (Value::Number(_) | Value::Bool(_))) => {
            value.to_string().trim_end_matches(".0").to_owned()
        }
        _ => return arg,
    };
    let Some(help) = arg.get_help().map(ToString::to_string) else {
        return arg;
    };
    arg.help(format!("{help} [default: {default}]"))
}
