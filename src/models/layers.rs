//! The layers that all networks are made of. Weights are constants: gradients flow to a layer's
//! inputs only.

use std::sync::{Arc, OnceLock};

use burn::tensor::module::{attention, conv2d, embedding, interpolate, layer_norm, linear};
use burn::tensor::ops::{AttentionModuleOptions, ConvOptions, InterpolateMode, InterpolateOptions};
use burn::tensor::{Bool, DType, Int, Tensor, activation};

use super::fused::{self, conv::Geometry};
use crate::{Result, weights::Weights};

/// A pointwise non-linearity, by its name in config files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
pub enum Activation {
    /// `max(0, x)`.
    #[serde(rename = "relu")]
    Relu,
    /// `x σ(x)`, also called swish.
    #[serde(rename = "silu", alias = "swish")]
    Silu,
    /// `x Φ(x)`, exact ([Hendrycks and Gimpel 2016](https://arxiv.org/abs/1606.08415)).
    #[serde(rename = "gelu")]
    Gelu,
    /// `x σ(1.702 x)`, the approximation that OpenAI's CLIP uses.
    #[serde(rename = "quick_gelu")]
    QuickGelu,
    /// The tanh approximation of `x Φ(x)`.
    #[serde(rename = "gelu_pytorch_tanh", alias = "gelu_new")]
    GeluTanh,
}

impl Activation {
    /// Applies the non-linearity to every element.
    pub fn forward<const D: usize>(self, x: Tensor<D>) -> Tensor<D> {
        match self {
            Self::Relu => activation::relu(x),
            Self::Silu => activation::silu(x),
            Self::Gelu => activation::gelu(x),
            Self::QuickGelu => x.clone() * activation::sigmoid(x * 1.702),
            Self::GeluTanh => activation::gelu_approximate(x),
        }
    }
}

/// `y = x Wᵀ + b` on the last dimension.
#[derive(Debug, Clone)]
pub struct Linear {
    /// `[d_in, d_out]`: the checkpoint's matrix, transposed.
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
}

impl Linear {
    /// Reads `weight` `[d_out, d_in]` and `bias` `[d_out]`.
    ///
    /// # Errors
    /// [`Error::Tensor`](crate::Error::Tensor) if one is missing or of another shape.
    pub fn load(weights: &Weights, d_in: usize, d_out: usize) -> Result<Self> {
        let bias = Some(weights.tensor("bias", [d_out])?);
        Ok(Self {
            bias,
            ..Self::load_without_bias(weights, d_in, d_out)?
        })
    }

    /// Reads `weight` `[d_out, d_in]`.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_without_bias(weights: &Weights, d_in: usize, d_out: usize) -> Result<Self> {
        let weight = weights.tensor("weight", [d_out, d_in])?;
        Ok(Self::new(weight, None))
    }

    /// A layer of the given `weight` `[d_out, d_in]` and `bias` `[d_out]`.
    pub fn new(weight: Tensor<2>, bias: Option<Tensor<1>>) -> Self {
        Self {
            weight: weight.transpose(),
            bias,
        }
    }

    /// # Shapes
    /// `[..., d_in]` to `[..., d_out]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let (weight, bias) = (self.weight.clone(), self.bias.clone());
        if fused::available(&x) {
            return fused::conv::linear(x, weight, bias);
        }
        linear(x, weight, bias)
    }
}

/// A two-dimensional convolution with a square kernel.
#[derive(Debug, Clone)]
pub struct Conv2d {
    /// `[kernel · kernel · c_in, c_out]`: the checkpoint's weight in the order of
    /// channels-last neighbourhoods.
    weight: Tensor<2>,
    /// The weight of the backward pass, once it is needed.
    turned: Arc<OnceLock<Tensor<2>>>,
    bias: Option<Tensor<1>>,
    channels: [usize; 2],
    geometry: Geometry,
}

