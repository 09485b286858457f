//! The key layout of the original Stable Diffusion code, in which checkpoints are one file, and the keys of
//! diffusers and transformers that its keys stand for.
//!
//! The names are facts of the original repositories (CompVis/stable-diffusion,
//! Stability-AI/stablediffusion and generative-models, mlfoundations/open_clip) on the one hand, of
//! diffusers and transformers on the other.

pub(crate) mod text_encoder;
pub(crate) mod transformer;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use burn::tensor::{Device, FloatDType};

use crate::diffusion::model_files::layout::{Layout, TextLayout};
use crate::diffusion::model_files::said::{VELOCITY, ZERO_SNR};
use crate::models::denoiser::unet_config::MOST_LEVELS;
use crate::models::layers::MOST_LAYERS;
use crate::util::error::abbreviate;
use crate::weights::Weights;
use crate::weights::file::TensorFile;
use crate::weights::folder::refuse_pickled;
use crate::weights::placement::{Change, Placement};
use crate::{Error, Result};

/// Prefix of the U-Net's keys.
pub(crate) const UNET: &str = "model.diffusion_model.";
/// Prefix of the autoencoder's keys.
pub(crate) const VAE: &str = "first_stage_model.";

/// Names, each with diffusers' name.
type Names = [(&'static str, &'static str)];

/// Whole parts of the U-Net.
const UNET_PARTS: &Names = &[
    ("time_embed.0.", "time_embedding.linear_1."),
    ("time_embed.2.", "time_embedding.linear_2."),
    ("label_emb.0.0.", "add_embedding.linear_1."),
    ("label_emb.0.2.", "add_embedding.linear_2."),
    ("input_blocks.0.0.", "conv_in."),
    ("middle_block.1.", "mid_block.attentions.0."),
    ("out.0.", "conv_norm_out."),
    ("out.2.", "conv_out."),
];

/// The layers of the U-Net's residual blocks.
const UNET_RESNET: &Names = &[
    ("in_layers.0.", "norm1."),
    ("in_layers.2.", "conv1."),
    ("emb_layers.1.", "time_emb_proj."),
    ("out_layers.0.", "norm2."),
    ("out_layers.3.", "conv2."),
    ("skip_connection.", "conv_shortcut."),
];

/// Parts of the whole autoencoder. FLUX.2's halves include the convolutions, and the statistics of its latents are named as
/// in diffusers.
const VAE_WHOLE: &Names = &[
    ("quant_conv.", "quant_conv."),
    ("post_quant_conv.", "post_quant_conv."),
    ("encoder.quant_conv.", "quant_conv."),
    ("decoder.post_quant_conv.", "post_quant_conv."),
    ("bn.", "bn."),
];

/// Parts of either half of the autoencoder.
const VAE_PARTS: &Names = &[
    ("conv_in.", "conv_in."),
    ("norm_out.", "conv_norm_out."),
    ("conv_out.", "conv_out."),
    ("mid.block_1.", "mid_block.resnets.0."),
    ("mid.block_2.", "mid_block.resnets.1."),
];

/// The layers of the autoencoder's attention, of which all except the norm are 1×1 convolutions. Files that
/// programs using diffusers' names wrote back have these, too.
const VAE_ATTENTION: &Names = &[
    ("mid.attn_1.to_q.", "mid_block.attentions.0.to_q."),
    ("mid.attn_1.to_k.", "mid_block.attentions.0.to_k."),
    ("mid.attn_1.to_v.", "mid_block.attentions.0.to_v."),
    ("mid.attn_1.to_out.0.", "mid_block.attentions.0.to_out.0."),
    (
        "mid.attn_1.group_norm.",
        "mid_block.attentions.0.group_norm.",
    ),
    ("mid.attn_1.query.", "mid_block.attentions.0.to_q."),
    ("mid.attn_1.key.", "mid_block.attentions.0.to_k."),
    ("mid.attn_1.value.", "mid_block.attentions.0.to_v."),
    ("mid.attn_1.proj_attn.", "mid_block.attentions.0.to_out.0."),
    ("mid.attn_1.norm.", "mid_block.attentions.0.group_norm."),
    ("mid.attn_1.q.", "mid_block.attentions.0.to_q."),
    ("mid.attn_1.k.", "mid_block.attentions.0.to_k."),
    ("mid.attn_1.v.", "mid_block.attentions.0.to_v."),
    ("mid.attn_1.proj_out.", "mid_block.attentions.0.to_out.0."),
];

