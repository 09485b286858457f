//! Finds the weight files of a model in its folder.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::util::foreign::REFUSAL;
use crate::weights::json::read_config;
use crate::{Error, Result};

/// File stems under which diffusers and transformers save the weights of one model, in search order; the
/// last one is that of early safetensors converted from pickled shards.
pub(crate) const STEMS: [&str; 3] = ["diffusion_pytorch_model", "model", "pytorch_model"];

/// Extensions of pickled files. Reading one can run the code in it.
const PICKLED: [&str; 4] = ["bin", "ckpt", "pt", "pth"];

/// The weight files of one model, and the file of each tensor according to its index.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) files: Vec<PathBuf>,
    /// The index file and its contents, if the weights are in shards.
    pub(crate) index: Option<(PathBuf, BTreeMap<String, String>)>,
}

/// The suffixes of weight files in search order. A variant is a suffix such as `fp16`, which comes first if
/// it is requested; files without a suffix are usually f32.
pub(crate) fn suffixes(variant: Option<&str>) -> [String; 2] {
    match variant {
        None => [String::new(), ".fp16".to_owned()],
        Some(variant) => [format!(".{variant}"), String::new()],
    }
}

/// Finds the safetensors files of the model in `folder`: those of the `variant`, or, as in diffusers, those
/// without one in their name if it is missing. Without a `variant`, those of `fp16` are used if there are
/// no others.
pub(crate) fn find_files(folder: &Path, variant: Option<&str>) -> Result<Found> {
    let suffixes = suffixes(variant);
    for suffix in &suffixes {
        if let Some(found) = find_with(folder, suffix) {
            return found;
        }
    }
    std::fs::read_dir(folder).map_err(Error::io(folder))?;
    let stems = STEMS.map(|stem| format!("{stem}{}.safetensors", suffixes[0]));
    let mut reason = format!("no model weights: expected {}", stems.join(" or "));
    let pickled = ["diffusion_pytorch_model.bin", "pytorch_model.bin"];
    if let Some(name) = pickled.iter().find(|name| folder.join(name).is_file()) {
        reason.push_str(&format!("; {name}: {REFUSAL}"));
    }
    Err(Error::invalid_file(folder, reason))
}

/// Whether the weights of the model in `folder` exist in this `variant`.
pub(crate) fn has_variant(folder: &Path, variant: &str) -> bool {
    find_with(folder, &format!(".{variant}")).is_some()
}

/// The weights with a suffix in their name: one file, or shards. If there are both, diffusers reads the
/// shards of its own models, and transformers the single file of its own.
fn find_with(folder: &Path, suffix: &str) -> Option<Result<Found>> {
    stems(folder).into_iter().find_map(|stem| {
        let single = || {
            let single = folder.join(format!("{stem}{suffix}.safetensors"));
            let found = || Found {
                files: vec![single.clone()],
                index: None,
            };
            single.is_file().then(|| Ok(found()))
        };
        let shards = || {
            let index = folder.join(format!("{stem}.safetensors.index{suffix}.json"));
            index.is_file().then(|| find_shards(index))
        };
        match shards_come_first(stem) {
            true => shards().or_else(single),
            false => single().or_else(shards),
        }
    })
}

/// Whether the shards of a stem are read if there is also a single file.
pub(crate) fn shards_come_first(stem: &str) -> bool {
    stem == STEMS[0]
}

/// The stems in search order for a folder: first those of the program that wrote its
/// `config.json`.
fn stems(folder: &Path) -> [&'static str; 3] {
    let [diffusers, transformers, old] = STEMS;
    let config: Option<serde_json::Value> = read_config(&folder.join("config.json")).ok();
    let is_of_transformers = config.is_some_and(|config| {
        config.get("_class_name").is_none() && config.get("architectures").is_some()
    });
    match is_of_transformers {
        true => [transformers, old, diffusers],
        false => STEMS,
    }
}

/// The shards that an index file names.
fn find_shards(index: PathBuf) -> Result<Found> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let Index { weight_map } = read_config(&index)?;
    let names: BTreeSet<&String> = weight_map.values().collect();
    let files = names
        .into_iter()
        .map(|name| {
            let shard = index.with_file_name(name);
            if Path::new(name).file_name() != Some(name.as_ref()) || !shard.is_file() {
                let reason = format!("names a shard `{name}` that is not in the folder");
                return Err(Error::invalid_file(&index, reason));
            }
            Ok(shard)
        })
        .collect::<Result<_>>()?;
    Ok(Found {
        files,
        index: Some((index, weight_map)),
    })
}

/// Refuses files whose extension shows that they are pickled.
pub(crate) fn refuse_pickled(path: &Path) -> Result<()> {
    let extension = path.extension().unwrap_or_default();
    match PICKLED
        .iter()
        .any(|name| extension.eq_ignore_ascii_case(name))
    {
        true => Err(Error::invalid_file(path, REFUSAL)),
        false => Ok(()),
    }
}
