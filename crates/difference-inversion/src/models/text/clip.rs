//! The CLIP joint space: a transformers `CLIPModel` folder, and the layer that both towers share.

use std::path::Path;

use burn::tensor::{Device, FloatDType, Tensor};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::models::attention::{Attention, KeyValues};
use crate::models::layers::{Activation, LayerNorm, Linear, Mask};
use crate::models::text::clip_text::{ClipTextConfig, ClipTextModel};
use crate::models::vision::clip_image::{ClipVisionConfig, ClipVisionModel};
use crate::weights::{Weights, read_config};
use crate::{Error, Result};

/// Tensors of CLIP checkpoints that are not weights of the towers.
pub(crate) const IGNORED: [&str; 2] = ["position_ids", "logit_scale"];

/// `config.json` of a transformers `CLIPModel`.
#[derive(Clone, Debug, Deserialize)]
pub struct ClipConfig {
    /// The text tower.
    pub text_config: ClipTextConfig,
    /// The image tower.
    pub vision_config: ClipVisionConfig,
}

/// Both towers of CLIP with their projections into the joint space
/// ([Radford et al. 2021](https://arxiv.org/abs/2103.00020)).
#[derive(Clone, Debug)]
pub struct ClipModel {
    /// Maps texts into the joint space.
    pub text: ClipTextModel,
    /// Maps pictures into the joint space.
    pub vision: ClipVisionModel,
}

impl ClipModel {
    /// Opens a folder saved by transformers' `CLIPModel`.
    ///
    /// # Errors
    /// When `config.json` or the weights are missing, damaged, or do not match; without both projections there is
    /// no joint space.
    pub fn open(dir: &Path, device: &Device, dtype: FloatDType) -> Result<Self> {
        open_tower(dir, device, dtype, |weights, config: &ClipConfig| {
            let text = ClipTextModel::load(weights, &config.text_config)?;
            let vision = ClipVisionModel::load(weights, &config.vision_config)?;
            for name in ["text_projection.weight", "visual_projection.weight"] {
                if !weights.contains(name) {
                    return Err(Error::Tensor {
                        path: weights.path().to_owned(),
                        name: name.to_owned(),
                        expected: "the projection into the joint space".to_owned(),
                        found: "no such tensor".to_owned(),
                    });
                }
            }
            Ok(Self { text, vision })
        })
    }
}

/// Opens a folder of `config.json` and weights, all of which `load` must use.
pub(crate) fn open_tower<C: DeserializeOwned, T>(
    dir: &Path,
    device: &Device,
    dtype: FloatDType,
    load: impl FnOnce(&Weights, &C) -> Result<T>,
) -> Result<T> {
    let config = read_config(&dir.join("config.json"))?;
    let weights = Weights::open(dir, device, dtype)?;
    let tower = load(&weights, &config)?;
    weights.check_all_used(&IGNORED)?;
    Ok(tower)
}

/// A tower's own weights: under `name`, or without a prefix, as transformers 5 saves them; `embedding`
/// distinguishes the two.
pub(crate) fn tower_weights(weights: &Weights, name: &str, embedding: &str) -> Weights {
    match weights.contains(embedding) {
        true => weights.clone(),
        false => weights.scope(name),
    }
}

/// The projection of width `d` into the joint space, if there is one.
pub(crate) fn joint_projection(weights: &Weights, name: &str, d: usize) -> Result<Option<Linear>> {
    let weights = weights.scope(name);
    match weights.shape("weight").as_deref() {
        Some(&[joint, _]) => Linear::load_without_bias(&weights, d, joint).map(Some),
        _ => Ok(None),
    }
}

/// The sizes of a tower's layers, the same for all of them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerSizes {
    pub(crate) hidden_size: usize,
    pub(crate) intermediate_size: usize,
    pub(crate) num_attention_heads: usize,
    pub(crate) hidden_act: Activation,
    pub(crate) layer_norm_eps: f64,
}

