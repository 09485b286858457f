//! Every command on a tiny Stable Diffusion 3.5.

use std::path::Path;

use difference_inversion::util::arrays::{Array, Arrays};
use tempfile::TempDir;

use super::{PAIR, copy_folder, golden, refused, succeed, workplace};

/// A workplace with the model in `tiny-sd3`, and the arguments that name it.
fn work() -> TempDir {
    let work = workplace();
    copy_folder(&golden("sd3"), &work.path().join("tiny-sd3"));
    work
}

const MODEL: &str = "--config tiny.toml --model tiny-sd3";
const B: &str = "--b b.png --caption-b noon";

fn bytes(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

/// Noise of this shape in the format of `--init-latents`.
fn write_latents(path: &Path, shape: [usize; 4]) {
    let count: usize = shape.iter().product();
    let wave = (0..count).map(|i| 1.4 * (0.37 * i as f32 * i as f32).sin());
    let array = Array::floats(shape, wave.collect());
    Arrays::default()
        .with("latents", array)
        .write(path)
        .unwrap();
}

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
        &format!("learn -q {MODEL} {PAIR} -o d.safetensors --trace t.safetensors"),
    );
    assert_eq!(
        bytes(&at("d.safetensors")),
        bytes(&at("out/difference.safetensors"))
    );
    let learned = Arrays::read(&at("d.safetensors")).unwrap().arrays;
    let shapes: Vec<_> = learned
        .iter()
        .map(|(name, array)| (name.as_str(), array.shape()))
        .collect();
    assert_eq!(shapes, [("clip_g", &[3, 20][..]), ("clip_l", &[3, 16])]);
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
    write_latents(&at("latents.safetensors"), [1, 16, 8, 8]);
    let drawn = |flags: &str| {
        let common = "--prompt red --init-latents latents.safetensors --overwrite -o red.png";
        succeed(
            work.path(),
            &format!("generate -q {MODEL} {common} {flags}"),
        );
        image::open(at("red.png")).unwrap()
    };
    let plain = drawn("");
    assert_eq!((plain.width(), plain.height()), (16, 16));
    assert_ne!(drawn("--difference d.safetensors"), plain);
    // T5 is read from its file in place of the memory.
    assert_eq!(drawn("--memory low"), plain);
    // A difference learned with T5 present is applied without it.
    let without_t5 = drawn("--without-t5");
    assert_ne!(without_t5, plain);
    assert_ne!(drawn("--without-t5 --difference d.safetensors"), without_t5);
}

#[test]
fn the_model_is_examined() {
    let work = work();
    let done = succeed(work.path(), "doctor --model tiny-sd3").stdout;
    for part in ["transformer", "text_encoder_3", "tokenizer_3"] {
        assert!(done.contains(part), "no {part} in {done}");
    }
    for dtype in ["f32", "f16", "q8"] {
        let way = format!("--dtype {dtype} --memory low");
        assert!(done.contains(&way), "{done}");
    }
    let without = succeed(work.path(), "doctor --model tiny-sd3 --without-t5").stdout;
    assert!(!without.contains("text_encoder_3"), "{without}");
    assert!(!without.contains("tokenizer_3"), "{without}");
    let checked = succeed(work.path(), "models check tiny-sd3").stdout;
    for (part, result) in [
        ("text_encoder", "hidden states [1, 280, 40]"),
        ("vae", "latents [1, 16, 8, 8]"),
        ("transformer", "prediction [1, 16, 8, 8]"),
    ] {
        let line = checked.lines().find(|line| line.starts_with(part));
        assert!(line.unwrap().contains(result), "{checked}");
    }
    std::fs::remove_dir_all(work.path().join("tiny-sd3/text_encoder_3")).unwrap();
    let missing = succeed(work.path(), "doctor --model tiny-sd3").stdout;
    assert!(missing.contains("missing: text_encoder_3"), "{missing}");
    let listed = succeed(work.path(), "models list").stdout;
    for name in ["sd3 ", "sd35 ", "sd35-large "] {
        let line = listed.lines().find(|line| line.starts_with(name));
        assert!(
            line.unwrap().contains("stabilityai-ai-community"),
            "{listed}"
        );
    }
}

#[test]
fn what_does_not_fit_is_refused_in_words() {
    let work = work();
    let refuses =
        |arguments: &str, code, expected: &[&str]| refused(work.path(), arguments, code, expected);
    let generate = format!("generate {MODEL} --prompt red -o red.png");
    write_latents(&work.path().join("four.safetensors"), [1, 4, 8, 8]);
    refuses(
        &format!("{generate} --init-latents four.safetensors"),
        65,
        &["expected latents of shape [1, 16, 8, 8], found [1, 4, 8, 8]"],
    );
    refuses(
        &format!("{generate} --scheduler uni-pc"),
        65,
        &["euler or ddim"],
    );
    refuses(&format!("{generate} --resolution 64"), 65, &["at most 36"]);
    refuses(
        &format!("{generate} --unet model/unet"),
        65,
        &[
            "setting `unet`",
            "the class SD3Transformer2DModel, as the model's own",
            "UNet2DConditionModel",
        ],
    );
    refuses(
        "generate --config tiny.toml --prompt red -o red.png --without-t5",
        65,
        &["setting `without_t5`", "StableDiffusionPipeline"],
    );
    // Difference tokens of a U-Net, though on text encoders that could be the same.
    succeed(
        work.path(),
        &format!("learn -q --config tiny.toml {PAIR} -o d.safetensors"),
    );
    refuses(
        &format!("apply d.safetensors {MODEL} {B} -o out"),
        65,
        &["learned on a U-Net", "a multimodal transformer"],
    );
    std::fs::remove_dir_all(work.path().join("tiny-sd3/text_encoder_3")).unwrap();
    refuses(
        &generate,
        65,
        &["names `text_encoder_3`", "hint: `--without-t5`"],
    );
    succeed(work.path(), &format!("{generate} -q --without-t5"));
    assert!(work.path().join("red.png").is_file());
}