impl Conv2d {
    /// Reads `weight` `[c_out, c_in, kernel, kernel]` and `bias` `[c_out]`; `padding` zeros are
    /// added on every side.
    ///
    /// # Errors
    /// [`Error::Tensor`](crate::Error::Tensor) if one is missing or of another shape.
    pub fn load(
        weights: &Weights,
        [c_in, c_out]: [usize; 2],
        kernel: usize,
        stride: usize,
        padding: usize,
    ) -> Result<Self> {
        let bias = Some(weights.tensor("bias", [c_out])?);
        let channels = [c_in, c_out];
        Ok(Self {
            bias,
            ..Self::load_without_bias(weights, channels, kernel, stride, padding)?
        })
    }

    /// Reads `weight` `[c_out, c_in, kernel, kernel]`.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_without_bias(
        weights: &Weights,
        channels @ [c_in, c_out]: [usize; 2],
        kernel: usize,
        stride: usize,
        padding: usize,
    ) -> Result<Self> {
        let weight = weights.tensor("weight", [c_out, c_in, kernel, kernel])?;
        Ok(Self {
            weight: weight
                .permute([2, 3, 1, 0])
                .reshape([kernel * kernel * c_in, c_out]),
            turned: Arc::default(),
            bias: None,
            channels,
            geometry: Geometry {
                kernel,
                stride,
                padding,
            },
        })
    }

    /// # Shapes
    /// `[b, c_in, h, w]` to `[b, c_out, h', w']`.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        channels_first(self.forward_channels_last(channels_last(x)))
    }

    /// # Shapes
    /// `[b, h, w, c_in]` to `[b, h', w', c_out]`.
    pub fn forward_channels_last(&self, x: Tensor<4>) -> Tensor<4> {
        let [_, h, w, _] = x.dims();
        let Geometry {
            kernel,
            stride,
            padding,
        } = self.geometry;
        let size = |size: usize| (size + 2 * padding - kernel) / stride + 1;
        self.forward_to(x, [size(h), size(w)])
    }

    /// As [`forward_channels_last`](Self::forward_channels_last), to a given size of the output:
    /// as many zeros as it takes are added below and to the right.
    ///
    /// # Shapes
    /// `[b, h, w, c_in]` to `[b, output[0], output[1], c_out]`.
    pub fn forward_to(&self, x: Tensor<4>, output: [usize; 2]) -> Tensor<4> {
        let Geometry {
            kernel,
            stride,
            padding,
        } = self.geometry;
        if kernel == 1 && stride == 1 && padding == 0 {
            return Linear {
                weight: self.weight.clone(),
                bias: self.bias.clone(),
            }
            .forward(x);
        }
        if fused::available(&x) {
            let (turned, bias) = (|| self.turned().clone(), self.bias.clone());
            return fused::conv::conv(x, &self.weight, turned, bias, self.geometry, output);
        }
        let [b, h, w, _] = x.dims();
        let end = |size: usize, output: usize| {
            ((output - 1) * stride + kernel).saturating_sub(size + padding)
        };
        let (bottom, right) = (end(h, output[0]), end(w, output[1]));
        let x = channels_first(x).pad((padding, right, padding, bottom), 0.0);
        let [c_in, c_out] = self.channels;
        let weight = self.weight.clone().reshape([kernel, kernel, c_in, c_out]);
        let options = ConvOptions::new([stride; 2], [0; 2], [1; 2], 1);
        let y = conv2d(x, weight.permute([3, 2, 0, 1]), self.bias.clone(), options);
        channels_last(y.slice([0..b, 0..c_out, 0..output[0], 0..output[1]]))
    }

    /// The weight with rows and columns reversed and the roles of the channels exchanged.
    fn turned(&self) -> &Tensor<2> {
        self.turned.get_or_init(|| {
            let ([c_in, c_out], kernel) = (self.channels, self.geometry.kernel);
            let weight = self.weight.clone().reshape([kernel, kernel, c_in, c_out]);
            let weight = weight.flip([0, 1]).swap_dims(2, 3);
            weight.reshape([kernel * kernel * c_out, c_in])
        })
    }
}

/// `[b, c, h, w]` to `[b, h, w, c]`.
pub(super) fn channels_last(x: Tensor<4>) -> Tensor<4> {
    x.permute([0, 2, 3, 1])
}

