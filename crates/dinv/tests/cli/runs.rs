//! Complete runs on the tiny model: their output and their files.

use std::fs;
use std::path::Path;

use difference_inversion::image::load_image;
use difference_inversion::image::read_png_text;
use difference_inversion::util::arrays::{Array, Arrays};
use serde_json::Value;

use super::{Done, PAIR, copy_folder, dinv, entries, golden, refused, run, succeed, workplace};

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn an_analogy_fills_its_folder() {
    let work = workplace();
    let done = succeed(
        work.path(),
        &format!("analogy --config tiny.toml {PAIR} --b b.png --caption-b noon --seed 7 -o out"),
    );
    let files = [
        "b_prime.png",
        "difference.safetensors",
        "loss.png",
        "run.json",
        "sheet.png",
    ];
    assert_eq!(entries(&work.path().join("out")), files);
    assert_eq!(
        done.stdout,
        "out/b_prime.png\nout/sheet.png\nout/loss.png\nout/difference.safetensors\nout/run.json\n"
    );
    let record = read_json(&work.path().join("out/run.json"));
    assert_eq!(record["settings"]["seed"], 7);
    assert_eq!(record["settings"]["steps"], 6);
    assert_eq!(record["settings"]["alpha"], 0.8);
    assert_eq!(record["pairs"][0]["a_prime"]["caption"], "night");
    assert_eq!(record["b"]["caption"], "noon");
    assert_eq!(record["model_files"].as_object().unwrap().len(), 5);
    assert!(record["seconds"]["learning"].as_f64().unwrap() > 0.0);

    for name in ["b_prime.png", "sheet.png", "loss.png"] {
        let text = read_png_text(&work.path().join("out").join(name)).unwrap();
        assert_eq!(
            text[0],
            (
                "Software".to_owned(),
                record["program"].as_str().unwrap().into()
            )
        );
        assert_eq!(text[1].0, "dinv");
        let recipe: Value = serde_json::from_str(&text[1].1).unwrap();
        assert_eq!(recipe["settings"], record["settings"]);
    }
    let b_prime = image::open(work.path().join("out/b_prime.png")).unwrap();
    assert_eq!((b_prime.width(), b_prime.height()), (32, 32));
}

#[test]
fn a_draft_learns_without_the_denoiser_and_draws_in_four_steps() {
    let work = workplace();
    let command = format!("{PAIR} --b b.png --caption-b noon --draft");
    succeed(
        work.path(),
        &format!("analogy --config tiny.toml {command} --seed 7 -o out"),
    );
    let record = read_json(&work.path().join("out/run.json"));
    for (setting, value) in [
        ("lambda_mse", 0.0),
        ("steps", 60.0),
        ("clip_first", 0.0),
        ("num_inference_steps", 4.0),
        ("skip", 0.0),
        ("guidance_scale", 1.0),
        ("num_tokens", 3.0), // the file's
    ] {
        assert_eq!(
            record["settings"][setting].as_f64(),
            Some(value),
            "{setting}"
        );
    }
    assert_eq!(record["settings"]["learning_rate_schedule"], "linear");
    assert_eq!(record["results"]["loss"]["after"], 0.0);
    assert!(record["results"]["loss"]["clip"].as_f64().unwrap() > 0.0);
    // Where no text encoder was trained with pictures, a draft is learned from captions.
    copy_folder(&golden("z_image"), &work.path().join("z"));
    let of_z = format!("analogy --config tiny.toml --model z --resolution 16 {command}");
    let done = succeed(work.path(), &format!("{of_z} -o other"));
    let note = "follows only the captions";
    assert!(done.stderr.contains(note), "{}", done.stderr);
    let record = read_json(&work.path().join("other/run.json"));
    assert!(record["results"]["loss"]["clip"].as_f64().unwrap() > 0.0);
    refused(
        work.path(),
        &format!("{of_z} --delta image -o third"),
        64,
        &["nothing else is in the loss"],
    );
}

