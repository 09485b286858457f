//! The method on SDXL's two text encoders.

use std::ops::ControlFlow;
use std::path::Path;

use burn::tensor::{Device, FloatDType, Tensor};
use difference_inversion::Error;
use difference_inversion::diffusion::frozen::{ModelPaths, Models};
use difference_inversion::diffusion::words::{FullPrompt, Prompt};
use difference_inversion::method::analogy::{self, Target};
use difference_inversion::method::difference::DifferenceTokens;
use difference_inversion::method::generate_config::AnalogyConfig;
use difference_inversion::method::learn::{self, LearnConfig, Records};
use difference_inversion::method::prompt::{PromptConfig, PromptMode};
use difference_inversion::method::regenerate::Guidance;
use difference_inversion::models::text::clip_text::shared_bytes;
use difference_inversion::util::progress::Progress;
use difference_inversion::weights::Weights;

use crate::tiny::{example_in, golden, models_in, pair_of, relative_error, short_analogy, silent};

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
        &short_analogy(),
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
    assert_eq!(apply(&short_analogy()), applied.b_prime);
    let mut ordinary = short_analogy();
    ordinary.generate.guidance = Guidance::Ordinary;
    assert_ne!(apply(&ordinary), applied.b_prime);

    // They do not belong to a model with only one of the encoders either.
    let other = models_in(&golden("sd21"));
    let error =
        analogy::apply(&other, &tokens, &target, &short_analogy(), &mut silent).unwrap_err();
    assert!(matches!(error, Error::WrongBase { .. }), "{error}");
}

#[test]
fn learning_on_sdxl_goes_on_from_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = folder.path().join("checkpoint.safetensors");
    let models = models_in(&golden("sdxl"));
    let pairs = [pair_of(&models, &example_in("sdxl"), 2)];
    let config = LearnConfig {
        steps: 6,
        select_every: 2,
        select_samples: 2,
        ..short_analogy().learn
    };
    let learn = |records: &Records, stop_at: usize| {
        let mut observer = |progress: &Progress| match progress {
            Progress::Step { done, .. } if *done == stop_at => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        };
        let (pipeline, joints) = (models.pipeline(), models.joints().unwrap());
        learn::difference(pipeline, joints, &pairs, &config, records, &mut observer)
    };
    let whole = learn(&Records::default(), usize::MAX).unwrap();
    let interrupted = Records {
        checkpoint: Some(checkpoint.clone()),
        ..Records::default()
    };
    let error = learn(&interrupted, 3).unwrap_err();
    assert!(matches!(error, Error::Stopped { done: 3, .. }), "{error}");
    let resumed = Records {
        resume: Some(checkpoint),
        ..Records::default()
    };
    let resumed = learn(&resumed, usize::MAX).unwrap();
    assert_eq!(whole.history, resumed.history);
    let tokens = whole.tokens.embeddings().iter();
    for (whole, resumed) in tokens.zip(resumed.tokens.embeddings()) {
        assert_eq!(relative_error(resumed.clone(), whole.clone()), 0.0);
    }
}

