//! The threads that run jobs, as commands of this program in a process of their own.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use difference_inversion::Error;
use difference_inversion::method::learn::losses_of_checkpoint;
use difference_inversion::util::files::{self, Claim};
use difference_inversion::util::progress::Progress;
use serde_json::{Value, json};

use crate::cli::exit::Exit;
use crate::cli::record::recipe_in;
use crate::cli::{signals, terminal};

use super::differences;
use super::job::{self, Kind, Lane, Loss, Run, State, now};
use super::process::{Process, Processes};
use super::request::{DIFFERENCE, INPUTS, RESULTS, Request, WORK};
use super::store::{Running, Store};

/// How often a command is started again after a temporary failure, and after what time.
const TRIES: usize = 3;
const BETWEEN_TRIES: Duration = Duration::from_secs(1);
/// How late a process may notice a signal that it was sent while it was idle.
const LATE: Duration = Duration::from_secs(1);

/// How a command ended.
enum Ended {
    /// It succeeded, and printed this.
    Done(String),
    Failed(Value),
    /// It failed, and may succeed later.
    Temporary(Value),
    /// It stopped, as requested.
    Stopped,
}

/// Runs the jobs of a lane until a stop is requested. An idle process keeps the models of its last command open for the
/// time `keep`.
pub(crate) fn run(store: &Store, lane: Lane, keep: Duration, preview_vae: Option<&Path>) {
    let mut processes = Processes::new(keep, preview_vae);
    while let Some(id) = store.next(lane, || processes.check_idle(store)) {
        let worked = work(store, &mut processes, &id);
        store.set_idle(&id);
        let ended = match worked {
            Ok(ended) => ended,
            Err(error) => {
                let mut told = json!({ "message": terminal::chain(&error) });
                if let Some(hint) = terminal::hint(&error) {
                    told["hint"] = json!(hint);
                }
                Ended::Failed(told)
            }
        };
        let cancelled = store.get(&id).is_ok_and(|job| job.cancels > 0);
        let (state, error) = match ended {
            Ended::Done(_) => (State::Done, None),
            Ended::Failed(_) | Ended::Temporary(_) | Ended::Stopped if cancelled => {
                (State::Cancelled, None)
            }
            Ended::Stopped if signals::stopping() => return, // it continues at the next start
            Ended::Failed(error) | Ended::Temporary(error) => (State::Failed, Some(error)),
            Ended::Stopped => {
                let message = "the command was stopped from outside";
                (State::Failed, Some(json!({ "message": message })))
            }
        };
        let saved = store.write(&id, |job| {
            job.stored.state = state;
            (job.progress, job.preview) = (None, None);
            job.stored.finished = Some(now());
            job.stored.error = error;
        });
        if let Err(error) = saved {
            terminal::message(format_args!("error: job {id}: {error:#}"));
        }
        terminal::message(format_args!("job {id}: {}", state.name()));
    }
}

/// Runs the remaining commands of a job.
fn work(store: &Store, processes: &mut Processes, id: &str) -> anyhow::Result<Ended> {
    let Ok(job) = store.get(id) else {
        return Ok(Ended::Stopped);
    };
    let folder = store.job_folder(id);
    for name in [WORK, RESULTS] {
        let path = folder.join(name);
        fs::create_dir_all(&path).map_err(Error::io(&path))?;
    }
    let mut output = String::new();
    for (number, run) in job
        .stored
        .runs
        .iter()
        .enumerate()
        .skip(job.stored.runs_done)
    {
        let mut tries = 0;
        loop {
            if !wait_for_claims(store, id, &folder, run)? {
                return Ok(Ended::Stopped);
            }
            if is_there(&folder, run) {
                break;
            }
            match execute(store, processes, id, &folder, run)? {
                Ended::Done(printed) => {
                    output = printed;
                    break;
                }
                // Such as the command of a killed server that had not yet claimed its outputs.
                // A download has tried again itself.
                Ended::Temporary(_) if tries < TRIES && job.stored.kind != Kind::Download => {
                    tries += 1;
                }
                other => {
                    if !signals::stopping() {
                        keep_drawn(store, id, &folder, run)?;
                    }
                    return Ok(other);
                }
            }
            std::thread::sleep(BETWEEN_TRIES);
        }
        let results = collect(store, id, job.stored.kind, &folder, run, &output)?;
        store.write(id, |job| {
            job.stored.results.extend(results);
            job.stored.runs_done = number + 1;
        })?;
    }
    Ok(Ended::Done(output))
}

