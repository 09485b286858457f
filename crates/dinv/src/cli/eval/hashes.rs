//! SHA-256 of the files that determine the results of a run.

use std::collections::BTreeMap;

use burn::tensor::{Device, FloatDType};
use difference_inversion::models::captioner::CaptionerPlace;
use difference_inversion::util::digest::sha256_of_file;
use difference_inversion::weights::Weights;
use dinv_eval::EvalModelPaths;
use dinv_eval::MeasurePaths;

use super::super::record::{named_files, sha256_once, weight_files};

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
        hashes.insert(role.to_owned(), files);
    }
    Ok(hashes)
}

/// The hashes of the networks of metrics.
pub(super) fn of_measures(paths: &MeasurePaths) -> anyhow::Result<BTreeMap<String, String>> {
    let networks = [
        ("clip", &paths.clip),
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
    Ok(hashes)
}
