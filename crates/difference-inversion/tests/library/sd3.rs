//! Stable Diffusion 3 and 3.5 against diffusers and transformers, on tiny networks with random weights
//! made by `training/reference/make_golden_sd3.py`.

use std::collections::BTreeMap;

use burn::tensor::{Device, FloatDType, Tensor};
use difference_inversion::diffusion::draw::{InitNoise, TextToImage};
use difference_inversion::diffusion::family;
use difference_inversion::diffusion::frozen::{ModelPaths, Models};
use difference_inversion::diffusion::memory::LearningMemory;
use difference_inversion::diffusion::model_files::{FileOptions, ModelFiles};
use difference_inversion::diffusion::pipeline::{Conditions, Pipeline};
use difference_inversion::diffusion::sample::{PredictionType, TimestepSpacing};
use difference_inversion::diffusion::text_encoder::{Padding, TextEncoder};
use difference_inversion::diffusion::words::FullPrompt;
use difference_inversion::image::load_image;
use difference_inversion::method::analogy::{self, Target};
use difference_inversion::method::difference::DifferenceTokens;
use difference_inversion::method::generate;
use difference_inversion::method::generate::Inputs;
use difference_inversion::method::learn::Records;
use difference_inversion::method::regenerate::Inversion;
use difference_inversion::models::denoiser::Memory;
use difference_inversion::models::denoiser::sd3::{SD3Config, SD3Transformer2DModel};
use difference_inversion::util::arrays::Arrays;
use difference_inversion::weights::{Weights, read_config};

use super::common::{assert_matches, open, read};
use crate::tiny::{
    PROMPT, copy, edit, example_in, furthest, golden, models_in, opened, refused, request,
    short_analogy, silent,
};

const NEGATIVE: &str = "red";

fn io() -> Weights {
    open(&golden("sd3").join("io.safetensors"))
}

/// The tiny model, with pictures of this height and width.
fn models_of([height, width]: [u32; 2], without_t5: bool) -> Models {
    let mut paths = ModelPaths {
        model: golden("sd3"),
        ..ModelPaths::default()
    };
    paths.options.resolution = Some([height, width]);
    paths.options.without_t5 = without_t5;
    Models::open(&paths, &Device::flex(), FloatDType::F32).unwrap()
}

fn encode(pipeline: &Pipeline, text: &str) -> Conditions {
    let words = pipeline.read(&pipeline.prompt(text).unwrap(), 0).unwrap();
    pipeline
        .encode_prompts(&[FullPrompt::plain(&words)])
        .unwrap()
}

// The network.

struct Network {
    network: SD3Transformer2DModel,
    io: Weights,
}

impl Network {
    /// The network of Stable Diffusion 3 medium: no second attention, no normalised queries.
    fn open() -> Self {
        let folder = golden("mmdit");
        let config: SD3Config = read_config(&folder.join("config.json")).unwrap();
        let network = SD3Transformer2DModel::load(&open(&folder), &config).unwrap();
        let io = open(&folder.join("io.safetensors"));
        Self { network, io }
    }

    fn forward(&self, states: Tensor<3>, pooled: Tensor<2>, memory: Memory) -> Tensor<4> {
        let (latents, times) = (read(&self.io, "latents"), read(&self.io, "times"));
        (self.network).forward(latents, times, states, pooled, memory)
    }
}

#[test]
fn the_transformer_of_sd3_medium_and_its_gradients_match_diffusers() {
    let case = Network::open();
    let (states, pooled) = (read::<3>(&case.io, "states"), read::<2>(&case.io, "pooled"));
    let output = case.forward(states.clone(), pooled.clone(), Memory::Normal);
    assert_matches("output", output, read(&case.io, "output"));
    for memory in [Memory::Normal, Memory::Low] {
        let states = states.clone().autodiff().require_grad();
        let pooled = pooled.clone().autodiff().require_grad();
        let output = case.forward(states.clone(), pooled.clone(), memory);
        let gradients = (output * read::<4>(&case.io, "towards")).sum().backward();
        let name = |what: &str| format!("{what} ({memory:?})");
        let found = states.grad(&gradients).unwrap();
        assert_matches(&name("states"), found, read(&case.io, "states.grad"));
        let found = pooled.grad(&gradients).unwrap();
        assert_matches(&name("pooled"), found, read(&case.io, "pooled.grad"));
    }
}

