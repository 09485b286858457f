//! Output for the user: results on stdout, messages on stderr, and the format of errors.

use std::fmt::{self, Display};
use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use difference_inversion::Error;
use difference_inversion::image::{RgbImage, data_url};
use serde::Serialize;
use serde_json::json;
use terminal_size::{Width, terminal_size_of};

use super::exit::Exit;
use super::signals;

/// A failure found by the command line itself, with what to do about it.
#[derive(Debug)]
pub(crate) struct Failure {
    message: String,
    hint: Option<String>,
    exit: Exit,
}

impl Failure {
    /// Something went wrong, and the program ends like this.
    pub(crate) fn ending(exit: Exit, message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            hint: None,
            exit,
        }
    }

    /// Something went wrong that is neither of the kinds below.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self::ending(Exit::Failed, message)
    }

    /// The command is wrong as it is written, or would replace what is there.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::ending(Exit::Usage, message)
    }

    /// An input is missing or wrong: a picture, a model, a line of a file, the value of a setting.
    pub(crate) fn input(message: impl Into<String>) -> Self {
        Self::ending(Exit::Data, message)
    }

    /// A temporary failure: the same command can be started again later.
    pub(crate) fn temporary(message: impl Into<String>) -> Self {
        Self::ending(Exit::Again, message)
    }

    /// The work was stopped.
    pub(crate) fn interrupted(message: impl Into<String>) -> Self {
        Self::ending(signals::exit(), message)
    }

    /// Adds what the user can do.
    pub(crate) fn hint(self, hint: impl Into<String>) -> Self {
        Self {
            hint: Some(hint.into()),
            ..self
        }
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// Whether a program reads stderr: then every line of it is a JSON object.
static MACHINE: AtomicBool = AtomicBool::new(false);

/// From now on, every line on stderr is a JSON object (`--progress json`).
pub(crate) fn write_json_lines() {
    MACHINE.store(true, Ordering::Relaxed);
}

/// Whether results go to stderr.
static ALL_TO_STDERR: AtomicBool = AtomicBool::new(false);

/// From now on, results are events of the type `output` on stderr, whose lines are JSON objects: their reader knows what
/// came before what.
#[cfg(feature = "serve")]
pub(crate) fn write_all_to_stderr() {
    write_json_lines();
    ALL_TO_STDERR.store(true, Ordering::Relaxed);
}

/// Whether every line on stderr is a JSON object.
pub(crate) fn writes_json_lines() -> bool {
    MACHINE.load(Ordering::Relaxed)
}

/// Prints a message for the user on stderr. A closed stderr is ignored.
pub(crate) fn message(text: impl Display) {
    if writes_json_lines() {
        event(&json!({ "type": "message", "message": text.to_string() }));
    } else {
        let text = harmless(&text.to_string());
        let _ = writeln!(io::stderr().lock(), "{}", fitted(&text));
    }
}

/// A text without the characters that control a terminal: names in files may have any.
fn harmless(text: &str) -> String {
    text.replace(
        |c: char| c.is_control() && !['\n', '\t'].contains(&c),
        "\u{fffd}",
    )
}

/// A message, broken between words if it goes to a terminal.
fn fitted(text: &str) -> String {
    let stderr = io::stderr();
    let size = stderr.is_terminal().then(|| terminal_size_of(&stderr));
    match size.flatten() {
        Some((Width(width), _)) => broken(text, width.into()),
        None => text.to_owned(),
    }
}

/// A text broken between words into lines of at most `width` columns, if its words are short enough. Continuation
/// lines are indented. Hints are not broken: people paste the commands in them.
fn broken(text: &str, width: usize) -> String {
    let options = textwrap::Options::new(width)
        .break_words(false)
        .subsequent_indent("  ");
    let options = options.word_splitter(textwrap::WordSplitter::NoHyphenation);
    let lines = text
        .lines()
        .map(|line| match line.trim_start().starts_with("hint: ") {
            true => line.to_owned(),
            false => textwrap::fill(line, &options),
        });
    lines.collect::<Vec<_>>().join("\n")
}

/// Prints a JSON object as one line of stderr.
pub(crate) fn event(event: &impl Serialize) {
    let line = serde_json::to_string(event).unwrap_or_default() + "\n";
    let _ = io::stderr().lock().write_all(line.as_bytes()); // at once, so that nothing comes between
}

/// Prints a picture as a line of stderr, of the type `preview`. What is shown only on the way may fail.
pub(crate) fn preview(picture: &RgbImage) {
    if let Ok(picture) = data_url(picture) {
        event(&json!({ "type": "preview", "picture": picture }));
    }
}

/// Prints one line of results on stdout.
///
/// # Errors
/// If stdout cannot be written, unless its reader has closed it (`| head`).
pub(crate) fn line(text: impl Display) -> anyhow::Result<()> {
    if ALL_TO_STDERR.load(Ordering::Relaxed) {
        event(&json!({ "type": "output", "text": text.to_string() }));
        return Ok(());
    }
    match writeln!(io::stdout().lock(), "{text}") {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::new(format!("cannot write to stdout: {error}")).into())
        }
        _ => Ok(()),
    }
}

