//! What all compared methods have in common.

use std::sync::Arc;

use burn::tensor::Device;
use difference_inversion::Result;
use difference_inversion::image::fit;
use image::RgbImage;
use serde_json::{Value, json};

use super::tiny::{analogy, eval_models, eval_models_with, settings, silent};
use super::{Analogy, Captions, MeasurePaths, Measures, Method, Told, Variant, build};

fn method(name: &str, values: &Value) -> Box<dyn Method> {
    let variant = Variant {
        settings: settings(values),
        ..Variant::plain(name)
    };
    build(&variant, &eval_models()).unwrap()
}

/// Learns, then draws.
fn solve(method: &dyn Method, analogy: &Analogy, seed: u64) -> Result<RgbImage> {
    let learned = method.learn(analogy, seed, &mut silent)?;
    method.draw(analogy, &learned, seed, &mut silent)
}

/// Every system, with settings that take little time.
fn systems() -> [(Box<dyn Method>, Told); 5] {
    let short_visii = json!({
        "steps": 2, "pez_steps": 2, "num_inference_steps": 2,
        "pez_tokens": 3, "scheduler": "euler-ancestral",
    });
    let short_dia = json!({
        "token_iterations": 1, "crops": 1, "num_inference_steps": 2, "noise_iterations": 1,
        "noise_inner_iterations": 2, "strengths": [0.5, 1.0], "guidance_scales": [3.0],
    });
    let ddim = json!({
        "token_iterations": 1, "crops": 0, "num_inference_steps": 3, "inversion": "ddim",
    });
    [
        (
            method("instruct-pix2pix", &json!({"num_inference_steps": 2})),
            Told::Instruction,
        ),
        (method("visii", &short_visii), Told::Nothing),
        (
            method(
                "analogist",
                &json!({"num_inference_steps": 3, "prompt": "suite"}),
            ),
            Told::Captions,
        ),
        (method("dia", &short_dia), Told::Nothing),
        (method("dia", &ddim), Told::Nothing),
    ]
}

#[test]
fn the_seed_alone_decides() {
    for (method, told) in systems() {
        assert_eq!(method.told(), told);
        let solve = |seed| solve(&*method, &analogy(), seed).unwrap();
        let first = solve(7);
        let name = method.settings();
        assert!(first == solve(7), "{name}");
        assert!(first != solve(8), "{name}");
        assert_eq!(first.dimensions(), analogy().b.dimensions(), "{name}");
    }
}

#[test]
fn pictures_have_the_size_of_the_model_whatever_that_of_b() {
    let models = eval_models().text_to_image().unwrap();
    let [height, width] = models.pipeline().resolution();
    let wide = Analogy {
        b: fit(&analogy().b, 3 * width, height),
        ..analogy()
    };
    for (method, _) in systems() {
        let drawn = solve(&*method, &wide, 7).unwrap();
        assert_eq!(drawn.dimensions(), (width, height), "{}", method.settings());
    }
}

#[test]
fn metrics_hold_no_more_than_the_joint_space_of_a_model() {
    let models = eval_models();
    let model = models.text_to_image().unwrap();
    let paths = MeasurePaths::default();
    let measures = Measures::open(&paths, &models, &Device::flex()).unwrap();
    let held = Arc::downgrade(&model);
    drop(model);
    assert!(held.upgrade().is_none());
    let analogy = analogy();
    let scores = measures.measure(&analogy, &analogy.a).unwrap();
    assert!(scores["clip_direction"].is_finite());
}

#[test]
fn what_a_method_must_be_told_is_missed() {
    let mute = Analogy {
        captions: None,
        instruction: None,
        ..analogy()
    };
    for (method, told) in systems() {
        let all = analogy();
        let (captions, instruction) = (all.captions.unwrap(), all.instruction);
        assert!(method.is_told(&captions, instruction.as_deref()));
        let solved = solve(&*method, &mute, 1);
        assert_eq!(method.is_told(&Captions::default(), None), solved.is_ok());
        let message = solved.err().map(|error| error.to_string());
        assert_eq!(message.is_some(), told != Told::Nothing, "{message:?}");
        if let Some(message) = message {
            assert!(
                message.contains("is missing: the method needs"),
                "{message}"
            );
        }
    }
}