/// `[b, h, w, c]` to `[b, c, h, w]`.
pub(super) fn channels_first(x: Tensor<4>) -> Tensor<4> {
    x.permute([0, 3, 1, 2])
}

/// Layer normalisation over the last dimension
/// ([Ba et al. 2016](https://arxiv.org/abs/1607.06450)).
#[derive(Debug, Clone)]
pub struct LayerNorm {
    weight: Tensor<1>,
    bias: Tensor<1>,
    epsilon: f64,
}

impl LayerNorm {
    /// Reads `weight` and `bias`, both `[d]`.
    ///
    /// # Errors
    /// [`Error::Tensor`](crate::Error::Tensor) if one is missing or of another shape.
    pub fn load(weights: &Weights, d: usize, epsilon: f64) -> Result<Self> {
        let (weight, bias) = (weights.tensor("weight", [d])?, weights.tensor("bias", [d])?);
        Ok(Self {
            weight,
            bias,
            epsilon,
        })
    }

    /// # Shapes
    /// `[..., d]` to `[..., d]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let (weight, bias) = (self.weight.clone(), self.bias.clone());
        if fused::available(&x) {
            return fused::norm::layer_norm(x, [weight, bias], self.epsilon);
        }
        layer_norm(x, weight, Some(bias), self.epsilon)
    }
}

/// Group normalisation over channels and positions
/// ([Wu and He 2018](https://arxiv.org/abs/1803.08494)).
#[derive(Debug, Clone)]
pub struct GroupNorm {
    weight: Tensor<1>,
    bias: Tensor<1>,
    groups: usize,
    epsilon: f64,
}

impl GroupNorm {
    /// Reads `weight` and `bias`, both `[channels]`; `groups` must divide `channels`.
    ///
    /// # Errors
    /// [`Error::Tensor`](crate::Error::Tensor) if one is missing or of another shape.
    pub fn load(weights: &Weights, groups: usize, channels: usize, epsilon: f64) -> Result<Self> {
        let weight = weights.tensor("weight", [channels])?;
        let bias = weights.tensor("bias", [channels])?;
        Ok(Self {
            weight,
            bias,
            groups,
            epsilon,
        })
    }

    /// Statistics are taken in f32 whatever the type of `x`: the squares of half-precision
    /// activations overflow.
    ///
    /// # Shapes
    /// `[b, h, w, c]` to `[b, h, w, c]`.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        if fused::available(&x) {
            return self.forward_fused(x, false);
        }
        let ([b, h, w, c], dtype) = (x.dims(), x.dtype());
        // [b, positions, groups, channels of a group]
        let x = x
            .cast(DType::F32)
            .reshape([b, h * w, self.groups, c / self.groups]);
        let mean = |x: Tensor<4>| x.mean_dim(1).mean_dim(3);
        let x = x.clone() - mean(x);
        let variance = mean(x.clone() * x.clone());
        let x = x / (variance + self.epsilon).sqrt();
        let weight = self.weight.clone().cast(DType::F32).reshape([1, 1, 1, c]);
        let bias = self.bias.clone().cast(DType::F32).reshape([1, 1, 1, c]);
        (x.reshape([b, h, w, c]) * weight + bias).cast(dtype)
    }

    /// [`forward`](Self::forward) followed by `activation`, as every residual block has it.
    pub fn forward_act(&self, x: Tensor<4>, activation: Activation) -> Tensor<4> {
        if activation == Activation::Silu && fused::available(&x) {
            return self.forward_fused(x, true);
        }
        activation.forward(self.forward(x))
    }

    fn forward_fused(&self, x: Tensor<4>, silu: bool) -> Tensor<4> {
        let parameters = [self.weight.clone(), self.bias.clone()];
        fused::norm::group_norm(x, parameters, self.groups, self.epsilon, silu)
    }
}

/// A table of vectors looked up by number.
#[derive(Debug, Clone)]
pub struct Embedding {
    weight: Tensor<2>,
}

impl Embedding {
    /// Reads `weight` `[count, d]`.
    ///
    /// # Errors
    /// [`Error::Tensor`](crate::Error::Tensor) if it is missing or of another shape.
    pub fn load(weights: &Weights, count: usize, d: usize) -> Result<Self> {
        Ok(Self {
            weight: weights.tensor("weight", [count, d])?,
        })
    }

