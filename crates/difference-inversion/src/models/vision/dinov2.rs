//! DINOv2, a vision transformer trained only on pictures
//! ([Oquab et al. 2023](https://arxiv.org/abs/2304.07193)).

use std::path::Path;

use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use serde::Deserialize;

use crate::models::attention::Attention;
use crate::models::feature_map::Conv2d;
use crate::models::layers::{Activation, LayerNorm, Linear, Mask};
use crate::models::text::clip::{check_heads, patches_per_side};
use crate::util::tensors::host;
use crate::weights::{Weights, read_config};
use crate::{Error, Result};

/// The embedding that replaces masked patches in training.
const UNUSED: [&str; 1] = ["embeddings.mask_token"];
/// The constant of the cubic that interpolates position embeddings.
const CUBIC: f64 = -0.75;

/// `config.json` of transformers' `Dinov2Model`; absent fields have its defaults (those of
/// `facebook/dinov2-base`, except for the size of its pictures).
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct Dinov2Config {
    /// The width `d`.
    pub hidden_size: usize,
    /// The number of layers.
    pub num_hidden_layers: usize,
    /// Attention heads per layer.
    pub num_attention_heads: usize,
    /// The inner width of each layer's network, relative to `d`.
    pub mlp_ratio: usize,
    /// The non-linearity of that network, unless it is gated.
    pub hidden_act: Activation,
    /// The small constant of the norms.
    pub layer_norm_eps: f64,
    /// The side of the pictures that the position embeddings are for, in pixels.
    pub image_size: usize,
    /// The side of a patch, in pixels.
    pub patch_size: usize,
    /// The channels of the picture.
    pub num_channels: usize,
    /// Whether queries, keys and values have a bias.
    pub qkv_bias: bool,
    /// Whether the layers' networks are gated (SwiGLU), as in the largest model.
    pub use_swiglu_ffn: bool,
}

impl Default for Dinov2Config {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            mlp_ratio: 4,
            hidden_act: Activation::Gelu,
            layer_norm_eps: 1e-6,
            image_size: 224,
            patch_size: 14,
            num_channels: 3,
            qkv_bias: true,
            use_swiglu_ffn: false,
        }
    }
}

/// transformers' `Dinov2Model`. Its weights are constants.
#[derive(Clone, Debug)]
pub struct Dinov2Model {
    config: Dinov2Config,
    cls_token: Tensor<3>,
    /// For the class token, [1, 1, d].
    class_position: Tensor<3>,
    /// For the patches of a picture of `image_size`, row by row, [side · side · d].
    patch_positions: Vec<f32>,
    patch_embeddings: Conv2d,
    layers: Vec<Layer>,
    layernorm: LayerNorm,
}

/// Attention and a network, each after its norm and scaled channel by channel.
#[derive(Clone, Debug)]
struct Layer {
    norm1: LayerNorm,
    attention: Attention,
    layer_scale1: Tensor<1>,
    norm2: LayerNorm,
    mlp: Mlp,
    layer_scale2: Tensor<1>,
}

/// The network of a layer.
#[derive(Clone, Debug)]
enum Mlp {
    /// `fc2(act(fc1(x)))`
    Plain(Linear, Activation, Linear),
    /// `weights_out(SiLU(gate) · value)` of `[gate, value] = weights_in(x)`
    Gated(Linear, Linear),
}

impl Dinov2Model {
    /// Opens a folder saved by transformers' `Dinov2Model`.
    ///
    /// # Errors
    /// When `config.json` or the weights are missing, damaged, or do not match.
    pub fn open(dir: &Path, device: &Device, dtype: FloatDType) -> Result<Self> {
        let config = read_config(&dir.join("config.json"))?;
        let weights = Weights::open(dir, device, dtype)?;
        let model = Self::load(&weights, &config)?;
        weights.check_all_used(&UNUSED)?;
        Ok(model)
    }