/// Prints one JSON object on stdout.
pub(crate) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    line(serde_json::to_string_pretty(value)?)
}

/// Prints an error with its causes and a hint; returns the exit code.
pub(crate) fn error(error: &anyhow::Error) -> Exit {
    let exit = exit_of(error);
    if writes_json_lines() {
        event(&json!({ "type": "error", "message": chain(error), "hint": hint(error) }));
        return exit;
    }
    match exit {
        Exit::Stopped(_) => message(format_args!("{error:#}")),
        Exit::Again if signals::stopping() => message(format_args!("{error:#}")), // the time is over
        _ => message(format_args!("error: {}", chain(error))),
    }
    if let Some(hint) = hint(error) {
        message(format_args!("hint: {hint}"));
    }
    exit
}

/// The error and its causes in one line; a cause already stated by the text before it is omitted.
pub(crate) fn chain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// Whether what failed may succeed later.
pub(crate) fn is_temporary(error: &anyhow::Error) -> bool {
    exit_of(error) == Exit::Again
}

/// How an error ends the program.
pub(crate) fn exit_of(error: &anyhow::Error) -> Exit {
    if let Some(failure) = error.downcast_ref::<Failure>() {
        return failure.exit;
    }
    let library = error.downcast_ref::<Error>();
    library.map_or(Exit::Failed, |error| Exit::of(error.class()))
}

/// What the user can do about an error.
pub(crate) fn hint(error: &anyhow::Error) -> Option<String> {
    if let Some(failure) = error.downcast_ref::<Failure>() {
        return failure.hint.clone();
    }
    error.downcast_ref::<Error>()?.hint()
}

/// A size in bytes, kB, MB or GB.
pub(crate) fn size(bytes: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let value = bytes as f64;
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..1_000_000 => format!("{:.1} kB", value / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", value / 1e6),
        _ => format!("{:.2} GB", value / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn a_cause_is_told_once() {
        let source = io::Error::new(io::ErrorKind::NotFound, "no such file");
        let library = Error::io("a.png")(source);
        let error = Err::<(), _>(library).context("cannot read A").unwrap_err();
        assert_eq!(chain(&error), "cannot read A: a.png: no such file");
        assert_eq!(
            hint(&error).as_deref(),
            Some("check the spelling of the path")
        );
    }

    #[test]
    fn names_do_not_control_the_terminal() {
        assert_eq!(
            harmless("a\u{1b}[31mb\r\n\tç"),
            "a\u{fffd}[31mb\u{fffd}\n\tç"
        );
    }

    #[test]
    fn exit_codes_tell_usage_and_inputs_from_failure() {
        assert_eq!(exit_of(&Failure::usage("x").into()), Exit::Usage);
        assert_eq!(exit_of(&Failure::input("x").into()), Exit::Data);
        assert_eq!(exit_of(&Failure::temporary("x").into()), Exit::Again);
        let library = anyhow::Error::from(Error::invalid_input("x"));
        assert_eq!(exit_of(&library.context("reading y")), Exit::Data);
        assert_eq!(exit_of(&Failure::new("x").into()), Exit::Failed);
        assert_eq!(exit_of(&anyhow::anyhow!("x")), Exit::Failed);
    }

    #[test]
    fn messages_are_broken_between_words() {
        let note =
            "note: a/rather/long/path.png is nothing like it\nhint: dinv generate --prompt x";
        let lines = [
            "note:",
            "  a/rather/long/path.png",
            "  is nothing like it",
            "hint: dinv generate --prompt x",
        ];
        assert_eq!(broken(note, 20), lines.join("\n"));
        assert_eq!(broken("  two  spaces", 20), "  two  spaces");
    }

    #[test]
    fn sizes_are_put_for_people() {
        assert_eq!(size(12), "12 B");
        assert_eq!(size(1_500), "1.5 kB");
        assert_eq!(size(17_600_000), "17.6 MB");
        assert_eq!(size(3_440_000_000), "3.44 GB");
    }
}
