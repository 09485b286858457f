//! OPT, the language model of BLIP-2 ([Zhang et al. 2022](https://arxiv.org/abs/2205.01068)).

use burn::tensor::{Int, Tensor, TensorData};
use serde::Deserialize;

use crate::models::attention::{Attention, KeyValues};
use crate::models::captioner::reader::Cache;
use crate::models::layers::{Activation, Embedding, LayerNorm, Linear, Mask};
use crate::models::text::clip::check_heads;
use crate::weights::Weights;
use crate::{Error, Result};

/// The offset of positions in the table of their embeddings.
const POSITION_OFFSET: usize = 2;
/// The small constant of OPT's norms, which its configuration does not state.
const LAYER_NORM_EPS: f64 = 1e-5;

/// One end token or several.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum TokenIds {
    One(u32),
    Many(Vec<u32>),
}

impl TokenIds {
    pub(super) fn as_slice(&self) -> &[u32] {
        match self {
            Self::One(id) => std::slice::from_ref(id),
            Self::Many(ids) => ids,
        }
    }
}

/// `text_config` of transformers' `Blip2Config` (an `OPTConfig`), with its defaults.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub(super) struct OptConfig {
    model_type: String,
    pub(super) vocab_size: usize,
    pub(super) hidden_size: usize,
    num_hidden_layers: usize,
    ffn_dim: usize,
    pub(super) max_position_embeddings: usize,
    do_layer_norm_before: bool,
    #[serde(rename = "_remove_final_layer_norm")]
    remove_final_layer_norm: bool,
    word_embed_proj_dim: Option<usize>,
    num_attention_heads: usize,
    activation_function: Activation,
    pub(super) bos_token_id: u32,
    pub(super) eos_token_id: TokenIds,
    enable_bias: bool,
    layer_norm_elementwise_affine: bool,
}

impl Default for OptConfig {
    fn default() -> Self {
        Self {
            model_type: "opt".to_owned(),
            vocab_size: 50272,
            hidden_size: 768,
            num_hidden_layers: 12,
            ffn_dim: 3072,
            max_position_embeddings: 2048,
            do_layer_norm_before: true,
            remove_final_layer_norm: false,
            word_embed_proj_dim: None,
            num_attention_heads: 12,
            activation_function: Activation::Relu,
            bos_token_id: 2,
            eos_token_id: TokenIds::One(2),
            enable_bias: true,
            layer_norm_elementwise_affine: true,
        }
    }
}

impl OptConfig {
    /// Refuses configurations that BLIP-2 cannot have. (transformers itself cannot insert the queries among word
    /// embeddings if their width differs from the language model's.)
    fn check(&self, weights: &Weights) -> Result<()> {
        let (path, d) = (weights.config_path(), self.hidden_size);
        if self.model_type != "opt" {
            let field = "text_config.model_type";
            return Err(Error::unsupported(
                &path,
                field,
                "\"opt\"",
                &self.model_type,
            ));
        }
        if let Some(found) = self.word_embed_proj_dim.filter(|&width| width != d) {
            let field = "text_config.word_embed_proj_dim";
            return Err(Error::unsupported(
                &path,
                field,
                &format!("the hidden size {d}"),
                found,
            ));
        }
        if !self.layer_norm_elementwise_affine {
            let field = "text_config.layer_norm_elementwise_affine";
            return Err(Error::unsupported(&path, field, "true", false));
        }
        check_heads(weights, d, self.num_attention_heads)
    }
}

/// transformers' `OPTForCausalLM`.
#[derive(Clone, Debug)]
pub(super) struct Opt {
    embed_tokens: Embedding,
    embed_positions: Embedding,
    layers: Vec<Layer>,
    final_layer_norm: Option<LayerNorm>,
    lm_head: Linear,
}

#[derive(Clone, Debug)]
struct Layer {
    self_attn: Attention,
    self_attn_layer_norm: LayerNorm,
    fc1: Linear,
    activation: Activation,
    fc2: Linear,
    final_layer_norm: LayerNorm,
    norm_before: bool,
}