#[test]
fn an_analogy_is_solved_backwards_from_the_pictures_the_other_way_round() {
    let short = |reverse: bool| {
        let values = json!({
            "steps": 2, "num_inference_steps": 4, "reverse": reverse, "prompt_mode": "text",
        });
        method("difference-inversion", &values)
    };
    let (forwards, backwards) = (short(false), short(true));
    assert_ne!(forwards.learning(), backwards.learning());
    let captions = Captions {
        b: Some("a house".to_owned()),
        ..analogy().captions.unwrap()
    };
    let there = Analogy {
        captions: Some(captions.clone()),
        ..analogy()
    };
    let back = Analogy {
        a: there.a_prime.clone(),
        a_prime: there.a.clone(),
        captions: Some(Captions {
            a: captions.a_prime,
            a_prime: captions.a,
            ..captions
        }),
        ..analogy()
    };
    let learn = |method: &dyn Method, analogy: &Analogy| {
        let learned = method.learn(analogy, 7, &mut silent).unwrap();
        let tokens = learned.array("tokens.0").unwrap();
        format!("{:?}", tokens.values())
    };
    assert_eq!(learn(&*backwards, &there), learn(&*forwards, &back));
    assert_ne!(learn(&*backwards, &there), learn(&*forwards, &there));
    // The learned file is removed.
    let learned = forwards.learn(&back, 7, &mut silent).unwrap();
    let draw = |method: &dyn Method| method.draw(&there, &learned, 7, &mut silent).unwrap();
    assert!(draw(&*backwards) != draw(&*forwards));
}

#[test]
fn a_model_of_the_wrong_kind_is_refused() {
    let message = |name: &str, models| {
        let built = build(&Variant::plain(name), &models);
        built
            .err()
            .map(|error| error.to_string())
            .unwrap_or_default()
    };
    let instruct = "a StableDiffusionInstructPix2PixPipeline is needed, and the model is a \
                    StableDiffusionInpaintPipeline";
    for name in ["instruct-pix2pix", "visii"] {
        assert_eq!(
            message(name, eval_models_with(Some("inpaint"), None)),
            instruct
        );
        let missing = message(name, eval_models_with(None, None));
        assert!(
            missing.starts_with("an InstructPix2Pix model is missing"),
            "{missing}"
        );
    }
    let inpaint = message("analogist", eval_models_with(None, Some("learning")));
    assert!(
        inpaint.contains("a StableDiffusionInpaintPipeline is needed"),
        "{inpaint}"
    );
}

/// The variants of a file: sections of names and values.
fn variants(text: &str) -> Vec<Variant> {
    let sections = text.split("\n[").skip(1).map(|section| {
        let (name, lines) = section.split_once("]\n").unwrap();
        let values = lines.lines().filter_map(|line| line.split_once(" = "));
        let mut settings: serde_json::Map<String, Value> = values
            .map(|(key, value)| (key.to_owned(), serde_json::from_str(value).unwrap()))
            .collect();
        let method = settings.remove("method").unwrap();
        Variant {
            name: name.to_owned(),
            method: method.as_str().unwrap().to_owned(),
            settings,
        }
    });
    sections.collect()
}

#[test]
fn every_variant_of_the_benchmark_is_a_method() {
    let models = eval_models();
    for (text, count) in [
        (include_str!("../../../demo/benchmark/tuning.toml"), 58),
        (include_str!("../../../demo/benchmark/tuned.toml"), 4),
        (include_str!("../../../demo/benchmark/study.toml"), 40),
    ] {
        let variants = variants(text);
        assert_eq!(variants.len(), count);
        for variant in variants {
            let built = build(&variant, &models);
            assert!(built.is_ok(), "{}: {}", variant.name, built.err().unwrap());
        }
    }
}
