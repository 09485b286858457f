//! BERT's layer ([Devlin et al. 2018](https://arxiv.org/abs/1810.04805)), as used by BLIP's text decoder
//! and BLIP-2's Q-Former: with cross-attention to a picture.

use burn::tensor::Tensor;

use crate::Result;
use crate::models::attention::{Attention, KeyValues};
use crate::models::layers::{Activation, LayerNorm, Linear, Mask};
use crate::weights::Weights;

/// The sizes of a layer.
#[derive(Clone, Copy, Debug)]
pub(super) struct BertSizes {
    pub(super) hidden_size: usize,
    pub(super) num_attention_heads: usize,
    pub(super) intermediate_size: usize,
    pub(super) hidden_act: Activation,
    pub(super) layer_norm_eps: f64,
}

/// The differing names of the tensors.
#[derive(Clone, Copy, Debug)]
pub(super) struct BertNames {
    /// The prefix of an attention's projections.
    pub(super) attention: &'static str,
    pub(super) intermediate: &'static str,
    pub(super) output: &'static str,
}

/// Self-attention, cross-attention if present, and a two-layer network. Every sum is normalised after its
/// addition.
#[derive(Clone, Debug)]
pub(super) struct BertLayer {
    attention: (Attention, LayerNorm),
    cross_attention: Option<(Attention, LayerNorm)>,
    intermediate: Linear,
    activation: Activation,
    output: Linear,
    output_norm: LayerNorm,
}

impl BertLayer {
    /// `d_context` is the width of the cross-attention's context, if it has one.
    pub(super) fn load(
        weights: &Weights,
        sizes: &BertSizes,
        names: &BertNames,
        d_context: Option<usize>,
    ) -> Result<Self> {
        let (d, inner) = (sizes.hidden_size, sizes.intermediate_size);
        let norm = |weights: &Weights| {
            LayerNorm::load(&weights.scope("LayerNorm"), d, sizes.layer_norm_eps)
        };
        let attention = |name: &str, d_context: usize| {
            let (weights, output) = (weights.scope(name), weights.scope(name).scope("output"));
            let projections = weights.scope(names.attention);
            let projection = |name: &str, d_in| Linear::load(&projections.scope(name), d_in, d);
            let attention = Attention {
                query: projection("query", d)?,
                key: projection("key", d_context)?,
                value: projection("value", d_context)?,
                output: Linear::load(&output.scope("dense"), d, d)?,
                heads: sizes.num_attention_heads,
            };
            Ok((attention, norm(&output)?))
        };
        let intermediate = weights.scope(names.intermediate).scope("dense");
        let output = weights.scope(names.output);
        Ok(Self {
            attention: attention("attention", d)?,
            cross_attention: d_context
                .map(|d_context| attention("crossattention", d_context))
                .transpose()?,
            intermediate: Linear::load(&intermediate, d, inner)?,
            activation: sizes.hidden_act,
            output: Linear::load(&output.scope("dense"), inner, d)?,
            output_norm: norm(&output)?,
        })
    }

    /// The keys and values of the cross-attention's context, `[b, m, d_context]`, if it has one.
    pub(super) fn context(&self, states: &Tensor<3>) -> Option<KeyValues> {
        let (attention, _) = self.cross_attention.as_ref()?;
        Some(attention.key_values(states.clone()))
    }

    /// The output for `x` `[b, n, d]` after the positions of `past`, and the keys and values of all of them. The
    /// `context` of the cross-attention has as many rows as `x`, or one for all.
    pub(super) fn forward(
        &self,
        x: Tensor<3>,
        past: Option<&KeyValues>,
        context: Option<&KeyValues>,
        mask: Mask,
    ) -> (Tensor<3>, KeyValues) {
        let (attention, norm) = &self.attention;
        let key_values = attention.key_values(x.clone()).after(past);
        let mut x = norm.forward(attention.forward(x.clone(), &key_values, mask) + x);
        if let (Some((attention, norm)), Some(context)) = (&self.cross_attention, context) {
            let [b, n, d] = x.dims();
            // Queries do not see one another, so those that read the same row form one sequence.
            let rows = context.keys.dims()[0];
            let queries = x.clone().reshape([rows, b * n / rows, d]);
            let found = attention.forward(queries, context, Mask::None);
            x = norm.forward(found.reshape([b, n, d]) + x);
        }
        let inner = self
            .activation
            .forward(self.intermediate.forward(x.clone()));
        (
            self.output_norm.forward(self.output.forward(inner) + x),
            key_values,
        )
    }
}
