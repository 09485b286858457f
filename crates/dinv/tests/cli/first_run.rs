//! `dinv first-run` on a tiny model: the page, what it says of failures, and how it goes on.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::{copy_folder, entries, golden, refused, run, succeed};

const RUN: &str = "first-run --config tiny.toml";

/// A folder with a tiny model that learns, and settings that make everything on it quick.
fn workplace() -> TempDir {
    let work = tempfile::tempdir().unwrap();
    copy_folder(&golden("learning"), &work.path().join("model"));
    settle(work.path(), 4);
    work
}

fn settle(work: &Path, steps: usize) {
    let settings = format!(
        "model = 'model'\nsteps = {steps}\nclip_first = 3\nnum_tokens = 2\nselect_every = 0\n\
         num_inference_steps = 3\ncheckpoint_every = 1\n"
    );
    fs::write(work.join("tiny.toml"), settings).unwrap();
}

fn report(work: &Path) -> Value {
    serde_json::from_slice(&fs::read(work.join("first-run/report.json")).unwrap()).unwrap()
}

fn page(work: &Path) -> String {
    fs::read_to_string(work.join("first-run/report.html")).unwrap()
}

/// The names of the parts with this outcome.
fn with_outcome(report: &Value, is_done: bool) -> Vec<String> {
    let parts = report["parts"].as_array().unwrap().iter();
    let parts = parts.filter(|part| (part["outcome"] == json!("done")) == is_done);
    parts
        .map(|part| part["name"].as_str().unwrap().to_owned())
        .collect()
}

fn part<'a>(report: &'a Value, name: &str) -> &'a Value {
    let mut parts = report["parts"].as_array().unwrap().iter();
    parts.find(|part| part["name"] == name).unwrap()
}

const PARTS: [&str; 13] = [
    "files",
    "networks",
    "tokenizer",
    "autoencoder",
    "captions",
    "drawing",
    "speed",
    "learn-pencil",
    "apply-pencil",
    "learn-night",
    "apply-night",
    "learn-snow",
    "apply-snow",
];

#[test]
fn one_page_holds_everything_and_is_not_made_twice() {
    let work = workplace();
    let done = succeed(work.path(), RUN);
    assert_eq!(done.stdout, "first-run/report.html\n");
    assert!(
        done.stderr
            .contains("estimated from one call of the denoiser"),
        "{}",
        done.stderr
    );
    let out = work.path().join("first-run");
    assert_eq!(
        entries(&out),
        ["learned", "pictures", "report.html", "report.json"]
    );
    assert_eq!(
        entries(&out.join("learned")),
        [
            "night.safetensors",
            "pencil.safetensors",
            "snow.safetensors"
        ]
    );
    let report = report(work.path());
    assert_eq!(with_outcome(&report, true), PARTS);
    assert!(report["estimate"].as_f64().unwrap() > 0.0);
    let files = part(&report, "files")["files"].as_array().unwrap();
    let digest = files[0]["sha256"].as_str().unwrap();
    assert!(digest.len() == 64 && files.len() == 4, "{files:?}");
    assert_eq!(
        part(&report, "learn-night")["losses"]
            .as_array()
            .unwrap()
            .len(),
        4
    );
    let strips = part(&report, "apply-night")["strips"].as_array().unwrap();
    assert_eq!(strips.len(), 4);
    for strip in strips {
        let scores = strip["scores"].as_array().unwrap();
        let of = |name: &str| scores.iter().find(|score| score["metric"] == name).unwrap();
        // The picture as it was is 0 away from itself, and not from the truth.
        assert!(of("mse_truth")["unchanged"].as_f64().unwrap() > 0.0);
        assert!(of("mse_truth")["made"].as_f64().unwrap() > 0.0);
        assert!(of("clip_i_truth")["made"].as_f64().unwrap() <= 1.0);
        assert_eq!(of("clip_direction")["unchanged"], 0.0);
    }
    // A tiny model is none of which something is known.
    let checks = part(&report, "networks")["checks"].as_array().unwrap();
    assert!(
        checks
            .iter()
            .any(|check| check["what"] == "unet: parameters")
    );
    assert!(checks.iter().all(|check| check["ok"].is_null()));

    let page = page(work.path());
    let pictures = page.matches("<img src=\"data:image/jpeg;base64,").count();
    assert_eq!(pictures, 2 + 1 + 3 * (3 + 4 * 3));
    assert_eq!(page.matches("<img").count(), pictures);
    assert!(
        !page.contains("://"),
        "the page must work without a network"
    );
    assert!(page.contains("13 parts done, every known value is as expected"));
    assert!(page.contains(digest));
    let (_, data) = page.split_once("id=\"report\">").unwrap();
    let data: Value = serde_json::from_str(data.split_once("</script>").unwrap().0).unwrap();
    assert_eq!(data, report);

    succeed(work.path(), RUN);
    let again = self::report(work.path());
    for name in &PARTS[1..] {
        assert_eq!(
            part(&again, name),
            part(&report, name),
            "{name} was done again"
        );
    }
    refused(
        work.path(),
        &format!("{RUN} --quick"),
        64,
        &[
            "first-run holds a run with quick false, not true",
            "`--overwrite`",
        ],
    );
    settle(work.path(), 5);
    refused(
        work.path(),
        RUN,
        64,
        &["first-run holds a run with other settings"],
    );
    let json = succeed(work.path(), &format!("{RUN} --overwrite --json"));
    let json: Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!((&json["parts"], &json["failed"]), (&json!(13), &json!(0)));
    assert_eq!(
        part(&self::report(work.path()), "learn-snow")["losses"]
            .as_array()
            .unwrap()
            .len(),
        5
    );
}