#[test]
fn the_same_seed_gives_the_same_bytes() {
    let work = workplace();
    let files = [
        "b_prime.png",
        "sheet.png",
        "loss.png",
        "difference.safetensors",
    ];
    let read = || files.map(|name| fs::read(work.path().join("out").join(name)).unwrap());
    let analogy = |more: &str| -> [Vec<u8>; 4] {
        let pictures = format!("{PAIR} --b b.png --caption-b noon");
        succeed(
            work.path(),
            &format!("analogy -q --config tiny.toml {pictures} {more}"),
        );
        read()
    };
    let first = analogy("");
    let (again, other) = (analogy("--overwrite"), analogy("--overwrite --seed 1"));
    for (index, name) in files.iter().enumerate() {
        assert!(again[index] == first[index], "{name} differs");
        assert!(
            other[index] != first[index],
            "{name} does not depend on the seed"
        );
    }
}

#[test]
fn the_built_in_example_runs_without_any_flag() {
    let work = workplace();
    let demo = work.path().join("demo");
    copy_folder(&golden("pipeline"), &demo.join("model"));
    fs::create_dir(demo.join("images")).unwrap();
    for name in ["a.png", "a_prime.png", "b.png"] {
        fs::copy(work.path().join(name), demo.join("images").join(name)).unwrap();
    }
    let settings = r#"{ "steps": 4, "num_inference_steps": 3, "num_tokens": 2 }"#;
    fs::write(demo.join("model/dinv.json"), settings).unwrap();
    let done = dinv(work.path())
        .args(["analogy", "--json", "--steps", "5"])
        .env("DINV_DEMO_MODEL", demo.join("model"))
        .output()
        .unwrap();
    assert!(
        done.status.success(),
        "{}",
        String::from_utf8_lossy(&done.stderr)
    );
    let printed: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(printed["b_prime"], "out/b_prime.png");
    let settings = &read_json(&work.path().join("out/run.json"))["settings"];
    assert_eq!(
        (&settings["steps"], &settings["num_tokens"]),
        (&5.into(), &2.into())
    );
    // A picture names the model, but no folders of its author.
    let text = read_png_text(&work.path().join("out/b_prime.png")).unwrap();
    let recipe: Value = serde_json::from_str(&text[1].1).unwrap();
    assert_eq!(recipe["model"], "demo/model");
    assert_eq!(recipe["b"]["file"], "b.png");
    assert_eq!(recipe["pairs"][0]["a_prime"]["file"], "a_prime.png");
    let b = &read_json(&work.path().join("out/run.json"))["b"]["file"];
    assert!(b.as_str().unwrap().ends_with("demo/images/b.png"), "{b}");
    assert_eq!(recipe["captioner"], "model/captioner");
}

