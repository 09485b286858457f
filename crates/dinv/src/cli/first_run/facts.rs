//! What is known of public models before they are run. Every value has its source.

use serde_json::{Value, json};

use super::report::Check;

/// Where the numbers of parameters and the schedules come from: the classes, built from the public configurations.
pub(super) const CLASSES: &str =
    "diffusers 0.42.1 and transformers 5, classes built from the public configuration";
/// Where the ids come from.
pub(super) const TOKENIZER: &str = "transformers' CLIPTokenizer with OpenAI's vocabulary";
/// Where the quality of the autoencoder comes from.
pub(super) const AUTOENCODER: &str = "model card of stabilityai/sd-vae-ft-mse: 23.4 dB for the original autoencoder, on COCO at 256 px";
/// Where the pixels come from.
pub(super) const PIXELS: &str = "diffusers, tests/pipelines/stable_diffusion/test_stable_diffusion.py at \
                                 0214037434256fea872afaca7ccf4f93656be8c9, test_stable_diffusion_ddim";
/// Why captions should be found.
pub(super) const CAPTIONS: &str =
    "the photographs are unlike each other; CLIP was trained to tell captions";

/// The entries of CLIP's vocabulary.
pub(super) const CLIP_ENTRIES: usize = 49_408;
/// CLIP's ids before and after the words.
pub(super) const CLIP_FRAME: [u32; 2] = [49_406, 49_407];
/// Sentences and the ids of their words in CLIP's vocabulary.
pub(super) const SENTENCES: [(&str, &[u32]); 5] = [
    ("a photo of a cat", &[320, 1125, 539, 320, 2368]),
    (ASTRONAUT, &[320, 8853, 539, 550, 18376, 6765, 320, 4558]),
    (
        "Hello, world! It's 2024.",
        &[3306, 267, 1002, 256, 585, 568, 273, 271, 273, 275, 269],
    ),
    (
        "a café in the snow — naïve façade",
        &[
            320, 15304, 530, 518, 2583, 2005, 1097, 35689, 563, 778, 10067, 1928,
        ],
    ),
    (
        "don't stop; 3.14",
        &[847, 713, 1691, 282, 274, 269, 272, 275],
    ),
];

/// The prompt of diffusers' own slow tests.
pub(super) const ASTRONAUT: &str = "a photograph of an astronaut riding a horse";
/// The model whose pixels are known, drawn by DDIM in three steps with a guidance scale of 7.5 from the noise of
/// `numpy.random.RandomState(0)`.
pub(super) const PIXELS_OF: &str = "CompVis/stable-diffusion-v1-4";
/// The lower right 3 × 3 pixels of its picture, blue, from 0 to 1.
pub(super) const LAST_PIXELS: [f64; 9] = [
    0.38019, 0.28647, 0.27321, 0.40377, 0.38290, 0.35446, 0.39218, 0.38165, 0.42239,
];
/// The allowed distance of a pixel: eight bits, and sums in another order or half precision.
pub(super) const PIXEL_TOLERANCE: f64 = 0.02;

/// The least mean peak signal-to-noise ratio of photographs that went through the autoencoder, in dB, for pictures of
/// at least [`LEAST_SIDE`] pixels: a deviation below the mean of COCO, whose photographs have more detail.
pub(super) const LEAST_PSNR: f64 = 20.0;
/// The smallest side at which that holds.
pub(super) const LEAST_SIDE: u32 = 256;

/// The numbers of a kind of model.
#[derive(Debug)]
pub(super) struct Facts {
    /// The diffusers class of the pipeline.
    class: &'static str,
    /// The width of its first text encoder.
    width: u64,
    /// The number of parameters of each part.
    parameters: &'static [(&'static str, u64)],
}