impl Opt {
    pub(super) fn load(weights: &Weights, config: &OptConfig) -> Result<Self> {
        config.check(weights)?;
        let (d, vocab_size) = (config.hidden_size, config.vocab_size);
        let decoder = weights.scope("model.decoder");
        let positions = config.max_position_embeddings + POSITION_OFFSET;
        let embed_tokens = Embedding::load(&decoder.scope("embed_tokens"), vocab_size, d)?;
        let lm_head = match weights.contains("lm_head.weight") {
            true => Linear::load_without_bias(&weights.scope("lm_head"), d, vocab_size)?,
            false => Linear::new(embed_tokens.weight().clone(), None), // tied
        };
        let layers = decoder.scope("layers");
        let final_norm = config.do_layer_norm_before && !config.remove_final_layer_norm;
        Ok(Self {
            embed_positions: Embedding::load(&decoder.scope("embed_positions"), positions, d)?,
            layers: (0..config.num_hidden_layers)
                .map(|number| Layer::load(&layers.scope(number), config))
                .collect::<Result<_>>()?,
            final_layer_norm: final_norm
                .then(|| LayerNorm::load(&decoder.scope("final_layer_norm"), d, LAYER_NORM_EPS))
                .transpose()?,
            lm_head,
            embed_tokens,
        })
    }

    /// The embeddings of `b` rows of `n` ids, `[b, n, d]`, without positions.
    pub(super) fn embed(&self, ids: &[u32], [b, n]: [usize; 2]) -> Tensor<3> {
        let ids = ids.iter().map(|&id| i64::from(id)).collect();
        let device = self.embed_tokens.weight().device();
        self.embed_tokens.forward(Tensor::<2, Int>::from_data(
            TensorData::new(ids, [b, n]),
            &device,
        ))
    }

    /// The logits `[b, vocab_size]` of the tokens after `inputs_embeds` `[b, n, d]`, which follow those in `cache` and
    /// are added to it.
    pub(super) fn forward(&self, inputs_embeds: Tensor<3>, cache: &mut Cache) -> Tensor<2> {
        let [b, n, d] = inputs_embeds.dims();
        let start = cache.first().map_or(0, |past| past.keys.dims()[1]);
        let positions = self.embed_positions.weight().clone();
        let positions = positions
            .narrow(0, start + POSITION_OFFSET, n)
            .unsqueeze::<3>();
        let mut x = inputs_embeds + positions;
        let past = std::mem::take(cache);
        for (number, layer) in self.layers.iter().enumerate() {
            let (output, key_values) = layer.forward(x, past.get(number), Mask::Causal);
            x = output;
            cache.push(key_values);
        }
        let last = x.narrow(1, n - 1, 1);
        let last = match &self.final_layer_norm {
            Some(norm) => norm.forward(last),
            None => last,
        };
        self.lm_head.forward(last.reshape([b, d]))
    }
}

impl Layer {
    fn load(weights: &Weights, config: &OptConfig) -> Result<Self> {
        let d = config.hidden_size;
        let linear = |weights: &Weights, d_in, d_out| match config.enable_bias {
            true => Linear::load(weights, d_in, d_out),
            false => Linear::load_without_bias(weights, d_in, d_out),
        };
        let attention = weights.scope("self_attn");
        let projection = |name: &str| linear(&attention.scope(name), d, d);
        let norm = |name: &str| LayerNorm::load(&weights.scope(name), d, LAYER_NORM_EPS);
        Ok(Self {
            self_attn: Attention {
                query: projection("q_proj")?,
                key: projection("k_proj")?,
                value: projection("v_proj")?,
                output: projection("out_proj")?,
                heads: config.num_attention_heads,
            },
            self_attn_layer_norm: norm("self_attn_layer_norm")?,
            fc1: linear(&weights.scope("fc1"), d, config.ffn_dim)?,
            activation: config.activation_function,
            fc2: linear(&weights.scope("fc2"), config.ffn_dim, d)?,
            final_layer_norm: norm("final_layer_norm")?,
            norm_before: config.do_layer_norm_before,
        })
    }

    fn forward(
        &self,
        x: Tensor<3>,
        past: Option<&KeyValues>,
        mask: Mask,
    ) -> (Tensor<3>, KeyValues) {
        let norm = |norm: &LayerNorm, x: Tensor<3>, here: bool| {
            if here { norm.forward(x) } else { x }
        };
        let (before, after) = (self.norm_before, !self.norm_before);

        let normed = norm(&self.self_attn_layer_norm, x.clone(), before);
        let context = self.self_attn.key_values(normed.clone()).after(past);
        let x = x + self.self_attn.forward(normed, &context, mask);
        let x = norm(&self.self_attn_layer_norm, x, after);

        let normed = norm(&self.final_layer_norm, x.clone(), before);
        let inner = self.activation.forward(self.fc1.forward(normed));
        let x = x + self.fc2.forward(inner);
        (norm(&self.final_layer_norm, x, after), context)
    }
}
