//! Parts given in addition to a model: words learned by other programs, another autoencoder, skipped layers of
//! CLIP; against diffusers.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, FloatDType, Tensor};
use difference_inversion::Error;
use difference_inversion::diffusion::draw::{InitNoise, TextToImage};
use difference_inversion::diffusion::frozen::{ModelPaths, Models};
use difference_inversion::diffusion::model_files::embedding::EmbeddingFile;
use difference_inversion::diffusion::model_files::{FileOptions, ModelFiles};
use difference_inversion::diffusion::words::FullPrompt;
use difference_inversion::image::load_image;
use difference_inversion::method::analogy;
use difference_inversion::method::difference::DifferenceTokens;
use difference_inversion::method::generate::{self, Inputs};
use difference_inversion::method::learn::Records;
use difference_inversion::models::vae::AutoencoderConfig;
use difference_inversion::util::arrays::{Array, Arrays};
use difference_inversion::util::progress::Progress;
use difference_inversion::util::tensors::host;
use difference_inversion::weights::{Weights, read_config};

use crate::tiny::{
    copy, edit, example_in, furthest, golden, models_in, refused, relative_error, request,
    short_analogy, silent,
};

/// The prompt of `training/reference/make_golden_parts.py`.
const PROMPT: &str = "a <toy> by <vec.v2>!";

fn open(folder: &Path, options: FileOptions) -> Result<Models, Error> {
    let paths = ModelPaths {
        model: folder.to_owned(),
        options,
        ..ModelPaths::default()
    };
    Models::open(&paths, &Device::flex(), FloatDType::F32)
}

fn word(name: &str, path: impl Into<PathBuf>) -> EmbeddingFile {
    EmbeddingFile {
        name: Some(name.to_owned()),
        path: path.into(),
    }
}

fn with_words(folder: &str, embeddings: Vec<EmbeddingFile>) -> Result<Models, Error> {
    let options = FileOptions {
        embeddings,
        ..FileOptions::default()
    };
    open(&golden(folder), options)
}

fn part(name: &str) -> PathBuf {
    golden("parts").join(format!("{name}.safetensors"))
}

#[track_caller]
fn check_picture(what: &str, models: &Models, name: &str, expected: &str) {
    let mut request = request(4, 5.0);
    request.negative_prompt = "red".to_owned();
    request.scheduler = Some("ddim".to_owned());
    let latents = golden("lora").join(format!("{name}_latents.safetensors"));
    let inputs = Inputs {
        init: Some(InitNoise::read(&latents, &Device::flex()).unwrap()),
        ..Inputs::default()
    };
    let drawn = generate::generate(models, &request, inputs, &mut silent).unwrap();
    let expected = load_image(&golden("parts").join(format!("{expected}.png"))).unwrap();
    let furthest = furthest(&drawn, &expected);
    println!("{what}: {furthest}/255");
    assert!(furthest <= 1, "{what}: {furthest}/255");
}

#[track_caller]
fn check_states(what: &str, models: &Models, expected: &str) {
    check_states_of(PROMPT, what, models, expected, 1e-4);
}

#[track_caller]
fn check_states_of(text: &str, what: &str, models: &Models, expected: &str, most: f32) {
    let pipeline = models.pipeline();
    let words = pipeline.read(&pipeline.prompt(text).unwrap(), 0).unwrap();
    assert_eq!(words.notice(), None);
    let conditions = pipeline
        .encode_prompts(&[FullPrompt::plain(&words)])
        .unwrap();
    let expected = Arrays::read(&part(expected)).unwrap();
    let state: Tensor<3> = expected.tensor("context", &Device::flex()).unwrap();
    let error = relative_error(conditions.context, state);
    println!("{what}: relative error {error:.1e}");
    assert!(error <= most, "{what}: relative error {error:.1e}");
    if let Some(pooled) = conditions.pooled {
        let error = relative_error(pooled, expected.tensor("pooled", &Device::flex()).unwrap());
        assert!(
            error <= 1e-4,
            "{what}: relative error of the pooled prompt {error:.1e}"
        );
    }
}

