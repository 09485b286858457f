//! The files for schedulers in integrations/cluster: each starts the program in a way that it understands, and takes the
//! part that the scheduler names.
#![cfg(unix)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use super::{Done, dinv, succeed, workplace};

/// Eight pictures for one difference, as a file of jobs.
fn jobs() -> TempDir {
    let work = workplace();
    let line = |number: u32| {
        format!(
            r#"{{"a": "a.png", "a_prime": "a_prime.png", "b": "b.png", "name": "{number}", "settings": {{"strength": 0.{number}}}}}"#
        )
    };
    let lines: Vec<String> = (1..=8).map(line).collect();
    fs::write(work.path().join("jobs.jsonl"), lines.join("\n")).unwrap();
    work
}

fn file(name: &str) -> PathBuf {
    Path::new(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../integrations/cluster"
    ))
    .join(name)
}

/// Runs a command and expects the plan of this part of eight.
fn plans(work: &TempDir, mut command: Command, part: usize) {
    let common = "batch jobs.jsonl -o made --model model --dtype f16 -q --dry-run --json";
    let expected = succeed(work.path(), &format!("{common} --shard {part}/8")).stdout;
    let whole = succeed(work.path(), common).stdout;
    assert_ne!(expected, whole);
    let done: Done = command.output().unwrap().into();
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert_eq!(done.stdout, expected, "{}", done.stderr);
}

/// The program with the words of a file's command, whose folder and model are those of the workplace.
fn of_words<'a>(
    work: &TempDir,
    words: impl Iterator<Item = &'a str>,
    folder: &str,
    environment: &[(&str, &str)],
) -> Command {
    let mut command = dinv(work.path());
    for word in words {
        let word = word.trim_matches('"').replace(&format!("{folder}/"), "");
        command.arg(if word == "sd15" { "model" } else { &word });
    }
    command
        .args(["--dry-run", "--json"])
        .envs(environment.iter().copied());
    command
}

/// A script with the jobs, the folder and the model, as its first lines say it is called.
fn of_script(work: &TempDir, name: &str) -> Command {
    let mut command = dinv(work.path());
    let mut shell = Command::new("sh");
    shell
        .current_dir(work.path())
        .arg(file(name))
        .args("jobs.jsonl made --model model --dtype f16 --dry-run --json".split(' '))
        .env("DINV", env!("CARGO_BIN_EXE_dinv"));
    for (name, value) in command.env("HF_HUB_OFFLINE", "1").get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    shell
}

#[test]
fn an_array_of_slurm_takes_its_parts() {
    let work = jobs();
    for task in [1, 8] {
        let mut command = of_script(&work, "slurm.sbatch");
        command
            .env("SLURM_ARRAY_TASK_ID", task.to_string())
            .envs([("SLURM_ARRAY_TASK_MIN", "1"), ("SLURM_ARRAY_TASK_MAX", "8")])
            .envs([("SLURM_ARRAY_TASK_COUNT", "8"), ("SLURM_CPUS_ON_NODE", "1")]);
        plans(&work, command, task);
    }
}

#[test]
fn tasks_of_hyperqueue_take_their_parts() {
    let work = jobs();
    let hq = work.path().join("hq");
    let script =
        "#!/bin/sh\nwhile [ \"$1\" != -- ]; do shift; done; shift\nHQ_TASK_ID=3 exec \"$@\"\n";
    fs::write(&hq, script).unwrap();
    fs::set_permissions(&hq, fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = of_script(&work, "hyperqueue.sh");
    let path = std::env::var("PATH").unwrap();
    command.env("PATH", format!("{}:{path}", work.path().display()));
    plans(&work, command, 3);
}

#[test]
fn pods_of_kubernetes_take_their_parts() {
    let work = jobs();
    let text = fs::read_to_string(file("kubernetes.yaml")).unwrap();
    let words = text.split_once("args: [").unwrap().1;
    let words = words.split_once(']').unwrap().0.split(", ");
    let index = [("JOB_COMPLETION_INDEX", "0")];
    plans(&work, of_words(&work, words, "/work", &index), 1);
}

#[test]
fn jobs_of_skypilot_take_their_parts() {
    let work = jobs();
    let text = fs::read_to_string(file("skypilot.yaml")).unwrap();
    let words = text.split_once("~/dinv batch").unwrap().1;
    let words = ["batch"].into_iter().chain(words.split_whitespace());
    let job = [("SKYPILOT_JOB_RANK", "7"), ("SKYPILOT_NUM_JOBS", "8")];
    plans(&work, of_words(&work, words, "/bucket", &job), 8);
}