    /// The whole table, `[count, d]`.
    pub fn weight(&self) -> &Tensor<2> {
        &self.weight
    }

    /// # Shapes
    /// `[b, n]` to `[b, n, d]`; every id must be less than `count`.
    pub fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        embedding(self.weight.clone(), ids)
    }
}

/// Which keys a query may not look at.
#[derive(Debug, Clone)]
#[expect(
    clippy::large_enum_variant,
    reason = "one mask at a time, on the stack"
)]
pub enum Mask {
    /// Every query sees every key.
    None,
    /// Query `i` of `n` sees keys `0..=i + m − n` of `m`, `m ≥ n`.
    Causal,
    /// `[b or 1, heads or 1, n, m]`, true where the key is hidden.
    Hidden(Tensor<4, Bool>),
}

/// `softmax(q kᵀ / √d) v` in `heads` heads
/// ([Vaswani et al. 2017](https://arxiv.org/abs/1706.03762)).
///
/// # Shapes
/// `q` `[b, n, c]`, `k` and `v` `[b, m, c]`, all heads side by side in `c`; result `[b, n, c]`.
pub fn multi_head_attention(
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    heads: usize,
    mask: Mask,
) -> Tensor<3> {
    let [b, n, c] = q.dims();
    let split = |x: Tensor<3>| {
        let [b, n, c] = x.dims();
        x.reshape([b, n, heads, c / heads]).swap_dims(1, 2) // [b, heads, n, c / heads]
    };
    let (q, k, v) = (split(q), split(k), split(v));
    let out = match mask {
        Mask::None | Mask::Causal if [&q, &k, &v].into_iter().all(fused::available) => {
            fused::attention::attention(q, k, v, matches!(mask, Mask::Causal))
        }
        Mask::Hidden(hidden) => attention(q, k, v, Some(hidden), None, options(false)),
        Mask::None => attention(q, k, v, None, None, options(false)),
        Mask::Causal => attention(q, k, v, None, None, options(true)),
    };
    out.swap_dims(1, 2).reshape([b, n, c])
}

fn options(is_causal: bool) -> AttentionModuleOptions {
    AttentionModuleOptions {
        scale: None,
        softcap: None,
        is_causal,
    }
}

/// `value · GELU(gate)` of `[value, gate]` on the last dimension
/// ([Shazeer 2020](https://arxiv.org/abs/2002.05202), GEGLU).
///
/// # Shapes
/// `[b, n, 2c]` to `[b, n, c]`.
pub fn gated_gelu(x: Tensor<3>) -> Tensor<3> {
    if fused::available(&x) {
        return fused::pointwise::gated_gelu(x);
    }
    let c = x.dims()[2] / 2;
    let gate = x.clone().narrow(2, c, c);
    x.narrow(2, 0, c) * Activation::Gelu.forward(gate)
}