/// Waits until no other process writes the outputs: the command of a killed server ends after its step. Returns
/// whether the job should continue.
fn wait_for_claims(store: &Store, id: &str, folder: &Path, run: &Run) -> anyhow::Result<bool> {
    for path in run.claims.iter().map(|path| folder.join(path)) {
        if !path.parent().is_some_and(Path::is_dir) {
            continue;
        }
        while Claim::on(&path)?.is_none() {
            if signals::stopping() || store.get(id).is_ok_and(|job| job.cancels > 0) {
                return Ok(false);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    Ok(true)
}

/// Whether all outputs of a command exist, at their temporary or final paths.
fn is_there(folder: &Path, run: &Run) -> bool {
    let is_there = |output: &job::Output| {
        folder.join(&output.from).is_file() || folder.join(RESULTS).join(&output.name).is_file()
    };
    files::sweep(&folder.join(WORK)); // completes a set that a killed command was moving
    !run.outputs.is_empty() && run.outputs.iter().all(is_there)
}

/// Runs a command and passes its reports on.
fn execute(
    store: &Store,
    processes: &mut Processes,
    id: &str,
    folder: &Path,
    run: &Run,
) -> anyhow::Result<Ended> {
    let mut arguments = run.arguments.clone();
    arguments.extend(["--json", "--progress=json"].map(str::to_owned));
    if run.draws() {
        arguments.push("--previews".to_owned());
        let preview_vae = processes.preview_vae.iter();
        let path = |path: &PathBuf| path.to_string_lossy().into_owned();
        arguments.extend(preview_vae.flat_map(|vae| ["--preview-vae".to_owned(), path(vae)]));
    }
    let checkpoint = run.checkpoint.as_ref();
    let checkpoint = checkpoint.map(|path| folder.join(path));
    let checkpoint = checkpoint.filter(|path| path.is_file());
    let mut listener = Listener::new(store, id)?;
    if let Some(checkpoint) = &checkpoint {
        listener.catch_up(checkpoint)?;
        arguments.push("--resume".to_owned());
    }
    let mut process = processes.take(store)?;
    let begun = Instant::now();
    let mut running = run_in(&mut process, store, id, folder, &arguments, &mut listener)?;
    if process.was_idle() && !listener.began && !listener.is_done {
        // It ended before it had read the command: it was killed while it was idle.
        process = Process::start()?;
        running = run_in(&mut process, store, id, folder, &arguments, &mut listener)?;
    }
    if listener.is_done {
        processes.put_back(process, running, store);
        return Ok(Ended::Done(listener.output));
    }
    let was_late = process.was_idle() && begun.elapsed() < LATE && !signals::stopping();
    let status = process.wait()?;
    let cancelled = store.get(id).is_ok_and(|job| job.cancels > 0);
    Ok(match status.code() {
        // The signal was sent to the idle process, which had read the command before it noticed.
        Some(code) if code > 128 && was_late && !cancelled => {
            Ended::Temporary(listener.error(&status.to_string()))
        }
        Some(code) if code > 128 => Ended::Stopped,
        _ if cancelled => Ended::Stopped,
        Some(code) if code == i32::from(Exit::Again.code()) => {
            Ended::Temporary(listener.error(&status.to_string()))
        }
        code => {
            let error = listener.error(&status.to_string());
            let is_input = code == Some(i32::from(Exit::Data.code()));
            if let Some(checkpoint) = checkpoint.filter(|path| is_input && is_about(&error, path)) {
                fs::remove_file(&checkpoint).map_err(Error::io(&checkpoint))?; // the job can be tried again
            }
            Ended::Failed(error)
        }
    })
}

/// Whether an error is about a file.
fn is_about(error: &Value, path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let message = error["message"].as_str();
    message.is_some_and(|message| message.contains(&*name))
}

/// Runs a command in a process; returns what could stop it.
fn run_in(
    process: &mut Process,
    store: &Store,
    id: &str,
    folder: &Path,
    arguments: &[String],
    listener: &mut Listener<'_>,
) -> anyhow::Result<Option<Running>> {
    process.begin(folder, arguments)?;
    store.set_running(id, process.running());
    let heard = listener.listen(process.lines());
    let running = store.set_idle(id);
    heard.map(|()| running)
}

/// Handles the lines that a command writes to stderr.
struct Listener<'a> {
    store: &'a Store,
    id: &'a str,
    losses: fs::File,
    /// Whether the command reported anything but messages for people.
    began: bool,
    /// Whether the command succeeded.
    is_done: bool,
    /// What the command printed.
    output: String,
    error: Option<Value>,
    /// The last lines that are not JSON.
    others: Vec<String>,
}

impl<'a> Listener<'a> {
    fn new(store: &'a Store, id: &'a str) -> anyhow::Result<Self> {
        Ok(Self {
            store,
            id,
            losses: store.losses(id)?,
            began: false,
            is_done: false,
            output: String::new(),
            error: None,
            others: Vec::new(),
        })
    }

    /// Adds the losses that a killed server missed, from the checkpoint. A job without losses resumes from another
    /// job's checkpoint, and shows only its own steps.
    fn catch_up(&mut self, checkpoint: &Path) -> anyhow::Result<()> {
        let known = self.store.get(self.id).map_or(0, |job| {
            let steps = job.losses.iter().map(|loss| loss.step);
            steps
                .zip(1..)
                .take_while(|(step, expected)| step == expected)
                .count()
        });
        if known == 0 {
            return Ok(());
        }
        // The command itself reports an invalid checkpoint.
        let history = losses_of_checkpoint(checkpoint).unwrap_or_default();
        for (step, loss) in (1..).zip(history).skip(known) {
            self.add(step, loss.total)?;
        }
        Ok(())
    }

    /// Adds the loss of a step, and saves it.
    fn add(&mut self, step: usize, loss: f32) -> anyhow::Result<()> {
        let mut written = None;
        self.store.update(self.id, |job| {
            let event = job.changed();
            let loss = Loss { event, step, loss };
            job.add(loss);
            written = Some(loss);
        });
        if let Some(loss) = written {
            writeln!(self.losses, "{}", serde_json::to_string(&loss)?)?;
        }
        Ok(())
    }

    /// Handles the lines of a command up to its end.
    fn listen(&mut self, lines: impl Iterator<Item = io::Result<String>>) -> anyhow::Result<()> {
        for line in lines {
            self.hear(&line?)?;
            if self.is_done {
                break;
            }
        }
        Ok(())
    }

    fn hear(&mut self, line: &str) -> anyhow::Result<()> {
        if let Ok(progress) = serde_json::from_str::<Progress>(line) {
            self.began = true;
            return self.observe(&progress);
        }
        match serde_json::from_str::<Value>(line) {
            Ok(mut event) if event["type"] == "error" => {
                let mut error = json!({ "message": event["message"].take() });
                if event["hint"].is_string() {
                    error["hint"] = event["hint"].take();
                }
                self.error = Some(error);
                self.began = true;
            }
            Ok(event) if event["type"] == "output" => {
                self.output += event["text"].as_str().unwrap_or_default();
                self.output.push('\n');
            }
            Ok(event) if event["type"] == "done" => self.is_done = true,
            Ok(mut event) if event["type"] == "preview" => {
                let picture = event["picture"].take();
                self.store.update(self.id, |job| {
                    let event = job.changed();
                    job.preview = picture.as_str().map(|picture| (event, Arc::from(picture)));
                });
            }
            Ok(event) if event["type"] == "message" => {}
            _ => {
                self.others.push(line.to_owned());
                if self.others.len() > 20 {
                    self.others.remove(0);
                }
            }
        }
        Ok(())
    }

    fn observe(&mut self, progress: &Progress) -> anyhow::Result<()> {
        match progress {
            Progress::Step {
                stage,
                done,
                total,
                loss,
            } => {
                let stage = serde_json::to_value(stage)?;
                let stage = stage.as_str().unwrap_or_default().to_owned();
                self.store.update(self.id, |job| {
                    let since = match &job.progress {
                        Some(known) if known.stage == stage && known.step <= *done => known.since,
                        _ => (Instant::now(), *done),
                    };
                    job.progress = Some(job::Progress {
                        stage,
                        step: *done,
                        of: *total,
                        since,
                    });
                    job.changed();
                });
                if let Some(loss) = loss {
                    self.add(*done, loss.total)?;
                }
            }
            Progress::Notice { message } => self.store.write(self.id, |job| {
                let notes = &mut job.stored.notes;
                if !notes.contains(message) {
                    notes.push(message.clone());
                }
            })?,
            _ => {}
        }
        Ok(())
    }

    /// The reason why the command failed.
    fn error(self, status: &str) -> Value {
        self.error.unwrap_or_else(|| {
            let said = self.others.join("\n");
            json!({
                "message": format!("the command ended unexpectedly ({status})"),
                "hint": match said.is_empty() {
                    true => "it may have been killed for lack of memory: try the setting memory=low, or a smaller resolution",
                    false => said.as_str(),
                },
            })
        })
    }
}

/// Moves the outputs of a command to the results, and describes them.
fn collect(
    store: &Store,
    id: &str,
    kind: Kind,
    folder: &Path,
    run: &Run,
    printed: &str,
) -> anyhow::Result<Vec<Value>> {
    let mut results = Vec::new();
    for output in &run.outputs {
        let picture = place(id, folder, output)?;
        if output.shows.is_some() && picture.is_none() {
            anyhow::bail!("the command did not make {}", output.name);
        }
        results.extend(picture);
    }
    match kind {
        Kind::Analogy | Kind::Learn => {
            let mut names = run.outputs.iter().map(|output| output.name.as_str());
            if names.any(|name| name == DIFFERENCE) {
                results.push(keep_difference(store, id, folder)?);
            }
        }
        Kind::Caption => {
            let printed: Value =
                serde_json::from_str(printed).context("the captions are not JSON")?;
            let captions = printed["captions"].as_array().into_iter().flatten();
            results.extend(captions.enumerate().map(|(target, caption)| {
                json!({ "kind": "caption", "target": target, "caption": caption["caption"] })
            }));
        }
        Kind::Apply | Kind::Generate | Kind::Download => {}
    }
    Ok(results)
}

/// Keeps the pictures that a command made before it was cancelled or failed.
fn keep_drawn(store: &Store, id: &str, folder: &Path, run: &Run) -> anyhow::Result<()> {
    let mut results = Vec::new();
    for output in run.outputs.iter().filter(|output| output.shows.is_some()) {
        results.extend(place(id, folder, output)?);
    }
    store.write(id, |job| job.stored.results.extend(results))?;
    Ok(())
}

/// Moves an output of a command to the results; describes it if it is a picture and there.
fn place(id: &str, folder: &Path, output: &job::Output) -> anyhow::Result<Option<Value>> {
    let (from, to) = (
        folder.join(&output.from),
        folder.join(RESULTS).join(&output.name),
    );
    if from.exists() {
        fs::rename(&from, &to).map_err(Error::io(&to))?;
    }
    let Some(shows) = output.shows.filter(|_| to.exists()) else {
        return Ok(None);
    };
    let mut result =
        json!({ "kind": "picture", "url": format!("/v1/jobs/{id}/files/{}", output.name) });
    let mut add = |name: &str, value: Value| {
        if !value.is_null() {
            result[name] = value;
        }
    };
    add("target", json!(shows.target));
    add("strength", json!(shows.strength));
    add("caption", caption_of(&to));
    Ok(Some(result))
}

/// The caption of B with which a picture was made.
fn caption_of(path: &Path) -> Value {
    recipe_in(path).map_or(Value::Null, |mut recipe| recipe["b"]["caption"].take())
}

/// Copies the learned difference into the library.
fn keep_difference(store: &Store, id: &str, folder: &Path) -> anyhow::Result<Value> {
    let Ok(job) = store.get(id) else {
        return Ok(Value::Null);
    };
    let request: Request = serde_json::from_value(job.stored.request)?;
    let inputs = folder.join(INPUTS);
    let picture = |stem: &str| {
        let entries = fs::read_dir(&inputs).into_iter().flatten().flatten();
        let mut paths = entries.map(|entry| entry.path());
        paths.find(|path| path.file_stem().is_some_and(|found| found == stem))
    };
    let pair = picture("a1").zip(picture("a1-prime"));
    let file = folder.join(RESULTS).join(DIFFERENCE);
    let name = differences::add(store, request.name.as_deref(), &file, request.model(), pair)?;
    Ok(json!({
        "kind": "difference", "name": name, "url": differences::address(&name),
    }))
}
