//! The image tower of BLIP and BLIP-2: a vision transformer that outputs every position.

use burn::tensor::Tensor;
use serde::Deserialize;

use crate::models::attention::Attention;
use crate::models::feature_map::Conv2d;
use crate::models::layers::{Activation, LayerNorm, Linear, Mask};
use crate::models::text::clip::{EncoderLayer, LayerSizes, patches_per_side};
use crate::weights::Weights;
use crate::{Error, Result};

/// `vision_config` of transformers' `Blip2Config`, with its defaults.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub(super) struct Blip2VisionConfig {
    pub(super) hidden_size: usize,
    pub(super) intermediate_size: usize,
    pub(super) num_hidden_layers: usize,
    pub(super) num_attention_heads: usize,
    pub(super) image_size: usize,
    pub(super) patch_size: usize,
    pub(super) hidden_act: Activation,
    pub(super) layer_norm_eps: f64,
    pub(super) qkv_bias: bool,
}

impl Default for Blip2VisionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 1408,
            intermediate_size: 6144,
            num_hidden_layers: 39,
            num_attention_heads: 16,
            image_size: 224,
            patch_size: 14,
            hidden_act: Activation::Gelu,
            layer_norm_eps: 1e-6,
            qkv_bias: true,
        }
    }
}

/// transformers' `Blip2VisionModel`.
#[derive(Clone, Debug)]
pub(super) struct Blip2VisionModel {
    image_size: usize,
    class_embedding: Tensor<3>,
    patch_embedding: Conv2d,
    position_embedding: Tensor<3>,
    layers: Vec<EncoderLayer>,
    post_layernorm: LayerNorm,
}

impl Blip2VisionModel {
    pub(super) fn load(weights: &Weights, config: &Blip2VisionConfig) -> Result<Self> {
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
        let embeddings = weights.scope("embeddings");
        let layer = |number: usize| {
            let weights = weights.scope("encoder.layers").scope(number);
            let attention = fused_attention(&weights.scope("self_attn"), &sizes, config.qkv_bias)?;
            EncoderLayer::around(attention, &weights, &sizes)
        };
        Ok(Self {
            image_size: config.image_size,
            class_embedding: embeddings.tensor("class_embedding", [1, 1, d])?,
            patch_embedding: Conv2d::load(
                &embeddings.scope("patch_embedding"),
                [3, d],
                patch,
                patch,
                0,
            )?,
            position_embedding: embeddings.tensor("position_embedding", [1, side * side + 1, d])?,
            layers: (0..config.num_hidden_layers)
                .map(layer)
                .collect::<Result<_>>()?,
            post_layernorm: LayerNorm::load(
                &weights.scope("post_layernorm"),
                d,
                config.layer_norm_eps,
            )?,
        })
    }

    /// `[b, 3, image_size, image_size]`, normalised, to `[b, 1 + patches, d]` after the last norm.
    pub(super) fn forward(&self, pixel_values: Tensor<4>) -> Result<Tensor<3>> {
        let ([b, channels, height, width], size) = (pixel_values.dims(), self.image_size);
        if [channels, height, width] != [3, size, size] {
            return Err(Error::invalid_input(format!(
                "expected pixel values [b, 3, {size}, {size}], found [{b}, {channels}, {height}, \
                 {width}]: preprocessor_config.json and config.json disagree"
            )));
        }
        let pixel_values = pixel_values.cast(self.class_embedding.dtype());
        let patches = self
            .patch_embedding
            .forward(pixel_values)
            .flatten::<3>(2, 3); // [b, d, n]
        let class = self.class_embedding.clone().expand([b as i64, -1, -1]);
        let x = Tensor::cat(vec![class, patches.swap_dims(1, 2)], 1) // [b, 1 + n, d]
            + self.position_embedding.clone();
        let layers = self.layers.iter();
        let x = layers.fold(x, |x, layer| layer.forward(x, None, Mask::None).0);
        Ok(self.post_layernorm.forward(x))
    }
}

/// The attention whose query, key and value projections are stored as one, in that order.
fn fused_attention(weights: &Weights, sizes: &LayerSizes, bias: bool) -> Result<Attention> {
    let (d, fused) = (sizes.hidden_size, weights.scope("qkv"));
    let weight = fused.tensor("weight", [3 * d, d])?;
    let bias = bias.then(|| fused.tensor("bias", [3 * d])).transpose()?;
    let part = |number: usize| {
        let bias = bias.clone().map(|bias| bias.narrow(0, number * d, d));
        Linear::new(weight.clone().narrow(0, number * d, d), bias)
    };
    Ok(Attention {
        query: part(0),
        key: part(1),
        value: part(2),
        output: Linear::load(&weights.scope("projection"), d, d)?,
        heads: sizes.num_attention_heads,
    })
}