#[test]
fn an_optimised_prompt_is_read_by_both_text_encoders() {
    let models = models_in(&golden("sdxl"));
    let mut config = short_analogy();
    config.prompt = PromptConfig {
        prompt_mode: PromptMode::CaptionOptimised,
        pez_tokens: 3,
        pez_steps: 2,
        ..PromptConfig::default()
    };
    let (examples, records) = ([example_in("sdxl")], Records::default());
    let learned = analogy::learn(&models, &examples, &config, &records, &mut silent).unwrap();
    assert!(learned.prompts[0][0].starts_with("a red house "));

    // A caption is cut by each encoder's own tokenizer; a found prompt is the same for both.
    let caption = models.pipeline().prompt("a!").unwrap();
    let tokenizer = models.pipeline().text_encoders()[0].tokenizer();
    let found = Prompt::from_ids(&[7, 8], tokenizer).unwrap();
    let prompt = caption.followed_by(&found);
    assert_eq!(prompt.ids(0), [320, 256, 7, 8]);
    assert_eq!(prompt.ids(1), [320, 0, 7, 8]);
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
fn joint_spaces_hold_the_weights_of_their_text_encoders_once() {
    let models = models_in(&golden("sdxl"));
    let weights = |name: &str| {
        let folder = golden("sdxl").join(name);
        Weights::open(&folder, &Device::flex(), FloatDType::F32).unwrap()
    };
    for (joint, clip, encoder) in [(0, "clip", "text_encoder"), (1, "clip_2", "text_encoder_2")] {
        let shared = models.joints().unwrap()[joint].shared_bytes();
        let expected = shared_bytes(&weights(clip), &weights(encoder)).unwrap();
        assert!(shared > 0);
        assert_eq!(shared, expected, "{clip}");
    }
}

#[test]
fn strength_is_the_way_from_the_words_to_the_full_prompt() {
    let models = models_in(&golden("sdxl"));
    let pipeline = models.pipeline();
    let words = (pipeline.read(&pipeline.prompt("a red house").unwrap(), 2)).unwrap();
    let tokens = [16, 20].map(|width| Tensor::full([2, width], 0.4, &Device::flex()));
    let encode = |full: FullPrompt<'_>| {
        let conditions = pipeline.encode_prompts(&[full]).unwrap();
        (conditions.context, conditions.pooled.unwrap())
    };
    let at = |strength| encode(FullPrompt::with_difference(&words, &tokens, strength));
    let plain = encode(FullPrompt::plain(&words));
    let negated = tokens.each_ref().map(|tokens| tokens.clone().neg());
    let [full, reverse] = [&tokens, &negated].map(|tokens| {
        let full = FullPrompt::with_difference(&words, tokens, 1.0);
        encode(full)
    });
    let way = |to: &(Tensor<3>, Tensor<2>), part: f64| {
        let step = (
            to.0.clone() - plain.0.clone(),
            to.1.clone() - plain.1.clone(),
        );
        (
            plain.0.clone() + step.0 * part,
            plain.1.clone() + step.1 * part,
        )
    };
    for (strength, expected) in [
        (0.0, plain.clone()),
        (0.3, way(&full, 0.3)),
        (1.0, full.clone()),
        (2.0, way(&full, 2.0)),
        (-1.0, reverse.clone()),
        (-0.5, way(&reverse, 0.5)),
    ] {
        let found = at(strength);
        assert!(relative_error(found.0, expected.0) < 1e-6, "{strength}");
        assert!(relative_error(found.1, expected.1) < 1e-6, "{strength}");
    }
    assert!(relative_error(full.0, plain.0) > 1e-2);
    assert!(relative_error(full.1, plain.1) > 1e-2);
}

#[test]
fn one_joint_space_guides_its_own_tokens_and_a_notice_says_so() {
    let config = AnalogyConfig {
        learn: LearnConfig {
            lambda_mse: 0.0,
            ..short_analogy().learn
        },
        ..short_analogy()
    };
    let learn = |clip: &[&str], config: &AnalogyConfig| {
        let models = with_clips(&golden("sdxl"), clip);
        let mut notices = Vec::new();
        let mut observer = |progress: &Progress| {
            if let Progress::Notice { message: text } = progress {
                notices.push(text.clone());
            }
            ControlFlow::Continue(())
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
    assert!(
        notices[0].contains("only for text encoder 2"),
        "{notices:?}"
    );

    // Without the CLIP loss no joint space is opened.
    let mut without = config.clone();
    without.learn.lambda_clip = 0.0;
    without.learn.lambda_mse = 4.0;
    assert_eq!(
        learn(&["sdxl/nothing"], &without),
        (vec![true, true], vec![])
    );
}
