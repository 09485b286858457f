//! Differences for other programs.

use difference_inversion::util::arrays::{Array, Arrays};

use super::{PAIR, refused, succeed, workplace};

/// The reading of diffusers' textual inversions is tested against diffusers, so that one that draws what the
/// difference draws is one that diffusers draws so, too.
#[test]
fn an_exported_difference_draws_as_a_word_what_it_draws_behind_the_words() {
    let work = workplace();
    let at = |name: &str| work.path().join(name);
    succeed(
        work.path(),
        &format!("learn -q --config tiny.toml {PAIR} -o night.safetensors"),
    );
    let done = succeed(
        work.path(),
        "export night.safetensors --format diffusers -o exported",
    );
    assert_eq!(done.stdout, "exported/dinv-night.safetensors\n");
    for expected in ["CAPTION <dinv-night>", "negative  CAPTION", "scale     2"] {
        assert!(done.stderr.contains(expected), "{}", done.stderr);
    }
    let drawn = |flags: &str| {
        let common = "generate -q --config tiny.toml --overwrite -o red.png";
        succeed(work.path(), &format!("{common} {flags}"));
        image::open(at("red.png")).unwrap()
    };
    let expected = drawn("--prompt red --difference night.safetensors");
    let word = "--embedding night=exported/dinv-night.safetensors --prompt";
    assert_eq!(drawn_with_word(&work, word, "red <night>"), expected);
    assert_ne!(drawn("--prompt red"), expected);

    let exists = "export night.safetensors --format diffusers -o exported";
    refused(
        work.path(),
        exists,
        64,
        &["dinv-night.safetensors", "--overwrite"],
    );
    let json = succeed(
        work.path(),
        "export night.safetensors --format diffusers --reverse --name day -o exported --json",
    );
    let json: serde_json::Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!(json["files"][0], "exported/day.safetensors");
    assert_eq!(json["prompt"], "CAPTION <day>");
    let back = "--embedding night=exported/day.safetensors --prompt";
    assert_ne!(drawn_with_word(&work, back, "red <night>"), expected);
}

/// The way back from other programs: what was exported is imported as it was, and draws the same picture.
#[test]
fn what_was_exported_is_imported_as_it_was() {
    let work = workplace();
    let at = |name: &str| work.path().join(name);
    succeed(
        work.path(),
        &format!("learn -q --config tiny.toml {PAIR} -o night.safetensors"),
    );
    succeed(
        work.path(),
        "export night.safetensors --format diffusers -o exported",
    );
    let import = "import --config tiny.toml exported/dinv-night.safetensors --resolution 7 -o back.safetensors";
    let done = succeed(work.path(), import);
    let note = "setting `resolution` has no effect";
    assert!(done.stderr.contains(note), "{}", done.stderr);
    assert_eq!(done.stdout, "back.safetensors\n");
    assert!(
        done.stderr.contains("dinv apply back.safetensors"),
        "{}",
        done.stderr
    );
    let drawn = |difference: &str| {
        let common = "generate -q --config tiny.toml --overwrite --prompt red -o red.png";
        succeed(work.path(), &format!("{common} --difference {difference}"));
        image::open(at("red.png")).unwrap()
    };
    assert_eq!(drawn("back.safetensors"), drawn("night.safetensors"));

    let refuses = |arguments: &str, code, expected: &[&str]| {
        refused(
            work.path(),
            &format!("import --config tiny.toml {arguments}"),
            code,
            expected,
        );
    };
    refuses(
        "exported/dinv-night.safetensors -o back.safetensors",
        64,
        &["back.safetensors", "--overwrite"],
    );
    refuses(
        "night.safetensors -o new.safetensors",
        65,
        &["night.safetensors: it is a difference already"],
    );
    refuses("a.png -o new.safetensors", 65, &["a.png"]);
    refuses(
        "none.safetensors -o new.safetensors",
        65,
        &["none.safetensors"],
    );
    refuses("-o new.safetensors", 64, &["FILE"]);
    std::fs::write(at("word.pt"), "x").unwrap();
    refuses(
        "word.pt -o new.safetensors",
        65,
        &["word.pt", "a pickled file is not read"],
    );
    let many = Array::floats([100, 16], vec![0.5; 1600]);
    let many = Arrays::default().with("emb_params", many);
    many.write(&at("many.safetensors")).unwrap();
    refuses(
        "many.safetensors -o new.safetensors",
        65,
        &["many.safetensors: 100 vectors, and a prompt has room for at most"],
    );
    #[cfg(unix)]
    {
        let made = std::process::Command::new("mkfifo")
            .arg(at("pipe"))
            .status();
        assert!(made.unwrap().success());
        refuses(
            "pipe -o new.safetensors",
            65,
            &["pipe: expected a file, found a pipe"],
        );
        let replaced =
            "generate --config tiny.toml --prompt red --difference pipe --overwrite -o red.png";
        refused(
            work.path(),
            replaced,
            65,
            &["pipe: expected a file, found a pipe"],
        );
    }
    let unet = "model/unet/diffusion_pytorch_model.safetensors -o new.safetensors";
    refuses(unet, 65, &["not a textual inversion"]);
    let twice =
        "exported/dinv-night.safetensors exported/dinv-night.safetensors -o new.safetensors";
    refuses(twice, 65, &["vectors for the same text encoder"]);
    let other = "exported/dinv-night.safetensors --embedding a.safetensors -o new.safetensors";
    refuses(other, 64, &["--embedding"]);
    assert!(!at("new.safetensors").exists());
}

/// Draws with a prompt of several words.
fn drawn_with_word(work: &tempfile::TempDir, flags: &str, prompt: &str) -> image::DynamicImage {
    let mut command = super::dinv(work.path());
    command.args([
        "generate",
        "-q",
        "--config",
        "tiny.toml",
        "--overwrite",
        "-o",
        "word.png",
    ]);
    command.args(flags.split_whitespace()).arg(prompt);
    let done = command.output().unwrap();
    assert!(
        done.status.success(),
        "{}",
        String::from_utf8_lossy(&done.stderr)
    );
    image::open(work.path().join("word.png")).unwrap()
}

#[test]
fn what_cannot_be_exported_is_refused_in_words() {
    let work = workplace();
    succeed(
        work.path(),
        &format!("learn -q --config tiny.toml {PAIR} -o night.safetensors"),
    );
    let refuses = |arguments: &str, code, expected: &[&str]| {
        refused(work.path(), &format!("export {arguments}"), code, expected);
    };
    refuses(
        "night.safetensors --format a1111 -o exported",
        65,
        &[
            "for which A1111 reads no textual inversions",
            "Stable Diffusion 1, 2 and XL",
        ],
    );
    refuses(
        "night.safetensors --format diffusers --name <n> -o exported",
        64,
        &["--name: expected letters", "`<n>`"],
    );
    refuses("a.png --format diffusers -o exported", 65, &["a.png"]);
    assert!(!work.path().join("exported").exists());
}
