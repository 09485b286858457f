//! The layout of InstructPix2Pix's data set ([Brooks et al. 2023](https://arxiv.org/abs/2211.09800)):
//! `seeds.json` is a list of [folder, [seed, …]]; a folder holds `prompt.json` with the caption
//! before, the instruction and the caption after, and for each seed `{seed}_0.jpg` and
//! `{seed}_1.jpg`, before and after.

use std::path::Path;

use difference_inversion::weights::read_config;
use difference_inversion::{Error, Result};
use serde::Deserialize;
use serde_json::Value;

use super::{Captions, Entries, Entry, NO_KIND, SEEDS};

/// `prompt.json`.
#[derive(Debug, Deserialize)]
struct Prompt {
    #[serde(alias = "caption")]
    input: String,
    edit: String,
    output: String,
}

/// Reads the entries. Two seeds of one prompt show the same edit of two pictures: the first is A and A′,
/// the second B and the true B′. No seed is used twice.
pub(super) fn read(folder: &Path) -> Result<Vec<Entry>> {
    let list = folder.join(SEEDS);
    let prompts: Vec<(String, Vec<Value>)> = read_config(&list)?;
    let mut entries = Entries::of(&list);
    for (number, (name, seeds)) in prompts.iter().enumerate() {
        let number = number + 1;
        let pairs = seeds.chunks_exact(2);
        if pairs.len() == 0 {
            continue;
        }
        // Also checks the folder's name.
        let prompt = entries.picture(number, "prompt.json", &format!("{name}/prompt.json"))?;
        let prompt: Prompt = read_config(&prompt)?;
        for pair in pairs {
            let picture = |seed: &Value, side: usize| {
                let seed = seed_name(seed).ok_or_else(|| {
                    entries.wrong(number, format!("expected a seed, found {seed}"))
                })?;
                let file = format!("{name}/{seed}_{side}.jpg");
                entries.picture(number, "seed", &file)
            };
            let (example, target) = (&pair[0], &pair[1]);
            let captions = Captions {
                a: Some(prompt.input.clone()),
                a_prime: Some(prompt.output.clone()),
                b: Some(prompt.input.clone()),
                b_prime: Some(prompt.output.clone()),
            };
            let seeds = [example, target].map(|seed| seed_name(seed).unwrap_or_default());
            let entry = Entry {
                name: format!("{}-{}", name.replace('/', "-"), seeds.join("-")),
                kind: NO_KIND.to_owned(),
                pictures: [
                    picture(example, 0)?,
                    picture(example, 1)?,
                    picture(target, 0)?,
                ],
                b_prime: Some(picture(target, 1)?),
                captions: Some(captions),
                instruction: Some(prompt.edit.clone()),
                attributes: None,
            };
            entries.push(number, entry)?;
        }
    }
    if entries.entries.is_empty() {
        Err(Error::invalid_file(
            &list,
            "no prompt has two seeds, which an analogy takes",
        ))
    } else {
        Ok(entries.entries)
    }
}

/// A seed as written in file names.
fn seed_name(seed: &Value) -> Option<String> {
    match seed {
        Value::String(seed) => Some(seed.clone()),
        Value::Number(seed) => Some(seed.to_string()),
        _ => None,
    }
}
