//! BLIP-2 ([Li et al. 2023](https://arxiv.org/abs/2301.12597)): a vision transformer, a Q-Former, and
//! an OPT language model.

use std::path::Path;

use burn::tensor::{Device, FloatDType, Tensor};
use serde::Deserialize;

use crate::models::captioner::blip2_vision::{Blip2VisionConfig, Blip2VisionModel};
use crate::models::captioner::decoding::{GenerationConfig, generate};
use crate::models::captioner::opt::{Opt, OptConfig};
use crate::models::captioner::qformer::{QFormer, QFormerConfig};
use crate::models::captioner::reader::{Cache, Reader, values};
use crate::models::layers::Linear;
use crate::weights::{Weights, read_config};
use crate::{Error, Result};

/// `config.json` of transformers' `Blip2ForConditionalGeneration`.
#[derive(Clone, Debug, Deserialize)]
struct Blip2Config {
    #[serde(default)]
    vision_config: Blip2VisionConfig,
    #[serde(default)]
    qformer_config: QFormerConfig,
    #[serde(default)]
    text_config: OptConfig,
    #[serde(default = "default_queries")]
    num_query_tokens: usize,
}

fn default_queries() -> usize {
    32
}

/// The networks of transformers' `Blip2ForConditionalGeneration`: a vision transformer, a Q-Former
/// whose queries read its output, and an OPT language model that continues from the queries.
#[derive(Clone, Debug)]
pub struct Blip2 {
    vision_model: Blip2VisionModel,
    query_tokens: Tensor<3>,
    qformer: QFormer,
    language_projection: Linear,
    language_model: Opt,
    text_config: OptConfig,
}

impl Blip2 {
    /// Opens a folder saved by transformers.
    ///
    /// # Errors
    /// When `config.json` or the weights are missing, damaged, do not match, or the language model is not
    /// OPT.
    pub fn open(dir: &Path, device: &Device, dtype: FloatDType) -> Result<Self> {
        let config: Blip2Config = read_config(&dir.join("config.json"))?;
        let weights = Weights::open(dir, device, dtype)?;
        let (d_image, d_query) = (
            config.vision_config.hidden_size,
            config.qformer_config.hidden_size,
        );
        let d_text = config.text_config.hidden_size;
        let this = Self {
            vision_model: Blip2VisionModel::load(
                &weights.scope("vision_model"),
                &config.vision_config,
            )?,
            query_tokens: weights.tensor("query_tokens", [1, config.num_query_tokens, d_query])?,
            qformer: QFormer::load(&weights.scope("qformer"), &config.qformer_config, d_image)?,
            language_projection: Linear::load(
                &weights.scope("language_projection"),
                d_query,
                d_text,
            )?,
            language_model: Opt::load(&weights.scope("language_model"), &config.text_config)?,
            text_config: config.text_config,
        };
        weights.check_all_used(&["position_ids"])?;
        Ok(this)
    }

    /// The output of the vision transformer.
    ///
    /// # Shapes
    /// `[b, 3, image_size, image_size]`, normalised, to `[b, 1 + patches, d_image]`
    ///
    /// # Errors
    /// [`Error::InvalidInput`] for another shape.
    pub fn image_states(&self, pixel_values: Tensor<4>) -> Result<Tensor<3>> {
        self.vision_model.forward(pixel_values)
    }

    /// The Q-Former's queries after reading it.
    ///
    /// # Shapes
    /// `[b, 1 + patches, d_image]` to `[b, num_query_tokens, d_query]`
    #[must_use]
    pub fn query_states(&self, image_states: &Tensor<3>) -> Tensor<3> {
        let b = image_states.dims()[0];
        let queries = self.query_tokens.clone().expand([b as i64, -1, -1]);
        self.qformer.forward(queries, image_states)
    }

    /// The tokens that describe one picture, up to and with the end token. The language model
    /// reads the projected queries (where transformers' processor puts the image tokens), its
    /// start token, then `prompt`.
    ///
    /// # Shapes
    /// `pixel_values`: `[1, 3, image_size, image_size]`, normalised
    ///
    /// # Errors
    /// [`Error::InvalidInput`] for another shape, a prompt outside the vocabulary, or a text too long for the
    /// language model; [`Error::NotFinite`] if its output is not finite (in f16).
    pub fn generate(
        &self,
        pixel_values: Tensor<4>,
        prompt: &[u32],
        config: &GenerationConfig,
    ) -> Result<Vec<u32>> {
        let (first, cache) = self.read(pixel_values, prompt, config.max_new_tokens)?;
        let step = |ids: &[u32], shape, cache: &mut Cache| {
            let inputs = self.language_model.embed(ids, shape);
            self.language_model.forward(inputs, cache)
        };
        let mut reader = Reader::new(step, cache);
        let eos = self.text_config.eos_token_id.as_slice();
        generate(&mut reader, first, eos, config)
    }

    /// The logits of the first word.
    ///
    /// # Shapes
    /// As [`generate`](Self::generate).
    ///
    /// # Errors
    /// As [`generate`](Self::generate).
    pub fn first_logits(&self, pixel_values: Tensor<4>, prompt: &[u32]) -> Result<Vec<f32>> {
        Ok(self.read(pixel_values, prompt, 1)?.0)
    }

    /// Reads picture and prompt; returns the logits of the first word, and the cache for the next.
    fn read(
        &self,
        pixel_values: Tensor<4>,
        prompt: &[u32],
        max_new_tokens: usize,
    ) -> Result<(Vec<f32>, Cache)> {
        let queries = self.query_states(&self.image_states(pixel_values)?);
        let [b, count, _] = queries.dims();
        if b != 1 {
            return Err(Error::invalid_input(format!(
                "expected one picture, found {b}"
            )));
        }
        let (longest, vocab_size) = (
            self.text_config.max_position_embeddings,
            self.text_config.vocab_size,
        );
        let total = count + 1 + prompt.len() + max_new_tokens;
        if total > longest {
            return Err(Error::invalid_input(format!(
                "a picture of {count} tokens, a prompt of {} and a caption of up to \
                 {max_new_tokens} are more than the {longest} tokens of the captioner",
                prompt.len() + 1,
            )));
        }
        let mut ids = vec![self.text_config.bos_token_id];
        ids.extend(prompt);
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab_size) {
            return Err(Error::invalid_input(format!(
                "token {id} is not among the {vocab_size} of the captioner"
            )));
        }
        let words = self.language_model.embed(&ids, [1, ids.len()]);
        let inputs = Tensor::cat(vec![self.language_projection.forward(queries), words], 1);
        let mut cache = Cache::new();
        let logits = self.language_model.forward(inputs, &mut cache);
        Ok((values(logits)?, cache))
    }
}
