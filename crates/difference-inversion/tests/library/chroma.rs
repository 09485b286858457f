//! Chroma against diffusers and transformers, on a tiny model with random weights made by
//! `training/reference/make_golden_chroma.py`.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor};
use difference_inversion::diffusion::draw::TextToImage;
use difference_inversion::diffusion::family;
use difference_inversion::diffusion::frozen::{ModelPaths, Models};
use difference_inversion::diffusion::text_encoder::Padding;
use difference_inversion::method::analogy::{self, Target};
use difference_inversion::method::difference::DifferenceTokens;
use difference_inversion::method::learn::Records;
use difference_inversion::models::denoiser::chroma::{ChromaConfig, ChromaTransformer2DModel};
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

fn models() -> Models {
    models_of(&golden("chroma"), [16, 16])
}

fn io() -> Weights {
    open(&golden("chroma/io.safetensors"))
}

fn network() -> ChromaTransformer2DModel {
    let folder = golden("chroma/transformer");
    let config: ChromaConfig = read_config(&folder.join("config.json")).unwrap();
    ChromaTransformer2DModel::load(&open(&folder), &config).unwrap()
}

// The network.

/// Two rows, of which one has padding that is not attended to.
#[test]
fn the_transformer_and_its_gradients_match_diffusers_for_prompts_of_unequal_length() {
    let (network, io) = (network(), io());
    check_network(&io, |latents, states, memory| {
        let times = read::<1>(&io, "network.times");
        let short = (0..9).map(|place| if place < 4 { 1.0 } else { 0.0 });
        let presence = [vec![1.0; 9], short.collect()];
        network.forward(latents, times, states, &presence, memory)
    });
}

/// What a prompt of four tokens predicts together with further `states`, each of which is present as far as `share` says.
fn with_further(states: &[Tensor<3>], share: f32) -> Tensor<4> {
    let (network, io) = (network(), io());
    let latents = read::<4>(&io, "network.latents").narrow(0, 1, 1);
    let times = Tensor::<1>::from_floats([500.0], &Device::flex());
    let four = read::<3>(&io, "network.states")
        .narrow(0, 1, 1)
        .narrow(1, 0, 4);
    // As a strength between two prompts makes them.
    let shares = states.iter().map(|state| state.clone() * share);
    let context = Tensor::cat([four].into_iter().chain(shares).collect(), 1);
    let mut presence = vec![1.0; 4];
    presence.resize(4 + states.len(), share);
    network.forward(latents, times, context, &[presence], Memory::Normal)
}

/// Two states.
fn further() -> [Tensor<3>; 2] {
    let states = read::<3>(&io(), "network.states").narrow(0, 0, 1);
    [4, 5].map(|place| states.clone().narrow(1, place, 1))
}

/// A token that is there twice, each time by half, is one whole token.
#[test]
fn two_halves_of_a_token_are_one() {
    let [one, other] = further();
    let whole = with_further(&[one.clone(), other.clone()], 1.0);
    let halves = with_further(&[one.clone(), other.clone(), one, other], 0.5);
    assert_matches("halves", halves, whole);
}

/// From absent to present, tokens gain weight without a jump at either end.
#[test]
fn tokens_that_are_present_in_part_are_attended_to_in_part() {
    let draw = |share| with_further(&further(), share);
    let distance = |x: &Tensor<4>, y: &Tensor<4>| {
        let difference = (x.clone() - y.clone()).powf_scalar(2.0).mean();
        difference.into_scalar::<f32>().sqrt()
    };
    let [absent, nearly, half, almost, present] = [0.0, 1e-4, 0.5, 0.9999, 1.0].map(draw);
    let whole = distance(&absent, &present);
    assert!(whole > 0.01, "{whole}");
    assert!(distance(&absent, &nearly) < whole * 0.01);
    assert!(distance(&almost, &present) < whole * 0.01);
    for end in [&absent, &present] {
        let way = distance(&half, end) / whole;
        assert!((0.1..0.9).contains(&way), "{way}");
    }
}

// Prompts and schedule.

#[test]
fn a_sentencepiece_model_gives_the_ids_of_transformers() {
    let models = models();
    let pipeline = models.pipeline();
    let frame = pipeline.text_encoders()[0].frame();
    let ids: BTreeMap<String, Vec<u32>> = read_config(&golden("chroma/ids.json")).unwrap();
    for (text, expected) in ids {
        let words = pipeline.prompt(&text).unwrap().ids(0);
        assert_eq!([words, frame.after.clone()].concat(), expected, "{text:?}");
    }
    assert_eq!((frame.length, frame.padding), (512, Padding::Once(0)));
}

