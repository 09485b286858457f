//! Every family of models, on tiny pipelines with random weights, against diffusers.

use std::fs;
use std::path::Path;

use burn::tensor::{Device, FloatDType, Tensor};
use difference_inversion::Error;
use difference_inversion::analogy::{
    self, AnalogyConfig, GenerateConfig, InitNoise, Inputs, ModelPaths, Models, Target, TextToImage,
};
use difference_inversion::image::load_image;
use difference_inversion::learn::{LearnConfig, Records};
use difference_inversion::noise::Guidance;
use difference_inversion::pipeline::{Conditions, Pipeline, PipelineKind};
use difference_inversion::progress::Progress;
use difference_inversion::prompt::FullPrompt;
use difference_inversion::tokens::DifferenceTokens;
use difference_inversion::weights::{Arrays, FileOptions, ModelFiles};

use crate::tiny::{example_in, golden, models_in, relative_error, silent};

/// Largest difference from diffusers, relative to the largest reference value.
const TOLERANCE: f32 = 1e-4;
const PROMPT: &str = "a blue house by a lake!";
const NEGATIVE: &str = "red";

/// What diffusers made in a golden folder.
struct Expected(Arrays);

impl Expected {
    fn of(folder: &str) -> Self {
        Self(Arrays::read(&golden(folder).join("io.safetensors")).unwrap())
    }

    fn tensor<const D: usize>(&self, name: &str) -> Tensor<D> {
        self.0.tensor(name, &Device::flex()).unwrap()
    }

    /// The latents that everything is drawn from.
    fn init(&self) -> InitNoise {
        InitNoise {
            latents: self.tensor("latents"),
            noise: None,
        }
    }

    #[track_caller]
    fn check<const D: usize>(&self, name: &str, found: Tensor<D>) {
        let expected = self.tensor::<D>(name);
        assert_eq!(found.dims(), expected.dims(), "{name}");
        let error = relative_error(found, expected);
        println!("{name}: relative error {error:.1e}");
        assert!(error <= TOLERANCE, "{name}: relative error {error:.1e}");
    }

    /// Compares the picture that is drawn from the golden latents.
    #[track_caller]
    fn check_drawing(&self, name: &str, models: &Models, request: &TextToImage) -> Tensor<4> {
        self.check_change(name, models, request, &Inputs::default())
    }

    /// The same for models that take other inputs, too.
    #[track_caller]
    fn check_change(
        &self,
        name: &str,
        models: &Models,
        request: &TextToImage,
        inputs: &Inputs<'_>,
    ) -> Tensor<4> {
        let inputs = Inputs {
            init: Some(self.init()),
            ..inputs.clone()
        };
        let drawn = analogy::generate_latents(models, request, inputs, &mut silent).unwrap();
        self.check(name, drawn.clone());
        drawn
    }

    /// Compares a decoded picture, which has 256 levels.
    fn check_picture(&self, models: &Models, latents: Tensor<4>) {
        let picture = models.pipeline().decode(latents).unwrap();
        let expected: Vec<f32> = (self.tensor::<4>("picture").squeeze_dim::<3>(0))
            .permute([1, 2, 0])
            .try_into_vec_as()
            .unwrap();
        let differs = |(&found, expected): (&u8, f32)| (f32::from(found) - expected * 255.0).abs();
        let worst = (picture.as_raw().iter().zip(expected))
            .map(differs)
            .fold(0.0, f32::max);
        println!("picture: {worst:.2} of 255");
        assert!(worst <= 0.51, "{worst} of 255");
    }
}

fn encode(pipeline: &Pipeline, text: &str) -> Conditions {
    let words = pipeline.read(&pipeline.prompt(text).unwrap(), 0).unwrap();
    pipeline
        .encode_prompts(&[FullPrompt::plain(&words)])
        .unwrap()
}

fn request(steps: usize, guidance_scale: f64) -> TextToImage {
    TextToImage {
        prompt: PROMPT.to_owned(),
        guidance_scale,
        num_inference_steps: steps,
        ..TextToImage::default()
    }
}

