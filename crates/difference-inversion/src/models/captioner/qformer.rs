//! BLIP-2's Q-Former: learned queries that read a picture
//! ([Li et al. 2023](https://arxiv.org/abs/2301.12597)).

use burn::tensor::Tensor;
use serde::Deserialize;

use crate::models::captioner::bert::{BertLayer, BertNames, BertSizes};
use crate::models::layers::{Activation, LayerNorm, Mask};
use crate::models::text::clip::check_heads;
use crate::weights::Weights;
use crate::{Error, Result};

/// `qformer_config` of transformers' `Blip2Config`, with its defaults.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub(super) struct QFormerConfig {
    pub(super) hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    hidden_act: Activation,
    layer_norm_eps: f64,
    cross_attention_frequency: usize,
}

impl Default for QFormerConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            hidden_act: Activation::Gelu,
            layer_norm_eps: 1e-12,
            cross_attention_frequency: 2,
        }
    }
}

/// The names of the tensors of the layers.
const NAMES: BertNames = BertNames {
    attention: "attention",
    intermediate: "intermediate_query",
    output: "output_query",
};

/// transformers' `Blip2QFormerModel`, for queries without text.
#[derive(Clone, Debug)]
pub(super) struct QFormer {
    layernorm: LayerNorm,
    layers: Vec<BertLayer>,
}

impl QFormer {
    /// `d_image` is the width of the picture's states.
    pub(super) fn load(weights: &Weights, config: &QFormerConfig, d_image: usize) -> Result<Self> {
        check_heads(weights, config.hidden_size, config.num_attention_heads)?;
        if config.cross_attention_frequency == 0 {
            let (path, field) = (weights.config_path(), "cross_attention_frequency");
            return Err(Error::unsupported(&path, field, "at least 1", 0));
        }
        let sizes = BertSizes {
            hidden_size: config.hidden_size,
            num_attention_heads: config.num_attention_heads,
            intermediate_size: config.intermediate_size,
            hidden_act: config.hidden_act,
            layer_norm_eps: config.layer_norm_eps,
        };
        let layer = |number: usize| {
            let weights = weights.scope("encoder.layer").scope(number);
            let reads = number.is_multiple_of(config.cross_attention_frequency);
            BertLayer::load(&weights, &sizes, &NAMES, reads.then_some(d_image))
        };
        let norm = weights.scope("layernorm");
        Ok(Self {
            layernorm: LayerNorm::load(&norm, config.hidden_size, config.layer_norm_eps)?,
            layers: (0..config.num_hidden_layers)
                .map(layer)
                .collect::<Result<_>>()?,
        })
    }

    /// The queries `[b, q, d]` after reading `image` `[b, n, d_image]`, `[b, q, d]`.
    pub(super) fn forward(&self, queries: Tensor<3>, image: &Tensor<3>) -> Tensor<3> {
        let queries = self.layernorm.forward(queries);
        self.layers.iter().fold(queries, |queries, layer| {
            let context = layer.context(image);
            layer.forward(queries, None, context.as_ref(), Mask::None).0
        })
    }
}
