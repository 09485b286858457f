//! BLIP ([Li et al. 2022](https://arxiv.org/abs/2201.12086)): a vision transformer, and a text
//! decoder that reads its output.

use std::path::Path;

use burn::tensor::{Device, FloatDType, Int, Tensor, TensorData};
use serde::Deserialize;

use crate::models::attention::KeyValues;
use crate::models::captioner::bert::{BertLayer, BertNames, BertSizes};
use crate::models::captioner::blip2_vision::{Blip2VisionConfig, Blip2VisionModel};
use crate::models::captioner::decoding::{GenerationConfig, generate};
use crate::models::captioner::reader::{Cache, Reader};
use crate::models::layers::{Activation, Embedding, LayerNorm, Linear, Mask};
use crate::models::text::clip::check_heads;
use crate::weights::{Weights, read_config};
use crate::{Error, Result};

/// The names of the tensors of the text decoder's layers.
const NAMES: BertNames = BertNames {
    attention: "self",
    intermediate: "intermediate",
    output: "output",
};

/// Tensors that are not weights, or duplicates of others.
const IGNORED: [&str; 3] = [
    "position_ids",
    "cls.predictions.decoder.weight", // the word embeddings
    "cls.predictions.decoder.bias",   // cls.predictions.bias
];

/// `config.json` of transformers' `BlipForConditionalGeneration`.
#[derive(Clone, Debug, Deserialize)]
struct BlipConfig {
    #[serde(default)]
    vision_config: BlipVisionConfig,
    #[serde(default)]
    text_config: BlipTextConfig,
}

/// `vision_config` of transformers' `BlipConfig`, with its defaults.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
struct BlipVisionConfig {
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    image_size: usize,
    patch_size: usize,
    hidden_act: Activation,
    layer_norm_eps: f64,
}

impl Default for BlipVisionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            image_size: 384,
            patch_size: 16,
            hidden_act: Activation::Gelu,
            layer_norm_eps: 1e-5,
        }
    }
}

impl From<BlipVisionConfig> for Blip2VisionConfig {
    /// The same network with other defaults.
    fn from(config: BlipVisionConfig) -> Self {
        Self {
            hidden_size: config.hidden_size,
            intermediate_size: config.intermediate_size,
            num_hidden_layers: config.num_hidden_layers,
            num_attention_heads: config.num_attention_heads,
            image_size: config.image_size,
            patch_size: config.patch_size,
            hidden_act: config.hidden_act,
            layer_norm_eps: config.layer_norm_eps,
            qkv_bias: true,
        }
    }
}

/// `text_config` of transformers' `BlipConfig`, with its defaults.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
struct BlipTextConfig {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    max_position_embeddings: usize,
    hidden_act: Activation,
    layer_norm_eps: f64,
    bos_token_id: u32,
    sep_token_id: u32,
    tie_word_embeddings: bool,
}

impl Default for BlipTextConfig {
    fn default() -> Self {
        Self {
            vocab_size: 30524,
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 512,
            hidden_act: Activation::Gelu,
            layer_norm_eps: 1e-12,
            bos_token_id: 30522,
            sep_token_id: 102,
            tie_word_embeddings: true,
        }
    }
}

/// The networks of transformers' `BlipForConditionalGeneration`.
#[derive(Clone, Debug)]
pub struct Blip {
    vision_model: Blip2VisionModel,
    text_decoder: TextDecoder,
    text_config: BlipTextConfig,
}

impl Blip {
    /// Opens a folder saved by transformers.
    ///
    /// # Errors
    /// When `config.json` or the weights are missing, damaged, or do not match.
    pub fn open(dir: &Path, device: &Device, dtype: FloatDType) -> Result<Self> {
        let config: BlipConfig = read_config(&dir.join("config.json"))?;
        let weights = Weights::open(dir, device, dtype)?;
        let d_image = config.vision_config.hidden_size;
        let this = Self {
            vision_model: Blip2VisionModel::load(
                &weights.scope("vision_model"),
                &config.vision_config.into(),
            )?,
            text_decoder: TextDecoder::load(
                &weights.scope("text_decoder"),
                &config.text_config,
                d_image,
            )?,
            text_config: config.text_config,
        };
        weights.check_all_used(&IGNORED)?;
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

    /// The tokens that describe one picture, up to and with the separator that ends a text. The
    /// decoder reads its start token, then `prompt`.
    ///
    /// # Shapes
    /// `pixel_values`: `[1, 3, image_size, image_size]`, normalised
    ///
    /// # Errors
    /// [`Error::InvalidInput`] for another shape, a prompt outside the vocabulary, or a text too long for the
    /// decoder; [`Error::NotFinite`] if its output is not finite (in f16).
    pub fn generate(
        &self,
        pixel_values: Tensor<4>,
        prompt: &[u32],
        config: &GenerationConfig,
    ) -> Result<Vec<u32>> {
        let image = self.read_image(pixel_values)?;
        let mut reader = self.reader(&image);
        let first = reader.read(&self.beginning(prompt, config.max_new_tokens)?)?;
        generate(&mut reader, first, &[self.text_config.sep_token_id], config)
    }

    /// The logits of the first word.
    ///
    /// # Shapes
    /// As [`generate`](Self::generate).
    ///
    /// # Errors
    /// As [`generate`](Self::generate).
    pub fn first_logits(&self, pixel_values: Tensor<4>, prompt: &[u32]) -> Result<Vec<f32>> {
        let image = self.read_image(pixel_values)?;
        self.reader(&image).read(&self.beginning(prompt, 1)?)
    }

    /// The context of the decoder's layers for one picture.
    fn read_image(&self, pixel_values: Tensor<4>) -> Result<Vec<Option<KeyValues>>> {
        let b = pixel_values.dims()[0];
        if b != 1 {
            return Err(Error::invalid_input(format!(
                "expected one picture, found {b}"
            )));
        }
        let states = self.image_states(pixel_values)?;
        let layers = self.text_decoder.layers.iter();
        Ok(layers.map(|layer| layer.context(&states)).collect())
    }

    fn reader<'a>(
        &'a self,
        image: &'a [Option<KeyValues>],
    ) -> Reader<impl Fn(&[u32], [usize; 2], &mut Cache) -> Tensor<2> + 'a> {
        let step = |ids: &[u32], shape, cache: &mut Cache| {
            self.text_decoder.forward(ids, shape, image, cache)
        };
        Reader::new(step, Cache::new())
    }

    /// The ids that a caption continues.
    fn beginning(&self, prompt: &[u32], max_new_tokens: usize) -> Result<Vec<u32>> {
        let (config, start) = (&self.text_config, 1 + prompt.len());
        let longest = config.max_position_embeddings;
        if start + max_new_tokens > longest {
            return Err(Error::invalid_input(format!(
                "a prompt of {start} tokens and a caption of up to {max_new_tokens} are more than \
                 the {longest} tokens of the captioner"
            )));
        }
        let ids: Vec<u32> = [config.bos_token_id]
            .into_iter()
            .chain(prompt.iter().copied())
            .collect();
        match ids.iter().find(|&&id| id as usize >= config.vocab_size) {
            None => Ok(ids),
            Some(id) => Err(Error::invalid_input(format!(
                "token {id} is not among the {} of the captioner",
                config.vocab_size
            ))),
        }
    }
}

