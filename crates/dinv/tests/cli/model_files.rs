//! Models in layouts other than a plain diffusers folder, and the errors of invalid ones.

use std::fs;
use std::path::Path;

use super::{PAIR, dinv, entries, golden, refused, run, succeed, workplace};

/// Expects `dinv generate` to fail with this exit code and all of `expected` in its message, without leaving a
/// file.
fn refuses(work: &Path, flags: &str, code: i32, expected: &[&str]) {
    let before = entries(work);
    let arguments = format!("generate --config tiny.toml --prompt red {flags}");
    let done = run(work, &arguments);
    assert_eq!(done.code, Some(code), "{arguments}\n{}", done.stderr);
    for text in expected.iter().chain(&["error: "]) {
        let found = done.stderr.contains(text);
        assert!(found, "{arguments}: no `{text}` in\n{}", done.stderr);
    }
    assert!(!done.stderr.contains("panicked"), "{}", done.stderr);
    assert_eq!(entries(work), before, "{arguments} left files behind");
}

#[test]
fn single_files_that_cannot_be_opened_say_why() {
    let work = workplace();
    let file = work.path().join("tiny.safetensors");
    fs::copy(golden("single_file/sd1.safetensors"), &file).unwrap();
    fs::write(work.path().join("model.ckpt"), "junk").unwrap();
    fs::write(work.path().join("junk.safetensors"), "junk").unwrap();
    let claim = (1_u64 << 63).to_le_bytes();
    fs::write(work.path().join("huge.safetensors"), claim).unwrap();
    let part = "model/unet/diffusion_pytorch_model.safetensors";
    for (flags, code, expected) in [
        (
            "--model model.ckpt",
            65,
            &["a pickled file is not read", "convert it"][..],
        ),
        (
            "--model junk.safetensors",
            65,
            &["junk.safetensors: not a safetensors file"],
        ),
        (
            "--model huge.safetensors",
            65,
            &["the header claims 9223372036854775808 bytes"],
        ),
        (
            "--model none.safetensors",
            65,
            &["none.safetensors: no such file", "hint: give"],
        ),
        (
            &format!("--model {part}"),
            65,
            &["one network of a diffusers folder"],
        ),
        (
            "--model tiny.safetensors",
            65,
            &["its U-Net reads prompts of width 16"],
        ),
        (
            "--model tiny.safetensors --family sd2",
            65,
            &[
                "setting `family`: expected the family of tiny.safetensors",
                "hint: without `--fam",
            ],
        ),
        (
            "--model tiny.safetensors --family sd9",
            64,
            &["possible values: sd1, sd2-base"],
        ),
        (
            "--model tiny.safetensors --variant fp16",
            65,
            &["`variant`: expected none"],
        ),
        ("--family sd1", 65, &["`family`: expected none, since"]),
        (
            "--tokenizer model/tokenizer",
            65,
            &["`tokenizer`: expected none, since"],
        ),
        (
            "--prediction-type noise",
            64,
            &["possible values: epsilon, v_prediction"],
        ),
    ] {
        refuses(work.path(), flags, code, expected);
    }
}

#[test]
fn networks_without_the_variant_are_read_as_they_are() {
    let work = workplace();
    let model = work.path().join("model");
    refuses(
        work.path(),
        "--variant fp16",
        65,
        &["setting `variant`: expected one that a network in model has, found fp16"],
    );
    for (network, stem) in [
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ] {
        let from = model.join(network).join(format!("{stem}.safetensors"));
        fs::rename(
            &from,
            model.join(network).join(format!("{stem}.fp16.safetensors")),
        )
        .unwrap();
        succeed(
            work.path(),
            "generate -q --config tiny.toml --prompt red --variant fp16 -o one.png --overwrite",
        );
    }
    succeed(
        work.path(),
        "generate -q --config tiny.toml --prompt red -o other.png",
    );
    let read = |name: &str| image::open(work.path().join(name)).unwrap().into_rgb8();
    assert_eq!(read("one.png"), read("other.png"));
}

