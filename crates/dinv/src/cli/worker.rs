//! `dinv worker`: runs the commands of a server one after another, in one process that keeps the models open.

use std::path::PathBuf;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use clap::Args;
use difference_inversion::Error;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::exit::Exit;
use super::terminal::Failure;
use super::{run_command, signals, terminal};

/// Run the commands that a server writes to standard input
///
/// One JSON object per line: `folder` is where the command runs, `arguments` are its words. Everything that it writes goes
/// to stderr as JSON lines, and `{"type":"done"}` ends its success. The first failure ends the process with its exit
/// code, and so does the end of standard input, after the current step.
#[derive(Debug, Args)]
#[command(hide = true)]
pub(crate) struct WorkerArgs {}

/// Between two looks at whether a signal asks for a stop.
const PATIENCE: Duration = Duration::from_millis(50);

/// A command, as a line of standard input.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Task {
    /// The folder to run it in.
    pub(crate) folder: PathBuf,
    /// The command line, without the program.
    pub(crate) arguments: Vec<String>,
}

/// Runs commands until one fails or a stop is requested.
pub(crate) fn run() -> anyhow::Result<Exit> {
    terminal::write_all_to_stderr();
    let home = std::env::current_dir()?;
    let lines = signals::lines_until_stop()?;
    while !signals::stopping() {
        let line = match lines.recv_timeout(PATIENCE) {
            Ok(_) if signals::stopping() => break, // the server gives it to another process
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => break,
        };
        let task: Task = serde_json::from_str(&line)
            .map_err(|error| Failure::input(format!("standard input: not a command: {error}")))?;
        std::env::set_current_dir(&task.folder).map_err(Error::io(&task.folder))?;
        let exit = run_command(&task.arguments);
        // On Windows, the current folder of a process cannot be removed.
        std::env::set_current_dir(&home).map_err(Error::io(&home))?;
        match exit {
            Exit::Done => terminal::event(&json!({ "type": "done" })),
            other => return Ok(other),
        }
    }
    Ok(signals::exit())
}