/// transformers' `BlipTextLMHeadModel`.
#[derive(Clone, Debug)]
struct TextDecoder {
    word_embeddings: Embedding,
    position_embeddings: Embedding,
    embeddings_norm: LayerNorm,
    layers: Vec<BertLayer>,
    transform: Linear,
    activation: Activation,
    transform_norm: LayerNorm,
    decoder: Linear,
}

impl TextDecoder {
    /// `d_image` is the width of the layers' context.
    fn load(weights: &Weights, config: &BlipTextConfig, d_image: usize) -> Result<Self> {
        let (d, vocab_size) = (config.hidden_size, config.vocab_size);
        check_heads(weights, d, config.num_attention_heads)?;
        let sizes = BertSizes {
            hidden_size: d,
            num_attention_heads: config.num_attention_heads,
            intermediate_size: config.intermediate_size,
            hidden_act: config.hidden_act,
            layer_norm_eps: config.layer_norm_eps,
        };
        let embeddings = weights.scope("bert.embeddings");
        let table = |name: &str, rows| Embedding::load(&embeddings.scope(name), rows, d);
        let norm = |weights: &Weights| {
            LayerNorm::load(&weights.scope("LayerNorm"), d, config.layer_norm_eps)
        };
        let layers = weights.scope("bert.encoder.layer");
        let head = weights.scope("cls.predictions");
        let transform = head.scope("transform");
        let word_embeddings = table("word_embeddings", vocab_size)?;
        let bias = match head.contains("bias") {
            true => head.tensor("bias", [vocab_size])?,
            false => head.tensor("decoder.bias", [vocab_size])?,
        };
        let weight = match config.tie_word_embeddings {
            true => word_embeddings.weight().clone(),
            false => head.tensor("decoder.weight", [vocab_size, d])?,
        };
        Ok(Self {
            position_embeddings: table("position_embeddings", config.max_position_embeddings)?,
            embeddings_norm: norm(&embeddings)?,
            layers: (0..config.num_hidden_layers)
                .map(|number| BertLayer::load(&layers.scope(number), &sizes, &NAMES, Some(d_image)))
                .collect::<Result<_>>()?,
            transform: Linear::load(&transform.scope("dense"), d, d)?,
            activation: config.hidden_act,
            transform_norm: norm(&transform)?,
            decoder: Linear::new(weight, Some(bias)),
            word_embeddings,
        })
    }

    /// The logits `[b, vocab_size]` of the tokens after `b` rows of `n` ids, which follow those in `cache` and are
    /// added to it.
    fn forward(
        &self,
        ids: &[u32],
        [b, n]: [usize; 2],
        image: &[Option<KeyValues>],
        cache: &mut Cache,
    ) -> Tensor<2> {
        let start = cache.first().map_or(0, |past| past.keys.dims()[1]);
        let device = self.word_embeddings.weight().device();
        let ids = ids.iter().map(|&id| i64::from(id)).collect();
        let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [b, n]), &device);
        let positions = self
            .position_embeddings
            .weight()
            .clone()
            .narrow(0, start, n);
        let x = self.word_embeddings.forward(ids) + positions.unsqueeze::<3>();
        let mut x = self.embeddings_norm.forward(x);
        let past = std::mem::take(cache);
        for (number, (layer, image)) in self.layers.iter().zip(image).enumerate() {
            let past = past.get(number);
            let (output, key_values) = layer.forward(x, past, image.as_ref(), Mask::Causal);
            x = output;
            cache.push(key_values);
        }
        let d = x.dims()[2];
        let last = x.narrow(1, n - 1, 1).reshape([b, d]);
        let transformed = self.activation.forward(self.transform.forward(last));
        self.decoder
            .forward(self.transform_norm.forward(transformed))
    }
}
