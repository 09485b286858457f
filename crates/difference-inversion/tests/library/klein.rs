//! FLUX.2 klein, base and distilled, against diffusers and transformers, on a tiny model with random weights made
//! by `training/reference/make_golden_klein.py`.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, FloatDType, Tensor, TensorData};
use difference_inversion::diffusion::draw::TextToImage;
use difference_inversion::diffusion::family;
use difference_inversion::diffusion::frozen::{ModelPaths, Models};
use difference_inversion::diffusion::memory::LearningMemory;
use difference_inversion::diffusion::words::Words;
use difference_inversion::image::load_image;
use difference_inversion::method::analogy::{self, Applied, Example, Target};
use difference_inversion::method::delta::DeltaMode;
use difference_inversion::method::difference::DifferenceTokens;
use difference_inversion::method::generate::{self, Inputs};
use difference_inversion::method::generate_config::{AnalogyConfig, GenerateConfig};
use difference_inversion::method::learn::{Initialisation, LearnConfig, Pair, Records};
use difference_inversion::method::loss::ClipLoss;
use difference_inversion::method::prompt::PromptMode;
use difference_inversion::models::denoiser::flux2::{Flux2Config, Flux2Transformer2DModel};
use difference_inversion::models::denoiser::{GuidedBy, Memory};
use difference_inversion::models::text::qwen3::{Qwen3Config, Qwen3Model};
use difference_inversion::models::text::tokenizer::Tokenizer;
use difference_inversion::models::text::tower::Tower;
use difference_inversion::util::arrays::{Array, Arrays};
use difference_inversion::util::progress::Progress;
use difference_inversion::util::tensors::host;
use difference_inversion::util::vector::{cosine, unit};
use difference_inversion::weights::{Weights, read_config};
use tempfile::TempDir;

use super::common::{assert_matches, open, read};
use crate::flux::{check_picture, draw, encode, models_of};
use crate::tiny::{
    PROMPT, check_network, check_strengths, copy, edit, example_in, golden, opened, refused,
    request, short_analogy, silent, waves,
};

const NEGATIVE: &str = "red";

/// The two models, which differ only in `model_index.json`.
#[derive(Clone, Copy)]
enum Kind {
    Base,
    Distilled,
}

fn folder_of(kind: Kind) -> TempDir {
    let folder = copy("klein");
    if let Kind::Distilled = kind {
        let index = folder.path().join("model_index.json");
        edit(&index, "\"is_distilled\": false", "\"is_distilled\": true");
    }
    folder
}

fn models(kind: Kind) -> Models {
    models_of(folder_of(kind).path(), [16, 16])
}

fn io() -> Weights {
    open(&golden("klein/io.safetensors"))
}

// The networks.

#[test]
fn the_transformer_and_its_gradients_match_diffusers() {
    let (folder, io) = (golden("klein/transformer"), io());
    let config: Flux2Config = read_config(&folder.join("config.json")).unwrap();
    let network = Flux2Transformer2DModel::load(&open(&folder), &config).unwrap();
    let forward = |latents: Tensor<4>, states: Tensor<3>, memory| {
        network.forward(latents, read(&io, "network.times"), states, memory)
    };
    check_network(&io, forward);
}

/// Qwen3, read at the outputs of these layers.
fn qwen(layers: &[usize]) -> Qwen3Model {
    let folder = golden("klein/text_encoder");
    let config: Qwen3Config = read_config(&folder.join("config.json")).unwrap();
    Qwen3Model::load(&open(&folder), &config, layers).unwrap()
}

