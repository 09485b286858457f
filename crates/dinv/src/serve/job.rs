//! The state of a job.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// The number of points of the loss that a job shows.
const SHOWN_LOSSES: usize = 200;

/// The kind of job: one of the program's commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    Analogy,
    Learn,
    Apply,
    Caption,
    Generate,
    Download,
}

/// Jobs of the same lane run one after another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lane {
    /// Jobs that compute.
    Computing,
    Downloads,
}

impl Lane {
    pub(crate) const ALL: [Self; 2] = [Self::Computing, Self::Downloads];
}

impl Kind {
    /// Its lane.
    pub(crate) fn lane(self) -> Lane {
        match self {
            Self::Download => Lane::Downloads,
            _ => Lane::Computing,
        }
    }

    pub(crate) const ALL: [Self; 6] = [
        Self::Analogy,
        Self::Learn,
        Self::Apply,
        Self::Caption,
        Self::Generate,
        Self::Download,
    ];

    /// Its name in requests.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Analogy => "analogy",
            Self::Learn => "learn",
            Self::Apply => "apply",
            Self::Caption => "caption",
            Self::Generate => "generate",
            Self::Download => "download",
        }
    }

    /// The command that does it.
    pub(crate) fn words(self) -> &'static [&'static str] {
        match self {
            Self::Analogy => &["analogy"],
            Self::Learn => &["learn"],
            Self::Apply => &["apply"],
            Self::Caption => &["caption"],
            Self::Generate => &["generate"],
            Self::Download => &["models", "pull"],
        }
    }
}

/// The state of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum State {
    Queued,
    Running,
    Done,
    Failed,
    Cancelled,
}

impl State {
    /// Its name for people.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether it is final.
    pub(crate) fn is_final(self) -> bool {
        !matches!(self, Self::Queued | Self::Running)
    }
}

/// One command of a job. Its paths are relative to the job's folder, where it runs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Run {
    /// The arguments of the program, without those that only a server needs.
    pub(crate) arguments: Vec<String>,
    /// Its output files, with their names in `results`.
    pub(crate) outputs: Vec<Output>,
    /// The checkpoint that an interrupted run leaves.
    pub(crate) checkpoint: Option<PathBuf>,
    /// The claims it holds while it writes (`util::files::Claim`).
    pub(crate) claims: Vec<PathBuf>,
}

impl Run {
    /// Whether it is a command that draws a picture.
    pub(crate) fn draws(&self) -> bool {
        let drawing = ["analogy", "apply", "generate"];
        (self.arguments.first()).is_some_and(|command| drawing.contains(&command.as_str()))
    }
}

/// An output file of a command.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Output {
    pub(crate) from: PathBuf,
    pub(crate) name: String,
    /// `None` for a file that accompanies the others.
    pub(crate) shows: Option<Shows>,
}

/// The picture that a result belongs to.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Shows {
    pub(crate) target: Option<usize>,
    pub(crate) strength: Option<f64>,
}

/// The part of a job that is stored in its folder.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Stored {
    pub(crate) id: String,
    pub(crate) kind: Kind,
    pub(crate) state: State,
    pub(crate) created: String,
    pub(crate) started: Option<String>,
    pub(crate) finished: Option<String>,
    /// As posted, with addresses for pictures.
    pub(crate) request: Value,
    pub(crate) results: Vec<Value>,
    pub(crate) notes: Vec<String>,
    pub(crate) error: Option<Value>,
    /// The runs, as commands that can be typed anywhere.
    #[serde(default)]
    pub(crate) commands: Vec<Vec<String>>,
    pub(crate) runs: Vec<Run>,
    /// The number of runs that are done.
    pub(crate) runs_done: usize,
    /// Whether a client waits for it and nobody else: it ends with that client or the server.
    #[serde(default)]
    pub(crate) is_waited_for: bool,
    /// Among waiting jobs, those with the largest rank are first, then the oldest.
    #[serde(default)]
    pub(crate) rank: u64,
    /// The request's `Idempotency-Key`.
    pub(crate) key: Option<String>,
    /// The number of the last event.
    pub(crate) events: u64,
}

/// The loss of a step, and the number of its event.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Loss {
    pub(crate) event: u64,
    pub(crate) step: usize,
    pub(crate) loss: f32,
}