#[test]
fn learned_words_are_read_as_diffusers_reads_them() {
    for layout in ["diffusers", "a1111", "kohya", "comfyui"] {
        let words = vec![word("toy", part(layout)), word("Vec.v2", part("three"))];
        let models = with_words("pipeline", words).unwrap();
        check_states(layout, &models, "sd1_states");
        let pipeline = models.pipeline();
        assert_eq!(
            pipeline.unknown_words("a <toy>, <TOY> and <cat>"),
            ["<cat>"]
        );
        // One that stands for three tokens.
        assert_eq!(pipeline.prompt("<VEC.v2>").unwrap().ids(0).len(), 3);
    }
    // SDXL's has vectors for both text encoders; of another, one of them reads the name.
    let words = vec![word("toy", part("xl")), word("Vec.v2", part("three"))];
    check_states("sdxl", &with_words("sdxl", words).unwrap(), "sdxl_states");
}

#[test]
fn t5_reads_learned_words_as_in_diffusers() {
    let models = with_words("flux", vec![word("toy", part("flux"))]).unwrap();
    check_states_of("a <toy> by a lake", "flux", &models, "flux_states", 1e-3);
    // A word for CLIP alone: T5 reads its name.
    let clip_alone = with_words("flux", vec![word("toy", part("comfyui"))]).unwrap();
    let [both, alone] = [&models, &clip_alone].map(|models| {
        let prompt = models.pipeline().prompt("a <toy>").unwrap();
        [prompt.ids(0).len(), prompt.ids(1).len()]
    });
    assert_eq!((both[0], alone[0]), (3, 2));
    assert!(alone[1] > both[1], "{alone:?} {both:?}");
    let message = |folder: &str| {
        let found = with_words(folder, vec![word("toy", part("flux"))]);
        found.err().unwrap().to_string()
    };
    assert!(message("pipeline").contains("it was made for a model with T5"));
}

/// Qwen3 reads words like any other tokens: the vectors of a known word give its states.
#[test]
fn qwen3_reads_learned_words() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("house.safetensors");
    let models = models_in(&golden("z_image"));
    let pipeline = models.pipeline();
    let house = pipeline.prompt("house").unwrap().ids(0).to_vec();
    let table = pipeline.text_encoders()[0].token_table().clone();
    let rows = house
        .iter()
        .map(|&id| table.clone().narrow(0, id as usize, 1));
    let rows: Tensor<2> = Tensor::cat(rows.collect(), 0);
    let shape = rows.dims();
    let array = Array::floats(shape, host(rows));
    Arrays::default()
        .with("emb_params", array)
        .write(&path)
        .unwrap();
    let with_word = with_words("z_image", vec![word("toy", path)]).unwrap();
    let states = |models: &Models, text: &str| {
        let pipeline = models.pipeline();
        let words = pipeline.read(&pipeline.prompt(text).unwrap(), 0).unwrap();
        let encoded = pipeline.encode_prompts(&[FullPrompt::plain(&words)]);
        encoded.unwrap().context
    };
    // Without a space before it, as the tokens were counted.
    let expected = states(&models, "house");
    let error = relative_error(states(&with_word, "<toy>"), expected);
    assert!(error < 1e-4, "{error}");
}

/// What a program keeps of a word becomes the same numbers of a difference, and the base is that of a learned one.
#[test]
fn words_of_other_programs_become_differences() {
    let imported = |files: &[&str], folder: &str| {
        let paths: Vec<PathBuf> = files.iter().map(|name| part(name)).collect();
        let model = ModelFiles::open(&golden(folder), &FileOptions::default()).unwrap();
        DifferenceTokens::of_word(&paths, &model, &Device::flex())
    };
    let numbers = |tokens: &DifferenceTokens| -> Vec<Vec<f32>> {
        let embeddings = tokens.embeddings().iter();
        embeddings
            .map(|embedding| host(embedding.clone()))
            .collect()
    };
    let expected = numbers(&imported(&["kohya"], "pipeline").unwrap());
    let file = Arrays::read(&part("kohya")).unwrap();
    let stored: Tensor<2> = file.tensor("emb_params", &Device::flex()).unwrap();
    assert_eq!(expected, [host(stored)]);
    for layout in ["diffusers", "a1111", "comfyui"] {
        let tokens = imported(&[layout], "pipeline").unwrap();
        assert_eq!(numbers(&tokens), expected, "{layout}");
        let base = models_in(&golden("pipeline")).pipeline().base();
        tokens.check_base(&base).unwrap();
    }
    let both = imported(&["xl"], "sdxl").unwrap();
    assert_eq!(both.embeddings().len(), 2);
    both.check_base(&models_in(&golden("sdxl")).pipeline().base())
        .unwrap();

    let refusal = |files: &[&str], folder: &str| imported(files, folder).unwrap_err().to_string();
    let half = refusal(&["kohya"], "sdxl");
    assert!(
        half.contains("one file for each text encoder; give both"),
        "{half}"
    );
    let twice = refusal(&["kohya", "a1111"], "pipeline");
    assert!(
        twice.contains("vectors for the same text encoder as those of"),
        "{twice}"
    );
}

