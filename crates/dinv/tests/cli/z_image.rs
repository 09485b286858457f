//! Every command on a tiny Z-Image.

use tempfile::TempDir;

use super::{PAIR, copy_folder, golden, refused, succeed, workplace};

/// A workplace with the tiny model of a golden folder in `tiny`.
pub(super) fn work_with(model: &str) -> TempDir {
    let work = workplace();
    copy_folder(&golden(model), &work.path().join("tiny"));
    let path = work.path().join("tiny.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(path, format!("{text}resolution = 16\n")).unwrap();
    work
}

pub(super) const MODEL: &str = "--config tiny.toml --model tiny";
const B: &str = "--b b.png --caption-b noon";

/// Learns, applies and draws with a model that reads prompts with one encoder, which has no joint space, and is guided by
/// negative prompts.
pub(super) fn check_everything(work: &TempDir) {
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
fn a_difference_is_learned_applied_and_drawn_with() {
    check_everything(&work_with("z_image"));
}

#[test]
fn the_model_is_examined() {
    let work = work_with("z_image");
    let done = succeed(work.path(), "doctor --model tiny").stdout;
    for part in ["transformer", "text_encoder", "tokenizer"] {
        assert!(done.contains(part), "no {part} in {done}");
    }
    let checked = succeed(work.path(), "models check tiny").stdout;
    for (part, result) in [
        ("vae", "latents [1, 8, 128, 128]"),
        ("transformer", "prediction [1, 8, 128, 128]"),
    ] {
        let line = checked.lines().find(|line| line.starts_with(part));
        assert!(line.unwrap().contains(result), "{checked}");
    }
    let listed = succeed(work.path(), "models list").stdout;
    for name in ["z-image ", "z-image-turbo "] {
        let line = listed.lines().find(|line| line.starts_with(name));
        assert!(line.unwrap().contains("apache-2.0"), "{listed}");
    }
}

#[test]
fn what_does_not_fit_is_refused_in_words() {
    let work = work_with("z_image");
    let generate = format!("generate {MODEL} --prompt red -o red.png");
    let refuses = |flags: &str, code, expected: &[&str]| {
        refused(work.path(), &format!("{generate} {flags}"), code, expected);
    };
    refuses("--resolution 18", 65, &["multiples of 4"]);
    refuses("--resolution 512", 65, &["`resolution`", "at most 256"]);
    let config = work.path().join("tiny/transformer/config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let omni = text.replace("\"siglip_feat_dim\": null", "\"siglip_feat_dim\": 1152");
    std::fs::write(config, omni).unwrap();
    refuses("", 65, &["`siglip_feat_dim`", "Z-Image Omni"]);
    assert!(!work.path().join("red.png").exists());
}
