//! Workers that end before they are finished.

use std::fs;
use std::process::Child;
use std::time::{Duration, Instant};

use super::super::{Done, entries, signal, start, succeed};
use super::{eval, tables, workplace_with_suite};

/// A run with one worker at a time.
struct Running {
    child: Child,
    killed: Vec<String>,
}

impl Running {
    fn start(folder: &std::path::Path, arguments: &str) -> Self {
        Self {
            child: start(folder, arguments),
            killed: Vec::new(),
        }
    }

    /// Kills its only worker that has not been killed yet, once there is one.
    fn kill_worker(&mut self) {
        let worker = self.worker();
        signal("-KILL", &worker);
        self.killed.push(worker);
    }

    /// Its only worker that has not been killed yet, once there is one.
    fn worker(&self) -> String {
        let id = self.child.id();
        let started = Instant::now();
        loop {
            assert!(
                started.elapsed() < Duration::from_secs(60),
                "no worker came"
            );
            let tasks = fs::read_dir(format!("/proc/{id}/task"));
            let children = (tasks.into_iter().flatten().flatten())
                .filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
            let children = children.collect::<String>();
            let mut workers = children.split_whitespace().map(str::to_owned);
            if let Some(worker) = workers.find(|worker| !self.killed.contains(worker)) {
                break worker;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn end(self) -> Done {
        self.child.wait_with_output().unwrap().into()
    }
}

#[test]
fn a_worker_that_is_killed_costs_one_analogy() {
    let work = workplace_with_suite();
    let arguments = eval("--methods difference-inversion -o out");
    let mut running = Running::start(work.path(), &arguments);
    running.kill_worker();
    let done = running.end();
    assert_eq!(done.code, Some(1), "{}", done.stderr);
    let tables = tables(work.path());
    for (text, expected) in [
        (&done.stderr, "error: 1 analogy failed"),
        (&tables, "ended before it was done: signal: 9"),
        (&tables, "| difference-inversion | nothing | 2 | 1 |"),
    ] {
        assert!(text.contains(expected), "no `{expected}` in {text}");
    }
    succeed(work.path(), &arguments);
}

#[test]
fn a_method_whose_workers_keep_ending_does_not_keep_others_from_running() {
    let work = workplace_with_suite();
    let endless = "[endless]\nmethod = 'difference-inversion'\nsteps = 1000000\n";
    fs::write(work.path().join("v.toml"), endless).unwrap();
    let arguments = eval("--variants v.toml --methods endless,sdedit -o out");
    let mut running = Running::start(work.path(), &arguments);
    for _ in 0..3 {
        running.kill_worker();
    }
    let done = running.end();
    assert_eq!(done.code, Some(1), "{}", done.stderr);
    let tables = tables(work.path());
    for (text, expected) in [
        (
            &done.stderr,
            "error: 3 analogies failed, and `endless` could not continue",
        ),
        (&done.stderr, "hint: leave it out with `--methods`"),
        (&tables, "| endless | nothing | 0 | 3 |"),
        (&tables, "| sdedit | captions | 3 | 0 |"),
    ] {
        assert!(text.contains(expected), "no `{expected}` in {text}");
    }
    let out = work.path().join("out");
    assert!(entries(&out).contains(&"report.html".to_owned()));
}

#[test]
fn a_worker_ends_with_its_run_however_that_ends() {
    let work = workplace_with_suite();
    let endless = "[endless]\nmethod = 'difference-inversion'\nsteps = 100000000\n";
    fs::write(work.path().join("v.toml"), endless).unwrap();
    let arguments = eval("--variants v.toml --methods endless -o out");
    let mut running = Running::start(work.path(), &arguments);
    let worker = running.worker();
    std::thread::sleep(Duration::from_secs(1)); // it is at work, or about to be
    running.child.kill().unwrap();
    let killed = Instant::now();
    running.child.wait().unwrap();
    // The process may remain as a zombie.
    let lives = || {
        let status = fs::read_to_string(format!("/proc/{worker}/stat"));
        status.is_ok_and(|status| !status.contains(") Z "))
    };
    while lives() {
        assert!(
            killed.elapsed() < Duration::from_secs(10),
            "the worker is still running"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}
