//! Every command on a tiny Chroma.

use super::z_image::{MODEL, check_everything, work_with};
use super::{refused, succeed};

#[test]
fn a_difference_is_learned_applied_and_drawn_with() {
    check_everything(&work_with("chroma"));
}

#[test]
fn the_model_is_examined() {
    let work = work_with("chroma");
    let done = succeed(work.path(), "doctor --model tiny").stdout;
    for part in ["transformer", "text_encoder", "tokenizer"] {
        assert!(done.contains(part), "no {part} in {done}");
    }
    assert!(!done.contains("missing: tokenizer"), "{done}");
    let checked = succeed(work.path(), "models check tiny").stdout;
    for (part, result) in [
        ("vae", "latents [1, 16, 128, 128]"),
        ("transformer", "prediction [1, 16, 128, 128]"),
    ] {
        let line = checked.lines().find(|line| line.starts_with(part));
        assert!(line.unwrap().contains(result), "{checked}");
    }
    let listed = succeed(work.path(), "models list").stdout;
    let line = listed.lines().find(|line| line.starts_with("chroma "));
    assert!(line.unwrap().contains("apache-2.0"), "{listed}");
}

#[test]
fn what_does_not_fit_is_refused_in_words() {
    let work = work_with("chroma");
    let generate = format!("generate {MODEL} --prompt red -o red.png");
    let refuses = |flags: &str, code, expected: &[&str]| {
        refused(work.path(), &format!("{generate} {flags}"), code, expected);
    };
    refuses("--resolution 18", 65, &["multiples of 4"]);
    refuses(
        "--without-t5",
        65,
        &["setting `without_t5`", "ChromaPipeline"],
    );
    let path = work.path().join("tiny/tokenizer/spiece.model");
    std::fs::write(&path, "version 1").unwrap();
    refuses("", 65, &["spiece.model", "not a SentencePiece model"]);
    std::fs::remove_file(path).unwrap();
    refuses("", 65, &["tokenizer.json"]);
    assert!(!work.path().join("red.png").exists());
}
