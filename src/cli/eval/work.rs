//! The work of a run: every method on every analogy, by workers.

use std::time::{Duration, Instant};

use difference_inversion::eval::suite::Entry;
use difference_inversion::eval::{Folder, ResultRecord, RunRecord, Status, Variant};

use super::super::report::Failure;
use super::super::watch;
use super::jobs::{self, Event};
use super::progress::RunProgress;
use super::setup::Job;
use super::worker::Answer;

/// A run with everything it needs.
pub(super) struct Prepared {
    pub(super) job: Job,
    pub(super) folder: Folder,
    pub(super) entries: Vec<Entry>,
    pub(super) variants: Vec<Variant>,
    pub(super) record: RunRecord,
}

/// Has every method solve what it has not solved yet.
pub(super) fn work(
    prepared: &Prepared,
    jobs: usize,
    time: Option<Duration>,
    progress: &mut RunProgress,
) -> anyhow::Result<()> {
    let Prepared {
        folder, entries, ..
    } = prepared;
    let mut plans = Vec::new();
    for variant in &prepared.variants {
        let mut records = prepared.record.methods.iter();
        let record = records.find(|record| record.name == variant.name);
        if let Some(reason) = record.and_then(|record| record.skipped.as_ref()) {
            progress.say(&format!("{} is skipped: {reason}", variant.name));
            continue;
        }
        let (mut left, mut seconds) = (Vec::new(), Vec::new());
        for entry in entries {
            match folder.result(&variant.name, &entry.name) {
                Some(result) if result.status == Status::Done => {
                    seconds.push(result.seconds);
                    if result.measured_with != prepared.job.measured_with {
                        left.push(entry.name.clone()); // to be measured again
                    }
                }
                _ => left.push(entry.name.clone()),
            }
        }
        progress.plan(&variant.name, left.len(), &seconds);
        plans.push((variant, left));
    }
    for (variant, left) in plans {
        if left.is_empty() {
            continue;
        }
        let job = Job {
            variant: variant.clone(),
            ..prepared.job.clone()
        };
        let workers = jobs.min(left.len());
        let deadline = time.map(|time| Instant::now() + time);
        progress.begin(&variant.name);
        jobs::share(&job, &left, workers, deadline, |event| {
            take(prepared, &variant.name, event, progress)
        })?;
        if watch::stopping() {
            let failure = Failure::interrupted("stopped; what is finished is kept");
            return Err(failure
                .hint("the same command goes on where it stopped")
                .into());
        }
        progress.leave(&variant.name);
    }
    Ok(())
}

/// Takes what a worker tells; an analogy that ended a worker has failed.
fn take(
    prepared: &Prepared,
    method: &str,
    event: Event,
    progress: &mut RunProgress,
) -> anyhow::Result<()> {
    match event {
        Event::Answered(Answer::Notice(notice)) => progress.notice(notice),
        Event::Answered(Answer::Ended {
            name,
            seconds,
            failed,
        }) => progress.ended(method, &name, seconds, failed.as_deref()),
        Event::Died { name, how } => {
            let reason = format!("the process that worked on it ended before it was done: {how}");
            let entry = prepared.entries.iter().find(|entry| entry.name == name);
            if let Some(entry) = entry {
                let job = &prepared.job;
                let mut result = ResultRecord::begun(entry, job.seed, &job.measured_with);
                result.status = Status::Failed(reason.clone());
                prepared.folder.keep(method, &result, None)?;
            }
            progress.ended(method, &name, 0.0, Some(&reason));
        }
    }
    Ok(())
}
