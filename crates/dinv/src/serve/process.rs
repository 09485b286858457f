//! The process that runs commands (`dinv worker`). It isolates the server from their crashes, and keeps the models of the
//! last command open for the next one.

use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Lines, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::cli::fetch::CAPTIONER_KEY;
use crate::cli::locate;
use crate::cli::memory;
use crate::cli::worker::Task;

use super::store::{Running, Store};

/// The priority of commands, so that the server answers while they compute; 0 is usual, 19 the lowest.
#[cfg(unix)]
const PRIORITY: i32 = 10;
/// How long a process may take to end once its input or its output is closed, before it is killed.
const FAREWELL: Duration = Duration::from_secs(10);
/// Between two looks at whether it has ended.
const PAUSE: Duration = Duration::from_millis(5);
/// The environment variables that name places of the Hub's files.
const PLACES: [&str; 5] = [
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_TOKEN_PATH",
    "HUGGINGFACE_HUB_CACHE",
    "XDG_CACHE_HOME",
];
/// Between two looks at the memory that other programs have left.
const LOOK: Duration = Duration::from_secs(5);

/// The idle process, if there is one.
pub(crate) struct Processes {
    idle: Option<Idle>,
    keep: Duration,
    /// The autoencoder of previews.
    pub(crate) preview_vae: Option<PathBuf>,
}

struct Idle {
    process: Process,
    since: Instant,
    looked: Instant,
}

impl Processes {
    /// A process is kept for the time `keep` after its last command.
    pub(crate) fn new(keep: Duration, preview_vae: Option<&Path>) -> Self {
        Self {
            idle: None,
            keep,
            preview_vae: preview_vae.map(Path::to_owned),
        }
    }

    /// The idle process, or a new one.
    pub(crate) fn take(&mut self, store: &Store) -> anyhow::Result<Process> {
        let idle = self.idle.take().map(|idle| idle.process);
        if idle.is_some() {
            store.set_waiting(None);
        }
        idle.filter(Process::is_alive)
            .map_or_else(Process::start, Ok)
    }

    /// Keeps a process whose command succeeded, unless a stop was requested meanwhile: then its input is closed.
    pub(crate) fn put_back(
        &mut self,
        mut process: Process,
        running: Option<Running>,
        store: &Store,
    ) {
        process.stdin = running.and_then(|running| running.stdin);
        process.was_idle = true;
        if self.keep.is_zero() || process.stdin.is_none() {
            return;
        }
        store.set_waiting(Some(process.id()));
        let now = Instant::now();
        self.idle = Some(Idle {
            process,
            since: now,
            looked: now,
        });
    }

    /// Ends the idle process when its time is over, when other programs need its memory, or when it was killed.
    pub(crate) fn check_idle(&mut self, store: &Store) {
        let Some(idle) = &mut self.idle else {
            return;
        };
        let mut is_over = idle.since.elapsed() >= self.keep;
        if idle.looked.elapsed() >= LOOK {
            idle.looked = Instant::now();
            is_over |= memory::is_scarce() || !idle.process.is_alive();
        }
        if is_over {
            store.set_waiting(None);
            self.idle = None;
        }
    }
}

/// The environment variables that name places, absolute: commands work in the folders of their jobs.
fn absolute_places() -> impl Iterator<Item = (&'static str, PathBuf)> {
    let names = PLACES.into_iter().chain([locate::VARIABLE]);
    names.filter_map(|name| Some((name, absolute_place(&std::env::var_os(name)?)?)))
}

/// A place as an absolute path, unless it is one, begins with a variable or the home folder, or is a model's address.
fn absolute_place(place: &OsStr) -> Option<PathBuf> {
    let text = place.to_string_lossy();
    let is_other =
        text.is_empty() || text.starts_with(['~', '$']) || text.starts_with(locate::ON_HUB);
    let path = Path::new(place);
    (!is_other && path.is_relative()).then(|| std::path::absolute(path).ok())?
}

/// A process that runs one command at a time.
pub(crate) struct Process {
    child: Arc<Mutex<Child>>,
    /// Absent while a command runs: closing it stops the command.
    stdin: Option<ChildStdin>,
    lines: Lines<BufReader<ChildStderr>>,
    was_idle: bool,
}

impl Process {
    pub(crate) fn start() -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("cannot find this program")?;
        let mut command = Command::new(program);
        command.arg("worker").stdin(Stdio::piped());
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        // A request may name the server that would get it.
        command.env_remove(CAPTIONER_KEY);
        command.envs(absolute_places());
        // Ctrl-C in the terminal is for the server, which then asks the command to stop.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let mut child = command.spawn().context(
            "cannot start the program: if it was replaced while the server was running, restart the server",
        )?;
        #[cfg(unix)]
        if let Some(pid) = rustix::process::Pid::from_raw(child.id().cast_signed()) {
            let _ = rustix::process::setpriority_pgrp(Some(pid), PRIORITY); // it may have ended
        }
        let stderr = child.stderr.take().context("the program has no stderr")?;
        Ok(Self {
            stdin: child.stdin.take(),
            child: Arc::new(Mutex::new(child)),
            lines: BufReader::new(stderr).lines(),
            was_idle: false,
        })
    }

    /// Sends a command. If the process has just ended, its exit code tells.
    pub(crate) fn begin(&mut self, folder: &Path, arguments: &[String]) -> anyhow::Result<()> {
        let task = Task {
            folder: folder.to_owned(),
            arguments: arguments.to_vec(),
        };
        let line = serde_json::to_string(&task)? + "\n";
        if let Some(stdin) = &mut self.stdin {
            let _ = stdin.write_all(line.as_bytes());
        }
        Ok(())
    }

    /// Whether it has run another command before.
    pub(crate) fn was_idle(&self) -> bool {
        self.was_idle
    }

    /// What stops the command.
    pub(crate) fn running(&mut self) -> Running {
        Running {
            child: Arc::clone(&self.child),
            stdin: self.stdin.take(),
        }
    }

    /// What the command writes.
    pub(crate) fn lines(&mut self) -> impl Iterator<Item = io::Result<String>> {
        &mut self.lines
    }

    /// Waits for a process that has closed its output and is about to end; kills it if it does not.
    pub(crate) fn wait(self) -> io::Result<ExitStatus> {
        let closed = Instant::now();
        loop {
            if let Some(status) = self.child().try_wait()? {
                return Ok(status);
            }
            if closed.elapsed() > FAREWELL {
                self.child().kill()?;
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn child(&self) -> std::sync::MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn id(&self) -> u32 {
        self.child().id()
    }

    fn is_alive(&self) -> bool {
        matches!(self.child().try_wait(), Ok(None))
    }
}

impl Drop for Process {
    /// Ends the process: it stops when its input closes, and is killed if it does not.
    fn drop(&mut self) {
        self.stdin = None;
        let asked = Instant::now();
        while self.is_alive() && asked.elapsed() < FAREWELL {
            std::thread::sleep(PAUSE);
        }
        let mut child = self.child();
        let _ = child.kill(); // it has ended
        let _ = child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_absolute_for_commands_that_work_elsewhere() {
        let here = std::env::current_dir().unwrap();
        let of = |place: &str| absolute_place(OsStr::new(place));
        assert_eq!(of("demo/model"), Some(here.join("demo/model")));
        for place in ["", "/srv/hf", "~/hf", "$SCRATCH/hf", "hf://someone/model"] {
            assert_eq!(of(place), None, "{place}");
        }
    }
}
