//! Qwen3 as a text encoder, from token embeddings: the first layers of transformers' `Qwen3ForCausalLM`
//! ([Qwen Team 2025](https://arxiv.org/abs/2505.09388)).

use std::path::Path;

use burn::tensor::Tensor;
use dinv_kernels::gradient::recomputed_tokens;
use serde::Deserialize;
use serde_json::Value;

use crate::models::attention::KeyValues;
use crate::models::layers::{
    Activation, Embedding, Linear, MOST_LAYERS, Mask, RmsNorm, multi_head_attention,
};
use crate::models::rotation::{Pairs, Rotation};
use crate::models::text::tower::{Beginning, Encoded, Tower};
use crate::weights::Weights;
use crate::{Error, Result};

/// The prefix of the keys of a tower that was saved with its language model's head.
const PREFIX: &str = "model";
/// The token-embedding table.
const TABLE: &str = "embed_tokens";
/// The default θ.
const THETA: f64 = 10_000.0;

/// `config.json` of a `Qwen3ForCausalLM`; absent fields have transformers' defaults.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct Qwen3Config {
    /// `qwen3`.
    pub model_type: String,
    /// Rows of the token-embedding table.
    pub vocab_size: usize,
    /// The width d.
    pub hidden_size: usize,
    /// The inner width of each layer's network.
    pub intermediate_size: usize,
    /// The number of layers.
    pub num_hidden_layers: usize,
    /// Heads of queries; their total width may differ from d.
    pub num_attention_heads: usize,
    /// Heads of keys and values, each shared by some heads of queries; null means the same number.
    pub num_key_value_heads: Option<usize>,
    /// The width of each head.
    pub head_dim: usize,
    /// `silu`.
    pub hidden_act: String,
    /// The most positions.
    pub max_position_embeddings: usize,
    /// The small constant of the norms.
    pub rms_norm_eps: f64,
    /// Whether projections have a bias; not supported.
    pub attention_bias: bool,
    /// Whether some layers attend only to near positions; not supported.
    pub use_sliding_window: bool,
    /// The base θ of the rotary positions' frequencies, as transformers wrote it before version 5.
    pub rope_theta: Option<f64>,
    /// How positions are scaled, as transformers wrote it before version 5; not supported.
    pub rope_scaling: Option<Value>,
    /// Both of these since version 5.
    pub rope_parameters: Option<Value>,
    /// How the weights are quantised; not supported.
    pub quantization_config: Option<Value>,
}

impl Default for Qwen3Config {
    fn default() -> Self {
        Self {
            model_type: "qwen3".to_owned(),
            vocab_size: 151_936,
            hidden_size: 4096,
            intermediate_size: 22_016,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: Some(32),
            head_dim: 128,
            hidden_act: "silu".to_owned(),
            max_position_embeddings: 32_768,
            rms_norm_eps: 1e-6,
            attention_bias: false,
            use_sliding_window: false,
            rope_theta: None,
            rope_scaling: None,
            rope_parameters: None,
            quantization_config: None,
        }
    }
}

impl Qwen3Config {
    fn key_value_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    /// θ
    fn theta(&self) -> f64 {
        let parameters = self.rope_parameters.as_ref();
        let theta = parameters.and_then(|parameters| parameters["rope_theta"].as_f64());
        theta.or(self.rope_theta).unwrap_or(THETA)
    }

