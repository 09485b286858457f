//! The captioners against transformers, on tiny BLIP-2 and BLIP models with random weights made by
//! `training/reference/make_golden_captioner.py` and `make_golden_blip.py`.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::{Device, FloatDType, Tensor, TensorData};
use difference_inversion::image::load_image;
use difference_inversion::models::captioner::{
    Blip, Blip2, Captioner, EarlyStopping, GenerationConfig,
};
use difference_inversion::weights::read_config;
use serde_json::Value;

use super::common::{assert_matches, golden, open, read};

const CASES: [&str; 2] = ["captioner/pre_norm", "captioner/post_norm"];
const BLIP_CASES: [&str; 2] = ["blip/base", "blip/large"];

fn blip2(name: &str) -> Blip2 {
    Blip2::open(&golden(name), &Device::flex(), FloatDType::F32).unwrap()
}

fn blip(name: &str) -> Blip {
    Blip::open(&golden(name), &Device::flex(), FloatDType::F32).unwrap()
}

#[test]
fn image_tower_and_queries_of_blip_2() {
    for name in CASES {
        let model = blip2(name);
        let expected = open(&golden(name).join("expected.safetensors"));
        let image = model.image_states(read(&expected, "pixels")).unwrap();
        let queries = model.query_states(&image);
        assert_matches(&format!("{name} image"), image, read(&expected, "image"));
        assert_matches(
            &format!("{name} queries"),
            queries,
            read(&expected, "queries"),
        );
    }
}

#[test]
fn image_tower_of_blip() {
    for name in BLIP_CASES {
        let expected = open(&golden(name).join("expected.safetensors"));
        let image = blip(name).image_states(read(&expected, "pixels")).unwrap();
        assert_matches(&format!("{name} image"), image, read(&expected, "image"));
    }
}

/// Compares `first_logits`, without and with a prompt, with those of transformers.
fn check_first_logits(
    name: &str,
    prompt: &[u32],
    first_logits: impl Fn(Tensor<4>, &[u32]) -> Vec<f32>,
) {
    let expected = open(&golden(name).join("expected.safetensors"));
    let pixels: Tensor<4> = read(&expected, "pixels");
    for (prompt, logits) in [(&[][..], "logits"), (prompt, "prompted_logits")] {
        let rows = (0..pixels.dims()[0]).map(|picture| {
            let logits = first_logits(pixels.clone().narrow(0, picture, 1), prompt);
            let shape = [1, logits.len()];
            Tensor::<2>::from_data(TensorData::new(logits, shape), &Device::flex())
        });
        let found = Tensor::cat(rows.collect(), 0);
        assert_matches(&format!("{name} {logits}"), found, read(&expected, logits));
    }
}

#[test]
fn first_logits_match_transformers() {
    for name in CASES {
        let model = blip2(name);
        check_first_logits(name, &[20, 21, 22], |pixels, prompt| {
            model.first_logits(pixels, prompt).unwrap()
        });
    }
    for name in BLIP_CASES {
        let model = blip(name);
        check_first_logits(name, &[5, 6, 7], |pixels, prompt| {
            model.first_logits(pixels, prompt).unwrap()
        });
    }
}

fn generation_config(search: &Value) -> GenerationConfig {
    let count = |name: &str| usize::try_from(search[name].as_u64().unwrap()).unwrap();
    GenerationConfig {
        num_beams: count("num_beams"),
        max_new_tokens: count("max_new_tokens"),
        length_penalty: search["length_penalty"].as_f64().unwrap_or(1.0),
        early_stopping: match &search["early_stopping"] {
            Value::Bool(true) => EarlyStopping::WhenFull,
            Value::String(_) => EarlyStopping::Never,
            _ => EarlyStopping::Heuristic,
        },
        prompt: None,
    }
}

/// Compares the choices of `generate` with those of transformers; returns how often a text ended by
/// itself.
fn check_searches(name: &str, generate: impl Fn(Tensor<4>, &[u32], &GenerationConfig) -> Vec<u32>) {
    let pixels: Tensor<4> = read(&open(&golden(name).join("expected.safetensors")), "pixels");
    let searches: Vec<Value> = read_config(&golden(name).join("searches.json")).unwrap();
    for search in searches {
        let prompt: Vec<u32> = serde_json::from_value(search["prompt"].clone()).unwrap();
        let tokens: Vec<Vec<u32>> = serde_json::from_value(search["tokens"].clone()).unwrap();
        for (picture, expected) in tokens.into_iter().enumerate() {
            let pixels = pixels.clone().narrow(0, picture, 1);
            let found = generate(pixels, &prompt, &generation_config(&search));
            assert_eq!(found, expected, "{name}, picture {picture}, {search}");
        }
    }
}

#[test]
fn greedy_and_beam_search_choose_the_same_tokens() {
    for name in CASES {
        let model = blip2(name);
        check_searches(name, |pixels, prompt, config| {
            model.generate(pixels, prompt, config).unwrap()
        });
    }
    for name in BLIP_CASES {
        let model = blip(name);
        check_searches(name, |pixels, prompt, config| {
            model.generate(pixels, prompt, config).unwrap()
        });
    }
}

