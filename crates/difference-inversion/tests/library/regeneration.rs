//! Inversion and generation on a tiny pipeline with random weights.

use std::ops::ControlFlow;

use burn::tensor::{Device, Tensor};
use difference_inversion::Error;
use difference_inversion::diffusion::draw::TextToImage;
use difference_inversion::diffusion::frozen::Models;
use difference_inversion::diffusion::sample::{Ddim, Noising, Solver};
use difference_inversion::diffusion::words::{FullPrompt, Prompt};
use difference_inversion::method::analogy::{self, Target};
use difference_inversion::method::difference::DifferenceTokens;
use difference_inversion::method::generate;
use difference_inversion::method::generate::Inputs;
use difference_inversion::method::generate_config::{AnalogyConfig, GenerateConfig};
use difference_inversion::method::learn::Records;
use difference_inversion::method::pez;
use difference_inversion::method::prompt::{PromptConfig, PromptMode};
use difference_inversion::method::regenerate::{Branches, Guidance, Inversion, regenerate};
use difference_inversion::util::progress::{Progress, Stage};

use crate::tiny::{
    example, furthest, golden, models, models_in, relative_error, short_analogy, silent,
};

/// Largest difference of B's latents without a change, relative to their largest value.
const EXACT: f32 = 1e-4;
/// The same for DDIM inversion, which solves its steps by iteration.
const SOLVED: f32 = 1e-2;

fn target() -> Target {
    Target {
        b: example().a,
        caption_b: Some("a green house".to_owned()),
    }
}

/// B's latents regenerated with difference tokens of this size, and the original.
fn regenerated(models: &Models, tokens: f32, config: &GenerateConfig) -> [Tensor<4>; 2] {
    let pipeline = models.pipeline();
    let d = pipeline.base().encoders[0].hidden_size;
    let words = pipeline
        .read(&pipeline.prompt("a green house").unwrap(), 2)
        .unwrap();
    let negative = pipeline.read(&pipeline.prompt("").unwrap(), 0).unwrap();
    let difference = Tensor::full([2, d], tokens, &Device::flex());
    let encode = |full| pipeline.encode_prompts(&[full]).unwrap();
    let source = encode(FullPrompt::plain(&words));
    let branches = Branches {
        target: match tokens {
            0.0 => source.clone(),
            _ => encode(FullPrompt::with_difference(&words, &[difference], 1.0)),
        },
        source,
        negative: encode(FullPrompt::plain(&negative)),
    };
    let latents = pipeline.encode_image(&target().b);
    let found = regenerate(pipeline, latents.clone(), &branches, config, &mut silent).unwrap();
    [found, latents]
}

fn config(inversion: Inversion) -> GenerateConfig {
    GenerateConfig {
        inversion,
        guidance_scale: Some(1.0),
        num_inference_steps: 10,
        ..GenerateConfig::default()
    }
}

#[test]
fn an_edit_friendly_inversion_gives_b_back_exactly() {
    let models = models();
    for (skip, eta) in [(0.0, 1.0), (0.36, 1.0), (0.36, 0.5)] {
        let config = GenerateConfig {
            skip,
            eta: Some(eta),
            ..config(Inversion::EditFriendly)
        };
        let [found, latents] = regenerated(&models, 0.0, &config);
        let error = relative_error(found, latents);
        println!("skip {skip}, eta {eta}: {error:.1e}");
        assert!(error <= EXACT, "skip {skip}, eta {eta}: {error:.1e}");
    }
    let guided = GenerateConfig {
        guidance: Guidance::Ordinary,
        guidance_scale: Some(3.0),
        source_guidance_scale: 3.0,
        ..config(Inversion::EditFriendly)
    };
    let [found, latents] = regenerated(&models, 0.0, &guided);
    assert!(relative_error(found, latents) <= EXACT);
}

#[test]
fn a_ddim_inversion_gives_b_back_the_better_the_more_it_iterates() {
    let models = models();
    let error = |inversion_iterations| {
        let config = GenerateConfig {
            inversion_iterations,
            ..config(Inversion::Ddim)
        };
        let [found, latents] = regenerated(&models, 0.0, &config);
        relative_error(found, latents)
    };
    let (once, often) = (error(1), error(20));
    println!("1 iteration: {once:.1e}, 20: {often:.1e}");
    assert!(often < once && often <= SOLVED);
}