/// A difference learned with given words does not belong to them, and the joint space knows them.
#[test]
fn learned_words_are_not_part_of_the_base() {
    let models = with_words("sdxl", vec![word("toy", part("xl"))]).unwrap();
    assert_eq!(
        models.pipeline().base(),
        models_in(&golden("sdxl")).pipeline().base()
    );
    let mut example = example_in("sdxl");
    example.caption_a = Some("a <toy>".to_owned());
    let config = short_analogy();
    let learn = |example| {
        let records = Records::default();
        analogy::learn(&models, &[example], &config, &records, &mut silent).unwrap()
    };
    let with_word = learn(example.clone());
    example.caption_a = Some("a house".to_owned());
    assert_ne!(with_word.history, learn(example).history);
    with_word
        .tokens
        .check_base(&models_in(&golden("sdxl")).pipeline().base())
        .unwrap();

    // A file of `dinv learn` is also such a word.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("night.safetensors");
    with_word.tokens.save(&path).unwrap();
    let night = EmbeddingFile { name: None, path };
    let models = with_words("sdxl", vec![night]).unwrap();
    assert_eq!(
        models.pipeline().prompt("a <night>").unwrap().ids(1).len(),
        3
    );
}

#[test]
fn words_that_do_not_fit_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let message =
        |words: Vec<EmbeddingFile>| with_words("pipeline", words).unwrap_err().to_string();
    for (tensors, expected) in [
        (
            vec![("emb_params", vec![2, 768])],
            "it was made for Stable Diffusion 1",
        ),
        (
            vec![("<x>", vec![1024])],
            "it was made for Stable Diffusion 2",
        ),
        (
            vec![("clip_g", vec![1, 16]), ("clip_l", vec![1, 16])],
            "it was made for Stable Diffusion XL",
        ),
        (
            vec![("a", vec![16]), ("b", vec![16])],
            "more than one word in it, such as `b`",
        ),
        (vec![("w", vec![16, 3, 3])], "not a textual inversion"),
        (vec![("w", vec![0, 16])], "not a textual inversion"),
        (vec![], "no tensors in it"),
    ] {
        let file = tensors
            .into_iter()
            .fold(Arrays::default(), |file, (key, shape)| {
                let count = shape.iter().product();
                file.with(key, Array::floats(shape, vec![0.5; count]))
            });
        file.write(&path).unwrap();
        let found = message(vec![word("x", &path)]);
        assert!(
            found.contains(expected) && found.contains("x.safetensors"),
            "{found}"
        );
    }
    let infinite = Arrays::default().with("x", Array::floats([16], vec![f32::INFINITY; 16]));
    infinite.write(&path).unwrap();
    assert!(message(vec![word("x", &path)]).contains("not finite"));
    let pickled = folder.path().join("x.pt");
    std::fs::write(&pickled, "PK").unwrap();
    let found = message(vec![word("x", &pickled)]);
    assert!(
        found.contains("a pickled file is not read") && found.contains("string_to_param"),
        "{found}"
    );
    for (name, expected) in [("a b", "found `a b`"), ("", "found ``")] {
        let found = message(vec![word(name, part("kohya"))]);
        assert!(
            found.contains("letters, digits") && found.contains(expected),
            "{found}"
        );
    }
    let found = message(vec![word("x", part("kohya")), word("X", part("three"))]);
    assert!(
        found.contains("NAME=FILE gives it another name, found `<X>`"),
        "{found}"
    );
}

