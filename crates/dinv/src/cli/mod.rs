//! The command line: one file per subcommand turns flags into the library's typed settings.

mod analogy;
mod apply;
mod batch;
mod canvas;
mod caption;
mod change;
mod checkpoint;
pub(crate) mod consent;
mod demo_world;
pub(crate) mod device;
mod doctor;
mod eval;
pub(crate) mod exit;
pub(crate) mod export;
pub(crate) mod fetch;
mod first_run;
mod fitting;
pub(crate) mod flags;
mod generate;
mod import;
#[cfg(feature = "serve")]
mod jobs;
mod learn;
mod learned_words;
pub(crate) mod locate;
mod manual;
pub(crate) mod memory;
mod misspelt;
pub(crate) mod models;
pub(crate) mod names;
mod opened;
mod output;
mod pictures;
mod plot;
pub(crate) mod record;
#[cfg(feature = "serve")]
mod serve;
pub(crate) mod settings;
mod shard;
mod sheet;
pub(crate) mod signals;
pub(crate) mod terminal;
pub(crate) mod watch;
#[cfg(feature = "serve")]
pub(crate) mod worker;

use std::ffi::OsStr;
use std::process::ExitCode;

use clap::{Arg, ArgMatches, CommandFactory, FromArgMatches, Parser, Subcommand};
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
    Batch(Box<batch::BatchArgs>),
    Caption(caption::CaptionArgs),
    Export(export::ExportArgs),
    Import(Box<import::ImportArgs>),
    FirstRun(Box<first_run::FirstRunArgs>),
    Eval(eval::EvalArgs),
    #[cfg(feature = "serve")]
    Serve(serve::ServeArgs),
    #[cfg(feature = "serve")]
    Jobs(jobs::JobsArgs),
    #[cfg(feature = "serve")]
    Worker(worker::WorkerArgs),
    Doctor(doctor::DoctorArgs),
    Models(models::ModelsArgs),
    Completions(manual::CompletionsArgs),
    Man(manual::ManArgs),
}

/// Runs the program.
pub(crate) fn main() -> ExitCode {
    let arguments = std::env::args_os().skip(1);
    run_command(&arguments.collect::<Vec<_>>()).into()
}

/// Runs a command, given by the words after the program's name.
fn run_command<T: AsRef<OsStr>>(arguments: &[T]) -> Exit {
    let words = arguments.iter().map(AsRef::as_ref);
    let words = [OsStr::new("dinv")].into_iter().chain(words);
    let parsed = command().try_get_matches_from(words).and_then(|matches| {
        attend(&matches);
        Cli::from_arg_matches(&matches)
    });
    match parsed {
        Ok(cli) => cli.command.run(),
        Err(error) => {
            let arguments = arguments.iter().map(AsRef::as_ref);
            let arguments: Vec<String> = arguments
                .map(|word| word.to_string_lossy().into_owned())
                .collect();
            misspelt::report(&error, &arguments)
        }
    }
}

impl Command {
    /// Runs the command and reports its error.
    fn run(self) -> Exit {
        let done = device::with_memory_errors(|| {
            match self {
                Self::Analogy(args) => analogy::run(*args),
                Self::Learn(args) => learn::run(&args),
                Self::Apply(args) => apply::run(*args),
                Self::Generate(args) => generate::run(&args),
                Self::Batch(args) => batch::run(&args),
                Self::Caption(args) => caption::run(&args),
                Self::Export(args) => export::run(&args),
                Self::Import(args) => import::run(&args),
                Self::FirstRun(args) => first_run::run(&args),
                Self::Eval(args) => eval::run(&args),
                #[cfg(feature = "serve")]
                Self::Serve(args) => serve::run(args),
                #[cfg(feature = "serve")]
                Self::Jobs(args) => jobs::run(&args),
                #[cfg(feature = "serve")]
                Self::Worker(_) => return worker::run(),
                Self::Doctor(args) => doctor::run(&args),
                Self::Models(args) => models::run(&args),
                Self::Completions(args) => manual::completions(&args),
                Self::Man(args) => manual::man(&args),
            }?;
            Ok(Exit::Done)
        });
        done.unwrap_or_else(|error| terminal::error(&error))
    }
}

