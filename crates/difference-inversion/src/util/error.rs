//! The one error type of the library.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::util::caption_problem::CaptionProblem;
use crate::util::hub_problem::HubProblem;
use crate::util::progress::Stage;

/// Every error, with its place, the expected and the actual value.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// The observer asked to stop.
    #[error("stopped after {done} of {total} {} of {stage}", stage.unit())]
    Stopped {
        /// The stage that was running.
        stage: Stage,
        /// Steps (of a download: bytes) finished.
        done: usize,
        /// Steps in total.
        total: usize,
        /// The checkpoint from which learning can resume.
        checkpoint: Option<PathBuf>,
    },
    /// A model is unavailable from the Hub.
    #[error("{id}: {problem}")]
    Hub {
        /// The model's name.
        id: String,
        /// The reason.
        problem: HubProblem,
    },
    /// A server that is asked for captions gives none.
    #[error("captioner {address}: {problem}")]
    Captioner {
        /// The server's address.
        address: String,
        /// The reason.
        problem: CaptionProblem,
    },
    /// A setting is out of range.
    #[error("setting `{name}`: expected {expected}, found {found}")]
    Setting {
        /// The setting's name.
        name: &'static str,
        /// The allowed values.
        expected: String,
        /// The actual value.
        found: String,
    },
    /// A field of a configuration file has a value for which there is no implementation.
    #[error("{}: field `{field}`: {found} is not supported, only {supported}", path.display())]
    UnsupportedField {
        /// The configuration file.
        path: PathBuf,
        /// The field.
        field: String,
        /// Its value, as JSON.
        found: String,
        /// The value that is supported, as JSON.
        supported: String,
    },
    /// A single file has a text encoder, but not its vocabulary.
    #[error(
        "the vocabulary is missing: {} is a single file, which holds none; give a folder with CLIP's \
         tokenizer.json, or its vocab.json and merges.txt, such as openai/clip-vit-large-patch14",
        path.display()
    )]
    NoVocabulary {
        /// The single file.
        path: PathBuf,
    },
    /// A model names an optional text encoder that is missing.
    #[error("{}: names `{part}`, and there is no such folder", path.display())]
    NoTextEncoder {
        /// `model_index.json`.
        path: PathBuf,
        /// The folder of the text encoder.
        part: &'static str,
    },
    /// A required item was not given and cannot be made.
    #[error("{what} is missing: {reason}")]
    Missing {
        /// The missing item.
        what: String,
        /// Why it is needed and how to give it.
        reason: String,
    },
    /// A and A′ are the same in the joint space.
    #[error("there is no difference to learn: {reason}")]
    NoDifference {
        /// The reason.
        reason: String,
    },
    /// Difference tokens and models that do not belong together.
    #[error("{reason}")]
    WrongBase {
        /// How they differ.
        reason: String,
    },
    /// A model cannot do the requested task.
    #[error("{reason}")]
    WrongModel {
        /// The required and the actual kind of model.
        reason: String,
    },
    /// The optimisation diverged.
    #[error(
        "the loss is not a finite number at step {step}; a smaller learning rate, a smaller bound on \
         the tokens' norm (max_norm) or f32 instead of f16 may help"
    )]
    Diverged {
        /// The step, counted from 0.
        step: usize,
        /// The last checkpoint written before it.
        checkpoint: Option<PathBuf>,
    },
    /// A file or folder was read, but its contents are invalid.
    #[error("{}: {reason}", path.display())]
    InvalidFile {
        /// The file or folder.
        path: PathBuf,
        /// The problem with it.
        reason: String,
    },
    /// A field of a configuration file is missing, of the wrong type, or has a value that is not
    /// supported.
    #[error("{}: field `{field}`: {reason}", path.display())]
    Config {
        /// The configuration file.
        path: PathBuf,
        /// The field, dotted where nested.
        field: String,
        /// The expected and the actual value.
        reason: String,
    },
    /// A tensor that the model needs is missing from the file, or of the wrong shape or type.
    #[error("{}: tensor `{name}`: expected {expected}, found {found}", path.display())]
    Tensor {
        /// The weights file (or the folder it was looked for in).
        path: PathBuf,
        /// The full key of the tensor.
        name: String,
        /// What the model requires.
        expected: String,
        /// The file's shape or type.
        found: String,
    },
    /// The file has tensors that the model described by its config.json does not use.
    #[error(
        "{}: {} tensors are not used by the model that config.json describes: {}",
        path.display(), names.len(), abbreviate(names)
    )]
    UnusedTensors {
        /// The weights file or folder.
        path: PathBuf,
        /// The full keys of the tensors.
        names: Vec<String>,
    },
    /// Several pictures cannot be read.
    #[error("{} of {total} pictures cannot be read:{}", wrong.len(), lines(wrong))]
    Pictures {
        /// The number of pictures that were to be read.
        total: usize,
        /// What is wrong with those that cannot be, at least two.
        wrong: Vec<Error>,
    },
    /// A caller's value is invalid for the computation.
    #[error("{reason}")]
    InvalidInput {
        /// The expected and the actual value.
        reason: String,
    },
    /// A computation gave NaN or infinity.
    #[error("{what} is not finite (NaN or infinity)")]
    NotFinite {
        /// The computation.
        what: &'static str,
    },
}