#[test]
fn the_transformer_of_sd35_medium_matches_diffusers_on_latents_that_are_not_square() {
    let (models, io) = (models_of([16, 24], false), io());
    let pipeline = models.pipeline();
    let prompts = [PROMPT, NEGATIVE].map(|text| encode(pipeline, text));
    let latents = read::<4>(&io, "wide.latents").repeat_dim(0, 2);
    let found = pipeline.predict(latents, &[999.0, 312.5], &Conditions::cat(&prompts));
    assert_matches("output", found, read(&io, "network.output"));
}

// The text encoders.

fn t5(models: &Models) -> &TextEncoder {
    &models.pipeline().text_encoders()[2]
}

#[test]
fn t5_reads_words_as_transformers_does() {
    let models = models_in(&golden("sd3"));
    let texts = std::fs::read_to_string(golden("sd3").join("t5_ids.json")).unwrap();
    let texts: BTreeMap<String, Vec<u32>> = serde_json::from_str(&texts).unwrap();
    for (text, mut expected) in texts {
        assert_eq!(expected.pop(), Some(1), "{text}: ends with </s>");
        let prompt = models.pipeline().prompt(&text).unwrap();
        assert_eq!(prompt.ids(2), expected, "{text}");
    }
    let frame = t5(&models).frame();
    assert_eq!((frame.length, frame.padding), (256, Padding::Whole(0)));
}

#[test]
fn t5_matches_transformers() {
    let (models, io) = (models_in(&golden("sd3")), io());
    let long = "An oil-painting of 12 blue houses; night, by the lakeside? (Zürich)";
    for (name, text) in [("short", PROMPT), ("long", long), ("none", "")] {
        let prompt = models.pipeline().prompt(text).unwrap();
        let encoder = t5(&models);
        let (beginning, cut) = encoder.read(&prompt.ids(2), 0).unwrap();
        assert_eq!(cut, 0);
        let found = encoder.finish(&beginning, None).unwrap();
        let name = format!("t5.{name}");
        assert_matches(&name, found.last_hidden_state, read(&io, &name));
    }
}

#[test]
fn sd3_joins_its_text_encoders_as_diffusers_does() {
    let (models, io) = (models_in(&golden("sd3")), io());
    let pipeline = models.pipeline();
    assert_eq!(pipeline.family(), &family::STABLE_DIFFUSION_3);
    let negative = pipeline.encode_negative_prompt(NEGATIVE).unwrap();
    for (prefix, found) in [("", encode(pipeline, PROMPT)), ("negative_", negative)] {
        let name = |kind: &str| format!("{prefix}{kind}");
        let expected = read(&io, &name("prompt_embeds"));
        assert_matches(&name("prompt_embeds"), found.context, expected);
        let expected = read(&io, &name("pooled_prompt_embeds"));
        assert_matches(&name("pooled"), found.pooled.unwrap(), expected);
    }
    // Without T5, the transformer adds the zeros in its place.
    let models = models_of([16, 16], true);
    let found = encode(models.pipeline(), PROMPT).context;
    let [_, n, d] = found.dims();
    let expected: Tensor<3> = read(&io, "without_t5.prompt_embeds");
    assert_eq!(expected.dims(), [1, n + 256, 40]);
    let of_clip = expected.clone().narrow(1, 0, n).narrow(2, 0, d);
    assert_matches("CLIP", found, of_clip);
    let of_t5 = expected.narrow(1, n, 256).abs().sum();
    assert_eq!(of_t5.into_scalar::<f32>(), 0.0);
}

// Schedule, autoencoder, pipeline.

#[test]
fn the_times_of_a_shifted_flow_equal_diffusers() {
    let (models, io) = (models_in(&golden("sd3")), io());
    for (steps, name) in [
        (1, "sigmas.1"),
        (4, "sigmas"),
        (5, "sigmas.5"),
        (28, "sigmas.28"),
    ] {
        let times = models.pipeline().noising().times(steps).unwrap();
        let sigmas: Vec<f32> = times.iter().map(|time| (time / 1000.0) as f32).collect();
        let expected: Tensor<1> = read(&io, name);
        let mut expected = expected.try_into_vec_as::<f32>().unwrap();
        assert_eq!(expected.pop(), Some(0.0));
        assert_eq!(sigmas.len(), expected.len());
        for (found, expected) in sigmas.iter().zip(&expected) {
            assert!(
                (found - expected).abs() < 1e-6,
                "{name}: {found} {expected}"
            );
        }
    }
}

