//! Existing files are not replaced, a set of files appears at once, and nothing is left behind.

use std::fs;
use std::path::Path;
use std::process::Child;

use difference_inversion::util::files::Claim;

use super::{Done, PAIR, entries, run, start, succeed, wait_for, workplace};

/// Long enough for something to happen during the run.
const LONG: &str = "--steps 100 --checkpoint-every 1 --select-every 0";

fn ended(child: Child) -> Done {
    child.wait_with_output().unwrap().into()
}

/// Expects a refusal with this code and these words in the message.
fn refuses(folder: &Path, arguments: &str, code: i32, expected: &[&str]) {
    let done = run(folder, arguments);
    assert_eq!(done.code, Some(code), "{arguments}\n{}", done.stderr);
    for text in expected {
        assert!(
            done.stderr.contains(text),
            "{arguments}: no `{text}` in\n{}",
            done.stderr
        );
    }
    assert!(!done.stderr.contains(".dinv-"), "{}", done.stderr);
}

#[test]
fn what_appears_while_learning_stays_and_so_does_the_checkpoint() {
    let work = workplace();
    let learn = format!("learn --config tiny.toml {PAIR} {LONG} -q -o d.safetensors");
    let running = start(work.path(), &learn);
    wait_for(&work.path().join("d.checkpoint.safetensors"));
    fs::write(
        work.path().join("d.safetensors"),
        "somebody else's only copy",
    )
    .unwrap();
    let done = ended(running);
    assert_eq!(done.code, Some(1), "{}", done.stderr);
    assert!(
        done.stderr.contains("d.safetensors exists already"),
        "{}",
        done.stderr
    );
    assert!(done.stderr.contains("`--resume`"), "{}", done.stderr);
    let there = fs::read_to_string(work.path().join("d.safetensors")).unwrap();
    assert_eq!(there, "somebody else's only copy");
    // Nothing is lost if the hint is followed.
    fs::rename(
        work.path().join("d.safetensors"),
        work.path().join("theirs"),
    )
    .unwrap();
    succeed(work.path(), &format!("{learn} --resume"));
    let names = entries(work.path());
    assert!(names.contains(&"d.safetensors".to_owned()), "{names:?}");
    assert!(
        !names
            .iter()
            .any(|name| name.contains("checkpoint") || name.starts_with(".dinv-")),
        "{names:?}"
    );
}

#[test]
fn a_trace_that_appears_meanwhile_stays() {
    let work = workplace();
    let learn =
        format!("learn --config tiny.toml {PAIR} {LONG} -q -o d.safetensors --trace t.safetensors");
    let running = start(work.path(), &learn);
    wait_for(&work.path().join("d.checkpoint.safetensors"));
    fs::write(work.path().join("t.safetensors"), "theirs").unwrap();
    let done = ended(running);
    assert_eq!(done.code, Some(1), "{}", done.stderr);
    assert!(done.stderr.contains("t.safetensors"), "{}", done.stderr);
    assert_eq!(
        fs::read_to_string(work.path().join("t.safetensors")).unwrap(),
        "theirs"
    );
    assert!(work.path().join("d.checkpoint.safetensors").exists());
}

#[test]
fn two_runs_do_not_share_an_output() {
    let work = workplace();
    let learn = format!("learn --config tiny.toml {PAIR} {LONG} -q");
    let running = start(work.path(), &format!("{learn} -o d.safetensors"));
    wait_for(&work.path().join("d.checkpoint.safetensors"));
    for more in ["", "--overwrite", "--resume"] {
        let second = format!("{learn} -o ./d.safetensors {more}");
        refuses(work.path(), &second, 75, &["another run is writing it"]);
    }
    assert_eq!(ended(running).code, Some(0));

    let eval = super::eval::eval("--methods difference-inversion,sdedit --jobs 1 -q -o night");
    let suite = super::eval::workplace_with_suite();
    let running = start(suite.path(), &eval);
    wait_for(&suite.path().join("night/run.json"));
    refuses(
        suite.path(),
        &eval,
        75,
        &["another run is working in this folder"],
    );
    assert_eq!(ended(running).code, Some(0));
}

