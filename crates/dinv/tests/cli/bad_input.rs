//! Bad input: a clear message that names the file or flag, the right exit code, nothing left behind.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::{Done, PAIR, entries, golden, run, succeed, workplace};

/// Runs the program in a workplace, expects it to fail, and checks its message and that it left no
/// file.
fn refuses(work: &Path, arguments: &str, code: i32, expected: &[&str]) -> Done {
    let before = entries(work);
    let done = run(work, arguments);
    check(&done, arguments, code, expected);
    assert_eq!(entries(work), before, "{arguments} left files behind");
    done
}

fn check(done: &Done, arguments: &str, code: i32, expected: &[&str]) {
    assert_eq!(done.code, Some(code), "{arguments}\n{}", done.stderr);
    assert_eq!(done.stdout, "", "{arguments}");
    assert!(
        !done.stderr.contains("panicked"),
        "{arguments}\n{}",
        done.stderr
    );
    for text in expected {
        assert!(
            done.stderr.contains(text),
            "{arguments}: no `{text}` in\n{}",
            done.stderr
        );
    }
}

const B: &str = "--b b.png --caption-b noon";

#[test]
fn a_folder_in_place_of_a_file_gets_a_hint() {
    let work = workplace();
    let analogy = format!("analogy --config tiny.toml {PAIR} --b model");
    let hint = "`dinv apply FILE --b model -o DIR`";
    refuses(
        work.path(),
        &analogy,
        65,
        &["model: a folder, expected a picture", hint],
    );
    fs::create_dir(work.path().join("out")).unwrap();
    let apply = "apply out --config tiny.toml --b b.png -o o";
    let message = "out: a folder, expected a difference";
    refuses(work.path(), apply, 65, &[message]);
    fs::write(work.path().join("out/difference.safetensors"), "").unwrap();
    let hint = "did you mean out/difference.safetensors?";
    refuses(work.path(), apply, 65, &[message, hint]);
}

#[test]
fn wrong_usage_exits_with_64_and_names_the_flag() {
    let work = workplace();
    let cases = [
        ("", "Usage: dinv <COMMAND>"),
        ("dream", "unrecognized subcommand 'dream'"),
        (
            "generate --prompt x --device gpu",
            "hint: `--device auto` takes the first GPU",
        ),
        (
            "a.png a_prime.png b.png",
            "hint: dinv analogy --a a.png --a-prime a_prime.png --b b.png",
        ),
        ("analogy --b b.png", "`--b` needs `--a` and `--a-prime`"),
        ("analogy --a a.png --a-prime b.png", "`--b` is missing"),
        (
            "analogy --a a.png --b b.png",
            "one `--a-prime` for every `--a`, found 0 and 1",
        ),
        ("learn", "`--a` and `--a-prime` are missing"),
        (
            "learn --a a.png --a-prime b.png --caption-a x --caption-a y",
            "`--caption-a` not at all or once for every `--a`, found 2 and 1",
        ),
        (
            "apply d.safetensors --b b.png",
            "arguments were not provided:\n  --output <DIR>",
        ),
        (
            "apply d.safetensors --b b.png model/b.jpg -o o",
            "both be written to b.png",
        ),
        (
            "apply d.safetensors --b b.png --caption-b x --caption-b y -o o",
            "`--caption-b` not at all or once for every `--b`, found 2 and 1",
        ),
        (
            "generate -o x.png",
            "arguments were not provided:\n  --prompt <TEXT>",
        ),
        (
            "generate --prompt x --scheduler magic",
            "[possible values: ddim",
        ),
        (
            "analogy --inversion none",
            "[possible values: edit-friendly, ddim, sdedit]",
        ),
        (
            "analogy --steps many",
            "invalid value 'many' for '--steps <N>'",
        ),
        (
            "analogy --initialisation ones",
            "expected `zero`, `random` or `word:TEXT`",
        ),
        (
            "analogy --strength nan",
            "invalid value 'nan' for '--strength <S>': expected a finite number",
        ),
        (
            "generate --prompt x --model model -o house.jpg",
            "house.jpg: pictures are written as PNG",
        ),
        ("caption", "arguments were not provided:\n  <IMAGE>..."),
        (
            "learn --a a.png --a-prime b.png --model model --device metal",
            "device `metal` is not built into this program\nhint: build it with",
        ),
    ];
    for (arguments, expected) in cases {
        refuses(work.path(), arguments, 64, &[expected]);
    }
    // Values that a settings file could have, too.
    for (size, expected) in [
        (
            "large",
            "resolution: expected 512 or 768x512, found `large`",
        ),
        (
            "21x16",
            "`resolution`: expected multiples of 4, found 21×16",
        ),
    ] {
        let generate = format!("generate --prompt x --model model --resolution {size}");
        refuses(work.path(), &generate, 65, &[expected]);
    }
}

