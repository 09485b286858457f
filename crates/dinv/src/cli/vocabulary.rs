//! Words that the demo model has never seen.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use difference_inversion::diffusion::pipeline::Pipeline;
use difference_inversion::weights::read_config;
use serde::Deserialize;
use serde_json::Value;

use super::flags::ModelSettings;

/// Where the demo model's vocabulary lies in its folder.
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

/// A note about words of prompts and captions that the demo model was never shown; for other models, none. Its
/// vocabulary was made from its captions, so that every word of its world is one entry.
pub(crate) fn note<'a>(
    settings: &ModelSettings,
    model: &Path,
    texts: impl IntoIterator<Item = &'a str>,
) -> Option<String> {
    let tokenizer = settings.is_demo().then(|| model.join(TOKENIZER))?;
    let known: Tokenizer = read_config(&tokenizer).ok()?;
    let unknown = never_seen(&known.model.vocab, texts);
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

/// A note about what is written like a learned word in prompts and captions and is none.
pub(crate) fn unknown<'a>(
    pipeline: &Pipeline,
    texts: impl IntoIterator<Item = &'a str>,
) -> Option<String> {
    let words = texts
        .into_iter()
        .flat_map(|text| pipeline.unknown_words(text));
    let words: BTreeSet<String> = words.map(|word| format!("`{word}`")).collect();
    let names: Vec<String> = words.into_iter().collect();
    (!names.is_empty()).then(|| {
        format!(
            "{} is read as plain text: there is no `--embedding` of this name",
            names.join(", ")
        )
    })
}

/// Words of three letters or more that are no entry of the vocabulary, in lower case.
fn never_seen<'a>(
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
    use super::*;
    use crate::cli::locate::demo_model;

    fn told(model: Option<&str>, text: &str) -> Option<String> {
        let settings = ModelSettings {
            model: model.map(Into::into),
            ..ModelSettings::default()
        };
        note(&settings, &demo_model().unwrap(), [text])
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
