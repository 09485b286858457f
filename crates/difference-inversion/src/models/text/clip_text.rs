//! CLIP's text tower, from token embeddings, so that learned tokens can be inserted.

use std::any::Any;
use std::path::Path;
use std::sync::Arc;

use burn::tensor::{Device, FloatDType, Tensor};
use serde::Deserialize;

use crate::models::layers::{Activation, Embedding, LayerNorm, Linear, Mask, share};
use crate::models::text::clip::{
    EncoderLayer, IGNORED, LayerSizes, joint_projection, open_tower, tower_weights,
};
use crate::models::text::tower::{Beginning, Encoded, Tower, no_projection};
use crate::weights::Weights;
use crate::{Error, Result};

/// `config.json` of transformers' `CLIPTextModel`; absent fields have its defaults
/// (those of `openai/clip-vit-base-patch32`).
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct ClipTextConfig {
    /// Rows of the token-embedding table.
    pub vocab_size: usize,
    /// The width `d`.
    pub hidden_size: usize,
    /// The inner width of each layer's network.
    pub intermediate_size: usize,
    /// The number of layers.
    pub num_hidden_layers: usize,
    /// Attention heads per layer.
    pub num_attention_heads: usize,
    /// The longest prompt, start and end included.
    pub max_position_embeddings: usize,
    /// `quick_gelu` for OpenAI's CLIP, `gelu` for OpenCLIP.
    pub hidden_act: Activation,
    /// The small constant of the norms.
    pub layer_norm_eps: f64,
    /// The id where the pooled output is read; 2 means "the largest id" (see
    /// [`ClipTextModel::eos_position`]).
    pub eos_token_id: u32,
}

impl Default for ClipTextConfig {
    fn default() -> Self {
        Self {
            vocab_size: 49408,
            hidden_size: 512,
            intermediate_size: 2048,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 77,
            hidden_act: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
            eos_token_id: 49407,
        }
    }
}

/// The name of the token-embedding table.
const TABLE: &str = "embeddings.token_embedding.weight";

/// The approximate bytes that [`ClipTextModel::share`] would share between the towers in two files, judged
/// by the first layer's queries.
///
/// # Errors
/// If a file is invalid; the error names it.
pub fn shared_bytes(one: &Weights, other: &Weights) -> Result<u64> {
    let towers = [one, other].map(|weights| tower_weights(weights, "text_model", TABLE));
    let queries = (towers.each_ref()).map(|tower| tower.scope("encoder.layers.0.self_attn.q_proj"));
    let [Some(shape), Some(same)] = queries.each_ref().map(|query| query.shape("weight")) else {
        return Ok(0);
    };
    let (&[rows, columns], true) = (&shape[..], shape == same) else {
        return Ok(0);
    };
    let [own, other] = queries.map(|query| query.matrix("weight", [rows, columns]));
    let bytes = towers.map(|tower| tower.bytes_in_memory());
    Ok(match share(&mut own?, &other?) {
        0 => 0,
        _ => bytes[0].min(bytes[1]),
    })
}

/// CLIP's text tower: transformers' `CLIPTextModel`, `CLIPTextModelWithProjection`, or the one in
/// a `CLIPModel`. Its weights are constants; gradients flow to the input embeddings.
#[derive(Clone, Debug)]
pub struct ClipTextModel {
    config: ClipTextConfig,
    token_embedding: Embedding,
    position_embedding: Embedding,
    layers: Vec<EncoderLayer>,
    final_layer_norm: LayerNorm,
    text_projection: Option<Linear>,
    projection_dim: Option<usize>,
}

impl ClipTextModel {
    /// Opens a folder that holds only the text tower, such as `text_encoder` of a pipeline.
    ///
    /// # Errors
    /// When `config.json` or the weights are missing, damaged, or do not match.
    pub fn open(dir: &Path, device: &Device, dtype: FloatDType) -> Result<Self> {
        open_tower(dir, device, dtype, Self::load)
    }

    /// Builds the tower that `config` describes from `weights` that hold nothing else except layers after
    /// the last one: a configuration with fewer layers makes `clip_skip` permanent.
    ///
    /// # Errors
    /// As [`load`](Self::load), or if some tensors are left over.
    pub fn load_alone(weights: &Weights, config: &ClipTextConfig) -> Result<Self> {
        let tower = Self::load(weights, config)?;
        let layers = tower_weights(weights, "text_model", TABLE).scope("encoder.layers");
        layers.ignore(|key| {
            let number = key.split('.').next().and_then(|number| number.parse().ok());
            number.is_some_and(|number: usize| number >= config.num_hidden_layers)
        });
        weights.check_all_used(&IGNORED)?;
        Ok(tower)
    }