#[test]
fn outputs_with_a_dot_have_checkpoints_of_their_own() {
    let work = workplace();
    let learn = format!("learn --config tiny.toml {PAIR} -q --checkpoint-every 1 --select-every 0");
    let mut long = start(work.path(), &format!("{learn} --steps 100000 -o lr0.01"));
    wait_for(&work.path().join("lr0.01.checkpoint"));
    succeed(work.path(), &format!("{learn} --steps 2 -o lr0.001"));
    long.kill().unwrap();
    long.wait().unwrap();
    assert!(work.path().join("lr0.01.checkpoint").exists());
    // An existing checkpoint is resumed, or reported as being ahead.
    let behind = format!("{learn} --steps 1 -o lr0.01 --resume");
    refuses(
        work.path(),
        &behind,
        65,
        &[
            "setting `steps`: expected at least",
            "the checkpoint is, found 1",
        ],
    );
}

#[test]
fn outputs_that_cannot_be_are_refused_before_the_first_step() {
    let work = workplace();
    fs::create_dir(work.path().join("folder")).unwrap();
    let learn = format!("learn --config tiny.toml {PAIR}");
    for (output, expected) in [
        ("-o folder/", "expected the name of a file, found a folder"),
        ("-o absent/", "expected the name of a file, found a folder"),
        ("-o folder/.", "expected the name of a file, found a folder"),
        ("-o night.png", "call it night.safetensors"),
        ("-o night.toml", "call it night.safetensors"),
        (
            "-o x.checkpoint.safetensors",
            "this name is reserved for checkpoints",
        ),
        (
            "-o x.safetensors --trace x.safetensors",
            "the trace would replace the difference",
        ),
        (
            "-o x.safetensors --trace folder/../x.safetensors",
            "the trace would replace the difference",
        ),
        (
            "-o x --trace ./x.checkpoint",
            "the trace would replace the checkpoint",
        ),
        (
            "-o x.safetensors --trace folder/",
            "expected the name of a file, found a folder",
        ),
    ] {
        refuses(work.path(), &format!("{learn} {output}"), 64, &[expected]);
    }
    let long = "x".repeat(300);
    refuses(
        work.path(),
        &format!("{learn} -o {long}"),
        1,
        &["cannot write to"],
    );
    let weights = "model/unet/diffusion_pytorch_model.safetensors";
    let over = format!("{learn} --overwrite -o {weights}");
    refuses(work.path(), &over, 64, &["one of the inputs"]);
    let generate = "generate --config tiny.toml --prompt x";
    refuses(
        work.path(),
        &format!("{generate} -o folder/"),
        64,
        &["found a folder", "folder/picture.png"],
    );
    refuses(
        work.path(),
        &format!("{generate} -o x.safetensors"),
        64,
        &["call it x.png"],
    );
    assert!(entries(&work.path().join("folder")).is_empty());
}

#[test]
fn what_a_killed_run_has_left_is_swept() {
    let work = workplace();
    let left = [".dinv-aB3xYz", ".dinv-0123456789abcdef"];
    let leave = |folder: &Path| {
        fs::create_dir_all(folder).unwrap();
        left.iter()
            .for_each(|name| fs::write(folder.join(name), "half").unwrap());
    };
    let is_clean = |folder: &Path| {
        !entries(folder)
            .iter()
            .any(|name| name.starts_with(".dinv-"))
    };
    leave(work.path());
    succeed(
        work.path(),
        &format!("learn --config tiny.toml {PAIR} -q -o d.safetensors"),
    );
    assert!(is_clean(work.path()));
    leave(&work.path().join("out"));
    succeed(
        work.path(),
        "apply --config tiny.toml d.safetensors --b b.png --caption-b x -q -o out",
    );
    assert_eq!(entries(&work.path().join("out")), ["b.png"]);

    let suite = super::eval::workplace_with_suite();
    leave(&suite.path().join("e"));
    fs::write(suite.path().join("e/.DS_Store"), "of a system").unwrap();
    succeed(
        suite.path(),
        &super::eval::eval("--methods sdedit --limit 1 -q -o e"),
    );
    assert!(is_clean(&suite.path().join("e")));
}

