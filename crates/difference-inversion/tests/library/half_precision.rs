//! Half-precision weights on the CPU, with computation in f32.

use std::path::Path;

use burn::tensor::{Device, FloatDType, Tensor};
use difference_inversion::diffusion::frozen::ModelPaths;
use difference_inversion::diffusion::memory::LearningMemory;
use difference_inversion::diffusion::model_files::{FileOptions, ModelFiles};
use difference_inversion::models::denoiser::Memory;
use difference_inversion::models::denoiser::unet::{UNet2DConditionModel, UNetConfig};
use difference_inversion::models::vae::{
    Autoencoder, AutoencoderKL, AutoencoderKLConfig, decode_in_tiles, mean_in_tiles,
};
use difference_inversion::weights::{Weights, read_config};
use image::imageops::FilterType;

/// The demo model is stored in f16.
fn part(name: &str) -> std::path::PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
        .join("demo/model")
        .join(name)
}

fn assert_equal<const D: usize>(what: &str, found: Tensor<D>, expected: Tensor<D>) {
    let largest = expected.clone().abs().max().into_scalar::<f32>();
    let error = (found - expected).abs().max().into_scalar::<f32>() / largest;
    assert!(error <= 1e-6, "{what}: relative error {error:.1e}");
}

/// Numbers with mean 0 and variance 1.
fn numbers<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    let uniform = |i: usize| (i as f32 * 0.754_877_7).fract() - 0.5;
    let values: Vec<f32> = (0..shape.iter().product())
        .map(|i| uniform(i) * 12.0_f32.sqrt())
        .collect();
    Tensor::<1>::from_floats(values.as_slice(), device).reshape(shape)
}

#[test]
fn stored_halves_give_what_their_values_in_f32_give() {
    let (folder, device) = (part("unet"), Device::flex());
    let config: UNetConfig = read_config(&folder.join("config.json")).unwrap();
    let sample = numbers([2, config.in_channels, 16, 16], &device);
    let context = numbers([2, 8, config.context_dim()], &device);
    let timesteps = Tensor::<1>::from_floats([100.0, 900.0], &device);
    let [half, full] = [FloatDType::F16, FloatDType::F32].map(|dtype| {
        let weights = Weights::open(&folder, &device, dtype).unwrap();
        let unet = UNet2DConditionModel::load(&weights, &config).unwrap();
        let context = context.clone().autodiff().require_grad();
        let output = unet.forward(sample.clone(), timesteps.clone(), context.clone(), None);
        let gradients = output.clone().square().mean().backward();
        (output.inner(), context.grad(&gradients).unwrap())
    });
    assert_equal("prediction", half.0, full.0);
    assert_equal("gradient", half.1, full.1);
}

/// Linear layers in blocks of 8 bits, the rest in f16.
#[test]
fn a_network_in_8_bits_is_smaller_and_predicts_nearly_the_same() {
    let device = Device::flex();
    let config: UNetConfig = read_config(&part("unet/config.json")).unwrap();
    let sample = numbers([2, config.in_channels, 16, 16], &device);
    let context = numbers([2, 8, config.context_dim()], &device);
    let timesteps = Tensor::<1>::from_floats([100.0, 900.0], &device);
    let [packed, half] = [true, false].map(|q8| {
        let options = FileOptions {
            q8,
            ..FileOptions::default()
        };
        let files = ModelFiles::open(&part(""), &options).unwrap();
        let weights = files.weights("unet", &device, FloatDType::F16).unwrap();
        let unet = UNet2DConditionModel::load(&weights, &config).unwrap();
        let context = context.clone().autodiff().require_grad();
        let output = unet.forward(sample.clone(), timesteps.clone(), context.clone(), None);
        let gradients = output.clone().square().mean().backward();
        let gradient = context.grad(&gradients).unwrap();
        // CLIP is not packed: it shares its weights with the joint space.
        let clip = files.weights("text_encoder", &device, FloatDType::F16);
        let bytes = [weights.bytes_in_memory(), clip.unwrap().bytes_in_memory()];
        (bytes, output.inner(), gradient)
    });
    let error = |found: &Tensor<3>, expected: &Tensor<3>| {
        let error = (found.clone() - expected.clone()).square().mean().sqrt();
        let size = expected.clone().square().mean().sqrt();
        error.into_scalar::<f32>() / size.into_scalar::<f32>()
    };
    for (what, found, expected) in [
        ("prediction", packed.1.flatten(2, 3), half.1.flatten(2, 3)),
        ("gradient", packed.2, half.2),
    ] {
        let error = error(&found, &expected);
        assert!((1e-5..0.02).contains(&error), "{what}: {error}");
    }
    let ([unet, clip], [half_unet, half_clip]) = (packed.0, half.0);
    assert!(unet < half_unet && clip == half_clip, "{unet} {half_unet}");
    let paths = ModelPaths {
        model: part(""),
        ..ModelPaths::default()
    };
    let [packed, half] = [true, false].map(|q8| {
        let memory = LearningMemory {
            dtype: FloatDType::F16,
            q8,
            memory: Memory::Normal,
            rows: 2,
            side: None,
            captions: false,
        };
        memory.peak(&paths).unwrap()
    });
    assert_eq!(half - packed, half_unet - unet);
}

#[test]
fn tiles_of_an_enlarged_picture_are_close_to_the_whole() {
    let (folder, device) = (part("vae"), Device::flex());
    let config: AutoencoderKLConfig = read_config(&folder.join("config.json")).unwrap();
    let weights = Weights::open(&folder, &device, FloatDType::F32).unwrap();
    let vae = AutoencoderKL::load(&weights, &config).unwrap();
    let factor = config.downsampling_factor();
    let (height, width) = (64 * factor, 48 * factor);
    // A picture that the autoencoder knows, enlarged.
    let picture = image::open(folder.join("../../images/b.png")).unwrap();
    let size = [width, height].map(|side| u32::try_from(side).unwrap());
    let picture = picture.resize_exact(size[0], size[1], FilterType::CatmullRom);
    let pixels: Vec<f32> = (picture.to_rgb8().into_raw().into_iter())
        .map(|byte| f32::from(byte) / 127.5 - 1.0)
        .collect();
    let image = Tensor::<1>::from_floats(pixels.as_slice(), &device)
        .reshape([1, height, width, 3])
        .permute([0, 3, 1, 2]);
    let whole = vae.encode(image.clone()).mean;
    let error = (mean_in_tiles(&vae, &image) - whole.clone()).abs().mean();
    let spread = whole.clone().square().mean().sqrt();
    let error = error.into_scalar::<f32>() / spread.into_scalar::<f32>();
    assert!(error < 0.1, "latents: mean error {error}");
    let error = (decode_in_tiles(&vae, &whole) - vae.decode(whole))
        .abs()
        .mean();
    let error = error.into_scalar::<f32>();
    assert!(error < 0.05, "picture: mean error {error}");
}