/// The kind of an error, for a program that decides whether to try again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorClass {
    /// A file, a model or a setting's value is wrong: another attempt fails in the same way.
    Input,
    /// Another attempt may succeed later, or on another machine.
    Temporary,
    /// The observer asked to stop.
    Stopped,
    /// Anything else.
    Other,
}

/// The largest number of errors in one message.
const NAMED: usize = 20;

/// A line for each error.
fn lines(errors: &[Error]) -> String {
    let lines = errors
        .iter()
        .take(NAMED)
        .map(|error| format!("\n  {error}"));
    let lines: String = lines.collect();
    match errors.len().saturating_sub(NAMED) {
        0 => lines,
        more => format!("{lines}\n  and {more} more"),
    }
}

impl Error {
    /// Everything that is `wrong` with some of `total` pictures, at once.
    ///
    /// # Errors
    /// The only error, or [`Error::Pictures`] with all of them.
    pub fn of_pictures(total: usize, mut wrong: Vec<Self>) -> Result<()> {
        match wrong.len() {
            0 => Ok(()),
            1 => Err(wrong.remove(0)),
            _ => Err(Self::Pictures { total, wrong }),
        }
    }

    /// What went wrong.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Io { source, .. } => match source.kind() {
                ErrorKind::NotFound
                | ErrorKind::IsADirectory
                | ErrorKind::NotADirectory
                | ErrorKind::InvalidData
                | ErrorKind::UnexpectedEof => ErrorClass::Input,
                ErrorKind::OutOfMemory => ErrorClass::Temporary,
                _ => ErrorClass::Other,
            },
            Self::Hub { problem, .. } => problem.class(),
            Self::Captioner { problem, .. } => problem.class(),
            Self::Stopped { .. } => ErrorClass::Stopped,
            Self::Pictures { wrong, .. } => (wrong.iter().map(Self::class))
                .find(|class| *class != ErrorClass::Input)
                .unwrap_or(ErrorClass::Input),
            Self::Diverged { .. } | Self::NotFinite { .. } => ErrorClass::Other,
            Self::Setting { .. }
            | Self::UnsupportedField { .. }
            | Self::NoVocabulary { .. }
            | Self::NoTextEncoder { .. }
            | Self::Missing { .. }
            | Self::NoDifference { .. }
            | Self::WrongBase { .. }
            | Self::WrongModel { .. }
            | Self::InvalidFile { .. }
            | Self::Config { .. }
            | Self::Tensor { .. }
            | Self::UnusedTensors { .. }
            | Self::InvalidInput { .. } => ErrorClass::Input,
        }
    }

    /// What a user of the program `dinv` can do about it: a sentence without a full stop.
    pub fn hint(&self) -> Option<String> {
        let fixed = match self {
            Self::Stopped {
                checkpoint: Some(checkpoint),
                ..
            } => {
                let checkpoint = checkpoint.display();
                return Some(format!(
                    "run the same command with `--resume` to continue from {checkpoint}"
                ));
            }
            Self::Hub { id, problem } => return problem.hint(id),
            Self::Captioner { problem, .. } => return problem.hint(),
            Self::Stopped {
                stage: Stage::Download,
                ..
            } => "run the same command again: the download resumes",
            Self::Io { source, .. } => match source.kind() {
                ErrorKind::NotFound => "check the spelling of the path",
                ErrorKind::StorageFull => {
                    "make room on the disk, or choose another place with `-o`"
                }
                _ => return None,
            },
            Self::UnusedTensors { .. } | Self::Tensor { .. } => {
                "the weights do not belong to their config.json, or a single file not to its `--family`; \
                 `dinv doctor` lists what was found"
            }
            Self::NoTextEncoder { .. } => {
                "`--without-t5` leaves it out; `dinv models pull` downloads what is missing"
            }
            Self::NoVocabulary { .. } => {
                "name it with `--tokenizer` or `--clip`: a folder, or a model of the Hub"
            }
            // If no solver could replace it, the error is of another kind.
            Self::UnsupportedField { path, .. } if path.ends_with("scheduler_config.json") => {
                "`--scheduler` draws with another solver, such as ddim"
            }
            Self::Setting { name: "family", .. } => {
                "without `--family` the family is recognised from the file"
            }
            _ => return None,
        };
        Some(fixed.to_owned())
    }

    /// An [`Error::Io`] for `path`; for use with `map_err`.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    /// An [`Error::InvalidFile`].
    pub fn invalid_file(path: impl Into<PathBuf>, reason: impl Into<String>) -> Self {
        Self::InvalidFile {
            path: path.into(),
            reason: reason.into(),
        }
    }

    /// An [`Error::InvalidInput`].
    pub fn invalid_input(reason: impl Into<String>) -> Self {
        Self::InvalidInput {
            reason: reason.into(),
        }
    }

    /// An [`Error::Config`]: `field` of the configuration at `path` has a value that is not
    /// supported.
    pub fn unsupported(
        path: &Path,
        field: &str,
        expected: &str,
        found: impl std::fmt::Debug,
    ) -> Self {
        Self::Config {
            path: path.to_owned(),
            field: field.to_owned(),
            reason: format!("expected {expected}, found {found:?}"),
        }
    }
}