#[test]
fn layers_of_clip_are_skipped_as_diffusers_does() {
    for (name, folder) in [("sd1", "pipeline"), ("sdxl", "sdxl")] {
        let skipping = |clip_skip| {
            let options = FileOptions {
                clip_skip,
                ..FileOptions::default()
            };
            open(&golden(folder), options)
        };
        let models = skipping(1).unwrap();
        let expected = format!("{name}_skipped");
        check_picture(&expected, &models, name, &expected);
        let message = skipping(2).unwrap_err().to_string();
        assert!(
            message.contains("`clip_skip`: expected less than 2, the layers of the text encoder"),
            "{message}"
        );
        // A difference is applied with the setting it was learned with.
        let base = |clip_skip| skipping(clip_skip).unwrap().pipeline().base();
        let tokens = DifferenceTokens::zeros(1, &base(1), &Device::flex());
        tokens.check_base(&base(1)).unwrap();
        let message = tokens.check_base(&base(0)).unwrap_err().to_string();
        assert!(
            message.contains("learned with `--clip-skip 1`: give the same"),
            "{message}"
        );
    }
    let options = FileOptions {
        clip_skip: 1,
        ..FileOptions::default()
    };
    let message = open(&golden("flux"), options).unwrap_err().to_string();
    assert!(
        message.contains("a FluxPipeline reads no hidden states of CLIP"),
        "{message}"
    );
}

#[test]
fn another_autoencoder_takes_the_place_of_the_models_own() {
    let with = |folder: &str, vae: PathBuf| {
        let options = FileOptions {
            vae: Some(vae),
            ..FileOptions::default()
        };
        open(&golden(folder), options)
    };
    let weights = golden("parts/vae/diffusion_pytorch_model.safetensors");
    for vae in [golden("parts/vae"), weights, part("vae_original")] {
        let models = with("pipeline", vae.clone()).unwrap();
        check_picture(&vae.display().to_string(), &models, "sd1", "sd1_other_vae");
    }
    // A whole model's folder or file stands for its autoencoder.
    with("pipeline", golden("learning")).unwrap();
    let message = |vae: PathBuf| with("pipeline", vae).unwrap_err().to_string();
    let found = message(golden("flux"));
    assert!(
        found.contains("`vae`: expected an autoencoder of 4 latent channels"),
        "{found}"
    );
    let found = message(golden("pipeline/unet"));
    assert!(
        found.contains("`_class_name`") && found.contains("UNet2DConditionModel"),
        "{found}"
    );
    let found = message(part("xl"));
    assert!(found.contains("not a whole autoencoder"), "{found}");
    let found = message(golden("parts/absent"));
    assert!(found.contains("absent"), "{found}");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("taesd.safetensors");
    let layer = Array::floats([4], vec![0.5; 4]);
    Arrays::default()
        .with("decoder.layers.1.bias", layer)
        .write(&path)
        .unwrap();
    let found = message(path);
    assert!(
        found.contains("take its folder in diffusers' layout"),
        "{found}"
    );
}

#[test]
fn a_tiny_autoencoder_is_diffusers() {
    let folder = golden("parts/vae_tiny");
    let config =
        AutoencoderConfig::open(read_config(&folder.join("config.json")).unwrap(), &folder)
            .unwrap();
    let weights = Weights::open(&folder, &Device::flex(), FloatDType::F32).unwrap();
    let vae = config.load(&weights).unwrap();
    let io = Arrays::read(&part("vae_tiny_io")).unwrap();
    let tensor = |name: &str| io.tensor::<4>(name, &Device::flex()).unwrap();
    for (name, found) in [
        ("encoded", vae.mean(tensor("pixels"))),
        ("decoded", vae.decode(tensor("latents"))),
        // The scaling factor of its configuration.
        ("latents", vae.to_decoder(tensor("latents") * 0.7)),
        ("latents", vae.to_denoised(tensor("latents")) / 0.7),
    ] {
        let error = relative_error(found, tensor(name));
        assert!(error < 1e-5, "{name}: {error:.1e}");
    }
    let options = FileOptions {
        vae: Some(folder),
        ..FileOptions::default()
    };
    let models = open(&golden("pipeline"), options).unwrap();
    check_picture("AutoencoderTiny", &models, "sd1", "sd1_tiny_vae");
}