    /// Reads the tower under `text_model.` (or without a prefix, as transformers 5 saves it), and
    /// `text_projection.weight` if present.
    ///
    /// # Errors
    /// When a tensor is missing or its shape differs from `config`.
    pub fn load(weights: &Weights, config: &ClipTextConfig) -> Result<Self> {
        let sizes = LayerSizes {
            hidden_size: config.hidden_size,
            intermediate_size: config.intermediate_size,
            num_attention_heads: config.num_attention_heads,
            hidden_act: config.hidden_act,
            layer_norm_eps: config.layer_norm_eps,
        };
        sizes.check(weights)?;
        let d = config.hidden_size;
        let tower = tower_weights(weights, "text_model", TABLE);
        let embeddings = tower.scope("embeddings");
        let table = |name: &str, rows| Embedding::load(&embeddings.scope(name), rows, d);
        let layers = tower.scope("encoder.layers");
        Ok(Self {
            token_embedding: table("token_embedding", config.vocab_size)?,
            position_embedding: table("position_embedding", config.max_position_embeddings)?,
            layers: (0..config.num_hidden_layers)
                .map(|number| EncoderLayer::load(&layers.scope(number), &sizes))
                .collect::<Result<_>>()?,
            final_layer_norm: LayerNorm::load(
                &tower.scope("final_layer_norm"),
                d,
                config.layer_norm_eps,
            )?,
            text_projection: joint_projection(weights, "text_projection", d)?,
            projection_dim: (weights.shape("text_projection.weight"))
                .and_then(|shape| shape.first().copied()),
            config: config.clone(),
        })
    }