/// A golden folder to be harmed.
fn copy(folder: &str) -> tempfile::TempDir {
    fn copy_folder(from: &Path, to: &Path) {
        fs::create_dir_all(to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let (from, to) = (
                entry.as_ref().unwrap().path(),
                to.join(entry.unwrap().file_name()),
            );
            match from.is_dir() {
                true => copy_folder(&from, &to),
                false => fs::copy(&from, &to).map(|_| ()).unwrap(),
            }
        }
    }
    let copy = tempfile::tempdir().unwrap();
    copy_folder(&golden(folder), copy.path());
    copy
}

fn edit(path: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.contains(from), "{from} is not in {text}");
    fs::write(path, text.replace(from, to)).unwrap();
}

fn opened(folder: &Path) -> Result<Pipeline, Error> {
    opened_in(folder, FloatDType::F32)
}

fn opened_in(folder: &Path, dtype: FloatDType) -> Result<Pipeline, Error> {
    let files = ModelFiles::open(folder, &FileOptions::default())?;
    Pipeline::open(&files, None, &Device::flex(), dtype)
}

#[test]
fn stable_diffusion_2_equals_diffusers() {
    let (models, expected) = (models_in(&golden("sd21")), Expected::of("sd21"));
    let pipeline = models.pipeline();
    assert_eq!(pipeline.kind(), PipelineKind::StableDiffusion);
    let negative = pipeline.encode_negative_prompt(NEGATIVE).unwrap();
    expected.check(
        "prompt_embeds",
        encode(pipeline, PROMPT).encoder_hidden_states,
    );
    expected.check("negative_prompt_embeds", negative.encoder_hidden_states);
    let drawn = expected.check_drawing("drawn", &models, &request(5, 4.0));
    expected.check_picture(&models, drawn);
}

#[test]
fn sdxl_reads_prompts_as_diffusers_does() {
    let (models, expected) = (models_in(&golden("sdxl")), Expected::of("sdxl"));
    let pipeline = models.pipeline();
    assert_eq!(pipeline.kind(), PipelineKind::StableDiffusionXl);
    let check = |prefix: &str, negative: &str, conditions: Conditions| {
        let added = conditions.added.unwrap();
        let name = |kind: &str| format!("{prefix}{negative}{kind}");
        expected.check(&name("prompt_embeds"), conditions.encoder_hidden_states);
        expected.check(&name("pooled_prompt_embeds"), added.text_embeds);
        let sizes: Vec<f32> = added.time_ids.try_into_vec_as().unwrap();
        assert_eq!(sizes, [16.0, 16.0, 0.0, 0.0, 16.0, 16.0]);
    };
    check("", "", encode(pipeline, PROMPT));
    let negative = pipeline.encode_negative_prompt(NEGATIVE).unwrap();
    check("given.", "negative_", negative);

    // Without a negative prompt, zeros; but not for a model that does not ask for them.
    let values = |conditions: &Conditions| {
        let states = conditions.encoder_hidden_states.clone();
        states.try_into_vec_as::<f32>().unwrap()
    };
    let absent = pipeline.encode_negative_prompt("").unwrap();
    assert!(values(&absent).iter().all(|&value| value == 0.0));
    expected_zeros(&expected);
    let other = copy("sdxl");
    let index = other.path().join("model_index.json");
    edit(
        &index,
        "\"force_zeros_for_empty_prompt\": true",
        "\"force_zeros_for_empty_prompt\": false",
    );
    let other = opened(other.path()).unwrap();
    let absent = other.encode_negative_prompt("").unwrap();
    assert_eq!(values(&absent), values(&encode(&other, "")));
}

/// That diffusers has zeros, too, where no negative prompt is given.
fn expected_zeros(expected: &Expected) {
    let states: Tensor<3> = expected.tensor("negative_prompt_embeds");
    let pooled: Tensor<2> = expected.tensor("negative_pooled_prompt_embeds");
    assert_eq!(states.abs().max().into_scalar::<f32>(), 0.0);
    assert_eq!(pooled.abs().max().into_scalar::<f32>(), 0.0);
}

#[test]
fn sdxl_draws_what_diffusers_draws() {
    let (models, expected) = (models_in(&golden("sdxl")), Expected::of("sdxl"));
    let drawn = expected.check_drawing("drawn", &models, &request(4, 5.0));
    expected.check_picture(&models, drawn);
    let with_negative = TextToImage {
        negative_prompt: NEGATIVE.to_owned(),
        ..request(4, 5.0)
    };
    expected.check_drawing("drawn_with_negative", &models, &with_negative);
}