/// T5 reads as if there were no padding, of which one token is left.
#[test]
fn t5_reads_the_prompt_as_in_diffusers() {
    let (models, io) = (models(), io());
    let pipeline = models.pipeline();
    assert_eq!(pipeline.family(), &family::CHROMA);
    for (prefix, text) in [("", PROMPT), ("negative_", NEGATIVE)] {
        let found = encode(pipeline, text);
        let expected = read::<2>(&io, &format!("{prefix}prompt_embeds"));
        assert_eq!(found.presence, [vec![1.0; expected.dims()[0]]]);
        assert_matches("states", found.context.squeeze_dim(0), expected);
    }
}

#[test]
fn times_are_those_of_diffusers() {
    let (models, io) = (models(), io());
    for steps in [1, 4, 40] {
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

#[test]
fn it_draws_what_diffusers_draws_if_its_mask_masks() {
    let io = io();
    for (prefix, size) in [("", [16, 16]), ("wide.", [16, 24])] {
        let models = models_of(&golden("chroma"), size);
        let request = TextToImage {
            negative_prompt: NEGATIVE.to_owned(),
            ..request(4, 3.0)
        };
        let drawn = draw(&models, &request, read(&io, &format!("{prefix}latents")));
        let expected = read(&io, &format!("{prefix}drawn"));
        assert_matches(&format!("{prefix}drawn"), drawn.clone(), expected);
        check_picture(&models, drawn, read(&io, &format!("{prefix}picture")));
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
        b: example_in("chroma").a_prime,
        caption_b: Some("a green house".to_owned()),
    };
    let examples = [example_in("chroma")];
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
    let [embedding] = learned.tokens.embeddings() else {
        panic!("one text encoder");
    };
    assert_eq!(embedding.dims(), [2, 40]);
    let apply = |tokens: &DifferenceTokens, config: &_| {
        let applied = analogy::apply(&models, tokens, &target, config, &mut silent);
        applied.unwrap().b_prime
    };
    assert_eq!(apply(&learned.tokens, &config), applied.b_prime);
    check_strengths(&models, &waves(&models), &target);
}

// What does not fit.

#[test]
fn parts_that_do_not_fit_are_refused_in_words() {
    for [part, from, to, expected] in [
        [
            "transformer",
            "\"joint_attention_dim\": 40",
            "\"joint_attention_dim\": 64",
            "`joint_attention_dim`: expected 40, the width of T5, found 64",
        ],
        [
            "transformer",
            "\"in_channels\": 64",
            "\"in_channels\": 32",
            "`in_channels`: expected 64, four times the channels of the latents, found 32",
        ],
        [
            "transformer",
            "\"approximator_num_channels\": 32",
            "\"approximator_num_channels\": 30",
            "`approximator_num_channels`: expected a multiple of 8, found 30",
        ],
        [
            "transformer",
            "\"approximator_layers\": 2",
            "\"approximator_layers\": 0",
            "`approximator_layers`: expected 1 to",
        ],
        [
            "transformer",
            "\"approximator_layers\": 2",
            "\"approximator_layers\": 2, \"guidance_embeds\": true",
            "`guidance_embeds`: expected no such field",
        ],
        [
            "transformer",
            "\"num_single_layers\": 2",
            "\"num_single_layers\": 3",
            "single_transformer_blocks.2",
        ],
    ] {
        let message = refused("chroma", |folder| {
            edit(&folder.join(part).join("config.json"), from, to);
        });
        assert!(message.contains(expected), "{message}");
    }
    for part in ["text_encoder", "tokenizer", "transformer", "vae"] {
        let message = refused("chroma", |folder| {
            std::fs::remove_dir_all(folder.join(part)).unwrap();
        });
        let expected = format!("no folder `{part}`");
        assert!(message.contains(&expected), "{message}");
    }
    let message = refused("chroma", |folder| {
        std::fs::remove_file(folder.join("tokenizer/spiece.model")).unwrap();
    });
    assert!(message.contains("tokenizer.json"), "{message}");
}

#[test]
fn a_single_file_says_what_to_take_instead() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("Chroma1-HD.safetensors");
    let one = || Array::floats([8], vec![1.0; 8]);
    Arrays::default()
        .with("distilled_guidance_layer.in_proj.weight", one())
        .with("double_blocks.0.img_attn.norm.key_norm.scale", one())
        .write(&path)
        .unwrap();
    let paths = ModelPaths {
        model: path,
        ..ModelPaths::default()
    };
    let message = paths.files().unwrap_err().to_string();
    assert!(message.contains("ChromaPipeline"), "{message}");
    assert!(message.contains("chroma"), "{message}");
}