#[test]
fn settings_without_sense_are_named() {
    let work = workplace();
    let learn = format!("learn --config tiny.toml {PAIR}");
    for (flag, expected) in [
        ("--alpha 1.5", "`alpha`: expected 0 to 1, found 1.5"),
        ("--steps 0", "`steps`: expected at least 1, found 0"),
        (
            "--num-tokens 0",
            "`num_tokens`: expected at least 1, found 0",
        ),
        (
            "--learning-rate=-1",
            "`learning_rate`: expected a number above 0 and at most 100, found -1",
        ),
        ("--num-tokens 1000", "`num_tokens`: expected at most 38, "),
    ] {
        refuses(
            work.path(),
            &format!("{learn} {flag}"),
            65,
            &["error: ", expected],
        );
    }
    let analogy = format!("analogy --config tiny.toml {PAIR} {B}");
    for (flag, expected) in [
        (
            "--skip 1",
            "`skip`: expected 0 or more, less than 1, found 1",
        ),
        (
            "--num-inference-steps 0",
            "`num_inference_steps`: expected at least 1, found 0",
        ),
        (
            "--sdedit-strength 2",
            "`sdedit_strength`: expected 0 to 1, found 2",
        ),
    ] {
        refuses(
            work.path(),
            &format!("{analogy} {flag}"),
            65,
            &["error: ", expected],
        );
    }
}

#[test]
fn a_schedule_too_long_is_refused_before_anything_is_learned() {
    let work = workplace();
    let done = refuses(
        work.path(),
        &format!("analogy --config tiny.toml {PAIR} {B} --num-inference-steps 5000"),
        65,
        &["`num_inference_steps`: expected 1 to "],
    );
    assert!(!done.stderr.contains("learning: "), "{}", done.stderr);
}

#[test]
fn no_picture_is_replaced_by_its_result() {
    let work = workplace();
    succeed(
        work.path(),
        &format!("learn -q --config tiny.toml {PAIR} -o d.safetensors"),
    );
    let b = fs::read(work.path().join("b.png")).unwrap();
    for command in [
        format!("apply d.safetensors --config tiny.toml {B} -o . --overwrite"),
        format!("apply d.safetensors --config tiny.toml {B} -o ."),
        format!("apply d.safetensors --config tiny.toml {B} -o . --skip-existing"),
        "generate --config tiny.toml --prompt x --image b.png -o ./b.png --overwrite".to_owned(),
    ] {
        let expected = ["b.png: this is one of the inputs", "hint: write elsewhere"];
        refuses(work.path(), &command, 64, &expected);
    }
    assert_eq!(fs::read(work.path().join("b.png")).unwrap(), b);
    let command = format!("apply d.safetensors --config tiny.toml {B} -o night.png");
    refuses(
        work.path(),
        &command,
        64,
        &["expected the name of a folder"],
    );
    let long =
        format!("apply d.safetensors --config tiny.toml {B} -o o --num-inference-steps 5000");
    refuses(
        work.path(),
        &long,
        65,
        &["`num_inference_steps`: expected 1 to "],
    );
}

