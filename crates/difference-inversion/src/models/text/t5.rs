//! T5's encoder, from token embeddings: transformers' `T5EncoderModel`
//! ([Raffel et al. 2020](https://arxiv.org/abs/1910.10683), version 1.1).

use std::path::Path;

use burn::tensor::{DType, Int, Tensor, TensorData, activation};
use serde::Deserialize;

use crate::models::denoiser::Memory;
use crate::models::layers::{
    Activation, Embedding, Linear, MOST_LAYERS, RmsNorm, weighted_attention,
};
use crate::models::text::tower::{Beginning, Encoded, Tower};
use crate::weights::Weights;
use crate::{Error, Result};

/// The token-embedding table, which some files hold twice.
const TABLE: &str = "shared";
const TABLE_AGAIN: &str = "encoder.embed_tokens";
/// The layers, by number.
const BLOCKS: &str = "encoder.block";

/// `config.json` of a `T5EncoderModel`; absent fields have transformers' defaults.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct T5Config {
    /// Rows of the token-embedding table.
    pub vocab_size: usize,
    /// The width d.
    pub d_model: usize,
    /// The width of each head.
    pub d_kv: usize,
    /// The inner width of each layer's network.
    pub d_ff: usize,
    /// The number of layers.
    pub num_layers: usize,
    /// Attention heads of each layer; their total width may differ from d.
    pub num_heads: usize,
    /// The number of distinguished distances between positions, in both directions together.
    pub relative_attention_num_buckets: usize,
    /// The distance beyond which distances are not distinguished.
    pub relative_attention_max_distance: usize,
    /// The small constant of the norms.
    pub layer_norm_epsilon: f64,
    /// `gated-gelu`, the network of version 1.1.
    pub feed_forward_proj: String,
}

impl Default for T5Config {
    fn default() -> Self {
        Self {
            vocab_size: 32128,
            d_model: 512,
            d_kv: 64,
            d_ff: 2048,
            num_layers: 6,
            num_heads: 8,
            relative_attention_num_buckets: 32,
            relative_attention_max_distance: 128,
            layer_norm_epsilon: 1e-6,
            feed_forward_proj: "relu".to_owned(),
        }
    }
}

impl T5Config {
    fn check(&self, path: &Path) -> Result<()> {
        let wrong = |field: &str, expected: &str, found: &dyn std::fmt::Debug| {
            Err(Error::unsupported(path, field, expected, found))
        };
        if self.feed_forward_proj != "gated-gelu" {
            return wrong(
                "feed_forward_proj",
                "\"gated-gelu\"",
                &self.feed_forward_proj,
            );
        }
        for (field, value, most) in [
            ("num_layers", self.num_layers, MOST_LAYERS),
            ("num_heads", self.num_heads, 1 << 10),
            ("d_kv", self.d_kv, 1 << 16),
            ("d_model", self.d_model, 1 << 16),
            ("d_ff", self.d_ff, 1 << 20),
        ] {
            if !(1..=most).contains(&value) {
                return wrong(field, &format!("1 to {most}"), &value);
            }
        }
        let buckets = self.relative_attention_num_buckets;
        if !(4..=1 << 16).contains(&buckets) || !buckets.is_multiple_of(4) {
            return wrong(
                "relative_attention_num_buckets",
                "a multiple of 4",
                &buckets,
            );
        }
        let distance = self.relative_attention_max_distance;
        if distance <= buckets / 4 {
            let expected = format!("more than {}", buckets / 4);
            return wrong("relative_attention_max_distance", &expected, &distance);
        }
        Ok(())
    }

    /// The number of the bias for a key at `distance` after the query. Half of the numbers are for each
    /// direction; the nearer half of these is for one distance each, the rest for ever wider ranges.
    fn bucket(&self, distance: i64) -> i64 {
        let each = self.relative_attention_num_buckets / 2;
        let (exact, far) = (each / 2, self.relative_attention_max_distance);
        let behind = if distance > 0 { each } else { 0 };
        let distance = usize::try_from(distance.unsigned_abs()).unwrap_or(usize::MAX);
        let bucket = if distance < exact {
            distance
        } else {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "the logarithm of a number of at least 1, of two positive numbers"
            )]
            let further = {
                // In f32, as in transformers: it determines the distance at which a range ends.
                let ratio = (distance as f32 / exact as f32).ln();
                let range = (far as f64 / exact as f64).ln() as f32;
                (ratio / range * (each - exact) as f32) as usize
            };
            (exact + further).min(each - 1)
        };
        i64::try_from(behind + bucket).unwrap_or(0)
    }
}

