//! `dinv batch`: a file of jobs.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::{Done, copy_folder, dinv, run, workplace};

/// A workplace with a folder of two pairs, and three pictures to change.
fn set() -> TempDir {
    let work = workplace();
    let at = |path: &str| work.path().join(path);
    for folder in ["set/one/b", "set/two"] {
        fs::create_dir_all(at(folder)).unwrap();
    }
    for (from, to) in [
        ("a.png", "set/one/a.png"),
        ("a_prime.png", "set/one/a_prime.png"),
        ("b.png", "set/one/b/first.png"),
        ("a.png", "set/one/b/second.png"),
        ("b.png", "set/two/a.png"),
        ("a.png", "set/two/a_prime.png"),
        ("a_prime.png", "set/two/first.png"),
    ] {
        fs::copy(at(from), at(to)).unwrap();
    }
    work
}

fn succeed(work: &TempDir, command: &str) -> Done {
    super::succeed(work.path(), command)
}

/// The jobs of the folder, with captions, so that no captioner is needed.
fn jobs(work: &TempDir) -> Vec<Value> {
    let lines = succeed(work, "batch --from set").stdout;
    let lines = lines.lines().map(|line| {
        let mut line: Value = serde_json::from_str(line).unwrap();
        for (name, caption) in [
            ("caption_a", "day"),
            ("caption_a_prime", "night"),
            ("caption_b", "dusk"),
        ] {
            line[name] = json!(caption);
        }
        line
    });
    lines.collect()
}

fn write(work: &TempDir, jobs: &[Value]) {
    let lines: Vec<String> = jobs.iter().map(ToString::to_string).collect();
    fs::write(work.path().join("set/jobs.jsonl"), lines.join("\n")).unwrap();
}

const QUICK: &str = "--config tiny.toml";

/// How many differences were learned and pictures made.
fn times(made: &Path) -> usize {
    let files = fs::read_dir(made).unwrap().flatten();
    let files = files.filter(|entry| entry.file_name().to_string_lossy().starts_with("times-"));
    let lines = files.map(|entry| fs::read_to_string(entry.path()).unwrap().lines().count());
    lines.sum()
}

/// Files of a folder and its folders, with their bytes, without the times.
fn contents(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            let inside = contents(&path).into_iter();
            all.extend(inside.map(|(file, bytes)| (format!("{name}/{file}"), bytes)));
        } else if !name.starts_with("times-") {
            all.push((name, fs::read(&path).unwrap()));
        }
    }
    all.sort();
    all
}

#[test]
fn a_folder_becomes_jobs_and_the_jobs_pictures() {
    let work = set();
    let jobs = jobs(&work);
    let listed: Vec<_> = jobs
        .iter()
        .map(|job| (job["a"].as_str().unwrap(), job["b"].as_str().unwrap()))
        .collect();
    let expected = [
        ("one/a.png", "one/b/first.png"),
        ("one/a.png", "one/b/second.png"),
        ("two/a.png", "two/first.png"),
    ];
    assert_eq!(listed, expected);
    write(&work, &jobs);
    let batch = format!("batch {QUICK} set/jobs.jsonl -o made");
    let planned = succeed(&work, &format!("{batch} --dry-run"));
    assert_eq!(planned.stdout.lines().count(), 3);
    assert!(
        planned
            .stderr
            .contains("3 jobs: done 0, differences to learn 2, pictures to make 3"),
        "{}",
        planned.stderr
    );
    assert!(
        planned.stderr.contains("after the first results"),
        "{}",
        planned.stderr
    );
    assert!(!work.path().join("made").exists());
    let done = succeed(&work, &batch);
    assert!(
        done.stderr.contains("done: 3 made, 0 kept"),
        "{}",
        done.stderr
    );
    let made = contents(&work.path().join("made"));
    let kinds = |ending: &str| {
        made.iter()
            .filter(|(name, _)| name.ends_with(ending))
            .count()
    };
    assert_eq!(
        (kinds(".png"), kinds(".safetensors"), made.len()),
        (3, 2, 5)
    );

    // The same as by hand.
    succeed(
        &work,
        &format!(
            "learn {QUICK} --a set/one/a.png --a-prime set/one/a_prime.png --caption-a day --caption-a-prime night \
         -o typed.safetensors -q"
        ),
    );
    let typed = fs::read(work.path().join("typed.safetensors")).unwrap();
    assert!(made.iter().any(|(_, bytes)| *bytes == typed));
    succeed(
        &work,
        &format!(
            "apply typed.safetensors {QUICK} --b set/one/b/first.png --caption-b dusk -o typed -q"
        ),
    );
    let pixels = |bytes: &[u8]| image::load_from_memory(bytes).unwrap().into_rgb8();
    let typed = pixels(&fs::read(work.path().join("typed/first.png")).unwrap());
    assert!(
        made.iter()
            .filter(|(name, _)| name == "one-first.png")
            .any(|(_, bytes)| pixels(bytes) == typed)
    );

    // What is done is kept, and what is missing is made again.
    let again = succeed(&work, &batch);
    assert!(
        again.stderr.contains("done: 0 made, 3 kept"),
        "{}",
        again.stderr
    );
    let (name, _) = made
        .iter()
        .find(|(name, _)| name == "one-second.png")
        .unwrap();
    fs::remove_file(work.path().join("made").join(name)).unwrap();
    let planned: Value =
        serde_json::from_str(&succeed(&work, &format!("{batch} --dry-run --json")).stdout).unwrap();
    assert_eq!(
        (
            &planned["done"],
            &planned["differences"],
            &planned["pictures"]
        ),
        (&json!(2), &json!(0), &json!(1))
    );
    assert!(planned["seconds"].as_f64().unwrap() > 0.0);
    succeed(&work, &batch);
    assert!(contents(&work.path().join("made")) == made);
}

