//! A GPU against the CPU: every layer, forward and backward, and learning and drawing with the tiny
//! pipeline give the same numbers.
//!
//! Needs the feature `webgpu`. A machine without a GPU runs the tests on Mesa's software Vulkan (Debian's
//! `mesa-vulkan-drivers`); without any Vulkan they are skipped. `DINV_TEST_DEVICE=vulkan` selects Vulkan's own shaders
//! if that feature is also built in; `DINV_TEST_GOLDEN` names `tests/golden` if it was moved.

use std::ops::ControlFlow;
use std::path::Path;

use burn::tensor::{DType, Device, DeviceType, FloatDType, Tensor};
use difference_inversion::diffusion::draw::{InitNoise, TextToImage};
use difference_inversion::diffusion::frozen::{ModelPaths, Models};
use difference_inversion::image::load_image;
use difference_inversion::method::analogy::{self, Example};
use difference_inversion::method::generate;
use difference_inversion::method::generate::Inputs;
use difference_inversion::method::generate_config::AnalogyConfig;
use difference_inversion::method::learn::{LearnConfig, Records};
use difference_inversion::models::denoiser::Memory;
use difference_inversion::models::feature_map::{Conv2d, GroupNorm, resize_nearest};
use difference_inversion::models::layers::{
    Activation, LayerNorm, Linear, Mask, gated_gelu, multi_head_attention,
};
use difference_inversion::util::arrays::Arrays;
use difference_inversion::util::progress::Progress;
use difference_inversion::weights::Weights;
use safetensors::tensor::{Dtype, TensorView};

/// The largest Euclidean distance of the GPU's results from the CPU's, relative to the norm of the
/// latter. Single values of learned tokens may differ more: AdamW's first steps have the same length for
/// all gradients, even those close to zero, whose sign depends on rounding.
const TOLERANCE: f32 = 1e-3;
/// The same if the GPU computes in half precision, with ten fractional bits.
const HALF_TOLERANCE: f32 = 1e-2;

fn golden_model(name: &str) -> std::path::PathBuf {
    let here = || Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join("tests/golden");
    let folder = std::env::var_os("DINV_TEST_GOLDEN").map_or_else(here, Into::into);
    folder.join(name)
}

fn golden(name: &str) -> std::path::PathBuf {
    golden_model("learning").join(name)
}

fn silent(_: &Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// The elements of a tensor of either device.
fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

fn models(device: &Device, dtype: FloatDType, memory: Memory) -> Models {
    let mut paths = ModelPaths {
        model: golden(""),
        ..ModelPaths::default()
    };
    paths.options.memory = memory;
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

/// Whether there is no device to test on. If `DINV_TEST_DEVICE` names one, its absence is a failure.
fn is_missing() -> bool {
    let missing = std::env::var_os("DINV_TEST_DEVICE").is_none()
        && Device::enumerate(DeviceType::Wgpu).is_empty();
    if missing {
        println!("skipped: no Vulkan, Metal or DirectX 12 on this machine");
    }
    missing
}

/// The GPU, or a software renderer.
fn gpu() -> Device {
    match std::env::var("DINV_TEST_DEVICE").as_deref() {
        Err(_) | Ok("webgpu") => Device::wgpu(Default::default()),
        #[cfg(feature = "vulkan")]
        Ok("vulkan") => Device::vulkan(Default::default()),
        Ok(other) => panic!("DINV_TEST_DEVICE: no device `{other}` in this build"),
    }
}

#[test]
fn learning_gives_the_tokens_of_the_cpu() {
    if is_missing() {
        return;
    }
    let replayed = LearnConfig {
        num_tokens: 3,
        steps: 3,
        clip_first: 0,
        clip_thinned: 0,
        learning_rate: Some(1e-2),
        lambda_clip: 0.1,
        max_norm: None,
        samples_per_step: 2,
        ..LearnConfig::default()
    };
    let by_default = LearnConfig {
        clip_first: 2,
        clip_thinned: 1,
        learning_rate: None,
        max_norm: Some(2.0),
        ..replayed.clone()
    };
    let learn = |device: &Device, dtype, memory, learn: &LearnConfig| {
        let models = models(device, dtype, memory);
        let example = Example {
            a: load_image(&golden("a.png")).unwrap(),
            a_prime: load_image(&golden("a_prime.png")).unwrap(),
            caption_a: Some("a red house".to_owned()),
            caption_a_prime: Some("a blue house at night".to_owned()),
        };
        let config = AnalogyConfig {
            learn: learn.clone(),
            ..AnalogyConfig::default()
        };
        let records = Records {
            replay: Some(golden("trace.safetensors")),
            ..Records::default()
        };
        let learned = analogy::learn(&models, &[example], &config, &records, &mut silent).unwrap();
        values(learned.tokens.embeddings()[0].clone())
    };
    let cpu = |config| learn(&Device::flex(), FloatDType::F32, Memory::Normal, config);
    let expected = cpu(&replayed);
    let on_gpu = |dtype, memory| learn(&gpu(), dtype, memory, &replayed);
    let same = |what, memory| assert_same(what, &expected, &on_gpu(FloatDType::F32, memory));
    same("tokens", Memory::Normal);
    same("tokens, --memory low", Memory::Low);
    for memory in [Memory::Normal, Memory::Low] {
        let half = on_gpu(FloatDType::F16, memory);
        assert_within(HALF_TOLERANCE, "tokens in f16", &expected, &half);
    }
    let found = learn(&gpu(), FloatDType::F32, Memory::Normal, &by_default);
    assert_same("tokens, led by the CLIP loss", &cpu(&by_default), &found);
}

/// Half-precision numbers between −1 and 1, the same on every device.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f32::from(i16::try_from(state >> 22).unwrap() - 512) / 512.0
    };
    (0..count).map(|_| next()).collect()
}

