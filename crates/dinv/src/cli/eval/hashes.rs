//! SHA-256 of the files that determine the results of a run.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, FloatDType};
use difference_inversion::diffusion::frozen::ModelPaths;
use difference_inversion::models::captioner::CaptionerPlace;
use difference_inversion::util::digest::{sha256, sha256_of_file};
use difference_inversion::weights::Weights;
use dinv_eval::EvalModelPaths;
use dinv_eval::MeasurePaths;

use super::super::record::{folders_beside, named_files, numbered, sha256_once, weight_files};
use super::super::settings::RECOMMENDED;

/// The network of CLIP, with whose name those of its files begin.
const CLIP: &str = "clip";

/// The hashes of the files of every model, by role and network.
pub(super) fn of_models(
    paths: &EvalModelPaths,
) -> anyhow::Result<BTreeMap<String, BTreeMap<String, String>>> {
    let (mut hashes, mut known) = (BTreeMap::new(), BTreeMap::new());
    for (role, paths) in paths.by_role() {
        let mut files = BTreeMap::new();
        for (network, file) in weight_files(paths)? {
            files.insert(network, sha256_once(&mut known, &file)?);
        }
        if let CaptionerPlace::Server(served) = paths.captioner_place() {
            files.insert("captioner".to_owned(), served.address().to_string());
        }
        files.extend(of_configurations(paths)?);
        hashes.insert(role.to_owned(), files);
    }
    Ok(hashes)
}

/// The hashes of the files of text of a model, its joint spaces and its captioner, each of which may be within the
/// model's folder: configurations, schedules, vocabularies, preprocessors.
fn of_configurations(paths: &ModelPaths) -> anyhow::Result<Vec<(String, String)>> {
    let others: Vec<(&str, PathBuf)> = folders_beside(paths).collect();
    let is_other = |folder: &PathBuf| others.iter().any(|(_, other)| other == folder);
    let within = |place: &PathBuf| -> Vec<PathBuf> {
        let parts = fs::read_dir(place).into_iter().flatten().flatten();
        let parts = parts.map(|part| part.path()).filter(|part| part.is_dir());
        let parts = parts.filter(|part| !is_other(part));
        std::iter::once(place.clone()).chain(parts).collect()
    };
    let own = [Some(&paths.model), paths.options.tokenizer.as_ref()];
    let own = own.into_iter().flatten().flat_map(within);
    let mut hashes = vec![("configuration".to_owned(), of_texts(own)?)];
    for (name, folder) in &others {
        let name = format!("configuration of {name}");
        hashes.push((name, of_texts([folder.clone()])?));
    }
    Ok(hashes)
}

/// The hash of the files of text in folders.
fn of_texts(folders: impl IntoIterator<Item = PathBuf>) -> anyhow::Result<String> {
    let mut texts = BTreeMap::new();
    for (number, folder) in folders.into_iter().enumerate() {
        let part = folder.file_name().unwrap_or_default().to_string_lossy();
        // The first folder's name is that of the model, which may have moved.
        let part = if number == 0 { "" } else { &part };
        let files = fs::read_dir(&folder).into_iter().flatten().flatten();
        for path in files.map(|file| file.path()).filter(|path| is_text(path)) {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            texts.insert(format!("{part}/{name}"), sha256_of_file(&path)?);
        }
    }
    Ok(sha256(serde_json::to_vec(&texts)?))
}

/// Whether a file of a model is one of text that determines results.
fn is_text(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let is_other = name == RECOMMENDED || name.ends_with(".index.json");
    let end = path.extension().and_then(OsStr::to_str).unwrap_or_default();
    !is_other && path.is_file() && ["json", "model", "txt"].contains(&end)
}

/// The hashes of the networks of metrics. CLIP is by default that of the text-to-image model, whose hashes are `of_model`.
pub(super) fn of_measures(
    paths: &MeasurePaths,
    of_model: &BTreeMap<String, String>,
) -> anyhow::Result<BTreeMap<String, String>> {
    let networks = [
        (CLIP, &paths.clip),
        ("judge", &paths.judge),
        ("dino", &paths.dino),
        ("lpips", &paths.lpips),
    ];
    let mut hashes = BTreeMap::new();
    for (name, path) in networks {
        let Some(path) = path else { continue };
        let weights = Weights::open(path, &Device::flex(), FloatDType::F32)?;
        for (name, file) in named_files(name, &weights) {
            hashes.insert(name, sha256_of_file(&file)?);
        }
    }
    if paths.clip.is_none() {
        let own = of_model.iter().filter(|(file, _)| file.starts_with(CLIP));
        hashes.extend(
            (own.enumerate()).map(|(number, (_, hash))| (numbered(CLIP, number), hash.clone())),
        );
    }
    Ok(hashes)
}