/// What `dinv apply` says of its captions, a batch says of those of all lines.
#[test]
fn words_in_brackets_that_are_none_are_noted() {
    let work = set();
    let mut jobs = jobs(&work);
    jobs.truncate(2);
    jobs[1]["caption_b"] = json!("dusk by <somebody>");
    write(&work, &jobs);
    let done = succeed(&work, &format!("batch {QUICK} set/jobs.jsonl -o made"));
    let note = "`<somebody>` is read as plain text";
    assert_eq!(done.stderr.matches(note).count(), 1, "{}", done.stderr);
}

/// The parts of several machines that share a folder are what one machine makes, also at the same time.
#[test]
fn parts_make_the_whole() {
    let work = set();
    write(&work, &jobs(&work));
    succeed(&work, &format!("batch {QUICK} set/jobs.jsonl -o whole -q"));
    let mut parts: Vec<_> = ["1/3", "2/3", "3/3"]
        .iter()
        .map(|part| {
            dinv(work.path())
                .args(format!("batch {QUICK} set/jobs.jsonl -o parts -q --shard {part}").split(' '))
                .spawn()
                .unwrap()
        })
        .collect();
    for part in &mut parts {
        assert_eq!(part.wait().unwrap().code(), Some(0));
    }
    assert!(contents(&work.path().join("whole")) == contents(&work.path().join("parts")));
    assert_eq!(
        times(&work.path().join("parts")),
        2 + 3,
        "something was done twice"
    );
}

/// Two runs of the same jobs in one folder do each once.
#[test]
fn two_runs_share_the_work() {
    let work = set();
    write(&work, &jobs(&work));
    let start = || {
        let words = format!("batch {QUICK} set/jobs.jsonl -o made -q");
        dinv(work.path()).args(words.split(' ')).spawn().unwrap()
    };
    for mut run in [start(), start()] {
        // 75: the other one works on what is left.
        assert!([Some(0), Some(75)].contains(&run.wait().unwrap().code()));
    }
    succeed(&work, &format!("batch {QUICK} set/jobs.jsonl -o made -q"));
    assert_eq!(times(&work.path().join("made")), 2 + 3);
}

/// A model is known by its contents, not by its place.
#[test]
fn what_decides_the_result_makes_another_job() {
    let work = set();
    write(&work, &jobs(&work));
    succeed(&work, &format!("batch {QUICK} set/jobs.jsonl -o made -q"));
    let other = work.path().join("other/model");
    copy_folder(&work.path().join("model"), &other);
    let done = |more: &str| {
        let planned = succeed(
            &work,
            &format!("batch {QUICK} set/jobs.jsonl -o made --dry-run --json {more}"),
        );
        serde_json::from_str::<Value>(&planned.stdout).unwrap()["done"]
            .as_u64()
            .unwrap()
    };
    assert_eq!(done("--checkpoint-every 5"), 3);
    assert_eq!(done("--model other/model"), 3);
    let config = other.join("scheduler/scheduler_config.json");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text + " ").unwrap();
    // Names that are given cannot be of two jobs.
    let refused = run(
        work.path(),
        &format!("batch {QUICK} set/jobs.jsonl -o made --dry-run --model other/model"),
    );
    assert_eq!(refused.code, Some(64), "{}", refused.stderr);
    for line in 1..=3 {
        assert!(
            refused
                .stderr
                .contains(&format!("set/jobs.jsonl:{line}: made/")),
            "{}",
            refused.stderr
        );
    }
}