#[test]
fn pictures_become_latents_of_16_channels_as_with_diffusers() {
    let (models, io) = (models_in(&golden("sd3")), io());
    let pipeline = models.pipeline();
    let picture = load_image(&golden("sd3").join("a.png")).unwrap();
    let found = pipeline.encode_image(&picture);
    assert_eq!(found.dims(), [1, 16, 8, 8]);
    assert_matches("latents", found, read(&io, "encoded"));
    check_picture(&models, read(&io, "drawn"), &io, "picture");
}

/// Compares a decoded picture, which has 256 levels.
fn check_picture(models: &Models, latents: Tensor<4>, io: &Weights, name: &str) {
    let picture = models.pipeline().decode(latents).unwrap();
    let expected = read::<4>(io, name).squeeze_dim::<3>(0).permute([1, 2, 0]);
    let expected: Vec<f32> = expected.try_into_vec_as().unwrap();
    assert_eq!(picture.as_raw().len(), expected.len());
    let differs = |(&found, expected): (&u8, f32)| (f32::from(found) - expected * 255.0).abs();
    let pairs = picture.as_raw().iter().zip(expected);
    let worst = pairs.map(differs).fold(0.0, f32::max);
    println!("{name}: {worst:.2} of 255");
    assert!(worst <= 1.0, "{name}: {worst} of 255");
}

fn draw(models: &Models, request: &TextToImage, latents: Tensor<4>) -> Tensor<4> {
    let init = InitNoise {
        latents,
        noise: None,
    };
    let inputs = Inputs {
        init: Some(init),
        ..Inputs::default()
    };
    generate::generate_latents(models, request, inputs, &mut silent).unwrap()
}

#[test]
fn sd3_draws_what_diffusers_draws() {
    let io = io();
    let check = |name: &str, models: &Models, request: &TextToImage, latents: &str| {
        let drawn = draw(models, request, read(&io, latents));
        assert_matches(name, drawn.clone(), read(&io, name));
        drawn
    };
    let models = models_of([16, 16], false);
    let drawn = check("drawn", &models, &request(4, 4.0), "latents");
    check_picture(&models, drawn, &io, "picture");
    check(
        "drawn_without_guidance",
        &models,
        &request(4, 1.0),
        "latents",
    );
    let without_t5 = models_of([16, 16], true);
    check("without_t5.drawn", &without_t5, &request(4, 4.0), "latents");
    let wide = models_of([16, 24], false);
    let with_negative = TextToImage {
        negative_prompt: NEGATIVE.to_owned(),
        ..request(4, 4.0)
    };
    let drawn = check("wide.drawn", &wide, &with_negative, "wide.latents");
    check_picture(&wide, drawn, &io, "wide.picture");
}

#[test]
fn sd3_reads_prompts_of_another_length_as_diffusers_does() {
    let io = io();
    let opened = |folder: &str, length, without_t5| {
        let mut paths = ModelPaths {
            model: golden(folder),
            ..ModelPaths::default()
        };
        paths.options.resolution = Some([16, 16]);
        paths.options.without_t5 = without_t5;
        paths.options.max_sequence_length = Some(length);
        Models::open(&paths, &Device::flex(), FloatDType::F32)
    };
    for (name, without_t5) in [("short.drawn", false), ("short.without_t5.drawn", true)] {
        let models = opened("sd3", 40, without_t5).unwrap();
        let drawn = draw(&models, &request(4, 4.0), read(&io, "latents"));
        assert_matches(name, drawn, read(&io, name));
    }
    let usual = opened("sd3", 256, false).unwrap();
    let drawn = draw(&usual, &request(4, 4.0), read(&io, "latents"));
    assert_matches("drawn", drawn, read(&io, "drawn"));
    for (folder, length, expected) in [
        (
            "sd3",
            1,
            "`max_sequence_length`: expected 2 to 512, found 1",
        ),
        ("sd3", 513, "expected 2 to 512"),
        ("klein", 3, "`max_sequence_length`: expected "),
        (
            "pipeline",
            77,
            "the text encoder of a StableDiffusionPipeline has a fixed length",
        ),
    ] {
        let message = opened(folder, length, false).unwrap_err().to_string();
        assert!(message.contains(expected), "{folder}: {message}");
    }
}

