//! All jobs: in memory, and each in a folder of its own.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::http::StatusCode;
use difference_inversion::Error;
use difference_inversion::util::files::{self, write_atomically};
use serde_json::Value;
use tokio::sync::watch;

use crate::cli::signals;

use super::job::{Job, Kind, Lane, Loss, State, Stored, now};
use super::problem::{Answer, Problem};

/// The stored part of a job.
const JOB: &str = "job.json";
/// Its losses, one per line.
const LOSSES: &str = "losses.jsonl";

/// The running command.
pub(crate) struct Running {
    pub(crate) child: Arc<Mutex<Child>>,
    /// Closing it asks the command to stop.
    pub(crate) stdin: Option<ChildStdin>,
}

impl Running {
    fn kill(&self) {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = child.kill(); // or it has ended
    }
}

/// All jobs.
#[derive(Default)]
struct Jobs {
    jobs: BTreeMap<String, Job>,
    last: u64,
    /// The running commands, by their jobs.
    running: BTreeMap<String, Running>,
    /// The process that waits for a command with its models open.
    process: Option<u32>,
}

/// The jobs and their folder.
pub(crate) struct Store {
    pub(crate) folder: PathBuf,
    jobs: Mutex<Jobs>,
    /// Signals that there is work.
    wake: Condvar,
    /// Signals that there is something to show.
    changes: watch::Sender<u64>,
}

impl Store {
    /// Reads a folder. A job that was running is queued again, before the others.
    pub(crate) fn open(folder: &Path) -> anyhow::Result<Self> {
        let store = Self {
            folder: folder.to_owned(),
            jobs: Mutex::default(),
            wake: Condvar::new(),
            changes: watch::Sender::new(0),
        };
        for folder in [store.jobs_folder(), store.differences_folder()] {
            fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
            files::sweep(&folder);
        }
        let folder = store.jobs_folder();
        let entries = fs::read_dir(&folder).map_err(Error::io(&folder))?;
        for path in entries.flatten().map(|entry| entry.path()) {
            files::sweep(&path);
            let Ok(text) = fs::read(path.join(JOB)) else {
                continue; // not one of ours
            };
            let read = serde_json::from_slice::<Stored>(&text);
            let mut stored =
                read.map_err(|error| Error::invalid_file(path.join(JOB), error.to_string()))?;
            if stored.state == State::Running {
                stored.state = State::Queued;
                stored.rank = u64::MAX;
            }
            if stored.is_waited_for && !stored.state.is_final() {
                stored.state = State::Cancelled; // its client is gone
                stored.finished = Some(now());
            }
            let losses = fs::read_to_string(path.join(LOSSES)).unwrap_or_default();
            // A killed server leaves at most one partial line.
            let losses = losses
                .lines()
                .filter_map(|line| serde_json::from_str(line).ok());
            let mut jobs = store.lock();
            jobs.last = jobs
                .last
                .max(u64::from_str_radix(&stored.id, 16).unwrap_or(0));
            let job = Job::new(stored, losses.collect());
            jobs.jobs.insert(job.stored.id.clone(), job);
        }
        Ok(store)
    }

    /// The folder of jobs.
    pub(crate) fn jobs_folder(&self) -> PathBuf {
        self.folder.join("jobs")
    }

    /// The folder of differences.
    pub(crate) fn differences_folder(&self) -> PathBuf {
        self.folder.join("differences")
    }

    /// The folder of a job.
    pub(crate) fn job_folder(&self, id: &str) -> PathBuf {
        self.jobs_folder().join(id)
    }

