//! The work of a run: workers apply every method to every analogy.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use dinv_eval::suite::Entry;
use dinv_eval::{Folder, ResultRecord, RunRecord, Status, Variant};

use super::super::terminal::Failure;
use super::super::watch;
use super::jobs::{self, ENOUGH, Event};
use super::progress::RunProgress;
use super::setup::Job;
use super::worker::Answer;

/// A run with everything it needs.
pub(super) struct Prepared {
    pub(super) job: Job,
    /// What the whole run is made with.
    pub(super) record: RunRecord,
    pub(super) folder: Folder,
    pub(super) entries: Vec<Entry>,
    /// The methods, each with the reason why it is skipped, if it is.
    pub(super) methods: Vec<(Variant, Option<String>)>,
}

/// The failures of a run. The same command retries them all.
#[derive(Debug, Default)]
pub(super) struct Failures {
    /// Analogies that failed.
    analogies: usize,
    /// Methods whose workers kept ending.
    given_up: BTreeSet<String>,
}

impl Failures {
    /// The failure of the run, if anything went wrong.
    pub(super) fn told(&self) -> Result<(), Failure> {
        let failed = match self.analogies {
            0 => return Ok(()), // giving up on a method also takes failures
            1 => "1 analogy failed".to_owned(),
            count => format!("{count} analogies failed"),
        };
        if self.given_up.is_empty() {
            let hint = "the messages above say why; the same command tries these again";
            return Err(Failure::new(failed).hint(hint));
        }
        let names: Vec<String> = (self.given_up.iter())
            .map(|name| format!("`{name}`"))
            .collect();
        let message = format!(
            "{failed}, and {} could not continue: {ENOUGH} workers in a row ended before they were done",
            names.join(", ")
        );
        Err(Failure::new(message).hint(
            "leave it out with `--methods`, or save memory with `--memory low` and fewer `--jobs`; \
             the same command continues",
        ))
    }
}

/// Runs every method on what it has not solved yet, each for at most `time`; returns the failures.
pub(super) fn work(
    prepared: &Prepared,
    jobs: usize,
    time: Option<Duration>,
    progress: &mut RunProgress,
) -> anyhow::Result<Failures> {
    let Prepared {
        folder, entries, ..
    } = prepared;
    let measured_with = &prepared.job.measured_with;
    let mut plans = Vec::new();
    for (variant, skipped) in &prepared.methods {
        if let Some(reason) = skipped {
            progress.say(&format!("{} is skipped: {reason}", variant.name));
            continue;
        }
        let (mut left, mut seconds) = (Vec::new(), Vec::new());
        for entry in entries {
            let finished = folder.finished(&variant.name, &entry.name);
            seconds.extend(finished.as_ref().map(|result| result.seconds));
            // Finished results may still lack scores of new networks.
            let done = |result: ResultRecord| result.not_measured_with(measured_with).is_empty();
            if !finished.is_some_and(done) {
                left.push(entry.name.clone());
            }
        }
        progress.plan(&variant.name, left.len(), variant.cost(), &seconds);
        plans.push((variant, left));
    }
    progress.announce();
    let mut failures = Failures::default();
    for (variant, left) in plans {
        if left.is_empty() {
            continue;
        }
        let mut records = prepared.record.methods.iter();
        let method = records.find(|method| method.name == variant.name);
        let job = Job {
            made_with: method.map_or_else(BTreeMap::new, |one| prepared.record.made_with(one)),
            variant: variant.clone(),
            ..prepared.job.clone()
        };
        let workers = jobs.min(left.len());
        let deadline = time.map(|time| Instant::now() + time);
        progress.begin(&variant.name);
        jobs::share(&job, &left, workers, deadline, |event| {
            take(prepared, &variant.name, event, progress, &mut failures)
        })?;
        if watch::stopping() {
            let failure = Failure::interrupted("stopped; what is finished is kept");
            return Err(failure.hint("the same command continues").into());
        }
        let late = deadline.is_some_and(|deadline| Instant::now() >= deadline);
        progress.leave(&variant.name, late);
    }
    Ok(failures)
}