#[test]
fn settings_of_discrete_noise_are_refused() {
    let message = |change: fn(&mut FileOptions)| {
        let mut options = FileOptions::default();
        change(&mut options);
        let files = ModelFiles::open(&golden("sd3"), &options).unwrap();
        Pipeline::check_configs(&files).unwrap_err().to_string()
    };
    let expected = |name: &str, value: &str| {
        format!(
            "setting `{name}`: expected none, since the model is a flow, with a schedule of its own, found {value}"
        )
    };
    let found = message(|options| options.prediction_type = Some(PredictionType::VPrediction));
    assert_eq!(found, expected("prediction_type", "v_prediction"));
    let found = message(|options| options.timestep_spacing = Some(TimestepSpacing::Trailing));
    assert_eq!(found, expected("timestep_spacing", "trailing"));
    let found = message(|options| options.zero_snr = true);
    assert_eq!(found, expected("zero_snr", "true"));
}

// The method.

fn target() -> Target {
    Target {
        b: example_in("sd3").a_prime,
        caption_b: Some("a green house".to_owned()),
    }
}

#[test]
fn a_difference_learned_beside_t5_is_applied_without_it() {
    let models = models_of([16, 16], false);
    let (learned, applied) = analogy::solve(
        &models,
        &[example_in("sd3")],
        &target(),
        &short_analogy(),
        &Records::default(),
        &mut silent,
    )
    .unwrap();
    // D̃ is learned for both CLIP encoders; T5 reads only the words.
    let sizes: Vec<[usize; 2]> = (learned.tokens.embeddings().iter())
        .map(Tensor::dims)
        .collect();
    assert_eq!(sizes, [[2, 16], [2, 20]]);
    for embedding in learned.tokens.embeddings() {
        assert!(embedding.clone().abs().min().into_scalar::<f32>() > 0.0);
    }
    let without_t5 = models_of([16, 16], true);
    let apply = |models: &Models| {
        let config = short_analogy();
        let applied = analogy::apply(models, &learned.tokens, &target(), &config, &mut silent);
        applied.unwrap().b_prime
    };
    assert_eq!(apply(&models), applied.b_prime);
    assert_ne!(apply(&without_t5), applied.b_prime);
}

#[test]
fn every_inversion_takes_b_back_without_the_difference() {
    let models = models_of([16, 16], false);
    let pipeline = models.pipeline();
    let tokens = pipeline.learned_encoders().iter();
    let tokens = tokens.map(|one| Tensor::full([2, one.hidden_size()], 0.3, &Device::flex()));
    let tokens = DifferenceTokens::new(tokens.collect(), pipeline.base()).unwrap();
    let same = pipeline.decode(pipeline.encode_image(&target().b)).unwrap();
    for inversion in [Inversion::EditFriendly, Inversion::Ddim, Inversion::Sdedit] {
        let apply = |strength: f64| {
            let mut config = short_analogy();
            config.generate.inversion = inversion;
            config.generate.inversion_iterations = 12;
            config.generate.num_inference_steps = 8;
            config.generate.strength = strength;
            let applied = analogy::apply(&models, &tokens, &target(), &config, &mut silent);
            applied.unwrap().b_prime
        };
        let (nothing, all) = (apply(0.0), apply(1.0));
        assert_ne!(nothing, all, "{inversion:?}");
        if inversion == Inversion::EditFriendly {
            let worst = furthest(&nothing, &same);
            assert!(worst <= 1, "{worst}");
        }
    }
}

#[test]
fn the_estimate_of_memory_knows_whether_there_is_a_t5() {
    let peak = |without_t5, memory| {
        let mut paths = ModelPaths {
            model: golden("sd3"),
            ..ModelPaths::default()
        };
        paths.options.without_t5 = without_t5;
        let memory = LearningMemory {
            dtype: FloatDType::F32,
            q8: false,
            memory,
            rows: 2,
            side: None,
            captions: false,
        };
        memory.peak(&paths).unwrap()
    };
    let t5 = open(&golden("sd3/text_encoder_3"));
    let of_t5 = |memory| peak(false, memory) - peak(true, memory);
    assert_eq!(of_t5(Memory::Normal), t5.bytes_in_memory());
    // Read layer by layer, of which the first is the largest: it also has the bias.
    let [first, second, third] =
        [0, 1, 2].map(|number| t5.scope("encoder.block").scope(number).bytes_in_memory());
    assert!(first > second && second == third && third > 0);
    assert_eq!(of_t5(Memory::Low), t5.bytes_in_memory() - second - third);
}

// Mismatches.

#[test]
fn a_difference_of_another_family_on_the_same_text_encoders_is_refused() {
    let models = models_in(&golden("sd3"));
    let mut base = models.pipeline().base();
    assert_eq!(base.denoiser, "multimodal transformer");
    base.denoiser = "U-Net".to_owned();
    let tokens = DifferenceTokens::zeros(2, &base, &Device::flex());
    let error = analogy::check_apply(&models, &tokens, &short_analogy()).unwrap_err();
    let message = error.to_string();
    assert!(message.contains("learned on a U-Net"), "{message}");
    let expected = "this model is a multimodal transformer";
    assert!(message.contains(expected), "{message}");
}