/// The progress of the current stage.
#[derive(Debug, Clone)]
pub(crate) struct Progress {
    pub(crate) stage: String,
    pub(crate) step: usize,
    pub(crate) of: usize,
    /// When the stage began, and at which step.
    pub(crate) since: (Instant, usize),
}

impl Progress {
    fn view(&self) -> Value {
        let mut view = json!({ "stage": self.stage, "step": self.step, "of": self.of });
        let (since, first) = self.since;
        if self.step > first && self.of >= self.step {
            #[expect(clippy::cast_precision_loss, reason = "an estimate")]
            let left = (self.of - self.step) as f64 / (self.step - first) as f64;
            let seconds = since.elapsed().as_secs_f64() * left;
            view["seconds_left"] = json!((seconds * 10.0).round() / 10.0);
        }
        view
    }
}

/// A job.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub(crate) stored: Stored,
    pub(crate) progress: Option<Progress>,
    pub(crate) losses: Vec<Loss>,
    /// The last preview of the picture that is being drawn, a data URL, and the number of its event.
    pub(crate) preview: Option<(u64, Arc<str>)>,
    /// How many times a stop was requested.
    pub(crate) cancels: u32,
}

impl Job {
    /// Restores a stored job. `losses` are as they were written, in which a resumed run repeats steps.
    pub(crate) fn new(stored: Stored, losses: Vec<Loss>) -> Self {
        let mut job = Self {
            stored,
            progress: None,
            losses: Vec::new(),
            preview: None,
            cancels: 0,
        };
        losses.into_iter().for_each(|loss| job.add(loss));
        job
    }

    /// Counts an event.
    pub(crate) fn changed(&mut self) -> u64 {
        self.stored.events += 1;
        self.stored.events
    }

    /// Adds the loss of a step; replaces those that an interrupted run had beyond it.
    pub(crate) fn add(&mut self, loss: Loss) {
        self.stored.events = self.stored.events.max(loss.event);
        while self
            .losses
            .last()
            .is_some_and(|last| last.step >= loss.step)
        {
            self.losses.pop();
        }
        self.losses.push(loss);
    }

    /// The job as the interface shows it; `position` in the queue counts from 1.
    pub(crate) fn view(&self, position: Option<usize>, with_losses: bool) -> Value {
        let Stored {
            id,
            kind,
            state,
            created,
            started,
            finished,
            request,
            results,
            notes,
            error,
            commands,
            ..
        } = &self.stored;
        let mut view = json!({
            "id": id, "kind": kind, "state": state, "created": created, "request": request,
            "results": results, "notes": notes, "commands": commands,
        });
        let mut add = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                view[name] = value;
            }
        };
        add("position", position.map(|position| json!(position)));
        add("started", started.as_ref().map(|time| json!(time)));
        add("finished", finished.as_ref().map(|time| json!(time)));
        add("error", error.clone());
        let running = *state == State::Running;
        add(
            "stopping",
            (running && self.cancels > 0).then_some(json!(true)),
        );
        let progress = self.progress.as_ref().filter(|_| running);
        add("progress", progress.map(Progress::view));
        if with_losses && !self.losses.is_empty() {
            add("losses", Some(json!(thinned(&self.losses))));
        }
        view
    }
}

/// Evenly spaced points of a loss, including the last.
fn thinned(losses: &[Loss]) -> Vec<(usize, f32)> {
    let stride = losses.len().div_ceil(SHOWN_LOSSES).max(1);
    let shown = losses.iter().rev().step_by(stride);
    let mut shown: Vec<(usize, f32)> = shown.map(|loss| (loss.step, loss.loss)).collect();
    shown.reverse();
    shown
}

/// The current time (RFC 3339).
pub(crate) fn now() -> String {
    time(SystemTime::now())
}

/// A time (RFC 3339).
pub(crate) fn time(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn losses(steps: impl Iterator<Item = usize>) -> Vec<Loss> {
        steps
            .map(|step| Loss {
                event: step as u64,
                step,
                loss: 1.0,
            })
            .collect()
    }

    #[test]
    fn losses_are_thinned_and_keep_the_last() {
        for (count, expected) in [(1, 1), (200, 200), (201, 101), (1000, 200)] {
            let shown = thinned(&losses(1..count + 1));
            assert_eq!(shown.len(), expected, "{count}");
            assert_eq!(shown.last().unwrap().0, count);
        }
    }
}
