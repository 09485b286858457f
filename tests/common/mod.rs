//! What the golden tests share: finding, reading and comparing tensors.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a failed unwrap is a failed test"
)]

use std::path::{Path, PathBuf};

use burn::tensor::{Device, FloatDType, Tensor};
use difference_inversion::weights::Weights;

/// Largest difference allowed, relative to the largest reference value.
pub(crate) const TOLERANCE: f32 = 1e-4;

/// The folder or file `name` under `tests/golden`.
pub(crate) fn golden(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
        .join("tests/golden")
        .join(name)
}

/// The tensors at `path`, in f32 on the CPU.
pub(crate) fn open(path: &Path) -> Weights {
    Weights::open(path, &Device::flex(), FloatDType::F32).unwrap()
}

/// Tensor `name`, of whatever shape it has.
pub(crate) fn read<const D: usize>(weights: &Weights, name: &str) -> Tensor<D> {
    let shape = weights.shape(name).unwrap();
    weights.tensor(name, shape.try_into().unwrap()).unwrap()
}

/// Largest absolute difference over the largest absolute reference value.
pub(crate) fn relative_error<const D: usize>(found: Tensor<D>, reference: Tensor<D>) -> f32 {
    assert_eq!(found.dims(), reference.dims());
    let largest = reference.clone().abs().max().into_scalar::<f32>();
    (found - reference).abs().max().into_scalar::<f32>() / largest
}

/// Panics when `found` is further than [`TOLERANCE`] from `reference`.
#[track_caller]
pub(crate) fn assert_matches<const D: usize>(what: &str, found: Tensor<D>, reference: Tensor<D>) {
    let error = relative_error(found, reference);
    println!("{what}: relative error {error:.1e}");
    assert!(error <= TOLERANCE, "{what}: relative error {error:.1e}");
}