/// The layers of the autoencoder's residual blocks.
const VAE_RESNET: &Names = &[
    ("norm1.", "norm1."),
    ("conv1.", "conv1."),
    ("norm2.", "norm2."),
    ("conv2.", "conv2."),
    ("nin_shortcut.", "conv_shortcut."),
];

/// Parts of OpenCLIP's text tower.
const OPEN_CLIP_PARTS: &Names = &[
    (
        "positional_embedding",
        "embeddings.position_embedding.weight",
    ),
    ("token_embedding.", "embeddings.token_embedding."),
    ("ln_final.", "final_layer_norm."),
];

/// The layers of its residual blocks, which store queries, keys and values as one.
const OPEN_CLIP_BLOCK: &Names = &[
    ("ln_1.", "layer_norm1."),
    ("ln_2.", "layer_norm2."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
    ("attn.out_proj.", "self_attn.out_proj."),
];

/// Prefixes of keys that belong to no network in use: weights averaged over the training, the
/// autoencoder's training loss, modules with which some fine-tunings learned words.
const UNUSED_PARTS: [&str; 4] = [
    "model_ema.",
    "first_stage_model.loss.",
    "denoiser.",
    "embedding_manager.",
];

/// Keys of the noise schedule and of training, which the configuration covers, and the projection that
/// ComfyUI saved with text encoders of which only the hidden states are read.
const UNUSED: [&str; 19] = [
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "betas",
    "cond_stage_model.text_projection",
    "conditioner.embedders.0.text_projection",
    "global_step",
    "log_one_minus_alphas_cumprod",
    "logvar",
    "lvlb_weights",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "posterior_variance",
    "scale_factor",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "state_dict",
];

/// Suffixes of keys of buffers, and of CLIP's temperature.
const UNUSED_ENDS: [&str; 3] = [".position_ids", "logit_scale", ".attn_mask"];

/// The tensors of each network of a pipeline, by its folder's name in diffusers.
pub(crate) type Networks = BTreeMap<String, BTreeMap<String, Placement>>;

/// Prefixes of keys that mark a model of another kind, with the reason.
const OTHERWISE: [(&str, &str); 6] = [
    (
        "edm_",
        "its noise is that of EDM, as in CosXL and Playground 2.5, and not a schedule of betas",
    ),
    ("noise_augmentor.", "it draws from pictures, as unCLIP does"),
    (
        "embedder.model.visual",
        "it draws from pictures, as unCLIP does",
    ),
    ("depth_model.", "it draws from a depth map"),
    ("low_scale_model.", "it enlarges pictures"),
    ("img_in.", "it is no U-Net"),
];

/// Finds diffusers' tensors in `file`, whose layout is `layout`. Also returns the names of tensors that belong
/// to none of its networks, which merges leave behind.
///
/// # Errors
/// [`Error::InvalidFile`] if a network has tensors that are neither known nor known to be unused, or a
/// tensor marks the model as of another kind.
pub(crate) fn networks(file: &TensorFile, layout: &Layout) -> Result<(Networks, Vec<String>)> {
    let mut networks = Networks::new();
    let (mut unknown, mut strays) = (Vec::new(), Vec::new());
    for key in file.names() {
        if is_unused(&key) || layout.leaves_out(&key) {
            continue;
        }
        let Some((network, tensors)) = diffusers_keys(&key, layout) else {
            let otherwise = OTHERWISE.iter().find(|(start, _)| key.starts_with(start));
            if let Some((_, why)) = otherwise {
                let reason = format!("not a {} that can be used: {why} (`{key}`)", layout.title);
                return Err(Error::invalid_file(file.path(), reason));
            }
            let encoders = layout.text_encoders.iter().map(|encoder| encoder.prefix);
            let is_of_network = |start: &str| key.starts_with(start);
            match [UNET, VAE].into_iter().chain(encoders).any(is_of_network) {
                true => unknown.push(key),
                false => strays.push(key),
            }
            continue;
        };
        for (name, change) in tensors {
            check_rows(file, &key, change)?;
            let place = Placement {
                file: 0,
                key: key.clone(),
                change,
            };
            let tensors = networks.entry(network.to_owned()).or_default();
            if let Some(other) = tensors.insert(name, place) {
                let reason = format!("tensors `{}` and `{key}` are the same", other.key);
                return Err(Error::invalid_file(file.path(), reason));
            }
        }
    }
    if unknown.is_empty() {
        strays.sort();
        return Ok((networks, strays));
    }
    unknown.sort();
    let reason = format!(
        "{} tensors are not of a checkpoint of {}: {}",
        unknown.len(),
        layout.title,
        abbreviate(&unknown)
    );
    Err(Error::invalid_file(file.path(), reason))
}

/// Checks that a change can divide the rows of the stored tensor `key`.
fn check_rows(file: &TensorFile, key: &str, change: Change) -> Result<()> {
    let rows = (file.info(key)).and_then(|(_, shape)| shape.first().copied());
    let parts = change.parts();
    if parts == 1 || rows.is_some_and(|rows| rows.is_multiple_of(parts)) {
        return Ok(());
    }
    let reason = format!("tensor `{key}`: its rows cannot be split in {parts}");
    Err(Error::invalid_file(file.path(), reason))
}

fn is_unused(key: &str) -> bool {
    UNUSED.contains(&key)
        || [VELOCITY, ZERO_SNR].contains(&key)
        || UNUSED_PARTS.iter().any(|start| key.starts_with(start))
        || UNUSED_ENDS.iter().any(|end| key.ends_with(end))
}

/// The network that `key` belongs to, and its tensors there.
fn diffusers_keys<'a>(key: &str, layout: &'a Layout) -> Option<(&'a str, Vec<(String, Change)>)> {
    if let Some(key) = key.strip_prefix(UNET) {
        let name = unet_key(key, layout.layers_per_block())?;
        return Some((layout.family.denoiser.part, vec![(name, Change::None)]));
    }
    if let Some(key) = key.strip_prefix(VAE) {
        return Some((
            layout.family.autoencoder.part,
            vec![vae_key(key, layout.vae_levels())?],
        ));
    }
    layout.text_encoders.iter().find_map(|encoder| {
        let key = key.strip_prefix(encoder.prefix)?;
        let tensors = match encoder.layout {
            TextLayout::Transformers => vec![(key.to_owned(), Change::None)],
            TextLayout::OpenClip => open_clip_keys(key)?,
        };
        Some((encoder.network, tensors))
    })
}