#[test]
fn settings_files_are_checked() {
    let work = workplace();
    let write = |text: &str| fs::write(work.path().join("bad.toml"), text).unwrap();
    let learn = format!("learn --model model {PAIR} --config bad.toml");
    write("alhpa = 0.5\n");
    let expected = [
        "bad.toml: there is no setting `alhpa`",
        "hint: did you mean `alpha`?",
    ];
    refuses(work.path(), &learn, 65, &expected);
    write("steps = 'many'\n");
    refuses(
        work.path(),
        &learn,
        65,
        &["bad.toml: `steps`: invalid type: string \"many\""],
    );
    write("steps = \n");
    refuses(
        work.path(),
        &learn,
        65,
        &["bad.toml: TOML parse error at line 1"],
    );
    write("inversion = 'magic'\n");
    refuses(
        work.path(),
        &learn,
        65,
        &["bad.toml: `inversion`: unknown variant `magic`"],
    );
    fs::remove_file(work.path().join("bad.toml")).unwrap();
    refuses(
        work.path(),
        &learn,
        65,
        &["bad.toml: No such file", "hint: check the spelling"],
    );

    fs::write(work.path().join("model/dinv.json"), r#"{ "setps": 3 }"#).unwrap();
    let learn = format!("learn --model model {PAIR}");
    refuses(
        work.path(),
        &learn,
        65,
        &["model/dinv.json: there is no setting `setps`", "`steps`"],
    );
}

#[test]
fn pictures_that_cannot_be_used_are_named() {
    let work = workplace();
    let whole = fs::read(work.path().join("a.png")).unwrap();
    fs::write(work.path().join("half.png"), &whole[..whole.len() / 2]).unwrap();
    fs::write(work.path().join("text.png"), "not a picture").unwrap();
    fs::write(work.path().join("empty.png"), "").unwrap();
    image::RgbImage::new(1, 1)
        .save(work.path().join("dot.png"))
        .unwrap();
    let mut huge = Vec::new();
    png::Encoder::new(&mut huge, 100_000, 100_000)
        .write_header()
        .unwrap()
        .write_chunk(png::chunk::IDAT, &[0x78, 0x01])
        .unwrap();
    fs::write(work.path().join("huge.png"), huge).unwrap();
    image::RgbImage::new(8, 801)
        .save(work.path().join("narrow.png"))
        .unwrap();
    let jpeg = fs::read(golden("images/cmyk.jpg")).unwrap();
    fs::write(work.path().join("half.jpg"), &jpeg[..jpeg.len() / 2]).unwrap();
    for (name, expected) in [
        ("absent.png", "absent.png: No such file"),
        ("half.png", "half.png: cannot be decoded"),
        ("half.jpg", "half.jpg: cannot be decoded"),
        ("text.png", "text.png: not a picture"),
        ("empty.png", "empty.png: the file is empty"),
        ("dot.png", "dot.png: 1×1 pixels, expected at least 8×8"),
        (
            "narrow.png",
            "narrow.png: 8×801 pixels, expected one side at most 100 times as long as the other",
        ),
        (
            "huge.png",
            "huge.png: 100000×100000 pixels, expected at most 300 megapixels",
        ),
    ] {
        let arguments = format!("analogy --config tiny.toml {PAIR} --b {name} -o out");
        refuses(work.path(), &arguments, 65, &["error: ", expected]);
        refuses(
            work.path(),
            &format!("caption --model model {name}"),
            65,
            &["error: ", expected],
        );
    }
    // `caption` takes folders of pictures, `analogy` only single pictures.
    for (command, expected) in [
        (
            format!("analogy --config tiny.toml {PAIR} --b model -o out"),
            "model: a folder, expected a picture",
        ),
        (
            "caption --model model model".to_owned(),
            "model: there is no picture in this folder",
        ),
    ] {
        refuses(work.path(), &command, 65, &["error: ", expected]);
    }
}

#[test]
fn equal_pictures_have_no_difference() {
    let work = workplace();
    let arguments = format!("analogy --config tiny.toml --a a.png --a-prime a.png {B} -o out");
    refuses(
        work.path(),
        &arguments,
        65,
        &["there is no difference to learn"],
    );
}

#[test]
fn a_model_that_cannot_be_used_is_named() {
    type Harm = fn(&Path);
    fn edit(path: &Path, from: &str, to: &str) {
        let text = fs::read_to_string(path).unwrap();
        assert!(text.contains(from), "{from} is not in {text}");
        fs::write(path, text.replace(from, to)).unwrap();
    }
    let cases: [(Harm, &str); 9] = [
        (
            |model| fs::remove_dir_all(model.join("unet")).unwrap(),
            "no folder `unet`",
        ),
        (
            |model| fs::remove_dir_all(model.join("clip")).unwrap(),
            "no folder model/clip",
        ),
        (
            |model| fs::remove_file(model.join("vae/config.json")).unwrap(),
            "model/vae/config.json: No such file",
        ),
        (
            |model| {
                let path = model.join("unet/diffusion_pytorch_model.safetensors");
                let bytes = fs::read(&path).unwrap();
                fs::write(path, &bytes[..bytes.len() - 100]).unwrap();
            },
            "diffusion_pytorch_model.safetensors: truncated",
        ),
        (
            |model| {
                fs::write(
                    model.join("vae/diffusion_pytorch_model.safetensors"),
                    "junk",
                )
                .unwrap();
            },
            "vae/diffusion_pytorch_model.safetensors: not a safetensors file",
        ),
        (
            |model| {
                edit(
                    &model.join("unet/config.json"),
                    "\"in_channels\": 4",
                    "\"in_channels\": true",
                )
            },
            "unet/config.json: field `in_channels`: invalid type: boolean",
        ),
        (
            |model| {
                let path = model.join("unet/config.json");
                edit(&path, "\"layers_per_block\": 1", "\"layers_per_block\": 2");
            },
            "tensor `down_blocks.0.resnets.1.time_emb_proj.bias`: expected shape [8], found no such",
        ),
        (
            |model| fs::write(model.join("scheduler/scheduler_config.json"), "{").unwrap(),
            "scheduler_config.json: not valid JSON",
        ),
        (
            |model| fs::write(model.join("tokenizer/tokenizer.json"), "{}").unwrap(),
            "tokenizer/tokenizer.json: Model missing",
        ),
    ];
    for (harm, expected) in cases {
        let work = workplace();
        harm(&work.path().join("model"));
        let arguments = format!("analogy --config tiny.toml {PAIR} {B} -o out");
        refuses(work.path(), &arguments, 65, &["error: ", expected]);
    }
    let work = workplace();
    edit(
        &work.path().join("model/unet/config.json"),
        "\"in_channels\": 4",
        "\"nobody_knows_this\": [1], \"in_channels\": 4",
    );
    succeed(work.path(), "generate -q --config tiny.toml --prompt red");
}

#[test]
fn no_model_at_all_says_where_it_was_looked_for() {
    let work = workplace();
    let learn = format!("learn {PAIR} --model nowhere");
    refuses(
        work.path(),
        &learn,
        65,
        &["nowhere: no such file, folder or model", "hint: give a"],
    );
    let done: Done = super::dinv(work.path())
        .args(["analogy"])
        .env("DINV_DEMO_MODEL", "nowhere")
        .output()
        .unwrap()
        .into();
    let expected = [
        "error: DINV_DEMO_MODEL names nowhere, which is not a model folder",
        "hint: it should hold a model_index.json; a model of the Hub is written hf://OWNER/NAME",
    ];
    check(&done, "analogy", 65, &expected);
}

#[test]
fn a_difference_that_cannot_be_used_is_named() {
    let work = workplace();
    let apply = format!("apply --config tiny.toml {B} -o out");
    fs::write(work.path().join("bad.safetensors"), "junk").unwrap();
    refuses(
        work.path(),
        &format!("{apply} bad.safetensors"),
        65,
        &["bad.safetensors: not a usable safetensors file"],
    );
    refuses(
        work.path(),
        &format!("{apply} none.safetensors"),
        65,
        &["none.safetensors: No such"],
    );
    let weights = "model/vae/diffusion_pytorch_model.safetensors";
    let expected = ["not a file of difference tokens"];
    refuses(work.path(), &format!("{apply} {weights}"), 65, &expected);

    // Another model: the same architecture with another token-embedding table.
    succeed(
        work.path(),
        &format!("learn -q --config tiny.toml {PAIR} -o d.safetensors"),
    );
    let path = work.path().join("model/text_encoder/model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    let start = 8 + usize::try_from(header).unwrap();
    bytes[start..]
        .chunks_exact_mut(2)
        .for_each(|half| half[0] ^= 1);
    fs::write(&path, bytes).unwrap();
    let expected = ["the difference was learned on"];
    refuses(
        work.path(),
        &format!("{apply} d.safetensors"),
        65,
        &expected,
    );
}

#[test]
fn initial_latents_are_checked() {
    let work = workplace();
    let generate = "generate --config tiny.toml --prompt red --init-latents";
    refuses(
        work.path(),
        &format!("{generate} none.safetensors"),
        65,
        &["none.safetensors: No such file"],
    );
    let file = "model/vae/diffusion_pytorch_model.safetensors";
    refuses(
        work.path(),
        &format!("{generate} {file}"),
        65,
        &["tensor `latents`: expected an array, found no such tensor"],
    );
}

#[test]
fn a_diverging_loss_is_an_error() {
    let work = workplace();
    let arguments = format!(
        "learn --config tiny.toml {PAIR} --learning-rate 100 --weight-decay 1000000 --max-norm 1e36 --clip-first 0 --steps 30"
    );
    refuses(
        work.path(),
        &arguments,
        1,
        &["the loss is not a finite number at step"],
    );
}

#[test]
fn outputs_are_checked_before_the_work() {
    let work = workplace();
    fs::write(work.path().join("file"), "").unwrap();
    let analogy = format!("analogy --config tiny.toml {PAIR} {B}");
    refuses(
        work.path(),
        &format!("{analogy} -o file"),
        1,
        &["cannot write to file", "hint: "],
    );
    refuses(
        work.path(),
        &format!("{analogy} -o file/deep"),
        1,
        &["cannot write to file/deep"],
    );
    let learn = format!("learn --config tiny.toml {PAIR}");
    refuses(
        work.path(),
        &format!("{learn} -o file"),
        64,
        &["file exists already", "--overwrite"],
    );
    refuses(
        work.path(),
        &format!("{learn} -o absent/d.safetensors"),
        1,
        &["cannot write to absent"],
    );
    refuses(
        work.path(),
        &format!("{learn} -o model"),
        64,
        &["found a folder"],
    );
    refuses(
        work.path(),
        &format!("{learn} --resume"),
        64,
        &["there is no checkpoint to resume from"],
    );
}

/// A limit on the size of files simulates a full disk: every write past it fails.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_nothing_half_written() {
    let work = workplace();
    let before = entries(work.path());
    for arguments in [
        format!("analogy --config tiny.toml {PAIR} {B} -o out"),
        "generate --config tiny.toml --prompt red".to_owned(),
    ] {
        let script = format!("trap '' XFSZ; ulimit -f 1; exec \"$0\" {arguments}");
        let done: Done = Command::new("bash")
            .args(["-c", &script, env!("CARGO_BIN_EXE_dinv")])
            .current_dir(work.path())
            .output()
            .unwrap()
            .into();
        check(&done, &arguments, 1, &["error: ", "File too large"]);
        assert_eq!(
            entries(work.path()),
            before,
            "{arguments} left files behind"
        );
    }
}

#[test]
fn learning_that_cannot_fit_is_refused_at_once() {
    let work = workplace();
    let many = format!("learn --config tiny.toml {PAIR} --samples-per-step 1000000000");
    let expected = ["learning needs about", "`--no-memory-check` tries it"];
    refuses(work.path(), &many, 75, &expected);
    let low = format!("learn --config tiny.toml {PAIR} --memory low");
    succeed(work.path(), &low);
}