#[test]
fn sdxl_turbo_draws_without_guidance() {
    let folder = copy("sdxl");
    let scheduler = folder.path().join("scheduler/scheduler_config.json");
    edit(&scheduler, "\"leading\"", "\"trailing\"");
    edit(&scheduler, "\"steps_offset\": 1", "\"steps_offset\": 0");
    let (models, expected) = (models_in(folder.path()), Expected::of("sdxl"));
    for guidance_scale in [0.0, 1.0] {
        let request = TextToImage {
            negative_prompt: "whatever".to_owned(),
            ..request(2, guidance_scale)
        };
        expected.check_drawing("drawn_by_turbo", &models, &request);
    }
}

#[test]
fn sdxl_keeps_its_autoencoder_in_f32() {
    let picture = example_in("sdxl").a;
    let encode = |folder: &str, dtype| {
        let pipeline = opened_in(&golden(folder), dtype).unwrap();
        let latents = pipeline.encode_image(&picture);
        assert_eq!(latents.dtype(), burn::tensor::DType::F32);
        latents
    };
    let difference = |folder| {
        let narrow = encode(folder, FloatDType::F16);
        relative_error(narrow, encode(folder, FloatDType::F32))
    };
    assert_eq!(difference("sdxl"), 0.0);
    assert!(difference("sd21") > 0.0);
}

#[test]
fn instruct_pix2pix_changes_a_picture_as_diffusers_does() {
    let folder = golden("instruct_pix2pix");
    let (models, expected) = (models_in(&folder), Expected::of("instruct_pix2pix"));
    assert_eq!(models.pipeline().kind(), PipelineKind::InstructPix2Pix);
    let image = load_image(&folder.join("a.png")).unwrap();
    let inputs = Inputs {
        image: Some(&image),
        ..Inputs::default()
    };
    let guided = TextToImage {
        negative_prompt: NEGATIVE.to_owned(),
        ..request(4, 4.0)
    };
    let drawn = expected.check_change("drawn", &models, &guided, &inputs);
    expected.check_picture(&models, drawn.clone());
    // Difference tokens may follow the instruction.
    let base = models.pipeline().base();
    let tokens = vec![Tensor::ones([2, base[0].hidden_size], &Device::flex())];
    let tokens = DifferenceTokens::new(tokens, base).unwrap();
    let with_difference = Inputs {
        tokens: Some(&tokens),
        init: Some(expected.init()),
        ..inputs.clone()
    };
    let changed = analogy::generate_latents(&models, &guided, with_difference, &mut silent);
    assert!(relative_error(changed.unwrap(), drawn) > TOLERANCE);
    // Either scale turns guidance off.
    let by_picture_alone = TextToImage {
        image_guidance_scale: 0.9,
        ..guided
    };
    for request in [request(4, 1.0), by_picture_alone] {
        expected.check_change("drawn_without_guidance", &models, &request, &inputs);
    }
}

#[test]
fn inpainting_draws_what_is_masked_as_diffusers_does() {
    let folder = golden("inpaint");
    let (models, expected) = (models_in(&folder), Expected::of("inpaint"));
    assert_eq!(models.pipeline().kind(), PipelineKind::Inpaint);
    let [image, mask] = ["a.png", "mask.png"].map(|name| load_image(&folder.join(name)).unwrap());
    let inputs = Inputs {
        image: Some(&image),
        mask: Some(&mask),
        ..Inputs::default()
    };
    let drawn = expected.check_change("drawn", &models, &request(4, 4.0), &inputs);
    expected.check_picture(&models, drawn);
}

#[test]
fn pictures_and_masks_are_given_to_those_who_take_them() {
    let picture = example_in("sdxl").a;
    let message = |folder: &str, image: bool, mask: bool| {
        let models = models_in(&golden(folder));
        let inputs = Inputs {
            image: image.then_some(&picture),
            mask: mask.then_some(&picture),
            ..Inputs::default()
        };
        let drawn = analogy::generate(&models, &request(2, 2.0), inputs, &mut silent);
        drawn
            .err()
            .map(|error| error.to_string())
            .unwrap_or_default()
    };
    for (folder, image, mask, expected) in [
        ("sdxl", false, false, ""),
        (
            "sdxl",
            true,
            false,
            "a StableDiffusionXLPipeline takes no picture",
        ),
        ("instruct_pix2pix", false, false, "a picture is missing"),
        ("instruct_pix2pix", true, true, "takes no mask"),
        ("inpaint", false, true, "a picture is missing"),
        ("inpaint", true, false, "a mask is missing"),
    ] {
        let found = message(folder, image, mask);
        assert!(found.contains(expected), "{folder}: {found}");
        assert_eq!(found.is_empty(), expected.is_empty(), "{folder}: {found}");
    }
}