    fn lock(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A number for a new job, derived from the time so that it is never used twice.
    pub(crate) fn new_id(&self) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(0));
        let mut jobs = self.lock();
        jobs.last = now.max(jobs.last + 1);
        format!("{:011x}", jobs.last)
    }

    /// Checks that there is room for another job in the queue.
    pub(crate) fn check_room(&self, most: usize) -> Answer<()> {
        if self.lock().waiting().count() < most {
            return Ok(());
        }
        let message = format!("the queue is full: {most} jobs wait");
        Err(Problem::new(StatusCode::TOO_MANY_REQUESTS, message)
            .hint("wait until one of them is done, or cancel one"))
    }

    /// Adds a job whose files are in its folder.
    pub(crate) fn add(&self, stored: Stored, most: usize) -> Answer<Value> {
        self.check_room(most)?;
        let id = stored.id.clone();
        self.save(&stored)?;
        self.lock()
            .jobs
            .insert(id.clone(), Job::new(stored, Vec::new()));
        self.tell();
        self.view(&id)
    }

    /// The job with this idempotency key.
    pub(crate) fn with_key(&self, key: &str) -> Option<Value> {
        let jobs = self.lock();
        let found = jobs
            .jobs
            .values()
            .find(|job| job.stored.key.as_deref() == Some(key))?;
        Some(found.view(jobs.position(&found.stored.id), true))
    }

    /// Saves the state of a job.
    fn save(&self, stored: &Stored) -> anyhow::Result<()> {
        let path = self.job_folder(&stored.id).join(JOB);
        Ok(write_atomically(
            &path,
            &serde_json::to_vec_pretty(stored)?,
        )?)
    }

    /// Wakes the worker and all watchers.
    fn tell(&self) {
        self.wake.notify_all();
        self.changes.send_modify(|count| *count += 1);
    }

    /// The counter of changes to any job.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// The newest jobs of these kinds, at most `limit` and the running ones, newest first; and the number of all such.
    pub(crate) fn newest(&self, limit: usize, kinds: &[Kind]) -> (Vec<Value>, usize) {
        let jobs = self.lock();
        let lanes = Lane::ALL.into_iter();
        let waiting = lanes.flat_map(|lane| jobs.waiting_in(lane).zip(1..));
        let positions: HashMap<&String, usize> = waiting.collect();
        let wanted = jobs.jobs.iter().rev();
        let wanted = wanted.filter(|(_, job)| kinds.contains(&job.stored.kind));
        let count = wanted.clone().count();
        let newest = wanted.enumerate();
        let shown = newest
            .filter(|(number, (_, job))| *number < limit || job.stored.state == State::Running);
        let shown = shown.map(|(_, (id, job))| job.view(positions.get(id).copied(), true));
        (shown.collect(), count)
    }

    /// A job.
    pub(crate) fn get(&self, id: &str) -> Answer<Job> {
        let job = self.lock().jobs.get(id).cloned();
        job.ok_or_else(|| Problem::not_found("job"))
    }

    /// The state of a job.
    pub(crate) fn state(&self, id: &str) -> Answer<State> {
        let jobs = self.lock();
        let job = jobs.jobs.get(id).ok_or_else(|| Problem::not_found("job"))?;
        Ok(job.stored.state)
    }

    /// A job as the interface shows it.
    pub(crate) fn view(&self, id: &str) -> Answer<Value> {
        let jobs = self.lock();
        let job = jobs.jobs.get(id).ok_or_else(|| Problem::not_found("job"))?;
        Ok(job.view(jobs.position(id), true))
    }

    /// The changes of a job since an event: the job if it changed, its losses, and whether more will come.
    pub(crate) fn since(&self, id: &str, event: u64) -> Option<Since> {
        let jobs = self.lock();
        let job = jobs.jobs.get(id)?;
        // An unknown number is from before a crash.
        let event = if event > job.stored.events { 0 } else { event };
        let losses = job.losses.iter().filter(|loss| loss.event > event);
        Some(Since {
            job: job.view(jobs.position(id), false),
            event: job.stored.events,
            losses: losses.copied().collect(),
            preview: (job.preview.clone())
                .filter(|(number, _)| *number > event && job.stored.state == State::Running),
            is_final: job.stored.state.is_final(),
        })
    }

    /// Changes a running job without saving it.
    pub(crate) fn update(&self, id: &str, change: impl FnOnce(&mut Job)) {
        if let Some(job) = self.lock().jobs.get_mut(id) {
            change(job);
        }
        self.tell();
    }

    /// Changes a job and saves it.
    pub(crate) fn write(&self, id: &str, change: impl FnOnce(&mut Job)) -> anyhow::Result<()> {
        let mut jobs = self.lock();
        let saved = match jobs.jobs.get_mut(id) {
            Some(job) => {
                change(job);
                job.changed();
                self.save(&job.stored)
            }
            None => Ok(()),
        };
        drop(jobs);
        self.tell();
        saved
    }

    /// A file to which the losses of a job are appended.
    pub(crate) fn losses(&self, id: &str) -> anyhow::Result<File> {
        let path = self.job_folder(id).join(LOSSES);
        let mut file = File::options().create(true).append(true).open(&path)?;
        file.write_all(b"\n")?; // ends a partial line of a killed server
        Ok(file)
    }

    /// Waits for a job of a lane and begins it, calling `idle` now and then; `None` once a stop is requested.
    pub(crate) fn next(&self, lane: Lane, mut idle: impl FnMut()) -> Option<String> {
        loop {
            idle();
            let mut jobs = self.lock();
            if signals::stopping() {
                return None;
            }
            let next = jobs.waiting_in(lane).next().cloned();
            if let Some(id) = next {
                let job = jobs.jobs.get_mut(&id)?;
                job.stored.state = State::Running;
                job.stored.started.get_or_insert_with(now);
                job.changed();
                let saved = self.save(&job.stored);
                if let Err(error) = saved {
                    crate::cli::terminal::message(format_args!("error: job {id}: {error:#}"));
                }
                drop(jobs);
                self.tell();
                return Some(id);
            }
            let waited = self.wake.wait_timeout(jobs, Duration::from_millis(100));
            drop(waited);
        }
    }

    /// Records the running command, so that it can be stopped; stops it now if that was already requested.
    pub(crate) fn set_running(&self, id: &str, mut running: Running) {
        let mut jobs = self.lock();
        let cancels = jobs.jobs.get(id).map_or(0, |job| job.cancels);
        if signals::stopping() || cancels > 0 {
            running.stdin = None;
        }
        if cancels > 1 {
            running.kill();
        }
        jobs.running.insert(id.to_owned(), running);
    }

    /// Records that a job runs no command; returns the one that it ran.
    pub(crate) fn set_idle(&self, id: &str) -> Option<Running> {
        self.lock().running.remove(id)
    }

    /// Records the process that waits for a command with its models open.
    pub(crate) fn set_waiting(&self, process: Option<u32>) {
        self.lock().process = process;
    }

    /// The process that waits for a command with its models open.
    pub(crate) fn waiting_process(&self) -> Option<u32> {
        self.lock().process
    }

    /// Asks the running commands to stop at their next steps.
    pub(crate) fn stop_commands(&self) {
        let mut jobs = self.lock();
        jobs.running
            .values_mut()
            .for_each(|running| running.stdin = None);
    }

    /// The numbers of running and waiting jobs.
    pub(crate) fn unfinished(&self) -> (usize, usize) {
        let jobs = self.lock();
        let count = |state| {
            jobs.jobs
                .values()
                .filter(|job| job.stored.state == state)
                .count()
        };
        (count(State::Running), count(State::Queued))
    }

    /// Cancels a job: a waiting one at once, a running one at its next step. A second call does not wait for the step.
    pub(crate) fn cancel(&self, id: &str) -> Answer<Value> {
        let mut jobs = self.lock();
        let Jobs {
            jobs: all, running, ..
        } = &mut *jobs;
        let job = all.get_mut(id).ok_or_else(|| Problem::not_found("job"))?;
        match job.stored.state {
            State::Queued => {
                let mut stored = job.stored.clone();
                stored.state = State::Cancelled;
                stored.finished = Some(now());
                self.save(&stored)?; // first, so that a full disk changes nothing
                job.stored = stored;
                job.changed();
            }
            State::Running => {
                job.cancels += 1;
                job.changed();
                if let Some(running) = running.get_mut(id) {
                    running.stdin = None;
                    if job.cancels > 1 {
                        running.kill();
                    }
                }
            }
            _ => return Err(Problem::conflict("the job is over")),
        }
        drop(jobs);
        self.tell();
        self.view(id)
    }

    /// Lets a waiting job be the next.
    pub(crate) fn put_first(&self, id: &str) -> Answer<Value> {
        let mut jobs = self.lock();
        let largest = jobs.waiting().filter_map(|id| jobs.jobs.get(id));
        let largest = largest.map(|job| job.stored.rank).max().unwrap_or(0);
        let job = jobs
            .jobs
            .get_mut(id)
            .ok_or_else(|| Problem::not_found("job"))?;
        if job.stored.state != State::Queued {
            return Err(Problem::conflict("the job does not wait"));
        }
        let mut stored = job.stored.clone();
        stored.rank = largest.saturating_add(1);
        self.save(&stored)?;
        job.stored = stored;
        job.changed();
        drop(jobs);
        self.tell();
        self.view(id)
    }

    /// Removes a job with its files.
    pub(crate) fn remove(&self, id: &str) -> Answer<()> {
        let mut jobs = self.lock();
        let job = jobs.jobs.get(id).ok_or_else(|| Problem::not_found("job"))?;
        if job.stored.state == State::Running {
            return Err(Problem::conflict("the job is running").hint("cancel it first"));
        }
        let folder = self.job_folder(id);
        // A folder without this file is not a job.
        fs::remove_file(folder.join(JOB)).map_err(Error::io(folder.join(JOB)))?;
        jobs.jobs.remove(id);
        drop(jobs);
        self.tell();
        fs::remove_dir_all(&folder).map_err(Error::io(&folder))?;
        Ok(())
    }
}