/// The first of some names.
pub(crate) fn abbreviate(names: &[String]) -> String {
    const SHOWN: usize = 8;
    let mut text = names
        .iter()
        .take(SHOWN)
        .cloned()
        .collect::<Vec<_>>()
        .join(", ");
    if names.len() > SHOWN {
        text.push_str(", …");
    }
    text
}

/// The library's result type.
pub type Result<T> = std::result::Result<T, Error>;

#[cfg(test)]
mod tests {
    use super::*;

    fn io(kind: ErrorKind) -> Error {
        Error::io("x")(kind.into())
    }

    fn stopped(stage: Stage, checkpoint: Option<&str>) -> Error {
        Error::Stopped {
            stage,
            done: 3,
            total: 9,
            checkpoint: checkpoint.map(PathBuf::from),
        }
    }

    fn unsupported(file: &str, field: &str) -> Error {
        Error::UnsupportedField {
            path: PathBuf::from("model").join(file),
            field: field.to_owned(),
            found: "true".to_owned(),
            supported: "false".to_owned(),
        }
    }

    fn setting(name: &'static str) -> Error {
        Error::Setting {
            name,
            expected: "one".to_owned(),
            found: "another".to_owned(),
        }
    }

    #[test]
    fn what_can_be_done_is_hinted_at() {
        let path = || PathBuf::from("x");
        let tensor = Error::Tensor {
            path: path(),
            name: "w".to_owned(),
            expected: "shape [1]".to_owned(),
            found: "no such tensor".to_owned(),
        };
        let unused = Error::UnusedTensors {
            path: path(),
            names: vec!["w".to_owned()],
        };
        let weights = "the weights do not belong to their config.json, or a single file not to its \
                       `--family`; `dinv doctor` lists what was found";
        for (error, expected) in [
            (
                stopped(Stage::Learn, Some("d.checkpoint.safetensors")),
                "run the same command with `--resume` to continue from d.checkpoint.safetensors",
            ),
            (
                stopped(Stage::Download, None),
                "run the same command again: the download resumes",
            ),
            (io(ErrorKind::NotFound), "check the spelling of the path"),
            (
                io(ErrorKind::StorageFull),
                "make room on the disk, or choose another place with `-o`",
            ),
            (tensor, weights),
            (unused, weights),
            (
                Error::NoVocabulary { path: path() },
                "name it with `--tokenizer` or `--clip`: a folder, or a model of the Hub",
            ),
            (
                Error::NoTextEncoder {
                    path: path(),
                    part: "text_encoder_3",
                },
                "`--without-t5` leaves it out; `dinv models pull` downloads what is missing",
            ),
            (
                unsupported("scheduler_config.json", "thresholding"),
                "`--scheduler` draws with another solver, such as ddim",
            ),
            (
                setting("family"),
                "without `--family` the family is recognised from the file",
            ),
        ] {
            assert_eq!(error.hint().as_deref(), Some(expected), "{error}");
        }
    }

    #[test]
    fn inputs_are_told_from_what_may_pass() {
        use ErrorClass::{Input, Other, Stopped, Temporary};
        let unreachable = HubProblem::Unreachable {
            host: String::new(),
            reason: String::new(),
        };
        let hub = |problem: HubProblem| problem.of(&"a/b");
        for (error, class) in [
            (io(ErrorKind::NotFound), Input),
            (io(ErrorKind::PermissionDenied), Other),
            (io(ErrorKind::StorageFull), Other),
            (io(ErrorKind::OutOfMemory), Temporary),
            (hub(unreachable), Temporary),
            (hub(HubProblem::NotFound), Input),
            (stopped(Stage::Learn, None), Stopped),
            (setting("steps"), Input),
            (Error::invalid_file("x", "cut"), Input),
            (Error::NotFinite { what: "the loss" }, Other),
        ] {
            assert_eq!(error.class(), class, "{error}");
        }
    }

    #[test]
    fn nothing_is_hinted_at_where_nothing_helps() {
        for error in [
            stopped(Stage::Learn, None),
            io(ErrorKind::PermissionDenied),
            unsupported("config.json", "thresholding"),
            setting("steps"),
            Error::NotFinite { what: "the loss" },
        ] {
            assert_eq!(error.hint(), None, "{error}");
        }
    }
}