/// `key` with its beginning renamed.
fn renamed(key: &str, names: &Names) -> Option<String> {
    names.iter().find_map(|(original, name)| {
        let rest = key.strip_prefix(original)?;
        Some(format!("{name}{rest}"))
    })
}

/// The number before the first dot, and the rest.
fn numbered(key: &str) -> Option<(usize, &str)> {
    let (number, rest) = key.split_once('.')?;
    Some((number.parse().ok()?, rest))
}

/// Opens a file with an autoencoder, in diffusers' or the original layout; a whole model's file stands for
/// its autoencoder.
///
/// # Errors
/// [`Error::InvalidFile`] if it has tensors that no autoencoder has, or lacks those of one.
pub(crate) fn autoencoder(path: &Path, device: &Device, dtype: FloatDType) -> Result<Weights> {
    refuse_pickled(path)?;
    let file = TensorFile::open(path)?;
    let names = file.names();
    if names
        .iter()
        .any(|name| name.starts_with("decoder.up_blocks.") || name.starts_with("decoder.layers."))
    {
        return Weights::open(path, device, dtype);
    }
    let is_of_model = names.iter().any(|name| name.starts_with(VAE));
    let bare = |name: &str| match is_of_model {
        true => name.strip_prefix(VAE).map(str::to_owned),
        false => Some(name.to_owned()),
    };
    let names: Vec<(String, String)> = names
        .into_iter()
        .filter_map(|name| Some((bare(&name)?, name)))
        .collect();
    let level = |name: &str| {
        Some(
            numbered(name.strip_prefix("decoder.up.")?)?
                .0
                .saturating_add(1),
        )
    };
    let levels = names
        .iter()
        .filter_map(|(bare, _)| level(bare))
        .max()
        .unwrap_or(0);
    let parts = [
        "encoder.",
        "decoder.",
        "quant_conv.",
        "post_quant_conv.",
        "bn.",
    ];
    let mut tensors = BTreeMap::new();
    for (bare, key) in names {
        if !parts.iter().any(|part| bare.starts_with(part)) {
            continue; // of its training
        }
        let Some((name, change)) = vae_key(&bare, levels) else {
            let reason = format!(
                "not an autoencoder of Stable Diffusion: tensor `{key}` is not known; of TAESD, take its folder in \
                 diffusers' layout"
            );
            return Err(Error::invalid_file(path, reason));
        };
        let place = Placement {
            file: 0,
            key,
            change,
        };
        tensors.insert(name, place);
    }
    Ok(Weights::new(
        path,
        vec![Arc::new(file)],
        tensors,
        device,
        dtype,
    ))
}

