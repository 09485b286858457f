//! The server's capabilities: its limits, and the settings of each kind of job, read from the program's flags.

use std::any::TypeId;
use std::path::PathBuf;

use clap::{Arg, ArgAction, Command};
use difference_inversion::image::MAX_PIXELS;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::cli::device::Place;
use crate::cli::{self, locate};

use super::http::App;
use super::job::Kind;
use super::problem::Answer;

/// Flags about files, output and paths, which a request cannot set.
const LEFT_OUT: [&str; 36] = [
    "a",
    "a_prime",
    "b",
    "images",
    "image",
    "mask",
    "difference",
    "embedding",
    "init_latents",
    "output",
    "overwrite",
    "skip_existing",
    "resume",
    "replay",
    "trace",
    "caption_a",
    "caption_a_prime",
    "caption_b",
    "prompt",
    "config",
    "json",
    "quiet",
    "progress",
    "previews",
    "stop_with_stdin",
    "tokenizer",
    "unet",
    "text_encoder",
    "vae",
    "preview_vae",
    "lora",
    "clip",
    "names",
    "shard",
    "minutes",
    "help",
];

/// A setting of a command.
#[derive(Debug, Serialize)]
pub(crate) struct Flag {
    pub(crate) name: String,
    pub(crate) help: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    group: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    default: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) values: Vec<String>,
    pub(crate) kind: &'static str,
    common: bool,
    /// Whether the flag takes no value.
    #[serde(skip)]
    pub(crate) is_switch: bool,
}

/// The settings of a kind of job.
pub(crate) fn flags(kind: Kind) -> Vec<Flag> {
    let command = cli::command();
    let arguments = command_of(kind, &command).get_arguments();
    let settings = arguments.filter(|arg| !LEFT_OUT.contains(&arg.get_id().as_str()));
    settings.filter_map(Flag::of).collect()
}

/// The command of a kind of job.
fn command_of(kind: Kind, program: &Command) -> &Command {
    let words = kind.words().iter();
    words.fold(program, |command, word| {
        command.find_subcommand(word).unwrap_or(command)
    })
}

impl Flag {
    fn of(arg: &Arg) -> Option<Self> {
        let name = arg.get_long()?.to_owned();
        let help = arg.get_help()?.to_string().replace('\n', " ");
        let (help, default) = match help
            .strip_suffix(']')
            .and_then(|help| help.split_once(" [default: "))
        {
            Some((help, default)) => (help.to_owned(), Some(default.to_owned())),
            None => (help, None),
        };
        let is_switch = matches!(arg.get_action(), ArgAction::SetTrue);
        let of_type = arg.get_value_parser().type_id();
        let is = |id: TypeId| of_type == id;
        let values = arg.get_possible_values();
        let kind = match () {
            () if is_switch || is(TypeId::of::<bool>()) => "bool",
            () if !values.is_empty() => "choice",
            () if is(TypeId::of::<f64>())
                || is(TypeId::of::<usize>())
                || is(TypeId::of::<u64>()) =>
            {
                "number"
            }
            () => "text",
        };
        let values = match kind {
            "choice" => values
                .iter()
                .map(|value| value.get_name().to_owned())
                .collect(),
            _ => Vec::new(),
        };
        Some(Self {
            name,
            help: help.split(". ").next().unwrap_or(&help).to_owned(),
            group: arg.get_help_heading().map(str::to_owned),
            default,
            values,
            kind,
            common: !arg.is_hide_short_help_set(),
            is_switch,
        })
    }
}

/// The picture `name` of the built-in example.
pub(crate) fn example(name: &str) -> Option<PathBuf> {
    let example = locate::example().ok()?;
    match name {
        "a.png" => Some(example.a),
        "a_prime.png" => Some(example.a_prime),
        "b.png" => Some(example.b),
        _ => None,
    }
}

/// All capabilities.
pub(crate) fn all(app: &App) -> Answer<Value> {
    let place = Place::named("auto")?;
    let device = match place.adapter {
        Some(adapter) => format!("{} ({adapter})", place.name),
        None => place.name.to_owned(),
    };
    let settings = Kind::ALL.map(|kind| (kind.name().to_owned(), json!(flags(kind))));
    let settings: Map<String, Value> = settings.into_iter().collect();
    let mut all = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "device": device,
        "any_model": app.options.allow_any_model,
        "limits": {
            "upload_bytes": app.options.max_upload, "queue": app.options.queue, "pixels": MAX_PIXELS,
        },
        "settings": settings,
    });
    if locate::example().is_ok() {
        let [a, a_prime, b] = ["a", "a_prime", "b"].map(|name| format!("/v1/example/{name}.png"));
        all["example"] = json!({ "a": a, "a_prime": a_prime, "b": b });
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::super::models;
    use super::*;

    /// Checks that the list names every flag that is not a setting, and nothing else.
    #[test]
    fn no_request_names_a_path() {
        let command = cli::command();
        let known: HashSet<String> = Kind::ALL
            .iter()
            .flat_map(|kind| command_of(*kind, &command).get_arguments())
            .map(|arg| arg.get_id().to_string())
            .collect();
        for name in LEFT_OUT.iter().filter(|name| **name != "help") {
            assert!(known.contains(*name), "{name}");
        }
        for kind in Kind::ALL {
            let command = command_of(kind, &command);
            for flag in flags(kind) {
                let id = flag.name.replace('-', "_");
                let arg = command
                    .get_arguments()
                    .find(|arg| arg.get_id() == id.as_str())
                    .unwrap();
                let is_path = arg.get_value_parser().type_id() == TypeId::of::<PathBuf>();
                let is_restricted = models::RESTRICTED.contains(&flag.name.as_str());
                assert!(!is_path || is_restricted, "{}", flag.name);
            }
        }
    }

    #[test]
    fn settings_say_what_they_are() {
        let learn = flags(Kind::Learn);
        let find = |name: &str| learn.iter().find(|flag| flag.name == name).unwrap();
        assert_eq!((find("steps").kind, find("steps").common), ("number", true));
        assert_eq!(find("delta").values, ["interpolated", "image", "text"]);
        assert_eq!(
            (find("consistency").kind, find("consistency").is_switch),
            ("bool", false)
        );
        assert_eq!(
            (
                find("no-memory-check").kind,
                find("no-memory-check").is_switch
            ),
            ("bool", true)
        );
        assert!(find("steps").default.is_some());
        assert_eq!(find("steps").group.as_deref(), Some("Learning"));
    }
}
