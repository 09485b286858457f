//! FLUX.1 dev and schnell against diffusers and transformers, on tiny networks with random weights made by
//! `training/reference/make_golden_flux.py`.

use std::path::Path;

use burn::tensor::{Device, FloatDType, Tensor};
use difference_inversion::diffusion::draw::{InitNoise, TextToImage};
use difference_inversion::diffusion::family;
use difference_inversion::diffusion::frozen::{ModelPaths, Models};
use difference_inversion::diffusion::memory::LearningMemory;
use difference_inversion::diffusion::pipeline::{Conditions, Pipeline};
use difference_inversion::diffusion::words::FullPrompt;
use difference_inversion::image::load_image;
use difference_inversion::method::analogy::{self, Applied, Target};
use difference_inversion::method::difference::DifferenceTokens;
use difference_inversion::method::generate::{self, Inputs};
use difference_inversion::method::generate_config::AnalogyConfig;
use difference_inversion::method::learn::Records;
use difference_inversion::method::regenerate::Guidance;
use difference_inversion::models::denoiser::flux::{FluxConfig, FluxTransformer2DModel, Told};
use difference_inversion::models::denoiser::{GuidedBy, Memory};
use difference_inversion::util::arrays::{Array, Arrays};
use difference_inversion::weights::{Weights, read_config};
use tempfile::TempDir;

use super::common::{assert_matches, open, read};
use crate::tiny::{
    PROMPT, check_strengths, copy, edit, example_in, golden, refused, request, short_analogy,
    silent,
};

const NEGATIVE: &str = "red";

/// Tiny dev in a separate folder; schnell has its own transformer and schedule.
fn folder_of(name: &str) -> TempDir {
    let folder = copy("flux");
    if name == "flux_schnell" {
        for file in [
            "transformer/config.json",
            "transformer/diffusion_pytorch_model.safetensors",
            "scheduler/scheduler_config.json",
        ] {
            std::fs::copy(golden(name).join(file), folder.path().join(file)).unwrap();
        }
    }
    folder
}

fn io(name: &str) -> Weights {
    open(&golden(name).join("io.safetensors"))
}

/// The models in a folder, with pictures of this height and width.
pub(crate) fn models_of(folder: &Path, [height, width]: [u32; 2]) -> Models {
    let mut paths = ModelPaths {
        model: folder.to_owned(),
        ..ModelPaths::default()
    };
    paths.options.resolution = Some([height, width]);
    Models::open(&paths, &Device::flex(), FloatDType::F32).unwrap()
}

fn dev() -> Models {
    models_of(&golden("flux"), [16, 16])
}

fn schnell() -> Models {
    models_of(folder_of("flux_schnell").path(), [16, 16])
}

// The network.

#[test]
fn both_transformers_and_their_gradients_match_diffusers() {
    for (name, guidance) in [("flux", 3.5), ("flux_schnell", 1.0)] {
        let (folder, io) = (golden(name).join("transformer"), io(name));
        let config: FluxConfig = read_config(&folder.join("config.json")).unwrap();
        let network = FluxTransformer2DModel::load(&open(&folder), &config).unwrap();
        let forward = |states: Tensor<3>, pooled: Tensor<2>, guidance, memory| {
            let told = Told {
                timesteps: read(&io, "network.times"),
                guidance,
                pooled,
            };
            network.forward(read(&io, "network.latents"), states, told, memory)
        };
        let (states, pooled) = (read(&io, "network.states"), read(&io, "network.pooled"));
        let found = forward(states.clone(), pooled.clone(), guidance, Memory::Normal);
        assert_matches(name, found.clone(), read(&io, "network.output"));
        // Only dev takes a guidance scale.
        let other = forward(states.clone(), pooled.clone(), 7.0, Memory::Normal);
        let changes = (other - found).abs().max().into_scalar::<f32>() > 0.0;
        assert_eq!(changes, config.guidance_embeds);
        for memory in [Memory::Normal, Memory::Low] {
            let states = states.clone().autodiff().require_grad();
            let pooled = pooled.clone().autodiff().require_grad();
            let output = forward(states.clone(), pooled.clone(), guidance, memory);
            let gradients = (output * read::<4>(&io, "network.towards"))
                .sum()
                .backward();
            let told = |what: &str| format!("{name}: {what} ({memory:?})");
            let found = states.grad(&gradients).unwrap();
            assert_matches(&told("states"), found, read(&io, "network.states.grad"));
            let found = pooled.grad(&gradients).unwrap();
            assert_matches(&told("pooled"), found, read(&io, "network.pooled.grad"));
        }
    }
}