/// Checks a job's command as far as possible without its model: first the arguments, then the settings.
#[cfg(feature = "serve")]
pub(crate) fn check(arguments: &[String]) -> anyhow::Result<()> {
    let matches = command().try_get_matches_from(arguments)?;
    match Cli::from_arg_matches(&matches)?.command {
        Command::Analogy(args) => args.settings()?.analogy().map(drop),
        Command::Learn(args) => args.settings()?.analogy().map(drop),
        Command::Apply(args) => args.settings()?.analogy().map(drop),
        Command::Generate(args) => args.settings()?.resolve::<TextToImage>().map(drop),
        _ => Ok(()),
    }
}

/// Applies the flags of every subcommand that concern stderr and stdin, before anything is written or read.
fn attend(matches: &ArgMatches) {
    let mut matches = matches;
    while let Some((_, of_subcommand)) = matches.subcommand() {
        matches = of_subcommand;
    }
    let progress = matches.try_get_one::<String>("progress").ok().flatten();
    if progress.is_some_and(|progress| progress == "json") {
        terminal::write_json_lines();
    }
    if let Ok(Some(true)) = matches.try_get_one::<bool>("stop_with_stdin") {
        signals::stop_with_stdin();
    }
}

/// The command line. The help of every setting ends in its defaults, and short help points to the long one.
pub(crate) fn command() -> clap::Command {
    let analogy = settings::values(&AnalogyConfig::default()).unwrap_or_default();
    let generate = settings::values(&TextToImage::default()).unwrap_or_default();
    let demo = locate::demo_model().and_then(|folder| settings::recommended(&folder));
    let demo = demo.unwrap_or_default();
    Cli::command().mut_subcommands(|subcommand| {
        let defaults = match subcommand.get_name() {
            "generate" => &generate,
            _ => &analogy,
        };
        pointing_to_all(subcommand.mut_args(|arg| with_default(arg, defaults, &demo)))
    })
}

/// Adds the default of an argument's setting, and the demo model's own.
fn with_default(arg: Arg, defaults: &Map<String, Value>, demo: &Map<String, Value>) -> Arg {
    let name = arg.get_id().as_str();
    let default = defaults.get(name).and_then(shown);
    let of_demo = defaults.get(name).and(demo.get(name)).and_then(shown);
    let text = match (default, of_demo) {
        (Some(default), Some(of_demo)) if default != of_demo => {
            format!("{default}; demo model: {of_demo}")
        }
        (None, Some(of_demo)) => format!("none; demo model: {of_demo}"),
        (Some(default), _) => default,
        (None, None) => return arg,
    };
    let Some(help) = arg.get_help().map(ToString::to_string) else {
        return arg;
    };
    // A text that already states the built-in default only gets the demo model's.
    let own = help
        .strip_suffix(']')
        .filter(|own| own.contains(" [default: "));
    arg.help(match (own, text.strip_prefix("none; ")) {
        (Some(own), Some(of_demo)) => format!("{own}; {of_demo}]"),
        _ => format!("{help} [default: {text}]"),
    })
}

/// A value as users type it.
fn shown(value: &Value) -> Option<String> {
    match value {
        Value::String(text) if !text.is_empty() => Some(text.clone()),
        Value::Number(_) | Value::Bool(true) => {
            Some(value.to_string().trim_end_matches(".0").to_owned())
        }
        // A switch is off by default, which needs no mention.
        _ => None,
    }
}

/// Makes short help point to the settings that it omits.
fn pointing_to_all(command: clap::Command) -> clap::Command {
    if !command.get_arguments().any(Arg::is_hide_short_help_set) {
        return command;
    }
    let (name, examples) = (command.get_name(), command.get_after_help());
    let examples = examples.map(ToString::to_string).unwrap_or_default();
    let short = format!("{examples}\n\nAll settings: dinv {name} --help");
    command.after_help(short).after_long_help(examples)
}

