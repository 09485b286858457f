//! Finding the weight files of a model in its folder.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::weights::json::read_config;
use crate::{Error, Result};

/// File stems under which diffusers and transformers save the weights of one model, in the order
/// in which they are looked for; the last one is of early safetensors made from pickled shards.
pub(crate) const STEMS: [&str; 3] = ["diffusion_pytorch_model", "model", "pytorch_model"];

/// What the names of pickled files end with. Reading one means running what is in it.
const PICKLED: [&str; 4] = ["bin", "ckpt", "pt", "pth"];

/// The weight files of one model, and which of them its index says that each tensor is in.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) files: Vec<PathBuf>,
    /// The index file and its contents, where the weights are in shards.
    pub(crate) index: Option<(PathBuf, BTreeMap<String, String>)>,
}

/// The suffixes of weight files in the order in which they are looked for. A variant is a suffix such
/// as `fp16`, which comes first if it is asked for; files without a suffix are, as a rule, f32.
pub(crate) fn suffixes(variant: Option<&str>) -> [String; 2] {
    match variant {
        None => [String::new(), ".fp16".to_owned()],
        Some(variant) => [format!(".{variant}"), String::new()],
    }
}

/// Finds the safetensors files of the model in `folder`: those of the `variant`, or, as diffusers does,
/// those without one in their name if it is not there. Without a `variant`, those of `fp16` are taken
/// where there are no others.
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

/// Whether the weights of the model in `folder` are there as this `variant`.
pub(crate) fn has_variant(folder: &Path, variant: &str) -> bool {
    find_with(folder, &format!(".{variant}")).is_some()
}

/// The weights with a suffix in their name: one file, or shards.
fn find_with(folder: &Path, suffix: &str) -> Option<Result<Found>> {
    STEMS.into_iter().find_map(|stem| {
        let single = folder.join(format!("{stem}{suffix}.safetensors"));
        if single.is_file() {
            return Some(Ok(Found {
                files: vec![single],
                index: None,
            }));
        }
        let index = folder.join(format!("{stem}.safetensors.index{suffix}.json"));
        index.is_file().then(|| find_shards(index))
    })
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

/// Why pickled files are not read, and what to do about it.
const REFUSAL: &str = "a pickled file is not read, because reading one can run any code; \
    convert it to safetensors, in Python for instance by \
    `safetensors.torch.save_file(torch.load(\"FILE\", weights_only=True), \"FILE.safetensors\")`, \
    of a `.ckpt` its [\"state_dict\"]";

/// Refuses files whose name says that they are pickled.
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