#[test]
fn a_difference_is_not_learned_on_models_that_take_a_picture() {
    let target = Target {
        b: example_in("sdxl").a_prime,
        caption_b: Some("a green house".to_owned()),
    };
    for folder in ["instruct_pix2pix", "inpaint"] {
        let models = models_in(&golden(folder));
        let (examples, records) = ([example_in("sdxl")], Records::default());
        let learned = analogy::learn(&models, &examples, &config(), &records, &mut silent);
        let tokens = DifferenceTokens::zeros(2, &models.pipeline().base(), &Device::flex());
        let applied = analogy::apply(&models, &tokens, &target, &config(), &mut silent);
        for error in [learned.unwrap_err(), applied.unwrap_err()] {
            let message = error.to_string();
            assert!(
                message.contains("draws from a picture and words"),
                "{message}"
            );
        }
    }
}

fn config() -> AnalogyConfig {
    AnalogyConfig {
        learn: LearnConfig {
            num_tokens: 2,
            steps: 3,
            ..LearnConfig::default()
        },
        generate: GenerateConfig {
            num_inference_steps: 4,
            ..GenerateConfig::default()
        },
        ..AnalogyConfig::default()
    }
}

#[test]
fn an_analogy_on_sdxl_learns_tokens_for_both_text_encoders() {
    let models = models_in(&golden("sdxl"));
    let target = Target {
        b: example_in("sdxl").a_prime,
        caption_b: Some("a green house".to_owned()),
    };
    let (learned, applied) = analogy::solve(
        &models,
        &[example_in("sdxl")],
        &target,
        &config(),
        &Records::default(),
        &mut silent,
    )
    .unwrap();
    let sizes: Vec<[usize; 2]> = learned
        .tokens
        .embeddings()
        .iter()
        .map(Tensor::dims)
        .collect();
    assert_eq!(sizes, [[2, 16], [2, 20]]);
    for embedding in learned.tokens.embeddings() {
        assert!(embedding.clone().abs().min().into_scalar::<f32>() > 0.0);
    }

    // Saved and loaded, the same B′; with ordinary guidance, another.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("difference.safetensors");
    learned.tokens.save(&path).unwrap();
    let tokens = DifferenceTokens::load(&path, &Device::flex()).unwrap();
    let apply = |config: &AnalogyConfig| {
        let applied = analogy::apply(&models, &tokens, &target, config, &mut silent);
        applied.unwrap().b_prime
    };
    assert_eq!(apply(&config()), applied.b_prime);
    let mut ordinary = config();
    ordinary.generate.guidance = Guidance::Ordinary;
    assert_ne!(apply(&ordinary), applied.b_prime);

    // Neither do they belong to a model with one of the encoders.
    let other = models_in(&golden("sd21"));
    let error = analogy::apply(&other, &tokens, &target, &config(), &mut silent).unwrap_err();
    assert!(matches!(error, Error::WrongBase { .. }), "{error}");
}

fn with_clips(folder: &Path, clip: &[&str]) -> Models {
    let paths = ModelPaths {
        model: folder.to_owned(),
        clip: clip.iter().map(|name| golden(name)).collect(),
        ..ModelPaths::default()
    };
    Models::open(&paths, &Device::flex(), FloatDType::F32).unwrap()
}

#[test]
fn joint_spaces_find_their_text_encoders() {
    let encoders = |clip: &[&str]| -> Result<Vec<usize>, String> {
        let models = with_clips(&golden("sdxl"), clip);
        let joints = models.joints().map_err(|error| error.to_string())?;
        Ok(joints.iter().map(|joint| joint.encoder()).collect())
    };
    assert_eq!(encoders(&[]).unwrap(), [0, 1]);
    assert_eq!(encoders(&["sdxl/clip_2", "sdxl/clip"]).unwrap(), [0, 1]);
    assert_eq!(encoders(&["sdxl/clip_2"]).unwrap(), [1]);
    let twice = encoders(&["sdxl/clip", "sdxl/clip"]).unwrap_err();
    assert!(twice.contains("was given already"), "{twice}");
    let wrong = encoders(&["sdxl/clip", "sd21/clip"]).unwrap_err();
    assert!(wrong.contains("their token embeddings differ"), "{wrong}");
    let absent = encoders(&["sdxl/nothing"]).unwrap_err();
    assert!(absent.contains("there is no folder"), "{absent}");
}

