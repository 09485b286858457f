//! The networks of metrics against PyTorch.

mod common;

use std::path::Path;

use burn::tensor::{Device, Tensor};
use common::{assert_matches, golden, open, read};
use difference_inversion::eval::Judge;
use difference_inversion::image::load_image;

/// The four pictures that the golden files are about.
const PICTURES: [&str; 4] = ["a", "a_prime", "b", "b_prime"];

fn demo(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
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