    fn check(&self, path: &Path) -> Result<()> {
        let wrong = |field: &str, expected: &str, found: &dyn std::fmt::Debug| {
            Err(Error::unsupported(path, field, expected, found))
        };
        for (field, found, expected) in [
            ("model_type", &self.model_type, "qwen3"),
            ("hidden_act", &self.hidden_act, "silu"),
        ] {
            if found != expected {
                return wrong(field, &format!("{expected:?}"), found);
            }
        }
        for (field, found) in [
            ("attention_bias", self.attention_bias),
            ("use_sliding_window", self.use_sliding_window),
        ] {
            if found {
                return wrong(field, "false", &found);
            }
        }
        if let Some(found) = &self.quantization_config {
            return wrong("quantization_config", "no such field", &found.to_string());
        }
        for (field, stretched) in [
            ("rope_scaling", &self.rope_scaling),
            ("rope_parameters", &self.rope_parameters),
        ] {
            let Some(stretched) = stretched else { continue };
            let kinds = ["rope_type", "type"].map(|kind| stretched[kind].as_str());
            if kinds.into_iter().flatten().any(|kind| kind != "default") {
                return wrong(field, "plain positions", &stretched.to_string());
            }
        }
        for (field, value, most) in [
            ("num_hidden_layers", self.num_hidden_layers, MOST_LAYERS),
            ("num_attention_heads", self.num_attention_heads, 1 << 10),
            ("num_key_value_heads", self.key_value_heads(), 1 << 10),
            ("head_dim", self.head_dim, 1 << 16),
            ("hidden_size", self.hidden_size, 1 << 16),
            ("intermediate_size", self.intermediate_size, 1 << 20),
        ] {
            if !(1..=most).contains(&value) {
                return wrong(field, &format!("1 to {most}"), &value);
            }
        }
        if !self.head_dim.is_multiple_of(2) {
            return wrong("head_dim", "an even number", &self.head_dim);
        }
        let (heads, shared) = (self.num_attention_heads, self.key_value_heads());
        if !heads.is_multiple_of(shared) {
            let expected = format!("a number that divides {heads}, the heads of queries");
            return wrong("num_key_value_heads", &expected, &shared);
        }
        if !(1.0..=1e12).contains(&self.theta()) {
            return wrong("rope_theta", "1 to 1000000000000", &self.theta());
        }
        Ok(())
    }
}

/// The number of the layer that a tensor belongs to.
fn layer_of(key: &str) -> Option<usize> {
    let rest = key.strip_prefix("model.").unwrap_or(key);
    rest.strip_prefix("layers.")?
        .split('.')
        .next()?
        .parse()
        .ok()
}

/// Whether a tower needs this tensor if the outputs of `layers`, without the last layer's, are read.
pub fn needs(key: &str, layers: &[usize]) -> bool {
    let is_table = key.strip_prefix("model.").unwrap_or(key).starts_with(TABLE);
    let last = layers.iter().copied().max().unwrap_or(0);
    is_table || layer_of(key).is_some_and(|number| number < last)
}

