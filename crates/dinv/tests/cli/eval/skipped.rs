//! Methods that cannot run, and analogies that fail.

use std::fs;
use std::path::Path;

use tempfile::TempDir;

use super::super::{copy_folder, entries, golden, run, succeed};
use super::{eval, tables, workplace_with_suite};

/// Expects every text somewhere in the tables of the run in `out`.
fn tells(work: &TempDir, expected: &[&str]) {
    let tables = tables(work.path());
    for text in expected {
        assert!(tables.contains(text), "no `{text}` in {tables}");
    }
}

/// Rewrites the first lines of the suite.
fn change(work: &Path, from: &str, to: &str, lines: usize) {
    let list = work.join("list.jsonl");
    let text = fs::read_to_string(&list).unwrap();
    assert!(text.contains(from));
    fs::write(list, text.replacen(from, to, lines)).unwrap();
}

#[test]
fn what_fails_is_told_and_counts_for_its_own_run_alone() {
    let work = workplace_with_suite();
    let variants = "[told]\nmethod = 'difference-inversion'\nprompt_mode = 'text'\n\
                    [wrong]\nmethod = 'sdedit'\nnum_inference_steps = 1000000\n";
    fs::write(work.path().join("v.toml"), variants).unwrap();
    change(work.path(), "\"b\":\"noon\",", "", 1);
    let done = run(work.path(), &eval("--variants v.toml -o out"));
    assert_eq!(done.code, Some(1), "{}", done.stderr);
    // Every analogy of `wrong`, and the one without a caption of B of `told`.
    let error = "error: 4 analogies failed\nhint: the messages above say why";
    assert!(done.stderr.contains(error), "{}", done.stderr);
    let expected = [
        "| told | captions | 2 | 1 |",
        "- `told` failed on `one`: a prompt is missing",
        "- `wrong` failed on `two`: setting `num_inference_steps`",
    ];
    tells(&work, &expected);
    assert_eq!(entries(&work.path().join("out/wrong/two")), ["result.json"]);

    succeed(work.path(), &eval("--methods difference-inversion -o out"));
    tells(&work, &expected);
}

#[test]
fn a_method_with_a_wrong_setting_stops_the_run_before_it_begins() {
    let work = workplace_with_suite();
    for (line, code, expected) in [
        (
            "stregth = 1.0",
            65,
            "error: the method `mine`: there is no setting `stregth`; there are eta",
        ),
        (
            "sdedit_strength = 2.0",
            65,
            "error: the method `mine`: setting `sdedit_strength`: expected",
        ),
    ] {
        let variants = format!("[mine]\nmethod = 'sdedit'\n{line}\n");
        fs::write(work.path().join("v.toml"), variants).unwrap();
        let done = run(
            work.path(),
            &eval("--variants v.toml --methods sdedit,mine -o out"),
        );
        assert_eq!(done.code, Some(code), "{}", done.stderr);
        assert!(done.stderr.contains(expected), "{}", done.stderr);
        assert!(!work.path().join("out").exists());
    }
}

#[test]
fn a_method_without_its_model_is_skipped_with_its_reason() {
    let work = workplace_with_suite();
    copy_folder(&golden("instruct_pix2pix"), &work.path().join("instruct"));
    let wrong = "--instruct-model instruct --inpaint-model instruct";
    succeed(
        work.path(),
        &eval("--limit 1 --methods visii,sdedit,analogist -o out"),
    );
    tells(
        &work,
        &[
            "- `visii` was skipped: an InstructPix2Pix model is missing",
            "- `analogist` was skipped: an inpainting model is missing",
            "| sdedit | captions | 1 | 0 |",
        ],
    );
    let methods = "--limit 1 --methods analogist";
    succeed(work.path(), &eval(&format!("{methods} {wrong} -o out")));
    let kind = "- `analogist` was skipped: a StableDiffusionInpaintPipeline is needed";
    tells(&work, &[kind]);
}

/// A workplace whose suite has instructions, with a model that follows them in the folder `instruct`.
fn workplace_with_instructions() -> TempDir {
    let work = workplace_with_suite();
    copy_folder(&golden("instruct_pix2pix"), &work.path().join("instruct"));
    change(
        work.path(),
        "\"captions\"",
        "\"instruction\":\"be late\",\"captions\"",
        3,
    );
    work
}