#[test]
fn qwen3_and_its_gradients_match_transformers_whatever_pads_the_prompt() {
    let (qwen, io) = (qwen(&[1, 5, 28]), io());
    for (row, length) in [13, 9].into_iter().enumerate() {
        let of_row = |name: &str| read::<3>(&io, name).narrow(0, row, 1);
        let embeds: Tensor<2> = of_row("tower.embeds").squeeze_dim(0);
        let expected = || of_row("tower.states");
        let leaf = embeds.clone().autodiff().require_grad();
        let found = qwen.finish(None, leaf.clone(), length - 1).unwrap();
        assert_eq!(found.hidden_states.len(), 3);
        let states = Tensor::cat(found.hidden_states, 2);
        assert_matches("states", states.clone().inner(), expected());
        let gradients = (states * of_row("tower.towards")).sum().backward();
        let found = leaf.grad(&gradients).unwrap();
        let expected_gradient = of_row("tower.embeds.grad").squeeze_dim(0);
        assert_matches("gradient", found, expected_gradient);
        // In two parts, the first of which is kept.
        let [begin, rest] = [(0, 6), (6, 14)].map(|(start, n)| embeds.clone().narrow(0, start, n));
        let beginning = qwen.begin(begin).unwrap();
        let found = qwen.finish(Some(&beginning), rest, length - 1).unwrap();
        assert_matches("in parts", Tensor::cat(found.hidden_states, 2), expected());
    }
    for end in [20, 5] {
        let embeds: Tensor<2> = read::<3>(&io, "tower.embeds")
            .narrow(0, 0, 1)
            .squeeze_dim(0);
        let beginning = qwen.begin(embeds.clone().narrow(0, 0, 6)).unwrap();
        let rest = embeds.narrow(0, 6, 14);
        let error = qwen.finish(Some(&beginning), rest, end).unwrap_err();
        assert!(
            error.to_string().contains(&format!("ends at {end}")),
            "{error}"
        );
    }
}

// Prompts, schedule, autoencoder.

/// The ids of some texts in the template, without padding, by transformers.
fn expected_ids() -> BTreeMap<String, Vec<u32>> {
    read_config(&golden("klein/ids.json")).unwrap()
}

#[test]
fn the_template_gives_the_ids_of_apply_chat_template() {
    let models = models(Kind::Base);
    let pipeline = models.pipeline();
    let frame = pipeline.text_encoders()[0].frame();
    for (text, expected) in expected_ids() {
        let words = pipeline.prompt(&text).unwrap().ids(0);
        let found = [&frame.before, &words, &frame.after].map(|ids| &ids[..]);
        assert_eq!(found.concat(), expected, "{text:?}");
    }
    assert_eq!(frame.length, 512);
}