/// The changes of a job since an event.
pub(crate) struct Since {
    pub(crate) job: Value,
    /// The number of its last event.
    pub(crate) event: u64,
    pub(crate) losses: Vec<Loss>,
    /// The last preview, a data URL, and the number of its event.
    pub(crate) preview: Option<(u64, Arc<str>)>,
    pub(crate) is_final: bool,
}

impl Jobs {
    /// The waiting jobs, in order.
    fn waiting(&self) -> impl Iterator<Item = &String> {
        let all = self.jobs.iter();
        let waiting = all.filter(|(_, job)| job.stored.state == State::Queued);
        let mut waiting: Vec<_> = waiting.collect();
        waiting.sort_by_key(|(_, job)| Reverse(job.stored.rank)); // stable: then by age
        waiting.into_iter().map(|(id, _)| id)
    }

    /// The waiting jobs of a lane, in order.
    fn waiting_in(&self, lane: Lane) -> impl Iterator<Item = &String> {
        self.waiting().filter(move |id| {
            let job = self.jobs.get(*id);
            job.is_some_and(|job| job.stored.kind.lane() == lane)
        })
    }

    /// The place in the queue of its lane, from 1.
    fn position(&self, id: &str) -> Option<usize> {
        let job = self.jobs.get(id)?;
        if job.stored.state != State::Queued {
            return None; // most jobs are over
        }
        let mut waiting = self.waiting_in(job.stored.kind.lane());
        Some(waiting.position(|waiting| waiting == id)? + 1)
    }
}