#[test]
fn one_difference_applies_to_many_pictures() {
    let work = workplace();
    let learned = succeed(
        work.path(),
        &format!("learn --config tiny.toml {PAIR} -o d.safetensors"),
    );
    assert_eq!(learned.stdout, "d.safetensors\n");
    assert!(
        learned.stderr.contains("learning: 6 steps in "),
        "{}",
        learned.stderr
    );

    let apply = "apply d.safetensors -q --config tiny.toml --b a.png b.png --caption-b x \
                 --caption-b y";
    let done = succeed(work.path(), &format!("{apply} -o out"));
    assert_eq!(done.stdout, "out/a.png\nout/b.png\n");
    let cut = "each of 2 pictures, such as a.png (40×32), is cropped to its central 80 %";
    assert!(
        done.stderr.starts_with(&format!("note: {cut}")),
        "{}",
        done.stderr
    );
    assert_eq!(done.stderr.lines().count(), 1, "{}", done.stderr);
    assert_eq!(entries(&work.path().join("out")), ["a.png", "b.png"]);

    let again = run(work.path(), &format!("{apply} -o out"));
    assert_eq!(again.code, Some(64));
    assert!(
        again
            .stderr
            .starts_with("error: out/a.png exists already\nhint: ")
    );

    // The remaining pictures, and none.
    let first = fs::read(work.path().join("out/a.png")).unwrap();
    fs::remove_file(work.path().join("out/b.png")).unwrap();
    for expected in ["out/b.png\n", ""] {
        let rest = succeed(work.path(), &format!("{apply} -o out --skip-existing"));
        assert_eq!(rest.stdout, expected);
    }
    assert_eq!(fs::read(work.path().join("out/a.png")).unwrap(), first);
    // Captions stay with their pictures.
    let text = read_png_text(&work.path().join("out/b.png")).unwrap();
    assert!(text[1].1.contains(r#""caption":"y""#), "{}", text[1].1);

    let reversed = succeed(work.path(), &format!("{apply} -o back --reverse --json"));
    let printed: Value = serde_json::from_str(&reversed.stdout).unwrap();
    assert_eq!(printed["results"][1]["b_prime"], "back/b.png");
    let read = |name: &str| fs::read(work.path().join(name)).unwrap();
    assert_ne!(read("out/b.png"), read("back/b.png"));
}

#[test]
fn several_pairs_teach_one_difference() {
    let work = workplace();
    let pairs = "--a a.png --a-prime a_prime.png --a b.png --a-prime a.png";
    let done = succeed(
        work.path(),
        &format!("learn -q --json --config tiny.toml {pairs}"),
    );
    let printed: Value = serde_json::from_str(&done.stdout).unwrap();
    assert_eq!(printed["difference"], "difference.safetensors");
    assert_eq!(printed["captions"].as_array().unwrap().len(), 2);
}

/// `--replay` reads what `--trace` writes, with the same result. Only the words of thinned prompts are still drawn.
#[test]
fn a_trace_can_be_replayed() {
    let work = workplace();
    let learn = format!("learn -q --config tiny.toml --clip-thinned 0 {PAIR}");
    succeed(
        work.path(),
        &format!("{learn} -o one.safetensors --trace trace.safetensors"),
    );
    succeed(
        work.path(),
        &format!(
            "{learn} --seed 7 -o two.safetensors --replay trace.safetensors --trace \
             again.safetensors"
        ),
    );
    let read = |name: &str| {
        let weights =
            difference_inversion::util::arrays::Arrays::read(&work.path().join(name)).unwrap();
        weights.arrays
    };
    let same = |one: &str, other: &str| {
        // Not printed: there are thousands of numbers.
        assert!(
            format!("{:?}", read(one)) == format!("{:?}", read(other)),
            "{one} is not {other}"
        );
    };
    same("trace.safetensors", "again.safetensors");
    // With the same seed, the same words are left out.
    let learn = format!("learn -q --config tiny.toml {PAIR}");
    for (output, more) in [
        ("three", "--trace three-trace.safetensors"),
        (
            "four",
            "--replay three-trace.safetensors --trace four-trace.safetensors",
        ),
    ] {
        succeed(
            work.path(),
            &format!("{learn} -o {output}.safetensors {more}"),
        );
    }
    same("three-trace.safetensors", "four-trace.safetensors");
}

#[test]
fn words_become_a_picture_with_every_scheduler() {
    let work = workplace();
    let generate = "generate -q --config tiny.toml --prompt red --num-inference-steps 50";
    let draw = |scheduler: &str| {
        let file = format!("{scheduler}.png");
        let done = succeed(
            work.path(),
            &format!("{generate} --scheduler {scheduler} -o {file}"),
        );
        assert_eq!(done.stdout, format!("{file}\n"));
        image::open(work.path().join(file)).unwrap().into_rgb8()
    };
    let ddim = draw("ddim");
    assert_eq!(ddim.dimensions(), (32, 32));
    // They solve one equation with different steps: the pictures are close, but not the same. Added noise leads
    // elsewhere.
    for (scheduler, far) in [
        ("euler", 0.0..0.5),
        ("dpm-solver", 0.1..5.0),
        ("uni-pc", 0.1..5.0),
        ("euler-ancestral", 20.0..128.0),
    ] {
        let distance = distance(&draw(scheduler), &ddim);
        assert!(far.contains(&distance), "{scheduler}: {distance}");
    }
}

#[test]
fn the_noise_of_every_step_can_be_given() {
    let work = workplace();
    let waves = |count: usize, pace: f32| {
        let values = (0..count * 4 * 16 * 16).map(|i| (i as f32 * pace).sin() * 1.4);
        Array::floats([count, 4, 16, 16], values.collect())
    };
    let draw = |pace: f32, steps: usize, more: &str| {
        let arrays = Arrays::default().with("latents", waves(1, 12.9));
        let arrays = arrays.with("noise", waves(steps, pace));
        arrays.write(&work.path().join("init.safetensors")).unwrap();
        let arguments = "generate -q --overwrite --config tiny.toml --prompt red -o red.png \
                         --scheduler euler-ancestral --init-latents init.safetensors";
        run(work.path(), &format!("{arguments} {more}"))
    };
    let picture = |pace: f32, more: &str| {
        let done = draw(pace, 4, more);
        assert_eq!(done.code, Some(0), "{}", done.stderr);
        let picture = image::open(work.path().join("red.png")).unwrap();
        picture.into_rgb8().into_raw()
    };
    let first = picture(78.2, "");
    assert_eq!(picture(78.2, "--seed 5"), first, "the seed counts");
    assert_ne!(picture(33.3, ""), first, "the noise does not count");
    let message = "expected noise of shape [4, 4, 16, 16], found [3, 4, 16, 16]";
    let refused = draw(78.2, 3, "");
    assert_eq!(refused.code, Some(65));
    assert!(refused.stderr.contains(message), "{}", refused.stderr);
}

#[test]
fn captions_are_printed_with_names_where_there_are_several() {
    let work = workplace();
    let one = succeed(work.path(), "caption --model model a.png").stdout;
    assert_eq!(one.lines().count(), 1);
    let two = succeed(work.path(), "caption --model model a.png b.png").stdout;
    assert_eq!(
        two.lines().next().unwrap(),
        format!("a.png: {}", one.trim_end())
    );
    let json = succeed(work.path(), "caption --model model a.png --json").stdout;
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["captions"][0]["caption"], one.trim_end());
}

#[test]
fn doctor_lists_what_is_there_and_what_is_missing() {
    let work = workplace();
    let whole = succeed(work.path(), "doctor --model model").stdout;
    assert!(whole.ends_with("everything is in place\n"), "{whole}");
    fs::remove_dir_all(work.path().join("model/captioner")).unwrap();
    let json = succeed(work.path(), "doctor --model model --json").stdout;
    let findings: Value = serde_json::from_str(&json).unwrap();
    let problem = findings["problems"][0].as_str().unwrap();
    assert!(
        problem.starts_with("captioner (captions; without it, give your own)"),
        "{problem}"
    );
    assert!(findings["memory"]["total"].as_u64().unwrap() > 0);
    let peaks: Vec<u64> = (findings["learning"].as_array().unwrap().iter())
        .map(|way| way["peak"].as_u64().unwrap())
        .collect();
    // f32, f16 and q8, normal and low memory.
    let low_is_lower = peaks.chunks(2).all(|ways| ways[1] <= ways[0]);
    assert!(peaks.len() == 6 && low_is_lower, "{peaks:?}");
}

/// Mean difference of two pictures, in 8-bit steps.
fn distance(one: &image::RgbImage, other: &image::RgbImage) -> f64 {
    assert_eq!(one.dimensions(), other.dimensions());
    let differences = one.iter().zip(other.iter()).map(|(a, b)| a.abs_diff(*b));
    differences.map(f64::from).sum::<f64>() / one.len() as f64
}

/// Pictures of every kind are read like plain pictures with the same colours.
#[test]
fn grey_16_bit_transparent_cmyk_and_rotated_pictures_are_taken() {
    let work = workplace();
    let byte = |value: u32| u8::try_from(value).unwrap();
    let grey =
        image::ImageBuffer::from_fn(24, 24, |x, _| image::Luma([u16::from(byte(x * 9)) * 257]));
    grey.save(work.path().join("grey16.png")).unwrap();
    let clear = image::RgbaImage::from_fn(24, 24, |x, _| image::Rgba([9, 99, 200, byte(x * 9)]));
    clear.save(work.path().join("clear.png")).unwrap();
    for name in ["cmyk.jpg", "exif-6.jpg"] {
        fs::copy(golden("images").join(name), work.path().join(name)).unwrap();
    }
    let pictures = "grey16.png clear.png cmyk.jpg exif-6.jpg";
    let done = succeed(work.path(), &format!("caption --model model {pictures}"));
    assert_eq!(done.stdout.lines().count(), 4);

    let model = golden("instruct_pix2pix");
    let generate = format!(
        "generate -q --overwrite --model {} --prompt snow --num-inference-steps 2 -o out.png",
        model.display()
    );
    let drawn = |name: &str| {
        succeed(work.path(), &format!("{generate} --image {name}"));
        image::open(work.path().join("out.png"))
            .unwrap()
            .into_rgb8()
    };
    image::RgbImage::new(24, 24)
        .save(work.path().join("black.png"))
        .unwrap();
    let black = drawn("black.png");
    let [red, green, blue, white] = [[230, 20, 20], [20, 200, 20], [20, 20, 220], [240; 3]];
    let quarters = |colours: [[u8; 3]; 4], width: u32, height: u32| {
        image::RgbImage::from_fn(width, height, move |x, y| {
            let (right, below) = (2 * x >= width, 2 * y >= height);
            image::Rgb(colours[usize::from(right) + 2 * usize::from(below)])
        })
    };
    // Over white, a pixel of opacity a shows 255 − a · (255 − value) / 255, rounded.
    let over_white = |value: u32, x: u32| byte((255 * 255 - 9 * x * (255 - value) + 127) / 255);
    for (name, plain, lost) in [
        (
            "grey16.png",
            image::RgbImage::from_fn(24, 24, |x, _| image::Rgb([byte(x * 9); 3])),
            0,
        ),
        (
            "clear.png",
            image::RgbImage::from_fn(24, 24, |x, _| {
                image::Rgb([9, 99, 200].map(|value| over_white(value, x)))
            }),
            0,
        ),
        ("cmyk.jpg", quarters([red, green, blue, white], 24, 16), 12),
        (
            "exif-6.jpg",
            quarters([blue, red, white, green], 16, 24),
            12,
        ),
    ] {
        let found = load_image(&work.path().join(name)).unwrap();
        assert_eq!(found.dimensions(), plain.dimensions(), "{name}");
        let (width, height) = plain.dimensions();
        // Inside each quarter, where JPEG has no edge.
        for (x, y) in [(1, 1), (4, 1), (1, 4), (4, 4)] {
            let at = |picture: &image::RgbImage| picture.get_pixel(x * width / 5, y * height / 5).0;
            let [found, expected] = [at(&found), at(&plain)];
            let near = (found.iter().zip(expected)).all(|(a, b)| a.abs_diff(b) <= lost);
            assert!(near, "{name}: {found:?}, not {expected:?}");
        }
        found.save(work.path().join("plain.png")).unwrap();
        let drawn_from_it = drawn(name);
        assert_eq!(distance(&drawn_from_it, &drawn("plain.png")), 0.0, "{name}");
        assert!(distance(&drawn_from_it, &black) > 10.0, "{name}");
    }
}

#[test]
fn sdxl_goes_through_every_command() {
    let work = workplace();
    copy_folder(&golden("sdxl"), &work.path().join("xl"));
    for name in ["clip", "clip_2"] {
        fs::rename(
            work.path().join("xl").join(name),
            work.path().join("xl").join(format!("its_{name}")),
        )
        .unwrap();
    }
    let model = "--config tiny.toml --model xl";
    let learn = format!("learn {model} {PAIR} --clip xl/its_clip_2 --clip xl/its_clip");
    succeed(work.path(), &format!("{learn} -o night.safetensors"));
    succeed(
        work.path(),
        &format!("apply night.safetensors {model} --b b.png --caption-b noon -o out"),
    );
    let text = read_png_text(&work.path().join("out/b.png")).unwrap();
    let recipe: Value = serde_json::from_str(&text[1].1).unwrap();
    assert_eq!(recipe["model"], "xl");
    succeed(
        work.path(),
        &format!("generate {model} --prompt house --difference night.safetensors -o house.png"),
    );
    // Paths of a settings file, one or several.
    let settings = "model = 'xl'\nclip = ['xl/its_clip', 'xl/its_clip_2']\nsteps = 2\n\
                    num_tokens = 2\nnum_inference_steps = 2\n";
    fs::write(work.path().join("xl.toml"), settings).unwrap();
    let analogy = format!("analogy --config xl.toml {PAIR} --b b.png --caption-b noon -o both");
    succeed(work.path(), &analogy);
    let record = read_json(&work.path().join("both/run.json"));
    assert_eq!(record["clip"].as_array().unwrap().len(), 2);
    let notices = record["notices"].as_array().unwrap();
    assert_eq!(notices.len(), 1, "{notices:?}");
    let notice = notices[0].as_str().unwrap();
    assert!(notice.starts_with("each of 3 pictures"), "{notice}");
    // U-Net, autoencoder, two text encoders, two joint spaces.
    assert_eq!(record["model_files"].as_object().unwrap().len(), 6);
    fs::write(
        work.path().join("xl.toml"),
        settings.replace("['xl/its_clip', 'xl/its_clip_2']", "'xl/its_clip_2'"),
    )
    .unwrap();
    succeed(work.path(), &format!("{analogy} --overwrite"));
    let record = read_json(&work.path().join("both/run.json"));
    let notice = record["notices"][1].as_str().unwrap();
    assert!(notice.contains("only for text encoder 2"), "{notice}");
}

#[test]
fn models_that_take_a_picture_change_it() {
    let work = workplace();
    let generate = |model: &str, more: &str| {
        let model = golden(model);
        format!(
            "generate --model {} --prompt snow --num-inference-steps 2 {more}",
            model.display()
        )
    };
    let change = generate("instruct_pix2pix", "--image a.png");
    succeed(work.path(), &format!("{change} -o snow.png"));
    let text = read_png_text(&work.path().join("snow.png")).unwrap();
    let recipe: Value = serde_json::from_str(&text[1].1).unwrap();
    assert_eq!(recipe["image"], "a.png");
    assert_eq!(recipe["settings"]["image_guidance_scale"], 1.5);
    let closer = format!("{change} --image-guidance-scale 4 -o closer.png");
    succeed(work.path(), &closer);
    let bytes = |name: &str| image::open(work.path().join(name)).unwrap().into_rgb8();
    assert!(bytes("snow.png") != bytes("closer.png"));
    succeed(
        work.path(),
        &generate("inpaint", "--image a.png --mask b.png -o sky.png"),
    );
    let unet = golden("instruct_pix2pix").join("unet");
    let with_unet = format!("--unet {} --image a.png -o other.png", unet.display());
    succeed(work.path(), &generate("learning", &with_unet));
    let text = read_png_text(&work.path().join("other.png")).unwrap();
    let recipe: Value = serde_json::from_str(&text[1].1).unwrap();
    assert_eq!(recipe["settings"]["unet"], "unet");

    let done = run(work.path(), &generate("inpaint", "--image a.png -o no.png"));
    assert_eq!(done.code, Some(65));
    assert!(done.stderr.contains("a mask is missing"), "{}", done.stderr);
    let model = golden("instruct_pix2pix");
    let learn = format!("learn --model {} {PAIR} -o no.safetensors", model.display());
    let done = run(work.path(), &learn);
    assert_eq!(done.code, Some(65));
    assert!(
        done.stderr.contains("draws from a picture and words"),
        "{}",
        done.stderr
    );
    assert!(!work.path().join("no.safetensors").exists());
}

/// White on black and a black brush on transparency mark the same area, and the rest stays the same to the pixel.
#[test]
fn what_a_mask_keeps_stays() {
    let work = workplace();
    let model = golden("inpaint");
    let generate = |mask: &str, output: &str| {
        let arguments = format!(
            "generate -q --model {} --prompt snow --num-inference-steps 2 --image a.png --mask {mask} -o {output}",
            model.display()
        );
        succeed(work.path(), &arguments);
        image::open(work.path().join(output)).unwrap().into_rgb8()
    };
    let (width, height) = generate("b.png", "size.png").dimensions();
    let picture = image::open(work.path().join("a.png")).unwrap();
    let filter = image::imageops::FilterType::Nearest;
    let picture = picture.resize_exact(width, height, filter).into_rgb8();
    picture.save(work.path().join("a.png")).unwrap();
    let is_marked = |x: u32| x >= width / 2;
    let mask = image::GrayImage::from_fn(width, height, |x, _| {
        image::Luma([if is_marked(x) { 255 } else { 0 }])
    });
    mask.save(work.path().join("plain.png")).unwrap();
    let brush = image::RgbaImage::from_fn(width, height, |x, _| {
        image::Rgba([0, 0, 0, if is_marked(x) { 255 } else { 0 }])
    });
    brush.save(work.path().join("brush.png")).unwrap();
    let drawn = generate("plain.png", "plain_result.png");
    assert!(drawn == generate("brush.png", "brush_result.png"));
    let kept = |x, y| drawn.get_pixel(x, y) == picture.get_pixel(x, y);
    let pixels = || (0..height).flat_map(|y| (0..width).map(move |x| (x, y)));
    assert!(
        pixels()
            .filter(|(x, _)| !is_marked(*x))
            .all(|(x, y)| kept(x, y))
    );
    assert!(
        !pixels()
            .filter(|(x, _)| is_marked(*x))
            .all(|(x, y)| kept(x, y))
    );
}

#[test]
fn pictures_have_the_resolution_that_is_asked_for() {
    let work = workplace();
    let size = |more: &str| {
        let config = if more.contains("--config") {
            ""
        } else {
            "--config tiny.toml"
        };
        let generate = "generate -q --overwrite --prompt red -o red.png";
        succeed(work.path(), &format!("{generate} {config} {more}"));
        let picture = image::open(work.path().join("red.png")).unwrap();
        (picture.width(), picture.height())
    };
    let usual = size("");
    assert_eq!(size("--resolution 48x32"), (48, 32));
    assert_eq!(size("--resolution 24"), (24, 24));
    std::fs::write(
        work.path().join("size.toml"),
        "model = 'model'\nresolution = 40\n",
    )
    .unwrap();
    assert_eq!(size("--config size.toml --num-inference-steps 2"), (40, 40));
    assert_ne!(usual, (40, 40));
    let analogy = format!("analogy -q --config tiny.toml {PAIR} --b b.png --caption-b noon -o out");
    succeed(work.path(), &format!("{analogy} --resolution 32x24"));
    let b_prime = image::open(work.path().join("out/b_prime.png")).unwrap();
    assert_eq!((b_prime.width(), b_prime.height()), (32, 24));
}

#[test]
fn doctor_misses_nothing_of_a_model_that_only_draws() {
    let work = workplace();
    copy_folder(&golden("instruct_pix2pix"), &work.path().join("edits"));
    let done = succeed(work.path(), "doctor --model edits").stdout;
    assert!(done.contains("everything is in place"), "{done}");
    assert!(
        !done.contains("captioner") && !done.contains("learning"),
        "{done}"
    );
}

/// Names that are not Unicode, as in old archives.
#[cfg(target_os = "linux")]
#[test]
fn pictures_of_any_name_are_taken() {
    use std::os::unix::ffi::OsStrExt;

    let work = workplace();
    let name = std::ffi::OsStr::from_bytes(b"caf\xe9.png");
    fs::rename(work.path().join("b.png"), work.path().join(name)).unwrap();
    let works_on_it = |arguments: &str| {
        let arguments = arguments.split_whitespace();
        let done: Done = (dinv(work.path())
            .args(arguments)
            .arg(name)
            .output()
            .unwrap())
        .into();
        assert_eq!(done.code, Some(0), "{}", done.stderr);
    };
    works_on_it(&format!(
        "analogy -q --config tiny.toml {PAIR} --caption-b noon --json -o out --b"
    ));
    let record = read_json(&work.path().join("out/run.json"));
    assert_eq!(record["b"]["file"], "caf\u{fffd}.png");
    works_on_it("apply out/difference.safetensors -q --config tiny.toml --caption-b x -o out --b");
}

#[test]
fn settings_that_do_nothing_are_told_if_they_were_given() {
    let work = workplace();
    let noted = |arguments: &str| {
        let done = succeed(work.path(), arguments);
        let lines = done
            .stderr
            .lines()
            .filter(|line| line.contains("has no effect"));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    let learn = format!("learn -q --config tiny.toml {PAIR} --overwrite");
    assert!(noted(&learn).is_empty());
    let found = noted(&format!(
        "{learn} --select-every 0 --patience 3 --pez-steps 7"
    ));
    assert!(found[0].contains("`pez_steps`"), "{found:?}");
    assert!(found[1].contains("`select_samples`"), "{found:?}"); // of tiny.toml
    assert!(found[2].contains("`patience`"), "{found:?}");
    let apply = "apply difference.safetensors -q --config tiny.toml --b b.png --caption-b x --overwrite -o out";
    assert!(noted(apply).is_empty());
    let found = noted(&format!("{apply} --inversion ddim --skip 0.2"));
    assert!(found.len() == 1 && found[0].contains("`skip`"), "{found:?}");
    let found = noted("generate -q --config tiny.toml --prompt red --strength 2 -o red.png");
    assert!(
        found.len() == 1 && found[0].contains("without difference tokens"),
        "{found:?}"
    );
}

/// Two tasks of an array make what one run makes, in one folder.
#[test]
fn the_parts_that_a_scheduler_numbers_are_all_pictures_together() {
    let work = workplace();
    let at = |name: &str| work.path().join(name);
    succeed(
        work.path(),
        &format!("learn -q --config tiny.toml {PAIR} -o d.safetensors"),
    );
    let apply =
        "apply d.safetensors --config tiny.toml --b b.png a.png a_prime.png --prompt-mode caption";
    succeed(work.path(), &format!("{apply} -q -o whole"));
    for (task, first) in [("1", "b.png"), ("2", "a.png")] {
        let mut command = super::dinv(work.path());
        command.args(apply.split_whitespace());
        command.args(["--shard", "auto", "-o", "parts"]);
        command.env("SLURM_ARRAY_TASK_ID", task);
        command.env("SLURM_ARRAY_TASK_MIN", "1");
        command.env("SLURM_ARRAY_TASK_COUNT", "2");
        let done: super::Done = command.output().unwrap().into();
        assert_eq!(done.code, Some(0), "{}", done.stderr);
        let said = format!("part {task} of 2, as Slurm numbers it");
        assert!(done.stderr.contains(&said), "{}", done.stderr);
        assert!(at("parts").join(first).is_file());
    }
    for name in ["b.png", "a.png", "a_prime.png"] {
        let [whole, part] =
            ["whole", "parts"].map(|folder| fs::read(at(folder).join(name)).unwrap());
        assert_eq!(whole, part, "{name}");
    }
    let alone = format!("{apply} --shard auto -o none");
    let done = run(work.path(), &alone);
    assert_eq!(done.code, Some(64));
    assert!(
        done.stderr.contains("none of SLURM_ARRAY_TASK_ID"),
        "{}",
        done.stderr
    );
}