#[test]
fn captions_from_pictures() {
    for name in [CASES[0], BLIP_CASES[0], BLIP_CASES[1]] {
        let folder = golden(name);
        let captioner = Captioner::open(&folder, &Device::flex(), FloatDType::F32).unwrap();
        let image = load_image(&folder.join("picture.png")).unwrap();
        let captions: BTreeMap<String, String> =
            read_config(&folder.join("captions.json")).unwrap();
        for (prompt, expected) in captions {
            let config = GenerationConfig {
                num_beams: 3,
                max_new_tokens: 12,
                prompt: Some(prompt.clone()),
                ..Default::default()
            };
            let found = captioner.caption(&image, &config).unwrap();
            assert_eq!(found, expected, "{name}: {prompt:?}");
        }
    }
}

#[test]
fn captions_that_cannot_fit_are_refused() {
    let folder = golden(CASES[0]);
    let captioner = Captioner::open(&folder, &Device::flex(), FloatDType::F32).unwrap();
    let image = load_image(&folder.join("picture.png")).unwrap();
    let config = GenerationConfig {
        max_new_tokens: 100,
        ..Default::default()
    };
    let message = captioner.caption(&image, &config).unwrap_err().to_string();
    assert!(message.contains("more than the 48 tokens"), "{message}");
    let blip = Captioner::open(&golden(BLIP_CASES[1]), &Device::flex(), FloatDType::F32).unwrap();
    let message = blip.caption(&image, &config).unwrap_err().to_string();
    assert!(message.contains("more than the 24 tokens"), "{message}");
}

/// The message of opening a copy of the first model whose `file` has `from` replaced by `to`.
fn refusal(file: &str, from: &str, to: &str) -> String {
    refusal_of(CASES[0], file, from, to)
}

/// The message of opening a copy of model `name` whose `file` has `from` replaced by `to`.
fn refusal_of(name: &str, file: &str, from: &str, to: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden(name)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    let path = folder.path().join(file);
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{file} has no {from}");
    std::fs::write(&path, text.replacen(from, to, 1)).unwrap();
    open_captioner(folder.path())
}

fn open_captioner(folder: &Path) -> String {
    let opened = Captioner::open(folder, &Device::flex(), FloatDType::F32);
    opened.unwrap_err().to_string()
}

#[test]
fn configurations_that_do_not_fit_are_refused() {
    let config = |from: &str, to: &str| refusal("config.json", from, to);
    assert!(config(r#""opt""#, r#""t5""#).contains("text_config.model_type"));
    let width = config(
        r#""word_embed_proj_dim": 20"#,
        r#""word_embed_proj_dim": 16"#,
    );
    assert!(width.contains("word_embed_proj_dim"), "{width}");
    let queries = config(r#""num_query_tokens": 4"#, r#""num_query_tokens": 5"#);
    assert!(
        queries.contains("query_tokens") && queries.contains("[1, 5, 16]"),
        "{queries}"
    );
    let frequency = config(
        r#""cross_attention_frequency": 2"#,
        r#""cross_attention_frequency": 0"#,
    );
    assert!(
        frequency.contains("cross_attention_frequency"),
        "{frequency}"
    );
    let missing = open_captioner(&golden(CASES[1])); // without a tokenizer
    assert!(missing.contains("tokenizer.json"), "{missing}");
}

#[test]
fn the_class_in_config_json_decides_which_captioner_is_opened() {
    let class = "BlipForConditionalGeneration";
    let other = refusal_of(
        BLIP_CASES[0],
        "config.json",
        class,
        "BlipForQuestionAnswering",
    );
    assert!(
        other.contains("field `architectures`: expected BlipForCond"),
        "{other}"
    );
    assert!(
        other.contains("found \"BlipForQuestionAnswering\""),
        "{other}"
    );
    // The tensors of one class are not those of the other.
    let two = refusal_of(
        BLIP_CASES[0],
        "config.json",
        class,
        "Blip2ForConditionalGeneration",
    );
    assert!(
        two.contains("found no such tensor") || two.contains("found shape"),
        "{two}"
    );
    let width = r#""hidden_size": 24"#;
    let wrong = refusal_of(BLIP_CASES[0], "config.json", width, r#""hidden_size": 20"#);
    assert!(wrong.contains("found shape"), "{wrong}");
    let heads = refusal_of(
        BLIP_CASES[1],
        "config.json",
        r#""num_attention_heads": 2"#,
        r#""num_attention_heads": 3"#,
    );
    assert!(heads.contains("num_attention_heads"), "{heads}");
    let vocabulary = refusal_of(BLIP_CASES[1], "vocab.txt", "[UNK]", "[XXX]");
    assert!(
        vocabulary.contains("vocab.txt: not a vocabulary of BERT"),
        "{vocabulary}"
    );
}