#[test]
fn sdedit_keeps_b_at_strength_0_and_forgets_it_at_1() {
    let models = models();
    let at = |sdedit_strength| {
        let config = GenerateConfig {
            sdedit_strength,
            ..config(Inversion::Sdedit)
        };
        let [found, latents] = regenerated(&models, 0.0, &config);
        relative_error(found, latents)
    };
    assert_eq!(at(0.0), 0.0);
    assert!(at(1.0) > at(0.3));
}

#[test]
fn difference_guidance_amplifies_the_difference_and_nothing_else() {
    let models = models();
    for inversion in [Inversion::Ddim, Inversion::EditFriendly, Inversion::Sdedit] {
        let at = |tokens, scale| {
            let config = GenerateConfig {
                guidance_scale: Some(scale),
                ..config(inversion)
            };
            regenerated(&models, tokens, &config)[0].clone()
        };
        let unchanged = at(0.0, 1.0);
        assert!(
            relative_error(at(0.0, 5.0), unchanged.clone()) <= EXACT,
            "{inversion:?}"
        );
        let [weak, strong] =
            [1.0, 3.0].map(|scale| relative_error(at(2.0, scale), unchanged.clone()));
        assert!(
            0.0 < weak && weak < strong,
            "{inversion:?}: {weak} {strong}"
        );
    }
}

#[test]
fn the_seed_decides_the_noise() {
    let models = models();
    let at = |seed| {
        let config = GenerateConfig {
            seed,
            ..config(Inversion::Sdedit)
        };
        regenerated(&models, 1.0, &config)[0].clone()
    };
    assert_eq!(relative_error(at(1), at(1)), 0.0);
    assert!(relative_error(at(1), at(2)) > 0.0);
}

#[test]
fn an_analogy_goes_through_all_its_stages() {
    let models = models();
    let mut stages = Vec::new();
    let mut observer = |progress: &Progress| {
        if let Progress::Step { stage, .. } = progress {
            stages.push(*stage);
        }
        ControlFlow::Continue(())
    };
    let (config, records) = (short_analogy(), Records::default());
    let (learned, applied) = analogy::solve(
        &models,
        &[example()],
        &target(),
        &config,
        &records,
        &mut observer,
    )
    .unwrap();
    stages.dedup();
    let expected = [
        Stage::LearnClip,
        Stage::Learn,
        Stage::Invert,
        Stage::Generate,
    ];
    assert_eq!(stages, expected);
    assert_eq!(learned.history.len(), 3);
    assert_eq!(learned.captions[0][0], "a red house");
    assert_eq!(applied.b_prime.dimensions(), (32, 32));
    assert_eq!(applied.prompt_b, "a green house");

    // Saved and loaded, forwards and in reverse.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("difference.safetensors");
    learned.tokens.save(&path).unwrap();
    let tokens = DifferenceTokens::load(&path, &Device::flex()).unwrap();
    let apply = |config: &AnalogyConfig| {
        analogy::apply(&models, &tokens, &target(), config, &mut silent)
            .unwrap()
            .b_prime
    };
    assert_eq!(apply(&config), applied.b_prime);
    let mut reverse = config;
    reverse.generate.reverse = true;
    reverse.generate.strength = 3.0;
    assert_ne!(apply(&reverse), applied.b_prime);
}

#[test]
fn with_strength_0_b_stays_as_it_is() {
    let models = models();
    let pipeline = models.pipeline();
    let tokens = vec![Tensor::full([2, 16], 0.5, &Device::flex())];
    let tokens = DifferenceTokens::new(tokens, pipeline.base()).unwrap();
    let mut config = short_analogy();
    config.generate.inversion = Inversion::EditFriendly;
    let mut farthest = |strength| {
        config.generate.strength = strength;
        let applied = analogy::apply(&models, &tokens, &target(), &config, &mut silent).unwrap();
        let b = pipeline.decode(pipeline.encode_image(&target().b)).unwrap();
        furthest(&applied.b_prime, &b)
    };
    assert!(farthest(0.0) <= 1);
    assert!(farthest(1.0) > 1);
}

