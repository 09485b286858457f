//! Models in other layouts than a plain diffusers folder, and what is wrong with some of them.

use std::fs;
use std::path::Path;

use super::{entries, golden, run, succeed, workplace};

/// Expects `dinv generate` to fail with this exit code, saying all of `expected`, without a file
/// left behind.
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
            1,
            &["a pickled file is not read", "convert it"][..],
        ),
        (
            "--model junk.safetensors",
            1,
            &["junk.safetensors: not a safetensors file"],
        ),
        (
            "--model huge.safetensors",
            1,
            &["the header claims 9223372036854775808 bytes"],
        ),
        (
            "--model none.safetensors",
            1,
            &["none.safetensors: no such file", "hint: give"],
        ),
        (
            &format!("--model {part}"),
            1,
            &["one network of a diffusers folder"],
        ),
        (
            "--model tiny.safetensors",
            1,
            &["its U-Net reads prompts of width 16"],
        ),
        (
            "--model tiny.safetensors --family sd2",
            2,
            &[
                "setting `family`: expected the family of tiny.safetensors",
                "hint: without `--fam",
            ],
        ),
        (
            "--model tiny.safetensors --family sd9",
            2,
            &["possible values: sd1, sd2-base"],
        ),
        (
            "--model tiny.safetensors --variant fp16",
            2,
            &["`variant`: expected none"],
        ),
        ("--family sd1", 2, &["`family`: expected none, since"]),
        (
            "--tokenizer model/tokenizer",
            2,
            &["`tokenizer`: expected none, since"],
        ),
        (
            "--prediction-type noise",
            2,
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
        2,
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
    assert!(told, "the picture does not tell what it was made with");
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
    refuses(work.path(), "", 1, &[expected]);
    fs::write(&index, r#"{"weight_map": {"absent": "other.safetensors"}}"#).unwrap();
    refuses(work.path(), "", 1, &["names a shard `other.safetensors`"]);
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