/// The U-Net numbers its blocks through all levels, each with `layers` layers (one more in the up path)
/// and a resampling.
fn unet_key(key: &str, layers: usize) -> Option<String> {
    if let Some(name) = renamed(key, UNET_PARTS) {
        return Some(name);
    }
    let (part, rest) = key.split_once('.')?;
    let (block, rest) = numbered(rest)?;
    if part == "middle_block" {
        let resnet = [(0, 0), (2, 1)]
            .into_iter()
            .find(|(number, _)| *number == block)?
            .1;
        return Some(format!(
            "mid_block.resnets.{resnet}.{}",
            renamed(rest, UNET_RESNET)?
        ));
    }
    let (level, block) = match part {
        "input_blocks" => ("down_blocks", block.checked_sub(1)?),
        "output_blocks" => ("up_blocks", block),
        _ => return None,
    };
    let (level, layer) = (
        format!("{level}.{}", block / (layers + 1)),
        block % (layers + 1),
    );
    let (child, rest) = numbered(rest)?;
    if let Some(rest) = rest.strip_prefix("op.") {
        return Some(format!("{level}.downsamplers.0.conv.{rest}"));
    }
    if let Some(rest) = rest.strip_prefix("conv.") {
        return Some(format!("{level}.upsamplers.0.conv.{rest}"));
    }
    match child {
        0 => Some(format!(
            "{level}.resnets.{layer}.{}",
            renamed(rest, UNET_RESNET)?
        )),
        1 => Some(format!("{level}.attentions.{layer}.{rest}")),
        _ => None,
    }
}

/// The original names of a U-Net's layers, by their names in diffusers: the inverse of
/// [`unet_key`].
#[derive(Debug, Default)]
pub(crate) struct OriginalNames {
    /// The residual blocks of every level, and whether it has transformers.
    down: Vec<(usize, bool)>,
    up: Vec<(usize, bool)>,
}

impl OriginalNames {
    /// For the U-Net with tensors of these names.
    pub(crate) fn of<'a>(keys: impl Iterator<Item = &'a str>) -> Self {
        let mut names = Self::default();
        for key in keys {
            let levels = [
                ("down_blocks.", &mut names.down),
                ("up_blocks.", &mut names.up),
            ];
            for (start, levels) in levels {
                let Some((level, rest)) = key.strip_prefix(start).and_then(numbered) else {
                    continue;
                };
                if level >= levels.len() && level < MOST_LEVELS {
                    levels.resize(level + 1, (0, false));
                }
                let Some((layers, attends)) = levels.get_mut(level) else {
                    continue;
                };
                *attends |= rest.starts_with("attentions.");
                if let Some((layer, _)) = rest.strip_prefix("resnets.").and_then(numbered)
                    && layer < MOST_LAYERS
                {
                    *layers = (*layers).max(layer + 1);
                }
            }
        }
        names
    }

    /// The name of a layer, both without a dot at the end.
    pub(crate) fn get(&self, layer: &str) -> Option<String> {
        let key = self.key(&format!("{layer}."))?;
        Some(key.trim_end_matches('.').to_owned())
    }

    fn key(&self, key: &str) -> Option<String> {
        if let Some(name) = renamed_back(key, UNET_PARTS) {
            return Some(name);
        }
        if let Some((resnet, rest)) = key.strip_prefix("mid_block.resnets.").and_then(numbered) {
            let rest = renamed_back(rest, UNET_RESNET)?;
            return Some(format!("middle_block.{}.{rest}", 2 * resnet));
        }
        let (part, rest) = key.split_once('.')?;
        let (level, rest) = numbered(rest)?;
        let (kind, rest) = rest.split_once('.')?;
        let (layer, rest) = numbered(rest)?;
        let (levels, part, first, sampling) = match part {
            "down_blocks" => (&self.down, "input_blocks", 1, 1),
            "up_blocks" => (&self.up, "output_blocks", 0, 0),
            _ => return None,
        };
        let (layers, attends) = *levels.get(level)?;
        let before: usize = (levels[..level].iter())
            .map(|(layers, _)| layers + sampling)
            .sum();
        let first = first + before;
        Some(match kind {
            "resnets" => {
                let rest = renamed_back(rest, UNET_RESNET)?;
                format!("{part}.{}.0.{rest}", first + layer)
            }
            "attentions" => format!("{part}.{}.1.{rest}", first + layer),
            "downsamplers" => {
                let rest = rest.strip_prefix("conv.")?;
                format!("{part}.{}.0.op.{rest}", first + layers)
            }
            "upsamplers" => {
                let child = if attends { 2 } else { 1 };
                format!("{part}.{}.{child}.{rest}", (first + layers).checked_sub(1)?)
            }
            _ => return None,
        })
    }
}