#[test]
fn what_cannot_be_learned_or_applied_is_an_error() {
    let models = models();
    let (config, records) = (short_analogy(), Records::default());
    let learn = |example| {
        let result = analogy::learn(&models, &[example], &config, &records, &mut silent);
        result.unwrap_err().to_string()
    };
    let mut same = example();
    same.a_prime = same.a.clone();
    assert!(learn(same).contains("the same picture"));
    let mut silent_example = example();
    silent_example.caption_a = None;
    assert!(learn(silent_example).contains("captioner"));

    let mut base = models.pipeline().base();
    base.encoders[0].table = "0".repeat(64);
    let tokens = DifferenceTokens::zeros(2, &base, &Device::flex());
    let error = analogy::apply(&models, &tokens, &target(), &config, &mut silent).unwrap_err();
    assert!(matches!(error, Error::WrongBase { .. }), "{error}");
    let error = analogy::check_apply(&models, &tokens, &config).unwrap_err();
    assert!(matches!(error, Error::WrongBase { .. }), "{error}");

    let mut long = config.clone();
    long.learn.num_tokens = 31;
    let error = analogy::learn(&models, &[example()], &long, &records, &mut silent).unwrap_err();
    assert!(error.to_string().contains("at most 30"), "{error}");
}

#[test]
fn a_missing_caption_of_b_is_told_before_anything_is_learned() {
    let models = models();
    let mut config = short_analogy();
    let target = Target {
        caption_b: None,
        ..target()
    };
    for mode in [PromptMode::Caption, PromptMode::Text] {
        config.prompt.prompt_mode = mode;
        let mut learned = false;
        let mut observer = |progress: &Progress| {
            learned |= matches!(progress, Progress::Step { stage, .. } if *stage == Stage::Learn);
            ControlFlow::Continue(())
        };
        let records = Records::default();
        let examples = [example()];
        let result = analogy::solve(
            &models,
            &examples,
            &target,
            &config,
            &records,
            &mut observer,
        );
        assert!(matches!(result, Err(Error::Missing { .. })), "{result:?}");
        assert!(!learned);
    }
}

#[test]
fn latents_are_not_clamped_where_the_scheduler_file_says_nothing_of_it() {
    let models = models_in(&golden("sdxl")); // saved with Euler's method, which clamps nothing
    let mut ddim = Ddim::new(models.pipeline().noising(), 10, 0.0).unwrap();
    let latents = Tensor::full([1, 4, 2, 2], 3.0, &Device::flex());
    let next = ddim.step(9, latents.zeros_like(), latents, None);
    assert!(next.min().into_scalar::<f32>() >= 3.0);
    let outdated = models_in(&golden("learning")); // its file says 0
    let Noising::Discrete(schedule) = outdated.pipeline().noising() else {
        panic!("a schedule of whole steps");
    };
    assert_eq!(schedule.config().steps_offset, 1);
}

#[test]
fn a_prompt_that_is_too_long_loses_words_but_no_difference_tokens() {
    let models = models();
    let pipeline = models.pipeline();
    let prompt = pipeline.prompt(&"house ".repeat(60)).unwrap();
    let words = pipeline.read(&prompt, 4).unwrap();
    assert!(words.notice().unwrap().contains("are cut off"));
    let d = pipeline.base().encoders[0].hidden_size;
    let encode = |value| {
        let tokens = [Tensor::full([4, d], value, &Device::flex())];
        let full = FullPrompt::with_difference(&words, &tokens, 1.0);
        pipeline.encode_prompts(&[full]).unwrap().context
    };
    assert_eq!(encode(0.0).dims(), [1, 32, d]);
    assert!(relative_error(encode(0.5), encode(0.0)) > 0.0);
}

#[test]
fn an_optimised_prompt_is_nearer_to_its_picture_than_its_prefix() {
    let models = models();
    let joint = &models.joints().unwrap()[0];
    let image = joint.image_features(&example().a).unwrap();
    let prefix = models.pipeline().prompt("a red house").unwrap();
    let config = PromptConfig {
        pez_tokens: 4,
        pez_steps: 30,
        ..PromptConfig::default()
    };
    let find = |seed| {
        let config = PromptConfig {
            seed,
            ..config.clone()
        };
        pez::optimise(joint, &image, &prefix, &config, 0, &mut silent).unwrap()
    };
    let near = |prompt: &_| {
        let text = joint.text_features(prompt).unwrap();
        text.iter().zip(&image).map(|(x, y)| x * y).sum::<f32>()
    };
    let found = find(1);
    println!("cosine {} to {}", near(&prefix), near(&found));
    assert!(near(&found) > near(&prefix));
    assert_eq!(found, find(1));
    assert_eq!(found.ids(0).len(), prefix.ids(0).len() + 4);

    let mut config = short_analogy();
    config.prompt = PromptConfig {
        prompt_mode: PromptMode::CaptionOptimised,
        pez_steps: 2,
        ..PromptConfig::default()
    };
    let records = Records::default();
    let learned = analogy::learn(&models, &[example()], &config, &records, &mut silent).unwrap();
    assert!(learned.prompts[0][0].starts_with("a red house "));
}

