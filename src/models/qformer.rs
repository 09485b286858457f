//! BLIP-2's Q-Former: learned queries that read a picture
//! ([Li et al. 2023](https://arxiv.org/abs/2301.12597)).

use burn::tensor::Tensor;
use serde::Deserialize;

use super::attention::Attention;
use super::clip::check_heads;
use super::layers::{Activation, LayerNorm, Linear, Mask};
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

/// transformers' `Blip2QFormerModel`, for queries without text.
#[derive(Clone, Debug)]
pub(super) struct QFormer {
    layernorm: LayerNorm,
    layers: Vec<Layer>,
}

/// Every sum is normed after its addition, as in BERT.
#[derive(Clone, Debug)]
struct Layer {
    attention: (Attention, LayerNorm),
    cross_attention: Option<(Attention, LayerNorm)>,
    intermediate: Linear,
    activation: Activation,
    output: Linear,
    output_norm: LayerNorm,
}

impl QFormer {
    /// `d_image` is the width of what the queries read.
    pub(super) fn load(weights: &Weights, config: &QFormerConfig, d_image: usize) -> Result<Self> {
        check_heads(weights, config.hidden_size, config.num_attention_heads)?;
        if config.cross_attention_frequency == 0 {
            let (path, field) = (weights.config_path(), "cross_attention_frequency");
            return Err(Error::unsupported(&path, field, "at least 1", 0));
        }
        let (d, epsilon) = (config.hidden_size, config.layer_norm_eps);
        let layer = |number: usize| {
            let weights = weights.scope("encoder.layer").scope(number);
            Layer::load(&weights, config, d_image, number)
        };
        Ok(Self {
            layernorm: LayerNorm::load(&weights.scope("layernorm"), d, epsilon)?,
            layers: (0..config.num_hidden_layers)
                .map(layer)
                .collect::<Result<_>>()?,
        })
    }

    /// The queries `[b, q, d]` after reading `image` `[b, n, d_image]`, `[b, q, d]`.
    pub(super) fn forward(&self, queries: Tensor<3>, image: &Tensor<3>) -> Tensor<3> {
        let queries = self.layernorm.forward(queries);
        self.layers
            .iter()
            .fold(queries, |queries, layer| layer.forward(queries, image))
    }
}

impl Layer {
    fn load(
        weights: &Weights,
        config: &QFormerConfig,
        d_image: usize,
        number: usize,
    ) -> Result<Self> {
        let (d, inner) = (config.hidden_size, config.intermediate_size);
        let norm = |weights: &Weights| {
            LayerNorm::load(&weights.scope("LayerNorm"), d, config.layer_norm_eps)
        };
        let attention = |name: &str, d_context: usize| {
            let (weights, output) = (weights.scope(name), weights.scope(name).scope("output"));
            let projection =
                |name: &str, d_in| Linear::load(&weights.scope("attention").scope(name), d_in, d);
            let attention = Attention {
                query: projection("query", d)?,
                key: projection("key", d_context)?,
                value: projection("value", d_context)?,
                output: Linear::load(&output.scope("dense"), d, d)?,
                heads: config.num_attention_heads,
            };
            Ok((attention, norm(&output)?))
        };
        let output = weights.scope("output_query");
        Ok(Self {
            attention: attention("attention", d)?,
            cross_attention: number
                .is_multiple_of(config.cross_attention_frequency)
                .then(|| attention("crossattention", d_image))
                .transpose()?,
            intermediate: Linear::load(
                &weights.scope("intermediate_query").scope("dense"),
                d,
                inner,
            )?,
            activation: config.hidden_act,
            output: Linear::load(&output.scope("dense"), inner, d)?,
            output_norm: norm(&output)?,
        })
    }

    fn forward(&self, x: Tensor<3>, image: &Tensor<3>) -> Tensor<3> {
        let attend =
            |(attention, norm): &(Attention, LayerNorm), x: Tensor<3>, context: Tensor<3>| {
                let context = attention.key_values(context);
                norm.forward(attention.forward(x.clone(), &context, Mask::None) + x)
            };
        let mut x = attend(&self.attention, x.clone(), x);
        if let Some(cross_attention) = &self.cross_attention {
            x = attend(cross_attention, x, image.clone());
        }
        let inner = self
            .activation
            .forward(self.intermediate.forward(x.clone()));
        self.output_norm.forward(self.output.forward(inner) + x)
    }
}
