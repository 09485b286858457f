//! The workers of a run: processes that are given one analogy after another.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Lines, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{env, thread};

use anyhow::Context;

use super::super::terminal::Failure;
use super::super::watch;
use super::setup::Job;
use super::worker::Answer;

/// The variable with the number of threads of a process.
const THREADS: &str = "RAYON_NUM_THREADS";
/// The number of consecutive workers that may end without an answer before no more are started.
pub(super) const ENOUGH: usize = 3;
/// The interval at which a run checks whether it should stop.
const LOOK: Duration = Duration::from_millis(100);

/// What the workers of a run report.
#[derive(Debug)]
pub(super) enum Event {
    /// A worker answered.
    Answered(Answer),
    /// A worker ended during this analogy, in this way.
    Died { name: String, how: String },
    /// [`ENOUGH`] consecutive workers ended this way; no more are started.
    GaveUp,
}

/// Distributes the analogies called `names` among the workers; `on_event` is given their answers. No
/// analogy begins after the deadline.
pub(super) fn share(
    job: &Job,
    names: &[String],
    workers: usize,
    deadline: Option<Instant>,
    mut on_event: impl FnMut(Event) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let queue = Queue {
        names: Mutex::new(names.iter().cloned().collect()),
        deadline,
    };
    let children: Vec<Mutex<Option<Child>>> = (0..workers).map(|_| Mutex::default()).collect();
    let (sender, receiver) = mpsc::channel();
    thread::scope(|scope| {
        let threads: Vec<_> = (children.iter())
            .map(|child| {
                let (queue, sender) = (&queue, sender.clone());
                scope.spawn(move || serve(job, workers, queue, child, &sender))
            })
            .collect();
        drop(sender);
        let mut outcome = Ok(());
        loop {
            match receiver.recv_timeout(LOOK) {
                Ok(event) if outcome.is_ok() => outcome = on_event(event),
                Ok(_) => {}
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {}
            }
            if outcome.is_err() || watch::stopping() {
                locked(&queue.names).clear();
                for child in &children {
                    if let Some(child) = &mut *locked(child) {
                        let _ = child.kill(); // it may have ended by itself
                    }
                }
            }
        }
        for thread in threads {
            let served = thread.join().unwrap_or_else(|_| {
                Err(Failure::new("a thread that waits for a worker has ended").into())
            });
            outcome = outcome.and(served);
        }
        outcome
    })
}

/// Gives one worker after another names from the queue until it is empty.
fn serve(
    job: &Job,
    workers: usize,
    queue: &Queue,
    child: &Mutex<Option<Child>>,
    events: &Sender<Event>,
) -> anyhow::Result<()> {
    let mut worker: Option<Worker> = None;
    let mut deaths = 0;
    while let Some(name) = queue.next() {
        let running = match &mut worker {
            Some(running) => running,
            None => worker.insert(Worker::start(job, workers, child)?),
        };
        if running.work(&name, events)? {
            deaths = 0;
            continue;
        }
        worker = None;
        let ended = locked(child).take().map(|mut child| child.wait());
        if watch::stopping() {
            break;
        }
        let how = match ended {
            Some(Ok(status)) => status.to_string(),
            _ => "unknown".to_owned(),
        };
        deaths += 1;
        let _ = events.send(Event::Died { name, how });
        if deaths == ENOUGH {
            let _ = events.send(Event::GaveUp);
            break;
        }
    }
    drop(worker); // closes its stdin, which ends it
    if let Some(mut child) = locked(child).take() {
        child.wait()?;
    }
    Ok(())
}

/// Analogies that no worker has begun.
struct Queue {
    names: Mutex<VecDeque<String>>,
    deadline: Option<Instant>,
}

impl Queue {
    /// The next analogy, if there is time for it.
    fn next(&self) -> Option<String> {
        let late = self
            .deadline
            .is_some_and(|deadline| Instant::now() >= deadline);
        if late || watch::stopping() {
            None
        } else {
            locked(&self.names).pop_front()
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A worker's ends of its pipes.
struct Worker {
    names: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Worker {
    /// Starts a process that shares the processor with `workers − 1` others.
    fn start(job: &Job, workers: usize, child: &Mutex<Option<Child>>) -> anyhow::Result<Self> {
        let program = env::current_exe().context("cannot find the path of this program")?;
        let mut command = Command::new(program);
        command.args(["eval", "worker"]);
        let threads = rayon::current_num_threads() / workers;
        command.env(THREADS, threads.max(1).to_string());
        let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut started = piped.spawn().context("cannot start a worker")?;
        let pipes = started.stdin.take().zip(started.stdout.take());
        *locked(child) = Some(started);
        let (mut names, answers) = pipes.context("a worker without pipes")?;
        // If the worker has already ended, waiting for it will show that.
        let _ = writeln!(names, "{}", serde_json::to_string(job)?);
        Ok(Self {
            names,
            answers: BufReader::new(answers).lines(),
        })
    }

    /// Solves one analogy; returns false if the worker ended first.
    fn work(&mut self, name: &str, events: &Sender<Event>) -> anyhow::Result<bool> {
        if writeln!(self.names, "{name}").is_err() {
            return Ok(false);
        }
        for line in &mut self.answers {
            let Ok(line) = line else { break };
            let answer: Answer = serde_json::from_str(&line)
                .with_context(|| format!("a worker's answer cannot be read: {line}"))?;
            let ended = matches!(answer, Answer::Ended { .. });
            let _ = events.send(Event::Answered(answer));
            if ended {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_begun_after_the_deadline() {
        let queue = |deadline| Queue {
            names: Mutex::new(VecDeque::from(["000".to_owned()])),
            deadline,
        };
        let now = Instant::now();
        assert_eq!(queue(Some(now)).next(), None);
        let later = now + Duration::from_secs(3600);
        assert_eq!(queue(Some(later)).next().as_deref(), Some("000"));
        let queue = queue(None);
        assert_eq!(queue.next().as_deref(), Some("000"));
        assert_eq!(queue.next(), None);
    }
}