/// A file of weights has no configuration: those of TAESD's usual size are known by their tensors.
#[test]
fn a_file_of_taesd_takes_the_place_of_the_autoencoder() {
    let work = tempfile::tempdir().unwrap();
    let path = work.path().join("taesd.safetensors");
    let mut arrays = Arrays::default();
    for (part, ends, blocks) in [
        ("encoder", [[64, 3], [4, 64]], [1, 3, 3, 3]),
        ("decoder", [[64, 4], [3, 64]], [3, 3, 3, 1]),
    ] {
        let mut place = 0;
        let mut conv = |name: String, [c_out, c_in]: [usize; 2], with_bias: bool| {
            let weight = Array::floats([c_out, c_in, 3, 3], vec![0.01; c_out * c_in * 9]);
            arrays
                .arrays
                .insert(format!("{part}.layers.{name}.weight"), weight);
            if with_bias {
                let bias = Array::floats([c_out], vec![0.1; c_out]);
                arrays
                    .arrays
                    .insert(format!("{part}.layers.{name}.bias"), bias);
            }
        };
        for (level, blocks) in blocks.into_iter().enumerate() {
            match (part, level) {
                (_, 0) => conv("0".to_owned(), ends[0], true),
                ("encoder", _) => conv(place.to_string(), [64, 64], false),
                _ => {
                    // Behind the layer that enlarges.
                    place += 1;
                    conv(place.to_string(), [64, 64], false);
                }
            }
            place += if (part, level) == ("decoder", 0) {
                2
            } else {
                1
            };
            for _ in 0..blocks {
                for inner in [0, 2, 4] {
                    conv(format!("{place}.conv.{inner}"), [64, 64], true);
                }
                place += 1;
            }
        }
        conv(place.to_string(), ends[1], true);
    }
    arrays.write(&path).unwrap();
    let with = |folder: &str| {
        let options = FileOptions {
            vae: Some(path.clone()),
            ..FileOptions::default()
        };
        open(&golden(folder), options)
    };
    // A file of another size is read with the configuration beside it.
    let file = golden("parts/vae_tiny").join("diffusion_pytorch_model.safetensors");
    let options = FileOptions {
        vae: Some(file),
        ..FileOptions::default()
    };
    let models = open(&golden("pipeline"), options).unwrap();
    check_picture("AutoencoderTiny's file", &models, "sd1", "sd1_tiny_vae");
    // It halves pictures three times, whatever the model's own does.
    let models = with("pipeline").unwrap();
    assert_eq!(
        models.pipeline().latent_shape()[2] * 8,
        models.pipeline().resolution()[0] as usize
    );
    let message = with("sd3").unwrap_err().to_string();
    assert!(
        message.contains("`vae`: expected an autoencoder of"),
        "{message}"
    );
}