/// All kinds of which something is known.
const KINDS: [Facts; 2] = [
    Facts {
        class: "StableDiffusionPipeline",
        width: 768,
        parameters: &[
            ("unet", 859_520_964),
            ("vae", 83_653_863),
            ("text_encoder", 123_060_480),
            ("clip", 427_616_513),
        ],
    },
    Facts {
        class: "StableDiffusionPipeline",
        width: 1024,
        parameters: &[
            ("unet", 865_910_724),
            ("vae", 83_653_863),
            ("text_encoder", 340_387_840),
        ],
    },
];

/// The first, the middle and the last ᾱ of β from 0.00085 to 0.012, linear in their roots, in 1000 steps.
const ALPHAS: [f64; 3] = [0.999_149_98, 0.276_332_47, 0.004_660_10];

impl Facts {
    /// What is known of models of this class with a text encoder of this width.
    pub(super) fn of(class: &str, width: Option<u64>) -> Option<&'static Self> {
        let is_of = |kind: &&Self| kind.class == class && Some(kind.width) == width;
        KINDS.iter().find(is_of)
    }

    /// A check of a part's number of parameters.
    pub(super) fn parameters(facts: Option<&Self>, part: &str, found: u64) -> Check {
        let check = Check::shown(format!("{part}: parameters"), found);
        let known = facts.and_then(|facts| facts.parameters.iter().find(|(name, _)| *name == part));
        match known {
            Some(&(_, expected)) => check.against(expected, found == expected, CLASSES),
            None => check,
        }
    }

    /// A check of the schedule.
    pub(super) fn alphas(facts: Option<&Self>, alphas: &[f64]) -> Option<Check> {
        let found = [*alphas.first()?, alphas[alphas.len() / 2], *alphas.last()?];
        let check = Check::shown("schedule: first, middle and last ᾱ", rounded(&found, 8));
        Some(match facts {
            Some(_) => {
                let near = found
                    .iter()
                    .zip(ALPHAS)
                    .all(|(x, y)| (x / y - 1.0).abs() < 1e-4);
                check.against(json!(ALPHAS), near, CLASSES)
            }
            None => check,
        })
    }
}

/// Values rounded for people.
pub(super) fn rounded(values: &[f64], digits: i32) -> Value {
    let unit = 10_f64.powi(digits);
    let values = values.iter().map(|value| (value * unit).round() / unit);
    json!(values.collect::<Vec<f64>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_known_is_expected() {
        let facts = Facts::of("StableDiffusionPipeline", Some(768));
        let right = Facts::parameters(facts, "unet", 859_520_964);
        assert_eq!(
            (right.ok, right.expected),
            (Some(true), Some(json!(859_520_964_u64)))
        );
        assert_eq!(
            Facts::parameters(facts, "unet", 859_520_963).ok,
            Some(false)
        );
        assert_eq!(Facts::parameters(facts, "captioner", 1).ok, None);
        assert!(Facts::of("StableDiffusionPipeline", Some(32)).is_none());
        assert!(Facts::of("FluxPipeline", Some(768)).is_none());
    }

    #[test]
    fn a_schedule_is_told_from_another() {
        let facts = Facts::of("StableDiffusionPipeline", Some(1024));
        let schedule = |power: f64| {
            let root = |i: i32| {
                let share = f64::from(i) / 999.0;
                0.00085_f64.powf(power) * (1.0 - share) + 0.012_f64.powf(power) * share
            };
            let mut alpha = 1.0;
            let alphas = (0..1000).map(|i| {
                alpha *= 1.0 - root(i).powf(1.0 / power);
                alpha
            });
            alphas.collect::<Vec<f64>>()
        };
        let ok = |alphas: &[f64]| Facts::alphas(facts, alphas).unwrap().ok;
        assert_eq!(ok(&schedule(0.5)), Some(true));
        assert_eq!(ok(&schedule(1.0)), Some(false));
        assert_eq!(Facts::alphas(None, &schedule(1.0)).unwrap().ok, None);
        assert!(Facts::alphas(facts, &[]).is_none());
    }
}