/// Handles a worker's report. An analogy that ended a worker has failed, unless its B′ was already
/// finished and only had to be measured again.
fn take(
    prepared: &Prepared,
    method: &str,
    event: Event,
    progress: &mut RunProgress,
    failures: &mut Failures,
) -> anyhow::Result<()> {
    let (folder, job) = (&prepared.folder, &prepared.job);
    match event {
        Event::Answered(Answer::Notice(notice)) => progress.notice(notice),
        Event::Answered(Answer::Ended {
            name,
            seconds,
            failed,
        }) => {
            failures.analogies += usize::from(failed.is_some());
            progress.ended(method, &name, seconds, failed.as_deref());
        }
        Event::Died { name, how } => {
            let reason = format!("the process that worked on it ended before it was done: {how}");
            let mut entries = prepared.entries.iter();
            let unfinished = entries
                .find(|entry| entry.name == name && folder.finished(method, &entry.name).is_none());
            if let Some(entry) = unfinished {
                let mut result = ResultRecord::begun(entry, job.seed, &job.measured_with);
                result.status = Status::Failed(reason.clone());
                folder.keep(method, &result, None)?;
            }
            failures.analogies += 1;
            progress.ended(method, &name, 0.0, Some(&reason));
        }
        Event::GaveUp => {
            failures.given_up.insert(method.to_owned());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use difference_inversion::method::generate_config::AnalogyConfig;
    use dinv_eval::{MeasurePaths, SuiteRecord};
    use serde_json::Value;

    use super::super::super::flags::ModelSettings;
    use super::super::setup::Further;
    use super::*;

    fn entry(name: &str) -> Entry {
        Entry {
            name: name.to_owned(),
            kind: "sky".to_owned(),
            pictures: Default::default(),
            b_prime: None,
            captions: None,
            instruction: None,
            attributes: None,
        }
    }

    #[test]
    fn a_worker_that_ends_leaves_what_was_finished_before() {
        let place = tempfile::tempdir().unwrap();
        let folder = Folder::at(place.path());
        let measured_with = BTreeMap::from([("judge".to_owned(), "old".to_owned())]);
        let mut done = ResultRecord::begun(&entry("done"), 0, &measured_with);
        done.seconds = 7.0;
        let picture = image::RgbImage::new(8, 8);
        folder.keep("sdedit", &done, Some(&picture)).unwrap();
        let suite = SuiteRecord {
            name: "x".to_owned(),
            version: Value::Null,
            identity: "same".to_owned(),
            analogies: 2,
        };
        let prepared = Prepared {
            record: RunRecord::new(suite, 0, "cpu, f32".to_owned()),
            job: Job {
                suite: PathBuf::new(),
                output: place.path().to_owned(),
                seed: 0,
                models: ModelSettings::default(),
                further: Further::default(),
                recommended: AnalogyConfig::default(),
                measures: MeasurePaths::default(),
                measured_with: BTreeMap::new(),
                made_with: BTreeMap::new(),
                variant: Variant::plain("sdedit"),
            },
            folder: folder.clone(),
            entries: ["done", "new"].map(entry).to_vec(),
            methods: Vec::new(),
        };
        let (mut progress, mut failures) = (RunProgress::new(true, 1, None), Failures::default());
        for name in ["done", "new"] {
            let event = Event::Died {
                name: name.to_owned(),
                how: "signal: 9".to_owned(),
            };
            take(&prepared, "sdedit", event, &mut progress, &mut failures).unwrap();
        }
        assert_eq!(folder.result("sdedit", "done"), Some(done));
        let new = folder.result("sdedit", "new").unwrap();
        assert!(matches!(new.status, Status::Failed(reason) if reason.contains("signal: 9")));
        let message = failures.told().unwrap_err().to_string();
        assert_eq!(message, "2 analogies failed");
    }
}
