//! Tests of the inside of a run: its loss scale, and how it measures a vocabulary.

use std::ops::ControlFlow;
use std::path::Path;

use burn::tensor::{DType, Device, Distribution, FloatDType, Tensor, TensorData};

use crate::diffusion::model_files::{FileOptions, ModelFiles};
use crate::diffusion::pipeline::Pipeline;
use crate::method::learn::checkpoint::State;
use crate::method::learn::identity::Identity;
use crate::method::learn::scaling::LossScale;
use crate::method::learn::{LearnConfig, Pair, Records, Run, Vocabulary};
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

/// Also of a table that is read in several parts.
#[test]
fn a_vocabulary_is_measured() {
    let (rows, width) = (9001_u16, 3);
    let numbers: Vec<f32> = (0..rows)
        .flat_map(|row| [f32::from(row), 0.0, 0.0])
        .collect();
    let data = TensorData::new(numbers, [usize::from(rows), width]);
    let table = Tensor::<2>::from_data(data, (&Device::flex(), DType::F32));
    let found = Vocabulary::of(&table);
    // Of 0² + 1² + … + 9000²: n (n + 1) (2n + 1) / 6.
    let squares = 9000.0 * 9001.0 * 18001.0 / 6.0;
    let expected = f64::sqrt(squares / (9001.0 * 3.0));
    assert!((found.root_mean_square / expected - 1.0).abs() < 1e-6);
    assert_eq!(found.median_norm, 4500.0);
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
    let identity = Identity::new(&pipeline, &pairs, &config, None).unwrap();
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