/// `key` with its prefix renamed as in the original code.
fn renamed_back(key: &str, names: &Names) -> Option<String> {
    names.iter().find_map(|(original, name)| {
        let rest = key.strip_prefix(name)?;
        Some(format!("{original}{rest}"))
    })
}

/// The autoencoder numbers the levels of both halves from the finest; diffusers numbers the decoder's from
/// the coarsest of `levels`.
fn vae_key(key: &str, levels: usize) -> Option<(String, Change)> {
    if let Some(name) = renamed(key, VAE_WHOLE) {
        return Some((name, Change::None));
    }
    let (half, rest) = key.split_once('.')?;
    if !["encoder", "decoder"].contains(&half) {
        return None;
    }
    if let Some(name) = renamed(rest, VAE_ATTENTION) {
        return Some((format!("{half}.{name}"), Change::Squeeze));
    }
    if let Some(name) = renamed(rest, VAE_PARTS) {
        return Some((format!("{half}.{name}"), Change::None));
    }
    let (way, rest) = rest.split_once('.')?;
    let (level, rest) = numbered(rest)?;
    let level = match (half, way) {
        ("encoder", "down") => format!("encoder.down_blocks.{level}"),
        ("decoder", "up") => {
            format!(
                "decoder.up_blocks.{}",
                levels.checked_sub(1)?.checked_sub(level)?
            )
        }
        _ => return None,
    };
    let resampling = [
        ("downsample.conv.", "downsamplers.0.conv."),
        ("upsample.conv.", "upsamplers.0.conv."),
    ];
    let name = match rest.strip_prefix("block.") {
        Some(rest) => {
            let (layer, rest) = numbered(rest)?;
            format!("resnets.{layer}.{}", renamed(rest, VAE_RESNET)?)
        }
        None => renamed(rest, &resampling)?,
    };
    Some((format!("{level}.{name}"), Change::None))
}

/// OpenCLIP stores queries, keys and values as one, and the projection for vectors on its left. Files
/// converted by diffusers' scripts store the projection as a layer's weight, for vectors on its right.
fn open_clip_keys(key: &str) -> Option<Vec<(String, Change)>> {
    let projection = "text_projection.weight";
    if key == "text_projection" {
        return Some(vec![(projection.to_owned(), Change::Transpose)]);
    }
    if key == projection {
        return Some(vec![(projection.to_owned(), Change::None)]);
    }
    if let Some(name) = renamed(key, OPEN_CLIP_PARTS) {
        return Some(vec![(format!("text_model.{name}"), Change::None)]);
    }
    let (block, rest) = numbered(key.strip_prefix("transformer.resblocks.")?)?;
    let block = format!("text_model.encoder.layers.{block}");
    match rest.strip_prefix("attn.in_proj_") {
        Some(kind @ ("weight" | "bias")) => {
            let parts = ["q_proj", "k_proj", "v_proj"].into_iter().enumerate();
            let name = |part| format!("{block}.self_attn.{part}.{kind}");
            Some(
                parts
                    .map(|(number, part)| (name(part), Change::third(number)))
                    .collect(),
            )
        }
        _ => {
            let name = renamed(rest, OPEN_CLIP_BLOCK)?;
            Some(vec![(format!("{block}.{name}"), Change::None)])
        }
    }
}

#[cfg(test)]
mod tests;