/// Attention and a gated network, each after its norm.
#[derive(Debug, Clone)]
struct Layer {
    heads: usize,
    /// Heads of queries for each head of keys.
    shared: usize,
    attention_norm: RmsNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    query_norm: RmsNorm,
    key_norm: RmsNorm,
    output: Linear,
    network_norm: RmsNorm,
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Layer {
    fn load(weights: &Weights, config: &Qwen3Config) -> Result<Self> {
        let (d, head, inner) = (
            config.hidden_size,
            config.head_dim,
            config.intermediate_size,
        );
        let (heads, few) = (config.num_attention_heads, config.key_value_heads());
        let (attention, network) = (weights.scope("self_attn"), weights.scope("mlp"));
        let norm = |weights: &Weights, name: &str, d| {
            RmsNorm::load(&weights.scope(name), d, config.rms_norm_eps)
        };
        let linear = |weights: &Weights, name: &str, d_in, d_out| {
            Linear::load_without_bias(&weights.scope(name), d_in, d_out)
        };
        Ok(Self {
            heads,
            shared: heads / few,
            attention_norm: norm(weights, "input_layernorm", d)?,
            query: linear(&attention, "q_proj", d, heads * head)?,
            key: linear(&attention, "k_proj", d, few * head)?,
            value: linear(&attention, "v_proj", d, few * head)?,
            query_norm: norm(&attention, "q_norm", head)?,
            key_norm: norm(&attention, "k_norm", head)?,
            output: linear(&attention, "o_proj", heads * head, d)?,
            network_norm: norm(weights, "post_attention_layernorm", d)?,
            gate: linear(&network, "gate_proj", d, inner)?,
            up: linear(&network, "up_proj", d, inner)?,
            down: linear(&network, "down_proj", inner, d)?,
        })
    }

    /// `x` after the layer, and the keys and values of all positions up to the prompt's end. The first `words`
    /// tokens of `x` belong to the prompt; the rest is padding, which attends to the prompt and which nothing
    /// attends to.
    ///
    /// # Shapes
    /// `x` `[1, n, d]` after the positions of `past`
    fn forward(
        &self,
        x: Tensor<3>,
        past: Option<&KeyValues>,
        words: usize,
        rotation: &Rotation,
    ) -> (Tensor<3>, KeyValues) {
        let n = x.dims()[1];
        let normed = self.attention_norm.forward(x.clone());
        let seen = normed.clone().narrow(1, 0, words);
        let query = rotation.turn(self.query_norm.forward_heads(self.query.forward(normed)));
        let key = self.key_norm.forward_heads(self.key.forward(seen.clone()));
        let own = KeyValues {
            keys: rotation.turn(key),
            values: self.value.forward(seen),
        };
        let all = own.after(past);
        let [keys, values] = [&all.keys, &all.values].map(|one| self.for_queries(one.clone()));
        let attend = |start, length, mask| {
            let query = query.clone().narrow(1, start, length);
            multi_head_attention(query, keys.clone(), values.clone(), self.heads, mask)
        };
        let mut attended = attend(0, words, Mask::Causal);
        if n > words {
            let padding = attend(words, n - words, Mask::None);
            attended = Tensor::cat(vec![attended, padding], 1);
        }
        let x = x + self.output.forward(attended);
        let normed = self.network_norm.forward(x.clone());
        let gate = Activation::Silu.forward(self.gate.forward(normed.clone()));
        (x + self.down.forward(gate * self.up.forward(normed)), all)
    }

    /// Heads of keys or values, repeated for every head of queries that shares them.
    fn for_queries(&self, x: Tensor<3>) -> Tensor<3> {
        let [b, n, c] = x.dims();
        let few = self.heads / self.shared;
        x.reshape([b, n, few, 1, c / few])
            .repeat_dim(3, self.shared)
            .reshape([b, n, c * self.shared])
    }

    /// The output of [`forward`](Self::forward), but nothing inside the layer is kept for the backward pass,
    /// which computes it again: at full length, the inside of all layers would be several gigabytes.
    fn recomputed(
        &self,
        x: Tensor<3>,
        past: Option<&KeyValues>,
        words: usize,
        rotation: &Rotation,
    ) -> Tensor<3> {
        let (layer, past, rotation) = (self.clone(), past.cloned(), rotation.clone());
        recomputed_tokens(x, move |x| {
            layer.forward(x, past.as_ref(), words, &rotation).0
        })
    }
}

/// The first layers of Qwen3. It is causal, and padding after a prompt is masked: it attends only to the prompt,
/// and nothing attends to it. Its weights are constants; gradients flow to the input embeddings.
#[derive(Debug)]
pub struct Qwen3Model {
    config: Qwen3Config,
    table: Embedding,
    layers: Vec<Layer>,
    /// The layers whose outputs are read, counted from 1, in their order.
    read: Vec<usize>,
    /// The norm after the last layer, if that is read.
    norm: Option<RmsNorm>,
}

impl Qwen3Model {
    /// Builds the tower that `config` describes from `weights`, up to the last of `layers`, whose outputs are
    /// read: counted from 1 and ascending. The output of the tower's last layer is read after the final norm,
    /// as in transformers.
    ///
    /// # Errors
    /// [`Error::Config`] for a configuration that is not supported or has too few layers, and any error in a
    /// tensor.
    pub fn load(weights: &Weights, config: &Qwen3Config, layers: &[usize]) -> Result<Self> {
        let path = weights.config_path();
        config.check(&path)?;
        let last = layers.iter().copied().max().unwrap_or(0);
        if config.num_hidden_layers < last {
            let expected =
                format!("at least {last}, since the outputs of layers {layers:?} are read");
            let found = config.num_hidden_layers;
            return Err(Error::unsupported(
                &path,
                "num_hidden_layers",
                &expected,
                found,
            ));
        }
        let tower = match weights.scope(PREFIX).is_empty() {
            true => weights.clone(),
            false => weights.scope(PREFIX),
        };
        let of_layers = tower.scope("layers");
        let norm = || {
            RmsNorm::load(
                &tower.scope("norm"),
                config.hidden_size,
                config.rms_norm_eps,
            )
        };
        let model = Self {
            config: config.clone(),
            table: Embedding::load(&tower.scope(TABLE), config.vocab_size, config.hidden_size)?,
            layers: (0..last)
                .map(|number| Layer::load(&of_layers.scope(number), config))
                .collect::<Result<_>>()?,
            read: layers.to_vec(),
            norm: (last == config.num_hidden_layers).then(norm).transpose()?,
        };
        // Ignores everything after the last layer that is read.
        weights.ignore(|key| {
            let behind = layer_of(key)
                .is_some_and(|number| (last..config.num_hidden_layers).contains(&number));
            behind || ["lm_head.weight", "model.norm.weight", "norm.weight"].contains(&key)
        });
        weights.check_all_used(&[])?;
        Ok(model)
    }

