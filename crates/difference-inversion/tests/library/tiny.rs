//! The tiny pipelines of tests/golden, ready for drawing and learning.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, FloatDType, Tensor};
use difference_inversion::Error;
use difference_inversion::diffusion::draw::TextToImage;
use difference_inversion::diffusion::frozen::{ModelPaths, Models};
use difference_inversion::diffusion::model_files::{FileOptions, ModelFiles};
use difference_inversion::diffusion::pipeline::Pipeline;
use difference_inversion::image::{RgbImage, load_image};
use difference_inversion::method::analogy::{self, Example, Target};
use difference_inversion::method::delta::{DeltaMode, Features, delta};
use difference_inversion::method::difference::DifferenceTokens;
use difference_inversion::method::generate_config::{AnalogyConfig, GenerateConfig};
use difference_inversion::method::learn::{LearnConfig, Pair};
use difference_inversion::method::regenerate::{Guidance, Inversion};
use difference_inversion::models::denoiser::Memory;
use difference_inversion::util::progress::Progress;
use difference_inversion::weights::Weights;

use super::common::{assert_matches, read};

pub(crate) const CAPTION_A: &str = "a red house";
pub(crate) const CAPTION_A_PRIME: &str = "a blue house at night";

/// The file or folder `name` under `tests/golden`.
pub(crate) fn golden(name: &str) -> PathBuf {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
    root.join("tests/golden").join(name)
}

/// Largest absolute difference, relative to the largest absolute reference value.
pub(crate) fn relative_error<const D: usize>(found: Tensor<D>, reference: Tensor<D>) -> f32 {
    let largest = reference.clone().abs().max().into_scalar::<f32>();
    (found - reference).abs().max().into_scalar::<f32>() / largest
}

/// Largest difference of a colour value between two pictures of the same size, of 255.
pub(crate) fn furthest(found: &RgbImage, reference: &RgbImage) -> u8 {
    assert_eq!(found.dimensions(), reference.dimensions());
    let pairs = found.as_raw().iter().zip(reference.as_raw());
    pairs.map(|(x, y)| x.abs_diff(*y)).max().unwrap()
}

/// The models of `tests/golden/learning`, in f32 on the CPU.
pub(crate) fn models() -> Models {
    models_in(&golden("learning"))
}

/// The models in `folder`, in f32 on the CPU.
pub(crate) fn models_in(folder: &Path) -> Models {
    let paths = ModelPaths {
        model: folder.to_owned(),
        ..ModelPaths::default()
    };
    Models::open(&paths, &Device::flex(), FloatDType::F32).unwrap()
}

/// The pictures A and A′ of `tests/golden/learning` with their captions.
pub(crate) fn example() -> Example {
    example_in("learning")
}

/// The pictures A and A′ of a golden folder with their captions.
pub(crate) fn example_in(folder: &str) -> Example {
    Example {
        a: load_image(&golden(folder).join("a.png")).unwrap(),
        a_prime: load_image(&golden(folder).join("a_prime.png")).unwrap(),
        caption_a: Some(CAPTION_A.to_owned()),
        caption_a_prime: Some(CAPTION_A_PRIME.to_owned()),
    }
}

/// The pictures of `tests/golden/learning`, prepared for the optimisation.
pub(crate) fn pair(models: &Models, num_tokens: usize) -> Pair {
    pair_of(models, &example(), num_tokens)
}

/// Two pictures, prepared for the optimisation.
pub(crate) fn pair_of(models: &Models, example: &Example, num_tokens: usize) -> Pair {
    let pipeline = models.pipeline();
    let words = |text: &str| {
        let prompt = pipeline.prompt(text).unwrap();
        pipeline.read(&prompt, num_tokens).unwrap()
    };
    let joints = match pipeline.family().has_joint_space() {
        true => models.joints().unwrap(),
        false => &[],
    };
    let deltas = joints.iter().map(|joint| {
        let image = |image| joint.image_features(image).unwrap();
        let text = |text| {
            let prompt = pipeline.prompt(text).unwrap();
            joint.text_features(&prompt).unwrap()
        };
        let image = Features {
            a: image(&example.a),
            a_prime: image(&example.a_prime),
        };
        let text = Features {
            a: text(CAPTION_A),
            a_prime: text(CAPTION_A_PRIME),
        };
        let delta = delta(&image, &text, DeltaMode::Interpolated, 0.8).unwrap();
        delta.direction
    });
    Pair {
        latents_a: pipeline.encode_image(&example.a),
        latents_a_prime: pipeline.encode_image(&example.a_prime),
        prompt_a: words(CAPTION_A),
        prompt_a_prime: words(CAPTION_A_PRIME),
        deltas: deltas.collect(),
    }
}