#[test]
fn what_fails_leaves_the_others() {
    let work = set();
    let mut jobs = jobs(&work);
    jobs[0]["name"] = json!("portrait");
    jobs[1]["difference"] = json!("broken.safetensors");
    for name in ["a", "a_prime", "caption_a", "caption_a_prime"] {
        jobs[1].as_object_mut().unwrap().remove(name);
    }
    fs::write(work.path().join("set/broken.safetensors"), "no tensors").unwrap();
    jobs[2]["settings"] = json!({ "strength": 0.5 });
    write(&work, &jobs);
    let batch = format!("batch {QUICK} set/jobs.jsonl -o made");
    let failed = run(work.path(), &batch);
    assert_eq!(failed.code, Some(65), "{}", failed.stderr);
    assert!(
        failed
            .stderr
            .contains("set/jobs.jsonl:2: set/broken.safetensors"),
        "{}",
        failed.stderr
    );
    assert!(
        failed.stderr.contains("1 of 3 jobs failed"),
        "{}",
        failed.stderr
    );
    assert!(work.path().join("made/portrait.png").is_file());
    // The name stays that of its job.
    jobs[0]["caption_b"] = json!("dawn");
    write(&work, &jobs);
    let other = run(work.path(), &batch);
    assert!(
        other
            .stderr
            .contains("set/jobs.jsonl:1: made/portrait.png exists"),
        "{}",
        other.stderr
    );
}

#[test]
fn there_is_a_time_to_stop() {
    let work = set();
    write(&work, &jobs(&work));
    let batch = format!("batch {QUICK} set/jobs.jsonl -o made");
    let late = run(work.path(), &format!("{batch} --minutes 0"));
    assert_eq!(late.code, Some(75), "{}", late.stderr);
    assert!(
        late.stderr.contains("left for another time: 3 jobs"),
        "{}",
        late.stderr
    );
    assert!(contents(&work.path().join("made")).is_empty());
    succeed(&work, &batch);
}

#[test]
fn wrong_jobs_are_named_before_anything_is_done() {
    let work = set();
    let lines = [
        r#"{"a": "one/a.png", "a_prime": "one/a_prime.png", "b": "nothing.png"}"#,
        "",
        r#"{"a": "one/a.png", "b": "two/first.png"}"#,
    ];
    fs::write(work.path().join("set/jobs.jsonl"), lines.join("\n")).unwrap();
    let wrong = run(
        work.path(),
        "batch --config tiny.toml set/jobs.jsonl -o made",
    );
    assert_eq!(wrong.code, Some(65), "{}", wrong.stderr);
    assert!(
        wrong
            .stderr
            .contains("set/jobs.jsonl:1: set/nothing.png: there is no such file"),
        "{}",
        wrong.stderr
    );
    assert!(
        wrong
            .stderr
            .contains("set/jobs.jsonl:3: expected one a_prime"),
        "{}",
        wrong.stderr
    );
    let job = json!({ "a": "one/a.png", "a_prime": "one/a_prime.png", "b": "two/first.png" });
    for (change, expected) in [
        (
            json!({ "settings": { "step": 3 } }),
            "set/jobs.jsonl:1: there is no setting `step`",
        ),
        (
            json!({ "settings": { "steps": 0 } }),
            "set/jobs.jsonl:1: setting `steps`",
        ),
        (
            json!({ "settings": { "draft": true } }),
            "`draft` is the same for all jobs",
        ),
        (
            json!({ "name": "x" }),
            "set/jobs.jsonl:2: name: line 1 writes x.png, too",
        ),
    ] {
        let mut first = job.clone();
        first
            .as_object_mut()
            .unwrap()
            .extend(change.as_object().unwrap().clone());
        let mut second = first.clone();
        second["b"] = json!("two/a.png");
        write(&work, &[first, second]);
        let wrong = run(
            work.path(),
            "batch --config tiny.toml set/jobs.jsonl -o made",
        );
        assert_eq!(wrong.code, Some(65), "{}", wrong.stderr);
        assert!(wrong.stderr.contains(expected), "{}", wrong.stderr);
    }
    for (command, expected) in [
        ("batch -o made", "<FILE.jsonl>"),
        (
            "batch --from model",
            "model: there is no pair in this folder",
        ),
        ("batch --from set --dry-run", "cannot be used with"),
        (
            "batch set -o made",
            "`dinv batch --from set` makes the file",
        ),
        ("batch set/nothing.jsonl -o made", "set/nothing.jsonl"),
        (
            "batch set/jobs.jsonl -o a.png",
            "a.png: expected a folder, found a file",
        ),
    ] {
        let wrong = run(work.path(), command);
        assert!(
            wrong.code != Some(0) && wrong.stderr.contains(expected),
            "{}",
            wrong.stderr
        );
    }
    assert!(!work.path().join("made").exists());
}