/// Weights of the given names and shapes, small enough that sums stay near 1.
fn weights(tensors: &[(&str, &[usize])], device: &Device, dtype: FloatDType) -> Weights {
    let bytes: Vec<Vec<u8>> = (tensors.iter().zip(1..))
        .map(|((_, shape), seed)| {
            let fan_in = shape[1..].iter().product::<usize>();
            let scale = (fan_in as f32).sqrt().recip();
            let values = numbers(shape.iter().product(), seed);
            values
                .iter()
                .flat_map(|x| (x * scale).to_le_bytes())
                .collect()
        })
        .collect();
    let views = (tensors.iter().zip(&bytes)).map(|((name, shape), bytes)| {
        (
            *name,
            TensorView::new(Dtype::F32, shape.to_vec(), bytes).unwrap(),
        )
    });
    let file = safetensors::serialize(views, None).unwrap();
    Weights::from_bytes(file, "weights", device, dtype).unwrap()
}

/// Compares a layer on the GPU, and the gradients of its inputs, with the CPU in f32.
struct Layers {
    dtype: FloatDType,
    tolerance: f32,
}

impl Layers {
    fn check<const N: usize, const D: usize, const R: usize, L>(
        &self,
        what: &str,
        shapes: [[usize; D]; N],
        load: impl Fn(&Device, FloatDType) -> L,
        forward: impl Fn(&L, [Tensor<D>; N]) -> Tensor<R>,
    ) {
        let run = |device: &Device, dtype: FloatDType| {
            let layer = load(device, dtype);
            let mut seed = 100;
            let leaves = shapes.map(|shape| {
                seed += 1;
                let values = numbers(shape.iter().product(), seed);
                let x = Tensor::<1>::from_floats(values.as_slice(), device).reshape(shape);
                x.cast(dtype).autodiff().require_grad()
            });
            let y = forward(&layer, leaves.clone());
            let grad = numbers(y.shape().num_elements(), 99);
            let grad = Tensor::<1>::from_floats(grad.as_slice(), device).reshape(y.dims());
            let grads = (y.clone().cast(DType::F32) * grad).sum().backward();
            let grads = leaves.each_ref().map(|x| values(x.grad(&grads).unwrap()));
            (values(y.inner()), grads)
        };
        let (y, grads) = run(&Device::flex(), FloatDType::F32);
        let (found, found_grads) = run(&gpu(), self.dtype);
        let what = format!("{what} in {:?}", self.dtype);
        assert_within(self.tolerance, &what, &y, &found);
        for (i, (expected, found)) in grads.iter().zip(&found_grads).enumerate() {
            let what = format!("{what}, gradient {i}");
            assert_within(self.tolerance, &what, expected, found);
        }
    }