// Prompts, schedule, autoencoder.

pub(crate) fn encode(pipeline: &Pipeline, text: &str) -> Conditions {
    let words = pipeline.read(&pipeline.prompt(text).unwrap(), 0).unwrap();
    pipeline
        .encode_prompts(&[FullPrompt::plain(&words)])
        .unwrap()
}

#[test]
fn t5_reads_the_prompt_and_clip_sums_it_up_as_in_diffusers() {
    for (name, models, length) in [("flux", dev(), 512), ("flux_schnell", schnell(), 256)] {
        let (pipeline, io) = (models.pipeline(), io(name));
        assert_eq!(pipeline.family(), &family::FLUX);
        assert_eq!(pipeline.text_encoders()[1].frame().length, length);
        for (prefix, text) in [("", PROMPT), ("negative_", NEGATIVE)] {
            let found = encode(pipeline, text);
            let states = found.context;
            assert_eq!(states.dims(), [1, length, 40]);
            let ends = [0, length - 16].map(|start| states.clone().narrow(1, start, 16));
            let expected = read(&io, &format!("{prefix}prompt_embeds"));
            assert_matches("states", Tensor::cat(ends.to_vec(), 1), expected);
            let expected = read(&io, &format!("{prefix}pooled_prompt_embeds"));
            assert_matches("pooled", found.pooled.unwrap(), expected);
        }
    }
}

#[test]
fn times_are_shifted_by_the_size_of_the_picture_or_not_at_all() {
    for name in ["flux", "flux_schnell"] {
        let (folder, io) = (folder_of(name), io(name));
        let mut seen = Vec::new();
        for (size, tokens) in [([16, 16], 16), ([16, 24], 24)] {
            let models = models_of(folder.path(), size);
            for steps in [1, 4, 28] {
                let times = models.pipeline().noising().times(steps).unwrap();
                let expected: Tensor<1> = read(&io, &format!("sigmas.{tokens}.{steps}"));
                let mut expected = expected.try_into_vec_as::<f32>().unwrap();
                assert_eq!(expected.pop(), Some(0.0));
                assert_eq!(times.len(), expected.len());
                for (time, expected) in times.iter().zip(&expected) {
                    let found = (time / 1000.0) as f32;
                    assert!(
                        (found - expected).abs() < 1e-6,
                        "{name}: {found} {expected}"
                    );
                }
                seen.push(times);
            }
        }
        assert_eq!(seen[1] == seen[4], name == "flux_schnell");
    }
}

#[test]
fn pictures_become_latents_of_16_channels_as_with_diffusers() {
    let (models, io) = (dev(), io("flux"));
    let picture = load_image(&golden("flux").join("a.png")).unwrap();
    let found = models.pipeline().encode_image(&picture);
    assert_eq!(found.dims(), [1, 16, 8, 8]);
    assert_matches("latents", found, read(&io, "encoded"));
}

// Drawing.

/// The latents drawn from the given ones.
pub(crate) fn draw(models: &Models, request: &TextToImage, latents: Tensor<4>) -> Tensor<4> {
    let inputs = Inputs {
        init: Some(InitNoise {
            latents,
            noise: None,
        }),
        ..Inputs::default()
    };
    generate::generate_latents(models, request, inputs, &mut silent).unwrap()
}

pub(crate) fn check_picture(models: &Models, latents: Tensor<4>, expected: Tensor<4>) {
    let picture = models.pipeline().decode(latents).unwrap();
    let expected = expected.squeeze_dim::<3>(0).permute([1, 2, 0]);
    let expected: Vec<f32> = expected.try_into_vec_as().unwrap();
    assert_eq!(picture.as_raw().len(), expected.len());
    let differs = |(&found, expected): (&u8, f32)| (f32::from(found) - expected * 255.0).abs();
    let pairs = picture.as_raw().iter().zip(expected);
    let worst = pairs.map(differs).fold(0.0, f32::max);
    println!("{worst:.2} of 255");
    assert!(worst <= 1.0, "{worst} of 255");
}

