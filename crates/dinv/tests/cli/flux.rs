//! Every command on a tiny FLUX.1 dev.

use tempfile::TempDir;

use super::{PAIR, copy_folder, golden, refused, succeed, workplace};

/// A workplace with the model in `tiny-flux`, and the arguments that name it.
fn work() -> TempDir {
    let work = workplace();
    copy_folder(&golden("flux"), &work.path().join("tiny-flux"));
    let settings = work.path().join("tiny.toml");
    let text = std::fs::read_to_string(&settings).unwrap();
    std::fs::write(settings, format!("{text}resolution = 16\n")).unwrap();
    work
}

const MODEL: &str = "--config tiny.toml --model tiny-flux";
const B: &str = "--b b.png --caption-b noon";

#[test]
fn a_difference_is_learned_applied_and_drawn_with() {
    let work = work();
    let at = |name: &str| work.path().join(name);
    succeed(
        work.path(),
        &format!("analogy -q {MODEL} {PAIR} {B} -o out"),
    );
    succeed(
        work.path(),
        &format!("learn -q {MODEL} {PAIR} -o d.safetensors"),
    );
    for inversion in ["edit-friendly", "ddim", "sdedit"] {
        let flags = format!("--inversion {inversion} -o {inversion}");
        succeed(
            work.path(),
            &format!("apply d.safetensors -q {MODEL} {B} {flags}"),
        );
    }
    let [first, again] =
        ["out/b_prime.png", "edit-friendly/b.png"].map(|name| image::open(at(name)).unwrap());
    assert_eq!(first, again);
    let drawn = |flags: &str| {
        let common = "--prompt red --overwrite -o red.png";
        succeed(
            work.path(),
            &format!("generate -q {MODEL} {common} {flags}"),
        );
        image::open(at("red.png")).unwrap()
    };
    let plain = drawn("");
    assert_eq!((plain.width(), plain.height()), (16, 16));
    assert_eq!(drawn("--guidance-scale 3.5"), plain);
    assert_ne!(drawn("--guidance-scale 1"), plain);
    assert_ne!(drawn("--difference d.safetensors"), plain);
}

#[test]
fn the_model_is_examined() {
    let work = work();
    let done = succeed(work.path(), "doctor --model tiny-flux").stdout;
    for part in ["transformer", "text_encoder_2", "tokenizer_2"] {
        assert!(done.contains(part), "no {part} in {done}");
    }
    let checked = succeed(work.path(), "models check tiny-flux").stdout;
    for (part, result) in [
        ("text_encoder", "hidden states [1, 512, 40]"),
        ("transformer", "prediction [1, 16, 128, 128]"),
    ] {
        let line = checked.lines().find(|line| line.starts_with(part));
        assert!(line.unwrap().contains(result), "{checked}");
    }
    std::fs::remove_dir_all(work.path().join("tiny-flux/text_encoder_2")).unwrap();
    let missing = succeed(work.path(), "doctor --model tiny-flux").stdout;
    assert!(missing.contains("missing: text_encoder_2"), "{missing}");
    let listed = succeed(work.path(), "models list").stdout;
    for (name, licence) in [
        ("flux-dev ", "flux-1-dev-non-commercial-license"),
        ("flux-schnell ", "apache-2.0"),
    ] {
        let line = listed.lines().find(|line| line.starts_with(name));
        assert!(line.unwrap().contains(licence), "{listed}");
    }
}

#[test]
fn what_does_not_fit_is_refused_in_words() {
    let work = work();
    let refuses =
        |arguments: &str, code, expected: &[&str]| refused(work.path(), arguments, code, expected);
    let generate = format!("generate {MODEL} --prompt red -o red.png");
    refuses(
        &format!("{generate} --negative-prompt blue"),
        65,
        &["setting `negative_prompt`", "reads the guidance scale"],
    );
    refuses(
        &format!("{generate} --without-t5"),
        65,
        &["setting `without_t5`", "FluxPipeline"],
    );
    refuses(
        &format!("{generate} --resolution 18"),
        65,
        &["multiples of 4"],
    );
    std::fs::remove_dir_all(work.path().join("tiny-flux/text_encoder_2")).unwrap();
    refuses(&generate, 65, &["no folder `text_encoder_2`"]);
    assert!(!work.path().join("red.png").exists());
}