    /// Replaces its weights by those of `other` wherever both are equal, so that two copies of a tower
    /// need the memory of one. Its output stays the same. Returns the number of shared
    /// bytes.
    pub fn share(&mut self, other: &Self) -> u64 {
        let layers = self.layers.iter_mut().zip(&other.layers);
        self.token_embedding.share(&other.token_embedding)
            + self.position_embedding.share(&other.position_embedding)
            + layers.map(|(own, other)| own.share(other)).sum::<u64>()
            + self.final_layer_norm.share(&other.final_layer_norm)
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &ClipTextConfig {
        &self.config
    }

    /// The width of the joint space, if there is a `text_projection`.
    #[must_use]
    pub fn projection_dim(&self) -> Option<usize> {
        self.projection_dim
    }

    /// The token-embedding table, `[vocab_size, d]`.
    #[must_use]
    pub fn token_embeddings(&self) -> &Tensor<2> {
        self.token_embedding.weight()
    }

    /// The embeddings of token ids, without positions.
    ///
    /// # Shapes
    /// `b` prompts of `n` ids each to `[b, n, d]`.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] for prompts of different lengths, no ids at all, or an id that is
    /// not in the table.
    pub fn embed_tokens(&self, ids: &[Vec<u32>]) -> Result<Tensor<3>> {
        let n = ids.first().map_or(0, Vec::len);
        if n == 0 || ids.iter().any(|prompt| prompt.len() != n) {
            return Err(Error::invalid_input(
                "prompts of one and the same length are needed",
            ));
        }
        let rows = self.token_embedding.rows(&ids.concat())?; // [b · n, d]
        Ok(rows.reshape([ids.len(), n, self.config.hidden_size]))
    }

    /// Where the pooled output of a prompt is read, as in transformers: at the first
    /// `eos_token_id`; or, if the configuration says 2 (as in older files, whose field was wrong, such as
    /// Stable Diffusion's), at the first of the largest ids.
    #[must_use]
    pub fn eos_position(&self, ids: &[u32]) -> usize {
        let wanted = match self.config.eos_token_id {
            2 => ids.iter().max().copied().unwrap_or_default(),
            eos => eos,
        };
        ids.iter().position(|&id| id == wanted).unwrap_or(0)
    }

    /// Encodes prompts given as token embeddings.
    ///
    /// # Shapes
    /// `inputs_embeds`: `[b, n, d]` without positions, `n` at most `max_position_embeddings`;
    /// `eos_positions`: where each of the `b` prompts ends, below `n`.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] for other shapes.
    pub fn forward_embeds(
        &self,
        inputs_embeds: Tensor<3>,
        eos_positions: &[usize],
    ) -> Result<Encoded> {
        let cache = self.encode(None, None, inputs_embeds)?;
        self.output(cache.hidden_states, eos_positions)
    }

    /// Encodes the beginning of prompts, to be reused.
    ///
    /// # Shapes
    /// As [`forward_embeds`](Self::forward_embeds).
    ///
    /// # Errors
    /// As [`forward_embeds`](Self::forward_embeds).
    pub fn prefix(&self, inputs_embeds: Tensor<3>) -> Result<Beginning> {
        self.encode(None, None, inputs_embeds)
    }

    /// Encodes the rest of prompts that begin with `prefix`. The output is that of
    /// [`forward_embeds`](Self::forward_embeds) for the whole prompts, at the cost of the rest.
    ///
    /// # Shapes
    /// `inputs_embeds`: `[b, n, d]` with the prefix's `b`; `eos_positions` count from the
    /// beginning of the prefix; all outputs are of the whole length.
    ///
    /// # Errors
    /// As [`forward_embeds`](Self::forward_embeds).
    pub fn forward_embeds_after(
        &self,
        prefix: &Beginning,
        inputs_embeds: Tensor<3>,
        eos_positions: &[usize],
    ) -> Result<Encoded> {
        let rest = self.encode(Some(prefix), None, inputs_embeds)?;
        let whole = prefix.hidden_states.iter().cloned().zip(rest.hidden_states);
        let whole = whole
            .map(|(before, after)| Tensor::cat(vec![before, after], 1))
            .collect();
        self.output(whole, eos_positions)
    }

    /// The final norm, for reading an earlier layer through it (diffusers' `clip_skip`).
    #[must_use]
    pub fn final_layer_norm(&self, hidden_state: Tensor<3>) -> Tensor<3> {
        self.final_layer_norm.forward(hidden_state)
    }

    /// Unnormalised pooled outputs in the joint space.
    ///
    /// # Shapes
    /// `[b, d]` to `[b, projection_dim]`
    ///
    /// # Errors
    /// [`Error::InvalidInput`] when the checkpoint has no `text_projection`.
    pub fn project(&self, pooled: Tensor<2>) -> Result<Tensor<2>> {
        match &self.text_projection {
            Some(projection) => Ok(projection.forward(pooled)),
            None => Err(no_projection()),
        }
    }

    /// The hidden states of `inputs_embeds` after `past`, and the keys and values of both. Without a past, the
    /// first `padding` of each row are ignored.
    fn encode(
        &self,
        past: Option<&Beginning>,
        padding: Option<Arc<[usize]>>,
        inputs_embeds: Tensor<3>,
    ) -> Result<Beginning> {
        let [b, n, d] = inputs_embeds.dims();
        let start = past.map_or(0, Beginning::len);
        let longest = self.config.max_position_embeddings;
        let past_b = past
            .and_then(|past| past.hidden_states.first())
            .map_or(b, |x| x.dims()[0]);
        if n == 0 || start + n > longest || d != self.config.hidden_size || b != past_b {
            return Err(Error::invalid_input(format!(
                "expected token embeddings [{past_b}, 1 to {}, {}], found [{b}, {n}, {d}]",
                longest.saturating_sub(start),
                self.config.hidden_size,
            )));
        }
        let padding = past.map_or(padding, |past| past.padding.clone());
        let (positions, mask) = match &padding {
            None => {
                let table = self.position_embedding.weight().clone();
                (table.narrow(0, start, n).unsqueeze(), Mask::Causal)
            }
            Some(padding) => {
                let positions = padding.iter().flat_map(|padding| {
                    (start..start + n).map(|place| place.saturating_sub(*padding) as u32)
                });
                let positions: Vec<u32> = positions.collect();
                let rows = self.position_embedding.rows(&positions)?;
                (rows.reshape([b, n, d]), Mask::CausalAfter(padding.clone()))
            }
        };
        let mut x = inputs_embeds + positions;
        let mut cache = Beginning {
            hidden_states: vec![x.clone()],
            padding,
            ..Beginning::default()
        };
        for (number, layer) in self.layers.iter().enumerate() {
            let past = past.map(|past| &past.layers[number]);
            let (output, key_values) = layer.forward(x, past, mask.clone());
            x = output;
            cache.layers.push(key_values);
            cache.hidden_states.push(x.clone());
        }
        Ok(cache)
    }

    fn output(&self, hidden_states: Vec<Tensor<3>>, eos: &[usize]) -> Result<Encoded> {
        let Some(last) = hidden_states.last() else {
            return Err(Error::invalid_input(
                "a text encoder has at least its embeddings",
            ));
        };
        check_positions(last, eos)?;
        let last_hidden_state = self.final_layer_norm.forward(last.clone());
        let pooled = at(last_hidden_state.clone(), eos);
        Ok(Encoded {
            hidden_states,
            last_hidden_state,
            pooled,
        })
    }
}

/// Checks that there is a position for each row of states `[b, n, d]`.
fn check_positions(states: &Tensor<3>, positions: &[usize]) -> Result<()> {
    let [b, n, _] = states.dims();
    if positions.len() == b && positions.iter().all(|&position| position < n) {
        return Ok(());
    }
    Err(Error::invalid_input(format!(
        "expected {b} end positions below {n}, found {positions:?}"
    )))
}

/// The state of each row at its position, `[b, n, d]` to `[b, d]`.
fn at(states: Tensor<3>, positions: &[usize]) -> Tensor<2> {
    let [b, _, d] = states.dims();
    if let Some(&first) = positions.first()
        && positions.iter().all(|&position| position == first)
    {
        return states.narrow(1, first, 1).reshape([b, d]);
    }
    let rows = positions.iter().enumerate().map(|(row, &position)| {
        let state = states.clone().narrow(0, row, 1).narrow(1, position, 1);
        state.reshape([1, d])
    });
    Tensor::cat(rows.collect(), 0)
}

impl Tower for ClipTextModel {
    fn table(&self) -> &Tensor<2> {
        self.token_embeddings()
    }