#[test]
fn a_set_whose_run_was_killed_while_it_appeared_is_finished() {
    let work = workplace();
    let analogy = format!("analogy --config tiny.toml {PAIR} --b b.png --caption-b noon -q -o out");
    let whole = succeed(work.path(), &analogy);
    let out = work.path().join("out");
    let names = [
        "b_prime.png",
        "sheet.png",
        "loss.png",
        "difference.safetensors",
        "run.json",
    ];
    let hidden = out.join(".dinv-aB3xYz");
    fs::create_dir(&hidden).unwrap();
    // As if the process had been killed after the second of five.
    for name in &names[2..] {
        fs::rename(out.join(name), hidden.join(name)).unwrap();
    }
    fs::write(hidden.join(".lock"), "").unwrap();
    let note =
        serde_json::json!({ "names": names, "replace": false, "spent": "checkpoint.safetensors" });
    fs::write(hidden.join(".complete"), note.to_string()).unwrap();
    fs::write(out.join("checkpoint.safetensors"), "spent").unwrap();
    let finished = succeed(work.path(), &format!("{analogy} --resume"));
    assert_eq!(finished.stdout, whole.stdout);
    let mut sorted = names.to_vec();
    sorted.sort_unstable();
    assert_eq!(entries(&out), sorted);
}

#[test]
fn a_folder_of_pictures_is_taken_and_all_that_is_wrong_with_it_told() {
    let work = workplace();
    succeed(
        work.path(),
        &format!("learn --config tiny.toml {PAIR} -q -o d.safetensors"),
    );
    let photos = work.path().join("photos");
    fs::create_dir(&photos).unwrap();
    for name in ["one.png", "two.png", ".hidden.png"] {
        fs::copy(work.path().join("b.png"), photos.join(name)).unwrap();
    }
    fs::write(photos.join("notes.txt"), "no picture").unwrap();
    // The difference may come after the pictures it is applied to.
    let apply = "apply --config tiny.toml -q -o out --b photos";
    let done = succeed(work.path(), &format!("{apply} d.safetensors"));
    assert_eq!(done.stdout, "out/one.png\nout/two.png\n");
    for name in ["bad.jpg", "worse.png"] {
        fs::write(photos.join(name), "no picture").unwrap();
    }
    let all = [
        "2 of 4 pictures cannot be read",
        "photos/bad.jpg: not a picture",
        "photos/worse.png: not a picture",
    ];
    refuses(
        work.path(),
        &format!("{apply} d.safetensors --overwrite"),
        65,
        &all,
    );
    refuses(
        work.path(),
        &format!("{apply} d.safetensors"),
        64,
        &["out/one.png exists already", "--skip-existing"],
    );
    refuses(work.path(), apply, 64, &["the difference is missing"]);
    refuses(
        work.path(),
        "apply b.png --b b.png -o x",
        65,
        &["b.png: not a safetensors file, but a picture"],
    );
    refuses(work.path(), "caption --config tiny.toml photos", 65, &all);
}