#[test]
fn the_prediction_type_can_be_overridden() {
    let work = workplace();
    let scheduler = work.path().join("model/scheduler/scheduler_config.json");
    let text = fs::read_to_string(&scheduler).unwrap();
    let zero = "\"rescale_betas_zero_snr\": true"; // from pure noise, noise cannot be predicted
    assert!(text.contains(zero));
    fs::write(
        &scheduler,
        text.replace(zero, &zero.replace("true", "false")),
    )
    .unwrap();
    for (flag, name) in [
        ("", "model.png"),
        ("--prediction-type v_prediction", "same.png"),
        ("--prediction-type epsilon", "noise.png"),
    ] {
        let arguments = format!("generate -q --config tiny.toml --prompt red {flag} -o {name}");
        succeed(work.path(), &arguments);
    }
    let read = |name: &str| image::open(work.path().join(name)).unwrap().into_rgb8();
    let bytes = fs::read(work.path().join("noise.png")).unwrap();
    let told = String::from_utf8_lossy(&bytes).contains(r#""prediction_type":"epsilon""#);
    assert!(told, "the picture does not state what it was made with");
    assert_eq!(read("model.png"), read("same.png"));
    assert_ne!(read("model.png"), read("noise.png"));
}

#[test]
fn shards_that_do_not_fit_their_index_are_named() {
    let work = workplace();
    let unet = work.path().join("model/unet");
    let stem = "diffusion_pytorch_model";
    let shard = unet.join("shard.safetensors");
    fs::rename(unet.join(format!("{stem}.safetensors")), &shard).unwrap();
    let index = unet.join(format!("{stem}.safetensors.index.json"));
    fs::write(&index, r#"{"weight_map": {"absent": "shard.safetensors"}}"#).unwrap();
    let expected = "says that tensor `absent` is in `shard.safetensors`, where it is not";
    refuses(work.path(), "", 65, &[expected]);
    fs::write(&index, r#"{"weight_map": {"absent": "other.safetensors"}}"#).unwrap();
    refuses(work.path(), "", 65, &["names a shard `other.safetensors`"]);
    let bytes = fs::read(&shard).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    let header = &bytes[8..8 + usize::try_from(header).unwrap()];
    let header: serde_json::Value = serde_json::from_slice(header).unwrap();
    let keys = header
        .as_object()
        .unwrap()
        .keys()
        .filter(|key| *key != "__metadata__");
    let map: Vec<String> = keys
        .map(|key| format!("{key:?}: \"shard.safetensors\""))
        .collect();
    fs::write(
        &index,
        format!("{{\"weight_map\": {{{}}}}}", map.join(", ")),
    )
    .unwrap();
    succeed(work.path(), "generate -q --config tiny.toml --prompt red");
}

#[test]
fn doctor_looks_into_single_files() {
    let work = workplace();
    fs::copy(
        golden("single_file/sd1.safetensors"),
        work.path().join("tiny.safetensors"),
    )
    .unwrap();
    let done = run(work.path(), "doctor --model tiny.safetensors");
    assert_eq!(done.code, Some(1), "{}", done.stderr);
    assert!(
        done.stdout.contains("prompts of width 16"),
        "{}",
        done.stdout
    );
}

/// A LoRA changes pictures, is recorded, and belongs to a difference learned with it.
#[test]
fn loras_are_merged_and_recorded() {
    let work = workplace();
    let folder = work.path();
    for (name, file) in [("style", "sd1_kohya"), ("xl", "sdxl_kohya")] {
        let from = golden("lora").join(format!("{file}.safetensors"));
        fs::copy(from, folder.join(format!("{name}.safetensors"))).unwrap();
    }
    let draw = |flags: &str, output: &str| {
        let settings = "generate -q --config tiny.toml --prompt red";
        succeed(folder, &format!("{settings} {flags} -o {output}"));
        image::open(folder.join(output)).unwrap().into_rgb8()
    };
    let plain = draw("", "plain.png");
    let styled = draw("--lora style.safetensors:0.7", "styled.png");
    assert_ne!(plain, styled);
    assert_eq!(draw("--lora style.safetensors:0", "none.png"), plain);
    let halves = "--lora style.safetensors:0.9 --lora style.safetensors:-0.2";
    let halves = draw(halves, "halves.png");
    let pairs = halves.as_raw().iter().zip(styled.as_raw());
    assert!(pairs.map(|(x, y)| x.abs_diff(*y)).max() <= Some(1));
    let text = fs::read(folder.join("styled.png")).unwrap();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(
        text.contains(r#""lora":["style.safetensors:0.7"]"#),
        "{text}"
    );

    // In a settings file, relative to it.
    let settings = fs::read_to_string(folder.join("tiny.toml")).unwrap();
    let settings = format!("{settings}lora = 'style.safetensors:0.7'\n");
    fs::write(folder.join("style.toml"), settings).unwrap();
    succeed(
        folder,
        &format!("analogy -q --config style.toml {PAIR} --b b.png --caption-b day -o out"),
    );
    let run = fs::read_to_string(folder.join("out/run.json")).unwrap();
    let run: serde_json::Value = serde_json::from_str(&run).unwrap();
    assert_eq!(
        run["settings"]["lora"],
        serde_json::json!(["style.safetensors:0.7"])
    );
    let hashed = run["model_files"].as_object().unwrap();
    assert!(
        hashed
            .keys()
            .any(|file| file.ends_with("style.safetensors")),
        "{hashed:?}"
    );
    let apply = "apply out/difference.safetensors --b b.png --caption-b day -o applied";
    let expected =
        "learned with the LoRA style.safetensors:0.7, which changes the text encoder: give it with";
    refused(
        folder,
        &format!("{apply} --config tiny.toml"),
        65,
        &[expected],
    );
    succeed(folder, &format!("{apply} --config style.toml"));

    refuses(
        folder,
        "--lora xl.safetensors",
        65,
        &["xl.safetensors: a LoRA for Stable Diffusion XL"],
    );
    refuses(
        folder,
        "--lora style.safetensors:inf",
        65,
        &["setting `lora`: expected a finite weight"],
    );
    refuses(
        folder,
        "--lora absent.safetensors",
        65,
        &["absent.safetensors: ", "hint: check the spelling"],
    );
    let doctor = run_doctor(folder, "--lora style.safetensors");
    assert!(
        doctor.contains("lora ") && !doctor.contains("lora (every picture)"),
        "{doctor}"
    );
    let doctor = run_doctor(folder, "--lora xl.safetensors");
    assert!(
        doctor.contains("missing: lora (every picture)")
            && doctor.contains("for Stable Diffusion XL"),
        "{doctor}"
    );
}

fn run_doctor(folder: &Path, flags: &str) -> String {
    run(folder, &format!("doctor --model model {flags}")).stdout
}

/// A textual inversion is a word; a difference given as one is likely meant to follow the prompt.
#[test]
fn embeddings_are_words_of_prompts() {
    let work = workplace();
    let folder = work.path();
    fs::copy(
        golden("parts/kohya.safetensors"),
        folder.join("toy.safetensors"),
    )
    .unwrap();
    let draw = |prompt: &str, flags: &str, output: &str| {
        let mut command = super::dinv(folder);
        let settings = "generate --overwrite --config tiny.toml -o";
        command
            .args(settings.split(' '))
            .args([output, "--prompt", prompt]);
        let done: super::Done = command
            .args(flags.split_whitespace())
            .output()
            .unwrap()
            .into();
        assert_eq!(done.code, Some(0), "{}", done.stderr);
        (
            image::open(folder.join(output)).unwrap().into_rgb8(),
            done.stderr,
        )
    };
    let (plain, note) = draw("a <toy>", "", "plain.png");
    assert!(note.contains("`<toy>` is read as plain text"), "{note}");
    let (toy, note) = draw("a <toy>", "--embedding toy.safetensors", "toy.png");
    assert!(plain != toy && !note.contains("plain text"), "{note}");
    let (other, _) = draw("a <cat>", "--embedding cat=toy.safetensors", "cat.png");
    assert_eq!(toy, other);
    let (_, note) = draw("a house", "--embedding toy.safetensors", "none.png");
    assert!(
        note.contains("toy.safetensors changes nothing: write `<toy>` in the prompt"),
        "{note}"
    );

    succeed(
        folder,
        &format!("learn -q --config tiny.toml {PAIR} -o night.safetensors"),
    );
    refuses(
        folder,
        "--embedding night.safetensors",
        64,
        &[
            "night.safetensors is a difference",
            "`--difference night.safetensors` appends it",
        ],
    );
    draw("a <night>", "--embedding night.safetensors", "night.png");
    refuses(
        folder,
        "--embedding model/unet/diffusion_pytorch_model.safetensors",
        65,
        &["not a textual inversion"],
    );
}

#[test]
fn another_autoencoder_and_clip_skip_are_recorded() {
    let work = workplace();
    let folder = work.path();
    super::copy_folder(&golden("parts/vae"), &folder.join("other-vae"));
    succeed(
        folder,
        "generate -q --config tiny.toml --prompt red --vae other-vae --clip-skip 1 -o x.png",
    );
    let text = fs::read(folder.join("x.png")).unwrap();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(
        text.contains(r#""clip_skip":1"#) && text.contains(r#""vae":"other-vae""#),
        "{text}"
    );
    refuses(
        folder,
        "--clip-skip 9",
        65,
        &["setting `clip_skip`: expected less than 2"],
    );
    refuses(
        folder,
        "--vae model/unet",
        65,
        &["`_class_name`: expected AutoencoderKL"],
    );
}

/// Paths in a settings file are relative to it, and the flag with two names has both there.
#[test]
fn networks_in_a_settings_file_are_found_beside_it() {
    let work = workplace();
    let at = |name: &str| work.path().join(name);
    super::copy_folder(&golden("z_image"), &at("tiny-z"));
    fs::create_dir_all(at("settings/own")).unwrap();
    for (from, to) in [
        (
            "transformer/diffusion_pytorch_model.safetensors",
            "dit.safetensors",
        ),
        ("text_encoder/model.safetensors", "qwen.safetensors"),
    ] {
        fs::copy(golden("z_image").join(from), at("settings/own").join(to)).unwrap();
    }
    for name in ["transformer", "unet"] {
        let settings = format!(
            "model = \"../tiny-z\"\nresolution = 16\n{name} = \"own/dit.safetensors\"\n\
             text_encoder = [\"own/qwen.safetensors\"]\nnum_inference_steps = 2\n"
        );
        fs::write(at("settings/z.toml"), settings).unwrap();
        let generate = "generate -q --config settings/z.toml --prompt red --overwrite -o red.png";
        succeed(work.path(), generate);
    }
    fs::remove_file(at("settings/own/dit.safetensors")).unwrap();
    fs::create_dir_all(at("own")).unwrap();
    fs::copy(
        golden("z_image").join("transformer/diffusion_pytorch_model.safetensors"),
        at("own/dit.safetensors"),
    )
    .unwrap();
    let done = run(
        work.path(),
        "generate --config settings/z.toml --prompt red -o other.png",
    );
    assert_eq!(done.code, Some(65));
    assert!(
        done.stderr.contains("settings/own/dit.safetensors"),
        "{}",
        done.stderr
    );
}

#[test]
fn a_model_in_8_bits_draws_nearly_the_same() {
    let work = tempfile::tempdir().unwrap();
    let drawn = |dtype: &str| {
        let flags =
            "generate -q --num-inference-steps 4 --device cpu --overwrite -o drawn.png --dtype";
        let done = dinv(work.path())
            .args(flags.split(' '))
            .args([
                dtype,
                "--prompt",
                "a large red house on sand at sunset, flat",
            ])
            .output()
            .unwrap();
        assert!(done.status.success(), "{done:?}");
        image::open(work.path().join("drawn.png"))
            .unwrap()
            .to_rgb8()
    };
    let (half, packed) = (drawn("f16"), drawn("q8"));
    assert_ne!(packed, half);
    let pixels = packed.as_raw().iter().zip(half.as_raw());
    let differences: u64 = pixels.map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
    let mean = differences as f64 / half.as_raw().len() as f64;
    assert!(mean < 1.0, "{mean} of 255");
    let refusal = run(work.path(), "generate --prompt boat --dtype q9 -o x.png");
    assert_eq!(refusal.code, Some(64), "{}", refusal.stderr);
}
