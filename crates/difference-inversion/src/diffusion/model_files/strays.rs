//! Tensors that merges and training leave behind in the folder of a network.

use crate::util::error::abbreviate;
use crate::weights::Weights;
use crate::{Error, Result};

/// Prefixes of keys of other networks, of adapters and of training.
const STARTS: [&str; 20] = [
    "lora_",
    "lycoris_",
    "control_model.",
    "controlnet_",
    "control_lora",
    "safety_checker.",
    "model_ema.",
    "ema_model.",
    "first_stage_model.",
    "cond_stage_model.",
    "conditioner.embedders.",
    "embedding_manager.",
    "ip_adapter.",
    "image_proj.",
    "bundle_emb.",
    "loss.",
    "discriminator.",
    "optimizer",
    "visual_projection.",
    "vision_model.",
];
/// Parts of the keys of unmerged adapters.
const INSIDE: [&str; 4] = [".lora_", "_lora.", ".lora.", ".hada_"];
/// Whole keys of training.
const WHOLE: [&str; 6] = [
    "global_step",
    "state_dict",
    "betas",
    "alphas_cumprod",
    "epoch",
    "decay",
];
/// PEFT's infix after the name of a layer that it changes.
const WRAPPED: &str = ".base_layer.";

fn is_stray(key: &str) -> bool {
    WHOLE.contains(&key)
        || STARTS.iter().any(|start| key.starts_with(start))
        || INSIDE.iter().any(|part| key.contains(part))
}

/// The weights of a network without foreign tensors.
///
/// # Errors
/// [`Error::InvalidFile`] if a PEFT adapter was saved inside the layers, or there are only weights averaged
/// over the training.
pub(super) fn cleaned(weights: Weights) -> Result<Weights> {
    if let Some(key) = weights.keys().find(|key| key.contains(WRAPPED)) {
        let reason = format!(
            "saved with an adapter of PEFT that is not merged (`{key}`): merge it before saving \
             (`pipe.fuse_lora()` and `pipe.unload_lora_weights()`, or `model.merge_and_unload()`)"
        );
        return Err(Error::invalid_file(weights.path(), reason));
    }
    let is_averaged = |key: &str| key.starts_with("model_ema.") || key.starts_with("ema_model.");
    if !weights.is_empty() && weights.keys().all(|key| is_averaged(key) || is_stray(key)) {
        let first = weights.keys().next().unwrap_or_default().to_owned();
        let reason = format!(
            "nothing in it is a weight of the network (its first tensor is `{first}`): averaged weights (EMA), a LoRA \
             or a ControlNet on their own are not a model"
        );
        return Err(Error::invalid_file(weights.path(), reason));
    }
    Ok(weights.without(is_stray))
}

/// A note about the tensors that [`cleaned`] leaves out.
pub(super) fn noted(weights: &Weights) -> Option<String> {
    let strays: Vec<String> = (weights.keys().filter(|key| is_stray(key)))
        .map(str::to_owned)
        .collect();
    (!strays.is_empty() && strays.len() < weights.keys().count()).then(|| {
        format!(
            "{}: {} tensors do not belong to the network and are left out: {}",
            weights.path().display(),
            strays.len(),
            abbreviate(&strays)
        )
    })
}