#[test]
fn a_part_that_fails_is_shown_and_the_same_command_does_it_later() {
    let work = workplace();
    let clip = work.path().join("model/clip");
    fs::rename(&clip, work.path().join("elsewhere")).unwrap();
    refused(
        work.path(),
        RUN,
        1,
        &[
            "7 of 13 parts failed: see first-run/report.html",
            "hint: the same command tries again",
        ],
    );
    let first = report(work.path());
    assert_eq!(
        with_outcome(&first, true),
        [
            "files",
            "networks",
            "tokenizer",
            "autoencoder",
            "drawing",
            "speed"
        ]
    );
    let page = page(work.path());
    assert!(page.contains("the joint space is missing: there is no folder model/clip"));
    assert!(page.contains("there is no difference to apply"));

    fs::rename(work.path().join("elsewhere"), &clip).unwrap();
    succeed(work.path(), RUN);
    let second = report(work.path());
    assert_eq!(with_outcome(&second, true), PARTS);
    assert_eq!(part(&second, "drawing"), part(&first, "drawing"));

    // Another model in the same place.
    let weights = "model/unet/diffusion_pytorch_model.safetensors";
    let mut bytes = fs::read(work.path().join(weights)).unwrap();
    let last = bytes.last_mut().unwrap();
    *last ^= 1;
    fs::write(work.path().join(weights), bytes).unwrap();
    refused(
        work.path(),
        RUN,
        64,
        &["first-run holds a run with other files of the model"],
    );
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_goes_on_from_its_checkpoint() {
    use super::{Done, signal, start, wait_for};

    let work = workplace();
    settle(work.path(), 150);
    succeed(work.path(), &format!("{RUN} -q -o straight"));
    let child = start(work.path(), RUN);
    let checkpoint = work
        .path()
        .join("first-run/learned/night.checkpoint.safetensors");
    wait_for(&checkpoint);
    signal("-INT", &child.id().to_string());
    let done: Done = child.wait_with_output().unwrap().into();
    assert_eq!(done.code, Some(130), "{}", done.stderr);
    assert!(
        done.stderr.contains("the same command continues"),
        "{}",
        done.stderr
    );
    assert!(checkpoint.is_file());
    let first = report(work.path());
    assert_eq!(with_outcome(&first, true), PARTS[..9]);
    assert!(page(work.path()).contains("9 parts done"));
    let late = run(work.path(), &format!("{RUN} -q --minutes 0"));
    assert_eq!(late.code, Some(75), "{}", late.stderr);
    assert!(checkpoint.is_file());
    succeed(work.path(), &format!("{RUN} -q --minutes 60"));
    assert!(!checkpoint.exists());
    let second = report(work.path());
    assert_eq!(part(&second, "apply-pencil"), part(&first, "apply-pencil"));
    for name in ["pencil", "night", "snow"] {
        let read = |out: &str| {
            fs::read(
                work.path()
                    .join(format!("{out}/learned/{name}.safetensors")),
            )
        };
        assert!(
            read("first-run").unwrap() == read("straight").unwrap(),
            "{name} differs"
        );
    }
}

#[test]
fn what_cannot_be_tried_is_refused_before_anything_is_written() {
    let work = workplace();
    fs::create_dir(work.path().join("mine")).unwrap();
    fs::write(work.path().join("mine/letter.txt"), "dear").unwrap();
    refused(
        work.path(),
        &format!("{RUN} -o mine"),
        64,
        &["mine: not empty, and not the folder of a first run"],
    );
    assert_eq!(entries(&work.path().join("mine")), ["letter.txt"]);
    refused(
        work.path(),
        "first-run --model sd15x",
        65,
        &["sd15x: no such file, folder or model"],
    );
    refused(
        work.path(),
        "first-run --model sd15",
        65,
        &["dinv models pull"],
    );
    let demo = work.path().join("demo/model");
    copy_folder(&work.path().join("model"), &demo);
    let done = super::dinv(work.path())
        .args(["first-run", "--config", "tiny.toml"])
        .env("DINV_DEMO_MODEL", &demo)
        .output();
    let done: super::Done = done.unwrap().into();
    assert_eq!(done.code, Some(65));
    assert!(
        done.stderr
            .contains("demo/benchmark/photos: the suite is missing"),
        "{}",
        done.stderr
    );
    assert!(
        done.stderr.contains("copy the folder demo/benchmark"),
        "{}",
        done.stderr
    );
    assert!(!run(work.path(), RUN).stderr.contains("panicked"));
}