#[test]
fn dev_and_schnell_draw_what_diffusers_draws() {
    for (name, scale) in [("flux", Some(3.5)), ("flux_schnell", None)] {
        let (folder, io) = (folder_of(name), io(name));
        for (prefix, size) in [("", [16, 16]), ("wide.", [16, 24])] {
            let models = models_of(folder.path(), size);
            let request = TextToImage {
                guidance_scale: scale,
                ..request(4, 0.0)
            };
            let latents = read(&io, &format!("{prefix}latents"));
            let drawn = draw(&models, &request, latents);
            let expected = read(&io, &format!("{prefix}drawn"));
            assert_matches(&format!("{name}: {prefix}drawn"), drawn.clone(), expected);
            check_picture(&models, drawn, read(&io, &format!("{prefix}picture")));
        }
    }
}

#[test]
fn a_guidance_scale_is_what_dev_is_told_and_schnell_has_none() {
    let io = io("flux");
    let latents = || read::<4>(&io, "latents");
    let refused = |models: &Models, request: &TextToImage| {
        let drawn = generate::generate(models, request, Inputs::default(), &mut silent);
        drawn.unwrap_err().to_string()
    };
    let dev = dev();
    let told = GuidedBy::Embedding { usual: 3.5 };
    assert_eq!(dev.pipeline().denoiser().guided_by(), told);
    let with_scale = |guidance_scale| TextToImage {
        guidance_scale,
        ..request(2, 0.0)
    };
    let drawn = |scale| draw(&dev, &with_scale(scale), latents()).into_data();
    assert_eq!(drawn(None), drawn(Some(3.5)));
    assert_ne!(drawn(Some(1.0)), drawn(Some(3.5)));
    let negative = TextToImage {
        negative_prompt: NEGATIVE.to_owned(),
        ..with_scale(None)
    };
    let schnell = schnell();
    assert_eq!(schnell.pipeline().denoiser().guided_by(), GuidedBy::Nothing);
    for models in [&dev, &schnell] {
        let message = refused(models, &negative);
        assert!(message.contains("setting `negative_prompt`"), "{message}");
    }
    let message = refused(&schnell, &with_scale(Some(3.5)));
    assert!(message.contains("setting `guidance_scale`"), "{message}");
    assert!(message.contains("1 or less"), "{message}");
}

// The method.

fn target() -> Target {
    Target {
        b: example_in("flux").a_prime,
        caption_b: Some("a green house".to_owned()),
    }
}

fn apply(models: &Models, tokens: &DifferenceTokens, config: &AnalogyConfig) -> Applied {
    analogy::apply(models, tokens, &target(), config, &mut silent).unwrap()
}

#[test]
fn a_difference_learned_on_dev_is_applied_with_schnell() {
    let (dev, schnell) = (dev(), schnell());
    let (learned, applied) = analogy::solve(
        &dev,
        &[example_in("flux")],
        &target(),
        &short_analogy(),
        &Records::default(),
        &mut silent,
    )
    .unwrap();
    // D̃ is learned for CLIP; T5 reads only the words.
    let [embedding] = learned.tokens.embeddings() else {
        panic!("one text encoder");
    };
    assert_eq!(embedding.dims(), [2, 16]);
    assert!(embedding.clone().abs().min().into_scalar::<f32>() > 0.0);
    let of = |models: &Models| apply(models, &learned.tokens, &short_analogy()).b_prime;
    assert_eq!(of(&dev), applied.b_prime);
    assert_eq!(dev.pipeline().base(), schnell.pipeline().base());
    assert_ne!(of(&schnell), applied.b_prime);
}

#[test]
fn every_inversion_and_guidance_works_with_both() {
    for models in [dev(), schnell()] {
        let tokens = Tensor::full([2, 16], 0.3, &Device::flex());
        let tokens = DifferenceTokens::new(vec![tokens], models.pipeline().base()).unwrap();
        check_strengths(&models, &tokens, &target());
    }
}

#[test]
fn ordinary_guidance_has_no_negative_prompt() {
    let check = |models: &Models, change: fn(&mut AnalogyConfig)| {
        let tokens = DifferenceTokens::zeros(2, &models.pipeline().base(), &Device::flex());
        let mut config = short_analogy();
        config.generate.guidance = Guidance::Ordinary;
        config.generate.guidance_scale = None;
        change(&mut config);
        let error = analogy::check_apply(models, &tokens, &config).unwrap_err();
        error.to_string()
    };
    for models in [dev(), schnell()] {
        let message = check(&models, |config| {
            config.generate.negative_prompt = NEGATIVE.to_owned();
        });
        assert!(message.contains("setting `negative_prompt`"), "{message}");
    }
    let message = check(&schnell(), |config| {
        config.generate.guidance_scale = Some(5.0);
    });
    assert!(message.contains("setting `guidance_scale`"), "{message}");
}