#[test]
fn a_vocabulary_with_merges_is_the_same_tokenizer() {
    let folder = golden("klein/tokenizer");
    let file: serde_json::Value = read_config(&folder.join("tokenizer.json")).unwrap();
    let (whole, pad) = Tokenizer::open_qwen(&folder).unwrap();
    let apart = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(apart.path().join(name), text).unwrap();
    write("vocab.json", &file["model"]["vocab"].to_string());
    let merges = file["model"]["merges"].as_array().unwrap().iter();
    let merges: Vec<String> = merges
        .map(|pair| {
            format!(
                "{} {}",
                pair[0].as_str().unwrap(),
                pair[1].as_str().unwrap()
            )
        })
        .collect();
    write(
        "merges.txt",
        &format!("#version: 0.2\n{}\n", merges.join("\n")),
    );
    let added = file["added_tokens"].as_array().unwrap();
    // As transformers wrote them: in the tokenizer's configuration, or in a file of their own.
    let decoder: serde_json::Map<String, serde_json::Value> = (added.iter())
        .map(|token| (token["id"].to_string(), token.clone()))
        .collect();
    let config =
        serde_json::json!({ "pad_token": "<|endoftext|>", "added_tokens_decoder": decoder });
    let ids: serde_json::Map<String, serde_json::Value> = (added.iter())
        .map(|token| {
            (
                token["content"].as_str().unwrap().to_owned(),
                token["id"].clone(),
            )
        })
        .collect();
    for (config, ids) in [(config, None), (serde_json::json!({}), Some(ids))] {
        write("tokenizer_config.json", &config.to_string());
        if let Some(ids) = ids {
            write(
                "added_tokens.json",
                &serde_json::Value::from(ids).to_string(),
            );
        }
        let (found, found_pad) = Tokenizer::open_qwen(apart.path()).unwrap();
        assert_eq!((found_pad, found.vocab_size()), (pad, whole.vocab_size()));
        for text in expected_ids().keys() {
            assert_eq!(
                found.encode(text).unwrap(),
                whole.encode(text).unwrap(),
                "{text:?}"
            );
        }
    }
    write("tokenizer_config.json", r#"{"padding_side": "left"}"#);
    let error = Tokenizer::open_qwen(apart.path()).unwrap_err().to_string();
    assert!(error.contains("`padding_side`: expected right"), "{error}");
    write("tokenizer_config.json", r#"{"pad_token": "<none>"}"#);
    let error = Tokenizer::open_qwen(apart.path()).unwrap_err().to_string();
    assert!(error.contains("\"<none>\""), "{error}");
}

#[test]
fn qwen3_reads_the_prompt_as_in_diffusers() {
    let (models, io) = (models(Kind::Base), io());
    let pipeline = models.pipeline();
    assert_eq!(pipeline.family(), &family::FLUX_2_KLEIN);
    for (prefix, text) in [("", PROMPT), ("negative_", NEGATIVE)] {
        let states = encode(pipeline, text).context;
        assert_eq!(states.dims(), [1, 512, 48]);
        let ends = [(0, 64), (496, 16)].map(|(start, n)| states.clone().narrow(1, start, n));
        let expected = read(&io, &format!("{prefix}prompt_embeds"));
        assert_matches("states", Tensor::cat(ends.to_vec(), 1), expected);
    }
}

#[test]
fn times_are_shifted_by_the_size_of_the_picture_and_the_number_of_steps() {
    let io = io();
    let sized = |size| {
        models_of(&golden("klein"), size)
            .pipeline()
            .noising()
            .clone()
    };
    let [square, wide] = [sized([16, 16]), sized([16, 24])];
    for (tokens, noising) in [
        (16, square.clone()),
        (24, wide),
        (1024, square.clone().for_tokens(1024)),
        (4096, square.clone().for_tokens(4096)),
        (5000, square.for_tokens(5000)),
    ] {
        for steps in [1, 4, 50] {
            let times = noising.times(steps).unwrap();
            let expected: Tensor<1> = read(&io, &format!("sigmas.{tokens}.{steps}"));
            let mut expected = expected.try_into_vec_as::<f32>().unwrap();
            assert_eq!(expected.pop(), Some(0.0));
            assert_eq!(times.len(), expected.len());
            for (time, expected) in times.iter().zip(&expected) {
                let found = (time / 1000.0) as f32;
                assert!(
                    (found - expected).abs() < 1e-6,
                    "{tokens}: {found} {expected}"
                );
            }
        }
    }
}

#[test]
fn pictures_become_packed_latents_as_with_diffusers() {
    let (models, io) = (models(Kind::Base), io());
    let picture = load_image(&golden("klein/a.png")).unwrap();
    let found = models.pipeline().encode_image(&picture);
    assert_eq!(found.dims(), [1, 32, 4, 4]);
    assert_eq!(models.pipeline().latent_shape(), found.dims());
    assert_matches("latents", found, read(&io, "encoded"));
}

// Drawing.

#[test]
fn base_and_distilled_draw_what_diffusers_draws() {
    let io = io();
    for (kind, name, scale) in [
        (Kind::Base, "", Some(4.0)),
        (Kind::Distilled, "distilled.", None),
    ] {
        let folder = folder_of(kind);
        for (prefix, size) in [("", [16, 16]), ("wide.", [16, 24])] {
            let models = models_of(folder.path(), size);
            let request = TextToImage {
                guidance_scale: scale,
                ..request(4, 0.0)
            };
            let drawn = draw(&models, &request, read(&io, &format!("{prefix}latents")));
            let expected = read(&io, &format!("{name}{prefix}drawn"));
            assert_matches(&format!("{name}{prefix}drawn"), drawn.clone(), expected);
            check_picture(&models, drawn, read(&io, &format!("{name}{prefix}picture")));
        }
    }
}

#[test]
fn base_is_guided_by_a_negative_prompt_and_distilled_by_nothing() {
    let (base, distilled) = (models(Kind::Base), models(Kind::Distilled));
    let guided_by = |models: &Models| models.pipeline().denoiser().guided_by();
    assert_eq!(guided_by(&base), GuidedBy::Reference);
    assert_eq!(guided_by(&distilled), GuidedBy::Nothing);
    let negative = TextToImage {
        negative_prompt: NEGATIVE.to_owned(),
        ..request(2, 4.0)
    };
    let drawn = |models: &Models, request: &TextToImage| {
        generate::generate(models, request, Inputs::default(), &mut silent)
    };
    let plain = drawn(&base, &request(2, 4.0)).unwrap();
    assert_ne!(drawn(&base, &negative).unwrap(), plain);
    for (request, setting) in [
        (negative, "negative_prompt"),
        (request(2, 4.0), "guidance_scale"),
    ] {
        let message = drawn(&distilled, &request).unwrap_err().to_string();
        assert!(
            message.contains(&format!("setting `{setting}`")),
            "{message}"
        );
    }
}

// The method.

fn target() -> Target {
    Target {
        b: example_in("klein").a_prime,
        caption_b: Some("a green house".to_owned()),
    }
}

fn apply(models: &Models, tokens: &DifferenceTokens, config: &AnalogyConfig) -> Applied {
    analogy::apply(models, tokens, &target(), config, &mut silent).unwrap()
}

#[test]
fn a_difference_learned_on_base_is_applied_with_the_distilled_model() {
    let (base, distilled) = (models(Kind::Base), models(Kind::Distilled));
    let mut notices = Vec::new();
    let mut watch = |progress: &Progress| {
        if let Progress::Notice { message: notice } = progress {
            notices.push(notice.to_string());
        }
        ControlFlow::Continue(())
    };
    let (learned, applied) = analogy::solve(
        &base,
        &[example_in("klein")],
        &target(),
        &short_analogy(),
        &Records::default(),
        &mut watch,
    )
    .unwrap();
    for expected in ["follows only the captions", "the direction of a token"] {
        let told = notices.iter().filter(|notice| notice.contains(expected));
        assert_eq!(told.count(), 1, "{notices:?}");
    }
    let [embedding] = learned.tokens.embeddings() else {
        panic!("one text encoder");
    };
    assert_eq!(embedding.dims(), [2, 16]);
    let config = AnalogyConfig {
        generate: GenerateConfig {
            guidance_scale: None,
            ..short_analogy().generate
        },
        ..short_analogy()
    };
    let of = |models: &Models| apply(models, &learned.tokens, &config).b_prime;
    assert_eq!(of(&base), applied.b_prime);
    assert_eq!(base.pipeline().base(), distilled.pipeline().base());
    // The weights are the same here: it is the guidance by the difference that both have.
    assert_eq!(of(&distilled), applied.b_prime);
}

/// The states of the encoder stand in for a joint space, and the change of the captions for the delta.
#[test]
fn captions_alone_lead_the_tokens() {
    let models = models(Kind::Base);
    let mut config = short_analogy();
    config.learn.lambda_mse = 0.0;
    config.learn.clip_first = 0;
    config.learn.clip_thinned = 0;
    config.learn.num_tokens = 8;
    config.learn.steps = 60;
    config.learn.select_every = 0;
    let learn = |example: Example, config: &AnalogyConfig| {
        analogy::learn(
            &models,
            &[example],
            config,
            &Records::default(),
            &mut silent,
        )
    };
    let learned = learn(example_in("klein"), &config).unwrap();
    let clip: Vec<f32> = learned.history.iter().map(|terms| terms.clip).collect();
    assert!(clip[59] < clip[0] - 0.3, "{clip:?}");
    assert!(learned.history.iter().all(|terms| terms.after == 0.0));
    // Pictures have no direction here, and neither have equal captions.
    let mut of_pictures = config.clone();
    of_pictures.learn.delta = DeltaMode::Image;
    let caption = example_in("klein").caption_a.unwrap();
    let same = Example {
        caption_a_prime: Some(format!(" {caption}\n")),
        ..example_in("klein")
    };
    for (example, config) in [(example_in("klein"), &of_pictures), (same, &config)] {
        let message = learn(example, config).unwrap_err().to_string();
        assert!(message.contains("`lambda_mse`"), "{message}");
    }
}

/// The loss by its definition, from the states of whole prompts with their padding.
#[test]
fn the_loss_of_captions_is_that_of_the_states_at_the_end() {
    let models = models(Kind::Base);
    let pipeline = models.pipeline();
    let encoder = &pipeline.learned_encoders()[0];
    let texts = ["a red house", "a blue house at night"];
    let config = LearnConfig {
        num_tokens: 3,
        clip_thinned: 0,
        ..LearnConfig::default()
    };
    let [prompt_a, prompt_a_prime] = texts.map(|text| {
        let prompt = pipeline.prompt(text).unwrap();
        pipeline.read(&prompt, config.num_tokens).unwrap()
    });
    let latents = Tensor::zeros([1, 1, 1, 1], pipeline.device());
    let pair = Pair {
        latents_a: latents.clone(),
        latents_a_prime: latents,
        prompt_a,
        prompt_a_prime,
        deltas: Vec::new(),
    };
    let width = encoder.hidden_size();
    let values: Vec<f32> = (0..3 * width).map(|i| (i as f32 * 0.7).sin()).collect();
    let tokens = Tensor::<2>::from_data(TensorData::new(values, [3, width]), pipeline.device());
    let loss = ClipLoss::of_captions(encoder, 0, std::slice::from_ref(&pair), &config);
    let found = host(
        loss.unwrap()
            .unwrap()
            .of(std::slice::from_ref(&tokens))
            .unwrap(),
    )[0];

    let after = encoder.frame().after.len();
    let states = |words: &Words, tokens: Option<Tensor<2>>| {
        let beginning = &words.beginnings[0];
        let end = beginning.len() + tokens.as_ref().map_or(0, |_| 3) + after;
        let encoded = encoder.finish(beginning, tokens.as_ref()).unwrap();
        assert!(encoded.last_hidden_state.dims()[1] > end, "no padding");
        let layers = encoded.hidden_states.into_iter();
        let means = layers.flat_map(|layer| host(layer.narrow(1, end - after, after).mean_dim(1)));
        unit(&means.collect::<Vec<f32>>())
    };
    let minus = |one: &[f32], other: &[f32]| -> Vec<f32> {
        one.iter()
            .zip(other)
            .map(|(one, other)| one - other)
            .collect()
    };
    let (a, a_prime) = (
        states(&pair.prompt_a, None),
        states(&pair.prompt_a_prime, None),
    );
    let there = minus(&states(&pair.prompt_a, Some(tokens.clone())), &a);
    let back = minus(&states(&pair.prompt_a_prime, Some(-tokens)), &a_prime);
    let cosines = [
        cosine(&there, &minus(&a_prime, &a)),
        cosine(&back, &minus(&a, &a_prime)),
    ];
    let expected = 1.0 - (cosines[0] + cosines[1]) / 2.0;
    assert!(
        (f64::from(found) - expected).abs() < 1e-4,
        "{found} {expected}"
    );
}

/// Zeros have no direction, so tokens start like those of the vocabulary, both with the explicit initialisation
/// and by default.
#[test]
fn tokens_start_with_the_spread_of_the_vocabulary() {
    let models = models(Kind::Base);
    let start = |initialisation| {
        let mut config = short_analogy();
        config.learn.steps = 1;
        config.learn.select_every = 0;
        config.learn.learning_rate = Some(1e-9);
        config.learn.num_tokens = 40;
        config.learn.initialisation = initialisation;
        let examples = [example_in("klein")];
        let learned = analogy::learn(
            &models,
            &examples,
            &config,
            &Records::default(),
            &mut silent,
        )
        .unwrap();
        learned.tokens.embeddings()[0].clone()
    };
    let zero = start(Initialisation::Zero);
    let difference = (zero.clone() - start(Initialisation::Random)).abs().max();
    assert!(difference.into_scalar::<f32>() < 1e-6);
    let spread = |tokens: Tensor<2>| tokens.powi_scalar(2).mean().sqrt().into_scalar::<f32>();
    let table = models.pipeline().text_encoders()[0].token_table().clone();
    let ratio = spread(zero) / spread(table);
    assert!((0.9..1.1).contains(&ratio), "{ratio}");
}

#[test]
fn every_inversion_and_guidance_works_with_both() {
    for kind in [Kind::Base, Kind::Distilled] {
        let models = models(kind);
        check_strengths(&models, &waves(&models), &target());
    }
}

#[test]
fn the_estimate_of_memory_leaves_out_what_is_not_read() {
    let peak = |folder: &Path, memory| {
        let mut paths = ModelPaths {
            model: folder.to_owned(),
            ..ModelPaths::default()
        };
        paths.options.resolution = Some([16, 16]);
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
    let folder = golden("klein");
    let [normal, low] = [Memory::Normal, Memory::Low].map(|memory| peak(&folder, memory));
    assert!(normal > low);
    // Without head, final norm and the last layer, which are the same to the estimate.
    let less = copy("klein");
    let path = less.path().join("text_encoder/model.safetensors");
    let mut arrays = Arrays::read(&path).unwrap();
    let is_unread = |key: &str| {
        key.starts_with("model.layers.27.") || !key.contains("layers") && !key.contains("embed")
    };
    arrays.arrays.retain(|key, _| !is_unread(key));
    arrays.write(&path).unwrap();
    assert_eq!(peak(less.path(), Memory::Normal), normal);
    assert!(opened(less.path()).is_ok());
}

// Mismatches.

/// Checks the messages for edited configurations, each given as the part, the old text, the new text, and the message.
fn check_refused(cases: &[[&str; 4]]) {
    for [part, from, to, expected] in cases {
        let message = refused("klein", |folder| {
            edit(&folder.join(part).join("config.json"), from, to)
        });
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn a_transformer_that_does_not_fit_is_refused_in_words() {
    check_refused(&[
        [
            "transformer",
            "\"guidance_embeds\": false",
            "\"guidance_embeds\": true",
            "`guidance_embeds`: expected false, as in FLUX.2 klein: FLUX.2 dev",
        ],
        [
            "transformer",
            "\"joint_attention_dim\": 48",
            "\"joint_attention_dim\": 64",
            "`joint_attention_dim`: expected 48, three times the width of Qwen3, found 64",
        ],
        [
            "transformer",
            "\"in_channels\": 32",
            "\"in_channels\": 64",
            "`in_channels`: expected 32, the channels of the packed latents, found 64",
        ],
        [
            "transformer",
            "\"patch_size\": 1",
            "\"patch_size\": 2",
            "`patch_size`: expected 1",
        ],
        [
            "transformer",
            "\"patch_size\": 1",
            "\"patch_size\": 1, \"quantization_config\": {\"load_in_4bit\": true}",
            "`quantization_config`: expected no such field",
        ],
        [
            "transformer",
            "    6\n",
            "    8\n",
            "`axes_dims_rope`: expected four even numbers that add up to 16",
        ],
        [
            "transformer",
            "\"mlp_ratio\": 3.0",
            "\"mlp_ratio\": -1",
            "`mlp_ratio`: expected more than 0",
        ],
        [
            "transformer",
            "\"eps\": 1e-06",
            "\"eps\": 1e-05",
            "`eps`: expected 0.000001",
        ],
        [
            "transformer",
            "\"num_layers\": 2",
            "\"num_layers\": 1",
            "transformer_blocks.1",
        ],
    ]);
}

/// The names of FLUX.2's own code, by which its autoencoder is known to ComfyUI.
#[test]
fn the_autoencoder_in_its_original_layout_is_the_same() {
    let folder = folder_of(Kind::Base);
    let path = folder
        .path()
        .join("vae/diffusion_pytorch_model.safetensors");
    let mut arrays = Arrays::read(&path).unwrap();
    let original = |name: &str| {
        let mut name = name.replace("conv_norm_out", "norm_out");
        for (found, replaced) in [
            ("mid_block.resnets.0", "mid.block_1"),
            ("mid_block.resnets.1", "mid.block_2"),
            ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
            ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
            ("mid_block.attentions.0.to_", "mid.attn_1."),
            ("down_blocks.", "down."),
            ("up_blocks.0", "up.1"),
            ("up_blocks.1", "up.0"),
            ("resnets", "block"),
            ("samplers.0", "sample"),
            ("conv_shortcut", "nin_shortcut"),
        ] {
            name = name.replace(found, replaced);
        }
        match name.split_once('.') {
            Some(("quant_conv", _)) => format!("encoder.{name}"),
            Some(("post_quant_conv", _)) => format!("decoder.{name}"),
            _ => name,
        }
    };
    let count = arrays.arrays.len();
    arrays.arrays = (arrays.arrays.into_iter())
        .map(|(name, array)| (original(&name), array))
        .collect();
    assert_eq!(arrays.arrays.len(), count);
    assert!(
        arrays
            .arrays
            .contains_key("decoder.up.1.upsample.conv.weight")
    );
    let file = folder.path().join("flux2-vae.safetensors");
    arrays.write(&file).unwrap();
    let drawn = |vae: Option<PathBuf>| {
        let mut paths = ModelPaths {
            model: folder.path().to_owned(),
            ..ModelPaths::default()
        };
        paths.options.resolution = Some([16, 16]);
        paths.options.vae = vae;
        let models = Models::open(&paths, &Device::flex(), FloatDType::F32).unwrap();
        generate::generate(&models, &request(2, 2.0), Inputs::default(), &mut silent).unwrap()
    };
    assert_eq!(drawn(Some(file)), drawn(None));
}

#[test]
fn parts_that_are_missing_or_do_not_fit_are_named() {
    check_refused(&[
        [
            "text_encoder",
            "\"num_hidden_layers\": 28",
            "\"num_hidden_layers\": 26",
            "`num_hidden_layers`: expected at least 27",
        ],
        [
            "text_encoder",
            "\"model_type\": \"qwen3\"",
            "\"model_type\": \"mistral\"",
            "`model_type`: expected \"qwen3\"",
        ],
        [
            "vae",
            "\"decoder_block_out_channels\": null",
            "\"decoder_block_out_channels\": [4]",
            "`decoder_block_out_channels`: expected 2 levels",
        ],
        [
            "vae",
            "\"batch_norm_eps\": 0.01",
            "\"batch_norm_eps\": -1",
            "`batch_norm_eps`: expected 0 or more",
        ],
    ]);
    let message = refused("klein", |folder| {
        let index = folder.join("model_index.json");
        edit(&index, "AutoencoderKLFlux2", "AutoencoderKL");
    });
    let expected = "`in_channels`: expected 8, the channels of the packed latents";
    assert!(message.contains(expected), "{message}");
    let message = refused("klein", |folder| {
        edit(
            &folder.join("tokenizer/tokenizer.json"),
            "<|im_end|>",
            "<|end|>",
        );
    });
    assert!(
        message.contains("\"<|im_end|>\" is not in the vocabulary"),
        "{message}"
    );
    for part in ["text_encoder", "tokenizer", "transformer", "vae"] {
        let message = refused("klein", |folder| {
            std::fs::remove_dir_all(folder.join(part)).unwrap()
        });
        let expected = format!("no folder `{part}`");
        assert!(message.contains(&expected), "{message}");
    }
}

#[test]
fn a_difference_of_another_family_is_refused() {
    let models = models(Kind::Base);
    let mut base = models.pipeline().base();
    base.denoiser = "FLUX.1 transformer".to_owned();
    let tokens = DifferenceTokens::zeros(2, &base, &Device::flex());
    let error = analogy::check_apply(&models, &tokens, &short_analogy()).unwrap_err();
    let expected = "this model is a FLUX.2 klein transformer";
    assert!(error.to_string().contains(expected), "{error}");
}

#[test]
fn prompts_cannot_be_optimised_without_a_joint_space() {
    let mut config = short_analogy();
    config.prompt.prompt_mode = PromptMode::Optimised;
    let models = models(Kind::Base);
    let (examples, records) = ([example_in("klein")], Records::default());
    let error = analogy::learn(&models, &examples, &config, &records, &mut silent).unwrap_err();
    let message = error.to_string();
    assert!(message.contains("no optimised prompt"), "{message}");
    assert!(message.contains("a Flux2KleinPipeline"), "{message}");
}

#[test]
fn embeddings_do_not_tell_where_a_prompt_ends() {
    let models = models(Kind::Base);
    let embeds = Tensor::zeros([512, 16], &Device::flex());
    let error = models.pipeline().encode_embeds(embeds).unwrap_err();
    assert!(
        error.to_string().contains("does not look at its padding"),
        "{error}"
    );
}

#[test]
fn a_single_file_in_the_original_layout_says_what_to_take_instead() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("flux-2-klein-4b.safetensors");
    let one = || Array::floats([8], vec![1.0; 8]);
    Arrays::default()
        .with("double_blocks.0.img_attn.norm.key_norm.scale", one())
        .with("single_stream_modulation.lin.weight", one())
        .write(&path)
        .unwrap();
    let paths = ModelPaths {
        model: path,
        ..ModelPaths::default()
    };
    let message = paths.files().unwrap_err().to_string();
    assert!(message.contains("Flux2KleinPipeline"), "{message}");
    assert!(message.contains("klein-base"), "{message}");
}
