//! Every command on a tiny FLUX.2 klein, base and distilled.

use tempfile::TempDir;

use super::{PAIR, copy_folder, golden, refused, succeed, workplace};

/// A workplace with the models in `tiny-base` and `tiny-distilled`, and the arguments that name them.
fn work() -> TempDir {
    let work = workplace();
    for name in ["tiny-base", "tiny-distilled"] {
        copy_folder(&golden("klein"), &work.path().join(name));
    }
    let edit = |name: &str, change: &dyn Fn(String) -> String| {
        let path = work.path().join(name);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(path, change(text)).unwrap();
    };
    edit("tiny-distilled/model_index.json", &|text| {
        text.replace("\"is_distilled\": false", "\"is_distilled\": true")
    });
    edit("tiny.toml", &|text| format!("{text}resolution = 16\n"));
    work
}

const BASE: &str = "--config tiny.toml --model tiny-base";
const DISTILLED: &str = "--config tiny.toml --model tiny-distilled";
const B: &str = "--b b.png --caption-b noon";

#[test]
fn a_difference_is_learned_on_base_applied_to_both_and_drawn_with() {
    let work = work();
    let at = |name: &str| work.path().join(name);
    let done = succeed(work.path(), &format!("analogy {BASE} {PAIR} {B} -o out"));
    for note in ["follows only the captions", "the direction of a token"] {
        assert!(done.stderr.contains(note), "{}", done.stderr);
    }
    succeed(
        work.path(),
        &format!("learn -q {BASE} {PAIR} -o d.safetensors"),
    );
    for (folder, model) in [("base", BASE), ("distilled", DISTILLED)] {
        succeed(
            work.path(),
            &format!("apply d.safetensors -q {model} {B} -o {folder}"),
        );
    }
    let opened = |name: &str| image::open(at(name)).unwrap();
    assert_eq!(opened("out/b_prime.png"), opened("base/b.png"));
    assert_eq!(opened("distilled/b.png").width(), 16);
    let drawn = |model: &str, flags: &str| {
        let common = "--prompt red --overwrite -o red.png";
        succeed(
            work.path(),
            &format!("generate -q {model} {common} {flags}"),
        );
        opened("red.png")
    };
    let plain = drawn(BASE, "");
    assert_eq!(drawn(BASE, "--guidance-scale 7.5"), plain);
    assert_ne!(drawn(BASE, "--negative-prompt blue"), plain);
    assert_ne!(drawn(BASE, "--difference d.safetensors"), plain);
    let distilled = drawn(DISTILLED, "");
    assert_eq!(drawn(BASE, "--guidance-scale 1"), distilled);
    assert_ne!(distilled, plain);
}

#[test]
fn the_model_is_examined() {
    let work = work();
    let done = succeed(work.path(), "doctor --model tiny-base").stdout;
    for part in ["transformer", "text_encoder", "tokenizer"] {
        assert!(done.contains(part), "no {part} in {done}");
    }
    let checked = succeed(work.path(), "models check tiny-base").stdout;
    for (part, result) in [
        ("text_encoder", "hidden states [1, 512, 48]"),
        ("vae", "latents [1, 32, 64, 64]"),
        ("transformer", "prediction [1, 32, 64, 64]"),
    ] {
        let line = checked.lines().find(|line| line.starts_with(part));
        assert!(line.unwrap().contains(result), "{checked}");
    }
    let listed = succeed(work.path(), "models list").stdout;
    for (name, licence) in [
        ("klein-base ", "apache-2.0"),
        ("klein ", "apache-2.0"),
        ("klein-base-9b ", "flux-non-commercial-license"),
        ("klein-9b ", "flux-non-commercial-license"),
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
    let generate = |model: &str| format!("generate {model} --prompt red -o red.png");
    refuses(
        &format!("{} --negative-prompt blue", generate(DISTILLED)),
        65,
        &["setting `negative_prompt`", "draws without guidance"],
    );
    refuses(
        &format!("{} --guidance-scale 4", generate(DISTILLED)),
        65,
        &["setting `guidance_scale`", "1 or less"],
    );
    refuses(
        &format!("{} --resolution 18", generate(BASE)),
        65,
        &["multiples of 4"],
    );
    let config = work.path().join("tiny-base/transformer/config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let dev = text.replace("\"guidance_embeds\": false", "\"guidance_embeds\": true");
    std::fs::write(config, dev).unwrap();
    refuses(&generate(BASE), 65, &["`guidance_embeds`", "FLUX.2 dev"]);
    assert!(!work.path().join("red.png").exists());
}