#[test]
fn pictures_that_another_run_makes_are_left_to_it() {
    let work = workplace();
    let learn = format!("learn --config tiny.toml {PAIR} -q -o d.safetensors");
    succeed(work.path(), &learn);
    fs::copy(work.path().join("b.png"), work.path().join("c.png")).unwrap();
    fs::create_dir(work.path().join("out")).unwrap();
    let claim = Claim::on(&work.path().join("out/b.png")).unwrap();
    let apply = "apply d.safetensors --config tiny.toml --b b.png c.png --skip-existing -o out";
    let expected = [
        "out/b.png: another run is writing it; it is left to that run",
        "left to other runs: 1 of 2 pictures",
    ];
    refuses(work.path(), apply, 75, &expected);
    assert!(work.path().join("out/c.png").exists());
    drop(claim);
    succeed(work.path(), apply);
    assert_eq!(entries(&work.path().join("out")), ["b.png", "c.png"]);
}

#[test]
fn results_of_other_settings_are_not_mixed_in() {
    let work = workplace();
    let learn = format!("learn --config tiny.toml {PAIR} -q");
    succeed(work.path(), &format!("{learn} -o d.safetensors"));
    succeed(work.path(), &format!("{learn} -o e.safetensors --seed 7"));
    fs::copy(work.path().join("b.png"), work.path().join("c.png")).unwrap();
    let apply = "apply --config tiny.toml -q --skip-existing -o out";
    succeed(
        work.path(),
        &format!("{apply} d.safetensors --b b.png --strength 0.7"),
    );
    // When all results are there, too.
    let all = format!("{apply} d.safetensors --b b.png");
    let expected = "out/b.png exists, but was made with strength 0.7, not 1.0";
    refuses(work.path(), &all, 64, &[expected]);
    succeed(work.path(), &format!("{all} --strength 0.7"));
    let both = "--b b.png c.png";
    let other = format!("{apply} d.safetensors {both}");
    refuses(
        work.path(),
        &other,
        64,
        &["out/b.png exists, but was made with strength 0.7, not 1.0"],
    );
    let other = format!("{apply} e.safetensors {both} --strength 0.7");
    refuses(work.path(), &other, 64, &["with another difference"]);
    assert_eq!(entries(&work.path().join("out")), ["b.png"]);
    succeed(
        work.path(),
        &format!("{apply} d.safetensors {both} --strength 0.7"),
    );
    assert_eq!(entries(&work.path().join("out")), ["b.png", "c.png"]);
}

#[cfg(unix)]
#[test]
fn pictures_may_come_from_a_pipe() {
    let work = workplace();
    succeed(
        work.path(),
        &format!("learn --config tiny.toml {PAIR} -q -o d.safetensors"),
    );
    let piped = |arguments: &str| -> Done {
        let command = format!("cat b.png | \"$0\" {arguments}");
        let mut shell = std::process::Command::new("sh");
        let output = shell
            .args(["-c", &command, env!("CARGO_BIN_EXE_dinv")])
            .current_dir(work.path())
            .output();
        output.unwrap().into()
    };
    let config = "--config tiny.toml -q";
    let done = piped(&format!(
        "apply {config} d.safetensors --b /dev/stdin --caption-b x -o out"
    ));
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    succeed(
        work.path(),
        &format!("apply {config} d.safetensors --b b.png --caption-b x -o same"),
    );
    let picture = |path: &str| image::open(work.path().join(path)).unwrap().into_rgb8();
    assert_eq!(picture("out/stdin.png"), picture("same/b.png"));
    let done = piped(&format!("caption {config} /dev/stdin"));
    assert_eq!(done.code, Some(0), "{}", done.stderr);
}

#[test]
fn a_rate_that_leaves_all_numbers_behind_is_refused() {
    let work = workplace();
    let learn = format!("learn --config tiny.toml {PAIR} -o d.safetensors");
    for setting in ["learning-rate", "weight-decay", "lambda-mse", "lambda-clip"] {
        refuses(
            work.path(),
            &format!("{learn} --{setting} 1e30"),
            65,
            &["found 1000000000000000000"],
        );
    }
    let nothing = format!("{learn} --lambda-mse 0 --lambda-clip 0");
    refuses(
        work.path(),
        &nothing,
        65,
        &["setting `lambda_mse`: expected above 0"],
    );
}
