//! CLIP's image tower, a vision transformer.

use std::path::Path;

use burn::tensor::{Device, FloatDType, Tensor};
use serde::Deserialize;

use crate::models::feature_map::Conv2d;
use crate::models::layers::{Activation, Embedding, LayerNorm, Linear, Mask};
use crate::models::text::clip::{
    EncoderLayer, LayerSizes, joint_projection, open_tower, patches_per_side, tower_weights,
};
use crate::weights::Weights;
use crate::{Error, Result};

/// `config.json` of transformers' `CLIPVisionModel`; absent fields have its defaults
/// (those of `openai/clip-vit-base-patch32`).
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct ClipVisionConfig {
    /// The width `d`.
    pub hidden_size: usize,
    /// The inner width of each layer's network.
    pub intermediate_size: usize,
    /// The number of layers.
    pub num_hidden_layers: usize,
    /// Attention heads per layer.
    pub num_attention_heads: usize,
    /// The channels of the picture.
    pub num_channels: usize,
    /// The side of the picture, in pixels.
    pub image_size: usize,
    /// The side of a patch, in pixels.
    pub patch_size: usize,
    /// `quick_gelu` for OpenAI's CLIP, `gelu` for OpenCLIP.
    pub hidden_act: Activation,
    /// The small constant of the norms.
    pub layer_norm_eps: f64,
}

impl Default for ClipVisionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_channels: 3,
            image_size: 224,
            patch_size: 32,
            hidden_act: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
        }
    }
}

/// CLIP's image tower: transformers' `CLIPVisionModel`, `CLIPVisionModelWithProjection`, or the
/// one in a `CLIPModel`. Its weights are constants.
#[derive(Clone, Debug)]
pub struct ClipVisionModel {
    config: ClipVisionConfig,
    class_embedding: Tensor<1>,
    patch_embedding: Conv2d,
    position_embedding: Embedding,
    pre_layernorm: LayerNorm,
    layers: Vec<EncoderLayer>,
    post_layernorm: LayerNorm,
    visual_projection: Option<Linear>,
}

impl ClipVisionModel {
    /// Opens a folder that holds only the image tower.
    ///
    /// # Errors
    /// When `config.json` or the weights are missing, damaged, or do not match.
    pub fn open(dir: &Path, device: &Device, dtype: FloatDType) -> Result<Self> {
        open_tower(dir, device, dtype, Self::load)
    }

    /// Reads the tower under `vision_model.` (or without a prefix, as transformers 5 saves it), and
    /// `visual_projection.weight` if present.
    ///
    /// # Errors
    /// When a tensor is missing or its shape differs from `config`.
    pub fn load(weights: &Weights, config: &ClipVisionConfig) -> Result<Self> {
        let sizes = LayerSizes {
            hidden_size: config.hidden_size,
            intermediate_size: config.intermediate_size,
            num_attention_heads: config.num_attention_heads,
            hidden_act: config.hidden_act,
            layer_norm_eps: config.layer_norm_eps,
        };
        sizes.check(weights)?;
        let (d, patch) = (config.hidden_size, config.patch_size);
        let side = patches_per_side(weights, config.image_size, patch)?;
        let tower = tower_weights(weights, "vision_model", "embeddings.class_embedding");
        let embeddings = tower.scope("embeddings");
        let norm = |name: &str| LayerNorm::load(&tower.scope(name), d, config.layer_norm_eps);
        let layers = tower.scope("encoder.layers");
        Ok(Self {
            class_embedding: embeddings.tensor("class_embedding", [d])?,
            patch_embedding: Conv2d::load_without_bias(
                &embeddings.scope("patch_embedding"),
                [config.num_channels, d],
                patch,
                patch,
                0,
            )?,
            position_embedding: Embedding::load(
                &embeddings.scope("position_embedding"),
                side * side + 1,
                d,
            )?,
            pre_layernorm: norm("pre_layrnorm")?, // so spelled in every checkpoint
            layers: (0..config.num_hidden_layers)
                .map(|number| EncoderLayer::load(&layers.scope(number), &sizes))
                .collect::<Result<_>>()?,
            post_layernorm: norm("post_layernorm")?,
            visual_projection: joint_projection(weights, "visual_projection", d)?,
            config: config.clone(),
        })
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &ClipVisionConfig {
        &self.config
    }

    /// The pooled output: the class token after the last norm.
    ///
    /// # Shapes
    /// `pixel_values`: `[b, num_channels, image_size, image_size]`, normalised as in
    /// `preprocessor_config.json` (see [`ImagePreprocessor`](crate::image::ImagePreprocessor)),
    /// to `[b, d]`.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] for another shape.
    pub fn forward(&self, pixel_values: Tensor<4>) -> Result<Tensor<2>> {
        let (dims, d) = (pixel_values.dims(), self.config.hidden_size);
        let (channels, size) = (self.config.num_channels, self.config.image_size);
        if dims[1..] != [channels, size, size] {
            return Err(Error::invalid_input(format!(
                "expected pixel values [b, {channels}, {size}, {size}], found {dims:?}"
            )));
        }
        let b = dims[0];
        let patches = self
            .patch_embedding
            .forward(pixel_values)
            .flatten::<3>(2, 3); // [b, d, n]
        let class = self
            .class_embedding
            .clone()
            .reshape([1, 1, d])
            .expand([b, 1, d]);
        let x = Tensor::cat(vec![class, patches.swap_dims(1, 2)], 1); // [b, 1 + n, d]
        let x = x + self.position_embedding.weight().clone().unsqueeze::<3>();
        let x = self
            .layers
            .iter()
            .fold(self.pre_layernorm.forward(x), |x, layer| {
                layer.forward(x, None, Mask::None).0
            });
        Ok(self
            .post_layernorm
            .forward(x.narrow(1, 0, 1).reshape([b, d])))
    }

    /// Unnormalised pooled outputs in the joint space.
    ///
    /// # Shapes
    /// `[b, d]` to `[b, projection_dim]`
    ///
    /// # Errors
    /// [`Error::InvalidInput`] when the checkpoint has no `visual_projection`.
    pub fn project(&self, pooled: Tensor<2>) -> Result<Tensor<2>> {
        match &self.visual_projection {
            Some(projection) => Ok(projection.forward(pooled)),
            None => Err(Error::invalid_input(
                "this image encoder has no `visual_projection`",
            )),
        }
    }
}
