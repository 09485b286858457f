//! Words and pictures from outside the demo model's world.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use difference_inversion::Error;
use difference_inversion::diffusion::pipeline::Pipeline;
use difference_inversion::image::fit;
use difference_inversion::weights::read_config;
use dinv_eval::metrics::mse;
use image::RgbImage;
use serde::Deserialize;
use serde_json::Value;

use super::flags::ModelSettings;
use super::pictures::Picture;

/// The demo model's vocabulary, in its folder.
const TOKENIZER: &str = "tokenizer/tokenizer.json";

#[derive(Deserialize)]
struct Tokenizer {
    model: Words,
}

/// Byte pairs; a whole word ends in `</w>`.
#[derive(Deserialize)]
struct Words {
    vocab: BTreeMap<String, Value>,
}

/// How well the demo model's autoencoder keeps pictures of its own world: a PSNR of at least 29.4 dB for 400 pictures
/// of `demo/benchmark/validation`. Six photographs, scaled or cropped to 128 pixels, had 15.5 to 22.1 dB.
const FAMILIAR: f64 = 26.0;

/// A note about pictures that the demo model cannot draw; for other models, none. Its autoencoder was trained on its
/// world only and loses everything else.
///
/// # Errors
/// As [`Pipeline::decode`].
pub(crate) fn of_pictures<'a>(
    settings: &ModelSettings,
    pipeline: &Pipeline,
    pictures: impl IntoIterator<Item = (&'a Path, &'a RgbImage)>,
) -> Result<Option<String>, Error> {
    if !settings.is_demo() {
        return Ok(None);
    }
    let mut strange = Vec::new();
    for (path, picture) in pictures {
        let kept = pipeline.decode(pipeline.encode_image(picture))?;
        let [height, width] = pipeline.resolution();
        let psnr = -10.0 * mse(&fit(picture, width, height), &kept).log10(); // in dB
        if psnr < FAMILIAR {
            strange.push(path.display().to_string());
        }
    }
    Ok((!strange.is_empty()).then(|| {
        format!(
            "{} {} nothing like the little landscapes that the demo model knows; photographs need another `--model`, \
             such as sd15 (`dinv models list`)",
            strange.join(", "),
            if strange.len() == 1 { "is" } else { "are" },
        )
    }))
}

/// The note about the first of many pictures.
///
/// # Errors
/// As [`of_pictures`], and if the picture cannot be read.
pub(crate) fn of_first(
    settings: &ModelSettings,
    pipeline: &Pipeline,
    pictures: &[Picture<'_>],
) -> Result<Option<String>, Error> {
    match pictures.first() {
        Some(first) if settings.is_demo() => {
            of_pictures(settings, pipeline, [(first.path, &first.read()?)])
        }
        _ => Ok(None),
    }
}

/// A note about words of prompts and captions that the demo model has not seen; `None` for other models. Its
/// vocabulary was built from its captions, so every word of its world is one entry.
pub(crate) fn of_words<'a>(
    settings: &ModelSettings,
    model: &Path,
    texts: impl IntoIterator<Item = &'a str>,
) -> Option<String> {
    let tokenizer = settings.is_demo().then(|| model.join(TOKENIZER))?;
    let known: Tokenizer = read_config(&tokenizer).ok()?;
    let unknown = unknown(&known.model.vocab, texts);
    if unknown.is_empty() {
        return None;
    }
    let words: Vec<String> = unknown.iter().map(|word| format!("`{word}`")).collect();
    Some(format!(
        "the demo model has never seen {}; it knows house, castle, tree, palm, cactus and boat in five colours, on grass, \
         sand, snow or water, by day, at sunset, at night or in a storm (docs/guide/first-picture.md)",
        words.join(", ")
    ))
}

/// Words of three or more letters that are not in the vocabulary, in lower case.
fn unknown<'a>(
    vocabulary: &BTreeMap<String, Value>,
    texts: impl IntoIterator<Item = &'a str>,
) -> BTreeSet<String> {
    let words = texts.into_iter().flat_map(|text| {
        let words = text.split(|c: char| !c.is_alphabetic());
        words.map(str::to_lowercase).collect::<Vec<_>>()
    });
    words
        .filter(|word| word.chars().count() > 2)
        .filter(|word| !vocabulary.contains_key(&format!("{word}</w>")))
        .collect()
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, FloatDType};
    use difference_inversion::diffusion::model_files::{FileOptions, ModelFiles};
    use difference_inversion::image::load_image;

    use super::*;
    use crate::cli::locate::demo_model;

    #[test]
    fn pictures_outside_the_demo_world_are_named() {
        let model = demo_model().unwrap();
        let files = ModelFiles::open(&model, &FileOptions::default()).unwrap();
        let pipeline = Pipeline::open(&files, &Device::flex(), FloatDType::F32).unwrap();
        let told = |name: Option<&str>, file: &str| {
            let path = model.join("../..").join(file);
            let picture = load_image(&path).unwrap();
            let settings = ModelSettings {
                model: name.map(Into::into),
                ..ModelSettings::default()
            };
            of_pictures(&settings, &pipeline, [(path.as_path(), &picture)]).unwrap()
        };
        let screenshot = "docs/images/page.png";
        let note = told(None, screenshot).unwrap();
        assert!(note.contains("page.png is nothing like"), "{note}");
        assert!(note.contains("sd15"), "{note}");
        assert_eq!(told(Some("sd15"), screenshot), None);
        for picture in ["demo/images/a.png", "demo/benchmark/validation/080/a.png"] {
            assert_eq!(told(Some("demo"), picture), None);
        }
    }

    fn told(model: Option<&str>, text: &str) -> Option<String> {
        let settings = ModelSettings {
            model: model.map(Into::into),
            ..ModelSettings::default()
        };
        of_words(&settings, &demo_model().unwrap(), [text])
    }

    #[test]
    fn words_outside_the_demo_world_are_named() {
        let note = told(None, "a photo of a red House by a volcano").unwrap();
        assert!(note.contains("seen `photo`, `volcano`;"), "{note}");
        for known in [
            "a large red castle in the middle on grass by day with a clear sky, flat illustration",
            "small purple boat, on water, at night with a moon, pixel art",
        ] {
            assert_eq!(told(Some("demo"), known), None);
        }
        assert_eq!(told(Some("sd15"), "a volcano"), None);
    }
}