#[test]
fn parts_that_are_missing_or_do_not_fit_are_named() {
    let transformer = |from: &'static str, to: &'static str| {
        refused("sd3", |folder| {
            edit(&folder.join("transformer/config.json"), from, to)
        })
    };
    for (from, to, expected) in [
        (
            "\"pooled_projection_dim\": 22",
            "\"pooled_projection_dim\": 12",
            "`pooled_projection_dim`: expected 22, the width of both projected prompts, found 12",
        ),
        (
            "\"joint_attention_dim\": 40",
            "\"joint_attention_dim\": 64",
            "`joint_attention_dim`: expected 40, the width of T5, found 64",
        ),
        (
            "\"joint_attention_dim\": 40",
            "\"joint_attention_dim\": 20",
            "expected at least 36, the width of both CLIP text encoders",
        ),
        (
            "\"in_channels\": 16",
            "\"in_channels\": 4",
            "`in_channels`: expected 16, the channels of the latents",
        ),
        (
            "\"rms_norm\"",
            "\"layer_norm\"",
            "`qk_norm`: expected null or \"rms_norm\"",
        ),
        (
            "\"caption_projection_dim\": 24",
            "\"caption_projection_dim\": 32",
            "`caption_projection_dim`: expected 24",
        ),
        (
            "\"num_layers\": 4",
            "\"num_layers\": 3",
            "transformer_blocks.2",
        ),
        ("    1\n", "    7\n", "expected numbers below 4"),
    ] {
        let message = transformer(from, to);
        assert!(message.contains(expected), "{message}");
    }
    for part in ["text_encoder", "text_encoder_2", "transformer", "vae"] {
        let message = refused("sd3", |folder| {
            std::fs::remove_dir_all(folder.join(part)).unwrap()
        });
        assert!(
            message.contains(&format!("no folder `{part}`")),
            "{message}"
        );
    }
    let remove_t5 = |folder: &std::path::Path| {
        std::fs::remove_dir_all(folder.join("text_encoder_3")).unwrap();
    };
    let message = refused("sd3", remove_t5);
    let expected = "names `text_encoder_3`, and there is no such folder";
    assert!(message.contains(expected), "{message}");
    // A model that names no T5 has none.
    let folder = copy("sd3");
    remove_t5(folder.path());
    let index = folder.path().join("model_index.json");
    let text = std::fs::read_to_string(&index).unwrap();
    let mut text: serde_json::Value = serde_json::from_str(&text).unwrap();
    text["text_encoder_3"] = serde_json::json!([null, null]);
    std::fs::write(&index, text.to_string()).unwrap();
    let pipeline = opened(folder.path()).unwrap();
    assert_eq!(pipeline.text_encoders().len(), 2);
}

#[test]
fn pictures_beyond_the_table_of_positions_are_refused() {
    let mut paths = ModelPaths {
        model: golden("sd3"),
        ..ModelPaths::default()
    };
    paths.options.resolution = Some([16, 40]);
    let error = Models::open(&paths, &Device::flex(), FloatDType::F32).unwrap_err();
    let message = error.to_string();
    assert!(message.contains("multiples of 4, at most 36"), "{message}");
}

#[test]
fn t5_is_left_out_of_nothing_else() {
    let mut paths = ModelPaths {
        model: golden("sdxl"),
        ..ModelPaths::default()
    };
    paths.options.without_t5 = true;
    let error = Models::open(&paths, &Device::flex(), FloatDType::F32).unwrap_err();
    let message = error.to_string();
    assert!(message.contains("setting `without_t5`"), "{message}");
    assert!(message.contains("StableDiffusionXLPipeline"), "{message}");
}

#[test]
fn a_single_file_in_the_original_layout_says_what_to_take_instead() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sd3_medium.safetensors");
    let key = "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias";
    let bias = difference_inversion::util::arrays::Array::floats([6], vec![0.0; 6]);
    Arrays::default().with(key, bias).write(&path).unwrap();
    let paths = ModelPaths {
        model: path,
        ..ModelPaths::default()
    };
    let message = paths.files().unwrap_err().to_string();
    assert!(message.contains("StableDiffusion3Pipeline"), "{message}");
    assert!(message.contains("sd3 or sd35 or sd35-large"), "{message}");
}