    /// The configuration.
    pub fn config(&self) -> &Qwen3Config {
        &self.config
    }

    /// Checks the embeddings to read after `start` positions, and returns the rotation for their positions.
    fn rotation(&self, x: &Tensor<3>, start: usize, end: usize) -> Result<Rotation> {
        let ([_, n, d], config) = (x.dims(), &self.config);
        let most = config.max_position_embeddings;
        if n == 0
            || d != config.hidden_size
            || start + n > most
            || !(start..start + n).contains(&end)
        {
            return Err(Error::invalid_input(format!(
                "expected token embeddings of width {} at most to position {most}, of a prompt that ends among \
                 them, found [1, {n}, {d}] from position {start} of a prompt that ends at {end}",
                config.hidden_size
            )));
        }
        let places: Vec<[usize; 1]> = (start..start + n).map(|place| [place]).collect();
        let device = x.device().without_autodiff();
        let (widths, theta) = ([config.head_dim], config.theta());
        Ok(Rotation::new(
            &places,
            widths,
            theta,
            Pairs::Halves,
            &device,
        ))
    }

    /// Whether the output of the layer `number`, counted from 0, is read.
    fn is_read(&self, number: usize) -> bool {
        self.read.contains(&(number + 1))
    }

    /// A layer's output in the form in which it is read.
    fn seen(&self, number: usize, x: &Tensor<3>) -> Tensor<3> {
        let is_last = number + 1 == self.config.num_hidden_layers;
        match self.norm.as_ref().filter(|_| is_last) {
            Some(norm) => norm.forward(x.clone()),
            None => x.clone(),
        }
    }
}

impl Tower for Qwen3Model {
    fn table(&self) -> &Tensor<2> {
        self.table.weight()
    }

    fn max_positions(&self) -> usize {
        self.config.max_position_embeddings
    }

    fn embed(&self, ids: &[u32]) -> Result<Tensor<2>> {
        self.table.rows(ids)
    }

    fn extend(&mut self, rows: usize, embeddings: Tensor<2>) {
        self.table.extend(rows, embeddings);
    }

    fn begin(&self, embeds: Tensor<2>) -> Result<Beginning> {
        let mut x: Tensor<3> = embeds.unsqueeze(); // [1, n, d]
        let n = x.dims()[1];
        let rotation = self.rotation(&x, 0, n.saturating_sub(1))?;
        let mut beginning = Beginning {
            hidden_states: vec![x.clone()],
            ..Beginning::default()
        };
        for (number, layer) in self.layers.iter().enumerate() {
            let (output, key_values) = layer.forward(x, None, n, &rotation);
            x = output;
            beginning.layers.push(key_values);
            if self.is_read(number) {
                beginning.hidden_states.push(self.seen(number, &x));
            }
        }
        Ok(beginning)
    }