/// Enlarges or shrinks by taking the nearest position above and to the left.
///
/// # Shapes
/// `[b, h, w, c]` to `[b, size[0], size[1], c]`.
pub fn resize_nearest(x: Tensor<4>, size: [usize; 2]) -> Tensor<4> {
    if fused::available(&x) {
        return fused::pointwise::resize_nearest(x, size);
    }
    let options = InterpolateOptions::new(InterpolateMode::Nearest).with_output_size(size);
    channels_last(interpolate(channels_first(x), options))
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, FloatDType};
    use safetensors::tensor::{Dtype, TensorView, serialize};

    use super::*;

    fn weights(tensors: &[(&str, &[usize], &[f32])]) -> Weights {
        let bytes: Vec<Vec<u8>> = tensors
            .iter()
            .map(|(_, _, v)| v.iter().flat_map(|x| x.to_le_bytes()).collect())
            .collect();
        let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
            (
                *name,
                TensorView::new(Dtype::F32, shape.to_vec(), bytes).unwrap(),
            )
        });
        let file = serialize(views, None).unwrap();
        Weights::from_bytes(file, "test", &Device::flex(), FloatDType::F32).unwrap()
    }

    fn assert_close<const D: usize>(found: Tensor<D>, expected: &[f32]) {
        let found = found.try_into_vec_as::<f32>().unwrap();
        assert_eq!(found.len(), expected.len());
        for (a, b) in found.iter().zip(expected) {
            assert!((a - b).abs() < 1e-5, "{found:?} != {expected:?}");
        }
    }

    fn tensor<const D: usize>(shape: [usize; D], values: &[f32]) -> Tensor<D> {
        Tensor::<1>::from_floats(values, &Device::flex()).reshape(shape)
    }

    #[test]
    fn linear_multiplies_by_the_transposed_weight() {
        let w = weights(&[
            ("weight", &[2, 3], &[1., 2., 3., 4., 5., 6.]),
            ("bias", &[2], &[10., 20.]),
        ]);
        let linear = Linear::load(&w, 3, 2).unwrap();
        assert_close(linear.forward(tensor([1, 3], &[1., 0., -1.])), &[8., 18.]);
        w.check_all_used(&[]).unwrap();
    }

    #[test]
    fn conv_correlates_without_flipping_the_kernel() {
        let w = weights(&[
            ("weight", &[1, 1, 2, 2], &[1., 2., 3., 4.]),
            ("bias", &[1], &[0.5]),
        ]);
        let conv = Conv2d::load(&w, [1, 1], 2, 1, 0).unwrap();
        assert_close(
            conv.forward(tensor([1, 1, 2, 2], &[1., 10., 100., 1000.])),
            &[4321.5],
        );
    }

    #[test]
    fn group_norm_normalises_each_group() {
        let w = weights(&[
            ("weight", &[4], &[1., 1., 2., 1.]),
            ("bias", &[4], &[0., 0., 0., 5.]),
        ]);
        let norm = GroupNorm::load(&w, 2, 4, 0.).unwrap();
        // Two positions of four channels.
        let y = norm.forward(tensor([1, 2, 1, 4], &[1., 3., 0., 8., 1., 3., 0., 8.]));
        assert_close(y, &[-1., 1., -2., 6., -1., 1., -2., 6.]);
    }

    #[test]
    fn layer_norm_normalises_rows() {
        let w = weights(&[("weight", &[2], &[1., 3.]), ("bias", &[2], &[0., 1.])]);
        let norm = LayerNorm::load(&w, 2, 0.).unwrap();
        assert_close(
            norm.forward(tensor([2, 2], &[1., 3., 7., 5.])),
            &[-1., 4., 1., -2.],
        );
    }

    #[test]
    fn activations_at_one() {
        let at_one = |activation: Activation| {
            activation
                .forward(tensor([1], &[1.]))
                .try_into_vec_as::<f32>()
                .unwrap()[0]
        };
        for (activation, expected) in [
            (Activation::Relu, 1.),
            (Activation::Silu, 0.731_058_6),
            (Activation::Gelu, 0.841_344_7),
            (Activation::QuickGelu, 0.845_795_7),
            (Activation::GeluTanh, 0.841_192),
        ] {
            assert!(
                (at_one(activation) - expected).abs() < 1e-5,
                "{activation:?}"
            );
        }
    }

    #[test]
    fn attention_heads_are_apart_and_masks_hide() {
        // Two heads of one dimension; head 0 has equal scores, head 1 scores ln 3 and 0.
        let q = tensor([1, 2, 2], &[0., 1., 0., 1.]);
        let k = tensor([1, 2, 2], &[7., 3f32.ln(), 9., 0.]);
        let v = tensor([1, 2, 2], &[0., 0., 4., 4.]);
        let attend = |mask| multi_head_attention(q.clone(), k.clone(), v.clone(), 2, mask);
        assert_close(attend(Mask::None), &[2., 1., 2., 1.]);
        assert_close(attend(Mask::Causal), &[0., 0., 2., 1.]);
        let hidden = tensor([1, 1, 2, 2], &[0., 0., 1., 0.]).greater_elem(0.5);
        assert_close(attend(Mask::Hidden(hidden)), &[2., 1., 4., 4.]);
    }
}