/// Attention and a gated network, each after its norm.
#[derive(Debug)]
struct Layer {
    attention_norm: RmsNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    network_norm: RmsNorm,
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Layer {
    fn load(weights: &Weights, config: &T5Config) -> Result<Self> {
        let (d, inner) = (config.d_model, config.num_heads * config.d_kv);
        let (attention, network) = (weights.scope("layer.0"), weights.scope("layer.1"));
        let norm = |weights: &Weights| {
            RmsNorm::load(&weights.scope("layer_norm"), d, config.layer_norm_epsilon)
        };
        let linear = |part: &str, name: &str, weights: &Weights, d_in, d_out| {
            Linear::load_without_bias(&weights.scope(part).scope(name), d_in, d_out)
        };
        let projection = |name, d_in, d_out| linear("SelfAttention", name, &attention, d_in, d_out);
        let dense = |name, d_in, d_out| linear("DenseReluDense", name, &network, d_in, d_out);
        Ok(Self {
            attention_norm: norm(&attention)?,
            query: projection("q", d, inner)?,
            key: projection("k", d, inner)?,
            value: projection("v", d, inner)?,
            output: projection("o", inner, d)?,
            network_norm: norm(&network)?,
            gate: dense("wi_0", d, config.d_ff)?,
            up: dense("wi_1", d, config.d_ff)?,
            down: dense("wo", config.d_ff, d)?,
        })
    }

    /// # Shapes
    /// `x` `[1, n, d]`, `bias` `[1, heads, n, n]`
    fn forward(&self, x: Tensor<3>, bias: &Tensor<4>, heads: usize) -> Tensor<3> {
        let normed = self.attention_norm.forward(x.clone());
        let [query, key, value] =
            [&self.query, &self.key, &self.value].map(|layer| layer.forward(normed.clone()));
        let width = query.dims()[2] / heads;
        // T5 does not divide the scores by √width.
        let weights = |scores: Tensor<4>| {
            activation::softmax(scores * (width as f64).sqrt() + bias.clone(), 3)
        };
        let attended = weighted_attention(query, key, value, heads, weights);
        let x = x + self.output.forward(attended);
        let normed = self.network_norm.forward(x.clone());
        let gate = Activation::GeluTanh.forward(self.gate.forward(normed.clone()));
        x + self.down.forward(gate * self.up.forward(normed))
    }
}

/// Where the layers are.
#[derive(Debug)]
enum Layers {
    /// In memory.
    Held(Vec<Layer>),
    /// In their files, from which one after the other is read for every prompt.
    Stored(Weights),
}

/// T5's encoder. It is bidirectional: nothing can be computed before the whole prompt is known.
/// Its weights are constants; gradients flow to the input embeddings.
#[derive(Debug)]
pub struct T5EncoderModel {
    config: T5Config,
    table: Embedding,
    layers: Layers,
    /// `[buckets, heads]`
    position_bias: Embedding,
    final_layer_norm: RmsNorm,
    masks_padding: bool,
}

impl T5EncoderModel {
    /// Builds the tower that `config` describes from `weights`, all of which it must use. With [`Memory::Low`], it
    /// holds one layer at a time, and only while it reads.
    ///
    /// # Errors
    /// [`Error::Config`] for a configuration that is not supported, and any error in a
    /// tensor.
    pub fn load(weights: &Weights, config: &T5Config, memory: Memory) -> Result<Self> {
        config.check(&weights.config_path())?;
        let encoder = weights.scope("encoder");
        let blocks = weights.scope(BLOCKS);
        let layers =
            (0..config.num_layers).map(|number| Layer::load(&blocks.scope(number), config));
        let layers = match memory {
            Memory::Normal => Layers::Held(layers.collect::<Result<_>>()?),
            Memory::Low => {
                // Errors are found now; each layer is dropped at once.
                layers.into_iter().try_for_each(|layer| layer.map(drop))?;
                Layers::Stored(blocks.clone())
            }
        };
        let name = match weights.contains(&format!("{TABLE}.weight")) {
            true => TABLE,
            false => TABLE_AGAIN,
        };
        let bias = blocks.scope("0.layer.0.SelfAttention.relative_attention_bias");
        let tower = Self {
            config: config.clone(),
            table: Embedding::load(&weights.scope(name), config.vocab_size, config.d_model)?,
            layers,
            position_bias: Embedding::load(
                &bias,
                config.relative_attention_num_buckets,
                config.num_heads,
            )?,
            final_layer_norm: RmsNorm::load(
                &encoder.scope("final_layer_norm"),
                config.d_model,
                config.layer_norm_epsilon,
            )?,
            masks_padding: false,
        };
        weights.check_all_used(&["encoder.embed_tokens.weight"])?;
        Ok(tower)
    }

    /// The same, which does not look at what stands behind the end of a prompt.
    #[must_use]
    pub fn masking_padding(self) -> Self {
        Self {
            masks_padding: true,
            ..self
        }
    }

    /// The configuration.
    pub fn config(&self) -> &T5Config {
        &self.config
    }

    /// The bytes of its weights that are in memory at once.
    pub(crate) fn bytes_in_memory(weights: &Weights, memory: Memory) -> u64 {
        let blocks = weights.scope(BLOCKS);
        match memory {
            Memory::Normal => weights.bytes_in_memory(),
            Memory::Low => {
                let sizes = (0..MOST_LAYERS).map(|number| blocks.scope(number).bytes_in_memory());
                let largest = sizes.max().unwrap_or(0);
                weights.bytes_in_memory() - blocks.bytes_in_memory() + largest
            }
        }
    }

