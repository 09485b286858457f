//! The tiny pipeline on a GPU against the CPU: learning and drawing give the same numbers.
//!
//! Built with the feature `webgpu` alone. A machine without a GPU runs it on Mesa's software Vulkan
//! (Debian's `mesa-vulkan-drivers`).

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::ops::ControlFlow;
use std::path::Path;

use burn::tensor::{DType, Device, FloatDType, Tensor};
use difference_inversion::analogy::{
    self, AnalogyConfig, Example, InitNoise, Inputs, ModelPaths, Models, TextToImage,
};
use difference_inversion::image::load_image;
use difference_inversion::learn::{LearnConfig, Records};
use difference_inversion::models::layers::{Activation, LayerNorm, Mask, multi_head_attention};
use difference_inversion::models::unet::Memory;
use difference_inversion::progress::Progress;
use difference_inversion::weights::{Arrays, Weights};
use safetensors::tensor::{Dtype, TensorView};

/// The largest Euclidean distance of the GPU's results from the CPU's, relative to the norm of the
/// latter. Single numbers of learned tokens may be further off: AdamW's first steps are as long
/// for gradients close to zero, whose sign rounding decides, as for all others.
const TOLERANCE: f32 = 1e-3;
/// The same where the GPU computes in half precision, of ten bits after the point.
const HALF_TOLERANCE: f32 = 1e-2;

fn golden(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/learning")
        .join(name)
}

fn silent(_: &Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// The elements of a tensor of either device.
fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

fn models(device: &Device, dtype: FloatDType) -> Models {
    let paths = ModelPaths {
        model: golden(""),
        ..ModelPaths::default()
    };
    Models::open(&paths, device, dtype).unwrap()
}

#[track_caller]
fn assert_same(what: &str, cpu: &[f32], gpu: &[f32]) {
    assert_within(TOLERANCE, what, cpu, gpu);
}

#[track_caller]
fn assert_within(tolerance: f32, what: &str, cpu: &[f32], gpu: &[f32]) {
    assert_eq!(cpu.len(), gpu.len(), "{what}");
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
    let size = norm(&mut cpu.iter().copied());
    assert!(size > 0.0 && size.is_finite(), "{what}: {size}");
    let error = norm(&mut cpu.iter().zip(gpu).map(|(x, y)| x - y)) / size;
    assert!(error <= tolerance, "{what}: relative error {error:.1e}");
}

/// The GPU, or software that plays one.
fn gpu() -> Device {
    Device::wgpu(Default::default())
}

#[test]
fn learning_gives_the_tokens_of_the_cpu() {
    let learn = |device: &Device, dtype, memory| {
        let models = models(device, dtype).with_memory(memory);
        let example = Example {
            a: load_image(&golden("a.png")).unwrap(),
            a_prime: load_image(&golden("a_prime.png")).unwrap(),
            caption_a: Some("a red house".to_owned()),
            caption_a_prime: Some("a blue house at night".to_owned()),
        };
        let config = AnalogyConfig {
            learn: LearnConfig {
                num_tokens: 3,
                steps: 3,
                learning_rate: 1e-2,
                samples_per_step: 2,
                select_every: 0,
                ..LearnConfig::default()
            },
            ..AnalogyConfig::default()
        };
        let records = Records {
            replay: Some(golden("trace.safetensors")),
            ..Records::default()
        };
        let learned = analogy::learn(&models, &[example], &config, &records, &mut silent).unwrap();
        values(learned.tokens.embeddings()[0].clone())
    };
    let cpu = learn(&Device::flex(), FloatDType::F32, Memory::Normal);
    let same = |what, dtype, memory| assert_same(what, &cpu, &learn(&gpu(), dtype, memory));
    same("tokens", FloatDType::F32, Memory::Normal);
    same("tokens, --memory low", FloatDType::F32, Memory::Low);
    for memory in [Memory::Normal, Memory::Low] {
        let half = learn(&gpu(), FloatDType::F16, memory);
        assert_within(HALF_TOLERANCE, "tokens in f16", &cpu, &half);
    }
}

/// What would overflow if it were not computed in f32: LayerNorm's squares, scores of attention before
/// they are scaled, the cubes in GELU's gradient.
#[test]
fn half_precision_does_not_overflow() {
    let on = |device: &Device, dtype: DType, [rows, columns]: [usize; 2], values: &[f32]| {
        let x = Tensor::<1>::from_floats(values, device).reshape([1, rows, columns]);
        x.cast(DType::F16).cast(dtype)
    };
    let compare = |what: &str, run: &dyn Fn(&Device, DType) -> Tensor<3>| {
        let cpu = values(run(&Device::flex(), DType::F32));
        assert_within(HALF_TOLERANCE, what, &cpu, &values(run(&gpu(), DType::F16)));
    };
    let waves: Vec<f32> = (0..128).map(|i| (i as f32 * 1.7).sin()).collect();
    let mut outlier = waves.clone();
    outlier[3] = 400.0;
    compare("normalised", &|device, dtype| {
        let ones = [1.0_f32; 64].map(f32::to_le_bytes).concat();
        let ones = || TensorView::new(Dtype::F32, vec![64], &ones).unwrap();
        let file = safetensors::serialize([("weight", ones()), ("bias", ones())], None).unwrap();
        let weights = Weights::from_bytes(file, "norm", device, FloatDType::F32).unwrap();
        let norm = LayerNorm::load(&weights, 64, 1e-5).unwrap();
        norm.forward(on(device, dtype, [2, 64], &outlier))
    });
    compare("attention", &|device, dtype| {
        let x = on(device, dtype, [2, 64], &waves);
        let [q, k] = [x.clone() + 40.0, x.clone() * 0.125 + 40.0];
        let [q, k] = [q, k].map(|x| x.cast(DType::F16).cast(dtype));
        multi_head_attention(q, k, x, 1, Mask::None)
    });
    compare("GELU's gradient", &|device, dtype| {
        let x = on(device, dtype, [1, 3], &[-50.0, 0.5, 50.0]);
        let x = x.autodiff().require_grad();
        let grads = Activation::Gelu.forward(x.clone()).sum().backward();
        x.grad(&grads).unwrap()
    });
}

#[test]
fn drawing_gives_the_latents_of_the_cpu() {
    let noise = Arrays::read(&golden("trace.safetensors")).unwrap();
    let draw = |device: &Device, dtype| {
        let models = models(device, dtype);
        let shape = models.pipeline().latent_shape();
        let count = shape.iter().product::<usize>();
        let drawn = (noise.tensor::<5>("noise", device).unwrap()).flatten::<1>(0, 4);
        let init = InitNoise {
            latents: drawn.slice([0..count]).reshape(shape),
            noise: None,
        };
        let request = TextToImage {
            prompt: "a red house".to_owned(),
            num_inference_steps: 5,
            guidance_scale: 3.0,
            ..TextToImage::default()
        };
        let inputs = Inputs {
            init: Some(init),
            ..Inputs::default()
        };
        values(analogy::generate_latents(&models, &request, inputs, &mut silent).unwrap())
    };
    let cpu = draw(&Device::flex(), FloatDType::F32);
    assert_same("latents", &cpu, &draw(&gpu(), FloatDType::F32));
    let half = draw(&gpu(), FloatDType::F16);
    assert_within(HALF_TOLERANCE, "latents in f16", &cpu, &half);
}