impl LayerSizes {
    /// Refuses heads that do not divide the width.
    pub(crate) fn check(&self, weights: &Weights) -> Result<()> {
        check_heads(weights, self.hidden_size, self.num_attention_heads)
    }
}

/// Refuses attention heads that do not divide `hidden_size`.
pub(crate) fn check_heads(weights: &Weights, hidden_size: usize, heads: usize) -> Result<()> {
    if heads > 0 && hidden_size.is_multiple_of(heads) {
        return Ok(());
    }
    let expected = format!("a divisor of the hidden size {hidden_size}");
    Err(Error::unsupported(
        &weights.config_path(),
        "num_attention_heads",
        &expected,
        heads,
    ))
}

/// The number of patches along one side of the picture, which must be at least one.
pub(crate) fn patches_per_side(weights: &Weights, image: usize, patch: usize) -> Result<usize> {
    match image.checked_div(patch) {
        Some(count) if count > 0 => Ok(count),
        _ => {
            let expected = format!("1 to {image}, the size of the picture");
            Err(Error::unsupported(
                &weights.config_path(),
                "patch_size",
                &expected,
                patch,
            ))
        }
    }
}

/// One layer of either tower, and of BLIP-2's: attention and a two-layer network, each after its
/// norm.
#[derive(Clone, Debug)]
pub(crate) struct EncoderLayer {
    layer_norm1: LayerNorm,
    self_attn: Attention,
    layer_norm2: LayerNorm,
    fc1: Linear,
    activation: Activation,
    fc2: Linear,
}

impl EncoderLayer {
    /// Reads a layer of CLIP.
    pub(crate) fn load(weights: &Weights, sizes: &LayerSizes) -> Result<Self> {
        let (d, attention) = (sizes.hidden_size, weights.scope("self_attn"));
        let projection = |name: &str| Linear::load(&attention.scope(name), d, d);
        let self_attn = Attention {
            query: projection("q_proj")?,
            key: projection("k_proj")?,
            value: projection("v_proj")?,
            output: projection("out_proj")?,
            heads: sizes.num_attention_heads,
        };
        Self::around(self_attn, weights, sizes)
    }

    /// Reads everything except the attention.
    pub(crate) fn around(
        self_attn: Attention,
        weights: &Weights,
        sizes: &LayerSizes,
    ) -> Result<Self> {
        let (d, mlp) = (sizes.hidden_size, weights.scope("mlp"));
        let norm = |name: &str| LayerNorm::load(&weights.scope(name), d, sizes.layer_norm_eps);
        Ok(Self {
            layer_norm1: norm("layer_norm1")?,
            self_attn,
            layer_norm2: norm("layer_norm2")?,
            fc1: Linear::load(&mlp.scope("fc1"), d, sizes.intermediate_size)?,
            activation: sizes.hidden_act,
            fc2: Linear::load(&mlp.scope("fc2"), sizes.intermediate_size, d)?,
        })
    }

    /// Shares the weights that equal those of `other`; returns the number of bytes.
    pub(crate) fn share(&mut self, other: &Self) -> u64 {
        self.layer_norm1.share(&other.layer_norm1)
            + self.self_attn.share(&other.self_attn)
            + self.layer_norm2.share(&other.layer_norm2)
            + self.fc1.share(&other.fc1)
            + self.fc2.share(&other.fc2)
    }

    /// The layer's output for `x` `[b, n, d]` after the positions of `past`, and the keys and
    /// values of all of them.
    pub(crate) fn forward(
        &self,
        x: Tensor<3>,
        past: Option<&KeyValues>,
        mask: Mask,
    ) -> (Tensor<3>, KeyValues) {
        let normed = self.layer_norm1.forward(x.clone());
        let context = self.self_attn.key_values(normed.clone()).after(past);
        let x = x + self.self_attn.forward(normed, &context, mask);
        let inner = self.fc1.forward(self.layer_norm2.forward(x.clone()));
        (
            x + self.fc2.forward(self.activation.forward(inner)),
            context,
        )
    }
}
