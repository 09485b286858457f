//! The networks of metrics against PyTorch.

#[path = "../../../tests/common/mod.rs"]
mod common;

use std::path::Path;

use burn::tensor::{Device, FloatDType, Tensor};
use difference_inversion::image::{ImagePreprocessor, RgbImage, load_image};
use difference_inversion::models::vision::dinov2::Dinov2Model;
use difference_inversion::models::vision::lpips::Lpips;
use safetensors::SafeTensors;

use self::common::{assert_matches, golden, open, read};
use crate::Judge;
use crate::metrics::stage_distance;

/// The four pictures of the golden files.
const PICTURES: [&str; 4] = ["a", "a_prime", "b", "b_prime"];

fn demo(name: &str) -> std::path::PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
        .join("demo")
        .join(name)
}

fn row(values: &[f32]) -> Tensor<1> {
    Tensor::from_floats(values, &Device::flex())
}

#[test]
fn the_judge_sees_what_it_sees_in_pytorch() {
    let expected = open(&golden("judge").join("expected.safetensors"));
    let judge = Judge::open(&demo("benchmark/judge.safetensors"), &Device::flex()).unwrap();
    for (number, name) in PICTURES.into_iter().enumerate() {
        let path = demo("benchmark/validation/000").join(format!("{name}.png"));
        let judged = judge.look(&load_image(&path).unwrap());
        let of_picture = |name: &str| -> Tensor<1> {
            let all: Tensor<2> = read(&expected, name);
            all.slice([number..number + 1]).squeeze_dim(0)
        };
        assert_matches("hidden", row(&judged.features), of_picture("hidden"));
        for (stage, (values, channels)) in judged.stages.iter().enumerate() {
            let positions = values.len() / channels;
            let map = row(values).reshape([positions, *channels]);
            let means = map.mean_dim(0).squeeze_dim(0);
            assert_matches("stage", means, of_picture(&format!("stage{stage}.mean")));
        }
        let logits: Vec<f32> = of_picture("logits").into_data().iter::<f32>().collect();
        let mut rest = &logits[..];
        for (attribute, values) in judge.attributes() {
            let (own, others) = rest.split_at(values.len());
            rest = others;
            let seen = values
                .iter()
                .position(|value| *value == judged.attributes[attribute]);
            assert!(
                own.iter().all(|logit| *logit <= own[seen.unwrap()]),
                "{attribute}"
            );
        }
    }
}

#[test]
fn dinov2_is_that_of_transformers() {
    for name in ["mlp", "swiglu"] {
        let folder = golden("dinov2").join(name);
        let model = Dinov2Model::open(&folder, &Device::flex(), FloatDType::F32).unwrap();
        let expected = open(&folder.join("expected.safetensors"));
        for size in ["", "other."] {
            let named = |name: &str| format!("{size}{name}");
            let pixels: Tensor<4> = read(&expected, &named("pixel_values"));
            let states = model.forward(pixels.clone()).unwrap();
            let reference = read(&expected, &named("last_hidden_state"));
            assert_matches(&named(name), states, reference);
            let pooled = model.pooled(pixels).unwrap();
            assert_matches(
                &named(name),
                pooled,
                read(&expected, &named("pooler_output")),
            );
        }
        let eyes = ImagePreprocessor::open(&folder).unwrap();
        let pixels = eyes.apply(&picture_in(&folder), &Device::flex());
        let reference: Tensor<4> = read(&expected, "pixel_values");
        // Resizing is in whole steps of 1/255, which are up to 0.018 here.
        let furthest = (pixels - reference).abs().max().into_scalar::<f32>();
        assert!(furthest < 0.02, "{furthest}");
    }
    let folder = golden("dinov2/mlp");
    let model = Dinov2Model::open(&folder, &Device::flex(), FloatDType::F32).unwrap();
    let small = Tensor::zeros([1, 3, 6, 30], &Device::flex());
    let message = model.forward(small).unwrap_err().to_string();
    assert!(message.contains("[1, 3, 6, 30]"), "{message}");
}

/// Decodes the bytes `picture` of a golden file.
fn picture_in(folder: &Path) -> RgbImage {
    let bytes = std::fs::read(folder.join("expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let picture = file.tensor("picture").unwrap();
    let [height, width, 3] = *picture.shape() else {
        panic!("a picture has three channels");
    };
    let side = |length: usize| u32::try_from(length).unwrap();
    RgbImage::from_raw(side(width), side(height), picture.data().to_vec()).unwrap()
}

#[test]
fn lpips_is_that_of_pytorch() {
    let expected = open(&golden("lpips").join("expected.safetensors"));
    let lpips = Lpips::open(&golden("lpips").join("model.safetensors"), &Device::flex()).unwrap();
    let [x, y] = ["x", "y"].map(|name| {
        let pictures: Tensor<4> = read(&expected, name);
        lpips.features(pictures).unwrap()
    });
    let layers: Tensor<2> = read(&expected, "layers");
    let distances: Vec<f32> = (0..2)
        .flat_map(|picture| {
            let blocks = x.iter().zip(&y).zip(lpips.channel_weights());
            blocks.map(move |((x, y), weights)| {
                let [x, y] = [x, y].map(|map| {
                    let own = map.clone().slice([picture..picture + 1]);
                    own.into_data().iter::<f32>().collect::<Vec<_>>()
                });
                let distance = stage_distance(&x, &y, weights.len(), Some(weights));
                #[expect(clippy::cast_possible_truncation, reason = "to be compared with f32")]
                let distance = distance as f32;
                distance
            })
        })
        .collect();
    assert_matches("lpips", row(&distances).reshape([2, 5]), layers);
    let message = lpips.features(Tensor::zeros([1, 3, 15, 40], &Device::flex()));
    assert!(
        message
            .unwrap_err()
            .to_string()
            .contains("16 × 16 or more, found 40 × 15")
    );
}