    fn convolution(&self, [c_in, c_out]: [usize; 2], size: [usize; 2], kernel: [usize; 3]) {
        let [side, stride, padding] = kernel;
        let load = |device: &Device, dtype| {
            let shape = [c_out, c_in, side, side];
            let weights = weights(&[("weight", &shape), ("bias", &[c_out])], device, dtype);
            Conv2d::load(&weights, [c_in, c_out], side, stride, padding).unwrap()
        };
        let what = format!("convolution {c_in} → {c_out}, {size:?}, {kernel:?}");
        self.check(&what, [[2, size[0], size[1], c_in]], load, |conv, [x]| {
            conv.forward_channels_last(x)
        });
        if padding == 0 && stride == 2 {
            let half = size.map(|size| size / 2);
            self.check(&what, [[2, size[0], size[1], c_in]], load, |conv, [x]| {
                conv.forward_to(x, half)
            });
        }
    }

    fn attention(&self, heads: usize, [n, m, c]: [usize; 3], mask: &Mask) {
        let what = format!("attention {heads}, [{n}, {m}, {c}], {mask:?}");
        let shapes = [[1, n, c], [1, m, c], [1, m, c]];
        self.check(
            &what,
            shapes,
            |_, _| (),
            |(), [q, k, v]| multi_head_attention(q * 3.0, k, v, heads, mask.clone()),
        );
    }
}

#[test]
fn layers_give_the_numbers_of_the_cpu() {
    if is_missing() {
        return;
    }
    let types = [(FloatDType::F32, 1e-5), (FloatDType::F16, 3e-3)];
    let same = [3, 1, 1];
    for (dtype, tolerance) in types {
        let layers = Layers { dtype, tolerance };
        for [d_in, d_out] in [[40, 24], [64, 128], [320, 64]] {
            let load = |device: &Device, dtype| {
                let shapes: [(&str, &[usize]); 2] =
                    [("weight", &[d_out, d_in]), ("bias", &[d_out])];
                Linear::load(&weights(&shapes, device, dtype), d_in, d_out).unwrap()
            };
            let what = format!("linear {d_in} → {d_out}");
            layers.check(&what, [[2, 77, d_in]], load, |linear, [x]| {
                linear.forward(x)
            });
            layers.check(&what, [[64, d_in]], load, |linear, [x]| linear.forward(x));
        }
        layers.convolution([64, 96], [16, 16], same);
        layers.convolution([32, 48], [9, 7], same);
        layers.convolution([5, 6], [8, 9], same);
        layers.convolution([16, 24], [8, 9], [3, 2, 1]);
        layers.convolution([16, 16], [8, 10], [3, 2, 0]);
        layers.convolution([16, 32], [8, 8], [4, 4, 0]);
        layers.convolution([12, 16], [5, 6], [1, 1, 0]);
        let norm: [(&str, &[usize]); 2] = [("weight", &[48]), ("bias", &[48])];
        let group_norm = |device: &Device, dtype| {
            GroupNorm::load(&weights(&norm, device, dtype), 4, 48, 1e-5).unwrap()
        };
        // Parts of the positions, the last one smaller; a single one.
        for shape in [[2, 11, 13, 48], [1, 1, 1, 48]] {
            layers.check("group norm", [shape], group_norm, |norm, [x]| {
                norm.forward(x + 3.0)
            });
            layers.check("group norm, SiLU", [shape], group_norm, |norm, [x]| {
                norm.forward_act(x, Activation::Silu)
            });
        }
        let layer_norm = |device: &Device, dtype| {
            LayerNorm::load(&weights(&norm, device, dtype), 48, 1e-5).unwrap()
        };
        layers.check("layer norm", [[2, 5, 48]], layer_norm, |norm, [x]| {
            norm.forward(x)
        });
        for function in [
            Activation::Silu,
            Activation::QuickGelu,
            Activation::Gelu,
            Activation::GeluTanh,
        ] {
            let what = format!("{function:?}");
            layers.check(
                &what,
                [[3, 700]],
                |_, _| (),
                |(), [x]| function.forward(x * 4.0),
            );
        }
        layers.check(
            "gate",
            [[2, 5, 34]],
            |_, _| (),
            |(), [x]| gated_gelu(x * 3.0),
        );
        for size in [[6, 8], [5, 7], [3, 9], [2, 3]] {
            layers.check(
                "resizing",
                [[2, 3, 4, 5]],
                |_, _| (),
                |(), [x]| resize_nearest(x, size),
            );
        }
        for mask in [Mask::None, Mask::Causal, Mask::CausalAfter([2].into())] {
            layers.attention(3, [33, 70, 24], &mask);
            layers.attention(2, [64, 64, 128], &mask);
            layers.attention(1, [5, 5, 40], &mask);
        }
    }
    // More scores and more neighbourhoods than are held at once.
    let layers = Layers {
        dtype: FloatDType::F32,
        tolerance: 1e-4,
    };
    layers.convolution([144, 4], [165, 165], same);
    layers.attention(1, [8200, 8200, 4], &Mask::Causal);
}

