//! Z-Image against diffusers and transformers, on a tiny model with random weights made by
//! `training/reference/make_golden_z_image.py`.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor};
use difference_inversion::diffusion::draw::TextToImage;
use difference_inversion::diffusion::family;
use difference_inversion::diffusion::frozen::{ModelPaths, Models};
use difference_inversion::diffusion::text_encoder::Padding;
use difference_inversion::method::analogy::{self, Target};
use difference_inversion::method::difference::DifferenceTokens;
use difference_inversion::method::learn::Records;
use difference_inversion::models::denoiser::z_image::{ZImageConfig, ZImageTransformer2DModel};
use difference_inversion::models::denoiser::{GuidedBy, Memory};
use difference_inversion::util::arrays::{Array, Arrays};
use difference_inversion::weights::{Weights, read_config};

use super::common::{assert_matches, open, read};
use crate::flux::{check_picture, draw, encode, models_of};
use crate::tiny::{
    PROMPT, check_network, check_strengths, edit, example_in, golden, refused, request,
    short_analogy, silent, waves,
};

const NEGATIVE: &str = "red";

/// A prompt that pads to 64 tokens, where the others pad to 32.
const LONG: &str = "one two three four five six seven eight nine ten houses at a lake";

fn models() -> Models {
    models_of(&golden("z_image"), [16, 16])
}

fn io() -> Weights {
    open(&golden("z_image/io.safetensors"))
}

/// Of rows with so many tokens, in a batch of 40.
fn presence(lengths: &[usize]) -> Vec<Vec<f32>> {
    let of = |&length| {
        let mut row = vec![1.0; length];
        row.resize(40, 0.0);
        row
    };
    lengths.iter().map(of).collect()
}

// The network.

/// Two rows, of a prompt that pads to 64 tokens and of one that pads to 32.
#[test]
fn the_transformer_and_its_gradients_match_diffusers_for_prompts_of_unequal_length() {
    let (folder, io) = (golden("z_image/transformer"), io());
    let config: ZImageConfig = read_config(&folder.join("config.json")).unwrap();
    let network = ZImageTransformer2DModel::load(&open(&folder), &config).unwrap();
    let forward = |latents: Tensor<4>, states: Tensor<3>, memory| {
        let times = read::<1>(&io, "network.times").neg() / 1000.0 + 1.0;
        network
            .forward(latents, times, states, &presence(&[40, 7]), memory)
            .neg()
    };
    check_network(&io, forward);
}

/// Rows that pad to one length are computed together, and each is what it is by itself.
#[test]
fn a_batch_is_its_rows() {
    let (folder, io) = (golden("z_image/transformer"), io());
    let config: ZImageConfig = read_config(&folder.join("config.json")).unwrap();
    let network = ZImageTransformer2DModel::load(&open(&folder), &config).unwrap();
    let latents = read::<4>(&io, "network.latents");
    let states = read::<3>(&io, "network.states");
    let times = Tensor::<1>::from_floats([0.2, 0.9], &Device::flex());
    let presence = presence(&[20, 7]);
    let forward = |rows: std::ops::Range<usize>| {
        let (start, count) = (rows.start, rows.len());
        network.forward(
            latents.clone().narrow(0, start, count),
            times.clone().narrow(0, start, count),
            states.clone().narrow(0, start, count),
            &presence[rows],
            Memory::Normal,
        )
    };
    let alone = Tensor::cat(vec![forward(0..1), forward(1..2)], 0);
    assert_matches("rows", forward(0..2), alone);
}

// Prompts and schedule.

#[test]
fn the_template_gives_the_ids_of_apply_chat_template() {
    let models = models();
    let pipeline = models.pipeline();
    let frame = pipeline.text_encoders()[0].frame();
    let ids: BTreeMap<String, Vec<u32>> = read_config(&golden("z_image/ids.json")).unwrap();
    for (text, expected) in ids {
        let words = pipeline.prompt(&text).unwrap().ids(0);
        let found = [&frame.before, &words, &frame.after].map(|ids| &ids[..]);
        assert_eq!(found.concat(), expected, "{text:?}");
    }
    assert_eq!((frame.length, frame.padding), (512, Padding::Nothing));
}

#[test]
fn qwen3_reads_the_prompt_as_in_diffusers() {
    let (models, io) = (models(), io());
    let pipeline = models.pipeline();
    assert_eq!(pipeline.family(), &family::Z_IMAGE);
    for (prefix, text) in [("", PROMPT), ("negative_", NEGATIVE), ("long_", LONG)] {
        let found = encode(pipeline, text);
        let expected = read::<2>(&io, &format!("{prefix}prompt_embeds"));
        assert_eq!(found.presence, [vec![1.0; expected.dims()[0]]]);
        assert_matches("states", found.context.squeeze_dim(0), expected);
    }
}

#[test]
fn times_are_those_of_diffusers() {
    let (models, io) = (models(), io());
    for steps in [1, 4, 8, 50] {
        let times = models.pipeline().noising().times(steps).unwrap();
        let expected: Tensor<1> = read(&io, &format!("sigmas.{steps}"));
        let mut expected = expected.try_into_vec_as::<f32>().unwrap();
        assert_eq!(expected.pop(), Some(0.0));
        assert_eq!(times.len(), expected.len());
        for (time, expected) in times.iter().zip(&expected) {
            let found = (time / 1000.0) as f32;
            assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        }
    }
}