/// Ignores progress and never asks to stop.
pub(crate) fn silent(_: &Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// The prompt of every golden folder.
pub(crate) const PROMPT: &str = "a blue house by a lake!";

/// That prompt, drawn in this many steps.
pub(crate) fn request(steps: usize, guidance_scale: f64) -> TextToImage {
    TextToImage {
        prompt: PROMPT.to_owned(),
        guidance_scale: Some(guidance_scale),
        num_inference_steps: steps,
        ..TextToImage::default()
    }
}

/// Checks that every inversion and guidance changes a picture with difference tokens, and that edit-friendly inversion
/// restores it at a strength of 0.
pub(crate) fn check_strengths(models: &Models, tokens: &DifferenceTokens, target: &Target) {
    let pipeline = models.pipeline();
    let same = pipeline.decode(pipeline.encode_image(&target.b)).unwrap();
    for inversion in [Inversion::EditFriendly, Inversion::Ddim, Inversion::Sdedit] {
        for guidance in [Guidance::Difference, Guidance::Ordinary] {
            let with = |strength: f64| {
                let mut config = short_analogy();
                config.generate.inversion = inversion;
                config.generate.guidance = guidance;
                config.generate.guidance_scale = None;
                config.generate.num_inference_steps = 8;
                config.generate.strength = strength;
                let applied = analogy::apply(models, tokens, target, &config, &mut silent);
                applied.unwrap().b_prime
            };
            let (nothing, all) = (with(0.0), with(1.0));
            assert_ne!(nothing, all, "{inversion:?} {guidance:?}");
            if (inversion, guidance) == (Inversion::EditFriendly, Guidance::Difference) {
                let worst = furthest(&nothing, &same);
                assert!(worst <= 1, "{worst}");
            }
        }
    }
}

/// Two nonzero difference tokens.
pub(crate) fn waves(models: &Models) -> DifferenceTokens {
    let d = models.pipeline().base().encoders[0].hidden_size;
    let tokens: Vec<f32> = (0..2 * d).map(|i| (i as f32).sin()).collect();
    let tokens = Tensor::<1>::from_floats(tokens.as_slice(), &Device::flex()).reshape([2, d]);
    DifferenceTokens::new(vec![tokens], models.pipeline().base()).unwrap()
}

/// Checks a network's prediction and its gradients by latents and states against the tensors `network.…` of a golden file,
/// with normal and with low memory.
pub(crate) fn check_network(
    io: &Weights,
    forward: impl Fn(Tensor<4>, Tensor<3>, Memory) -> Tensor<4>,
) {
    let latents = || read::<4>(io, "network.latents");
    let states = || read::<3>(io, "network.states");
    let found = forward(latents(), states(), Memory::Normal);
    assert_matches("output", found, read(io, "network.output"));
    for memory in [Memory::Normal, Memory::Low] {
        let latents = latents().autodiff().require_grad();
        let states = states().autodiff().require_grad();
        let output = forward(latents.clone(), states.clone(), memory);
        let gradients = (output * read::<4>(io, "network.towards")).sum().backward();
        let found = states.grad(&gradients).unwrap();
        let expected = read(io, "network.states.grad");
        assert_matches(&format!("states ({memory:?})"), found, expected);
        let found = latents.grad(&gradients).unwrap();
        let expected = read(io, "network.latents.grad");
        assert_matches(&format!("latents ({memory:?})"), found, expected);
    }
}

/// A copy of a golden folder, to be damaged.
pub(crate) fn copy(folder: &str) -> tempfile::TempDir {
    fn copy_folder(from: &Path, to: &Path) {
        fs::create_dir_all(to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let (from, to) = (
                entry.as_ref().unwrap().path(),
                to.join(entry.unwrap().file_name()),
            );
            match from.is_dir() {
                true => copy_folder(&from, &to),
                false => fs::copy(&from, &to).map(|_| ()).unwrap(),
            }
        }
    }
    let copy = tempfile::tempdir().unwrap();
    copy_folder(&golden(folder), copy.path());
    copy
}

/// The error of opening a changed copy of a golden folder.
pub(crate) fn refused(folder: &str, change: impl FnOnce(&Path)) -> String {
    let folder = copy(folder);
    change(folder.path());
    opened(folder.path()).unwrap_err().to_string()
}

/// Replaces a text that a file must contain.
pub(crate) fn edit(path: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.contains(from), "{from} is not in {text}");
    fs::write(path, text.replace(from, to)).unwrap();
}

/// The pipeline of a folder, in f32.
pub(crate) fn opened(folder: &Path) -> Result<Pipeline, Error> {
    opened_in(folder, FloatDType::F32)
}

/// The pipeline of a folder.
pub(crate) fn opened_in(folder: &Path, dtype: FloatDType) -> Result<Pipeline, Error> {
    let files = ModelFiles::open(folder, &FileOptions::default())?;
    Pipeline::open(&files, &Device::flex(), dtype)
}

/// A short analogy.
pub(crate) fn short_analogy() -> AnalogyConfig {
    AnalogyConfig {
        learn: LearnConfig {
            num_tokens: 2,
            steps: 3,
            clip_first: 2,
            learning_rate: Some(1e-3),
            ..LearnConfig::default()
        },
        generate: GenerateConfig {
            num_inference_steps: 4,
            ..GenerateConfig::default()
        },
        ..AnalogyConfig::default()
    }
}
