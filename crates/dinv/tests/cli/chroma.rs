//! Every command on a tiny Chroma.

use tempfile::TempDir;

use super::{PAIR, copy_folder, golden, refused, succeed, workplace};

/// A workplace with the model in `tiny-chroma`, and how it is named.
fn work() -> TempDir {
    let work = workplace();
    copy_folder(&golden("chroma"), &work.path().join("tiny-chroma"));
    let path = work.path().join("tiny.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(path, format!("{text}resolution = 16\n")).unwrap();
    work
}

const MODEL: &str = "--config tiny.toml --model tiny-chroma";
const B: &str = "--b b.png --caption-b noon";

#[test]
fn a_difference_is_learned_applied_and_drawn_with() {
    let work = work();
    let opened = |name: &str| image::open(work.path().join(name)).unwrap();
    let done = succeed(work.path(), &format!("analogy {MODEL} {PAIR} {B} -o out"));
    for note in ["follows only the captions", "the direction of a token"] {
        assert!(done.stderr.contains(note), "{}", done.stderr);
    }
    for arguments in [
        format!("learn -q {MODEL} {PAIR} -o d.safetensors"),
        format!("apply d.safetensors -q {MODEL} {B} -o applied"),
    ] {
        succeed(work.path(), &arguments);
    }
    assert_eq!(opened("out/b_prime.png"), opened("applied/b.png"));
    let drawn = |flags: &str| {
        let common = "--prompt red --overwrite -o red.png";
        succeed(
            work.path(),
            &format!("generate -q {MODEL} {common} {flags}"),
        );
        opened("red.png")
    };
    let plain = drawn("");
    assert_eq!(drawn("--guidance-scale 7.5"), plain);
    assert_ne!(drawn("--negative-prompt blue"), plain);
    assert_ne!(drawn("--difference d.safetensors"), plain);
    assert_ne!(drawn("--guidance-scale 1"), plain);
}

#[test]
fn the_model_is_examined() {
    let work = work();
    let done = succeed(work.path(), "doctor --model tiny-chroma").stdout;
    for part in ["transformer", "text_encoder", "tokenizer"] {
        assert!(done.contains(part), "no {part} in {done}");
    }
    let checked = succeed(work.path(), "models check tiny-chroma").stdout;
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
    let work = work();
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
    let path = work.path().join("tiny-chroma/tokenizer/spiece.model");
    std::fs::write(&path, "version 1").unwrap();
    refuses("", 65, &["spiece.model", "not a SentencePiece model"]);
    std::fs::remove_file(path).unwrap();
    refuses("", 65, &["tokenizer.json"]);
    assert!(!work.path().join("red.png").exists());
}