// Drawing.

/// diffusers' guidance scale g is 1 + g here, and its 0 is 1.
#[test]
fn it_draws_what_diffusers_draws_with_guidance_and_without() {
    let io = io();
    for (kind, scale) in [("", 4.0), ("turbo.", 1.0)] {
        for (prefix, size) in [("", [16, 16]), ("wide.", [16, 24])] {
            let models = models_of(&golden("z_image"), size);
            let request = TextToImage {
                prompt: LONG.to_owned(),
                negative_prompt: if kind.is_empty() { NEGATIVE } else { "" }.to_owned(),
                ..request(4, scale)
            };
            let drawn = draw(&models, &request, read(&io, &format!("{prefix}latents")));
            let expected = read(&io, &format!("{kind}{prefix}drawn"));
            assert_matches(&format!("{kind}{prefix}drawn"), drawn.clone(), expected);
            check_picture(&models, drawn, read(&io, &format!("{kind}{prefix}picture")));
        }
    }
    assert_eq!(
        models().pipeline().denoiser().guided_by(),
        GuidedBy::Reference
    );
}

// The method.

#[test]
fn a_difference_is_learned_and_applied_with_every_inversion_and_guidance() {
    let models = models();
    let target = Target {
        b: example_in("z_image").a_prime,
        caption_b: Some("a green house".to_owned()),
    };
    let examples = [example_in("z_image")];
    let config = short_analogy();
    let (learned, applied) = analogy::solve(
        &models,
        &examples,
        &target,
        &config,
        &Records::default(),
        &mut silent,
    )
    .unwrap();
    let apply = |tokens: &DifferenceTokens, config: &_| {
        let applied = analogy::apply(&models, tokens, &target, config, &mut silent);
        applied.unwrap().b_prime
    };
    assert_eq!(apply(&learned.tokens, &config), applied.b_prime);
    check_strengths(&models, &waves(&models), &target);
}

/// klein has the same Qwen3, but what moves its transformer means nothing to this one.
#[test]
fn a_difference_of_klein_is_refused() {
    let models = models();
    let mut base = models.pipeline().base();
    base.denoiser = "FLUX.2 klein transformer".to_owned();
    let tokens = DifferenceTokens::zeros(2, &base, &Device::flex());
    let error = analogy::check_apply(&models, &tokens, &short_analogy()).unwrap_err();
    let expected = "this model is a Z-Image transformer";
    assert!(error.to_string().contains(expected), "{error}");
}

// What does not fit.

#[test]
fn parts_that_do_not_fit_are_refused_in_words() {
    for [part, from, to, expected] in [
        [
            "transformer",
            "\"siglip_feat_dim\": null",
            "\"siglip_feat_dim\": 1152",
            "`siglip_feat_dim`: expected null: Z-Image Omni",
        ],
        [
            "transformer",
            "\"cap_feat_dim\": 16",
            "\"cap_feat_dim\": 24",
            "`cap_feat_dim`: expected 16, the width of Qwen3, found 24",
        ],
        [
            "transformer",
            "\"in_channels\": 8",
            "\"in_channels\": 16",
            "`in_channels`: expected 8, the channels of the latents, found 16",
        ],
        [
            "transformer",
            "\"dim\": 32",
            "\"dim\": 33",
            "`n_heads`: expected a number that divides 33",
        ],
        [
            "transformer",
            "\"n_kv_heads\": 2",
            "\"n_kv_heads\": 1",
            "`n_kv_heads`: expected 2, found 1",
        ],
        [
            "transformer",
            "\"t_scale\": 1000.0",
            "\"t_scale\": -1",
            "`t_scale`: expected 0.001 to",
        ],
        [
            "transformer",
            "\"t_scale\": 1000.0",
            "\"t_scale\": 1000.0, \"quantization_config\": {}",
            "`quantization_config`: expected no such field",
        ],
        [
            "transformer",
            "\"n_layers\": 2",
            "\"n_layers\": 1",
            "layers.1",
        ],
        [
            "text_encoder",
            "\"num_hidden_layers\": 4",
            "\"num_hidden_layers\": 1",
            "`num_hidden_layers`: expected at least 2",
        ],
    ] {
        let message = refused("z_image", |folder| {
            edit(&folder.join(part).join("config.json"), from, to);
        });
        assert!(message.contains(expected), "{message}");
    }
    for part in ["text_encoder", "tokenizer", "transformer", "vae"] {
        let message = refused("z_image", |folder| {
            std::fs::remove_dir_all(folder.join(part)).unwrap();
        });
        let expected = format!("no folder `{part}`");
        assert!(message.contains(&expected), "{message}");
    }
}

#[test]
fn a_single_file_says_what_to_take_instead() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("z_image_turbo_bf16.safetensors");
    Arrays::default()
        .with(
            "layers.0.attention.qkv.weight",
            Array::floats([8], vec![1.0; 8]),
        )
        .write(&path)
        .unwrap();
    let paths = ModelPaths {
        model: path,
        ..ModelPaths::default()
    };
    let message = paths.files().unwrap_err().to_string();
    assert!(message.contains("ZImagePipeline"), "{message}");
    assert!(message.contains("z-image"), "{message}");
}