    fn finish(
        &self,
        beginning: Option<&Beginning>,
        rest: Tensor<2>,
        end: usize,
    ) -> Result<Encoded> {
        let start = beginning.map_or(0, Beginning::len);
        let mut x: Tensor<3> = rest.unsqueeze(); // [1, n, d]
        let rotation = self.rotation(&x, start, end)?;
        let words = end + 1 - start;
        let mut hidden_states = Vec::with_capacity(self.read.len());
        for (number, layer) in self.layers.iter().enumerate() {
            let past = beginning.and_then(|beginning| beginning.layers.get(number));
            x = layer.recomputed(x, past, words, &rotation);
            if self.is_read(number) {
                let before = beginning
                    .and_then(|beginning| beginning.hidden_states.get(1 + hidden_states.len()));
                let parts = before.cloned().into_iter().chain([self.seen(number, &x)]);
                hidden_states.push(Tensor::cat(parts.collect(), 1)); // [1, start + n, d]
            }
        }
        let Some(last) = hidden_states.last().cloned() else {
            return Err(Error::invalid_input(
                "a text encoder is read after one of its layers",
            ));
        };
        Ok(Encoded {
            pooled: last.clone().narrow(1, end, 1).squeeze_dim(1),
            last_hidden_state: last,
            hidden_states,
        })
    }

    fn reads_directions(&self) -> bool {
        true
    }

    fn masks_padding(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn theta_is_found_where_either_version_of_transformers_wrote_it() {
        let theta = |json: Value| {
            let config: Qwen3Config = serde_json::from_value(json).unwrap();
            config.theta()
        };
        assert_eq!(theta(serde_json::json!({})), 1e4);
        assert_eq!(theta(serde_json::json!({ "rope_theta": 1_000_000 })), 1e6);
        let parameters = serde_json::json!({ "rope_type": "default", "rope_theta": 5e5 });
        assert_eq!(
            theta(serde_json::json!({ "rope_parameters": parameters })),
            5e5
        );
    }

    #[test]
    fn what_is_computed_otherwise_is_refused() {
        let message = |json: Value| {
            let config: Qwen3Config = serde_json::from_value(json).unwrap();
            config.check(Path::new("x")).unwrap_err().to_string()
        };
        for (json, expected) in [
            (
                serde_json::json!({ "model_type": "mistral" }),
                "`model_type`: expected \"qwen3\"",
            ),
            (
                serde_json::json!({ "hidden_act": "gelu" }),
                "`hidden_act`: expected \"silu\"",
            ),
            (
                serde_json::json!({ "attention_bias": true }),
                "`attention_bias`: expected false",
            ),
            (
                serde_json::json!({ "use_sliding_window": true }),
                "`use_sliding_window`",
            ),
            (
                serde_json::json!({ "rope_scaling": { "type": "yarn" } }),
                "`rope_scaling`",
            ),
            (
                serde_json::json!({ "rope_parameters": { "rope_type": "yarn" } }),
                "`rope_parameters`: expected plain positions",
            ),
            (
                serde_json::json!({ "num_key_value_heads": 5 }),
                "a number that divides 32",
            ),
            (
                serde_json::json!({ "head_dim": 7 }),
                "`head_dim`: expected an even number",
            ),
            (
                serde_json::json!({ "quantization_config": {} }),
                "`quantization_config`",
            ),
        ] {
            let message = message(json);
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn what_lies_behind_the_last_layer_that_is_read_is_not_needed() {
        let needed = |key: &str| needs(key, &[9, 27]);
        assert!(needed("model.embed_tokens.weight") && needed("layers.26.mlp.up_proj.weight"));
        let others = [
            "model.layers.27.mlp.up_proj.weight",
            "model.norm.weight",
            "lm_head.weight",
        ];
        assert!(!others.into_iter().any(needed));
    }
}