#[test]
fn one_joint_space_guides_its_own_tokens_and_a_notice_says_so() {
    let config = AnalogyConfig {
        learn: LearnConfig {
            lambda_mse: 0.0,
            ..config().learn
        },
        ..config()
    };
    let learn = |clip: &[&str], config: &AnalogyConfig| {
        let models = with_clips(&golden("sdxl"), clip);
        let mut notices = Vec::new();
        let mut observer = |progress: &Progress| {
            if let Progress::Notice(text) = progress {
                notices.push(text.clone());
            }
            std::ops::ControlFlow::Continue(())
        };
        let records = Records::default();
        let examples = [example_in("sdxl")];
        let learned = analogy::learn(&models, &examples, config, &records, &mut observer).unwrap();
        let largest = |tokens: &Tensor<2>| tokens.clone().abs().max().into_scalar::<f32>();
        let moved: Vec<bool> = (learned.tokens.embeddings().iter())
            .map(|tokens| largest(tokens) > 0.0)
            .collect();
        (moved, notices)
    };
    assert_eq!(learn(&[], &config), (vec![true, true], vec![]));
    let (moved, notices) = learn(&["sdxl/clip_2"], &config);
    assert_eq!(moved, [false, true]);
    assert_eq!(notices.len(), 1);
    assert!(notices[0].contains("text encoder 2 alone"), "{notices:?}");

    // Without the CLIP loss no joint space is opened.
    let mut without = config.clone();
    without.learn.lambda_clip = 0.0;
    without.learn.lambda_mse = 4.0;
    assert_eq!(
        learn(&["sdxl/nothing"], &without),
        (vec![true, true], vec![])
    );
}

#[test]
fn parts_that_do_not_fit_are_named() {
    type Harm = fn(&Path);
    let message = |harm: Harm| {
        let folder = copy("sdxl");
        harm(folder.path());
        opened(folder.path()).unwrap_err().to_string()
    };
    let cases: [(Harm, &str); 6] = [
        (
            |model| fs::remove_dir_all(model.join("text_encoder_2")).unwrap(),
            "no folder `text_encoder_2`",
        ),
        (
            |model| {
                edit(
                    &model.join("model_index.json"),
                    "StableDiffusionXLPipeline",
                    "StableDiffusionPipeline",
                )
            },
            "field `cross_attention_dim`: expected 16",
        ),
        (
            |model| {
                edit(
                    &model.join("model_index.json"),
                    "XLPipeline",
                    "XLInpaintPipeline",
                )
            },
            "found \"StableDiffusionXLInpaintPipeline\"",
        ),
        (
            |model| {
                edit(
                    &model.join("unet/config.json"),
                    "\"projection_class_embeddings_input_dim\": 34",
                    "\"projection_class_embeddings_input_dim\": 35",
                )
            },
            "expected 34: 10 of the pooled prompt and 24 of the sizes, found Some(35)",
        ),
        (
            |model| {
                edit(
                    &model.join("unet/config.json"),
                    "\"addition_embed_type\": \"text_time\"",
                    "\"addition_embed_type\": null",
                )
            },
            "field `addition_embed_type`: expected text_time",
        ),
        (
            |model| {
                let path = model.join("tokenizer_2/tokenizer.json");
                edit(&path, "\"#\": 2", "\"#\": 3");
                edit(&path, "\"$\": 3", "\"$\": 2");
            },
            "different vocabularies",
        ),
    ];
    for (harm, expected) in cases {
        let found = message(harm);
        assert!(found.contains(expected), "{expected}: {found}");
    }
    let folder = copy("sd21");
    edit(
        &folder.path().join("unet/config.json"),
        "\"in_channels\": 4",
        "\"in_channels\": 9",
    );
    let found = opened(folder.path()).unwrap_err().to_string();
    assert!(
        found
            .contains("field `in_channels`: expected 4, as a StableDiffusionPipeline has, found 9"),
        "{found}"
    );
}