    fn load(weights: &Weights, config: &Dinov2Config) -> Result<Self> {
        let (d, patch) = (config.hidden_size, config.patch_size);
        check_heads(weights, d, config.num_attention_heads)?;
        let side = patches_per_side(weights, config.image_size, patch)?;
        let embeddings = weights.scope("embeddings");
        let positions = embeddings.tensor("position_embeddings", [1, side * side + 1, d])?;
        let projection = embeddings.scope("patch_embeddings.projection");
        let layers = weights.scope("encoder.layer");
        Ok(Self {
            cls_token: embeddings.tensor("cls_token", [1, 1, d])?,
            class_position: positions.clone().narrow(1, 0, 1),
            patch_positions: host(positions.narrow(1, 1, side * side)),
            patch_embeddings: Conv2d::load(&projection, [config.num_channels, d], patch, patch, 0)?,
            layers: (0..config.num_hidden_layers)
                .map(|number| Layer::load(&layers.scope(number), config))
                .collect::<Result<_>>()?,
            layernorm: LayerNorm::load(&weights.scope("layernorm"), d, config.layer_norm_eps)?,
            config: config.clone(),
        })
    }

    /// Every position after the last norm, the class token first.
    ///
    /// # Shapes
    /// `pixel_values`: `[b, num_channels, h, w]`, normalised as in `preprocessor_config.json`; partial patches at
    /// the end of a row or column are ignored. Result `[b, 1 + patches, d]`.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] for another number of channels or a picture smaller than a patch.
    pub fn forward(&self, pixel_values: Tensor<4>) -> Result<Tensor<3>> {
        let [b, channels, height, width] = pixel_values.dims();
        let patch = self.config.patch_size;
        if channels != self.config.num_channels || height < patch || width < patch {
            let expected = self.config.num_channels;
            return Err(Error::invalid_input(format!(
                "expected pixel values [b, {expected}, {patch} or more, {patch} or more], found \
                 {:?}",
                pixel_values.dims()
            )));
        }
        let pixel_values = pixel_values.cast(self.cls_token.dtype());
        let patches = self.patch_embeddings.forward(pixel_values);
        let patches = patches.flatten::<3>(2, 3).swap_dims(1, 2) // [b, n, d]
            + self.positions([height / patch, width / patch]);
        let class = self.cls_token.clone() + self.class_position.clone();
        let class = class.repeat_dim(0, b);
        let x = Tensor::cat(vec![class, patches], 1); // [b, 1 + n, d]
        let x = self.layers.iter().fold(x, |x, layer| layer.forward(x));
        Ok(self.layernorm.forward(x))
    }

    /// transformers' `pooler_output`: the class token after the last norm.
    ///
    /// # Shapes
    /// As [`forward`](Self::forward); result `[b, d]`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn pooled(&self, pixel_values: Tensor<4>) -> Result<Tensor<2>> {
        let b = pixel_values.dims()[0];
        let class = self.forward(pixel_values)?.narrow(1, 0, 1);
        Ok(class.reshape([b, self.config.hidden_size]))
    }

    /// The position embeddings of `height` × `width` patches, [1, height · width, d]: the learned square,
    /// interpolated by a cubic (PyTorch's `interpolate`, `bicubic`, without
    /// antialiasing).
    fn positions(&self, [height, width]: [usize; 2]) -> Tensor<3> {
        let (d, side) = (
            self.config.hidden_size,
            self.config.image_size / self.config.patch_size,
        );
        let (rows, columns) = (cubic_taps(side, height), cubic_taps(side, width));
        let mut values = vec![0.0_f32; height * width * d];
        for (at, value) in values.chunks_exact_mut(d).enumerate() {
            let (row, column) = (&rows[at / width], &columns[at % width]);
            for (y, weight_y) in row {
                for (x, weight_x) in column {
                    let known = &self.patch_positions[(y * side + x) * d..][..d];
                    for (value, known) in value.iter_mut().zip(known) {
                        *value += weight_y * weight_x * known;
                    }
                }
            }
        }
        let data = TensorData::new(values, [1, height * width, d]);
        let device = self.cls_token.device();
        let positions = Tensor::<3>::from_data(data, (&device, DType::F32));
        positions.cast(self.cls_token.dtype())
    }
}