#[test]
fn the_estimate_of_memory_counts_a_longer_prompt() {
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
    let (dev, schnell) = (golden("flux"), folder_of("flux_schnell"));
    let dev = [Memory::Normal, Memory::Low].map(|memory| peak(&dev, memory));
    assert!(dev[0] > peak(schnell.path(), Memory::Normal));
    assert!(dev[0] > dev[1]);
}

// Mismatches.

#[test]
fn a_difference_of_another_family_on_the_same_text_encoders_is_refused() {
    let models = dev();
    let mut base = models.pipeline().base();
    base.denoiser = "multimodal transformer".to_owned();
    let tokens = DifferenceTokens::zeros(2, &base, &Device::flex());
    let error = analogy::check_apply(&models, &tokens, &short_analogy()).unwrap_err();
    let message = error.to_string();
    let expected = "learned on a multimodal transformer";
    assert!(message.contains(expected), "{message}");
    let expected = "this model is a FLUX.1 transformer";
    assert!(message.contains(expected), "{message}");
}

#[test]
fn parts_that_are_missing_or_do_not_fit_are_named() {
    let transformer = |from: &'static str, to: &'static str| {
        refused("flux", |folder| {
            edit(&folder.join("transformer/config.json"), from, to)
        })
    };
    for (from, to, expected) in [
        (
            "\"pooled_projection_dim\": 16",
            "\"pooled_projection_dim\": 12",
            "`pooled_projection_dim`: expected 16, the width of CLIP, found 12",
        ),
        (
            "\"joint_attention_dim\": 40",
            "\"joint_attention_dim\": 64",
            "`joint_attention_dim`: expected 40, the width of T5, found 64",
        ),
        (
            "\"in_channels\": 64",
            "\"in_channels\": 384",
            "`in_channels`: expected 64, four times the channels of the latents, found 384",
        ),
        (
            "\"patch_size\": 1",
            "\"patch_size\": 2",
            "`patch_size`: expected 1",
        ),
        (
            "\"patch_size\": 1",
            "\"patch_size\": 1, \"quantization_config\": {\"load_in_4bit\": true}",
            "`quantization_config`: expected no such field",
        ),
        (
            "    4\n",
            "    6\n",
            "`axes_dims_rope`: expected three even numbers that add up to 8",
        ),
        ("    4\n", "    3,\n    1\n", "`axes_dims_rope`"),
        (
            "\"num_attention_heads\": 3",
            "\"num_attention_heads\": 0",
            "`num_attention_heads`: expected 1 to 65536",
        ),
        (
            "\"num_layers\": 2",
            "\"num_layers\": 1",
            "transformer_blocks.1",
        ),
        (
            "\"guidance_embeds\": true",
            "\"guidance_embeds\": false",
            "guidance_embedder",
        ),
    ] {
        let message = transformer(from, to);
        assert!(message.contains(expected), "{message}");
    }
    for part in ["text_encoder", "text_encoder_2", "transformer", "vae"] {
        let message = refused("flux", |folder| {
            std::fs::remove_dir_all(folder.join(part)).unwrap()
        });
        let expected = format!("no folder `{part}`");
        assert!(message.contains(&expected), "{message}");
    }
}

#[test]
fn t5_cannot_be_left_out() {
    let mut paths = ModelPaths {
        model: golden("flux"),
        ..ModelPaths::default()
    };
    paths.options.without_t5 = true;
    let error = Models::open(&paths, &Device::flex(), FloatDType::F32).unwrap_err();
    let message = error.to_string();
    assert!(message.contains("setting `without_t5`"), "{message}");
    assert!(message.contains("FluxPipeline"), "{message}");
}

#[test]
fn a_single_file_in_the_original_layout_says_what_to_take_instead() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("flux1-dev.safetensors");
    let key = "double_blocks.0.img_attn.norm.key_norm.scale";
    let scale = Array::floats([8], vec![1.0; 8]);
    Arrays::default().with(key, scale).write(&path).unwrap();
    let paths = ModelPaths {
        model: path,
        ..ModelPaths::default()
    };
    let message = paths.files().unwrap_err().to_string();
    assert!(message.contains("FluxPipeline"), "{message}");
    assert!(message.contains("flux-dev or flux-schnell"), "{message}");
}