    fn max_positions(&self) -> usize {
        self.config.max_position_embeddings
    }

    fn embed(&self, ids: &[u32]) -> Result<Tensor<2>> {
        Ok(self.embed_tokens(&[ids.to_vec()])?.squeeze_dim(0))
    }

    fn begin(&self, embeds: Tensor<2>) -> Result<Beginning> {
        self.prefix(embeds.unsqueeze())
    }

    fn finish(
        &self,
        beginning: Option<&Beginning>,
        rest: Tensor<2>,
        end: usize,
    ) -> Result<Encoded> {
        let rest = rest.unsqueeze();
        match beginning {
            Some(beginning) => self.forward_embeds_after(beginning, rest, &[end]),
            None => self.forward_embeds(rest, &[end]),
        }
    }

    fn begin_together(&self, embeds: Tensor<3>, padding: Arc<[usize]>) -> Result<Beginning> {
        let [b, n, _] = embeds.dims();
        if padding.len() != b || padding.iter().any(|&padding| padding >= n) {
            return Err(Error::invalid_input(format!(
                "expected {b} numbers of padding below {n}, found {padding:?}"
            )));
        }
        let is_padded = padding.iter().any(|&padding| padding > 0);
        self.encode(None, is_padded.then_some(padding), embeds)
    }

    fn pool_together(
        &self,
        beginning: &Beginning,
        rest: Tensor<3>,
        ends: &[usize],
    ) -> Result<Tensor<2>> {
        let rest = self.encode(Some(beginning), None, rest)?;
        let last = [beginning, &rest].map(|part| part.hidden_states.last().cloned());
        let last = Tensor::cat(last.into_iter().flatten().collect(), 1); // [b, all, d]
        check_positions(&last, ends)?;
        Ok(self.final_layer_norm.forward(at(last, ends)))
    }

    fn pooled_at(&self, ids: &[u32]) -> Option<usize> {
        Some(self.eos_position(ids))
    }

    fn projection_dim(&self) -> Option<usize> {
        self.projection_dim
    }

    fn project(&self, pooled: Tensor<2>) -> Result<Tensor<2>> {
        ClipTextModel::project(self, pooled)
    }

    fn extend(&mut self, rows: usize, embeddings: Tensor<2>) {
        self.config.vocab_size = rows + embeddings.dims()[0];
        self.token_embedding.extend(rows, embeddings);
    }

    fn layers(&self) -> usize {
        self.layers.len()
    }

    fn normed(&self, hidden_state: Tensor<3>) -> Option<Tensor<3>> {
        Some(self.final_layer_norm(hidden_state))
    }

    fn share(&mut self, other: &(dyn Tower + 'static)) -> u64 {
        let other = (other as &dyn Any).downcast_ref::<Self>();
        other.map_or(0, |other| ClipTextModel::share(self, other))
    }
}