/// For each of `target` positions, the four of `source` that it is interpolated from, with their weights;
/// beyond the ends, the last is repeated.
fn cubic_taps(source: usize, target: usize) -> Vec<[(usize, f32); 4]> {
    let near = |x: f64| ((CUBIC + 2.0) * x - (CUBIC + 3.0)) * x * x + 1.0;
    let far = |x: f64| ((CUBIC * x - 5.0 * CUBIC) * x + 8.0 * CUBIC) * x - 4.0 * CUBIC;
    let tap = |place: usize| {
        let at = (place as f64 + 0.5) * source as f64 / target as f64 - 0.5;
        let (below, t) = (at.floor(), at - at.floor());
        let weights = [far(t + 1.0), near(t), near(1.0 - t), far(2.0 - t)];
        std::array::from_fn(|i| {
            let wanted = below + i as f64 - 1.0;
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a place within the source; weights are f32"
            )]
            let tap = (
                wanted.clamp(0.0, (source - 1) as f64) as usize,
                weights[i] as f32,
            );
            tap
        })
    };
    (0..target).map(tap).collect()
}

impl Layer {
    fn load(weights: &Weights, config: &Dinov2Config) -> Result<Self> {
        let d = config.hidden_size;
        let attention = weights.scope("attention");
        let projection = |name: &str| {
            let weights = attention.scope("attention").scope(name);
            match config.qkv_bias {
                true => Linear::load(&weights, d, d),
                false => Linear::load_without_bias(&weights, d, d),
            }
        };
        let norm = |name: &str| LayerNorm::load(&weights.scope(name), d, config.layer_norm_eps);
        let scale = |name: &str| weights.scope(name).tensor("lambda1", [d]);
        Ok(Self {
            norm1: norm("norm1")?,
            attention: Attention {
                query: projection("query")?,
                key: projection("key")?,
                value: projection("value")?,
                output: Linear::load(&attention.scope("output.dense"), d, d)?,
                heads: config.num_attention_heads,
            },
            layer_scale1: scale("layer_scale1")?,
            norm2: norm("norm2")?,
            mlp: Mlp::load(&weights.scope("mlp"), config)?,
            layer_scale2: scale("layer_scale2")?,
        })
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let normed = self.norm1.forward(x.clone());
        let context = self.attention.key_values(normed.clone());
        let attended = self.attention.forward(normed, &context, Mask::None);
        let x = x + attended * self.layer_scale1.clone().unsqueeze::<3>();
        let inner = self.mlp.forward(self.norm2.forward(x.clone()));
        x + inner * self.layer_scale2.clone().unsqueeze::<3>()
    }
}

impl Mlp {
    fn load(weights: &Weights, config: &Dinov2Config) -> Result<Self> {
        let (d, inner) = (config.hidden_size, config.hidden_size * config.mlp_ratio);
        let linear = |name: &str, from, to| Linear::load(&weights.scope(name), from, to);
        if config.use_swiglu_ffn {
            let inner = (inner * 2 / 3).next_multiple_of(8);
            let weights_in = linear("weights_in", d, 2 * inner)?;
            return Ok(Self::Gated(weights_in, linear("weights_out", inner, d)?));
        }
        let (fc1, fc2) = (linear("fc1", d, inner)?, linear("fc2", inner, d)?);
        Ok(Self::Plain(fc1, config.hidden_act, fc2))
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        match self {
            Self::Plain(fc1, act, fc2) => fc2.forward(act.forward(fc1.forward(x))),
            Self::Gated(weights_in, weights_out) => {
                let x = weights_in.forward(x);
                let inner = x.dims()[2] / 2;
                let gate = Activation::Silu.forward(x.clone().narrow(2, 0, inner));
                weights_out.forward(gate * x.narrow(2, inner, inner))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taps_of_the_same_size_are_the_places_themselves() {
        for (place, taps) in cubic_taps(4, 4).into_iter().enumerate() {
            let kept: Vec<_> = taps
                .into_iter()
                .filter(|(_, weight)| *weight != 0.0)
                .collect();
            assert_eq!(kept, [(place, 1.0)]);
        }
    }

    #[test]
    fn taps_of_half_the_size_are_those_of_the_cubic_at_a_half() {
        // (a + 2)/8 − (a + 3)/4 + 1 = .59375 and a (1.5³ − 5 · 1.5² + 8 · 1.5 − 4) = −.09375
        let [first, second] = cubic_taps(4, 2)[..] else {
            panic!("two places");
        };
        let weights = [-0.093_75, 0.593_75, 0.593_75, -0.093_75];
        assert_eq!(first.map(|(_, weight)| weight), weights);
        assert_eq!(first.map(|(place, _)| place), [0, 0, 1, 2]);
        assert_eq!(second.map(|(place, _)| place), [1, 2, 3, 3]);
    }
}