#[test]
fn what_ran_before_is_skipped_where_its_model_is_not_given() {
    let work = workplace_with_instructions();
    let variant = "[short]\nmethod = 'instruct-pix2pix'\nnum_inference_steps = 2\n";
    fs::write(work.path().join("v.toml"), variant).unwrap();
    let short = |more: &str| {
        succeed(
            work.path(),
            &eval(&format!("--variants v.toml {more} -o out")),
        )
    };
    let ran = "| short | the instruction | 1 | 0 |";
    short("--limit 1 --instruct-model instruct");
    tells(&work, &[ran]);
    let done = short("--limit 2");
    tells(&work, &[ran]);
    let skipped = "short is skipped: an InstructPix2Pix model is missing";
    assert!(done.stderr.contains(skipped), "{}", done.stderr);
    let all = "| short | the instruction | 2 | 0 |";
    short("--limit 2 --instruct-model instruct");
    tells(&work, &[all]);
}

#[test]
fn a_method_is_skipped_if_the_suite_does_not_tell_what_it_is_told() {
    let work = workplace_with_suite();
    copy_folder(&golden("instruct_pix2pix"), &work.path().join("instruct"));
    let list = "a,a_prime,b,caption_b\na.png,a_prime.png,b.png,noon\n";
    fs::write(work.path().join("list.csv"), list).unwrap();
    let methods = "--methods text-swap,difference-inversion,instruct-pix2pix";
    let more = "--instruct-model instruct --suite list.csv -o out";
    succeed(
        work.path(),
        &format!("eval run --config tiny.toml {methods} {more}"),
    );
    tells(
        &work,
        &[
            "| difference-inversion | nothing | 1 | 0 |",
            "- `text-swap` was skipped: no analogy provides what it needs: captions",
            "- `instruct-pix2pix` was skipped: no analogy provides what it needs: the instruction",
        ],
    );
}

#[test]
fn a_picture_that_cannot_be_read_costs_its_own_analogy_until_it_is_repaired() {
    let work = workplace_with_suite();
    let broken = work.path().join("broken.png");
    fs::write(&broken, "no picture").unwrap();
    // That of the first analogy.
    change(work.path(), "\"b\":\"b.png\"", "\"b\":\"broken.png\"", 1);
    let arguments = eval("--methods sdedit -o out");
    let done = run(work.path(), &arguments);
    assert_eq!(done.code, Some(1), "{}", done.stderr);
    for expected in [
        "note: a picture of `one` cannot be shown: ",
        "broken.png: ",
        "error: 1 analogy failed",
    ] {
        assert!(done.stderr.contains(expected), "{}", done.stderr);
    }
    tells(
        &work,
        &[
            "| sdedit | captions | 2 | 1 |",
            "- `sdedit` failed on `one`: ",
        ],
    );
    fs::copy(work.path().join("b.png"), &broken).unwrap();
    succeed(work.path(), &arguments);
    tells(&work, &["| sdedit | captions | 3 | 0 |"]);
    let shown = entries(&work.path().join("out/pictures/one"));
    assert_eq!(shown, ["a.png", "a_prime.png", "b.png", "b_prime.png"]);
}

#[test]
fn how_the_model_is_understood_is_not_said_of_the_models_beside_it() {
    let work = workplace_with_instructions();
    let variants = "[short]\nmethod = 'instruct-pix2pix'\nnum_inference_steps = 2\n\
                    [words]\nmethod = 'sdedit'\n";
    fs::write(work.path().join("v.toml"), variants).unwrap();
    let pictures = |flags: &str, out: &str| {
        let flags = format!("--variants v.toml --limit 1 --instruct-model instruct {flags}");
        succeed(work.path(), &eval(&format!("{flags} -o {out}")));
        ["short", "words"].map(|method| {
            let made = work.path().join(out).join(method).join("one/b_prime.png");
            fs::read(made).unwrap()
        })
    };
    let [short, words] = pictures("", "plain");
    // The model itself predicts velocity, the one next to it noise.
    let [same, _] = pictures("--prediction-type v_prediction", "velocity");
    assert!(short == same);
    let [_, other] = pictures("--prediction-type epsilon", "noise");
    assert!(words != other);
}