/// Computations that would overflow outside f32: LayerNorm's squares, attention scores before scaling, the
/// cubes in GELU's gradient.
#[test]
fn half_precision_does_not_overflow() {
    if is_missing() {
        return;
    }
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
    if is_missing() {
        return;
    }
    let noise = Arrays::read(&golden("trace.safetensors")).unwrap();
    let draw = |device: &Device, dtype| {
        let models = models(device, dtype, Memory::Normal);
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
            guidance_scale: Some(3.0),
            ..TextToImage::default()
        };
        let inputs = Inputs {
            init: Some(init),
            ..Inputs::default()
        };
        values(generate::generate_latents(&models, &request, inputs, &mut silent).unwrap())
    };
    let cpu = draw(&Device::flex(), FloatDType::F32);
    assert_same("latents", &cpu, &draw(&gpu(), FloatDType::F32));
    let half = draw(&gpu(), FloatDType::F16);
    assert_within(HALF_TOLERANCE, "latents in f16", &cpu, &half);
}

/// Beside a denoiser in f16, T5 and Qwen3 are held in f16, as the tiny ones are stored, and compute in f32: the
/// numbers are those of the CPU, forward and backward, more exactly than f16 could state them.
#[test]
fn text_encoders_whose_states_overflow_in_f16_compute_in_f32() {
    if is_missing() {
        return;
    }
    for (model, number) in [("sd3", 2), ("klein", 0), ("z_image", 0)] {
        let read = |device: &Device, dtype| {
            let mut paths = ModelPaths {
                model: golden_model(model),
                ..ModelPaths::default()
            };
            paths.options.resolution = Some([16, 16]);
            let models = Models::open(&paths, device, dtype).unwrap();
            let pipeline = models.pipeline();
            let encoder = &pipeline.text_encoders()[number];
            let ids = pipeline.prompt("a red house").unwrap().ids(number);
            let (beginning, _) = encoder.read(&ids, 2).unwrap();
            let d = encoder.hidden_size();
            let tokens = Tensor::<1>::from_floats(numbers(2 * d, 5).as_slice(), device);
            let tokens = tokens.reshape([2, d]).autodiff().require_grad();
            let states = encoder.finish(&beginning, Some(&tokens)).unwrap();
            let states = states.last_hidden_state;
            assert_eq!(states.dtype(), DType::F32, "{model}");
            let weights = numbers(states.shape().num_elements(), 6);
            let weights = Tensor::<1>::from_floats(weights.as_slice(), device);
            let grads = (states.clone() * weights.reshape(states.dims())).sum();
            let grads = tokens.grad(&grads.backward()).unwrap();
            (values(states.inner()), values(grads))
        };
        let (cpu, gpu) = (
            read(&Device::flex(), FloatDType::F32),
            read(&gpu(), FloatDType::F16),
        );
        assert_within(1e-4, model, &cpu.0, &gpu.0);
        assert_within(1e-4, model, &cpu.1, &gpu.1);
    }
}
