//! Tests of the inside of a run: its loss scale.

use std::ops::ControlFlow;
use std::path::Path;

use burn::tensor::{Device, Distribution, FloatDType, Tensor};

use crate::diffusion::model_files::{FileOptions, ModelFiles};
use crate::diffusion::pipeline::Pipeline;
use crate::method::learn::checkpoint::State;
use crate::method::learn::identity::Identity;
use crate::method::learn::scaling::LossScale;
use crate::method::learn::{LearnConfig, Pair, Records, Run};
use crate::util::tensors::host;

fn pipeline() -> Pipeline {
    let folder =
        Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join("tests/golden/learning");
    let files = ModelFiles::open(&folder, &FileOptions::default()).unwrap();
    Pipeline::open(&files, &Device::flex(), FloatDType::F32).unwrap()
}

fn pair(pipeline: &Pipeline) -> Pair {
    let latents = || {
        let normal = Distribution::Normal(0.0, 1.0);
        Tensor::random(pipeline.latent_shape(), normal, &Device::flex())
    };
    let words = |text: &str| {
        let prompt = pipeline.prompt(text).unwrap();
        pipeline.read(&prompt, 2).unwrap()
    };
    Pair {
        latents_a: latents(),
        latents_a_prime: latents(),
        prompt_a: words("a red house"),
        prompt_a_prime: words("a blue house"),
        deltas: Vec::new(),
    }
}

fn config() -> LearnConfig {
    LearnConfig {
        num_tokens: 2,
        lambda_clip: 0.0,
        ..LearnConfig::default()
    }
}

#[test]
fn the_optimiser_sees_gradients_without_the_loss_scale() {
    let (pipeline, config, records) = (pipeline(), config(), Records::default());
    let pairs = [pair(&pipeline)];
    let run = Run::new(&pipeline, &[], &pairs, &config, &records).unwrap();
    let after_three_steps = |dtype| {
        let mut state = run.first_state(&mut |_| ControlFlow::Continue(())).unwrap();
        state.loss_scale = LossScale::new(dtype);
        for _ in 0..3 {
            run.step(&mut state).unwrap();
        }
        (host(state.tokens[0].clone()), state.history)
    };
    // A power of two is exact in f32, in which this pipeline computes.
    let (plain, scaled) = (FloatDType::F32, FloatDType::F16);
    assert_eq!(after_three_steps(plain), after_three_steps(scaled));
}

#[test]
fn a_checkpoint_keeps_the_loss_scale() {
    let (pipeline, config) = (pipeline(), config());
    let pairs = [pair(&pipeline)];
    let identity = Identity::new(&pipeline, &pairs, &config);
    let tokens = Tensor::zeros([2, identity.base.encoders[0].hidden_size], &Device::flex());
    let scale = LossScale::new(FloatDType::F16).at([9, 30]);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    State::new(vec![tokens], scale)
        .save(&path, &identity)
        .unwrap();
    let start = LossScale::new(FloatDType::F16);
    let read = State::load(&path, &identity, start, &Device::flex()).unwrap();
    assert_eq!(read.loss_scale, scale);
}