    /// The bias added to the scores of `n` positions, of which those behind `end` may be padding, `[1, heads, n, n]`.
    fn bias(&self, n: usize, end: usize) -> Tensor<4> {
        let places = 0..i64::try_from(n).unwrap_or(0);
        let buckets: Vec<i64> = (places.clone())
            .flat_map(|query| places.clone().map(move |key| key - query))
            .map(|distance| self.config.bucket(distance))
            .collect();
        let table = self.position_bias.weight();
        let ids =
            Tensor::<2, Int>::from_data(TensorData::new(buckets, [1, n * n]), &table.device());
        let heads = self.config.num_heads;
        let bias = (self.position_bias.forward(ids)) // [1, n · n, heads]
            .reshape([1, n, n, heads])
            .permute([0, 3, 1, 2])
            .cast(DType::F32);
        if !self.masks_padding || end + 1 == n {
            return bias;
        }
        bias.slice_fill([0..1, 0..heads, 0..n, end + 1..n], f32::NEG_INFINITY)
    }
}

impl Tower for T5EncoderModel {
    fn table(&self) -> &Tensor<2> {
        self.table.weight()
    }

    /// Unlimited: only distances between positions matter.
    fn max_positions(&self) -> usize {
        usize::MAX
    }

    fn embed(&self, ids: &[u32]) -> Result<Tensor<2>> {
        self.table.rows(ids)
    }

    fn extend(&mut self, rows: usize, embeddings: Tensor<2>) {
        self.table.extend(rows, embeddings);
    }

    fn begin(&self, embeds: Tensor<2>) -> Result<Beginning> {
        Ok(Beginning::new(embeds))
    }

    fn reads_directions(&self) -> bool {
        true
    }

    fn masks_padding(&self) -> bool {
        self.masks_padding
    }

    fn finish(
        &self,
        beginning: Option<&Beginning>,
        rest: Tensor<2>,
        end: usize,
    ) -> Result<Encoded> {
        let before = beginning.and_then(Beginning::embeds).cloned();
        let parts = before.into_iter().chain([rest.unsqueeze()]);
        let mut x = Tensor::cat(parts.collect(), 1); // [1, n, d]
        let [_, n, d] = x.dims();
        if n == 0 || d != self.config.d_model || end >= n {
            return Err(Error::invalid_input(format!(
                "expected token embeddings of width {} that end at {end}, found [1, {n}, {d}]",
                self.config.d_model
            )));
        }
        let bias = self.bias(n, end);
        let heads = self.config.num_heads;
        match &self.layers {
            Layers::Held(layers) => {
                for layer in layers {
                    x = layer.forward(x, &bias, heads);
                }
            }
            Layers::Stored(blocks) => {
                for number in 0..self.config.num_layers {
                    x = Layer::load(&blocks.scope(number), &self.config)?.forward(x, &bias, heads);
                }
            }
        }
        let last_hidden_state = self.final_layer_norm.forward(x);
        Ok(Encoded {
            hidden_states: Vec::new(),
            pooled: last_hidden_state.clone().narrow(1, end, 1).squeeze_dim(1),
            last_hidden_state,
        })
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, FloatDType};

    use super::*;
    use crate::weights::read_config;

    #[test]
    fn with_low_memory_layers_stay_in_their_file_and_compute_the_same() {
        let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
        let folder = root.join("tests/golden/sd3/text_encoder_3");
        let config: T5Config = read_config(&folder.join("config.json")).unwrap();
        let [held, stored] = [Memory::Normal, Memory::Low].map(|memory| {
            let weights = Weights::open(&folder, &Device::flex(), FloatDType::F32).unwrap();
            let tower = T5EncoderModel::load(&weights, &config, memory).unwrap();
            let embeds = tower.embed(&[3, 4, 5, 1, 0, 0]).unwrap();
            let encoded = tower.finish(None, embeds, 3).unwrap();
            (tower.layers, encoded.last_hidden_state.into_data())
        });
        assert!(matches!(held.0, Layers::Held(layers) if layers.len() == config.num_layers));
        assert!(matches!(stored.0, Layers::Stored(_)));
        assert_eq!(held.1, stored.1);
    }

    #[test]
    fn distances_share_buckets_the_further_the_more() {
        let config = T5Config {
            feed_forward_proj: "gated-gelu".to_owned(),
            ..T5Config::default()
        };
        assert!(config.check(Path::new("x")).is_ok());
        let found = [0, -1, -7, -8, -11, -12, -15, -16, -90, -91, -127, -5000];
        let found = found.map(|distance| config.bucket(distance));
        assert_eq!(found, [0, 1, 7, 8, 8, 9, 9, 10, 14, 15, 15, 15]);
        assert_eq!([1, 7, 8, 5000].map(|d| config.bucket(d)), [17, 23, 24, 31]);
    }

    #[test]
    fn the_network_of_version_1_is_refused() {
        let error = T5Config::default().check(Path::new("x")).unwrap_err();
        let message = error.to_string();
        assert!(message.contains("field `feed_forward_proj`"), "{message}");
        assert!(message.contains("gated-gelu"), "{message}");
    }
}