/// The class in `model_index.json` counts, as in diffusers; pictures have three channels.
#[test]
fn an_autoencoder_is_what_the_model_says() {
    let folder = copy("pipeline");
    let model = folder.path();
    for file in ["config.json", "diffusion_pytorch_model.safetensors"] {
        let from = golden("parts/vae_tiny").join(file);
        std::fs::copy(from, model.join("vae").join(file)).unwrap();
    }
    edit(
        &model.join("model_index.json"),
        "AutoencoderKL",
        "AutoencoderTiny",
    );
    let config = model.join("vae/config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let class = r#""_class_name": "AutoencoderTiny""#;
    for other in [r#""_class_name": "AutoencoderKL""#, r#""_other": "x""#] {
        edit(&config, class, other);
        let models = open(model, FileOptions::default()).unwrap();
        check_picture(other, &models, "sd1", "sd1_tiny_vae");
        std::fs::write(&config, &text).unwrap();
    }
    for (field, found) in [("in_channels", 4), ("out_channels", 1)] {
        let [from, to] = [3, found].map(|number| format!("\"{field}\": {number}"));
        edit(&config, &from, &to);
        let message = open(model, FileOptions::default()).unwrap_err().to_string();
        assert!(message.contains(&format!("field `{field}`")), "{message}");
        std::fs::write(&config, &text).unwrap();
        let message = refused("pipeline", |model| {
            edit(&model.join("vae/config.json"), &from, &to);
        });
        assert!(message.contains(&format!("field `{field}`")), "{message}");
    }
}

#[test]
fn previews_are_decoded_by_an_autoencoder_of_their_own() {
    let drawn = |preview_vae: Option<PathBuf>| {
        let options = FileOptions {
            preview_vae,
            ..FileOptions::default()
        };
        let models = open(&golden("pipeline"), options)?;
        let request = TextToImage {
            previews: true,
            ..request(4, 5.0)
        };
        let mut previews = Vec::new();
        let mut observer = |progress: &Progress| {
            match progress {
                Progress::Preview { picture } => previews.push(picture.clone()),
                Progress::Notice { message } if message.starts_with("previews") => {
                    assert!(message.contains("16 channels"), "{message}");
                }
                _ => {}
            }
            ControlFlow::Continue(())
        };
        let picture = generate::generate(&models, &request, Inputs::default(), &mut observer)?;
        Ok::<_, Error>((picture, previews))
    };
    let (picture, colours) = drawn(None).unwrap();
    let (same, previews) = drawn(Some(golden("pipeline/vae"))).unwrap();
    assert_eq!(picture, same);
    assert_eq!((colours.len(), previews.len()), (4, 4));
    let small = colours[3].dimensions();
    assert!(small.0 < picture.width());
    // The model's own autoencoder shows in the last preview what is drawn in the end.
    let last = furthest(&previews[3], &picture);
    let first = furthest(&previews[0], &picture);
    println!("{last} and {first} of 255");
    assert!(last <= 8 && last < first, "{last} and {first} of 255");
    let (_, tiny) = drawn(Some(golden("parts/vae_tiny"))).unwrap();
    assert_eq!(tiny[3].dimensions(), picture.dimensions());
    // Another model's latents are no reason not to draw.
    let (other, colours) = drawn(Some(golden("sd3"))).unwrap();
    assert_eq!((&other, colours[3].dimensions()), (&picture, small));
    let message = drawn(Some(golden("pipeline/unet")))
        .unwrap_err()
        .to_string();
    assert!(message.contains("`_class_name`"), "{message}");
}

/// Foreign tensors in the folder of a network are left out with a note.
#[test]
fn strays_in_the_folder_of_a_network_are_left_out() {
    let model = copy("pipeline");
    let path = model
        .path()
        .join("unet/diffusion_pytorch_model.safetensors");
    let plain = Arrays::read(&path).unwrap();
    let write = |keys: &[&str]| {
        let file = keys.iter().fold(plain.clone(), |file, key| {
            file.with(*key, Array::floats([2], vec![0.5; 2]))
        });
        file.write(&path).unwrap();
    };
    let open = || {
        let files = ModelFiles::open(model.path(), &FileOptions::default())?;
        let notices = files.notices().to_vec();
        crate::tiny::opened(model.path()).map(|_| notices)
    };
    let layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1";
    write(&[
        "control_model.x",
        "lora_unet_x.alpha",
        "safety_checker.y",
        &format!("{layer}.processor.to_q_lora.up.weight"),
    ]);
    let notices = open().unwrap();
    assert_eq!(notices.len(), 1);
    assert!(
        notices[0].contains(
            "unet: 4 tensors do not belong to the network and are left out: control_model.x"
        ),
        "{notices:?}"
    );
    write(&[]);
    assert_eq!(open().unwrap(), [""; 0]);
    // Tensors that could belong to the network are not foreign.
    write(&["down_blocks.9.x"]);
    assert!(
        open()
            .unwrap_err()
            .to_string()
            .contains("are not used by the model")
    );
    write(&[&format!("{layer}.to_q.base_layer.weight")]);
    let message = open().unwrap_err().to_string();
    assert!(
        message.contains("an adapter of PEFT that is not merged"),
        "{message}"
    );
    let averaged = Arrays::default().with("model_ema.x", Array::floats([2], vec![0.5; 2]));
    averaged.write(&path).unwrap();
    let message = open().unwrap_err().to_string();
    assert!(message.contains("averaged weights (EMA)"), "{message}");
    let single = model.path().join("ema.safetensors");
    averaged.write(&single).unwrap();
    let message = ModelFiles::open(&single, &FileOptions::default())
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("a checkpoint of averaged weights (EMA) only"),
        "{message}"
    );
}
