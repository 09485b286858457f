//! `dinv eval worker`: the process that makes pictures for a run. A separate process holds the memory
//! of only one method, and if it is killed, the run continues.

use std::io::{self, BufRead};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Instant;

use anyhow::Context;
use clap::Args;
use difference_inversion::util::progress::Progress;
use dinv_eval::suite::Suite;
use dinv_eval::{Folder, Measures, Session, Status};
use serde::{Deserialize, Serialize};

use super::super::exit::Exit;
use super::super::fetch::{Fetcher, Needs};
use super::super::terminal;
use super::super::watch::Watcher;
use super::setup::{self, Job};

/// Solve the analogies named on stdin, after a line that says how
#[derive(Debug, Args)]
pub(super) struct WorkerArgs {}

/// The answers of a worker, one line of JSON each.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Answer {
    /// A note for the user.
    Notice(String),
    /// An analogy ended.
    Ended {
        name: String,
        /// The worker's time for it, including measuring.
        seconds: f64,
        failed: Option<String>,
    },
}

/// Whether the worker is working, so that a run should be waiting for it.
static AT_WORK: AtomicBool = AtomicBool::new(true);

/// The lines of stdin, read by a separate thread. If they end while the worker is working, the run that started it
/// has ended, and the worker exits too.
fn lines_of_run() -> anyhow::Result<Receiver<String>> {
    let (sender, receiver) = mpsc::channel();
    thread::Builder::new()
        .name("stdin".to_owned())
        .spawn(move || {
            let lines = io::stdin().lock().lines();
            for line in lines.map_while(Result::ok) {
                AT_WORK.store(true, Ordering::SeqCst);
                if sender.send(line).is_err() {
                    return;
                }
            }
            if AT_WORK.load(Ordering::SeqCst) {
                leave();
            }
        })?;
    Ok(receiver)
}

#[expect(
    clippy::exit,
    reason = "a step may take minutes, which nobody waits for"
)]
fn leave() {
    std::process::exit(Exit::Failed.code().into());
}

/// Answers until there are no more names.
pub(super) fn run(_: &WorkerArgs) -> anyhow::Result<()> {
    let lines = lines_of_run()?;
    let job = lines.recv().context("no job was given")?;
    let job: Job = serde_json::from_str(&job).context("the job cannot be read")?;
    let suite = Suite::open(&job.suite)?;

    let mut watcher = Watcher::new(true);
    let mut fetcher = Fetcher::new(&mut watcher, true)?;
    let model = fetcher.model(&job.models, Needs::default())?;
    let variants = std::slice::from_ref(&job.variant);
    let paths = setup::model_paths(&mut fetcher, &job.models, &job.further, model, variants)?;
    let models = setup::models(paths, &job.models, job.recommended.clone())?;
    let device = job.models.device()?;
    // Before the networks of metrics, which then reuse a model that the method has opened.
    let method = dinv_eval::build(&job.variant, &models)?;
    let session = Session {
        made_with: job.made_with.clone(),
        measures: Measures::open(&job.measures, &models, &device)?,
        measured_with: job.measured_with.clone(),
        folder: Folder::at(&job.output),
        seed: job.seed,
    };
    let mut observe = |progress: &Progress| {
        if let Progress::Notice { message: notice } = progress {
            let _ = answer(&Answer::Notice(notice.clone()));
        }
        ControlFlow::Continue(())
    };
    for name in lines {
        let entry = suite.entries.iter().find(|entry| entry.name == name);
        let entry = entry.with_context(|| format!("there is no analogy `{name}`"))?;
        let started = Instant::now();
        let result = session.solve(&job.variant.name, &*method, entry, &mut observe)?;
        AT_WORK.store(false, Ordering::SeqCst);
        answer(&Answer::Ended {
            name,
            seconds: started.elapsed().as_secs_f64(),
            failed: match result.status {
                Status::Done => None,
                Status::Failed(reason) => Some(reason),
            },
        })?;
    }
    Ok(())
}

fn answer(answer: &Answer) -> anyhow::Result<()> {
    terminal::line(serde_json::to_string(answer)?)
}