/// The result of learning with these settings of prompts, and its notices; the text
/// encoder has room for 30 token ids.
fn learned_with(prompt: PromptConfig, caption_a: &str) -> (Result<(), String>, Vec<String>) {
    let mut notices = Vec::new();
    let mut observer = |progress: &Progress| {
        if let Progress::Notice { message: text } = progress {
            notices.push(text.clone());
        }
        ControlFlow::Continue(())
    };
    let config = AnalogyConfig {
        prompt,
        ..short_analogy()
    };
    let mut example = example();
    example.caption_a = Some(caption_a.to_owned());
    let records = Records::default();
    let learned = analogy::learn(&models(), &[example], &config, &records, &mut observer);
    (
        learned.map(|_| ()).map_err(|error| error.to_string()),
        notices,
    )
}

#[test]
fn a_long_caption_is_cut_and_the_optimised_words_behind_it_are_not() {
    let prompt = PromptConfig {
        prompt_mode: PromptMode::CaptionOptimised,
        pez_tokens: 4,
        pez_steps: 2,
        ..PromptConfig::default()
    };
    let caption = "a".repeat(10) + &" a".repeat(25);
    let places = models().pipeline().prompt(&caption).unwrap().ids(0).len();
    assert!(places > 24);
    let (learned, notices) = learned_with(prompt, &caption);
    learned.unwrap();
    let cut = format!("its last {} token ids are cut off", places - 24);
    assert_eq!(notices.len(), 1, "{notices:?}");
    assert!(notices[0].starts_with("the caption `aaaa"), "{notices:?}");
    assert!(notices[0].ends_with(&cut), "{notices:?}");
}

#[test]
fn settings_of_optimised_prompts_that_make_no_sense_are_named() {
    let message = |pez_tokens, pez_steps| {
        let prompt = PromptConfig {
            prompt_mode: PromptMode::Optimised,
            pez_tokens,
            pez_steps,
            ..PromptConfig::default()
        };
        learned_with(prompt, "a house").0.unwrap_err()
    };
    assert_eq!(
        message(4, 0),
        "setting `pez_steps`: expected at least 1, found 0"
    );
    let many = message(29, 2);
    assert!(
        many.starts_with("setting `pez_tokens`: expected at most 28"),
        "{many}"
    );
    assert!(
        many.ends_with("besides 2 difference tokens, found 29"),
        "{many}"
    );

    let models = models();
    let joint = &models.joints().unwrap()[0];
    let image = joint.image_features(&example().a).unwrap();
    let config = PromptConfig {
        pez_tokens: 31,
        ..PromptConfig::default()
    };
    let prefix = Prompt::default();
    let error = pez::optimise(joint, &image, &prefix, &config, 0, &mut silent).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("setting `pez_tokens`: expected at most 30"),
        "{error}"
    );
}

#[test]
fn text_becomes_a_picture_with_every_solver() {
    let models = models();
    let draw = |scheduler: Option<&str>| {
        let request = TextToImage {
            prompt: "a red house".to_owned(),
            num_inference_steps: 5,
            guidance_scale: Some(2.0),
            scheduler: scheduler.map(str::to_owned),
            ..TextToImage::default()
        };
        generate::generate(&models, &request, Inputs::default(), &mut silent)
            .map_err(|e| e.to_string())
    };
    let ddim = draw(Some("ddim")).unwrap();
    // Mean distance from DDIM's picture in 8-bit steps: Euler's step is equivalent to DDIM's, solvers of higher
    // order are close, and solvers that add noise are far.
    for (name, far) in [
        ("euler", 0.0..0.1),
        ("dpm-solver", 1.0..10.0),
        ("uni-pc", 1.0..10.0),
        ("euler-ancestral", 20.0..128.0),
        ("lcm", 20.0..128.0),
    ] {
        let picture = draw(Some(name)).unwrap();
        let differences = (picture.iter().zip(ddim.iter())).map(|(a, b)| a.abs_diff(*b));
        let distance = differences.map(f64::from).sum::<f64>() / ddim.len() as f64;
        assert!(far.contains(&distance), "{name}: {distance}");
    }
    assert_eq!(draw(None), Ok(ddim));
    assert_eq!(
        draw(Some("magic")).unwrap_err(),
        "setting `scheduler`: expected ddim, dpm-solver, euler, euler-ancestral, lcm, uni-pc, found magic"
    );
}