/// docs/reference/settings.md: generated from the flags, so that each setting has only one text.
#[cfg(test)]
mod reference {
    use std::fmt::Write;
    use std::path::Path;

    use super::*;

    const PREFACE: &str = "# Settings

This page is written from the program's own texts (`just update-help`). Every setting is a flag and, with `_` for `-`, a
name in a `--config` file. Flags override the file, the file overrides the model's `dinv.json`, and that overrides the
built-in default. A setting given in the same place as `draft` overrides the value that `draft` implies. \"Demo\" is what the demo model's `dinv.json` sets.

";

    /// A table of the settings under one heading of a subcommand's help.
    fn table(
        page: &mut String,
        command: &clap::Command,
        heading: &str,
        defaults: [&Map<String, Value>; 2],
    ) {
        writeln!(page, "| flag | default | demo | |\n|---|---|---|---|").unwrap();
        let flags = command.get_arguments();
        for flag in flags.filter(|flag| flag.get_help_heading() == Some(heading)) {
            let name = flag.get_id().as_str();
            let long = flag.get_long().unwrap();
            let [built_in, demo] = defaults.map(|values| {
                let value = values.get(name).and_then(shown);
                value.map_or_else(String::new, |value| format!("`{value}`"))
            });
            let help = flag.get_help().unwrap().to_string().replace('\n', " ");
            let (text, own) = match help
                .strip_suffix(']')
                .and_then(|help| help.rsplit_once(" [default: "))
            {
                Some((text, own)) => (text.to_owned(), own.to_owned()),
                None => (help, String::new()),
            };
            let values: Vec<String> = flag
                .get_possible_values()
                .iter()
                .map(|value| format!("`{}`", value.get_name()))
                .collect();
            let text = match values.is_empty() || values.len() == 2 && values[0] == "`true`" {
                true => text,
                false => format!("{text}. Values: {}", values.join(", ")),
            };
            let details = flag.get_long_help().map(ToString::to_string);
            let details = details.and_then(|all| Some(all.split_once("\n\n")?.1.to_owned()));
            let text = match details {
                Some(details) => format!("{text}. {}", details.replace('\n', " ")),
                None => text,
            };
            let default = if built_in.is_empty() { own } else { built_in };
            writeln!(page, "| `--{long}` | {default} | {demo} | {text} |").unwrap();
        }
    }

    #[test]
    fn the_page_of_settings_is_as_the_program_says() {
        let folder = locate::demo_model().unwrap();
        let demo = settings::recommended(&folder).unwrap();
        let defaults = settings::values(&AnalogyConfig::default()).unwrap();
        let command = Cli::command();
        let analogy = command.find_subcommand("analogy").unwrap();
        let mut page = PREFACE.to_owned();
        for heading in ["Prompts", "Learning", "Making B′", "Model", "General"] {
            writeln!(page, "## {heading}\n").unwrap();
            table(&mut page, analogy, heading, [&defaults, &demo]);
            page.push('\n');
        }
        let generate = command.find_subcommand("generate").unwrap();
        writeln!(
            page,
            "## Plain generation\n\nFlags of `dinv generate`, next to those of the model.\n"
        )
        .unwrap();
        let drawing = settings::values(&TextToImage::default()).unwrap();
        let none = Map::new();
        let own = generate
            .clone()
            .mut_args(|arg| match arg.get_help_heading() {
                None if arg.get_long().is_some() => arg.help_heading("Drawing"),
                _ => arg,
            });
        table(&mut page, &own, "Drawing", [&drawing, &none]);
        let path = Path::new(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../docs/reference/settings.md"
        ));
        if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
            std::fs::write(path, &page).unwrap();
        }
        let found = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            page == found,
            "run `just update-help` and look at the difference:\n{page}"
        );
    }
}
