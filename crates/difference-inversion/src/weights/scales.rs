//! The scales of 8-bit weights, which ComfyUI's files have beside them: `<layer>.scale_weight` where a tensor
//! `scaled_fp8` marks the file, and `<layer>.weight_scale` with `<layer>.comfy_quant` since late 2025
//! (`comfy/ops.py`, `QUANTIZATION.md` of github.com/Comfy-Org/ComfyUI).

use std::collections::BTreeMap;

use dinv_kernels::packed::Packing;
use serde_json::Value;

use crate::weights::file::{Stored, TensorFile};
use crate::{Error, Result};

/// The tensor that marks files of the older kind, below the prefix of the denoiser where that has one.
const MARK: &str = "scaled_fp8";
/// The names of a layer's scale.
const SCALES: [&str; 2] = ["scale_weight", "weight_scale"];
/// The description of a layer of the newer kind, in JSON.
const ABOUT: &str = "comfy_quant";
/// Scales of a layer's input, which do not concern its weights.
const OTHERS: [&str; 2] = ["scale_input", "input_scale"];
/// The formats of the newer kind that are 8-bit floats with one scale.
const FORMATS: [&str; 2] = ["float8_e4m3fn", "float8_e5m2"];

/// The tensors of a file with their scales applied, and without the tensors that hold scales. `None` if there are none.
///
/// # Errors
/// [`Error::InvalidFile`] if a layer is quantised in another way.
pub(super) fn scaled(file: &TensorFile) -> Result<Option<BTreeMap<String, Stored>>> {
    let is_packed = |stored: &Stored| {
        matches!(
            stored.packing,
            Some(Packing::F8E4M3(_) | Packing::F8E5M2(_))
        )
    };
    let describes = |name: &String| name.ends_with(ABOUT);
    let stored = file.tensors();
    if !stored.values().any(is_packed) && !stored.keys().any(describes) {
        return Ok(None);
    }
    let mut tensors = stored.clone();
    tensors.retain(|name, _| name.rsplit('.').next() != Some(MARK));
    for name in stored.keys() {
        let Some((layer, kind)) = name.rsplit_once('.') else {
            continue;
        };
        if OTHERS.contains(&kind) {
            tensors.remove(name);
        }
        if kind == ABOUT {
            check_format(file, name)?;
            tensors.remove(name);
        }
        if !SCALES.contains(&kind) {
            continue;
        }
        tensors.remove(name);
        // A layer of higher precision may have a scale of 1 beside it: the weight's own type decides.
        let Some(weight) = tensors.get_mut(&format!("{layer}.weight")) else {
            continue;
        };
        let Some(scale) = file.scalar(name)? else {
            if is_packed(weight) {
                let reason =
                    format!("`{name}` is no single number: scales for blocks are not read");
                return Err(Error::invalid_file(file.path(), reason));
            }
            continue;
        };
        weight.packing = match weight.packing {
            Some(Packing::F8E4M3(_)) => Some(Packing::F8E4M3(scale)),
            Some(Packing::F8E5M2(_)) => Some(Packing::F8E5M2(scale)),
            other => other,
        };
    }
    Ok(Some(tensors))
}

/// Refuses a format that is not read.
fn check_format(file: &TensorFile, name: &str) -> Result<()> {
    let text = file.bytes(name, [0, 1, 1])?;
    let about: Value = serde_json::from_slice(&text).unwrap_or_default();
    match about["format"].as_str() {
        Some(format) if FORMATS.contains(&format) => Ok(()),
        other => {
            let found = other.map_or_else(|| format!("`{name}`"), |format| format!("`{format}`"));
            let reason = format!(
                "its weights are quantised as {found}, which is not read: take the file in fp8, fp16 or bf16, or a \
                 GGUF file"
            );
            Err(Error::invalid_file(file.path(), reason))
        }
    }
}
